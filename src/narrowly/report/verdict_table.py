"""A sweep's verdicts on a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from narrowly.report.criteria import CRITERIA, Judged
from narrowly.report.numbers import UNMEASURED, number
from narrowly.report.table import evidence_list
from narrowly.report.telling import added, ends, missing_cells, percent
from narrowly.report.verdict_evidence import verdict_evidence

if TYPE_CHECKING:
    from narrowly.report.tradeoff import Tradeoff
    from narrowly.report.verdict import Verdict, Verdicts

MARKS = {
    "yes": ("✓", "green"),
    "no": ("✕", "red"),
    "unclear": ("?", "yellow"),
    "missing": (UNMEASURED, "dim"),
}
TASKS_PER_TABLE = 4
HOW_TO_READ = (
    "Percent (over control: points), and below it the 95 % interval over seeds and prompts: ✓ it "
    "lies within the limit, ✕ beyond, ? across; ✕ also where one task alone says no. Time and "
    "memory: added to undefended, percent."
)


def told(found: Verdicts) -> Iterator[RenderableType]:
    """The verdicts, each task, matched learning, and what is missing, one below the other."""
    yield Text.assemble(("Verdicts", "bold"), f" over {', '.join(found.reported)}")
    yield _verdicts(found)
    yield ""
    rules = [f"{CRITERIA[name].name}: {CRITERIA[name].rule}" for name in measured_criteria(found)]
    yield _note("\n".join(rules))
    yield _note(HOW_TO_READ)
    if found.chosen_on:
        yield _note(_chosen(found))
    if len(found.record.tasks) > 1:
        yield Text.assemble("\n", ("Each task", "bold"), ": broad left, task kept")
        names = list(dict.fromkeys(task for verdict in found.verdicts for task in verdict.variants))
        for start in range(0, len(names), TASKS_PER_TABLE):
            yield _tasks(found, names[start : start + TASKS_PER_TABLE])
    for traded in found.tradeoffs:
        if traded.swept and traded.matched:
            yield _matched(traded, found)
    yield Text("\nEvidence", "bold")
    yield evidence_list(verdict_evidence(found))
    yield from _missing(found)


def _chosen(found: Verdicts) -> str:
    on = found.chosen_on
    if on in found.reported:
        return f"* Settings were chosen on {on}, and so flatter every figure here."
    return f"* Settings were chosen on {on}, which is not in these figures; its own are flattered."


def measured_criteria(found: Verdicts) -> list[str]:
    """Criteria that some arm has a figure for."""
    return [
        name
        for name in CRITERIA
        if any(
            name in verdict.criteria and verdict.criteria[name].mark != "missing"
            for verdict in found.verdicts
        )
    ]


def _verdicts(found: Verdicts) -> Table:
    drawn = _table()
    drawn.add_column("defense", max_width=24)
    shown = measured_criteria(found)
    for name in shown:
        drawn.add_column(CRITERIA[name].name.replace(" ", "\n"), justify="right", vertical="top")
    drawn.add_column("\ntime", justify="right")
    drawn.add_column("\nmemory", justify="right")
    for verdict in found.verdicts:
        cells: list[RenderableType] = [_name(verdict, found)]
        cells += [_cell(verdict.criteria.get(name)) for name in shown]
        for cost in (verdict.time, verdict.memory):
            mean, span = added(cost)
            cells.append(Group(Text(mean, justify="right"), Text(span, "dim", justify="right")))
        drawn.add_row(*cells)
    return drawn


def _name(verdict: Verdict, found: Verdicts) -> Text:
    name = Text(verdict.label, overflow="fold")
    if verdict.role in ("random", "test_time"):
        name.append("\nrandom control" if verdict.role == "random" else "\nat test time", "dim")
    asked = [task for task in found.reported if task in verdict.variants]
    if len(asked) < len(found.reported):
        name.append(f"\n{len(asked)} of {len(found.reported)} tasks", "yellow")
    return name


def _cell(judged: Judged | None) -> RenderableType:
    if judged is None or judged.interval is None:
        return _marked(judged, "")
    unit = 1 if abs(judged.interval.mean) < 0.995 else 0
    return Group(
        _marked(judged, percent(judged.interval.mean, unit)),
        Text(ends(judged.interval), "dim", justify="right"),
    )


def _marked(judged: Judged | None, text: str) -> Text:
    mark, style = MARKS["missing" if judged is None else judged.mark]
    return Text.assemble((mark, style), f" {text}" if text else "", justify="right")


def _tasks(found: Verdicts, names: list[str]) -> Table:
    drawn = _table()
    drawn.add_column("defense", max_width=24)
    for name in names:
        star = " *" if name == found.chosen_on else ""
        kind = "\nbenign" if found.record.tasks[name].benign else "\n"
        drawn.add_column(f"{name}{star}{kind}", justify="right", no_wrap=True)
    for verdict in found.verdicts:
        if verdict.role == "undefended":
            cells = [_rates(verdict, name, found) for name in names]
            drawn.add_row(Text(f"{verdict.label}, % of answers", "dim", overflow="fold"), *cells)
        else:
            cells = [_task_cell(verdict, name, found) for name in names]
            drawn.add_row(Text(verdict.label, overflow="fold"), *cells)
    return drawn


def _rates(verdict: Verdict, name: str, found: Verdicts) -> Text:
    """What the shares of the other rows are shares of."""
    task, variant = found.record.tasks[name], verdict.variants.get(name)
    metrics = [*([] if task.benign else [task.measures.broad]), task.measures.narrow]
    means = [None if variant is None else variant.mean(metric) for metric in metrics]
    cells = [UNMEASURED if mean is None else percent(mean, 0) for mean in means]
    return Text("".join(f"{cell:>4} " for cell in cells), "dim", justify="right")


def _task_cell(verdict: Verdict, task: str, found: Verdicts) -> Text:
    keys = ("benign",) if found.record.tasks[task].benign else ("broad", "narrow")
    parts = []
    for key in keys:
        judged = verdict.each.get(task, {}).get(key)
        shown = (
            UNMEASURED
            if judged is None or not judged.interval
            else percent(judged.interval.mean, 0)
        )
        mark = MARKS["missing" if judged is None else judged.mark]
        parts += [(f"{shown:>4}", ""), mark if shown != UNMEASURED else ("  ", "")]
    return Text.assemble(*parts)


def _matched(traded: Tradeoff, found: Verdicts) -> Group:
    star = " *" if traded.task == found.chosen_on else ""
    assert traded.level is not None
    level = number(traded.level, traded.unit)
    what = traded.learned.partition(".")[2].replace("_", " ")
    drawn = _table()
    for head, justify in (
        ("defense", "left"),
        ("broad", "right"),
        ("less than undefended", "right"),
    ):
        drawn.add_column(head, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    drawn.add_column("where")
    for each in traded.matched:
        if each.broad is None or each.less is None:
            drawn.add_row(each.curve.label, UNMEASURED, "", Text(each.how, "dim"))
            continue
        drawn.add_row(
            each.curve.label,
            f"{percent(each.broad.mean)} ({ends(each.broad)})",
            f"{percent(each.less.mean)} ({ends(each.less)})",
            Text(each.how, "dim"),
        )
    title = Text.assemble(
        "\n",
        (f"Matched learning on {traded.task}{star}", "bold"),
        f": broad change where {what} is {level}",
    )
    note = _note(
        "Percent and points. Between two strengths along a straight line; the least broad place "
        "that has learned as much."
    )
    return Group(title, drawn, note)


def _missing(found: Verdicts) -> Iterator[RenderableType]:
    if not found.missing:
        return
    count, all_ = len(found.missing), len(found.record.cells)
    yield Text(f"\nMissing: {count} of {all_} cells", "bold yellow")
    for name, which, why in missing_cells(found.missing):
        yield Padding(Text.assemble(f"{name}, {which}: ", (why, "dim")), (0, 0, 0, 2))


def _note(text: str) -> Padding:
    return Padding(Text(text, "dim"), (0, 0, 0, 2))


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
