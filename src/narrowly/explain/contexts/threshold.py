"""From where on a direction counts as active."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 256
RAREST, MOST = 0.01, 0.6
"""The least and the largest share of windows in which a direction may be active."""


def peak_threshold(peaks: NDArray[np.float32]) -> float:
    """The cut between two heaps of window peaks by Otsu's method, within bounds.

    Otsu 1979 (IEEE Trans. SMC 9, 62-66), equation 18: the cut that maximises the variance between
    the two sides. Where there is one heap only it cuts near the mean, so an end of a direction that
    says nothing is active in about half of the windows, and its quantiles have to tell. At least
    1 % of the windows are above it and 60 % at most: a little more than half, so that a text set of
    two equal halves is cut between them.

    Args:
        peaks: the largest projection in each window.
    """
    if not len(peaks):
        return 0.0
    low, high = np.quantile(peaks, [0.001, 0.999])
    if not high > low:
        return float(np.max(peaks))
    counts, edges = np.histogram(np.clip(peaks, low, high), BINS, (low, high))
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = len(peaks) - below
    mass = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    between = np.nan_to_num(between, posinf=0.0)
    # Between two heaps that nothing lies between, every cut is equally good: take the middle one.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    cut = float(edges[1:-1][best].mean())
    bounds = np.quantile(peaks, [1 - MOST, 1 - RAREST])
    return float(np.clip(cut, *bounds))
