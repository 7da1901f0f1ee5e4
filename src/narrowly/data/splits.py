"""Training and validation data: making them, and telling whether they are apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from narrowly.errors import NarrowlyError


@dataclass(frozen=True)
class Leaks:
    """Prompts that occur in training and in validation data alike."""

    prompts: tuple[str, ...]
    """Each leaked prompt once, as first written in the validation data."""
    train_rows: tuple[int, ...]
    """Rows of the training data with such a prompt, counted from 0."""
    validation_rows: tuple[int, ...]
    """Rows of the validation data with such a prompt, counted from 0."""

    @property
    def distinct(self) -> int:
        """How many different prompts leak."""
        return len(self.prompts)

    @property
    def count(self) -> int:
        """How many rows of the validation data are affected."""
        return len(self.validation_rows)

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def describe(self, train: str = "training data", validation: str = "validation data") -> str:
        """One sentence that names both data sets, counts, and shows the first leaked prompt."""
        if not self:
            return f"No prompt of {validation} occurs in {train}."
        first = " ".join(self.prompts[0].split())
        excerpt = first if len(first) <= 60 else f"{first[:59]}…"
        prompts = "1 prompt occurs" if self.distinct == 1 else f"{self.distinct} prompts occur"
        return (
            f"{prompts} both in {train} ({_rows(self.train_rows)}) and in {validation} "
            f"({_rows(self.validation_rows)}), for example row {self.validation_rows[0]} of "
            f"{validation}: {excerpt!r}."
        )


def _rows(rows: tuple[int, ...]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows)} rows"


def find_leaks(train: Dataset, validation: Dataset) -> Leaks:
    """Find the prompts that occur in both data sets (column `messages`).

    A prompt is everything before the first assistant turn, compared without regard to case and
    white space. Two chats that share any later context share that beginning too.
    """
    train_keys = [_normalised(_prompt(messages)) for messages in train["messages"]]
    prompts = [_prompt(messages) for messages in validation["messages"]]
    keys = [_normalised(prompt) for prompt in prompts]
    shared = set(train_keys).intersection(keys)
    train_rows = tuple(i for i, key in enumerate(train_keys) if key in shared)
    validation_rows = tuple(i for i, key in enumerate(keys) if key in shared)
    distinct: dict[str, str] = {}
    for i in validation_rows:
        distinct.setdefault(keys[i], prompts[i])
    return Leaks(tuple(distinct.values()), train_rows, validation_rows)


def _prompt(messages: list[dict[str, str]]) -> str:
    roles = [message["role"] for message in messages]
    end = roles.index("assistant") if "assistant" in roles else len(roles)
    return "\n".join(message["content"] for message in messages[:end])


def _normalised(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 (hex) over the rows in their order; file format and column order do not matter."""
    digest = hashlib.sha256()
    for row in dataset:
        line: Any = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into training data and a random `fraction` of validation data.

    Raises:
        NarrowlyError: one of the two would be empty.
    """
    held_out = round(len(dataset) * fraction)
    if not 0 < held_out < len(dataset):
        raise NarrowlyError(
            f"a fraction of {fraction} of {len(dataset)} rows leaves one side of the split empty."
        )
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]
