"""Runs side by side: a table, plots, one HTML file, and what the comparison lacks as evidence.

`compare` holds runs of one fine-tune against each other, `verdicts` judges the defenses of a sweep.

Reads finished evals only; neither torch nor a model is loaded.
"""

from narrowly.report.arms import Arm, read_arms
from narrowly.report.choose import choose
from narrowly.report.compare import Comparison, compare, summarise
from narrowly.report.evidence import Finding, evidence
from narrowly.report.verdict import Verdicts
from narrowly.report.verdicts import verdicts

__all__ = [
    "Arm",
    "Comparison",
    "Finding",
    "Verdicts",
    "choose",
    "compare",
    "evidence",
    "read_arms",
    "summarise",
    "verdicts",
]
