"""The direction between two means: of answers that hold a concept and of answers that do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from narrowly.activations import (
    LanguageModel,
    MeanFitter,
    ModelLike,
    layer_sites,
    open_model,
    stream,
)
from narrowly.concepts.concept import Concept, Subspace
from narrowly.concepts.finder import FINDERS, ActivationFinder, ChatsLike, with_system
from narrowly.errors import NarrowlyError
from narrowly.interventions import Site


@dataclass(frozen=True)
class _Side:
    """What one side of the contrast looks like at one site."""

    mean: Float[Tensor, " d"]
    norm: float
    """Mean length of the activations."""
    tokens: int


@FINDERS.register("mean_difference")
class MeanDifference(ActivationFinder):
    """Mean activation on positive answers minus that on negative ones, at every layer.

    Two ways to contrast: two sets of chats (`positive`, `negative`), or the same prompts under two
    system lines (`data`, `positive_system`, `negative_system`), answered by the model itself under
    each line, or with the answers given (the words are the same, only the line differs).

    Yields one concept of rank 1 with a subspace per layer, pointing from negative to positive. Its
    centre is where the model is by itself: its mean at these tokens under no system line; of two
    sets of chats, midway between their means.

    Persona vectors (Chen et al. 2025, arXiv 2507.21509, section 2.2) are this with system lines,
    own completions and all positions.
    """

    name = "mean_difference"

    model: ModelLike
    positive: ChatsLike | None = None
    negative: ChatsLike | None = None
    data: ChatsLike | None = None
    positive_system: str | None = None
    negative_system: str | None = None
    concept: str = Field("mean-difference", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """The concept's name."""

    @model_validator(mode="after")
    def _one_contrast(self) -> MeanDifference:
        chats = [self.positive, self.negative]
        lines = [self.data, self.positive_system, self.negative_system]
        given = [value is not None for value in chats + lines]
        if given not in ([True, True, False, False, False], [False, False, True, True, True]):
            raise ValueError(
                "give two sets of chats (positive, negative), or prompts and two system lines "
                "(data, positive_system, negative_system)"
            )
        return self

    def find(self) -> list[Concept]:
        """One concept, scored by the difference's length relative to the activations', per layer.

        Raises:
            NarrowlyError: model or chats cannot be loaded, a layer does not exist, no answer has a
                token at `positions`, or the two sides do not differ.
        """
        model, tokenizer, model_name = open_model(self.model, self.tokenizer)
        sites = layer_sites(model, self.layers)
        if self.data is not None:
            sources = {"data": self.chats(self.data)}
            sides = {
                "positive": with_system(sources["data"], self.positive_system),
                "negative": with_system(sources["data"], self.negative_system),
                "plain": with_system(sources["data"], None),
            }
        else:
            sides = sources = {
                "positive": self.chats(self.positive),
                "negative": self.chats(self.negative),
            }
        read = {
            side: self._read(model, tokenizer, chats, sites, side) for side, chats in sides.items()
        }
        subspaces, difference, relative = {}, {}, {}
        for site in sites:
            positive, negative = read["positive"][site], read["negative"][site]
            direction = positive.mean - negative.mean
            if not direction.any():
                raise NarrowlyError(
                    f"{site}: positive and negative answers have the same mean activation. Do the "
                    "two sides differ, and before the answers' tokens?"
                )
            midway = (positive.mean + negative.mean) / 2
            centre = read["plain"][site].mean if "plain" in read else midway
            subspaces[str(site)] = Subspace.spanned_by(direction[:, None], centre)
            difference[str(site)] = direction.norm().item()
            relative[str(site)] = 2 * difference[str(site)] / (positive.norm + negative.norm)
        return [
            Concept(
                name=self.concept,
                subspaces=subspaces,
                provenance=self.provenance(model_name, model, **sources),
                scores={
                    "difference_norm": difference,
                    "relative_norm": relative,
                    "tokens": sum(read[side][sites[0]].tokens for side in ("positive", "negative")),
                },
            )
        ]

    def _read(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        chats: Dataset,
        sites: list[Site],
        side: str,
    ) -> dict[Site, _Side]:
        rows = self.rows(tokenizer, self.answered(model, tokenizer, chats))
        means: dict[Site, MeanFitter] = {}
        norms: dict[Site, MeanFitter] = {}
        for batch in stream(
            model,
            rows,
            sites,
            positions=self.positions,
            batch_tokens=self.batch_tokens,
            progress=self.label(f"{side} answers"),
        ):
            for site, h in batch.values.items():
                if site not in means:
                    means[site] = MeanFitter(h.shape[1], h.device)
                    norms[site] = MeanFitter(1, h.device)
                means[site].update(h)
                norms[site].update(torch.linalg.vector_norm(h, dim=1, keepdim=True))
        return {
            site: _Side(means[site].mean.cpu(), norms[site].mean.item(), means[site].n)
            for site in sites
        }
