"""What can be explained: anything with one activation per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from narrowly.activations import Activations
from narrowly.interventions import Site
from narrowly.saes import SparseLatents


@dataclass(frozen=True, eq=False)
class Latent:
    """A latent of an autoencoder, a neuron, or one end of a direction."""

    name: str
    """Unique in its source, such as `persona@layer:2/0+`."""
    concept: str
    """The concept it belongs to."""
    site: Site
    """Where its direction lies: where an edit along it is made."""
    direction: Float[Tensor, " d"]
    """Unit length; more of it is more of the latent (so negated for the low end)."""
    column: int = 0
    """Which column of the concept's basis."""
    sign: Literal[1, -1] = 1


class Source(Protocol):
    """Latents that are read together, in one pass over a text."""

    latents: list[Latent]

    @property
    def sites(self) -> list[Site]:
        """Where activations are read."""

    def encode(self, batch: Activations) -> SparseLatents:
        """Which of `latents` is how active at each token of a batch; values above 0 only."""
