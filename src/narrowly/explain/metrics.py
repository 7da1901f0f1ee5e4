"""How good judgments are: per latent with bootstrap intervals, and averaged over latents.

Every metric takes what was said of the activating examples and of the silent ones apart, so that
neither's number weighs, and the two are resampled apart (a stratified bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000

Values = Sequence[float] | Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Estimate:
    """A number and the 2.5th and 97.5th percentile of its bootstrap."""

    value: float
    low: float
    high: float


def as_fields(estimate: Estimate | None) -> dict[str, Any]:
    """`value`, `low` and `high` of a record; all are None without an estimate."""
    return asdict(estimate) if estimate else dict.fromkeys(("value", "low", "high"))


def balanced_accuracy(activating: Values, silent: Values, seed: int = 0) -> Estimate | None:
    """(True positive rate + true negative rate) / 2, of judgments that are 0 or 1.

    Args:
        activating: what was said of the activating examples, 1 for "fits", shape [n].
        silent: of the silent ones, shape [m].

    Returns:
        None where either is empty.
    """
    yes, no = _floats(activating), 1 - _floats(silent)
    if not len(yes) or not len(no):
        return None
    rates = (_weights(len(yes), seed) @ yes + _weights(len(no), seed + 1) @ no) / 2
    return _estimate((yes.mean() + no.mean()) / 2, rates)


def auroc(activating: Values, silent: Values, seed: int = 0) -> Estimate | None:
    """How probable it is that an activating example ranks above a silent one; ties are half.

    Args:
        activating: ranks or probabilities of the activating examples, shape [n].
        silent: of the silent ones, shape [m].

    Returns:
        None where either is empty.
    """
    value = area(activating, silent)
    if value is None:
        return None
    high, low = _floats(activating), _floats(silent)
    # A resample only weighs the pairs anew, so all are two matrix products.
    above = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    areas = (_weights(len(high), seed) @ above * _weights(len(low), seed + 1)).sum(axis=1)
    return _estimate(value, areas)


def area(activating: Values, silent: Values) -> float | None:
    """The value of `auroc` alone, which costs little however many there are."""
    high, low = _floats(activating), np.sort(_floats(silent))
    if not len(high) or not len(low):
        return None
    below = [np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")]
    return float(np.mean(below) / len(low))


def correlation(
    activating: Sequence[tuple[Values, Values]],
    silent: Sequence[tuple[Values, Values]] = (),
    seed: int = 0,
) -> Estimate | None:
    """Pearson's r over the tokens of all examples; whole examples are resampled.

    Args:
        activating: per example its true values and the predicted ones, of equal length.
        silent: the same of silent examples.

    Returns:
        None where the true values are constant or absent. A constant prediction, which explains
        nothing, has r = 0.
    """
    groups = [_moments(pairs) for pairs in (activating, silent) if len(pairs)]
    if not groups:
        return None
    value = _pearson(np.sum([moments.sum(axis=0) for moments in groups], axis=0)[None])[0]
    if np.isnan(value):
        return None
    weighted = [
        len(moments) * _weights(len(moments), seed + i) @ moments
        for i, moments in enumerate(groups)
    ]
    drawn = _pearson(np.sum(weighted, axis=0))
    return _estimate(value, drawn[~np.isnan(drawn)])


def mean_over_latents(values: Values, seed: int = 0) -> Estimate | None:
    """The mean of one number per latent; latents are resampled. None where there is none."""
    values = _floats(values)
    if not len(values):
        return None
    return _estimate(values.mean(), _weights(len(values), seed) @ values)


def difference_of_means(values: Values, others: Values, seed: int = 0) -> Estimate | None:
    """Mean of `values` minus that of `others`, latents of another kind, resampled apart.

    Such as those of a random autoencoder. None where either is empty.
    """
    values, others = _floats(values), _floats(others)
    if not len(values) or not len(others):
        return None
    drawn = _weights(len(values), seed) @ values - _weights(len(others), seed + 1) @ others
    return _estimate(values.mean() - others.mean(), drawn)


def _floats(values: Values) -> Float[np.ndarray, " n"]:
    return np.asarray(values, dtype=float).reshape(-1)


def _weights(n: int, seed: int) -> Float[np.ndarray, "resamples n"]:
    """Per resample the share of the n draws that each example got."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def _estimate(value: float, drawn: Float[np.ndarray, " resamples"]) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _moments(pairs: Sequence[tuple[Values, Values]]) -> Float[np.ndarray, "examples 6"]:
    """Per example n and the sums of x, y, x^2, y^2, xy: all that r needs."""
    rows = []
    for true, predicted in pairs:
        x, y = _floats(true), _floats(predicted)
        rows.append([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y])
    return np.array(rows, dtype=float)


def _pearson(moments: Float[np.ndarray, "rows 6"]) -> Float[np.ndarray, " rows"]:
    """R of each row of summed moments; nan where x is constant, 0 where only y is."""
    n, x, y, xx, yy, xy = moments.T
    of_x, of_y = n * xx - x * x, n * yy - y * y
    # Sums of floats that cancel leave some rounding: less than this is constant.
    tiny = 1e-12
    varies_x, varies_y = of_x > tiny * n * xx, of_y > tiny * n * yy
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (n * xy - x * y) / np.sqrt(of_x * of_y)
    return np.where(varies_x, np.where(varies_y, r, 0.0), np.nan)
