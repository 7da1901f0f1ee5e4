"""The windows of a text set: each row cut into equal parts, no longer than asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Grid:
    """Windows as arrays, those with no token that was read left out.

    A row of 40 tokens makes two windows of 20 rather than one of 32 and a stump of 8.
    """

    starts: NDArray[np.int64]
    """First token of each window, as a position in the text set; ascending."""
    stops: NDArray[np.int64]
    rows: NDArray[np.int64]
    """The row that each is part of."""
    hashes: NDArray[np.uint64]
    """Of the tokens: equal for equal tokens, and (but for one chance in 2^64 a pair) only then."""

    @classmethod
    def over(
        cls,
        tokens: NDArray[np.uint32],
        offsets: NDArray[np.int64],
        read: NDArray[np.bool_],
        window: int,
    ) -> Grid:
        """Cut rows of tokens into windows.

        Args:
            offsets: where each row begins in `tokens`, and the end of the last.
            read: which tokens were read.
        """
        lengths = np.diff(offsets)
        parts = -(-lengths // window)
        rows = np.repeat(np.arange(len(lengths)), parts)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = offsets[rows] + number * lengths[rows] // parts[rows]
        stops = offsets[rows] + (number + 1) * lengths[rows] // parts[rows]
        if not len(rows):
            return cls(starts, stops, rows, np.empty(0, np.uint64))
        hashes = np.empty(len(rows), np.uint64)
        kept = np.empty(len(rows), bool)
        for begin in range(0, len(rows), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            first, last = starts[block][0], stops[block][-1]
            places = starts[block] - first
            hashes[block] = _hashes(tokens[first:last], places)
            kept[block] = np.logical_or.reduceat(read[first:last], places)
        return cls(starts[kept], stops[kept], rows[kept], hashes[kept])

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The window each position lies in; the positions were read."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def peaks(
        self, positions: NDArray[np.int64], values: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The largest value in each window, -inf where there is none; positions ascend."""
        peaks = np.full(len(self), -np.inf, np.float32)
        if len(positions):
            windows = self.of(positions)
            first = np.flatnonzero(np.diff(windows, prepend=-1))
            peaks[windows[first]] = np.maximum.reduceat(values, first)
        return peaks

    @cached_property
    def _unique(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        _, first, texts = np.unique(self.hashes, return_index=True, return_inverse=True)
        return first, texts

    @property
    def texts(self) -> NDArray[np.int64]:
        """A number for each window, the same for windows of the same tokens."""
        return self._unique[1]

    @property
    def first(self) -> NDArray[np.int64]:
        """The first window of each different text, by that number."""
        return self._unique[0]

    @property
    def different(self) -> int:
        """How many different texts there are."""
        return len(self.first)


_BLOCK = 1 << 16


def _hashes(tokens: NDArray[np.uint32], places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Of the parts of `tokens` that begin at `places`: sums of mixed tokens, weighed by place."""
    within = np.arange(len(tokens)) - np.repeat(places, np.diff(places, append=len(tokens)))
    weights = mixed(np.arange(within.max(initial=0) + 1, dtype=np.uint64)) | np.uint64(1)
    terms = mixed(tokens.astype(np.uint64) + np.uint64(1)) * weights[within]
    return np.add.reduceat(terms, places)


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
