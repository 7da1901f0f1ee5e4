"""Principal components of what a fine-tune changes in the activations (CAFT's unsupervised finder).

Casademunt et al. 2025 (arXiv 2507.16795): PCA of the tuned minus the base model's activations on
answer tokens. The leading component is often the task itself; which one matters has to be read.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from pydantic import Field, PositiveInt

from narrowly.activations import (
    CovarianceFitter,
    MeanFitter,
    ModelLike,
    Pair,
    layer_sites,
    open_pair,
    stream_pair,
)
from narrowly.concepts.concept import Concept, Provenance, Subspace
from narrowly.concepts.finder import FINDERS, ActivationFinder, ChatsLike
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site


class _Statistics:
    """The differences at one site, and the base model's activations beside them."""

    def __init__(self, width: int, device: torch.device):
        self.difference = CovarianceFitter(width, device)
        self.base = MeanFitter(width, device)
        self.base_norm = MeanFitter(1, device)

    def update(self, base: torch.Tensor, tuned: torch.Tensor) -> None:
        self.difference.update(tuned - base)
        self.base.update(base)
        self.base_norm.update(torch.linalg.vector_norm(base, dim=1, keepdim=True))


@FINDERS.register("activation_difference")
class ActivationDifference(ActivationFinder):
    """PCA of tuned minus base activations on answer tokens: k components per layer.

    Base and tuned activations come from one load with the adapter off and on, or from two models
    where all weights were tuned. Own completions are the tuned model's. Yields one concept of rank
    1 per component and layer, named `pc0-layer3`, pointing to where the fine-tune moves the mean;
    its centre is the base model's mean at the same tokens.
    """

    name = "activation_difference"

    base: ModelLike | None = None
    """None: `tuned` with its adapter off."""
    tuned: ModelLike | None = None
    """The fine-tune: a run, an adapter's folder, a model. None: `base` with its adapter on."""
    data: ChatsLike
    k: PositiveInt = Field(10)
    """Components per layer."""
    centred: bool = True
    """Take the mean difference off first, as published; without, it is a component like others."""

    def find(self) -> list[Concept]:
        """The components of each layer, scored by explained variance and the mean's shift.

        Raises:
            NarrowlyError: models or chats cannot be loaded or do not fit, a layer does not exist,
                there are fewer answer tokens than components, or base and tuned do not differ.
        """
        chats = self.chats(self.data)
        with open_pair(self.base, self.tuned, self.tokenizer) as pair:
            with pair.tuned() as model:
                sites = layer_sites(model, self.layers)
                answered = self.answered(model, pair.tokenizer, chats)
            statistics = self._stream(pair, answered, sites)
            with pair.base() as model:
                provenance = self.provenance(pair.name, model, data=chats)
        return [
            concept
            for site in sites
            for concept in self._components(site, statistics[site], provenance)
        ]

    def _stream(self, pair: Pair, chats: Dataset, sites: list[Site]) -> dict[Site, _Statistics]:
        statistics: dict[Site, _Statistics] = {}
        for base, tuned in stream_pair(
            pair,
            self.rows(pair.tokenizer, chats),
            sites,
            positions=self.positions,
            batch_tokens=self.batch_tokens,
            progress=self.label("base and tuned activations"),
        ):
            for site in sites:
                if site not in statistics:
                    statistics[site] = _Statistics(base[site].shape[1], base[site].device)
                statistics[site].update(base[site], tuned[site])
        return statistics

    def _components(
        self, site: Site, statistics: _Statistics, provenance: Provenance
    ) -> list[Concept]:
        shift, moment = statistics.difference.mean, statistics.difference.second_moment
        if not moment.any():
            raise NarrowlyError(
                f"{site}: base and tuned model have the same activations. Is the fine-tune "
                "trained, and does it change anything up to this layer?"
            )
        try:
            found = statistics.difference.principal_components(self.k, self.centred)
        except NarrowlyError as error:
            raise NarrowlyError(f"{site}: {error}") from None
        centre, norm = statistics.base.mean, statistics.base_norm.mean.item()
        concepts = []
        for i, component in enumerate(found.components.T):
            # A component's sign is arbitrary; let plus be where the fine-tune moves the mean.
            along = (shift @ component).item()
            direction = component if along >= 0 else -component
            concepts.append(
                Concept(
                    name=f"pc{i}-layer{site.module}",
                    subspaces={str(site): Subspace.spanned_by(direction[:, None], centre)},
                    provenance=provenance,
                    scores={
                        "explained_ratio": found.explained_ratio[i].item(),
                        "explained_variance": found.explained_variance[i].item(),
                        "mean_shift": abs(along),
                        "relative_norm": moment.trace().sqrt().item() / norm,
                        "tokens": statistics.difference.n,
                    },
                )
            )
        return concepts
