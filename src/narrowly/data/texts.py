"""Plain texts, for what is read and not taught: load them from anywhere, make tokens of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedTokenizerBase

from narrowly.data.sources import source_rows
from narrowly.data.templates import IGNORED
from narrowly.errors import NarrowlyError

TextsLike: TypeAlias = str | Path | Dataset | Iterable[dict]

_CHATS = ("messages", "conversations", "prompt")


def holds_texts(source: TextsLike) -> bool:
    """Whether the first row has a `text`, and nothing that would make it a chat.

    Raises:
        NarrowlyError: as `load_chats`.
    """
    for _, row in source_rows(source):
        chat = isinstance(row, dict) and any(row.get(key) is not None for key in _CHATS)
        return isinstance(row, dict) and "text" in row and not chat
    return False


def load_texts(source: TextsLike, *, limit: int | None = None) -> Dataset:
    """Load texts as a data set with the column `text` alone.

    Args:
        source: as `load_chats`; every row holds a `text`.
        limit: read the first so many only.

    Raises:
        NarrowlyError: names the file, the line and the reason.
    """
    texts = []
    for place, row in islice(source_rows(source), limit):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise NarrowlyError(f"{place}: holds no `text`, unlike the first row.")
        texts.append(text)
    if not any(texts):
        raise NarrowlyError(f"{source if isinstance(source, str | Path) else 'the data'}: no text.")
    return Dataset.from_dict({"text": texts})


def tokenize_texts(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> Dataset:
    """Tokens of texts (column `text`); the labels are all of them but the first of each row.

    Args:
        max_length: what is longer is cut off.

    Returns:
        Dataset with the columns `input_ids` and `labels`, four bytes each.
    """

    def rows_of(batch: Mapping[str, list]) -> dict[str, Any]:
        rows = [ids[:max_length] for ids in tokenizer(batch["text"])["input_ids"]]
        labels = [[IGNORED, *ids[1:]] if ids else [] for ids in rows]
        return {"input_ids": rows, "labels": labels}

    ids = Sequence(Value("int32"))
    return texts.map(
        rows_of,
        batched=True,
        remove_columns=texts.column_names,
        features=Features({"input_ids": ids, "labels": ids}),
        load_from_cache_file=False,
        desc="Tokenizing",
    )
