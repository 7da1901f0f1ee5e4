"""Several tasks together: means over them, and one arm's mean as a share of another's.

The tasks are taken as they are, not as a sample of more: an interval speaks of these only. Tasks
count alike and are independent, as each has its own model, data and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

from narrowly.evals.statistics.clusters import Spread, interval
from narrowly.evals.statistics.comparing import correlation
from narrowly.evals.statistics.metric import Interval, Metric


@dataclass(frozen=True)
class Pair:
    """Two arms on one task, matched by prompt and seed.

    Attributes:
        one, other: the mean of either.
        alike: the correlation of the two means, by what they share of seeds and prompts.
    """

    one: Interval
    other: Interval
    alike: float

    @classmethod
    def of(cls, ours: Sequence[Metric], theirs: Sequence[Metric]) -> Pair:
        """From the same metric of every seed of either arm, as for `difference`."""
        alike = correlation(Spread(ours), Spread(theirs))
        return cls(interval(ours), interval(theirs), alike)


def mean_over(tasks: Sequence[Interval]) -> Interval:
    """The mean over tasks of one arm's means, with its 95 % interval.

    Put together from the tasks' own (Zou & Donner 2008, Statistics in Medicine 27:1693).
    """
    mean = sum(task.mean for task in tasks) / len(tasks)
    below = sqrt(sum((task.mean - task.low) ** 2 for task in tasks)) / len(tasks)
    above = sqrt(sum((task.high - task.mean) ** 2 for task in tasks)) / len(tasks)
    return _of(tasks, mean, mean - below, mean + above)


def mean_difference(pairs: Sequence[Pair]) -> Interval:
    """The mean over tasks of one arm less the other; of one task, as `difference`."""
    count = len(pairs)
    mean = sum(pair.one.mean - pair.other.mean for pair in pairs) / count
    low = mean - sqrt(_squared(_below(pairs), 1.0)) / count
    high = mean + sqrt(_squared(_above(pairs), 1.0)) / count
    return _of([pair.one for pair in pairs], mean, low, high)


def ratio(pairs: Sequence[Pair]) -> Interval | None:
    """The mean over tasks of one arm over the mean of the other; both are at least 0.

    Its 95 % interval holds every k for which zero lies in the interval of one - k * other, put
    together from both arms' own (Donner & Zou 2012, Statistical Methods in Medical Research 21:347:
    Fieller's, of intervals that need not be symmetric). Its upper end is infinite where the other
    may be 0.

    Returns:
        None where the other's mean is 0.
    """
    ours = sum(pair.one.mean for pair in pairs)
    theirs = sum(pair.other.mean for pair in pairs)
    if theirs <= 0:
        return None
    mean = ours / theirs
    below, above = _below(pairs), _above(pairs)
    low = _root(lambda k: ours - k * theirs - sqrt(_squared(below, k)), 0.0, mean)

    def over(k: float) -> float:
        return ours - k * theirs + sqrt(_squared(above, k))

    end = max(2 * mean, 1.0)
    while over(end) > 0 and end < inf:
        end = 2 * end if end < LARGEST else inf
    high = inf if end == inf else _root(over, mean, end)
    return _of([pair.one for pair in pairs], mean, low, high)


LARGEST = 1e4
"""A ratio beyond is told as infinite."""

Reach = tuple[float, float, float]


def _below(pairs: Sequence[Pair]) -> Reach:
    return _reach([(p.one.mean - p.one.low, p.other.high - p.other.mean, p.alike) for p in pairs])


def _above(pairs: Sequence[Pair]) -> Reach:
    return _reach([(p.one.high - p.one.mean, p.other.mean - p.other.low, p.alike) for p in pairs])


def _reach(tasks: Sequence[tuple[float, float, float]]) -> Reach:
    """How far one and other reach, squared and summed over tasks, and what they share of it."""
    return (
        sum(mine**2 for mine, _, _ in tasks),
        sum(others**2 for _, others, _ in tasks),
        sum(alike * mine * others for mine, others, alike in tasks),
    )


def _squared(reach: Reach, k: float) -> float:
    mine, others, shared = reach
    return max(0.0, mine + k * k * others - 2 * k * shared)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls from `low` to `high` is zero; by halving."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def _of(tasks: Sequence[Interval], mean: float, low: float, high: float) -> Interval:
    return Interval(
        mean=mean,
        low=low,
        high=high,
        n=sum(task.n for task in tasks),
        prompts=sum(task.prompts for task in tasks),
        seeds=min(task.seeds for task in tasks),
    )
