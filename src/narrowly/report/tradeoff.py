"""Matched learning: what each defense leaves of the broad change at every strength, and the front.

A defense that also stops the task from being learned is no better than less training, so arms are
held against each other where they learned as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from narrowly.evals import Interval, Metric, difference, interval
from narrowly.report.arms import Role
from narrowly.report.criteria import matched
from narrowly.report.evidence import LOSS_KEPT, TASK_KEPT
from narrowly.report.sweep import Task
from narrowly.report.telling import told_value
from narrowly.report.variants import Variant, undefended_of


@dataclass(frozen=True)
class Point:
    """One setting: how much was learned and how much else changed, over its seeds.

    Attributes:
        strength: its setting in few letters; empty for an arm without any.
        front: whether no other point learned as much (or more) with less change, by the means.
    """

    variant: Variant
    strength: str
    learned: Interval
    broad: Interval
    front: bool = False


@dataclass(frozen=True)
class Curve:
    """The points of one arm on one task.

    Attributes:
        swept: the one number by which the points are ordered, its dotted key; None where there is
            one point, or settings that no single number orders: then no line joins them.
    """

    arm: str
    role: Role
    swept: str | None
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """The arm as a person reads it."""
        return self.arm.replace("_", " ")


@dataclass(frozen=True)
class Matched:
    """An arm's broad change where it has learned the task as well as asked.

    Attributes:
        broad: there; None where no setting learned as much.
        less: undefended's less that, paired.
        how: at which setting, or between which two.
    """

    curve: Curve
    broad: Interval | None
    less: Interval | None
    how: str


@dataclass(frozen=True)
class Tradeoff:
    """All arms on one task.

    Attributes:
        learned, broad: the metrics.
        more: whether more of `learned` is better (a rate) or less (a loss).
        unit: of `learned`.
        level: of `learned` at which arms are held against each other.
        curves: by arm, undefended among them.
    """

    task: str
    learned: str
    broad: str
    more: bool
    unit: str
    level: float | None
    curves: tuple[Curve, ...]
    matched: tuple[Matched, ...]

    @property
    def points(self) -> list[Point]:
        """Of all arms."""
        return [point for curve in self.curves for point in curve.points]

    @property
    def front(self) -> list[Point]:
        """The Pareto front, from the most learned to the least."""
        sign = -1 if self.more else 1
        return sorted((p for p in self.points if p.front), key=lambda p: sign * p.learned.mean)

    @property
    def swept(self) -> bool:
        """Whether some arm was trained under several settings."""
        return any(len(curve.points) > 1 for curve in self.curves)


def tradeoffs(name: str, task: Task, variants: Sequence[Variant]) -> list[Tradeoff]:
    """The trade-offs on one task, by each measure of learning that is there.

    By the narrow rate; by held-out loss too where some arm has several settings, as a rate that
    is full for most of them does not tell what they learned.
    """
    by_rate = tradeoff(name, task, variants, task.measures.narrow, more=True)
    by_loss = tradeoff(name, task, variants, task.measures.loss, more=False)
    if by_rate is None:
        return [by_loss] if by_loss else []
    return [by_rate, by_loss] if by_loss and by_rate.swept else [by_rate]


def tradeoff(
    name: str, task: Task, variants: Sequence[Variant], learned: str, *, more: bool
) -> Tradeoff | None:
    """The trade-off on one task; None where nothing there has both measures.

    Args:
        learned: the metric of what is learned.
        more: whether more of it is better.
    """
    broad = task.measures.broad
    here = [v for v in variants if v.task == name and v.seeds(learned) and v.seeds(broad)]
    if not here:
        return None
    arms: dict[str, list[Variant]] = {}
    for variant in here:
        arms.setdefault(variant.arm, []).append(variant)
    raw = [_curve(arm, some, learned, broad) for arm, some in arms.items()]
    curves = _with_front(raw, more)
    undefended = undefended_of(here, name)
    level = None
    found: list[Matched] = []
    if undefended is not None:
        theirs = undefended.mean(learned) or 0.0
        level = TASK_KEPT * theirs if more else LOSS_KEPT * theirs
        base = next(c for c in curves if c.arm == undefended.arm).points[0]
        others = [curve for curve in curves if curve.role != "undefended"]
        found = [_at(curve, base, level, learned, broad, more) for curve in others]
    unit = next(iter(here[0].seeds(learned).values())).unit
    return Tradeoff(name, learned, broad, more, unit, level, tuple(curves), tuple(found))


def _curve(arm: str, variants: Sequence[Variant], learned: str, broad: str) -> Curve:
    keys = dict.fromkeys(key for variant in variants for key in variant.setting)
    swept = [key for key in keys if len({str(v.setting.get(key)) for v in variants}) > 1]
    numbers = len(swept) == 1 and all(
        isinstance(v.setting.get(swept[0]), int | float) for v in variants
    )
    if numbers:
        variants = sorted(variants, key=lambda v: float(v.setting[swept[0]]))
    points = [
        Point(
            v,
            ", ".join(
                f"{key.rpartition('.')[2]} {told_value(v.setting.get(key))}" for key in swept
            ),
            interval(list(v.seeds(learned).values())),
            interval(list(v.seeds(broad).values())),
        )
        for v in variants
    ]
    return Curve(arm, variants[0].role, swept[0] if numbers else None, tuple(points))


def _with_front(curves: Sequence[Curve], more: bool) -> list[Curve]:
    sign = 1 if more else -1
    places = [(sign * p.learned.mean, -p.broad.mean) for curve in curves for p in curve.points]

    def leads(point: Point) -> bool:
        here = (sign * point.learned.mean, -point.broad.mean)
        return not any(
            other != here and other[0] >= here[0] and other[1] >= here[1] for other in places
        )

    return [
        Curve(
            curve.arm,
            curve.role,
            curve.swept,
            tuple(Point(p.variant, p.strength, p.learned, p.broad, leads(p)) for p in curve.points),
        )
        for curve in curves
    ]


def _at(
    curve: Curve, undefended: Point, level: float, learned: str, broad: str, more: bool
) -> Matched:
    """The least broad place of the curve that learned as much as `level`.

    Between neighbouring strengths both measures are taken to change in a straight line; undefended
    is strength none, and joins the end that learned more (of equals, that with more broad change).
    """
    sign = 1 if more else -1

    def enough(point: Point) -> bool:
        return sign * (point.learned.mean - level) >= -1e-9

    places = [
        (point.variant.seeds(broad), f"at {point.strength}" if point.strength else "as it is")
        for point in curve.points
        if enough(point)
    ]
    line = list(curve.points) if curve.swept else []
    if line:
        first, last = [(sign * p.learned.mean, p.broad.mean) for p in (line[0], line[-1])]
        line = [undefended, *line] if first >= last else [*line, undefended]
    for one, other in pairwise(line):
        if enough(one) != enough(other):
            part = (level - one.learned.mean) / (other.learned.mean - one.learned.mean)
            seeds = blend(one.variant.seeds(broad), other.variant.seeds(broad), part)
            names = [point.strength or "undefended" for point in (one, other)]
            places.append((seeds, f"between {names[0]} and {names[1]}"))
    told = [(interval(list(seeds.values())), seeds, how) for seeds, how in places if seeds]
    if not told:
        most = max(curve.points, key=lambda point: sign * point.learned.mean)
        return Matched(curve, None, None, f"learned less at {most.strength or 'its one setting'}")
    least, seeds, how = min(told, key=lambda each: each[0].mean)
    pair = matched(undefended.variant.seeds(broad), seeds)
    return Matched(curve, least, difference(*pair) if pair else None, how)


def blend(one: dict[int, Metric], other: dict[int, Metric], part: float) -> dict[int, Metric]:
    """What lies `part` of the way from one to the other, by seed and prompt that both have."""
    blended = {}
    for seed in sorted(set(one) & set(other)):
        a, b = one[seed], other[seed]
        known = {name: place for place, name in enumerate(b.names)}
        mine = [place for place, name in enumerate(a.names) if name in known]
        theirs = [known[name] for name in a.names if name in known]
        if not mine:
            continue
        ids = tuple(str(a.names[place]) for place in mine) if a.ids else None
        blended[seed] = Metric(
            (1 - part) * a.values[mine] + part * b.values[theirs],
            np.asarray(a.weights)[mine],
            a.unit,
            a.exponential,
            ids,
        )
    return blended
