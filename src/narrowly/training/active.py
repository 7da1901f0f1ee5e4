"""Was this training defended? The record of active defenses, read and judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowly.errors import NarrowlyError
from narrowly.evals import read_recipe, seed_folders
from narrowly.files import read_json
from narrowly.models.test_time import STAYS
from narrowly.training.callback import RECORD

WEIGHTS = ("adapter", "model")


@dataclass(frozen=True)
class Active:
    """The record of one training.

    Attributes:
        folder: that holds it, or should.
        entries: of `defenses.json`, one per defense.
        faults: why this training does not count as defended; empty if it does.
    """

    folder: Path
    entries: list[dict[str, Any]]
    faults: list[str]


def read_active(path: str | Path) -> list[Active]:
    """What was active in a training, or in those of a folder's `seed-N`.

    A training that was meant to be defended and was not (an import that failed and was only
    logged, hooks that a fused kernel passes by) leaves no record, or one that shows it.

    Args:
        path: a run, the output folder of any Trainer, or the folder of its weights.

    Raises:
        NarrowlyError: no such folder; a record that is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise NarrowlyError(f"{path}: no such folder.")
    if path.name in WEIGHTS and not (path / RECORD).exists():
        path = path.parent
    return [_read(folder) for folder in seed_folders(path)]


def _read(folder: Path) -> Active:
    if not (folder / RECORD).exists():
        missing = (
            f"{folder}: holds no {RECORD}, so no defense of narrowly was active, or the training "
            "has not ended"
        )
        return Active(folder, [], [missing])
    entries = read_json(folder / RECORD)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and {"defense", "doors", "interventions"} <= entry.keys()
        for entry in entries
    ):
        raise NarrowlyError(f"{folder / RECORD}: not a record of defenses. Train again.")
    faults = [f"{e['defense']} {why}" for e in entries if (why := _idle(e)) is not None]
    if any(e.get("at_test_time") for e in entries) and not (folder / STAYS).is_dir():
        faults.append(f"{STAYS}/, which holds what acts when the model answers, is gone")
    asked = [name for entry in read_recipe(folder).get("defenses") or [] for name in entry]
    active = [entry["defense"] for entry in entries]
    faults += [
        f"{name} is in the recipe, but was not active" for name in asked if name not in active
    ]
    if not entries and not asked:
        faults = ["trained without any defense"]
    return Active(folder, entries, [f"{folder}: {fault}" for fault in faults])


def _idle(entry: dict[str, Any]) -> str | None:
    """Why a defense did not act; None: it did, through every door that it has."""
    doors, interventions = entry["doors"], entry["interventions"]
    if not doors and not {"stopped_after", "at_test_time"} & entry.keys():
        return "did nothing that is recorded"
    if "interventions" in doors:
        if not interventions:
            return "attached no intervention"
        if silent := [str(each.get("site")) for each in interventions if not each.get("forwards")]:
            return f"never acted at {', '.join(silent)}"
    if "loss" in doors:
        loss = entry.get("loss") or {}
        if not loss.get("micro_batches"):
            return "never added to the loss"
        if not loss.get("mean"):
            return "added 0 to the loss"
    return None
