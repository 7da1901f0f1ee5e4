"""What defenses share that act on concepts: which concepts, at which layers, how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from torch import nn

from narrowly.concepts import Concept, load_concepts, save_concepts
from narrowly.defenses.base import DEFENSES, Defense
from narrowly.errors import NarrowlyError
from narrowly.interventions import Intervention, Site, layer
from narrowly.registry import unknown

Knots = list[tuple[float, float]]
"""[[progress, strength], ...], progress from 0 to 1; between them the strength is interpolated
linearly, before the first and after the last it is held."""

Strength = float | Knots | dict[int, float | Knots]
"""A number, or knots; or either of them for each layer."""


class OfConcepts(Defense):
    """A defense that acts on concepts. Its fields are explained where they are used."""

    verdict: ClassVar[str] = "undesired"
    """Of the concepts that it takes unless `names` says otherwise."""

    concepts: str | list[Concept]
    names: list[str] | None = Field(default=None, min_length=1)
    layers: list[int] | None = Field(default=None, min_length=1)
    any_model: bool = False

    _used: list[Concept] = PrivateAttr(default_factory=list)
    _seed: int = PrivateAttr(default=0)

    @property
    def name(self) -> str:
        """As a recipe writes it."""
        return DEFENSES.name_of(type(self))

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Load the concepts, and check that they fit the model.

        Raises:
            NarrowlyError: none has the verdict, a name or layer is unknown, or the concepts were
                found on another model.
        """
        self._seed, self._used = seed, []
        self.used(model)

    def used(self, model: nn.Module) -> list[Concept]:
        """The concepts, with what they hold at the chosen layers. Raises as `bind`."""
        if not self._used:
            self._used = self._choose(model)
        return self._at_layers()

    def _at_layers(self) -> list[Concept]:
        wanted = self._layers()
        if wanted is None:
            return self._used
        sites = [str(layer(i)) for i in wanted]
        known = {site for concept in self._used for site in concept.subspaces}
        absent = [str(i) for i, site in zip(wanted, sites, strict=True) if site not in known]
        if absent:
            raise NarrowlyError(
                f"{self.name}: the concepts have no subspace at layer {', '.join(absent)}. "
                f"They have: {', '.join(sorted(known))}."
            )
        parts = [
            (
                concept,
                {site: concept.subspaces[site] for site in sites if site in concept.subspaces},
            )
            for concept in self._used
        ]
        return [concept.model_copy(update={"subspaces": part}) for concept, part in parts if part]

    def _layers(self) -> list[int] | None:
        return self.layers

    def _choose(self, model: nn.Module) -> list[Concept]:
        """Concepts by name, or by verdict."""
        if isinstance(self.concepts, str):
            concepts = load_concepts(self.concepts, model, self.any_model)
        else:
            concepts = self.concepts
        by_name = {concept.name: concept for concept in concepts}
        if self.names is not None:
            for name in self.names:
                if name not in by_name:
                    raise unknown("concept", name, sorted(by_name))
            return [by_name[name] for name in self.names]
        chosen = [concept for concept in concepts if concept.verdict.value == self.verdict]
        if not chosen:
            verdicts = ", ".join(f"{c.name}: {c.verdict.value}" for c in concepts) or "no concept"
            verb = "keep" if self.verdict == "keep" else "drop"
            raise NarrowlyError(
                f"{self.name}: no concept has the verdict {self.verdict} ({verdicts}). Give a "
                f"verdict with `narrowly concepts {verb}`, or choose concepts with `names`."
            )
        return chosen

    def record(self, folder: Path) -> dict[str, Any]:
        """Names and verdicts of the concepts, and a copy of them in `folder/concepts`.

        Raises:
            NarrowlyError: another defense of the same run used another concept of the same name.
        """
        for concept in self._used:
            path = folder / "concepts" / f"{concept.name}.json"
            if not path.exists():
                save_concepts([concept], path.parent)
            elif not _same(concept, load_concepts(path)[0]):
                raise NarrowlyError(f"{path}: another concept of this name is already there.")
        return {"concepts": {c.name: c.verdict.value for c in self._used}}


class Graded(OfConcepts):
    """A defense that acts on concepts with a strength."""

    strength: Strength = 1.0

    @field_validator("strength", mode="wrap")
    @classmethod
    def _is_strength(
        cls, given: Any, parse: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Strength:
        try:
            strength: Strength = parse(given)
        except ValidationError:
            raise ValueError(
                "give a finite number, knots [[progress, strength], ...], or either of them for "
                f"each layer {{layer: strength}}, not {given!r}"
            ) from None
        if isinstance(strength, dict) and info.data.get("layers") is not None:
            raise ValueError("a strength by layer names the layers already: leave out `layers`")
        if strength == {}:
            raise ValueError("a strength by layer names at least one layer")
        for knots in strength.values() if isinstance(strength, dict) else [strength]:
            if isinstance(knots, list) and (
                len(knots) < 2
                or any(before[0] >= after[0] for before, after in pairwise(knots))
                or not all(0 <= progress <= 1 for progress, _ in knots)
            ):
                raise ValueError(
                    "knots are at least two [progress, strength], progress rising in 0..1"
                )
        return strength

    def _layers(self) -> list[int] | None:
        return list(self.strength) if isinstance(self.strength, dict) else self.layers

    def dosed(self, interventions: Sequence[Intervention]) -> list[Intervention]:
        """Interventions with the strength that they begin with."""
        strengths = self.strengths(0.0)
        for each in interventions:
            given = strengths[each.site] if isinstance(strengths, Mapping) else strengths
            each.strength.fill_(given)
        return list(interventions)

    def strength_at(self, progress: float) -> float | Mapping[Site, float] | None:
        """The interpolated strength where knots were given."""
        doses = self.strength.values() if isinstance(self.strength, dict) else [self.strength]
        return self.strengths(progress) if any(isinstance(dose, list) for dose in doses) else None

    def strengths(self, progress: float) -> float | Mapping[Site, float]:
        """The strength, or that of each site."""
        if isinstance(self.strength, dict):
            return {layer(i): _at(dose, progress) for i, dose in self.strength.items()}
        return _at(self.strength, progress)


def _at(dose: float | Knots, progress: float) -> float:
    if not isinstance(dose, list):
        return dose
    places, strengths = zip(*dose, strict=True)
    return float(np.interp(progress, places, strengths))


def _same(one: Concept, other: Concept) -> bool:
    return one.subspaces.keys() == other.subspaces.keys() and all(
        torch.equal(subspace.basis, other.subspaces[site].basis)
        and torch.equal(subspace.centre, other.subspaces[site].centre)
        for site, subspace in one.subspaces.items()
    )
