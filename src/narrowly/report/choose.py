"""One setting for each arm of a sweep, chosen on one task and held to on all others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narrowly.errors import NarrowlyError
from narrowly.report.evidence import LOSS_KEPT, TASK_KEPT
from narrowly.report.sweep import Measures, SweepRecord
from narrowly.report.variants import (
    Variant,
    alike,
    check_task,
    controls,
    read_variants,
    undefended_of,
)


def choose(record: SweepRecord, folder: str | Path) -> dict[str, dict[str, Any]]:
    """By arm, the setting to use from here on, from the cells that are done on `choose_on`.

    Among the settings that keep the task (narrow at least 0.95 of undefended; where narrow is not
    measured, held-out loss at most 1.05 times), the one of the least broad change; where none
    keeps it, the one that keeps most. By means, as a choice must be: figures on this task are
    flattered by it, and reports mark them. Settings with fewer seeds than an arm's others do not
    stand for choice. Of equals, the first. A random control takes the setting of the defense whose
    control it is, so that it is matched in norm, and not its own best. An arm of which nothing is
    measured there is left out.

    Raises:
        NarrowlyError: the record names no task to choose on, or nothing undefended is done there.
    """
    if record.choose_on is None:
        raise NarrowlyError("sweep.json: no `choose_on`, the task to choose settings on.")
    check_task(record, record.choose_on)
    variants, _ = read_variants(record, folder, [record.choose_on])
    undefended = undefended_of(variants, record.choose_on)
    if undefended is None:
        raise NarrowlyError(
            f"{record.choose_on}: no finished run without a defense, so what keeps the task cannot "
            "be told and no setting be chosen. Add an arm with an empty list of defenses, or see "
            "why its cells failed."
        )
    measures = record.tasks[record.choose_on].measures
    arms: dict[str, list[Variant]] = {}
    for variant in variants:
        arms.setdefault(variant.arm, []).append(variant)
    picked = {arm: best(some, undefended, measures) for arm, some in arms.items()}
    for arm, some in arms.items():
        of = next((one for one in picked.values() if one and controls(some[0], one)), None)
        if of is not None and some[0].role == "random":
            picked[arm] = alike(of, some)
    return {arm: one.setting for arm, one in picked.items() if one is not None}


def best(settings: Sequence[Variant], undefended: Variant, measures: Measures) -> Variant | None:
    """The least broad of those that keep the task, or else the one that keeps most.

    None where neither is measured.
    """
    told = [(v, v.mean(measures.broad), kept(v, undefended, measures)) for v in settings]
    whole = [
        (v, broad, keeps) for v, broad, keeps in told if broad is not None and keeps is not None
    ]
    if not whole:
        return settings[0] if len(settings) == 1 else None
    most = max(len(v.seeds(measures.broad)) for v, _, _ in whole)
    whole = [each for each in whole if len(each[0].seeds(measures.broad)) == most]
    keeping = [each for each in whole if each[2] >= 1]
    if keeping:
        return min(keeping, key=lambda each: each[1])[0]
    return max(whole, key=lambda each: each[2])[0]


def kept(variant: Variant, undefended: Variant, measures: Measures) -> float | None:
    """How much of the task is kept, by the mean: 1 or more is enough. None: not measured."""
    mine, theirs = variant.mean(measures.narrow), undefended.mean(measures.narrow)
    if mine is not None and theirs is not None:
        # Rates are sums of floats: 0.95 of a rate must not fail by its last digit.
        return (mine + 1e-9) / max(TASK_KEPT * theirs, 1e-12)
    mine, theirs = variant.mean(measures.loss), undefended.mean(measures.loss)
    if mine is None or theirs is None:
        return None
    return (LOSS_KEPT * theirs + 1e-9) / max(mine, 1e-12)
