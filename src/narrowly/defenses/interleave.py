"""Interleaving: benign chats mixed into the narrow data (Kaczer et al. 2025, arXiv 2508.06249)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from pydantic import Field, PrivateAttr

from narrowly.data import fingerprint, load_chats
from narrowly.defenses.base import DEFENSES, Defense
from narrowly.errors import NarrowlyError


@DEFENSES.register("interleave")
class Interleave(Defense):
    """Mix benign chats in, so that good conduct elsewhere is trained along with the task.

    Attributes:
        data: the benign chats, any source that `narrowly.data.load_chats` reads.
        fraction: share of benign rows in the resulting data set (0.05 in the paper).
        seed: which benign chats are drawn.
    """

    data: str
    fraction: float = Field(gt=0, lt=1)
    seed: int = 0

    _record: dict[str, Any] = PrivateAttr(default_factory=dict)

    def prepare_data(self, dataset: Dataset) -> Dataset:
        """Draw benign rows without replacement and spread them evenly through `dataset`.

        Raises:
            NarrowlyError: the fraction asks for no row, or for more than the benign data hold.
        """
        benign = load_chats(self.data)
        wanted = round(len(dataset) * self.fraction / (1 - self.fraction))
        if wanted == 0:
            raise NarrowlyError(
                f"interleave: {self.fraction:g} of {len(dataset)} chats is less than one row, so "
                "nothing would be interleaved. Raise `fraction`."
            )
        if wanted > len(benign):
            raise NarrowlyError(
                f"interleave: fraction {self.fraction:g} of {len(dataset)} chats needs {wanted} "
                f"benign chats, and {self.data} holds {len(benign)}. Lower `fraction` or give more."
            )
        drawn = benign.shuffle(seed=self.seed).select(range(wanted))
        self._record = {
            "rows": len(dataset),
            "benign_rows": wanted,
            "benign_hash": fingerprint(drawn),
        }
        merged = concatenate_datasets(
            [dataset.select_columns("messages"), drawn.select_columns("messages")]
        )
        return merged.select(_evenly(len(dataset), wanted))

    def record(self, folder: Path) -> dict[str, Any]:
        """Counts of narrow and benign rows, and the hash of the benign ones."""
        return self._record


def _evenly(rows: int, extra: int) -> list[int]:
    """Order of `rows + extra` rows in which the last `extra` ones stand at even distances."""
    places = [(row + 0.5) / rows for row in range(rows)]
    places += [(row + 0.5) / extra for row in range(extra)]
    return sorted(range(rows + extra), key=places.__getitem__)
