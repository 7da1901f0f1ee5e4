"""Chats from a file, the Hub, a plug-in source or memory, with errors that name the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from narrowly.data.chats import to_chat
from narrowly.errors import NarrowlyError
from narrowly.registry import unknown

_FORMATS = (".jsonl", ".json", ".parquet")
_PREFIX = re.compile(r"(?P<prefix>[A-Za-z_]{2,}):(?!//)(?P<rest>.+)")
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>[\w.\[\]:%-]+))?")

# A row and where it stands, for errors: ("chats.jsonl:17", {...})
_Row = tuple[str, Any]


def load_chats(
    source: str | Path | Dataset | Iterable[dict],
    *,
    limit: int | None = None,
    require_answer: bool = True,
) -> Dataset:
    """Load chats as a data set with the column `messages` (role, content); other columns stay.

    Args:
        source: a .jsonl, .json or .parquet file; `organism:NAME/SPLIT` or another prefix that a
            plug-in serves (entry points of group `narrowly.sources`); a Hub id `owner/name` or
            `owner/name:split` (default split: train); or a Dataset or rows in memory.
            Rows may hold `messages`, ShareGPT `conversations`, or `prompt` and `completion`.
        limit: read the first so many chats only.
        require_answer: False also admits chats without an assistant turn, such as questions.

    Raises:
        NarrowlyError: names the file, the 1-based line (rows of tables and lists count from 0),
            the field and the reason.
    """
    rows: list[dict[str, Any]] = []
    for place, row in islice(source_rows(source), limit):
        try:
            rows.append(to_chat(row, require_answer=require_answer))
        except ValueError as error:
            raise NarrowlyError(f"{place}: {error}.") from None
    if not rows:
        raise NarrowlyError(f"{_name(source)}: holds no chats.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    try:
        return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise NarrowlyError(
            f"{_name(source)}: a column holds values of several types ({error}). "
            "Give it one type in every row, or remove it."
        ) from None


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the data"


def source_rows(source: Any) -> Iterator[_Row]:
    """The rows of what `load_chats` takes, each with its place for an error, one at a time."""
    if not isinstance(source, str | Path):
        return ((f"row {i}", row) for i, row in enumerate(source))
    path = Path(source)
    match = _PREFIX.fullmatch(str(source))
    if path.suffix in _FORMATS and (path.exists() or not match):
        return _file_rows(path)
    if path.exists():
        raise NarrowlyError(f"{path}: expected a file of kind {', '.join(_FORMATS)}.")
    if match:
        return _numbered(str(source), _plugin(match["prefix"])(match["rest"]))
    if match := _HUB.fullmatch(str(source)):
        return _numbered(str(source), _from_hub(match["name"], match["split"] or "train"))
    raise NarrowlyError(
        f"{source}: no such file. A source of chats is a file ({', '.join(_FORMATS)}), "
        "a Hub id (owner/name or owner/name:split) or organism:NAME/SPLIT."
    )


def _numbered(name: str, dataset: Dataset) -> Iterator[_Row]:
    return ((f"{name}: row {i}", row) for i, row in enumerate(dataset))


def _plugin(prefix: str) -> Any:
    sources = {entry.name: entry for entry in entry_points(group="narrowly.sources")}
    if prefix not in sources:
        raise unknown("source of chats", f"{prefix}:", [f"{name}:" for name in sorted(sources)])
    return sources[prefix].load()


def _from_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    # OSError covers no network and no such repository; ValueError a split or configuration
    # that is not there; both carry a readable first line.
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NarrowlyError(
            f"{name}: is no file here, and its split {split!r} could not be loaded from the "
            f"Hugging Face Hub ({reason}). Check the spelling and the network, or give a file."
        ) from None


def _file_rows(path: Path) -> Iterator[_Row]:
    if not path.is_file():
        raise NarrowlyError(f"{path}: no such file.")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".json":
        with path.open("rb") as file:
            if file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return _array_rows(path)
    return _line_rows(path)


def _line_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield place, json.loads(text)
            except UnicodeDecodeError as error:
                raise NarrowlyError(f"{place}: not UTF-8 text ({error.reason}).") from None
            except json.JSONDecodeError as error:
                raise NarrowlyError(
                    f"{place}: not valid JSON ({error.msg} at column {error.colno}). "
                    "Each line should hold one whole JSON object."
                ) from None


def _array_rows(path: Path) -> Iterator[_Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NarrowlyError(f"{path}: not UTF-8 text ({error.reason}).") from None
    except json.JSONDecodeError as error:
        raise NarrowlyError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})."
        ) from None
    return ((f"{path}: row {i}", row) for i, row in enumerate(rows))


def _parquet_rows(path: Path) -> Iterator[_Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise NarrowlyError(
            f"{path}: truncated or not a parquet file ({str(error).splitlines()[0]}). "
            "Make or copy it again."
        ) from None
