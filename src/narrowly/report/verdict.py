"""The verdicts on a sweep's defenses, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowly.evals import Interval
from narrowly.report.arms import Role
from narrowly.report.criteria import Judged
from narrowly.report.sweep import Cell, SweepRecord, Task
from narrowly.report.tradeoff import Tradeoff
from narrowly.report.variants import Variant


@dataclass(frozen=True)
class Verdict:
    """One arm under one setting, judged over tasks.

    Attributes:
        arm, setting, label, role: what it is.
        variants: what was measured of it, by task.
        criteria: over the reported tasks, by name, as in `criteria.CRITERIA`; of the undefended arm
            only "coherent", as the others hold it against itself.
        each: the same of each task by itself, by task.
        time, memory: over undefended's, paired by task and seed; 1.0 is as much.
    """

    arm: str
    setting: dict[str, Any]
    label: str
    role: Role
    variants: dict[str, Variant]
    criteria: dict[str, Judged]
    each: dict[str, dict[str, Judged]]
    time: Interval | None
    memory: Interval | None


@dataclass(frozen=True)
class Verdicts:
    """A sweep, judged.

    Attributes:
        folder: of the sweep.
        record: its `sweep.json`.
        verdicts: in the order of the sweep's arms; of arms under several settings the chosen one,
            or each where none was to be chosen.
        variants: everything that was measured.
        reported: the tasks that the verdicts rest on.
        missing: cells that are not done.
        tradeoffs: of each task that is not benign, by each measure of what is learned.
    """

    folder: Path
    record: SweepRecord
    verdicts: tuple[Verdict, ...]
    variants: tuple[Variant, ...]
    reported: dict[str, Task]
    missing: tuple[Cell, ...]
    tradeoffs: tuple[Tradeoff, ...]

    @property
    def chosen_on(self) -> str | None:
        """The task on which settings were chosen, if any; its figures are flattered by that."""
        return self.record.choose_on
