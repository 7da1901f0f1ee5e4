"""How a verdict's figures are written: on the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from narrowly.evals import Interval
from narrowly.report.numbers import UNMEASURED
from narrowly.report.sweep import Cell

MINUS = "\N{MINUS SIGN}"


def percent(value: float, digits: int = 1) -> str:
    """A share or ratio in percent, without the sign."""
    if value == inf:
        return "\N{INFINITY}"
    return f"{100 * value:.{digits}f}".replace("-", MINUS)


def ends(found: Interval, digits: int = 0) -> str:
    """An interval's ends in percent: `71-79`, `-5 to 3`."""
    low, high = (percent(value, digits) for value in (found.low, found.high))
    return f"{low} to {high}" if MINUS in low else f"{low}-{high}"


def added(found: Interval | None) -> tuple[str, str]:
    """A ratio to undefended as what it adds, in percent: `+3` and `-1 to +7`."""
    if found is None:
        return UNMEASURED, ""
    mean, low, high = (
        f"{100 * (v - 1):+.0f}".replace("-", MINUS) for v in (found.mean, found.low, found.high)
    )
    return mean, f"{low} to {high}" if found.seeds > 1 else "one run"


def missing_cells(cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    """Cells that are not done: by task and arm, which seeds, and what became of them."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        status = "not measured" if cell.status == "done" else cell.status
        told = f"{status}: {cell.why}" if cell.why else status
        setting = ", ".join(f"{key} {value}" for key, value in cell.setting.items())
        arm = f"{cell.arm}, {setting}" if setting else cell.arm
        groups.setdefault((cell.task, arm, told), []).append(cell)
    return [
        (f"{task} / {arm}", ", ".join(str(cell.seed) for cell in some), told)
        for (task, arm, told), some in groups.items()
    ]
