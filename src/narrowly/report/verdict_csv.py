"""A sweep's figures as tables for other programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any

from narrowly.evals import Interval, difference, interval
from narrowly.report.criteria import matched
from narrowly.report.variants import Variant, control_of, undefended_of
from narrowly.report.verdict import Verdicts

ENDS = ("mean", "low", "high")


def verdicts_csv(found: Verdicts) -> str:
    """One row for each arm, criterion and task (and for all reported tasks together).

    Figures are those that the criterion asks of: `criteria.CRITERIA`; time and memory are ratios to
    undefended's.
    """
    head = ("arm", "setting", "role", "criterion", "task", "chosen_here", "verdict", *ENDS)
    rows: list[Sequence[Any]] = []
    for verdict in found.verdicts:
        about = (verdict.arm, _setting(verdict.setting), verdict.role)
        for name, judged in verdict.criteria.items():
            flattered = found.chosen_on in found.reported
            rows.append((*about, name, "", flattered, judged.mark, *_ends(judged.interval)))
        for task, criteria in verdict.each.items():
            for name, judged in criteria.items():
                chosen = task == found.chosen_on
                rows.append((*about, name, task, chosen, judged.mark, *_ends(judged.interval)))
        for name, cost in (("time", verdict.time), ("memory", verdict.memory)):
            rows.append((*about, name, "", False, "", *_ends(cost)))
    return _csv(head, rows)


def metrics_csv(found: Verdicts) -> str:
    """One row for each task, arm, setting and metric that was measured.

    Beside the mean, the paired differences from undefended and from the random control.
    """
    head = (
        *("task", "arm", "setting", "role", "chosen_here", "metric", "unit"),
        *(*ENDS, "answers", "prompts", "seeds"),
        *(f"minus_undefended_{end}" for end in ENDS),
        *("control", *(f"minus_control_{end}" for end in ENDS)),
    )
    rows = []
    for variant in found.variants:
        base = undefended_of(found.variants, variant.task)
        control = control_of(variant, found.variants)
        for metric, seeds in variant.metrics.items():
            mean = interval(list(seeds.values()))
            unit = next(iter(seeds.values())).unit
            rows.append(
                (
                    *(variant.task, variant.arm, _setting(variant.setting), variant.role),
                    *(variant.task == found.chosen_on, metric, unit),
                    *(*_ends(mean), mean.n, mean.prompts, mean.seeds),
                    *_ends(None if base is variant else _less(variant, base, metric)),
                    *(
                        "" if control is None else control.arm,
                        *_ends(_less(variant, control, metric)),
                    ),
                )
            )
    return _csv(head, rows)


def _less(ours: Variant, theirs: Variant | None, metric: str) -> Interval | None:
    pair = None if theirs is None else matched(ours.seeds(metric), theirs.seeds(metric))
    return difference(*pair) if pair else None


def _ends(found: Interval | None) -> tuple[str, ...]:
    if found is None:
        return ("", "", "")
    return tuple(f"{value:.6g}" for value in (found.mean, found.low, found.high))


def _setting(setting: dict[str, Any]) -> str:
    return json.dumps(setting) if setting else ""


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
