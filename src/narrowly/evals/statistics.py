"""Means of rates and losses with 95 % bootstrap intervals over seeds and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from narrowly.errors import NarrowlyError

# Elements of one resampled block: bounds memory at some 100 MB however many prompts there are.
BLOCK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval and what it rests on.

    Attributes:
        mean: the point estimate, in the unit of the metric.
        low, high: the 2.5th and 97.5th percentile of the bootstrap.
        n: answers (or tokens) in the denominator, over all seeds.
        prompts: prompts per seed; differing seeds give the smallest.
        seeds: runs that were trained alike but for the seed.
    """

    mean: float
    low: float
    high: float
    n: int
    prompts: int
    seeds: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, as they stand in `summary.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Metric:
    """One metric of one run: a weighted mean over prompts.

    Args:
        values: per prompt the mean of what was measured, shape [prompts].
        weights: per prompt what it was measured on (answers, tokens), shape [prompts], positive.
        unit: "share" (of answers or tokens, 0 to 1), "nats" or "ratio".
        exponential: the metric is exp of the weighted mean (perplexity from loss).
    """

    values: Float[np.ndarray, " prompts"]
    weights: Float[np.ndarray, " prompts"]
    unit: str = "share"
    exponential: bool = False


def bootstrap(
    seeds: Sequence[Metric], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap of one metric over training seeds and the prompts within each.

    Hierarchical (Davison & Hinkley, Bootstrap Methods, 1997, section 3.8): draw as many seeds as
    there are, with replacement; within every seed drawn, draw its prompts with replacement; take
    the weighted mean within, then the plain mean over seeds. All answers to one prompt stay
    together. One seed: prompts only. The interval is as wide as the seeds are few and apart, and
    for two or three seeds it is still somewhat too narrow.

    Args:
        seeds: the metric of every seed of one arm.
        resamples: draws; the ends of the interval move by about 2 % of its width at 2000.
        level: coverage aimed at.
        seed: of the draws; the same input gives the same interval.

    Raises:
        NarrowlyError: nothing to average, a value that is not finite or a weight that is not
            positive: such rows must be counted as a class of their own, not averaged.
    """
    if not seeds:
        raise NarrowlyError("no run to average over.")
    for metric in seeds:
        _check(metric)
    random = np.random.default_rng(seed)
    drawn = random.integers(len(seeds), size=(resamples, len(seeds)))
    means = np.empty(drawn.shape)
    for index, metric in enumerate(seeds):
        places = drawn == index
        means[places] = _resampled_means(metric, int(places.sum()), random)
    tail = (1 - level) / 2
    low, high = np.quantile(means.mean(axis=1), [tail, 1 - tail])
    return Interval(
        mean=float(np.mean([_mean(metric) for metric in seeds])),
        low=float(low),
        high=float(high),
        n=round(sum(float(metric.weights.sum()) for metric in seeds)),
        prompts=min(len(metric.values) for metric in seeds),
        seeds=len(seeds),
    )


def _check(metric: Metric) -> None:
    if not len(metric.values):
        raise NarrowlyError("no prompt to average over.")
    if not np.isfinite(metric.values).all():
        index = int(np.flatnonzero(~np.isfinite(metric.values))[0])
        raise NarrowlyError(
            f"prompt {index} has the value {metric.values[index]}: a metric of values that are "
            "not finite is none. Did the fine-tune diverge (loss nan in metrics.jsonl)?"
        )
    if not (np.isfinite(metric.weights) & (metric.weights > 0)).all():
        raise NarrowlyError("every prompt of a metric needs a positive weight.")


def _mean(metric: Metric) -> float:
    mean = float(np.average(metric.values, weights=metric.weights))
    return float(np.exp(mean)) if metric.exponential else mean


def _resampled_means(
    metric: Metric, count: int, random: np.random.Generator
) -> Float[np.ndarray, " count"]:
    """Weighted means of `count` draws of the prompts with replacement."""
    prompts = len(metric.values)
    products = metric.values * metric.weights
    means = np.empty(count)
    step = max(1, BLOCK // prompts)
    for start in range(0, count, step):
        stop = min(start + step, count)
        picks = random.integers(prompts, size=(stop - start, prompts))
        means[start:stop] = products[picks].sum(axis=1) / metric.weights[picks].sum(axis=1)
    return np.exp(means) if metric.exponential else means
