"""What a sweep's verdicts rest on, and what it lacks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from narrowly.report.evidence import ENOUGH_SEEDS, Finding
from narrowly.report.telling import missing_cells

if TYPE_CHECKING:
    from narrowly.report.verdicts import Verdict, Verdicts


def verdict_evidence(found: Verdicts) -> list[Finding]:
    """Every point, present or missing, in the order in which a reader would ask."""
    defended = [verdict for verdict in found.verdicts if verdict.role == "defended"]
    return [
        _cells(found),
        _seeds(found),
        _undefended(found),
        _control(defended),
        _test_time(found),
        _elsewhere(found),
        _probes(found),
        _benign(found),
    ]


def _cells(found: Verdicts) -> Finding:
    question = "Is every cell of the sweep done?"
    if not found.missing:
        return Finding(question, "yes", f"all {len(found.record.cells)}.")
    some = [f"{name} (seed {seeds})" for name, seeds, _ in missing_cells(found.missing)]
    told = f"{len(found.missing)} of {len(found.record.cells)} cells are not: {'; '.join(some)}."
    return Finding(question, "missing", told)


def _seeds(found: Verdicts) -> Finding:
    question = "Several seeds?"
    counts = {
        f"{variant.label} on {variant.task}": max(map(len, variant.metrics.values()))
        for verdict in found.verdicts
        for variant in verdict.variants.values()
    }
    few = [f"{name} has {count}" for name, count in counts.items() if count < ENOUGH_SEEDS]
    if few:
        told = f"{_listed(few)}; {ENOUGH_SEEDS} or more show how far they differ."
        return Finding(question, "missing", told)
    return Finding(question, "yes", f"{min(counts.values())} or more of every arm on every task.")


def _undefended(found: Verdicts) -> Finding:
    question = "The same fine-tune, undefended, on every task?"
    have = {task for v in found.verdicts if v.role == "undefended" for task in v.variants}
    without = [task for task in found.record.tasks if task not in have]
    if without:
        return Finding(question, "missing", f"not on {', '.join(without)}: no figure there.")
    return Finding(question, "yes", "every figure is paired with it, by seed and question.")


def _control(defended: Sequence[Verdict]) -> Finding:
    question = "A random control of each defense that has one?"
    without = [v.label for v in defended if v.criteria["control"].mark == "missing"]
    if len(without) == len(defended):
        return Finding(question, "missing", "any damage to the activations may do as well.")
    have = [v.label for v in defended if v.label not in without]
    told = f"{', '.join(have)}: paired with it."
    return Finding(question, "yes", f"{told} None for {', '.join(without)}." if without else told)


def _test_time(found: Verdicts) -> Finding:
    question = "The same ablation at test time only?"
    arms = [verdict.label for verdict in found.verdicts if verdict.role == "test_time"]
    if not arms:
        told = "without it, training with the ablation may be no better than adding it later."
        return Finding(question, "missing", told)
    return Finding(question, "yes", f"{', '.join(arms)}.")


def _elsewhere(found: Verdicts) -> Finding:
    question = "Settings chosen on one task, and reported on others?"
    several = any(verdict.setting for verdict in found.verdicts)
    if found.chosen_on is None:
        if not several:
            return Finding(question, "yes", "nothing was chosen: each arm has one setting.")
        told = "every setting is shown; the best of several is flattered by being picked."
        return Finding(question, "missing", told)
    if found.chosen_on in found.reported:
        told = f"the figures rest on {found.chosen_on} itself, which flatters the chosen settings."
        return Finding(question, "no", told)
    told = f"chosen on {found.chosen_on}, reported on {', '.join(found.reported)}."
    return Finding(question, "yes", told)


def _probes(found: Verdicts) -> Finding:
    question = "Conditional probes?"
    harmful = {name: t for name, t in found.reported.items() if not t.benign}
    without = [name for name, task in harmful.items() if not task.measures.probes]
    if without:
        told = f"none on {', '.join(without)}: a change may hide in contexts like the training's."
        return Finding(question, "missing", told)
    return Finding(question, "yes", "on every task that is not benign.")


def _benign(found: Verdicts) -> Finding:
    question = "A benign task?"
    names = [name for name, task in found.reported.items() if task.benign]
    if not names:
        told = "whether a defense lets a model learn what is harmless was not asked."
        return Finding(question, "missing", told)
    return Finding(question, "yes", f"{', '.join(names)}.")


def _listed(some: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(some) - most} more" if len(some) > most else ""
    return f"{', '.join(some[:most])}{rest}"
