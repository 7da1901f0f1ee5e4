"""Texts that a person types, read by the model while they are typed."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from narrowly.activations import ModelLike, OpenModel, open_model
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, capture, eval_mode
from narrowly.models import fingerprint, same_model
from narrowly.review.shelf import Shelf

LONGEST = 1024
"""Tokens of a typed text that are read."""


class Live:
    """A model that is loaded when the first text comes, and reads one text at a time."""

    def __init__(self, model: ModelLike):
        self._model = model
        self._opened: OpenModel | None = None
        self._fingerprint = ""
        self._lock = threading.Lock()

    @torch.no_grad()
    def read(self, shelf: Shelf, name: str, text: str) -> dict[str, Any]:
        """A text's tokens, and what each projects on every direction of a concept.

        Returns:
            `pieces`, which joined are the text; `projections`, by site, one list of numbers per
            column of the basis, with null at the first token, whose activations are those of an
            attention sink; `cut`, whether the text was too long.

        Raises:
            NarrowlyError: the model cannot be loaded, or is not the concept's.
        """
        entry = shelf.entry(name)
        with self._lock:
            opened = self._open()
            if not same_model(self._fingerprint, entry.provenance.model_fingerprint):
                raise NarrowlyError(
                    f"{name}: found on {entry.provenance.model}, but {opened.name} is another "
                    f"model. Start with --model {entry.provenance.model}."
                )
            ids, pieces, cut = tokens(opened.tokenizer, text)
            bases = {Site.parse(site): basis for site, basis in shelf.subspaces(name).items()}
            if not ids:
                return {"pieces": [], "projections": {}, "cut": False}
            embedding: Any = opened.model.get_input_embeddings()
            batch = {"input_ids": torch.tensor([ids], device=embedding.weight.device)}
            with eval_mode(opened.model):
                captured = capture(opened.model, batch, list(bases))
            projections = {}
            for site, basis in bases.items():
                values = captured[site][0].float() @ basis.to(captured[site].device)
                projections[str(site)] = [[None, *column[1:]] for column in values.T.tolist()]
        return {"pieces": pieces, "projections": projections, "cut": cut}

    def _open(self) -> OpenModel:
        if self._opened is None:
            self._opened = open_model(self._model)
            self._fingerprint = fingerprint(self._opened.model)
        return self._opened


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[str], bool]:
    """Ids and their pieces of the text; a character of several tokens stands with the first.

    The pieces are cut from the text itself, so they show what was typed whatever the tokenizer
    makes of it; tokens it adds, such as a BOS, have empty ones.
    """
    pieces: list[str] = []
    if not tokenizer.is_fast:
        ids: list[int] = tokenizer(text)["input_ids"]
        for i in range(min(len(ids), LONGEST)):
            pieces.append(str(tokenizer.decode(ids[: i + 1]))[sum(map(len, pieces)) :])
        return ids[:LONGEST], pieces, len(ids) > LONGEST
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, reached = encoded["input_ids"], 0
    for _, end in encoded["offset_mapping"][:LONGEST]:
        end = max(end, reached)
        pieces.append(text[reached:end])
        reached = end
    if pieces and len(ids) <= LONGEST:
        pieces[-1] += text[reached:]
    return ids[:LONGEST], pieces, len(ids) > LONGEST
