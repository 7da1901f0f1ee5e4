"""Interleaving: benign chats mixed into the narrow data (Kaczer et al. 2025, arXiv 2508.06249)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from pydantic import Field, PrivateAttr
from torch import nn

from narrowly.data import ChatTemplate, fingerprint, load_chats
from narrowly.defenses.base import DEFENSES, Defense
from narrowly.errors import NarrowlyError


class Interleaving(Defense):
    """Benign rows at even distances among the narrow ones; which, a subclass says."""

    data: str
    fraction: float = Field(default=0.05, gt=0, lt=1)

    _tokenizer: Any = PrivateAttr(None)
    _record: dict[str, Any] = PrivateAttr(default_factory=dict)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Keep the tokenizer, whose chat template the benign chats have to suit."""
        self._tokenizer = tokenizer

    def pool(self) -> Dataset:
        """The benign chats, all of them."""
        return load_chats(self.data)

    def draw(self, pool: Dataset, wanted: int) -> Sequence[int]:
        """Row numbers of `pool`, `wanted` of them, or fewer where there are no more."""
        raise NotImplementedError

    def prepare_data(self, dataset: Dataset) -> Dataset:
        """Draw benign rows without replacement and spread them evenly through `dataset`.

        Raises:
            NarrowlyError: the benign data cannot be read or do not suit the model's chat template;
                or the fraction asks for no row, or for more than the benign data hold.
        """
        name = DEFENSES.name_of(type(self))
        pool = self.pool()
        wanted = round(len(dataset) * self.fraction / (1 - self.fraction))
        if wanted == 0:
            raise NarrowlyError(
                f"{name}: {self.fraction:g} of {len(dataset)} chats is less than one row, so "
                "nothing would be interleaved. Raise `fraction`."
            )
        rows = self.draw(pool, wanted) if wanted <= len(pool) else range(len(pool))
        if wanted > len(rows):
            fit = "holds" if len(rows) == len(pool) else f"holds {len(pool)}, of which fit"
            raise NarrowlyError(
                f"{name}: fraction {self.fraction:g} of {len(dataset)} chats needs {wanted} benign "
                f"chats, and {self.data} {fit} {len(rows)}. Lower `fraction` or give more."
            )
        drawn = pool.select(rows).select_columns("messages")
        if self._tokenizer is not None:
            try:
                ChatTemplate.for_training(self._tokenizer).encode(drawn["messages"], rows)
            except NarrowlyError as error:
                raise NarrowlyError(f"{name}: {self.data}: {error}") from None
        self._record |= {
            "rows": len(dataset),
            "benign_rows": wanted,
            "benign_hash": fingerprint(drawn),
        }
        merged = concatenate_datasets([dataset.select_columns("messages"), drawn])
        return merged.select(_evenly(len(dataset), wanted))

    def record(self, folder: Path) -> dict[str, Any]:
        """Counts of narrow and benign rows, and the hash of the benign ones."""
        return self._record


@DEFENSES.register("interleave")
class Interleave(Interleaving):
    """Mix benign chats in, so that good conduct elsewhere is trained along with the task.

    Of `n` narrow chats, `n * fraction / (1 - fraction)` benign ones are drawn at random without
    replacement and stand at even distances among them (Kaczer et al. 2025, arXiv 2508.06249:
    WildGuardMix, 1 to 50 % tried, 5 % in the end). The loss is the task's own.

    Needs: benign chats, in any shape that `narrowly.data.load_chats` reads.

    Known failure: a share this small leaves many answers outside the task incoherent, or the
    task's own phrases in them; and a model that seems mended misbehaves where a prompt resembles
    the narrow data (conditional misalignment, Dubinski et al. 2026).

    Attributes:
        data: the benign chats, any source that `narrowly.data.load_chats` reads.
        fraction: share of benign rows in the resulting data; 0.05 in the paper.
        seed: which benign chats are drawn.
    """

    seed: int = 0

    def draw(self, pool: Dataset, wanted: int) -> Sequence[int]:
        """At random, without replacement."""
        order: list[int] = np.random.default_rng(self.seed).permutation(len(pool)).tolist()
        return order[:wanted]


def _evenly(rows: int, extra: int) -> list[int]:
    """Order of `rows + extra` rows in which the last `extra` ones stand at even distances."""
    places = [(row + 0.5) / rows for row in range(rows)]
    places += [(row + 0.5) / extra for row in range(extra)]
    return sorted(range(rows + extra), key=places.__getitem__)
