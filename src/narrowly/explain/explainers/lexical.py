"""An explainer without a model: the words and phrases that tell activating windows apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrowly.explain.explainers.base import EXPLAINERS, Evidence, Explainer
from narrowly.explain.record import Explanation


@EXPLAINERS.register("lexical")
class Lexical(Explainer):
    """stub"""

    name = "lexical"

    def explain(self, evidence: Sequence[Evidence]) -> list[Explanation | str]:
        """stub"""
        raise NotImplementedError
