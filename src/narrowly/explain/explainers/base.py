"""Explainers: evidence in, an explanation out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from narrowly.explain.record import Example, Explanation
from narrowly.registry import Registry
from narrowly.settings import build, entry


@dataclass(frozen=True)
class Evidence:
    """What an explainer may see of a latent: never what a scorer will use."""

    latent: str
    activating: tuple[Example, ...]
    """From several quantiles, in random order."""
    silent: tuple[Example, ...]
    """Windows where it is not active, hard ones (`Example.kind`) among them."""
    promoted: tuple[str, ...] = ()
    """Tokens its direction promotes through the unembedding."""


@dataclass(frozen=True)
class Mistake:
    """What a reader got wrong with an explanation."""

    example: Example
    said: bool
    """What the reader said; the truth is the other."""


class Explainer(ABC, BaseModel):
    """One per file; its fields are the keys a recipe may set."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: ClassVar[str]

    @abstractmethod
    def explain(self, evidence: Sequence[Evidence]) -> list[Explanation | str]:
        """An explanation of each latent, in order, or the reason why there is none."""

    def refine(
        self,
        evidence: Sequence[Evidence],
        explanations: Sequence[Explanation],
        mistakes: Sequence[Sequence[Mistake]],
    ) -> list[Explanation | str]:
        """A better explanation of each, given what a reader got wrong with the first.

        The mistakes are on examples the explainer may see. The default has nothing to add.
        """
        return list(explanations)


EXPLAINERS: Registry[type[Explainer]] = Registry("explainer", "narrowly.explain.explainers")

ExplainerLike = Any
"""An explainer's name, `{name: {field: value}}`, or an `Explainer`."""


def make_explainer(spec: ExplainerLike) -> Explainer:
    """The explainer that `spec` names, or `spec` itself where it is one.

    Raises:
        NarrowlyError: an unknown explainer or field, or one missing or of the wrong type.
    """
    if isinstance(spec, Explainer):
        return spec
    [(name, arguments)] = entry("explainer", spec).items()
    return build(EXPLAINERS[name], arguments, ("explainer", name))
