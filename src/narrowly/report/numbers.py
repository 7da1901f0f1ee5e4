"""Numbers as a person reads them, one way everywhere: shares in percent, the rest as they are."""

from __future__ import annotations

from narrowly.evals import Interval

UNMEASURED = "\N{EN DASH}"
DIGITS = {"share": 1, "nats": 3, "ratio": 2, "seconds": 1}


def number(value: float, unit: str) -> str:
    """One value in its unit, without the unit's name."""
    return f"{100 * value if unit == 'share' else value:.{DIGITS.get(unit, 3)}f}"


def mean(interval: Interval | None, unit: str) -> str:
    """The mean, or a dash where nothing was measured."""
    return UNMEASURED if interval is None else number(interval.mean, unit)


def span(interval: Interval | None, unit: str) -> str:
    """The interval's two ends, `71.0 to 79.2`; empty where nothing was measured."""
    if interval is None:
        return ""
    return f"{number(interval.low, unit)} to {number(interval.high, unit)}"


def percent(value: float) -> str:
    """A share inside a sentence."""
    return f"{number(value, 'share')}\N{NO-BREAK SPACE}%"
