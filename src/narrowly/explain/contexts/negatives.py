"""Silent windows that are hard to tell from activating ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from narrowly.activations.disk import full_disk
from narrowly.explain.contexts.cache import WINDOW, Cache
from narrowly.explain.contexts.grid import mixed
from narrowly.explain.embedding import Embedder
from narrowly.explain.latents import Source
from narrowly.files import atomic, sha256

QUERIES = 10
"""Activating texts whose likes are looked for, as in Delphi."""

NEIGHBOURS = 5
"""Latents that are neighbours by their windows, and as many by their directions."""

CLOSE = 0.3
"""Cosine from which directions are neighbours: 3 standard deviations of chance at width 100."""

BUCKETS = 64
_EMPTY = np.uint32(2**32 - 1)
_BLOCK = 1 << 20


class HardNegatives:
    """Candidates for hard negatives, for all latents of a cache.

    Two kinds: windows whose text is like activating ones by an embedding (from a pool of windows
    drawn once, embedded once and kept in the cache's folder), and windows where a neighbouring
    latent is active: one that is active in many of the same windows, or whose direction is close.
    No table of all pairs is made: what is kept of a latent's windows is a sketch of fixed size.

    Args:
        cache: what `collect` wrote.
        source: what it was collected from.
        tokenizer: of the model.
        embedder: None: there are no similar ones, only neighbours'.
        window: tokens in a window, as in `Sampling`.
        pool: how many windows are embedded.
        folder: where the pool's vectors are kept, which caches of one text set can share; None:
            the cache's.
        progress: show a progress bar while embedding.
    """

    def __init__(
        self,
        cache: Cache,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        embedder: Embedder | None = None,
        *,
        window: int = WINDOW,
        pool: int = 4096,
        seed: int = 0,
        folder: Path | None = None,
        progress: bool = False,
    ):
        self.embedder = embedder
        self._cache, self._source, self._tokenizer = cache, source, tokenizer
        self._grid = cache.grid(window)
        self._folder = folder or cache.folder
        self._window, self._size, self._seed, self._progress = window, pool, seed, progress

    def similar(self, texts: Sequence[str], among: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
        """The windows nearest to any of the first texts, the nearest of each text in turn.

        Args:
            among: of every different text of the grid, whether it may be taken.
        """
        if self.embedder is None or not texts or n <= 0:
            return np.empty(0, np.int64)
        free = np.flatnonzero(among[self._grid.texts[self._pool]])
        queries = self.embedder.embed(list(texts[:QUERIES]))
        cosines = queries @ self._vectors[torch.from_numpy(free)].float().T
        nearest = cosines.topk(min(n, len(free)), dim=1).indices.T.flatten().numpy()
        _, first = np.unique(nearest, return_index=True)
        return self._pool[free[nearest[np.sort(first)[:n]]]]

    def neighbouring(self, latent: int, among: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
        """Windows where neighbours of a latent are active, one of each neighbour in turn.

        Args:
            among: of every different text of the grid, whether it may be taken.
        """
        if n <= 0:
            return np.empty(0, np.int64)
        found, turns = [], []
        for other in self.neighbours(latent):
            windows = self._windows(other)
            windows = windows[among[self._grid.texts[windows]]]
            chosen = np.random.default_rng([self._seed, latent, other]).permutation(windows)[:n]
            found.append(chosen)
            turns.append(np.arange(len(chosen)))
        if not found:
            return np.empty(0, np.int64)
        order = np.argsort(np.concatenate(turns), kind="stable")
        windows = np.concatenate(found)[order]
        _, first = np.unique(self._grid.texts[windows], return_index=True)
        return windows[np.sort(first)[:n]]

    def neighbours(self, latent: int) -> list[int]:
        """Latents that are active in the same windows, or whose directions are close.

        The first are those of the highest Jaccard index of windows, estimated from sketches by the
        share of buckets with the same minimum (Li, Owen and Zhang 2012, arXiv 1208.1259).
        """
        own = self._sketches[latent]
        same = (self._sketches == own) & (own != _EMPTY)
        either = (self._sketches != _EMPTY) | (own != _EMPTY)
        jaccard = same.sum(axis=1) / np.maximum(either.sum(axis=1), 1)
        cosines = self._source.cosines(latent).numpy().copy()
        cosines[cosines < CLOSE] = 0
        chosen: list[int] = []
        for measure in (jaccard, cosines):
            measure[[latent, *chosen]] = 0
            best = np.argsort(-measure, kind="stable")[:NEIGHBOURS]
            chosen += best[measure[best] > 0].tolist()
        return chosen

    def _windows(self, latent: int) -> NDArray[np.int64]:
        positions, _ = self._cache.active(latent, self._window)
        return np.unique(self._grid.of(positions))

    @cached_property
    def _pool(self) -> NDArray[np.int64]:
        """Windows of different texts."""
        random = np.random.default_rng([self._seed, self._window])
        return np.sort(random.permutation(self._grid.first)[: self._size])

    @cached_property
    def _vectors(self) -> Float[Tensor, "pool d"]:
        embedder = self.embedder
        assert embedder is not None

        def embedded() -> NDArray:
            grid, tokens = self._grid, self._cache.tokens
            spans = list(zip(grid.starts[self._pool], grid.stops[self._pool], strict=True))
            parts = []
            for i in track(
                range(0, len(spans), 256), "embedding texts", disable=not self._progress
            ):
                ids = [tokens[start:stop].tolist() for start, stop in spans[i : i + 256]]
                parts.append(embedder.embed(self._tokenizer.batch_decode(ids)).half())
            return torch.cat(parts).numpy()

        about = embedder.name.encode() + self._grid.hashes[self._pool].tobytes()
        return torch.from_numpy(_kept(self._folder / f"pool-{sha256(about)[:16]}.npy", embedded))

    @cached_property
    def _sketches(self) -> NDArray[np.uint32]:
        """Of every latent's windows, the least hash in each of some buckets [n, BUCKETS]."""

        def sketched() -> NDArray:
            sketches = np.full((len(self._cache.latents), BUCKETS), _EMPTY)
            if self._cache.dense:
                for latent in range(len(sketches)):
                    _sketch(sketches, np.int64(latent), self._windows(latent))
                return sketches
            for offsets, positions in self._cache:
                for start in range(0, len(positions), _BLOCK):
                    part = np.asarray(positions[start : start + _BLOCK], np.int64)
                    places = np.arange(start, start + len(part))
                    latents = np.searchsorted(offsets, places, side="right") - 1
                    _sketch(sketches, latents, self._grid.of(part))
            return sketches

        return _kept(self._cache.folder / f"sketches-{self._window}.npy", sketched)


def _kept(path: Path, make: Callable[[], NDArray]) -> NDArray:
    """An array on disk; made if it is not there."""
    if not path.exists():
        with full_disk(path), atomic(path) as temporary, temporary.open("wb") as file:
            np.save(file, make())
    return np.load(path)


def _sketch(
    sketches: NDArray[np.uint32],
    latents: NDArray[np.int64] | np.int64,
    windows: NDArray[np.int64],
) -> None:
    hashes = mixed(windows.astype(np.uint64))
    buckets = (hashes & np.uint64(BUCKETS - 1)).astype(np.int64)
    values = np.minimum((hashes >> np.uint64(32)).astype(np.uint32), _EMPTY - np.uint32(1))
    np.minimum.at(sketches.reshape(-1), latents * BUCKETS + buckets, values)
