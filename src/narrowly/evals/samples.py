"""`samples.parquet`: every answer of one eval of one run, with how it was asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from narrowly.errors import NarrowlyError
from narrowly.evals.base import Row

KEY = b"narrowly"
SCHEMA = pa.schema(
    [
        pa.field("eval", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("scores", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("tags", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Samples:
    """Rows of one eval, and `about`: its name, resolved arguments, seed and versions."""

    rows: list[Row]
    about: dict[str, Any]


def write_samples(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write rows as parquet (zstd); `about` goes into the schema's metadata as JSON."""
    records = [{**row, "eval": about["eval"], "seed": about["seed"]} for row in rows]
    schema = SCHEMA.with_metadata({KEY: json.dumps(about)})
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path, compression="zstd")


def read_samples(path: Path) -> Samples:
    """Read what `write_samples` wrote.

    Raises:
        NarrowlyError: the file is absent, truncated, or from elsewhere.
    """
    file = _open(path)
    rows = file.read().to_pylist(maps_as_pydicts="strict")
    return Samples(cast(list[Row], rows), _about(file))


def read_about(path: Path) -> dict[str, Any]:
    """Only `Samples.about`, without reading the rows. Raises as `read_samples`."""
    return _about(_open(path))


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise NarrowlyError(f"{path}: no such file.") from None
    except pa.ArrowInvalid as error:
        raise NarrowlyError(
            f"{path}: not a whole parquet file ({error}). Measure again with force."
        ) from None
    missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
    if missing or KEY not in (file.schema_arrow.metadata or {}):
        what = f"it lacks the columns {', '.join(missing)}" if missing else "it names no eval"
        raise NarrowlyError(f"{path}: not the samples of an eval of narrowly: {what}.")
    return file


def _about(file: pq.ParquetFile) -> dict[str, Any]:
    return json.loads(file.schema_arrow.metadata[KEY])
