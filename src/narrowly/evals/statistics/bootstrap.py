"""The percentile bootstrap over seeds and prompts, for a weighted mean of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from narrowly.evals.statistics.metric import Interval, Metric, check, summed_up

# Elements of one resampled block: bounds memory at some 100 MB however many prompts there are.
BLOCK = 4_000_000


def bootstrap(
    seeds: Sequence[Metric], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap of one metric over training seeds and prompts.

    Draw as many prompts as there are, with replacement, and as many seeds; take the weighted mean
    over the prompts drawn within each seed drawn, then the plain mean over seeds. All answers to
    one prompt stay together, and every seed is asked the prompts drawn, as it was asked the same
    in the first place (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1:386).

    Good for one seed and 30 prompts or more. For a few seeds, or rates of a few per cent, the
    interval is too narrow, and of a rate of 0 it is a point: `interval` is what evals report.

    Args:
        seeds: the metric of every seed of one arm.
        resamples: draws; the ends of the interval move by about 2 % of its width at 2000.
        level: coverage aimed at.
        seed: of the draws; the same input gives the same interval.

    Raises:
        NarrowlyError: as `metric.check`.
    """
    check(seeds)
    random = np.random.default_rng(seed)
    means = _resampled(seeds, resamples, random)
    drawn = random.integers(len(seeds), size=means.shape)
    tail = (1 - level) / 2
    low, high = np.quantile(np.take_along_axis(means, drawn, 1).mean(axis=1), [tail, 1 - tail])
    return summed_up(seeds, float(low), float(high))


def _resampled(
    seeds: Sequence[Metric], resamples: int, random: np.random.Generator
) -> Float[np.ndarray, "resamples seeds"]:
    """The mean of every seed over the prompts of each draw."""
    names = {name: None for metric in seeds for name in metric.names}
    places = {name: place for place, name in enumerate(names)}
    sums = np.zeros((len(names), 2 * len(seeds)))
    for column, metric in enumerate(seeds):
        asked = [places[name] for name in metric.names]
        sums[asked, 2 * column] = metric.values * metric.weights
        sums[asked, 2 * column + 1] = metric.weights
    drawn = np.empty((resamples, 2 * len(seeds)))
    step = max(1, BLOCK // len(names))
    chances = np.full(len(names), 1 / len(names))
    for start in range(0, resamples, step):
        block = drawn[start : start + step]
        block[:] = random.multinomial(len(names), chances, size=len(block)) @ sums
    products, weights = drawn[:, ::2], drawn[:, 1::2]
    # A seed that was asked none of the prompts drawn says what it says of all.
    all_of_it = [np.average(metric.values, weights=metric.weights) for metric in seeds]
    means = np.where(weights > 0, products / np.maximum(weights, 1e-300), all_of_it)
    exponential = [metric.exponential for metric in seeds]
    return np.where(exponential, np.exp(np.where(exponential, means, 0.0)), means)
