"""Which latents are how active where in a text set, on disk: read once, looked up by latent.

A folder holds the tokens once (`tokens.bin`, uint32), where each row begins (`rows.npy`), which
tokens were read (`read.bin`), and shards. A shard of sparse latents is sorted by latent, with an
offset for each, so that one latent is read by slices through memory maps; a shard of directions
holds a row of projections for each. Memory holds one shard, whatever the number of tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from narrowly.activations import Activations, OpenModel, Stream, stream
from narrowly.activations.disk import full_disk
from narrowly.errors import NarrowlyError
from narrowly.explain.grid import Grid
from narrowly.explain.latents import DirectionSource, Source, SparseSource
from narrowly.explain.threshold import peak_threshold
from narrowly.files import atomic, read_json, write_json

FORMAT = "narrowly contexts 1"

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
    clipped: int
    """Values too large for fp16, kept as its largest."""
    left_out: int
    """Tokens whose norm was too large."""


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
        return int(np.count_nonzero(self.read)) - sum(shard.left_out for shard in self.shards)

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
        positions, heights = self._projections(latent)
        excess = heights - self.threshold(latent, window)
        above = excess > 0
        return positions[above], excess[above]

    def threshold(self, latent: int, window: int = WINDOW) -> float:
        """What the projection of a direction's end has to exceed; 0 for other latents."""
        if not self.dense:
            return 0.0
        key = latent, window
        if key not in self._thresholds:
            positions, heights = self._projections(latent)
            peaks = self.grid(window).peaks(positions, heights)
            self._thresholds[key] = peak_threshold(peaks[np.isfinite(peaks)])
        return self._thresholds[key]

    def grid(self, window: int = WINDOW) -> Grid:
        """The windows of the text set."""
        if window not in self._grids:
            self._grids[window] = Grid.over(self.tokens, self.rows, self.read, window)
        return self._grids[window]

    def __iter__(self) -> Iterator[tuple[NDArray, NDArray]]:
        """Of sparse latents, the offsets (one per latent, and the end) and positions per shard."""
        for shard in self.shards:
            yield self._load(shard, "offsets"), self._load(shard, "positions")

    def _sparse(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        found, values = [], []
        for shard in self.shards:
            start, stop = self._load(shard, "offsets")[latent : latent + 2]
            found.append(np.asarray(self._load(shard, "positions")[start:stop], np.int64))
            values.append(np.asarray(self._load(shard, "values")[start:stop], np.float32))
        return _ordered(found, values)

    def _projections(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The projections at all tokens read, with the sign of this end."""
        column, low = divmod(latent, 2)
        found, values = [], []
        for shard in self.shards:
            found.append(np.asarray(self._load(shard, "positions"), np.int64))
            values.append(np.asarray(self._load(shard, "values")[column], np.float32))
        positions, heights = _ordered(found, values)
        return positions, -heights if low else heights

    def _load(self, shard: Shard, name: str) -> NDArray:
        path = self.folder / shard.name / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise NarrowlyError(f"{path}: absent or damaged ({error}). Collect again.") from None


def collect(
    source: Source,
    model: OpenModel,
    rows: Dataset,
    folder: str | Path,
    *,
    batch_tokens: int = 16384,
    progress: str | None = None,
) -> Cache:
    """Read all latents of a source on a text set, in one pass, to a folder.

    The tokens that `rows` labels are read (`concepts.reading.reading_rows`), but never the first of
    a row, whose activations are those of an attention sink. After a kill the same call goes on
    after the last whole shard; after the end it reads nothing.

    Args:
        rows: columns `input_ids` and `labels`.
        batch_tokens: the most tokens in one forward, padding included.
        progress: what a progress bar on the terminal calls this; None shows none.

    Raises:
        NarrowlyError: the folder holds something else, the disk becomes full, a value is not
            finite, there is nothing to read, or the model lacks a site.
    """
    raise NotImplementedError


def load_cache(folder: str | Path) -> Cache:
    """Open a folder that `collect` wrote.

    Raises:
        NarrowlyError: there is none, or it is not finished.
    """
    raise NotImplementedError


def _ordered(
    found: list[NDArray], values: list[NDArray]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    positions, strengths = np.concatenate(found), np.concatenate(values)
    order = np.argsort(positions, kind="stable")
    return positions[order], strengths[order]
