"""How a verdict's figures are written: on the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from narrowly.evals import Interval
from narrowly.report.numbers import UNMEASURED
from narrowly.report.sweep import Cell

MINUS = "\N{MINUS SIGN}"


def told_value(value: Any) -> str:
    """A setting's value in few letters."""
    return f"{value:g}" if isinstance(value, int | float) and value is not True else str(value)


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
    """Cells that are not done, together where all is alike but setting and seed.

    Of each group task and arm, how many and which, and what became of them.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        status = "not measured" if cell.status == "done" else cell.status
        told = f"{status}: {cell.why}" if cell.why else status
        groups.setdefault((f"{cell.task} / {cell.arm}", told), []).append(cell)
    return [(name, _which(some), told) for (name, told), some in groups.items()]


def _which(cells: Sequence[Cell]) -> str:
    """`4 cells: strength 0.5, 1; seeds 0, 1`."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        for key, value in cell.setting.items():
            name = key.rpartition(".")[2]
            values.setdefault(name, {})[told_value(value)] = None
        values.setdefault("seed", {})[str(cell.seed)] = None
    values["seed"] = values.pop("seed")
    told = "; ".join(f"{name} {', '.join(some)}" for name, some in values.items())
    return f"{len(cells)} cell{'s' if len(cells) != 1 else ''}: {told}"
