"""Scorers: how far can an explanation be believed?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from narrowly.explain.latents import Latent
from narrowly.explain.readers import Reader
from narrowly.explain.record import Example, Explanation, ScoreResult
from narrowly.registry import Registry
from narrowly.settings import build, entry


@dataclass(frozen=True)
class Item:
    """An explanation to score, with examples that no explainer saw."""

    latent: Latent
    explanation: Explanation
    activating: tuple[Example, ...]
    silent: tuple[Example, ...]


class Scorer(ABC, BaseModel):
    """One per file; its fields are the keys a recipe may set."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: ClassVar[str]
    explained: ClassVar[bool] = True
    """Whether the explanation matters; where not, control explanations say nothing."""

    seed: int = 0

    @abstractmethod
    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """A result per item, in order. All items are asked together, so that requests overlap."""


SCORERS: Registry[type[Scorer]] = Registry("scorer", "narrowly.explain.scorers")

ScorerLike = Any
"""A scorer's name, `{name: {field: value}}`, or a `Scorer`."""


def make_scorer(spec: ScorerLike, **defaults: Any) -> Scorer:
    """The scorer that `spec` names, or `spec` itself where it is one.

    Args:
        defaults: for fields that the scorer has and `spec` leaves out, such as `model`, `embedder`.

    Raises:
        NarrowlyError: an unknown scorer or field, or one missing or of the wrong type.
    """
    if isinstance(spec, Scorer):
        return spec
    [(name, arguments)] = entry("scorer", spec).items()
    kind = SCORERS[name]
    known = {key: value for key, value in defaults.items() if key in kind.model_fields}
    return build(kind, known | arguments, ("scorer", name))
