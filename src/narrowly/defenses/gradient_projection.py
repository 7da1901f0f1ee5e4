"""Gradient projection: the backward half of concept ablation alone."""

from __future__ import annotations

from torch import nn

from narrowly.defenses.ablate import one_per_site
from narrowly.defenses.base import DEFENSES
from narrowly.defenses.chosen import Graded
from narrowly.interventions import Intervention


@DEFENSES.register("gradient_projection")
class GradientProjection(Graded):
    """Train on gradients from which the undesired concepts are projected out.

    `dL/dh <- dL/dh - strength * (dL/dh) Q Q^T` at every token, Q the orthonormal columns of all
    concepts at a site together; the activations stay as they are. The second half into which the
    authors of Casademunt et al. 2025 (arXiv 2507.16795) take concept ablation apart: on one of
    their two models it recovers most of the effect, on the other the first half does (`ablate`
    with `gradient: forward`).

    Needs: concepts, with a verdict.

    Known failure: only what passes through the site loses its gradient along Q; weights after it
    still learn to read and to write the concept.

    Attributes:
        concepts: a folder of concepts (or, from Python, the concepts themselves).
        names: which of them; by default those whose verdict is undesired.
        strength: 1 (as published) removes the gradient along the concepts, 0 leaves it; knots and
            layers as in `ablate`.
        layers: only these of the concepts' layers.
        any_model: accept concepts that were found on another model of the same width.
    """

    def interventions(self, model: nn.Module) -> list[Intervention]:
        """One projection of the gradient per site. Raises as `Ablate.interventions`."""
        projections = one_per_site(self.used(model), centred=False)
        for projection in projections:
            projection.gradient = "backward"
        return self.dosed(projections)
