"""Token representation: the chat template's tokens keep their meaning (TReFT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from narrowly.data import ChatTemplate
from narrowly.data.templates import PROBE
from narrowly.defenses.base import DEFENSES, Referenced
from narrowly.defenses.step import Step, check_trained, real
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, decoder_layers, layer, resolve


@DEFENSES.register("token_representation")
class TokenRepresentation(Referenced):
    """Hold the residual stream at the chat template's tokens near the base model's.

    `L = CE + weight * mean over those tokens and layers of |h - h_base|^2 / |h_base|^2`. After
    TReFT (2026, arXiv 2606.06667), which penalises a change of the template's tokens because they
    carry who is speaking. Its exact loss and weight were not recovered, so this form, relative and
    thus free of units, is our own.

    The tokens: all special and added ones (roles, end of turn, BOS) but padding, and the prompt
    that the template writes before each answer.

    Needs: the reference's activations, one forward pass without the head in every step; a tokenizer
    with a chat template.

    Known failure: only what passes through these tokens is held. What the model reads off the
    question itself can still change, and a template without tokens of its own gives no hold.

    Attributes:
        weight: of the relative squared distance, which is 1 where h has gone as far as it is long;
            1.0 is a guess, not published.
        layers: after which blocks; by default after all.
        reference: the model to compare with. None: the one that is trained, its adapter off.
    """

    weight: float = Field(default=1.0, ge=0)
    layers: list[int] | None = Field(default=None, min_length=1)

    _special: list[int] = PrivateAttr(default_factory=list)
    _prompt: int = PrivateAttr(default=0)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Learn the template's tokens.

        Raises:
            NarrowlyError: it has none, or the model has no such layer.
        """
        resolve(model, *self.reads(model))
        special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._special = sorted(special)
        template = ChatTemplate(tokenizer)
        question = template.render(PROBE[:1], 0)
        asked = template.render(PROBE[:1], 0, generation_prompt=True)
        prompt = asked[len(question) :] if asked.startswith(question) else ""
        self._prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        written = tokenizer(asked, add_special_tokens=False)["input_ids"]
        if not self._prompt and not special.intersection(written):
            raise NarrowlyError(
                "token_representation: the chat template writes no token of its own, neither a "
                "special one nor a prompt before the answer, so there is nothing to hold."
            )

    def reads(self, model: nn.Module) -> Sequence[Site]:
        """After every block, or those asked for."""
        chosen = range(len(decoder_layers(model))) if self.layers is None else self.layers
        return [layer(i) for i in chosen]

    def tokens(self, batch: dict[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
        """The template's tokens: special ones, and the prompt before each answer."""
        ids, answered = batch["input_ids"], batch["labels"] != -100
        chosen = torch.isin(ids, torch.tensor(self._special, device=ids.device))
        # One to the left at a time, from each answer's first token.
        edge = answered & ~answered.roll(1, dims=1)
        edge[:, 0] = answered[:, 0]
        for _ in range(self._prompt):
            edge = edge.roll(-1, dims=1)
            edge[:, -1] = False
            chosen |= edge & ~answered
        return chosen & real(batch)

    def loss(self, step: Step) -> Tensor:
        """The mean over the chosen tokens and layers."""
        chosen = self.tokens(step.batch)
        sites = self.reads(step.bare)
        check_trained(step, sites)
        distances = []
        for site in sites:
            h, base = step.tuned[site][chosen].float(), step.base[site][chosen].float()
            distances.append((h - base).square().sum(-1) / base.square().sum(-1))
        count = max(1, int(chosen.sum()))
        return self.weight * torch.stack(distances).sum() / (count * len(sites))
