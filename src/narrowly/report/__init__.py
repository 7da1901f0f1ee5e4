"""Runs side by side: a table, plots, one HTML file, and what the comparison lacks as evidence.

Reads finished evals only; neither torch nor a model is loaded.
"""

from narrowly.report.arms import Arm, read_arms
from narrowly.report.choose import choose
from narrowly.report.compare import Comparison, compare, summarise
from narrowly.report.evidence import Finding, evidence

__all__ = [
    "Arm",
    "Comparison",
    "Finding",
    "choose",
    "compare",
    "evidence",
    "read_arms",
    "summarise",
]
