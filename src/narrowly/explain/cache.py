"""Which latents are how active where in a text set, on disk: read once, looked up by latent.

A folder holds the tokens once (`tokens.bin`, uint32), where each row begins (`rows.npy`), which
tokens were read (`read.bin`), and shards. A shard of sparse latents is sorted by latent, with an
offset for each, so that one latent is read by slices; a shard of directions holds a row of
projections for each. Memory holds one shard, whatever the number of tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from narrowly.activations import Activations, OpenModel, Positions, chosen_tokens, stream
from narrowly.activations.disk import full_disk
from narrowly.errors import NarrowlyError
from narrowly.explain.grid import Grid
from narrowly.explain.latents import DirectionSource, Source, SparseSource
from narrowly.explain.threshold import peak_threshold
from narrowly.files import atomic, read_json, sha256, write_json

FORMAT = "narrowly contexts 1"

INDEX = "index.json"

SHARD = 1 << 22
"""Most values in a shard, a batch aside: about 40 MB on disk, and 150 MB of memory to sort it."""

WINDOW = 32
"""Tokens of a window, as published (Paulo et al. 2024, arXiv 2410.13928)."""


class Shard(NamedTuple):
    """One folder of a cache."""

    name: str
    batches: int
    """How many batches of the stream it holds."""
    values: int
    tokens: int
    """How many were read for it; those whose norm was too large were not."""
    clipped: int
    """Values too large for fp16, kept as its largest."""


@dataclass(frozen=True, eq=False)
class Cache:
    """A folder that `collect` wrote."""

    folder: Path
    latents: tuple[str, ...]
    """Names, in the source's order."""
    dense: bool
    """Directions, which have a projection at every token: latents are the ends of each in turn."""
    shards: tuple[Shard, ...]
    _grids: dict[int, Grid] = field(default_factory=dict, repr=False)
    _thresholds: dict[tuple[int, int], float] = field(default_factory=dict, repr=False)

    @cached_property
    def tokens(self) -> NDArray[np.uint32]:
        """Every token of the text set, row after row; a memory map."""
        return np.memmap(self.folder / "tokens.bin", np.uint32, "r")

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Where each row begins in `tokens`, and the end of the last."""
        return np.load(self.folder / "rows.npy")

    @cached_property
    def read(self) -> NDArray[np.bool_]:
        """Which tokens were read; a memory map."""
        return np.memmap(self.folder / "read.bin", np.bool_, "r")

    @property
    def clipped(self) -> int:
        """Values that were too large for fp16 and are kept as its largest, 65504."""
        return sum(shard.clipped for shard in self.shards)

    @cached_property
    def of_tokens(self) -> int:
        """How many tokens were read."""
        return sum(shard.tokens for shard in self.shards)

    def index(self, name: str) -> int:
        """The number of a latent by its name.

        Raises:
            NarrowlyError: there is none of that name.
        """
        try:
            return self.latents.index(name)
        except ValueError:
            raise NarrowlyError(f"{self.folder}: holds no latent named {name!r}.") from None

    def active(
        self, latent: int, window: int = WINDOW
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Where a latent is active, and how much: positions in `tokens`, ascending, and values.

        The value of a direction's end is by how much its projection exceeds the threshold.

        Args:
            window: of a direction: the windows whose peaks the threshold is computed from.
        """
        if not self.dense:
            return self._sparse(latent)
        heights = self._projections(latent)
        excess = heights - self._threshold(latent, window, heights)
        above = excess > 0
        return self._dense_order[0][above], excess[above]

    def threshold(self, latent: int, window: int = WINDOW) -> float:
        """What the projection of a direction's end has to exceed; 0 for other latents."""
        return self._threshold(latent, window) if self.dense else 0.0

    def _threshold(
        self, latent: int, window: int, heights: NDArray[np.float32] | None = None
    ) -> float:
        key = latent, window
        if key not in self._thresholds:
            heights = self._projections(latent) if heights is None else heights
            peaks = self.grid(window).peaks(self._dense_order[0], heights)
            self._thresholds[key] = peak_threshold(peaks[np.isfinite(peaks)])
        return self._thresholds[key]

    def grid(self, window: int = WINDOW) -> Grid:
        """The windows of the text set."""
        if window not in self._grids:
            self._grids[window] = Grid.over(self.tokens, self.rows, self.read, window)
        return self._grids[window]

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
        """Of sparse latents, the offsets (one per latent, and the end) and positions per shard."""
        for shard in self.shards:
            yield (
                self._read(shard, "offsets", 0, len(self.latents) + 1),
                self._read(shard, "positions", 0, shard.values),
            )

    def _sparse(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        found, values = [], []
        for shard in self.shards:
            start, stop = self._read(shard, "offsets", latent, 2)
            found.append(self._read(shard, "positions", start, stop - start))
            values.append(self._read(shard, "values", start, stop - start))
        positions, order = _ordered(np.concatenate(found))
        return positions, np.concatenate(values).astype(np.float32)[order]

    def _projections(self, latent: int) -> NDArray[np.float32]:
        """The projections at all tokens read, by position, with the sign of this end."""
        column, low = divmod(latent, 2)
        values = [self._read(s, "values", column * s.tokens, s.tokens) for s in self.shards]
        heights = np.concatenate(values).astype(np.float32)[self._dense_order[1]]
        return -heights if low else heights

    @cached_property
    def _dense_order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions of all tokens read, ascending, and where among the shards each stands."""
        found = [self._read(shard, "positions", 0, shard.tokens) for shard in self.shards]
        return _ordered(np.concatenate(found))

    def _read(self, shard: Shard, name: str, start: int, count: int) -> NDArray[Any]:
        # Not through a memory map: what it has touched would count as this process's memory.
        path = self.folder / shard.name / f"{name}.bin"
        dtype = np.dtype(_FILES[name])
        try:
            part = np.fromfile(path, dtype, count, offset=start * dtype.itemsize)
        except OSError as error:
            raise NarrowlyError(
                f"{path}: {error.strerror}. Delete the folder and collect again."
            ) from None
        if len(part) < count:
            raise NarrowlyError(f"{path}: truncated. Delete the folder and collect again.")
        return part


_FILES = {"offsets": "<i8", "positions": "<u4", "values": "<f2"}


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
                        array.astype(_FILES[key]).tofile(temporary / f"{key}.bin")
                counts = part.batches, part.values, part.tokens, part.clipped
                shards.append(Shard(name, *counts))
                _write_index(folder, about, shards)
    return load_cache(folder)


def load_cache(folder: str | Path) -> Cache:
    """Open a folder that `collect` wrote.

    Raises:
        NarrowlyError: there is none, or it is not finished.
    """
    folder = Path(folder)
    index = _read_index(folder)
    shards = tuple(Shard(**shard) for shard in index["shards"])
    if (done := sum(shard.batches for shard in shards)) < index["batches"]:
        raise NarrowlyError(
            f"{folder}: only {done} of {index['batches']} batches are read. Run the same again to "
            "go on."
        )
    names = tuple(read_json(folder / "latents.json"))
    return Cache(folder, names, index["dense"], shards)


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
        values = np.concatenate(self._values, axis=-1)
        order = np.argsort(keys)
        keys, values = keys[order], values[..., order]
        positions = keys.astype(np.uint32)  # the lower half of a key
        if self._dense:
            return {"positions": positions, "values": values}
        counts = np.bincount((keys >> _HALF).astype(np.int64), minlength=n)
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


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise NarrowlyError(f"{folder / INDEX}: no index of contexts.")
    return index


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
    earlier = _read_index(folder)
    if any(earlier.get(key) != value for key, value in about.items()):
        raise NarrowlyError(
            f"{folder}: holds contexts of other latents, another model or other data. Name another "
            "folder, or delete this one."
        )
    return [Shard(**shard) for shard in earlier["shards"]]


def _ordered(positions: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(positions, kind="stable")
    return positions[order].astype(np.int64), order
