"""One model on a terminal: what its evals found, what they would ask, and what it answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from narrowly.errors import NarrowlyError
from narrowly.evals import EVALS, Plan, Row, Summary, parse
from narrowly.evals.base import make
from narrowly.evals.prompts import PLAIN, Prompt
from narrowly.evals.statistics import minimum_detectable
from narrowly.report import numbers
from narrowly.report.answers import scores, visible

LETTERS_PER_TOKEN = 4
"""Of English; a rough figure, for a cost that is told before any tokenizer is loaded."""


def summary_table(name: str, summary: Summary) -> Group:
    """Metrics with intervals, what differences such an eval can show, and answers by class."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column(name)
    for head in ("mean", "95 % interval", "of", "shows from"):
        table.add_column(head, justify="right")
    for metric, interval in summary.items():
        unit = summary.units[metric]
        table.add_row(
            metric,
            numbers.mean(interval, unit),
            Text(numbers.span(interval, unit), "dim"),
            Text(str(interval.n), "dim"),
            Text(numbers.number(minimum_detectable(interval, interval), unit), "dim"),
        )
    told: list[RenderableType] = [table]
    if summary.labels:
        counts = ", ".join(f"{label} {count}" for label, count in summary.labels.items())
        told.append(Text(f"answers: {counts}"))
    return Group(*told, "")


SHOWS = (
    "Shares in percent. “Shows from”: the smallest true difference from another model, asked as "
    "much, that such an eval shows in 8 of 10 repetitions; a smaller one needs more answers."
)


def evals_table(recipe: Mapping[str, Any]) -> Table:
    """Every known eval: what it measures, and its cost on a run of this recipe.

    An eval that the recipe lists has the arguments that stand there, any other has its defaults.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("eval", no_wrap=True)
    table.add_column("measures", ratio=1)
    table.add_column("samples", justify="right", no_wrap=True)
    table.add_column("judge calls", justify="right", no_wrap=True)
    listed = parse(recipe.get("evals") or [])
    for name in EVALS.names():
        try:
            cost = (listed.get(name) or make(name, {})).bind(recipe).cost()
            counts = [f"{cost.samples}", f"{cost.judge_calls or numbers.UNMEASURED}"]
        except (NarrowlyError, NotImplementedError):  # it needs data or a model of its own
            counts = [numbers.UNMEASURED] * 2
        table.add_row(name, (EVALS[name].__doc__ or "").strip().split("\n")[0], *counts)
    return table


def cost_table(plans: Sequence[Plan]) -> Table:
    """What each eval of each model asks for, and all of them together.

    Tokens are those of the prompts, roughly, and the most that answers can have.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    several = len({plan.model for plan in plans}) > 1
    for head in ("eval", "model")[: 1 + several]:
        table.add_column(head, overflow="fold")
    for head in ("prompts", "samples", "judge calls", "tokens read", "written at most"):
        table.add_column(head, justify="right")
    totals = [0] * 5
    for plan in plans:
        names = (plan.name, plan.model)[: 1 + several]
        if plan.finished:
            table.add_row(*names, Text("measured already", "dim"))
            continue
        counts = _counts(plan)
        totals = [total + (count or 0) for total, count in zip(totals, counts, strict=True)]
        cells = [numbers.UNMEASURED if count is None else f"{count:,}" for count in counts]
        table.add_row(*names, *cells)
    if len(plans) > 1:
        table.add_section()
        table.add_row("together", *[""] * several, *(f"{total:,}" for total in totals))
    return table


def _counts(plan: Plan) -> list[int | None]:
    asked = prompts_of(plan)
    cost = plan.cost
    samples = None if cost is None else cost.samples
    calls = None if cost is None else cost.judge_calls
    if not asked:
        return [None, samples, calls, None, None]
    each = (samples or len(asked)) / len(asked)
    letters = sum(len(message["content"]) for prompt in asked for message in prompt.messages)
    longest = getattr(plan.eval_, "max_new_tokens", 1)
    return [
        len(asked),
        samples,
        calls,
        round(letters / LETTERS_PER_TOKEN * each),
        None if samples is None else samples * longest,
    ]


def prompts_of(plan: Plan) -> list[Prompt]:
    """What the eval asks, in every context; none where it reads given texts."""
    ask = getattr(plan.eval_, "asked", None) or getattr(plan.eval_, "prompts", None)
    return [] if ask is None else list(ask())


def shown_prompts(plan: Plan) -> Iterator[Text]:
    """Every prompt as it will be asked, under the context that it is asked in."""
    asked = prompts_of(plan)
    yield Text.assemble((plan.name, "bold"), (f" of {plan.model}", "dim"))
    if not asked:
        yield Text("  reads given texts, and asks nothing\n")
        return
    for context, prompts in groupby(asked, lambda p: p.tags.get("context", PLAIN)):
        some = list(prompts)
        yield Text(f"\n{context}: {len(some)} prompts", "bold dim")
        for prompt in some:
            yield Text(visible(_told(prompt)))
    yield Text()


def _told(prompt: Prompt) -> str:
    own = "(its own answer)"
    turns = [f"{m['role']}: {m['content'] or own}" for m in prompt.messages]
    text = prompt.question if len(turns) == 1 else "\n".join(turns)
    return f"- {indent(text, '  ', lambda line: True)[2:]}"


def shown_answers(
    found: Iterable[tuple[str, Path, Row]], *, several: bool = False
) -> Iterator[Text]:
    """Answers with what was asked, their class, scores and tags.

    Args:
        found: as `answers.find_answers` gives them.
        several: name the run, too.
    """
    for eval_, run, row in found:
        tags = " ".join(
            f"{tag}={value}"
            for tag, value in row["tags"].items()
            if (tag, value) != ("context", PLAIN) and value not in row["prompt"]
        )
        parts = [eval_, run.name if several else "", row["label"] or "", scores(row), tags]
        head = " · ".join(visible(part) for part in (*parts, f"#{row['sample']}") if part)
        yield Text(head, "bold")
        yield Text(indent(visible(row["prompt"]), "> ", lambda line: True), "dim")
        yield Text(f"{visible(row['answer'])}\n")
