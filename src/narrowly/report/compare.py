"""Compare runs: read their arms, say what they show and lack, write the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from narrowly.errors import NarrowlyError
from narrowly.files import write_json, write_text
from narrowly.report.arms import Arm, read_arms
from narrowly.report.evidence import Finding, evidence
from narrowly.report.page import page
from narrowly.report.plots import write_plots
from narrowly.report.sweep import RECORD
from narrowly.report.table import evidence_list, table

# Names in `summary.json`, of what a reader asks first.
SUMMARY = {
    "narrow": "misalignment.narrow_misaligned",
    "broad": "misalignment.broad_misaligned",
    "aligned": "misalignment.broad_aligned",
    "leaked": "misalignment.broad_leaked",
    "incoherent": "misalignment.broad_incoherent",
    "coherent": "misalignment.coherent",
    "in_distribution_loss": "in_distribution.loss",
}


@dataclass(frozen=True)
class Comparison:
    """Arms side by side; prints itself with rich.

    Attributes:
        arms: in the order given.
        findings: what a claim needs as evidence, present or missing.
    """

    arms: tuple[Arm, ...]
    findings: tuple[Finding, ...]

    def __rich__(self) -> Group:
        return Group(
            table(self.arms),
            "\n[dim]Shares in percent; 95 % intervals over seeds and prompts.[/dim]\n",
            "[bold]Evidence[/bold]",
            evidence_list(self.findings),
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """See `summarise`."""
        return summarise(self.arms)

    def write(self, folder: str | Path) -> Path:
        """Write `report.html`, `summary.json` and `plots/*.png, *.svg`; returns the HTML's path.

        Raises:
            NarrowlyError: matplotlib, which draws the plots' files, is not installed.
        """
        folder = Path(folder)
        write_plots(self.arms, folder / "plots")
        write_json(folder / "summary.json", self.summary())
        write_text(folder / "report.html", page(self.arms, self.findings))
        return folder / "report.html"


def compare(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | Path | None = None,
) -> Comparison:
    """Compare finished runs.

    Args:
        runs: folders, each a run or an arm of runs `seed-N`; every number is aggregated over seeds
            from the single answers, not from means of means.
        out: folder for the report; nothing is written without it.

    Raises:
        NarrowlyError: a folder that does not exist, holds no finished eval or is a sweep's
            (`verdicts` reads that), or matplotlib is not installed and `out` is given.
    """
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | os.PathLike) else runs)]
    for folder in folders:
        if (folder / RECORD).exists():
            raise NarrowlyError(
                f"{folder}: a sweep, which is judged by itself: narrowly compare {folder}, or "
                "narrowly.report.verdicts in Python. Its tasks' arms, each a folder in it, can be "
                "compared as runs."
            )
    arms = read_arms(folders)
    comparison = Comparison(tuple(arms), tuple(evidence(arms)))
    if out is not None:
        comparison.write(out)
    return comparison


def summarise(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Per arm, by name, its main metrics: `{mean, low, high, n, prompts, seeds}`, or None.

    The metrics are `narrow` and `broad` (misaligned answers inside and outside the fine-tuned
    domain), `aligned`, `leaked`, `incoherent` (outside it), `coherent` (everywhere),
    `in_distribution_loss` (nats per token) and `wall_seconds` (of training; its n counts seeds).
    """
    summary = {}
    for arm in arms:
        intervals = {name: arm.get(metric) for name, metric in SUMMARY.items()}
        intervals["wall_seconds"] = arm.wall_seconds
        summary[arm.name] = {
            name: None if interval is None else interval.as_dict()
            for name, interval in intervals.items()
        }
    return summary
