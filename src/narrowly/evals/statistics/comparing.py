"""Two arms side by side: their difference, and what their comparison could have shown."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

from narrowly.evals.statistics.clusters import Spread, covariance, interval
from narrowly.evals.statistics.metric import Interval, Metric

POWER = 0.8


def difference(ours: Sequence[Metric], theirs: Sequence[Metric]) -> Interval:
    """Our mean less theirs, with its 95 % interval.

    Prompts are paired by name, and seeds by place where both arms have as many, so that what is
    hard for both does not count as a difference. The interval is put together from both arms' own
    (Newcombe 1998, Statistics in Medicine 17:2635, method 10; Zou & Donner 2008), so that it stays
    within -1 and 1 for shares, and is no point where nothing differed.

    Args:
        ours, theirs: the same metric of every seed of either arm.

    Raises:
        NarrowlyError: as `interval`.
    """
    one, other = interval(ours), interval(theirs)
    alike = correlation(Spread(ours), Spread(theirs))
    apart = one.mean - other.mean
    return Interval(
        mean=apart,
        low=apart - _reach(one.mean - one.low, other.high - other.mean, alike),
        high=apart + _reach(one.high - one.mean, other.mean - other.low, alike),
        n=min(one.n, other.n),
        prompts=min(one.prompts, other.prompts),
        seeds=min(one.seeds, other.seeds),
    )


def minimum_detectable(*intervals: Interval) -> float:
    """The smallest true difference that such a comparison shows in 8 of 10 repetitions.

    "Shows" is a 95 % interval without zero. In the unit of the metric; from the intervals' widths,
    so it is a figure of the eval's size and not of what it found.

    Args:
        intervals: of the difference; or, of arms that are not paired, one for each (twice the same
            for an arm of the same size as this one).
    """
    reach = sqrt(sum(((one.high - one.low) / 2) ** 2 for one in intervals))
    normal = NormalDist()
    return reach * (1 + normal.inv_cdf(POWER) / normal.inv_cdf(0.975))


def correlation(one: Spread, other: Spread) -> float:
    """Of the means of two arms, by what they share of seeds and prompts."""
    scale = sqrt(one.variance * other.variance)
    return 0.0 if scale == 0 else max(-1.0, min(1.0, covariance(one, other).total / scale))


def _reach(mine: float, others: float, alike: float) -> float:
    return sqrt(max(0.0, mine**2 + others**2 - 2 * alike * mine * others))
