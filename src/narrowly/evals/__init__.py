"""What a model does: prompts -> samples -> scores -> rows; and the statistics of rows.

Importing this loads no torch: a report reads finished evals without a model.
"""

from narrowly.evals.base import EVALS, Eval, Row, mean_by_prompt, parse
from narrowly.evals.evaluate import Plan, Summary, evaluate, measured_evals, plan, summarise
from narrowly.evals.samples import Samples, read_samples
from narrowly.evals.statistics import (
    Interval,
    Metric,
    Pair,
    bootstrap,
    difference,
    interval,
    mean_difference,
    mean_over,
    minimum_detectable,
    ratio,
)
from narrowly.evals.targets import read_recipe, seed_folders

__all__ = [
    "EVALS",
    "Eval",
    "Interval",
    "Metric",
    "Pair",
    "Plan",
    "Row",
    "Samples",
    "Summary",
    "bootstrap",
    "difference",
    "evaluate",
    "interval",
    "mean_by_prompt",
    "mean_difference",
    "mean_over",
    "measured_evals",
    "minimum_detectable",
    "parse",
    "plan",
    "ratio",
    "read_recipe",
    "read_samples",
    "seed_folders",
    "summarise",
]
