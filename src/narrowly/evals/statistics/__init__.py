"""What rows show: means with 95 % intervals over seeds and prompts, differences between arms, and
what an eval of this size could have shown.
"""

from narrowly.evals.statistics.bootstrap import bootstrap
from narrowly.evals.statistics.clusters import interval
from narrowly.evals.statistics.comparing import difference, minimum_detectable
from narrowly.evals.statistics.metric import Interval, Metric
from narrowly.evals.statistics.tasks import Pair, mean_difference, mean_over, ratio

__all__ = [
    "Interval",
    "Metric",
    "Pair",
    "bootstrap",
    "difference",
    "interval",
    "mean_difference",
    "mean_over",
    "minimum_detectable",
    "ratio",
]
