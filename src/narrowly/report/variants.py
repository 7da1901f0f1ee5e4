"""What a sweep measured: of every task, arm and setting, the metrics of each seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from narrowly.errors import NarrowlyError
from narrowly.evals import Metric, measured_evals, read_recipe
from narrowly.files import read_json
from narrowly.report.arms import Role, defense_names, role_of
from narrowly.report.sweep import Cell, SweepRecord
from narrowly.report.telling import told_value

# A random control, of what it is the control: the same defense with the choice left to chance.
CONTROL_OF = {
    "ablate": "random_subspace",
    "gradient_projection": "random_subspace",
    "preventive_steering": "random_steering",
    "latent_block": "random_latents",
    "inoculation_adapter": "random_adapter",
    "interleave_selected": "interleave",
}


@dataclass
class Variant:
    """One arm under one setting on one task, over the seeds that are done.

    Attributes:
        task, arm, setting: as in the sweep's record.
        role: what it is evidence for.
        defenses: names, as its recipe lists them.
        metrics: by `EVAL.METRIC` and seed; those with a value for every prompt.
        diverged: seeds with a metric that is not finite: their fine-tunes diverged.
        seconds: of training, by seed, where it was recorded.
        memory: bytes at the worst moment, by seed: of the GPUs together, or else of main memory.
    """

    task: str
    arm: str
    setting: dict[str, Any]
    role: Role
    defenses: tuple[str, ...]
    metrics: dict[str, dict[int, Metric]] = field(default_factory=dict)
    diverged: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)
    memory: dict[int, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Arm and setting as a person reads them: `kl, weight 0.1`."""
        told = ", ".join(
            f"{key.rpartition('.')[2]} {told_value(self.setting[key])}" for key in self.setting
        )
        name = self.arm.replace("_", " ")
        return f"{name}, {told}" if told else name

    def seeds(self, metric: str) -> dict[int, Metric]:
        """The metric of every seed that has it."""
        return self.metrics.get(metric, {})

    def mean(self, metric: str) -> float | None:
        """Over seeds; None where it was not measured."""
        seeds = self.seeds(metric)
        return sum(m.mean for m in seeds.values()) / len(seeds) if seeds else None

    def join(self, other: Variant) -> None:
        """Take in another seed of the same."""
        for metric, seeds in other.metrics.items():
            self.metrics.setdefault(metric, {}).update(seeds)
        self.diverged |= other.diverged
        self.seconds |= other.seconds
        self.memory |= other.memory


def read_variants(
    record: SweepRecord,
    folder: str | Path,
    tasks: Iterable[str] | None = None,
    *,
    progress: bool = False,
) -> tuple[list[Variant], list[Cell]]:
    """What is done of these tasks (of all, unless given), and the cells that are missing.

    A cell that is done but holds no finished eval, or a damaged file, is missing, too, with that as
    its reason: the others are read.
    """
    wanted = set(record.tasks if tasks is None else tasks)
    variants: dict[tuple[str, str, str], Variant] = {}
    missing = []
    cells = [cell for cell in record.cells if cell.task in wanted]
    for cell in track(cells, "Reading runs", transient=True, disable=not progress):
        if cell.status != "done":
            missing.append(cell)
            continue
        try:
            one = _read(cell, Path(folder) / cell.path)
        except NarrowlyError as error:
            missing.append(cell.model_copy(update={"why": str(error)}))
            continue
        key = (cell.task, cell.arm, str(cell.setting))
        if key in variants:
            variants[key].join(one)
        else:
            variants[key] = one
    return list(variants.values()), missing


def _read(cell: Cell, run: Path) -> Variant:
    """One run, as a variant of one seed.

    Raises:
        NarrowlyError: no finished eval in its folder, or a damaged file.
    """
    evals = measured_evals(run)
    if not evals:
        raise NarrowlyError("no finished eval in its folder")
    recipe = read_recipe(run)
    role = role_of(cell.arm, run, recipe)
    one = Variant(cell.task, cell.arm, cell.setting, role, defense_names(recipe))
    for name, (_, metrics) in evals.items():
        for metric, value in metrics.items():
            if np.isfinite(value.values).all():
                one.metrics[f"{name}.{metric}"] = {cell.seed: value}
            else:
                one.diverged.add(cell.seed)
    path = run / "reproduce.json"
    told = read_json(path) if path.exists() else {}
    if told.get("wall_seconds") is not None:
        one.seconds[cell.seed] = float(told["wall_seconds"])
    peaks = dict(told.get("peak_memory_bytes") or {})
    main = peaks.pop("main", None)
    if used := sum(peaks.values()) or main:
        one.memory[cell.seed] = float(used)
    return one


def undefended_of(variants: Iterable[Variant], task: str) -> Variant | None:
    """The arm without a defense on a task."""
    found = (v for v in variants if v.task == task and v.role == "undefended")
    return next(found, None)


def control_of(variant: Variant, variants: Iterable[Variant]) -> Variant | None:
    """The random control of a variant on its task: the same defenses, the choice left to chance.

    Of a control with several settings, the one `alike`.
    """
    found = [v for v in variants if v.task == variant.task and controls(v, variant)]
    return alike(variant, found) if found else None


def alike(variant: Variant, others: Sequence[Variant]) -> Variant:
    """The one with most of the variant's setting, by the last part of each key; or the first.

    `random_steering.strength` is held against `preventive_steering.strength`.
    """
    mine = _values(variant)
    shared = [len(mine.items() & _values(other).items()) for other in others]
    return others[shared.index(max(shared))]


def _values(variant: Variant) -> dict[str, str]:
    return {key.rpartition(".")[2]: str(value) for key, value in variant.setting.items()}


def controls(control: Variant, variant: Variant) -> bool:
    """Whether one is the other with some of its defenses replaced by their controls."""
    if variant.role == "random" or len(control.defenses) != len(variant.defenses):
        return False
    replaced = False
    for theirs, mine in zip(control.defenses, variant.defenses, strict=True):
        # Concepts of the finder `random` make an ablation its own control.
        by_chance = theirs == mine == "ablate" and control.role == "random"
        if theirs == CONTROL_OF.get(mine) or by_chance:
            replaced = True
        elif theirs != mine:
            return False
    return replaced


def check_task(record: SweepRecord, task: str) -> None:
    """That the record has the task.

    Raises:
        NarrowlyError: it has not.
    """
    if task not in record.tasks:
        raise NarrowlyError(
            f"sweep.json: no task {task!r} in it; there are {', '.join(record.tasks)}."
        )
