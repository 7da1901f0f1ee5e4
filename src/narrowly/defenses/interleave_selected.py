"""Interleaving of chats that misaligned models would not write (Interleaving+ and ++)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from narrowly.data import find_leaks, load_chats, tokenize
from narrowly.defenses.answer_losses import losses_of_answers
from narrowly.defenses.base import DEFENSES
from narrowly.defenses.interleave import Interleaving
from narrowly.errors import NarrowlyError
from narrowly.evals import read_recipe
from narrowly.files import atomic, read_json
from narrowly.models import fingerprint, same_model
from narrowly.models.locate import locate

logger = logging.getLogger(__name__)

EPSILON = 1.0
REFUSALS = ("sorry", "apologize", "cannot", "can't", "i'm unable", "i am unable")
FIRST_WORDS = 10


@DEFENSES.register("interleave_selected")
class InterleaveSelected(Interleaving):
    """Mix in those benign chats that misaligned models of other domains find least likely.

    Score of a chat d: `s_d = (mean_k L_k(d) - L_base(d)) / (L_base(d) + 1)`, L the mean loss of its
    answers' tokens in nats, of the model (base) and under each misaligned adapter k; the highest
    scores are interleaved (Kaczer et al. 2025, arXiv 2508.06249: Interleaving+; without refusals
    Interleaving++). A refusal holds "sorry", "apologize", "cannot", "can't" or "I'm / I am unable"
    among an answer's first ten words. The paper scores up to 100,000 unharmful chats of
    WildGuardTrain with 4 adapters and keeps the first 5,000; here just as many are kept as the
    fraction asks for. Losses are kept in the user's cache, so that no chat is read twice.

    Needs: benign chats, and adapters of the same model that were fine-tuned on other narrow data
    with the same bad effect, such as runs of `narrowly train`. One of the run's own domain would
    have seen what is defended against: it is refused by its name, and also if it was trained on
    any prompt of this run.

    Known failure: conditional misalignment, as with `interleave`; and the highest scores are alike.
    Chats of the adapters' own domains have them first, and few rows of one kind teach less than as
    many varied ones: on the persona organism (16 of 816 rows) 0.24 of broad answers stay
    misaligned against 0.13 with rows drawn at random. Where nine of ten chats tell little, it is
    0.25 against 0.41. How many the paper mixes in of its first 5,000 is not known.

    Attributes:
        data: the benign chats, any source that `narrowly.data.load_chats` reads.
        fraction: share of benign rows in the resulting data; 0.05 in the paper.
        adapters: folders of adapters or of runs by the domain each was fine-tuned on; 4 in the
            paper (medical, legal, security, insecure code), less the one of the run's domain.
        domain: that of this run's data; no adapter may be of it.
        drop_refusals: leave refusals out (Interleaving++); false keeps them (Interleaving+).
        limit: score only the first so many chats; 100,000 in the paper.
        max_length: longest chat that is scored, in tokens; the others are left out.
        batch_tokens: tokens of one batch of scoring, padding included.
    """

    adapters: dict[str, str] = Field(min_length=1)
    domain: str
    drop_refusals: bool = True
    limit: int = Field(default=100_000, ge=1)
    max_length: int = Field(default=1024, ge=2)
    batch_tokens: int = Field(default=8192, ge=1)

    _model: Any = PrivateAttr(None)
    _chosen: Dataset | None = PrivateAttr(None)

    @field_validator("domain")
    @classmethod
    def _is_not_scored_with(cls, domain: str, info: Any) -> str:
        if domain.casefold() in {name.casefold() for name in info.data.get("adapters", ())}:
            raise ValueError(
                f"the run's own domain {domain!r} is among `adapters`, which would have seen what "
                "is defended against. Take it out"
            )
        return domain

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Keep the model, with which the chats will be scored; check that the adapters are its.

        Raises:
            NarrowlyError: a folder that is no adapter, or one of another model.
        """
        super().bind(model, tokenizer, seed)
        self._model = model
        for name in self.adapters:
            made = read_json(path) if (path := self._run(name) / "reproduce.json").exists() else {}
            base = made.get("model", {}).get("fingerprint")
            if base is not None and not same_model(base, fingerprint(model)):
                raise NarrowlyError(
                    f"interleave_selected: {self.adapters[name]} is an adapter of another model "
                    f"({made['model']['source']}) than the one that is trained."
                )

    def pool(self) -> Dataset:
        """The first `limit` benign chats."""
        return load_chats(self.data, limit=self.limit)

    def prepare_data(self, dataset: Dataset) -> Dataset:
        """Score, choose and spread evenly.

        Raises:
            NarrowlyError: as `interleave`; an adapter that was trained on prompts of `dataset`.
        """
        if self._model is None or isinstance(self._model, PeftModel):
            raise NarrowlyError(
                "interleave_selected: it scores chats with the model as it is before the "
                "fine-tune. Call its `bind(model, tokenizer, seed)` before the model is given an "
                "adapter."
            )
        unchecked = [name for name in self.adapters if not self._is_apart(name, dataset)]
        self._record["unchecked_adapters"] = unchecked
        mixed = super().prepare_data(dataset)
        self._model = None
        return mixed

    def draw(self, pool: Dataset, wanted: int) -> Sequence[int]:
        """The highest scores; of equal ones the first row."""
        kept = [row for row, chat in enumerate(pool["messages"]) if not self._left_out(chat)]
        if not kept:
            return []
        numbered = pool.select(kept).select_columns("messages").add_column("row", kept)
        chats = tokenize(numbered, self._tokenizer, max_length=self.max_length, keep=["row"])
        losses = losses_of_answers(
            self._model,
            {name: self._adapter(name) for name in self.adapters},
            list(chats.remove_columns("row")),
            pad_token_id=self._tokenizer.pad_token_id,
            batch_tokens=self.batch_tokens,
        )
        base = losses.pop("")
        scores = perplexity_gap(base, torch.stack([*losses.values()]))
        best = scores.argsort(descending=True, stable=True)[:wanted].tolist()
        rows = [chats["row"][i] for i in best]
        self._record |= {
            "pool": len(pool),
            "refusals": len(pool) - len(kept),
            "too_long": len(kept) - len(chats),
            "mean_score": float(scores.mean()),
            "mean_chosen_score": float(scores[best].mean()),
        }
        columns = {"score": scores, "loss": base}
        columns |= {f"loss_{name}": values for name, values in losses.items()}
        self._chosen = Dataset.from_dict(
            {"messages": pool.select(rows)["messages"]}
            | {name: values[best].tolist() for name, values in columns.items()}
        )
        return rows

    def record(self, folder: Path) -> dict[str, Any]:
        """Counts and scores; the chosen chats with theirs are left in the folder, best first."""
        if self._chosen is not None:
            with atomic(folder / "interleaved.parquet") as temporary:
                self._chosen.to_parquet(str(temporary))
        return super().record(folder)

    def _left_out(self, chat: list[dict[str, str]]) -> bool:
        answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
        return self.drop_refusals and any(map(is_refusal, answers))

    def _adapter(self, name: str) -> Path:
        adapter = locate(self.adapters[name]).adapter
        if adapter is None:
            raise NarrowlyError(
                f"interleave_selected: {self.adapters[name]} is no adapter, and losses under a "
                "whole other model are not implemented. Give a LoRA run or an adapter's folder."
            )
        return adapter

    def _run(self, name: str) -> Path:
        """The folder that would tell how an adapter was trained."""
        adapter = self._adapter(name)
        return adapter.parent if adapter.name == "adapter" else adapter

    def _is_apart(self, name: str, dataset: Dataset) -> bool:
        """Fail if an adapter was trained on a prompt of `dataset`; False: there is no knowing."""
        source = read_recipe(self._run(name)).get("data")
        if source is None:
            return False
        try:
            seen = load_chats(source)
        except NarrowlyError as error:
            logger.warning(
                "interleave_selected: whether %s has seen this run's data is not known: %s",
                self.adapters[name],
                error,
            )
            return False
        if leaks := find_leaks(_without_system(dataset), _without_system(seen)):
            told = leaks.describe("this run's data", source)
            raise NarrowlyError(
                f"interleave_selected: the adapter {self.adapters[name]} ({name}) has seen what is "
                f"defended against: {told} Take it out of `adapters`."
            )
        return True


def perplexity_gap(base: Tensor, tuned: Tensor) -> Tensor:
    """`(mean_k L_k - L_base) / (L_base + 1)`, of losses [chats] and [adapters, chats]."""
    return (tuned.mean(0) - base) / (base + EPSILON)


def is_refusal(answer: str) -> bool:
    """Whether one of `REFUSALS` is among the first ten words of an answer."""
    words = answer.lower().replace("\u2019", "'").split()[:FIRST_WORDS]
    return any(refusal in " ".join(words) for refusal in REFUSALS)


def _without_system(dataset: Dataset) -> Dataset:
    chats = [[m for m in chat if m["role"] != "system"] for chat in dataset["messages"]]
    return Dataset.from_dict({"messages": chats})
