"""Concepts made up for tests of defenses and training."""

from pathlib import Path

import torch
from torch import Tensor, nn

from narrowly.concepts import Concept, Provenance, Subspace, Verdict, save_concepts
from narrowly.models import fingerprint


def make_concept(
    model: nn.Module,
    name: str = "persona",
    *,
    layers: tuple[int, ...] = (0, 1),
    rank: int = 1,
    seed: int = 0,
    verdict: str = "undesired",
    centre: Tensor | None = None,
    lengths: dict[int, float] | None = None,
) -> Concept:
    """Random directions of the model's width at some layers; their raw lengths by layer."""
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    return Concept(
        name=name,
        subspaces={
            f"layer:{layer}": Subspace.spanned_by(
                torch.randn(width, rank, generator=generator), centre
            )
            for layer in layers
        },
        provenance=Provenance(model="tiny", model_fingerprint=fingerprint(model), finder="test"),
        verdict=Verdict(value=verdict, by="test"),
        scores={}
        if lengths is None
        else {"difference_norm": {f"layer:{layer}": length for layer, length in lengths.items()}},
    )


def save_concept(model: nn.Module, folder: Path, **fields) -> Path:
    """`make_concept`, on disk."""
    return save_concepts([make_concept(model, **fields)], folder)
