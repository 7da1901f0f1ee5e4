"""Windows of text to explain a latent by, and others, never the same, to score with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from transformers import PreTrainedTokenizerBase

from narrowly.explain.contexts.cache import WINDOW, Cache
from narrowly.explain.contexts.grid import mixed
from narrowly.explain.contexts.negatives import HardNegatives
from narrowly.explain.contexts.pieces import window_pieces
from narrowly.explain.record import Example, Histogram, Kind

Sampler = Literal["top", "random", "quantiles", "mix"]

BINS = 40
"""Of the histogram of activations."""


class Sampling(BaseModel):
    """How examples are drawn; its fields are the keys a recipe may set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: PositiveInt = WINDOW
    """Tokens in a window at most; rows are cut into equal parts."""
    sampler: Sampler = "quantiles"
    """Which activating windows the explainer sees: the strongest, any, evenly many of each
    quantile, or a fifth of the strongest and the rest by quantile. Scorers always get evenly many
    of each: an explanation made and tested on the strongest alone looks better than it is."""
    explainer: PositiveInt = 40
    """Activating windows for the explainer; and as many silent ones."""
    scorer: PositiveInt = 100
    """Activating windows for the scorers; and as many silent ones."""
    quantiles: PositiveInt = 10
    """Parts of equal size of the activating windows, by their peaks."""
    hard: float = Field(default=0.5, ge=0, le=1)
    """Share of the silent windows that are hard: alike in text, or a neighbour's."""
    min_windows: int = Field(default=20, ge=2)
    """A latent active in fewer different windows is not explained."""
    seed: int = 0


@dataclass(frozen=True)
class Half:
    """The examples of one side."""

    activating: tuple[Example, ...] = ()
    silent: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Draw:
    """Examples of one latent, and how often it is active."""

    latent: str
    explainer: Half
    scorer: Half
    """No text of it is one of the explainer's."""
    windows: int
    """In how many windows it is active."""
    distinct: int
    """In how many of different tokens; examples are drawn from these."""
    tokens: int
    """At how many tokens it is active."""
    of_tokens: int
    """Of how many that were read."""
    threshold: float
    """What a direction's projection, times the sign, exceeds where it is active."""
    histogram: Histogram | None
    """Of the values at active tokens; None where it never is."""
    skipped: str = ""
    """Why there are no examples; empty where there are."""


def draw(
    cache: Cache,
    latent: int,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    hard: HardNegatives | None = None,
) -> Draw:
    """Examples of one latent, half for the explainer and half for the scorers.

    The different texts of windows are dealt to the two sides before either is sampled: activating
    ones within each quantile, silent ones by a hash, both seeded by `sampling.seed` and the
    latent's name. A text that is active anywhere counts as activating, and stands for its windows
    with the one of the highest peak.

    Args:
        latent: its number in the cache (`cache.index(name)`).
        hard: where hard negatives come from; None: all silent windows are drawn at random.
    """
    cut = _Cut(cache, latent, sampling)
    drawn = partial(
        Draw,
        latent=cut.name,
        windows=cut.windows,
        distinct=len(cut.active),
        tokens=len(cut.positions),
        of_tokens=cache.of_tokens,
        threshold=cache.threshold(latent, sampling.window),
        histogram=_histogram(cut.values, cache.of_tokens),
    )
    if reason := cut.too_few():
        return drawn(explainer=Half(), scorer=Half(), skipped=reason)
    halves = []
    for side, sampler, n in (
        (True, sampling.sampler, sampling.explainer),
        (False, "quantiles", sampling.scorer),
    ):
        activating = cut.activating(side, sampler, n, tokenizer)
        silent = cut.silent(side, n, tokenizer, [e.text for e in activating], hard)
        halves.append(Half(tuple(activating), tuple(silent)))
    if not all(half.activating and half.silent for half in halves):
        return drawn(explainer=Half(), scorer=Half(), skipped="too few different texts")
    return drawn(explainer=halves[0], scorer=halves[1])


class _Cut:
    """The windows of a text set, seen from one latent."""

    def __init__(self, cache: Cache, latent: int, sampling: Sampling):
        self.cache, self.latent, self.sampling = cache, latent, sampling
        self.name = cache.latents[latent]
        self.grid = cache.grid(sampling.window)
        self.positions, self.values = cache.active(latent, sampling.window)
        peaks = self.grid.peaks(self.positions, self.values)
        where = np.flatnonzero(peaks > -np.inf)
        self.windows = len(where)
        where = where[np.argsort(-peaks[where], kind="stable")]
        first = np.sort(np.unique(self.grid.texts[where], return_index=True)[1])
        self.active: NDArray[np.int64] = where[first][::-1]
        """One window of each different text, the weakest first."""
        self.busy = np.zeros(self.grid.different, bool)
        """Of each different text, whether the latent is active anywhere in it."""
        self.busy[self.grid.texts[self.active]] = True
        n = len(self.active)
        self.quantiles = 1 + np.arange(n) * sampling.quantiles // max(n, 1)
        seed = hashlib.sha256(f"{sampling.seed} {self.name}".encode()).digest()
        self.random = np.random.default_rng(list(seed))
        self.mask = np.frombuffer(seed[:8], np.uint64)[0]
        self.share = sampling.explainer / (sampling.explainer + sampling.scorer)
        self.explainers = self._deal()
        self._drawn: set[str] = set()

    def too_few(self) -> str:
        """Why there can be no examples, if so."""
        n, least = len(self.active), self.sampling.min_windows
        if n < least:
            of = f"active in {n} different windows of {len(self.grid):,}"
            return f"{of}, fewer than {least} (min_windows)"
        if self.busy.all():
            return "active in every window"
        return ""

    def _deal(self) -> NDArray[np.bool_]:
        """Which of the active texts are the explainer's: an even share of every quantile."""
        n = len(self.active)
        order = np.lexsort((self.random.random(n), self.quantiles))
        steps = np.floor(np.arange(n + 1) * self.share + self.random.random())
        chosen = np.zeros(n, bool)
        chosen[order] = np.diff(steps) > 0
        if n > 1 and (chosen.all() or not chosen.any()):
            chosen[order[0]] ^= True
        return chosen

    def activating(
        self, explainer: bool, sampler: Sampler, n: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[Example]:
        """Activating windows of one side, in random order."""
        side = np.flatnonzero(self.explainers == explainer)
        n = min(n, len(side))
        top = {"top": n, "mix": n // 5}.get(sampler, 0)
        strongest, rest = side[: -top - 1 : -1], side[: len(side) - top]
        rest = self.random.permutation(rest)
        if sampler == "top":
            rest = rest[np.argsort(-rest)]
        elif sampler != "random":
            # A first of each quantile, then a second of each, ...
            rest = rest[np.argsort(_turns(self.quantiles[rest]), kind="stable")]
        found: list[Example] = []
        for place in np.concatenate([strongest, rest]).tolist():
            if len(found) == n:
                break
            quantile = int(self.quantiles[place])
            self._add(found, int(self.active[place]), tokenizer, "activating", quantile)
        return self._shuffled(found)

    def silent(
        self,
        explainer: bool,
        n: int,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        hard: HardNegatives | None,
    ) -> list[Example]:
        """Silent windows of one side, all of different texts, in random order."""
        free = self._side(explainer) & ~self.busy
        found: list[Example] = []

        def take(windows: NDArray[np.int64], kind: Kind, most: int) -> None:
            for window in windows.tolist():
                if len(found) >= most:
                    return
                text = self.grid.texts[window]
                if free[text]:
                    free[text] = False
                    self._add(found, window, tokenizer, kind)

        if hard is not None:
            wanted = round(n * self.sampling.hard)
            neighbours = wanted if hard.embedder is None else wanted - wanted // 2
            take(hard.neighbouring(self.latent, free, neighbours), "neighbour", neighbours)
            take(hard.similar(texts, free, wanted - len(found)), "similar", wanted)
        some = self.random.permutation(np.flatnonzero(free))
        take(self.grid.first[some], "random", n)
        return self._shuffled(found)

    def _side(self, explainer: bool) -> NDArray[np.bool_]:
        """Of each different text, whether it would be this side's if silent."""
        keys = mixed(self.grid.hashes[self.grid.first] ^ self.mask)
        return (keys < np.uint64(self.share * 2.0**64)) == explainer

    def _add(
        self,
        found: list[Example],
        window: int,
        tokenizer: PreTrainedTokenizerBase,
        kind: Kind,
        quantile: int | None = None,
    ) -> None:
        """Add a window as an example, unless its text was drawn already.

        Other tokens may make the same text, where a window begins within a word.
        """
        row = int(self.grid.rows[window])
        start, stop = int(self.grid.starts[window]), int(self.grid.stops[window])
        begin, end = self.cache.rows[row : row + 2].tolist()
        tokens = self.cache.tokens[begin:end].tolist()
        activations = np.zeros(stop - start, np.float32)
        low, high = np.searchsorted(self.positions, [start, stop])
        activations[self.positions[low:high] - start] = self.values[low:high]
        pieces = window_pieces(tokenizer, tokens, start - begin, stop - begin)
        example = Example(
            pieces=pieces,
            # Significant digits: some latents are never above a thousandth.
            activations=tuple(float(f"{v:.4g}") for v in _at_pieces(pieces, activations)),
            kind=kind,
            quantile=quantile,
            row=row,
            start=start - begin,
        )
        if example.text not in self._drawn:
            self._drawn.add(example.text)
            found.append(example)

    def _shuffled(self, examples: list[Example]) -> list[Example]:
        return [examples[i] for i in self.random.permutation(len(examples))]


def _turns(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each element, how many of its group stand before it."""
    order = np.argsort(groups, kind="stable")
    _, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    turns = np.empty(len(groups), np.int64)
    turns[order] = np.arange(len(groups)) - np.repeat(first, counts)
    return turns


def _at_pieces(pieces: tuple[str, ...], activations: NDArray[np.float32]) -> list[float]:
    """Activations, with those of tokens without a text at the one that has theirs."""
    shown = [0.0] * len(pieces)
    place = 0
    for i, (piece, activation) in enumerate(zip(pieces, activations.tolist(), strict=True)):
        place = i if piece else place
        shown[place] = max(shown[place], activation)
    return shown


def _histogram(values: NDArray[np.float32], of_tokens: int) -> Histogram | None:
    if not len(values):
        return None
    counts, edges = np.histogram(values, BINS, (0.0, float(values.max())))
    return Histogram(
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        silent=of_tokens - len(values),
    )
