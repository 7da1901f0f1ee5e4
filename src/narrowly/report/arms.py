"""Arms: what was trained alike but for the seed, read back from its run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from narrowly.errors import NarrowlyError
from narrowly.evals import (
    Interval,
    Metric,
    Row,
    interval,
    measured_evals,
    read_recipe,
    seed_folders,
    summarise,
)
from narrowly.files import read_json

Role = Literal["base", "undefended", "random", "test_time", "defended"]

# Roles that a folder's name announces; a run's own files decide where its name says nothing.
NAMED_ROLES: tuple[Role, ...] = ("base", "undefended", "random", "test_time")


@dataclass(frozen=True)
class Arm:
    """One way of training, over its seeds.

    Attributes:
        name: of the folder.
        role: what it is evidence for.
        runs: folders, one per seed.
        recipe: the first seed's recipe; empty if it was not trained here (a base model).
        metrics: intervals over seeds and prompts, by `<eval>.<metric>`.
        units: of the same metrics: "share", "nats" or "ratio".
        seeds: the same metrics of every seed, to pair them with another arm's.
        rows: the answers of the first seed, by eval.
        reproduce: what `reproduce.json` of the first seed says (versions, seeds, command).
        defenses: what `defenses.json` of the first seed says was active.
        wall_seconds: of training, mean and interval over seeds; None where it was not recorded.
    """

    name: str
    role: Role
    runs: tuple[Path, ...]
    recipe: dict[str, Any]
    metrics: dict[str, Interval]
    units: dict[str, str]
    seeds: dict[str, list[Metric]]
    rows: dict[str, list[Row]]
    reproduce: dict[str, Any]
    defenses: Any
    wall_seconds: Interval | None

    @property
    def label(self) -> str:
        """The name as a person reads it."""
        return self.name.replace("_", " ")

    def get(self, metric: str) -> Interval | None:
        """The interval of `<eval>.<metric>`, or None where it was not measured."""
        return self.metrics.get(metric)


def read_arms(runs: Sequence[str | Path]) -> list[Arm]:
    """The arms of these folders, each a run or a folder of `seed-N` runs, in the order given.

    Raises:
        NarrowlyError: a folder that does not exist or holds no finished eval, or none at all.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise NarrowlyError("no run to compare. Name at least one run folder.")
    for folder in folders:
        if not folder.is_dir():
            raise NarrowlyError(f"{folder}: no such folder.")
    names = [_name(folder) for folder in folders]
    arms = [
        _read(folder, str(folder) if names.count(name) > 1 else name)
        for folder, name in zip(folders, names, strict=True)
    ]
    if len({arm.name for arm in arms}) < len(arms):
        raise NarrowlyError("the same run is named twice; compare it with others.")
    return arms


def _name(folder: Path) -> str:
    folder = folder.resolve()
    if folder.name.startswith("seed-"):
        return f"{folder.parent.name}/{folder.name}"
    return folder.name


def _read(folder: Path, name: str) -> Arm:
    runs = seed_folders(folder)
    evals = [measured_evals(run) for run in runs]
    names = sorted({eval_ for found in evals for eval_ in found})
    if not names:
        raise NarrowlyError(
            f"{folder}: no finished eval in it. Measure it first: narrowly eval {folder}"
        )
    metrics: dict[str, Interval] = {}
    units: dict[str, str] = {}
    measured: dict[str, list[Metric]] = {}
    rows: dict[str, list[Row]] = {}
    for eval_ in names:
        seeds = [found[eval_] for found in evals if eval_ in found]
        rows[eval_] = seeds[0][0].rows
        for metric, estimate in summarise([values for _, values in seeds]).items():
            metrics[f"{eval_}.{metric}"] = estimate
            units[f"{eval_}.{metric}"] = seeds[0][1][metric].unit
            measured[f"{eval_}.{metric}"] = [values[metric] for _, values in seeds]
    recipe = read_recipe(runs[0])
    return Arm(
        name=name,
        role=role_of(name, runs[0], recipe),
        runs=tuple(runs),
        recipe=recipe,
        metrics=metrics,
        units=units,
        seeds=measured,
        rows=rows,
        reproduce=_json(runs[0] / "reproduce.json") or {},
        defenses=_json(runs[0] / "defenses.json"),
        wall_seconds=_wall_seconds(runs),
    )


def role_of(name: str, run: Path, recipe: Mapping[str, Any]) -> Role:
    """What a run is evidence for: as its arm's name announces, or else as its own files say."""
    for role in NAMED_ROLES:
        if name.replace("-", "_").startswith(role):
            return role
    if not recipe.get("data"):
        return "base"
    names = defense_names(recipe)
    if not names:
        return "undefended"
    if any(name.startswith("random_") for name in names):
        return "random"
    if "test_time_ablation" in names:
        return "test_time"
    finders = {_finder(path) for path in (run / "concepts").rglob("*.json")}
    return "random" if finders == {"random"} else "defended"


def defense_names(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a recipe's defenses, in its order."""
    return tuple(
        str(name)
        for each in recipe.get("defenses") or ()
        for name in (each if isinstance(each, dict) else [each])
    )


def _finder(path: Path) -> str | None:
    concept = read_json(path)
    provenance = concept.get("provenance") if isinstance(concept, dict) else None
    return provenance.get("finder") if isinstance(provenance, dict) else None


def _json(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _wall_seconds(runs: Sequence[Path]) -> Interval | None:
    """Mean over seeds, with the interval over seeds alone."""
    told = [(_json(run / "reproduce.json") or {}).get("wall_seconds") for run in runs]
    seconds = [np.array([float(value)]) for value in told if value is not None]
    if not seconds:
        return None
    return interval([Metric(value, np.ones(1), "seconds") for value in seconds])
