"""The control of preventive steering: random vectors of the same lengths added instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowly.concepts import Concept
from narrowly.defenses.base import DEFENSES
from narrowly.defenses.preventive_steering import PreventiveSteering
from narrowly.interventions import Site


@DEFENSES.register("random_steering")
class RandomSteering(PreventiveSteering):
    """Control of `preventive_steering`: its vectors, rotated at random, added alike.

    `h <- h + strength * R v`, R one random rotation for all sites: every vector keeps its length
    and its angles to the concept's vectors at other layers, and points anywhere. The norm-matched
    random vector of Chen et al. 2025 (arXiv 2507.21509) and Kaczer et al. 2025 (arXiv 2508.06249).

    Needs: the concepts that `preventive_steering` is given.

    Known failure: as strong a push into a direction that the model hardly uses disturbs less than
    one along a direction that it reads.

    Attributes:
        concepts: a folder of the concepts to match (or, from Python, the concepts themselves).
        names: which of them; by default those whose verdict is undesired.
        strength: as in `preventive_steering`.
        layers: only these of the concepts' layers.
        any_model: accept concepts that were found on another model of the same width.
        seed: of the rotation; None: the run's.
    """

    seed: int | None = None

    @property
    def drawn_with(self) -> int:
        """The seed of the rotation."""
        return self._seed if self.seed is None else self.seed

    def vectors(self, concept: Concept) -> dict[Site, Tensor]:
        """Random vectors that have the lengths and mutual angles of v. Raises as v's."""
        vectors = super().vectors(concept)
        generator = torch.Generator().manual_seed(self.drawn_with)
        return dict(zip(vectors, rotated([*vectors.values()], generator), strict=True))

    def record(self, folder: Path) -> dict[str, Any]:
        """Also the seed that the rotation was drawn with."""
        return {**super().record(folder), "seed": self.drawn_with}


def rotated(vectors: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Vectors [d] of equal width under one random rotation; of other widths under one each.

    A rotation acts only on the span, so a random frame of the span's dimension stands for it: with
    V = Q T (Q orthonormal), R V = F T for a uniformly random orthonormal F.
    """
    out = list(vectors)
    for width in {len(vector) for vector in vectors}:
        places = [i for i, vector in enumerate(vectors) if len(vector) == width]
        _, triangle = torch.linalg.qr(torch.stack([vectors[i] for i in places], dim=1).double())
        shape = (width, len(triangle))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        frame, signs = torch.linalg.qr(drawn)
        frame = frame * signs.diagonal().sign()  # without it, LAPACK's signs are not uniform
        for i, vector in zip(places, (frame @ triangle).float().T, strict=True):
            out[i] = vector.contiguous()
    return out
