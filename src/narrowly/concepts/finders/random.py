"""Random subspaces: the control that every claim about a concept needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from narrowly.concepts.concept import Concept, Provenance, Subspace
from narrowly.concepts.finder import FINDERS, Finder
from narrowly.concepts.folder import load_concepts
from narrowly.errors import NarrowlyError


@FINDERS.register("random")
class Random(Finder):
    """For each given concept, a subspace of the same rank at the same sites, its directions random.

    Isotropic directions, made orthonormal, so they are matched in norm and rank; the centre is the
    concept's. A centred ablation of the control then leaves the same mean.
    """

    name = "random"

    concepts: str | Path | Sequence[Concept]
    """The concepts to match, or their folder."""
    seed: int = 0

    def find(self) -> list[Concept]:
        """One control per concept, named `random<seed>-<name>`."""
        given = self.concepts
        concepts = load_concepts(given) if isinstance(given, str | Path) else given
        if not concepts:
            raise NarrowlyError("finder random: there are no concepts to match.")
        generator = torch.Generator().manual_seed(self.seed)
        return [self._control(concept, generator) for concept in concepts]

    def _control(self, concept: Concept, generator: torch.Generator) -> Concept:
        return Concept(
            name=f"random{self.seed}-{concept.name}",
            subspaces={
                site: Subspace.spanned_by(
                    torch.randn(subspace.basis.shape, generator=generator), subspace.centre
                )
                for site, subspace in concept.subspaces.items()
            },
            provenance=Provenance(
                model=concept.provenance.model,
                model_fingerprint=concept.provenance.model_fingerprint,
                finder=self.name,
                arguments=self.arguments(),
            ),
            explanation=f"random control of {concept.name}",
        )
