"""A sweep's verdicts: which defense does what it should, what it costs, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Group

from narrowly.errors import NarrowlyError
from narrowly.evals import Interval, Metric, interval
from narrowly.files import write_text
from narrowly.report.choose import choose
from narrowly.report.criteria import judge
from narrowly.report.evidence import Finding
from narrowly.report.sweep import SweepRecord, Task
from narrowly.report.tradeoff import tradeoffs
from narrowly.report.variants import Variant, read_variants, undefended_of
from narrowly.report.verdict import Verdict, Verdicts
from narrowly.report.verdict_csv import metrics_csv, verdicts_csv
from narrowly.report.verdict_evidence import verdict_evidence
from narrowly.report.verdict_table import told


class VerdictReport(Verdicts):
    """The verdicts, printed with rich and written as files."""

    @property
    def findings(self) -> list[Finding]:
        """What the verdicts rest on, present or missing."""
        return verdict_evidence(self)

    def __rich__(self) -> Group:
        return Group(*told(self))

    def write(self, folder: str | Path) -> Path:
        """Write the report; returns the HTML's path.

        `report.html`, `verdicts.csv` (arm by criterion), `metrics.csv` (arm by task by metric), and
        `plots/*.png, *.svg`.

        Raises:
            NarrowlyError: matplotlib, which draws the plots' files, is not installed.
        """
        from narrowly.report.verdict_page import verdict_page
        from narrowly.report.verdict_plots import write_verdict_plots

        folder = Path(folder)
        write_verdict_plots(self, folder / "plots")
        write_text(folder / "verdicts.csv", verdicts_csv(self))
        write_text(folder / "metrics.csv", metrics_csv(self))
        write_text(folder / "report.html", verdict_page(self))
        return folder / "report.html"


def verdicts(
    folder: str | Path, out: str | Path | None = None, *, progress: bool = False
) -> VerdictReport:
    """Judge a sweep by what is done of it.

    Args:
        folder: of the sweep, with its `sweep.json`.
        out: folder for the report; nothing is written without it.
        progress: show a bar while runs are read.

    Raises:
        NarrowlyError: no sweep's folder, a damaged `sweep.json`, nothing measured yet, or
            matplotlib is not installed and `out` is given.
    """
    folder = Path(folder)
    record = SweepRecord.read(folder)
    variants, missing = read_variants(record, folder, progress=progress)
    if not variants:
        whys = sorted({cell.why for cell in missing if cell.why})
        raise NarrowlyError(
            f"{folder}: no cell of this sweep is measured yet"
            f"{f' ({whys[0]})' if whys else ''}. Run `narrowly sweep` again; it continues."
        )
    reported = _reported(record, variants)
    own = [
        _verdict(each, variants, record.tasks, reported)
        for each in _contenders(record, folder, variants)
    ]
    traded = [
        each
        for name, task in record.tasks.items()
        if not task.benign
        for each in tradeoffs(name, task, variants)
    ]
    found = VerdictReport(
        folder, record, tuple(own), tuple(variants), reported, tuple(missing), tuple(traded)
    )
    if out is not None:
        found.write(out)
    return found


def _reported(record: SweepRecord, variants: Sequence[Variant]) -> dict[str, Task]:
    """All tasks but the one that settings were chosen on; that too, if no other is of its kind."""
    measured = {variant.task for variant in variants}
    tasks = {name: task for name, task in record.tasks.items() if name in measured}
    chosen = tasks.get(record.choose_on or "")
    if chosen is None:
        return tasks
    others = {name: task for name, task in tasks.items() if name != record.choose_on}
    return others if any(t.benign == chosen.benign for t in others.values()) else tasks


def _contenders(
    record: SweepRecord, folder: Path, variants: Sequence[Variant]
) -> list[list[Variant]]:
    """By arm and setting its variants on all tasks; of an arm with a chosen setting only that."""
    chosen = dict(record.chosen)
    if record.choose_on is not None and not chosen:
        try:
            chosen = choose(record, folder)
        except NarrowlyError:  # nothing undefended there yet: every setting is shown
            chosen = {}
    found: dict[tuple[str, str], list[Variant]] = {}
    for variant in variants:
        if chosen.get(variant.arm, variant.setting) == variant.setting:
            found.setdefault((variant.arm, str(variant.setting)), []).append(variant)
    order = list(dict.fromkeys(cell.arm for cell in record.cells))
    return sorted(found.values(), key=lambda some: order.index(some[0].arm))


def _verdict(
    some: Sequence[Variant],
    everything: Sequence[Variant],
    tasks: Mapping[str, Task],
    reported: Mapping[str, Task],
) -> Verdict:
    first = some[0]
    own = {variant.task: variant for variant in some}
    here = {task: own[task] for task in reported if task in own}
    criteria = judge(here, everything, reported)
    each = {name: judge({name: own[name]}, everything, {name: tasks[name]}) for name in own}
    if first.role == "undefended":
        criteria, *alone = [{"coherent": j["coherent"]} for j in (criteria, *each.values())]
        each = dict(zip(each, alone, strict=True))
    pairs = [
        (variant, base)
        for task, variant in here.items()
        if (base := undefended_of(everything, task)) and first.role != "undefended"
    ]
    return Verdict(
        first.arm,
        first.setting,
        first.label,
        first.role,
        own,
        criteria,
        each,
        _over_undefended([(v.seconds, base.seconds) for v, base in pairs]),
        _over_undefended([(v.memory, base.memory) for v, base in pairs]),
    )


def _over_undefended(
    pairs: Sequence[tuple[dict[int, float], dict[int, float]]],
) -> Interval | None:
    """Mean ratio over tasks and seeds, with Student's interval; None where not recorded."""
    ratios = [
        ours[seed] / theirs[seed] for ours, theirs in pairs for seed in ours if seed in theirs
    ]
    if not ratios:
        return None
    return interval([Metric(np.array([value]), np.ones(1), "ratio") for value in ratios])
