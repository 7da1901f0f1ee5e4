"""A sweep's verdicts as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from jinja2 import Template

from narrowly.evals import Interval, difference, interval, read_recipe
from narrowly.report import numbers
from narrowly.report.charts import Chart
from narrowly.report.criteria import CRITERIA, FOUR, Judged, matched
from narrowly.report.numbers import UNMEASURED
from narrowly.report.page import environment
from narrowly.report.telling import MINUS, added, ends, missing_cells, percent
from narrowly.report.variants import Variant, control_of, undefended_of
from narrowly.report.verdict import Verdict, Verdicts
from narrowly.report.verdict_evidence import verdict_evidence
from narrowly.report.verdict_table import measured_criteria

ROLES = {
    "undefended": "undefended",
    "defended": "a defense",
    "random": "random control",
    "test_time": "at test time only",
    "base": "not trained",
}


def verdict_page(found: Verdicts) -> str:
    """The whole page. All text from runs and from the sweep's file is escaped."""
    return _template().render(
        found=found,
        headline=headline(found),
        criteria=measured_criteria(found),
        findings=verdict_evidence(found),
        charts=[Chart(traded) for traded in found.tradeoffs],
        tasks=[_task(found, name) for name in found.record.tasks if _has(found, name)],
        missing=missing_cells(found.missing),
        recipes=[(verdict, _recipe(found, verdict)) for verdict in found.verdicts],
        CRITERIA=CRITERIA,
        ROLES=ROLES,
        version=version("narrowly"),
    )


def headline(found: Verdicts) -> str:
    """Which arms pass all that was asked, in a sentence or two."""
    asked = [name for name in FOUR if name in measured_criteria(found)]
    defended = [verdict for verdict in found.verdicts if verdict.role == "defended"]
    if not defended or "broad" not in asked:
        return f"{len(found.verdicts)} ways of training, side by side."
    passed = [v for v in defended if all(v.criteria[name].mark == "yes" for name in asked)]
    failed = [v for v in defended if any(v.criteria[name].mark == "no" for name in asked)]
    what = {
        "broad": "leave at most a tenth of the broad change",
        "narrow": "keep the task",
        "benign": "let benign tasks be learned",
        "coherent": "answer coherently",
    }
    wanted = _listed([what[name] for name in asked])
    told = f"Of {len(defended)} defenses, {len(passed) or 'none'} can be said to {wanted}"
    told += f": {_listed([f'“{v.label}”' for v in passed])}." if passed else "."
    unclear = len(defended) - len(passed) - len(failed)
    told += f" {len(failed) or 'None'} fail{'s' if len(failed) == 1 else ''} in some of it"
    return f"{told}, and of {unclear or 'none'} these runs cannot tell."


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " * (len(words) > 1) + words[-1]


def _has(found: Verdicts, task: str) -> bool:
    return any(task in verdict.variants for verdict in found.verdicts)


def _recipe(found: Verdicts, verdict: Verdict) -> dict[str, Any]:
    for cell in found.record.cells:
        if cell.arm == verdict.arm and cell.setting == verdict.setting and cell.status == "done":
            return read_recipe(found.folder / cell.path)
    return {}


def _task(found: Verdicts, name: str) -> dict[str, Any]:
    """The table of one task: every arm by every metric that the sweep names, and differences."""
    task = found.record.tasks[name]
    measures = task.measures
    metrics = [measures.narrow, measures.coherent, measures.loss, *measures.probes]
    variants = [v.variants[name] for v in found.verdicts if name in v.variants]
    metrics = [m for m in dict.fromkeys(metrics) if any(v.seeds(m) for v in variants)]
    base = undefended_of(variants, name)
    heads = [
        _head(measures.broad),
        f"{MINUS} undefended",
        f"{MINUS} control",
        *(_head(m) for m in metrics),
    ]
    rows = []
    for variant in variants:
        own = base if variant is not base else None
        cells = [
            _mean(variant, measures.broad),
            _less(variant, own, measures.broad),
            _less(variant, control_of(variant, found.variants), measures.broad),
        ]
        rows.append((variant.label, [*cells, *(_mean(variant, metric) for metric in metrics)]))
    return {"name": name, "benign": task.benign, "heads": heads, "rows": rows}


def _head(metric: str) -> str:
    return metric.partition(".")[2].replace("_", " ")


def _mean(variant: Variant, metric: str) -> tuple[str, str]:
    seeds = variant.seeds(metric)
    if not seeds:
        return UNMEASURED, ""
    found = interval(list(seeds.values()))
    unit = next(iter(seeds.values())).unit
    return numbers.mean(found, unit), numbers.span(found, unit)


def _less(ours: Variant, theirs: Variant | None, metric: str) -> tuple[str, str]:
    pair = None if theirs is None else matched(ours.seeds(metric), theirs.seeds(metric))
    if pair is None:
        return UNMEASURED, ""
    found = difference(*pair)
    if pair[0][0].unit != "share":
        return numbers.mean(found, pair[0][0].unit), numbers.span(found, pair[0][0].unit)
    return percent(found.mean), ends(found, 1)


def _told_tasks(judged: Judged) -> str:
    """What each task says, for a cell's title."""
    told = [f"{name}: {each.mark}{_figure(each.interval)}" for name, each in judged.tasks.items()]
    return "\n".join([*told, judged.why] if judged.why else told)


def _figure(found: Interval | None) -> str:
    return "" if found is None else f", {percent(found.mean)} ({ends(found)})"


def _asked(verdict: Verdict, found: Verdicts) -> int:
    return sum(task in verdict.variants for task in found.reported)


@cache
def _template() -> Template:
    pages = environment()
    pages.filters.update(
        percent=percent, ends=ends, added=added, told_tasks=_told_tasks, asked=_asked
    )
    return pages.get_template("verdict_page.html")
