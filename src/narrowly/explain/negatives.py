"""Silent windows that are hard to tell from activating ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from narrowly.explain.cache import WINDOW, Cache
from narrowly.explain.embedding import Embedder
from narrowly.explain.latents import Source


class HardNegatives:
    """Candidates for hard negatives, for all latents of a cache.

    Two kinds: windows whose text is like activating ones by an embedding (from a pool of windows
    drawn once, embedded once and kept in the cache's folder), and windows where a neighbouring
    latent is active: one that is active in many of the same windows, or whose direction is close.

    Args:
        cache: what `collect` wrote.
        source: what it was collected from.
        tokenizer: of the model.
        embedder: None: there are no similar ones, only neighbours'.
        window: tokens in a window, as in `Sampling`.
        pool: how many windows are embedded.
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
        progress: bool = False,
    ):
        self.cache, self.source, self.embedder = cache, source, embedder

    def similar(self, texts: Sequence[str], among: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
        """The windows nearest to any of the texts, the nearest of each text in turn.

        Args:
            among: of every different text of the grid, whether it may be taken.
        """
        return np.empty(0, np.int64)

    def neighbouring(self, latent: int, among: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
        """Windows where neighbours of a latent are active, some of each neighbour in turn."""
        return np.empty(0, np.int64)
