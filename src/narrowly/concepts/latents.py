"""Sparse autoencoders in a model: where each reads and writes, and sums over what fires."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrowly.activations import MeanFitter, layer_sites
from narrowly.concepts.concept import Concept, Provenance, Score, Subspace
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site, decoder_layers
from narrowly.saes import SAE, SparseLatents


class LatentFitter:
    """Sums of sparse latents over tokens: state of the size of the latents, on the CPU in fp64."""

    def __init__(self, n_latents: int):
        self.tokens = 0
        self.sum = torch.zeros(n_latents, dtype=torch.float64)
        self.fired = torch.zeros(n_latents, dtype=torch.int64)

    def update(self, latents: SparseLatents) -> None:
        """Take in the latents of some tokens."""
        which = latents.latents.cpu()
        self.tokens += latents.shape[0]
        self.sum.index_add_(0, which, latents.values.cpu().double())
        self.fired += which.bincount(minlength=len(self.fired))

    @property
    def mean(self) -> Float[Tensor, " n"]:
        """Mean of each latent over tokens."""
        return self.sum / max(self.tokens, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """All that was seen, as tensors that `load_state_dict` takes."""
        return {"tokens": torch.tensor(self.tokens), "sum": self.sum, "fired": self.fired}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        self.tokens, self.sum, self.fired = int(state["tokens"]), state["sum"], state["fired"]


class SAEFitters:
    """What is streamed at one autoencoder: its latents, and the mean where they write."""

    def __init__(self, n_latents: int):
        self.latents = LatentFitter(n_latents)
        self.mean = MeanFitter()

    @property
    def both(self) -> list[LatentFitter | MeanFitter]:
        """For a checkpoint."""
        return [self.latents, self.mean]


@dataclass(frozen=True)
class PlacedSAE:
    """An autoencoder in a model."""

    sae: SAE
    reads: Site
    writes: Site
    """Where its decoder rows are directions: where it reads, or a transcoder's output."""
    hash: str
    """SHA-256 of what it computes: its weights and rule."""

    def encode(self, x: Float[Tensor, "tokens d_in"]) -> SparseLatents:
        """The latents that fire; `x` may be on any device."""
        return self.sae.encode_sparse(x.to(self.sae.W_enc.device))

    @property
    def place(self) -> str:
        """Where it writes, as a file name may hold it: `layer3`."""
        words = str(self.writes).replace("layer:", "layer")
        return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")


def place(
    model: nn.Module, saes: Sequence[SAE], layers: Sequence[int] | None = None
) -> list[PlacedSAE]:
    """The autoencoders that read at `layers` (None: all), each checked against the model.

    Raises:
        NarrowlyError: one has another width than the model where it reads, or reads where the model
            has nothing; two write at one site; none reads at these layers, or the model has no such
            layer.
    """
    blocks = list(decoder_layers(model))
    asked = {blocks[int(site.module)] for site in layer_sites(model, layers)}
    device = next(model.parameters()).device
    placed: list[PlacedSAE] = []
    for sae in saes:
        found = sae.check(model)
        if layers is not None and not asked & set(found.path):
            continue
        reads = _counted(found.site, len(blocks))
        writes = _counted(sae.output_site or reads, len(blocks))
        if any(writes == other.writes for other in placed):
            raise NarrowlyError(f"two autoencoders write at {writes}; give one of them.")
        # Moving a module changes it in place, and this one may be the user's.
        there = sae if sae.W_enc.device == device else copy.deepcopy(sae).to(device)
        placed.append(PlacedSAE(there, reads, writes, _hash(sae)))
    if not placed:
        raise NarrowlyError(f"no autoencoder reads at the layers {list(layers or [])}.")
    return placed


def latent_concept(
    at: PlacedSAE,
    latent: int,
    provenance: Provenance,
    *,
    kind: str = "latent",
    centre: Float[Tensor, " d"] | None = None,
    scores: Mapping[str, Score] | None = None,
) -> Concept:
    """A latent as a concept of rank 1, named `latent123-layer2`: its decoder row.

    Its number and the autoencoder's hash join the provenance, so that `latent_of` finds it again.
    """
    return Concept(
        name=f"{kind}{latent}-{at.place}",
        subspaces={
            str(at.writes): Subspace.spanned_by(at.sae.directions(torch.tensor([latent])), centre)
        },
        provenance=provenance.model_copy(
            update={
                "arguments": provenance.arguments | {"latent": latent},
                "data": provenance.data | {f"sae at {at.writes}": at.hash},
            }
        ),
        scores=dict(scores or {}),
    )


def latent_of(concept: Concept) -> tuple[str, int] | None:
    """The hash of the autoencoder and the number of the latent that a concept is; None if none."""
    number = concept.provenance.arguments.get("latent")
    [site, *others] = concept.subspaces
    key = f"sae at {site}"
    if number is None or others or key not in concept.provenance.data:
        return None
    return concept.provenance.data[key], int(number)


def sites_of(placed: Sequence[PlacedSAE]) -> list[Site]:
    """Every site where one of them reads or writes, once."""
    return list(dict.fromkeys(site for at in placed for site in (at.reads, at.writes)))


def hash_of(placed: Sequence[PlacedSAE]) -> str:
    """A short name for all of them together."""
    return hashlib.sha256("".join(at.hash for at in placed).encode()).hexdigest()[:16]


def _counted(site: Site, depth: int) -> Site:
    """A layer counted from the front."""
    return replace(site, module=site.module % depth) if isinstance(site.module, int) else site


def _hash(sae: SAE) -> str:
    rule = {key: value for key, value in vars(sae.rule).items() if not key.startswith("_")}
    about = [type(sae.rule).__name__, rule, sae.subtract_b_dec, sae.normalisation]
    digest = hashlib.sha256(repr(about).encode())
    for name, weight in sae.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
