"""What a sweep's verdicts rest on, and what it lacks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from narrowly.report.evidence import ENOUGH_SEEDS, Finding
from narrowly.report.verdict import Verdict, Verdicts


def verdict_evidence(found: Verdicts) -> list[Finding]:
    """Every point, present or missing, in the order in which a reader would ask."""
    defended = [verdict for verdict in found.verdicts if verdict.role == "defended"]
    return [
        _cells(found),
        _measured(found),
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
    counts = Counter("not measured" if c.status == "done" else c.status for c in found.missing)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    of = f"{len(found.missing)} of {len(found.record.cells)} cells are not"
    return Finding(question, "missing", f"{of}: {told}.")


def _measured(found: Verdicts) -> Finding:
    """A metric that no run has may be misspelt in the sweep's file."""
    question = "Is everything measured that the sweep names?"
    without = []
    for name, task in found.record.tasks.items():
        have = {metric for v in found.variants if v.task == name for metric in v.metrics}
        asked = task.measures
        named = [*([] if task.benign else [asked.broad]), asked.coherent, *asked.probes]
        if have and not have & {asked.narrow, asked.loss}:
            named.append(asked.narrow)
        absent = [metric for metric in named if metric not in have]
        if have and absent:
            without.append(f"{name} has no {', '.join(absent)}")
    for variant in found.variants:
        for seed in sorted(variant.diverged):
            name = f"{variant.label} on {variant.task}, seed {seed}"
            without.append(f"{name}, diverged: what is not finite there is left out")
    if without:
        return Finding(question, "missing", f"{'; '.join(without)}.")
    return Finding(question, "yes", "on every task.")


def _seeds(found: Verdicts) -> Finding:
    question = "Several seeds?"
    counts = {
        f"{variant.label} on {variant.task}": max(map(len, variant.metrics.values()), default=0)
        for verdict in found.verdicts
        for variant in verdict.variants.values()
    }
    few = [f"{name} has {count}" for name, count in counts.items() if count < ENOUGH_SEEDS]
    if few:
        told = f"{_listed(few)}; {ENOUGH_SEEDS} or more show how far they differ."
        return Finding(question, "missing", told)
    return Finding(
        question, "yes", f"{min(counts.values(), default=0)} or more of every arm on every task."
    )


def _undefended(found: Verdicts) -> Finding:
    question = "The same fine-tune, undefended, on every task?"
    have = {task for v in found.verdicts if v.role == "undefended" for task in v.variants}
    without = [task for task in found.record.tasks if task not in have]
    if without:
        return Finding(question, "missing", f"not on {', '.join(without)}: no figure there.")
    return Finding(question, "yes", "every figure is paired with it, by seed and question.")


def _control(defended: Sequence[Verdict]) -> Finding:
    question = "A random control?"
    arms = dict.fromkeys(v.arm.replace("_", " ") for v in defended)
    have = {v.arm.replace("_", " ") for v in defended if v.criteria["control"].mark != "missing"}
    without = [arm for arm in arms if arm not in have]
    if not have:
        return Finding(question, "missing", "any damage to the activations may do as well.")
    told = f"{', '.join(arm for arm in arms if arm in have)}: paired with it."
    return Finding(question, "yes", f"{told} None of {', '.join(without)}." if without else told)


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
    without = [
        name
        for name, task in harmful.items()
        if not any(
            v.task == name and set(task.measures.probes) & set(v.metrics) for v in found.variants
        )
    ]
    if without:
        told = f"none on {', '.join(without)}: a change may hide in contexts like the training's."
        return Finding(question, "missing", told)
    worst = [v.label for v in found.verdicts if v.role == "defended" and _hidden(v)]
    told = f"; {_listed(worst)} passes the plain questions and fails there" if worst else ""
    return Finding(question, "yes", f"on every task that is not benign{told}.")


def _hidden(verdict: Verdict) -> bool:
    """Whether the plain questions pass and a probe does not."""
    return verdict.criteria["broad"].mark == "yes" and verdict.criteria["probes"].mark == "no"


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
