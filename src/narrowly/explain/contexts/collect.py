"""Read which latents are how active at every token of a text set, once, to a folder.

Memory holds one shard, whatever the number of tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from narrowly.activations import Activations, OpenModel, Positions, chosen_tokens, stream
from narrowly.activations.disk import full_disk
from narrowly.errors import NarrowlyError
from narrowly.explain.contexts.cache import (
    FILES,
    FORMAT,
    INDEX,
    Cache,
    Shard,
    load_cache,
    read_index,
)
from narrowly.explain.latents import DirectionSource, Source, SparseSource
from narrowly.files import atomic, sha256, write_json

SHARD = 1 << 21
"""Values in a shard, and up to a batch more: 12 MB on disk, and 60 MB of memory to sort it."""


def collect(
    source: Source,
    model: OpenModel,
    rows: Dataset,
    folder: str | Path,
    *,
    positions: Positions = "all",
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> Cache:
    """Read all latents of a source on a text set, in one pass, to a folder.

    The first token of a row is not read: its activations are those of an attention sink. After a
    kill the same call goes on after the last whole shard; after the end it reads nothing.

    Args:
        rows: columns `input_ids` and `labels` (`concepts.reading.reading_rows`).
        positions: which tokens are read. What a model is about to say often shows best before it
            speaks, at tokens that no answer holds ("predicting", or -1).
        batch_tokens: the most tokens in one forward, padding included.
        progress: what a progress bar on the terminal calls this; None shows none.

    Raises:
        NarrowlyError: the folder holds something else, the disk becomes full, a value is not
            finite, there is nothing to read, or the model lacks a site.
    """
    folder = Path(folder)
    dense = isinstance(source, DirectionSource)
    skip_first = max(1, source.skip_first)
    batches = stream(
        model.model,
        rows,
        source.sites,
        positions=positions,
        max_norm=source.max_norm,
        skip_first=skip_first,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    names = source.names()
    told = [batches.fingerprint(), source.fingerprint(), *names]
    about = {
        "format": FORMAT,
        "fingerprint": sha256("\n".join(told).encode()),
        "dense": dense,
        "batches": len(batches),
    }
    shards = _resume(folder, about)
    if shards is None:
        _write_text_set(folder, rows, positions, skip_first)
        write_json(folder / "latents.json", names)
        shards = []
        _write_index(folder, about, shards)
    done = sum(shard.batches for shard in shards)
    if done < len(batches):
        offsets = np.load(folder / "rows.npy")
        with closing(batches.skip(done)) as read:
            for part in _parts(read, source, offsets):
                name = f"shard-{len(shards):05d}"
                with full_disk(folder), atomic(folder / name) as temporary:
                    temporary.mkdir()
                    for key, array in part.arrays(len(names)).items():
                        array.astype(FILES[key]).tofile(temporary / f"{key}.bin")
                counts = part.batches, part.values, part.tokens, part.clipped
                shards.append(Shard(name, *counts))
                _write_index(folder, about, shards)
    return load_cache(folder)


class _Part:
    """What goes into a shard, as it is collected."""

    def __init__(self, dense: bool):
        self.batches = self.values = self.tokens = self.clipped = 0
        self._dense = dense
        self._keys: list[NDArray[np.uint64]] = []
        self._values: list[NDArray[np.float16]] = []

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.float32], what: str) -> None:
        """Take in the values of a batch; the last dimension goes with the keys."""
        if not np.isfinite(values).all():
            raise NarrowlyError(f"{what}: a value is not finite. Load the model in float32.")
        small = np.clip(values, -_LARGEST, _LARGEST)
        self.clipped += int((small != values).sum())
        half = small.astype(np.float16)
        if not self._dense:
            half[half == 0] = _SMALLEST  # it is active
        self.values += half.size
        self._keys.append(keys)
        self._values.append(half)

    def arrays(self, n: int) -> dict[str, NDArray]:
        """What the shard's files hold."""
        keys = np.concatenate(self._keys)
        self._keys.clear()  # a shard is what memory holds at the most
        order = np.argsort(keys)
        positions = keys.astype(np.uint32)[order]  # the lower half of a key
        values = np.concatenate(self._values, axis=-1)
        self._values.clear()
        values = values[..., order]
        if self._dense:
            return {"positions": positions, "values": values}
        counts = np.bincount((keys >> _HALF).view(np.int64), minlength=n)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return {"offsets": offsets, "positions": positions, "values": values}


_LARGEST = np.float32(np.finfo(np.float16).max)
_SMALLEST = np.finfo(np.float16).smallest_subnormal
_HALF = np.uint64(32)


def _parts(batches: Iterable[Activations], source: Source, offsets: NDArray) -> Iterator[_Part]:
    """What each shard holds, in turn."""
    dense = isinstance(source, DirectionSource)
    part = _Part(dense)
    for batch in batches:
        positions = (offsets[batch.rows] + batch.tokens.numpy()).astype(np.uint64)
        part.batches += 1
        part.tokens += len(positions)
        if isinstance(source, DirectionSource):
            part.add(positions, source.project(batch).T.numpy(), ", ".join(map(str, source.sites)))
        else:
            found = cast(SparseSource, source).encode(batch)
            keys = found.latents.cpu().numpy().astype(np.uint64) << _HALF
            keys |= positions[found.tokens.cpu().numpy()]
            part.add(keys, found.values.float().cpu().numpy(), ", ".join(map(str, source.sites)))
        if part.values >= SHARD:
            yield part
            part = _Part(dense)
    if part.batches:
        yield part


def _write_text_set(folder: Path, rows: Dataset, positions: Positions, skip_first: int) -> None:
    """The tokens, where rows begin, and which tokens are read."""
    ends = [np.zeros(1, np.int64)]
    with (
        full_disk(folder),
        atomic(folder / "tokens.bin") as tokens,
        atomic(folder / "read.bin") as read,
        tokens.open("wb") as token_file,
        read.open("wb") as read_file,
    ):
        for table in rows.with_format("arrow").iter(1000):
            ids, labels = (
                table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                for column in ("input_ids", "labels")
            )
            lengths = pc.list_value_length(table["input_ids"]).to_numpy()
            stops = np.cumsum(lengths)
            place = np.arange(len(ids)) - np.repeat(stops - lengths, lengths)
            token_file.write(ids.astype(np.uint32).tobytes())
            chosen = np.zeros(len(ids), bool)
            for start, stop in zip((stops - lengths).tolist(), stops.tolist(), strict=True):
                chosen[start:stop][chosen_tokens(labels[start:stop], positions)] = True
            read_file.write(((place >= skip_first) & chosen).tobytes())
            ends.append(ends[-1][-1] + stops)
    offsets = np.concatenate(ends).astype(np.int64)
    if offsets[-1] >= 1 << 32:
        raise NarrowlyError(f"{folder}: {offsets[-1]:,} tokens are more than a cache can number.")
    with full_disk(folder), atomic(folder / "rows.npy") as temporary, temporary.open("wb") as file:
        np.save(file, offsets)


def _write_index(folder: Path, about: dict[str, Any], shards: list[Shard]) -> None:
    with full_disk(folder):
        write_json(folder / INDEX, about | {"shards": [shard._asdict() for shard in shards]})


def _resume(folder: Path, about: dict[str, Any]) -> list[Shard] | None:
    """The finished shards of an earlier call, None if there was none; and a tidy folder."""
    files = list(folder.iterdir()) if folder.exists() else []
    for path in files:
        if path.name.startswith(".") and path.suffix == ".part":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    names = {path.name for path in files if not path.name.startswith(".")}
    if INDEX not in names:
        if names - {"tokens.bin", "read.bin", "rows.npy", "latents.json"}:
            raise NarrowlyError(f"{folder}: holds other files. Name a new or an empty folder.")
        return None
    earlier = read_index(folder)
    if any(earlier.get(key) != value for key, value in about.items()):
        raise NarrowlyError(
            f"{folder}: holds contexts of other latents, another model or other data. Name another "
            "folder, or delete this one."
        )
    return [Shard(**shard) for shard in earlier["shards"]]
