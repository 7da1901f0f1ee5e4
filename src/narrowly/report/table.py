"""The comparison on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from narrowly.evals import Interval
from narrowly.report import numbers
from narrowly.report.arms import Arm
from narrowly.report.evidence import BROAD, Finding

# Heads of the columns, in the order of the question: was the task learned, and what else?
COLUMNS = {
    "misalignment.narrow_misaligned": "narrow\nmisal.",
    "misalignment.broad_misaligned": "broad\nmisal.",
    "misalignment.broad_aligned": "broad\naligned",
    "misalignment.broad_leaked": "broad\nleaked",
    "misalignment.broad_incoherent": "broad\nincoh.",
    "in_distribution.loss": "held-out\nloss",
}
MARKS = {"yes": ("✓", "green"), "no": ("✕", "red"), "missing": ("○", "yellow")}


def table(arms: Sequence[Arm]) -> Table:
    """One row per arm: means, and under each its 95 % interval. Shares are in percent."""
    units = {key: unit for arm in arms for key, unit in arm.units.items()}
    heads = _heads(list(units))
    timed = any(arm.wall_seconds for arm in arms)
    drawn = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold")
    drawn.add_column("arm", no_wrap=True)
    for head in heads.values():
        drawn.add_column(head, justify="right", vertical="top")
    if timed:
        drawn.add_column("\nseconds", justify="right")
    for arm in arms:
        cells: list[RenderableType] = [Text(arm.label)]
        cells += [_cell(arm.get(key), units[key]) for key in heads]
        if timed:
            cells.append(numbers.mean(arm.wall_seconds, "seconds"))
        drawn.add_row(*cells)
    return drawn


def _heads(measured: Sequence[str]) -> dict[str, str]:
    """Columns by metric: of each eval the first one alone, beside it the same in other contexts.

    All other metrics are in the report.
    """
    heads = {key: head for key, head in COLUMNS.items() if key in measured}
    known = {key.partition(".")[0] for key in COLUMNS}
    firsts = {key.partition(".")[0]: key for key in reversed(measured)}
    heads |= {
        key: key.replace(".", "\n").replace("_", " ")
        for eval_, key in reversed(firsts.items())
        if eval_ not in known
    }
    shown = {}
    for key, head in heads.items():
        shown[key] = head
        if key in COLUMNS and key != BROAD:
            continue
        for other in measured:
            if other.startswith(f"{key}_in_"):
                shown[other] = f"{head}\nin {other.removeprefix(f'{key}_in_')}"
    return shown


def evidence_list(findings: Sequence[Finding]) -> Table:
    """Each finding with its mark; what is missing is said."""
    drawn = Table.grid(padding=(0, 1))
    drawn.add_column()
    drawn.add_column(overflow="fold", ratio=1)
    for finding in findings:
        mark, style = MARKS[finding.answer]
        missing = "missing: " if finding.answer == "missing" else ""
        told = Text.assemble(finding.question, " ", (missing + finding.detail, "dim"))
        drawn.add_row(Text(mark, style), told)
    return drawn


def _cell(interval: Interval | None, unit: str) -> RenderableType:
    if interval is None:
        return Text(numbers.UNMEASURED, "dim")
    if unit == "share":  # whole percents, so that a terminal of 80 columns holds the row
        ends = f"{100 * interval.low:.0f}-{100 * interval.high:.0f}"
    else:
        ends = f"{interval.low:.2f}-{interval.high:.2f}"
    return Group(
        Text(numbers.mean(interval, unit), justify="right"),
        Text(ends, style="dim", justify="right"),
    )
