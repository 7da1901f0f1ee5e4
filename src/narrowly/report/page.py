"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from narrowly.evals import Interval
from narrowly.report import numbers, palette
from narrowly.report.answers import classes, evals_with_answers, examples, scores, shortened
from narrowly.report.arms import Arm
from narrowly.report.evidence import BROAD, LOSS, NARROW, Finding

WORST_FIRST = tuple(palette.ANSWERS)


def page(arms: Sequence[Arm], findings: Sequence[Finding]) -> str:
    """The whole page. All text from runs (names, prompts, answers, recipes) is escaped."""
    measured = {metric for arm in arms for metric in arm.metrics}
    judged = evals_with_answers(arms)
    return _template().render(
        arms=arms,
        findings=findings,
        headline=headline(arms),
        misalignment=measured & {NARROW, BROAD},
        answers=WORST_FIRST if BROAD in measured else (),
        losses=_scale(arms, LOSS) if LOSS in measured else None,
        metrics=_metrics(arms),
        answered=[(name, examples(arms, name), classes(arms, name)) for name in judged],
        nothing_seen=_never(arms),
        BROAD=BROAD,
        NARROW=NARROW,
        LOSS=LOSS,
        version=version("narrowly"),
    )


def headline(arms: Sequence[Arm]) -> str:
    """What the arms show, in a sentence or two; only what was measured."""
    undefended = next((arm for arm in arms if arm.role == "undefended" and arm.get(BROAD)), None)
    if undefended is None:
        return f"{len(arms)} arm{'s' if len(arms) > 1 else ''}, side by side."
    told = (
        f"Fine-tuned without a defense, the model gives misaligned answers to "
        f"{numbers.percent(undefended.metrics[BROAD].mean)} of the questions outside the domain "
        "it was trained on."
    )
    defended = [arm for arm in arms if arm.role == "defended" and arm.get(BROAD)]
    if not defended:
        return told
    best = min(defended, key=lambda arm: arm.metrics[BROAD].mean)
    told += f" With “{best.label}” it is {numbers.percent(best.metrics[BROAD].mean)}"
    if narrow := best.get(NARROW):
        told += f", and {numbers.percent(narrow.mean)} inside that domain"
    return f"{told}."


def _metrics(arms: Sequence[Arm]) -> list[tuple[str, str, str]]:
    """Every metric that some arm has, misalignment first: (key, name for a person, unit)."""
    fullest_first = sorted(arms, key=lambda arm: -len(arm.units))  # a base model has no narrow rate
    units = {key: unit for arm in fullest_first for key, unit in arm.units.items()}
    keys = sorted(units, key=lambda key: not key.startswith("misalignment."))
    names = [key.partition(".")[2].replace("_", " ") for key in keys]
    told = [
        f"{name} ({key.partition('.')[0].replace('_', ' ')})" if names.count(name) > 1 else name
        for key, name in zip(keys, names, strict=True)
    ]
    return [(key, name, units[key]) for key, name in zip(keys, told, strict=True)]


def _scale(arms: Sequence[Arm], metric: str) -> tuple[float, float]:
    """Ends of an axis that holds every interval of the metric with some air."""
    intervals = [interval for arm in arms if (interval := arm.get(metric))]
    low, high = min(i.low for i in intervals), max(i.high for i in intervals)
    air = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air


def _never(arms: Sequence[Arm]) -> list[tuple[Arm, Interval]]:
    """Arms without one broadly misaligned answer, and the rate's interval: a zero is no proof."""
    found = [(arm, arm.get(BROAD)) for arm in arms]
    return [(arm, broad) for arm, broad in found if broad is not None and broad.mean == 0]


def _position(value: float, ends: tuple[float, float] = (0.0, 1.0)) -> str:
    """Where a value lies on an axis, in CSS percent."""
    low, high = ends
    return f"{100 * (value - low) / (high - low):.2f}%"


def ticks(ends: tuple[float, float]) -> list[tuple[float, str]]:
    """Two to six round numbers along an axis, and how they are written."""
    low, high = ends
    magnitude = 10 ** math.floor(math.log10(high - low))
    step = next(s for f in (0.2, 0.5, 1, 2) if (high - low) / (s := f * magnitude) <= 6)
    digits = max(0, -math.floor(math.log10(step)))
    found = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(tick, f"{tick:.{digits}f}") for tick in found]


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).rstrip()


def _cell(interval: Interval | None, unit: str) -> tuple[str, str]:
    return numbers.mean(interval, unit), numbers.span(interval, unit)


@cache
def _template() -> Template:
    return environment().get_template("page.html")


def environment() -> Environment:
    """Where the report's pages and their style lie; what they show is escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(
        position=_position, yaml=_yaml, ticks=ticks, scores=scores, shortened=shortened
    )
    pages.globals.update(
        cell=_cell, percent=numbers.percent, number=numbers.number, palette=palette
    )
    return pages
