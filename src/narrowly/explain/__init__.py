"""What a concept means, and how sure that is: contexts, explainers, scorers."""

from narrowly.explain.contexts.examples import Sampling
from narrowly.explain.pipeline import explain
from narrowly.explain.recipe import ExplainRecipe
from narrowly.explain.record import (
    Example,
    Explained,
    ExplainedLatent,
    Explanation,
    load_explained,
)
from narrowly.explain.summary import Summary

__all__ = [
    "Example",
    "ExplainRecipe",
    "Explained",
    "ExplainedLatent",
    "Explanation",
    "Sampling",
    "Summary",
    "explain",
    "load_explained",
]
