"""The control of concept ablation: a random subspace ablated instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from narrowly.concepts import Concept
from narrowly.concepts.finders.random import Random
from narrowly.defenses.ablate import Ablate
from narrowly.defenses.base import DEFENSES


@DEFENSES.register("random_subspace")
class RandomSubspace(Ablate):
    """Control of `ablate`: a random subspace of the same rank at the same sites, ablated alike.

    `h <- h - strength * (h - c) R R^T`, R orthonormal columns of isotropic directions, as many as
    the concept has at the site (the "random orthogonal vectors" of Casademunt et al. 2025, arXiv
    2507.16795). What it changes too is no effect of the concept. Draws by the `random` finder,
    which can also draw among other concepts (their "random PCs"): find those and `ablate` them.

    Needs: the concepts that `ablate` is given.

    Known failure: isotropic directions carry little of the activations' variance, so this is the
    mildest of controls.

    Attributes:
        concepts: a folder of the concepts to match (or, from Python, the concepts themselves).
        names: which of them; by default those whose verdict is undesired.
        strength: as in `ablate`.
        layers: only these of the concepts' layers.
        any_model: accept concepts that were found on another model of the same width.
        centred: keep the base model's mean in the subspace instead of zero.
        gradient: as in `ablate`.
        seed: of the directions; None: the run's.
    """

    seed: int | None = None

    def _choose(self, model: nn.Module) -> list[Concept]:
        matched = super()._choose(model)
        return Random(concepts=matched, seed=self.drawn_with).find()

    @property
    def drawn_with(self) -> int:
        """The seed of the directions."""
        return self._seed if self.seed is None else self.seed

    def record(self, folder: Path) -> dict[str, Any]:
        """Also the seed that the directions were drawn with."""
        return {**super().record(folder), "seed": self.drawn_with}
