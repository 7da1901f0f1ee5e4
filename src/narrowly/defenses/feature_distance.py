"""Feature distance: activations held near those before the fine-tune (LDIFS)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn

from narrowly.defenses.base import DEFENSES
from narrowly.defenses.step import Referenced, Step, squared_distance
from narrowly.interventions import Site, decoder_layers, layer


@DEFENSES.register("feature_distance")
class FeatureDistance(Referenced):
    """Hold the residual stream near the base model's.

    `L = CE + weight * mean over tokens of |x - x_base|^2`, x the residual stream after every
    `every`-th block, concatenated (LDIFS, Mukhoti et al. 2023; as a defense Kaczer et al. 2025,
    arXiv 2508.06249).

    Attributes:
        weight: lambda; 1.0 in the paper.
        every: 5 in the paper.
    """

    weight: float = Field(default=1.0, ge=0)
    every: int = Field(default=5, ge=1)

    def reads(self, model: nn.Module) -> Sequence[Site]:
        """Every so many blocks, counted from the first such."""
        return [layer(i) for i in range(self.every - 1, len(decoder_layers(model)), self.every)]

    def loss(self, step: Step) -> Tensor:
        """The penalty, over all tokens but padding."""
        distance = squared_distance(step, self.reads(step.bare))
        return self.weight * distance[step.real].mean()
