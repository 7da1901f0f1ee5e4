"""A metric of one run, and its mean over runs with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from narrowly.errors import NarrowlyError


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval and what it rests on.

    Attributes:
        mean: the point estimate, in the unit of the metric.
        low, high: the interval's ends.
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
        ids: names of the prompts, by which runs are matched; None: by their places.
    """

    values: Float[np.ndarray, " prompts"]
    weights: Float[np.ndarray, " prompts"]
    unit: str = "share"
    exponential: bool = False
    ids: tuple[str, ...] | None = None

    @property
    def mean(self) -> float:
        """The weighted mean over prompts, in the unit of the metric."""
        mean = float(np.average(self.values, weights=self.weights))
        return float(np.exp(mean)) if self.exponential else mean

    @property
    def names(self) -> Sequence[str | int]:
        """What each prompt is matched by."""
        return range(len(self.values)) if self.ids is None else self.ids


def check(seeds: Sequence[Metric]) -> None:
    """That the metrics of an arm can be averaged.

    Raises:
        NarrowlyError: nothing to average, a value that is not finite, a share that is none, or a
            weight that is not positive. What has no value is counted as a class of its own.
    """
    if not seeds:
        raise NarrowlyError("no run to average over.")
    for metric in seeds:
        if not len(metric.values):
            raise NarrowlyError("no prompt to average over.")
        if not np.isfinite(metric.values).all():
            index = int(np.flatnonzero(~np.isfinite(metric.values))[0])
            raise NarrowlyError(
                f"prompt {index} has the value {metric.values[index]}: a metric of values that "
                "are not finite is none. Did the fine-tune diverge (loss nan in metrics.jsonl)?"
            )
        # A mean of ones may be rounded to a little more.
        if metric.unit == "share" and np.abs(metric.values - 0.5).max() > 0.5 + 1e-9:
            raise NarrowlyError("a share lies between 0 and 1: another metric must name its unit.")
        if not (np.isfinite(metric.weights) & (metric.weights > 0)).all():
            raise NarrowlyError("every prompt of a metric needs a positive weight.")


def summed_up(seeds: Sequence[Metric], low: float, high: float) -> Interval:
    """The interval with these ends and what it rests on."""
    return Interval(
        mean=float(np.mean([metric.mean for metric in seeds])),
        low=low,
        high=high,
        n=round(sum(float(metric.weights.sum()) for metric in seeds)),
        prompts=min(len(metric.values) for metric in seeds),
        seeds=len(seeds),
    )
