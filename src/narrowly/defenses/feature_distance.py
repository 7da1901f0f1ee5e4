"""Feature distance: activations held near those before the fine-tune (LDIFS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from narrowly.defenses.base import DEFENSES, Referenced
from narrowly.defenses.step import Step, real, squared_distance
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, decoder_layers, layer


@DEFENSES.register("feature_distance")
class FeatureDistance(Referenced):
    """Hold the residual stream near the base model's.

    `L = CE + weight * mean over tokens of |x - x_base|^2`, x the residual stream after every
    `every`-th block, concatenated; in fp32. LDIFS of Mukhoti et al. 2023 (arXiv 2308.13320), there
    over the features of a picture; over tokens, as a defense, Kaczer et al. 2025 (arXiv
    2508.06249). Both papers write the plain squared norm, and so does this, over all tokens but
    padding. (The code of LDIFS normalises each feature vector, and takes the mean over dimensions.)

    Needs: the reference's activations, one forward pass without the head in every step.

    Known failure: in the paper it hardly prevents anything (misaligned 4.0 % to 3.6 %), as small
    distances suffice for other conduct; and a weight fits one model, as norms grow with its width.

    Attributes:
        weight: lambda, per squared unit of activation; 1.0 in the paper.
        every: blocks from one that is compared to the next, the first being this one; 5 in the
            paper.
        reference: the model to compare with. None: the one that is trained, its adapter off.
    """

    weight: float = Field(default=1.0, ge=0)
    every: int = Field(default=5, ge=1)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Look whether the model is deep enough."""
        depth = len(decoder_layers(model))
        if depth < self.every:
            raise NarrowlyError(
                f"feature_distance: every {self.every}th block is compared, and the model has "
                f"{depth}. Give an `every` of at most {depth}."
            )

    def reads(self, model: nn.Module) -> Sequence[Site]:
        """Every so many blocks, counted from the first such."""
        return [layer(i) for i in range(self.every - 1, len(decoder_layers(model)), self.every)]

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """All but padding."""
        return real(batch)

    def loss(self, step: Step) -> Tensor:
        """The mean over these tokens."""
        distance = squared_distance(step, self.reads(step.bare))
        return self.weight * distance[self.tokens(step.batch)].mean()
