"""One file per explainer."""

from narrowly.explain.explainers.base import (
    EXPLAINERS,
    Evidence,
    Explainer,
    Mistake,
    make_explainer,
)

__all__ = ["EXPLAINERS", "Evidence", "Explainer", "Mistake", "make_explainer"]
