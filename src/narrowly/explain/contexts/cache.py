"""Which latents are how active where in a text set, on disk, looked up by latent.

A folder holds the tokens once (`tokens.bin`, uint32), where each row begins (`rows.npy`), which
tokens were read (`read.bin`), and shards. A shard of sparse latents is sorted by latent, with an
offset for each, so that one latent is read by slices; a shard of directions holds a row of
projections for each. `collect.collect` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from narrowly.errors import NarrowlyError
from narrowly.explain.contexts.grid import Grid
from narrowly.explain.contexts.threshold import peak_threshold
from narrowly.files import read_json

FORMAT = "narrowly contexts 1"

INDEX = "index.json"

FILES = {"offsets": "<i8", "positions": "<u4", "values": "<f2"}
"""Of a shard, with their types."""

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
        dtype = np.dtype(FILES[name])
        try:
            part = np.fromfile(path, dtype, count, offset=start * dtype.itemsize)
        except OSError as error:
            raise NarrowlyError(
                f"{path}: {error.strerror}. Delete the folder and collect again."
            ) from None
        if len(part) < count:
            raise NarrowlyError(f"{path}: truncated. Delete the folder and collect again.")
        return part


def load_cache(folder: str | Path) -> Cache:
    """Open a folder that `collect` wrote.

    Raises:
        NarrowlyError: there is none, or it is not finished.
    """
    folder = Path(folder)
    index = read_index(folder)
    shards = tuple(Shard(**shard) for shard in index["shards"])
    if (done := sum(shard.batches for shard in shards)) < index["batches"]:
        raise NarrowlyError(
            f"{folder}: only {done} of {index['batches']} batches are read. Run the same again to "
            "go on."
        )
    names = tuple(read_json(folder / "latents.json"))
    return Cache(folder, names, index["dense"], shards)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder, whether all of it is there or not.

    Raises:
        NarrowlyError: there is none.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise NarrowlyError(f"{folder / INDEX}: no index of contexts.")
    return index


def _ordered(positions: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(positions, kind="stable")
    return positions[order].astype(np.int64), order
