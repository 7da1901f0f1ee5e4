"""A sweep's plots as files: the verdicts in a row for each arm, and each task's trade-off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from narrowly.report.criteria import BROAD_LEFT
from narrowly.report.evidence import TASK_KEPT
from narrowly.report.numbers import UNMEASURED
from narrowly.report.palette import HAIRLINE, INCOHERENT, INK, LEAKED, MISALIGNED, MUTED, PAPER
from narrowly.report.palette import NARROW as BLUE
from narrowly.report.plots import columns, dot, drawing, rows, save
from narrowly.report.telling import percent
from narrowly.report.tradeoff import Tradeoff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from narrowly.report.verdict import Verdict, Verdicts

ROLES = {
    "undefended": MISALIGNED,
    "defended": BLUE,
    "random": INCOHERENT,
    "test_time": LEAKED,
    "base": INK,
}


def write_verdict_plots(found: Verdicts, folder: Path) -> list[Path]:
    """`verdicts`, and `tradeoff-TASK` (and `-loss`) of each trade-off, as PNG (200 dpi) and SVG.

    Raises:
        NarrowlyError: matplotlib is not installed.
    """
    written: list[Path] = []
    judged = [v for v in found.verdicts if {"broad", "narrow"} <= set(v.criteria)]
    judged = [v for v in judged if v.criteria["broad"].interval or v.criteria["narrow"].interval]
    with drawing():
        if judged:
            tasks = [name for name, task in found.reported.items() if not task.benign]
            written += save(_verdicts(judged, tasks), folder / "verdicts")
        for traded in found.tradeoffs:
            name = re.sub(r"[^\w.-]+", "-", traded.task)
            by_loss = "" if traded.more else "-loss"
            written += save(_tradeoff(traded), folder / f"tradeoff-{name}{by_loss}")
    return written


def _verdicts(judged: Sequence[Verdict], tasks: Sequence[str]) -> Figure:
    """Of what undefended shows: how much of the broad change is left, and of the task kept."""
    figure, axes = rows(
        judged,
        f"Broad change left, and task kept, over {', '.join(tasks)}",
        "% of undefended's, 95 % intervals; dotted: the limits (at most "
        f"{100 * BROAD_LEFT:.0f}, at least {100 * TASK_KEPT:.0f})",
    )
    for limit, colour in ((BROAD_LEFT, MISALIGNED), (TASK_KEPT, BLUE)):
        axes.axvline(100 * limit, color=colour, lw=1, ls=(0, (1, 2)), zorder=1)
    for row, verdict in enumerate(judged):
        for name, colour, filled in (("narrow", BLUE, False), ("broad", MISALIGNED, True)):
            if (found := verdict.criteria[name].interval) is not None:
                dot(axes, row, found, colour, filled=filled)
    shown = [v.criteria[name].interval for v in judged for name in ("broad", "narrow")]
    axes.set_xlim(0, 100 * max(1.1, *(1.05 * found.mean for found in shown if found)))

    def cell(name: str, verdict: Verdict) -> str:
        found = verdict.criteria[name]
        return f"{percent(found.interval.mean)}" if found.interval else UNMEASURED

    columns(
        axes,
        judged,
        [
            ("broad left", MISALIGNED, lambda verdict: cell("broad", verdict)),
            ("task kept", BLUE, lambda verdict: cell("narrow", verdict)),
        ],
    )
    return figure


def _tradeoff(traded: Tradeoff) -> Figure:
    """Broad change over what was learned: every setting, curves by strength, the Pareto front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8))
    axes = figure.add_axes((0.08, 0.12, 0.58, 0.72))
    scale = 100 if traded.unit == "share" else 1
    for curve in traded.curves:
        colour = ROLES[curve.role]
        places = [(scale * p.learned.mean, 100 * p.broad.mean) for p in curve.points]
        if curve.swept:
            axes.plot(*zip(*places, strict=True), color=colour, lw=1.2, alpha=0.7, zorder=2)
        for point, (x, y) in zip(curve.points, places, strict=True):
            ends = [[y - 100 * point.broad.low], [100 * point.broad.high - y]]
            across = [[x - scale * point.learned.low], [scale * point.learned.high - x]]
            axes.errorbar(x, y, yerr=ends, xerr=across, color=colour, lw=0.8, alpha=0.4, zorder=1)
            axes.plot(x, y, "o", ms=5, mfc=PAPER, mec=colour, mew=1.4, zorder=3)
    front = traded.front
    steps = [(scale * p.learned.mean, 100 * p.broad.mean) for p in front]
    axes.step(*zip(*steps, strict=True), where="post", color=INK, lw=0.9, ls=(0, (5, 4)), zorder=2)
    listed = []
    for place, (point, (x, y)) in enumerate(zip(front, steps, strict=True), 1):
        colour = ROLES[point.variant.role]
        axes.plot(x, y, "o", ms=11, color=colour, zorder=4)
        axes.annotate(
            str(place), (x, y), color=PAPER, ha="center", va="center_baseline", size=7, zorder=5
        )
        listed.append(f"{place}  {point.variant.label}")
    if traded.level is not None:
        axes.axvline(scale * traded.level, color=MUTED, lw=0.8, ls=(0, (1, 3)))
    if not traded.more:
        axes.invert_xaxis()
    top = max(100 * point.broad.high for point in traded.points)
    axes.set_ylim(-0.04 * top, 1.05 * top)
    axes.set_xlabel(
        f"learned: {_name(traded.learned)}{', %' if scale == 100 else ''}", loc="right", size=8.5
    )
    axes.grid(color=HAIRLINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=MUTED)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.text(
        0.02,
        0.955,
        f"Change against learning: {traded.task}",
        size=11.5,
        weight="bold",
        va="center",
    )
    told = f"{_name(traded.broad)}, %; 95 % intervals; dashed: the Pareto front by the means"
    figure.text(0.02, 0.905, told, size=8.5, color=MUTED, va="center")
    legend = [f"{role.replace('_', ' ')}" for role in ROLES]
    shown = {curve.role for curve in traded.curves}
    y = 0.82
    for role, name in zip(ROLES, legend, strict=True):
        if role in shown:
            figure.text(0.70, y, "●", color=ROLES[role], size=9, va="center_baseline")
            figure.text(0.725, y, name, size=8.5, color=MUTED, va="center_baseline")
            y -= 0.048
    figure.text(0.70, y - 0.02, "\n".join(listed), size=8, va="top", linespacing=1.6, wrap=True)
    return figure


def _name(metric: str) -> str:
    return metric.partition(".")[2].replace("_", " ")
