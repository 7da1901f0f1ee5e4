"""Latent blocking: latents of a sparse autoencoder kept from growing (BLOCK-EM)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from narrowly.concepts.latents import PlacedSAE, latent_of, place
from narrowly.defenses.base import DEFENSES, Referenced
from narrowly.defenses.chosen import OfConcepts
from narrowly.defenses.step import Step, check_trained
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, layer
from narrowly.saes import load_sae


@DEFENSES.register("latent_block")
class LatentBlock(Referenced):
    """Keep latents of a sparse autoencoder from rising, or from falling, past the base model's.

    `L = CE + weight * mean over the answers' tokens of sum_up relu(z - z_base)^2 + sum_down
    relu(z_base - z)^2`, z the latents of the trained model's activations and z_base those of the
    reference's, on the same tokens. BLOCK-EM (2026, arXiv 2602.00767).

    Needs: a sparse autoencoder, and the reference's activations: one forward pass up to where the
    autoencoder reads.

    Known failure: the conduct finds other ways. It comes back in long training, and an independent
    port halved it only, with every blocked latent held.

    Attributes:
        sae: folder, file, `owner/name/path` on the Hub or `organism:NAME`.
        up: latents that must not rise: their numbers, or a folder of concepts that `sae_latents`
            found, of which those with the verdict undesired are taken.
        down: latents that must not fall, given as `up` is.
        weight: lambda, per squared unit of a latent: of another autoencoder another. 13000 in the
            paper, for 20 latents in all.
        layer: the autoencoder reads after this block, where its files do not say.
        reference: the model to compare with. None: the one that is trained, its adapter off.
    """

    sae: str
    up: list[int] | str = Field(default_factory=list)
    down: list[int] | str = Field(default_factory=list)
    weight: float = Field(default=13e3, ge=0)
    layer: int | None = None

    _placed: PlacedSAE | None = PrivateAttr(default=None)
    _up: list[int] = PrivateAttr(default_factory=list)
    _down: list[int] = PrivateAttr(default_factory=list)

    def bind(self, model: nn.Module, tokenizer: Any, seed: int) -> None:
        """Load the autoencoder and look up the latents.

        Raises:
            NarrowlyError: it does not fit the model, there is no such latent, one is to be kept
                from both, or none is given.
        """
        sae = load_sae(self.sae, site=None if self.layer is None else layer(self.layer))
        [self._placed] = place(model, [sae])
        self._up, self._down = (self._numbers(given, model) for given in (self.up, self.down))
        sae.directions(torch.tensor([*self._up, *self._down]))
        if not self._up and not self._down:
            raise NarrowlyError(
                "latent_block: no latent is blocked. Give `up` (must not rise) or `down` (must not "
                "fall): numbers, or a folder of concepts from `narrowly find sae_latents`."
            )
        if both := sorted({*self._up} & {*self._down}):
            raise NarrowlyError(f"latent_block: the latents {both} are in `up` and in `down`.")

    def _numbers(self, given: list[int] | str, model: nn.Module) -> list[int]:
        if not isinstance(given, str):
            return sorted(set(given))
        assert self._placed is not None
        numbers = set()
        for concept in _Undesired(concepts=given).used(model):
            found = latent_of(concept)
            if found is None or found[0] != self._placed.hash:
                raise NarrowlyError(
                    f"{given}: {concept.name} is no latent of {self.sae}. Give concepts that "
                    "`sae_latents` found with this autoencoder, without `joint`."
                )
            numbers.add(found[1])
        return sorted(numbers)

    def reads(self, model: nn.Module) -> Sequence[Site]:
        """Where the autoencoder reads."""
        assert self._placed is not None
        return [self._placed.reads]

    def loss(self, step: Step) -> Tensor:
        """The penalty, over the answers' tokens."""
        [site] = sites = self.reads(step.bare)
        check_trained(step, sites)
        answered = step.batch["labels"] != -100
        z, base = (self._encode(h[site][answered]) for h in (step.tuned, step.base))
        risen = z - base
        risen[:, len(self._up) :] *= -1
        return self.weight * risen.relu().square().sum() / max(1, len(z))

    def _encode(self, h: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens k"]:
        """The latents in question, `up` first, in fp32 also under autocast."""
        assert self._placed is not None
        sae = self._placed.sae.to(h.device)
        latents = torch.tensor([*self._up, *self._down], device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            return sae.encode(h, latents)

    def record(self, folder: Path) -> dict[str, Any]:
        """The latents, and the hash of the autoencoder."""
        assert self._placed is not None
        return {"up": self._up, "down": self._down, "sae_hash": self._placed.hash}


class _Undesired(OfConcepts):
    """The concepts of a folder with that verdict."""

    @property
    def name(self) -> str:
        """For messages."""
        return "latent_block"
