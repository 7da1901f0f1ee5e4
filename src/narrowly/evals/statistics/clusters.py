"""The mean of an arm over seeds and prompts, with an interval that covers as often as it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, sqrt

import numpy as np
from jaxtyping import Float

from narrowly.evals.statistics.metric import Interval, Metric, check, summed_up

LEVEL = 0.95


def interval(seeds: Sequence[Metric]) -> Interval:
    """The mean over training seeds and prompts, with its 95 % interval.

    Every seed is asked the same prompts, so an answer stands in two clusters, its seed's and its
    prompt's, and both are a sample of more. The variance is that between seeds, and that between
    prompts, less that of single cells, which both hold (Cameron, Gelbach & Miller 2011, J. of
    Business & Economic Statistics 29:238). Student's t makes good for few clusters (degrees of
    freedom after Satterthwaite). A share has Wilson's interval (1927), of as many independent
    answers as have this variance (Korn & Graubard 1998): it stays within 0 and 1, and where no
    answer or every answer is of the class, it still says how rare the others may be, with all
    answers to one prompt of one seed counted as one.

    With one seed, the interval is over prompts alone. With two it is wide, as it must be: nothing
    else is known of how seeds differ. (A bootstrap is much too narrow there, `bootstrap`.)

    Args:
        seeds: the metric of every seed of one arm.

    Raises:
        NarrowlyError: as `metric.check`.
    """
    check(seeds)
    found = Spread(seeds)
    if seeds[0].unit == "share" and not seeds[0].exponential:
        return summed_up(seeds, *wilson(found.mean, found.effective, found.quantile))
    reach = found.quantile * sqrt(found.variance)
    if seeds[0].exponential:
        factor = exp(reach / found.mean)
        return summed_up(seeds, found.mean / factor, found.mean * factor)
    return summed_up(seeds, found.mean - reach, found.mean + reach)


def wilson(share: float, n: float, z: float) -> tuple[float, float]:
    """The ends of Wilson's interval: the shares that are no further than z standard errors."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not leave the mean outside.
    return max(0.0, min(middle - reach, share)), min(1.0, max(middle + reach, share))


@dataclass(frozen=True)
class Variance:
    """Parts of the variance of a mean, or of the covariance of two.

    Attributes:
        seeds, prompts: between the means of seeds, and of prompts.
        cells: between single cells, which is in both.
    """

    seeds: float
    prompts: float
    cells: float

    @property
    def total(self) -> float:
        """Of both together."""
        return self.seeds + self.prompts - self.cells


class Spread:
    """How the metrics of an arm move its mean.

    Args:
        seeds: the metric of every seed, checked.
    """

    def __init__(self, seeds: Sequence[Metric]):
        self.seeds = seeds
        means = np.array([metric.mean for metric in seeds])
        self.mean = float(means.mean())
        self.drifts: Float[np.ndarray, " seeds"] = (means - self.mean) / len(seeds)
        """What each seed adds to the mean's deviation."""
        self.names = list(dict.fromkeys(name for metric in seeds for name in metric.names))
        self.cells: Float[np.ndarray, "seeds prompts"] = np.zeros((len(seeds), len(self.names)))
        """What each prompt adds to its seed's share of it; 0 where it was not asked."""
        places = {name: place for place, name in enumerate(self.names)}
        for row, metric, mean in zip(self.cells, seeds, means, strict=True):
            centre = np.average(metric.values, weights=metric.weights)
            pulls = metric.weights / metric.weights.sum() * (metric.values - centre)
            slope = mean if metric.exponential else 1.0
            row[[places[name] for name in metric.names]] = pulls * slope / len(seeds)

    @cached_property
    def _parts(self) -> Variance:
        return covariance(self, self)

    @property
    def variance(self) -> float:
        """Of the mean."""
        parts = self._parts
        return max(parts.total, parts.seeds, parts.prompts)

    @property
    def effective(self) -> float:
        """As many independent answers have the variance of this share."""
        chance = self.mean * (1 - self.mean)
        if self.variance > 0 and chance > 0:
            answers = sum(float(metric.weights.sum()) for metric in self.seeds)
            return min(answers, chance / self.variance)
        # Nothing differs, so nothing tells how alike the answers to a prompt are: they may be one.
        return sum(float(m.weights.sum() ** 2 / (m.weights**2).sum()) for m in self.seeds)

    @property
    def quantile(self) -> float:
        """How many standard errors the interval reaches to each side."""
        both = self._parts.seeds + self._parts.prompts
        parts = [
            (self._parts.seeds, len(self.seeds) - 1),
            (self._parts.prompts, len(self.names) - 1),
        ]
        spent = sum((part / both) ** 2 / freedom for part, freedom in parts if part > 0)
        return student(1 / spent if spent else np.inf)


def covariance(one: Spread, other: Spread) -> Variance:
    """Of the means of two arms; of an arm and itself, its variance.

    Prompts are matched by name. Seeds are matched by place where the arms have as many.
    """
    known = set(other.names)
    shared = [name for name in one.names if name in known]
    a, b = _at(one, shared), _at(other, shared)
    seeds, prompts = len(one.drifts), len(shared)
    matched = seeds == len(other.drifts)
    several = seeds / (seeds - 1) if matched and seeds > 1 else 0.0
    many = prompts / (prompts - 1) if prompts > 1 else 0.0
    return Variance(
        seeds=several * float(one.drifts @ other.drifts) if several else 0.0,
        prompts=many * float(a.sum(axis=0) @ b.sum(axis=0)),
        cells=many * float((a * b).sum()) if several else 0.0,
    )


def _at(spread: Spread, names: Sequence[str | int]) -> Float[np.ndarray, "seeds prompts"]:
    places = {name: place for place, name in enumerate(spread.names)}
    return spread.cells[:, [places[name] for name in names]]


def student(freedom: float) -> float:
    """The quantile of Student's t that leaves 2.5 % above it.

    By summing the density up over the angle atan(t / sqrt(freedom)), where it is bounded.
    """
    freedom = min(freedom, 2000.0)  # beyond, it is the normal distribution's to three digits
    angles = np.linspace(0, np.pi / 2, 4001)
    density = np.cos(angles) ** (freedom - 1)
    summed = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(LEVEL, summed / summed[-1], angles)
    return float(np.tan(angle) * np.sqrt(freedom))
