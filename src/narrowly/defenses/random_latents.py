"""The control of latent blocking: as many latents, drawn at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from narrowly.defenses.base import DEFENSES
from narrowly.defenses.latent_block import LatentBlock
from narrowly.errors import NarrowlyError


@DEFENSES.register("random_latents")
class RandomLatents(LatentBlock):
    """Block as many latents as `latent_block` would, but other ones, drawn at random.

    The formula of `latent_block`, its latents drawn without replacement by the run's seed among
    all others of the autoencoder: the control of BLOCK-EM (2026, arXiv 2602.00767), which tells
    the choice of latents from the mere penalty.

    Needs: what `latent_block` needs.

    Known failure: a latent that seldom fires is drawn as likely as any, and blocking it costs
    nothing; compare `loss_random_latents` with `loss_latent_block`.

    Attributes:
        sae: as in `latent_block`.
        up: the latents whose number is drawn, and which are left out; as in `latent_block`.
        down: as `up`, of those that must not fall.
        weight: as in `latent_block`; 13000 in the paper.
        layer: as in `latent_block`.
        reference: as in `latent_block`.
    """

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Look up the latents, and draw others. Raises as `latent_block`."""
        super().bind(model, tokenizer, seed)
        assert self._placed is not None
        taken = {*self._up, *self._down}
        others = [i for i in range(self._placed.sae.n_latents) if i not in taken]
        if len(others) < len(taken):
            raise NarrowlyError(
                f"random_latents: {len(taken)} latents are to be drawn, and {self.sae} has only "
                f"{len(others)} others. Give fewer."
            )
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        drawn = [others[i] for i in order[: len(taken)].tolist()]
        ups = len(self._up)
        self._up, self._down = sorted(drawn[:ups]), sorted(drawn[ups:])
