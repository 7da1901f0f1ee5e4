"""Ablation at test time only: the control that tells what ablating in training adds."""

from __future__ import annotations

from typing import Any

from torch import nn

from narrowly.defenses.ablate import one_per_site
from narrowly.defenses.base import DEFENSES
from narrowly.defenses.chosen import OfConcepts
from narrowly.interventions import Intervention, attach


@DEFENSES.register("test_time_ablation")
class AblationAtTestTime(OfConcepts):
    """Train undefended, and project concepts out whenever the trained model answers.

    `h <- h - strength * (h - c) Q Q^T` at every token that the model reads or writes after its
    training, Q the orthonormal columns of all concepts at a site together, c = 0 or the base
    model's mean. The control of Casademunt et al. 2025 (arXiv 2507.16795). The projections lie in
    the run's folder (`at_test_time/`) and are attached whenever the run is measured or talked to.

    Needs: concepts, with a verdict; and that whoever deploys the model attaches the projections.

    Known failure: the weights have changed as if undefended, and without the projections the model
    is. On multiple choice 0.38 of intended answers on average (undefended 0.19, principal
    components ablated in training 0.36, latents of an autoencoder 0.64).

    Attributes:
        concepts: a folder of concepts (or, from Python, the concepts themselves).
        names: which of them; by default those whose verdict is undesired.
        layers: only these of the concepts' layers.
        any_model: accept concepts that were found on another model of the same width.
        centred: keep the base model's mean in the subspace instead of zero (as published).
        strength: 1 (as published) removes the subspace, 0 leaves it.
    """

    centred: bool = False
    strength: float = 1.0

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Load the concepts, and try the projections. Raises as `attach` and `ablate`."""
        super().bind(model, tokenizer, seed)
        attach(model, self.at_test_time(model)).close()

    def at_test_time(self, model: nn.Module) -> list[Intervention]:
        """One projection per site, over the span of every concept used there."""
        projections = one_per_site(self.used(model), self.centred)
        for projection in projections:
            projection.phases = ("eval", "generate")
            projection.strength.fill_(self.strength)
        return list(projections)
