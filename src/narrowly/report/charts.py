"""A trade-off as places on a square of 100 by 100, for the page to draw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from narrowly.evals import Interval
from narrowly.report.numbers import number
from narrowly.report.page import ticks
from narrowly.report.telling import ends, percent
from narrowly.report.tradeoff import Curve, Matched, Point, Tradeoff


@dataclass(frozen=True)
class Spot:
    """One setting on the chart: where it lies (percent from left and top) and what it tells."""

    x: float
    y: float
    reach: str
    role: str
    label: str
    told: tuple[str, ...]
    number: int | None


@dataclass(frozen=True)
class Line:
    """One arm's curve."""

    label: str
    role: str
    swept: str
    strengths: str
    path: str
    points: tuple[Spot, ...]


class Chart:
    """Broad change (down is less) over what was learned (right is more)."""

    def __init__(self, traded: Tradeoff):
        self.traded = traded
        self.task = traded.task
        learned = [point.learned.mean for point in traded.points]
        if traded.level is not None:
            learned.append(traded.level)
        low, high = _around(learned)
        if traded.unit == "share":
            low, high = max(low, -0.02), min(high, 1.02)
        self.across_ends = (low, high) if traded.more else (high, low)
        top = max(point.broad.mean for point in traded.points)
        self.up_ends = (1.12 * top or 1.0, -0.04 * top or -0.04)

    @property
    def swept(self) -> bool:
        """Whether some arm has several settings."""
        return self.traded.swept

    @property
    def matched(self) -> tuple[Matched, ...]:
        """The arms at the same level of learning."""
        return self.traded.matched

    @property
    def roles(self) -> set[str]:
        """Those that it shows."""
        return {curve.role for curve in self.traded.curves}

    @cached_property
    def points(self) -> list[Spot]:
        """All settings; undefended and then the front last, so that they lie on top."""
        spots = [self._spot(curve, point) for curve in self.traded.curves for point in curve.points]
        return sorted(spots, key=lambda s: (s.number is not None, s.role == "undefended"))

    @cached_property
    def lines(self) -> list[Line]:
        """A curve for each arm with one swept number."""
        return [
            Line(
                curve.label,
                curve.role,
                curve.swept.rpartition(".")[2],
                ", ".join(p.strength.rpartition(" ")[2] for p in curve.points),
                _path([(self._x(p.learned.mean), self._y(p.broad.mean)) for p in curve.points]),
                tuple(self._spot(curve, point) for point in curve.points),
            )
            for curve in self.traded.curves
            if curve.swept is not None and len(curve.points) > 1
        ]

    @property
    def front(self) -> list[str]:
        """Labels of the front, from the most learned to the least."""
        return [
            f"{point.variant.label}: learned {self._learned(point.learned)}, "
            f"broad {percent(point.broad.mean)} %"
            for point in self.traded.front
        ]

    @property
    def front_path(self) -> str:
        """Steps: of what learned as much as asked, the least broad point that is known."""
        places = [(self._x(p.learned.mean), self._y(p.broad.mean)) for p in self.traded.front]
        (x, y), *others = places
        return f"M{x} {y}" + "".join(f"H{x}V{y}" for x, y in others)

    @property
    def xticks(self) -> list[tuple[float, str]]:
        """Places and names along the bottom."""
        ends_ = sorted(self.across_ends)
        share = self.traded.unit == "share"
        found = ticks((100 * ends_[0], 100 * ends_[1])) if share else ticks((ends_[0], ends_[1]))
        return [(self._x(value / 100 if share else value), name) for value, name in found]

    @property
    def yticks(self) -> list[tuple[float, str]]:
        """Places and names along the left side, in percent."""
        high, low = self.up_ends
        return [(self._y(value / 100), name) for value, name in ticks((100 * low, 100 * high))]

    @property
    def level(self) -> float | None:
        """Where the level of matched learning lies."""
        return None if self.traded.level is None else self._x(self.traded.level)

    @property
    def level_told(self) -> str:
        """What the level is."""
        if self.traded.level is None:
            return ""
        share = "95 % of undefended's" if self.traded.more else "1.05 times undefended's"
        at = number(self.traded.level, self.traded.unit)
        return f"{_name(self.traded.learned)} {at}, {share}"

    @property
    def across(self) -> str:
        """Name of the axis below."""
        unit = ", %" if self.traded.unit == "share" else ""
        return f"learned: {_name(self.traded.learned)}{unit} →"

    @property
    def up(self) -> str:
        """Name of the axis on the left."""
        return f"{_name(self.traded.broad)}, %"

    def _learned(self, found: Interval) -> str:
        value = number(found.mean, self.traded.unit)
        return f"{value} %" if self.traded.unit == "share" else value

    def _spot(self, curve: Curve, point: Point) -> Spot:
        front = self.traded.front
        x, y = self._x(point.learned.mean), self._y(point.broad.mean)
        share = self.traded.unit == "share"
        span = ends(point.learned) if share else f"{point.learned.low:.3f}-{point.learned.high:.3f}"
        return Spot(
            x,
            y,
            f"M{self._x(point.learned.low)} {y}H{self._x(point.learned.high)}"
            f"M{x} {self._y(point.broad.low)}V{self._y(point.broad.high)}",
            curve.role,
            point.variant.label,
            (
                f"{_name(self.traded.broad)} {percent(point.broad.mean)} % ({ends(point.broad)})",
                f"{_name(self.traded.learned)} {self._learned(point.learned)} ({span})",
                f"{point.broad.seeds} seed{'s' if point.broad.seeds != 1 else ''}",
            ),
            front.index(point) + 1 if point.front else None,
        )

    def _x(self, value: float) -> float:
        return _place(value, *self.across_ends)

    def _y(self, value: float) -> float:
        return _place(value, *self.up_ends)


def _around(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or 0.05
    return low - air, high + air


def _place(value: float, start: float, end: float) -> float:
    return round(100 * (value - start) / (end - start), 2)


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in places)


def _name(metric: str) -> str:
    return metric.partition(".")[2].replace("_", " ")
