"""Latents of sparse autoencoders that a fine-tune, or a contrast, sets apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from narrowly.activations import (
    ModelLike,
    OpenModel,
    Pair,
    open_model,
    open_pair,
    stream_pair,
)
from narrowly.concepts.attribution import GradientStream, attribute
from narrowly.concepts.concept import Concept, Provenance
from narrowly.concepts.contrast import ConceptName, Contrast
from narrowly.concepts.finder import FINDERS
from narrowly.concepts.finders.top import join
from narrowly.concepts.latents import (
    LatentFitter,
    PlacedSAE,
    SAEFitters,
    hash_of,
    latent_concept,
    place,
    sites_of,
)
from narrowly.errors import NarrowlyError
from narrowly.saes import SAE, SAELike, load_sae


@dataclass(frozen=True)
class _Ranking:
    """What the streams say of the latents of one autoencoder."""

    score: Float[Tensor, " n"]
    rate: Float[Tensor, " n"]
    """Share of the tokens at which each fires; of both sides' tokens, if there are two."""
    tokens: int
    centre: Float[Tensor, " d"]


@FINDERS.register("sae_latents")
class SAELatents(Contrast):
    """The first `top` latents of each autoencoder, by one of three rankings; decoder rows.

    - "difference": mean latent on positive answers minus that on negative ones, where a contrast is
      given (as in `mean_difference`); otherwise of the tuned model minus the base model on the same
      tokens.
    - "attribution": (W_dec . dL/dh) * latent, summed over the tokens read and averaged over chats,
      L a chat's mean cross-entropy over its answer, on the base model. Largest first, as published:
      latents of what training on these answers has to overcome (of the kind persona, where the
      answers are cruel and the model is kind). A latent that is silent in the base model cannot
      show.
    - "activation_difference": mean over tokens of encode(tuned - base), the whole encoder with its
      biases and threshold applied to each token's difference.

    All are those of Casademunt et al. 2025 (arXiv 2507.16795; `finding_features/get_sae_*.py` of
    their code), who take the union of the first 100 of each. Latents are only ever held where they
    fire; the state is a few numbers for each latent. Attribution holds a batch's logits and graph:
    lower `batch_tokens` for it on large models.

    Yields one concept of rank 1 per latent, named `latent123-layer2`, its direction the decoder row
    and its centre the base model's mean there; or one of all (`joint`).
    """

    name = "sae_latents"

    model: ModelLike | None = None
    """The base model. None: `tuned` with its adapter off."""
    tuned: ModelLike | None = None
    """The fine-tune: a run, an adapter's folder, a model. None: `model` with its adapter on."""
    sae: SAELike
    """An autoencoder or transcoder, or a list of them: loaded, or what `saes.load_sae` takes."""
    by: Literal["difference", "attribution", "activation_difference"] = "difference"
    top: PositiveInt = 10
    """Latents per autoencoder."""
    joint: bool = False
    """All latents as one concept. A decoder row that depends on those before it adds no rank."""
    concept: ConceptName = "latent"
    """What the concepts' names begin with."""

    @classmethod
    def ways(cls) -> list[set[str]]:
        """The sets of arguments that make a contrast, or chats alone."""
        return [*super().ways(), {"data"}]

    @property
    def contrasts(self) -> bool:
        """Whether two sides are given, rather than chats alone."""
        return self.positive is not None or self.positive_system is not None

    @model_validator(mode="after")
    def _fits_ranking(self) -> SAELatents:
        if self.contrasts and self.by != "difference":
            raise ValueError(f"by={self.by!r} reads `data` alone: leave the contrast out")
        if self.model is None and (self.contrasts or self.tuned is None):
            raise ValueError("give the base model (model)")
        alone = self.tuned is None and isinstance(self.model, str | Path)
        if alone and not self.contrasts and self.by != "attribution":
            raise ValueError("give a fine-tune to compare with (tuned), or a contrast of answers")
        return self

    def find(self) -> list[Concept]:
        """The latents, scored by the ranking, how often they fire, and how many never do.

        Raises:
            NarrowlyError: a model, an autoencoder or chats cannot be loaded; an autoencoder has
                another width than the model where it reads, or reads where the model has nothing;
                there is no token to read, or no latent to rank.
        """
        saes = [load_sae(source) for source in _listed(self.sae)]
        finder = self.model_copy(update=_limits(self, saes))
        if self.contrasts:
            opened = open_model(self.model, self.tokenizer)
            placed = place(opened.model, saes, self.layers)
            data, sides = self.sides()
            rankings = finder._contrast(opened, placed, sides)
            provenance = self.provenance(opened.name, opened.model, **data)
        else:
            data = {"data": self.chats(self.data)}
            with self._pair() as pair:
                with pair.base() as model:
                    placed = place(model, saes, self.layers)
                    provenance = self.provenance(pair.name, model, **data)
                attributes = self.by == "attribution"
                with (pair.base if attributes else pair.tuned)() as model:
                    answered = self.answered(model, pair.tokenizer, data["data"])
                rows = self.rows(pair.tokenizer, answered)
                rank = finder._attribute if attributes else finder._compare
                rankings = rank(pair, placed, rows)
        return self._concepts(placed, rankings, provenance)

    def arguments(self) -> dict[str, Any]:
        """The arguments; loaded autoencoders by their names."""
        names = [
            source.name or type(source).__name__ if isinstance(source, nn.Module) else str(source)
            for source in _listed(self.sae)
        ]
        return super().arguments() | {"sae": names}

    @contextmanager
    def _pair(self) -> Iterator[Pair]:
        if self.by != "attribution" or self.model is None:
            with open_pair(self.model, self.tuned, self.tokenizer) as pair:
                yield pair
        else:
            model, tokenizer, name = open_model(self.model, self.tokenizer)
            yield Pair(model, None if isinstance(model, PeftModel) else model, tokenizer, name)

    def _contrast(
        self, opened: OpenModel, placed: list[PlacedSAE], sides: dict[str, Dataset]
    ) -> list[_Ranking]:
        fitters = {side: [SAEFitters(at.sae.n_latents) for at in placed] for side in sides}
        for side, chats in sides.items():
            states = [fitter for site in fitters[side] for fitter in site.both]
            name = f"{side}-{hash_of(placed)}"
            for batch in self.batches(opened, side, chats, sites_of(placed), states, name):
                for at, site in zip(placed, fitters[side], strict=True):
                    site.latents.update(at.encode(batch[at.reads]))
                    site.mean.update(batch[at.writes])
        rankings = []
        for positive, negative, *plain in zip(*fitters.values(), strict=True):
            score = positive.latents.mean - negative.latents.mean
            both = [positive.latents, negative.latents]
            rankings.append(_ranking(score, both, (plain[0] if plain else negative).mean.mean))
        return rankings

    def _attribute(self, pair: Pair, placed: list[PlacedSAE], rows: Dataset) -> list[_Ranking]:
        fitters = [SAEFitters(at.sae.n_latents) for at in placed]
        gradients = GradientStream(
            pair.base,
            rows,
            sites_of(placed),
            **self.reading("gradients"),
        )
        states = [fitter for site in fitters for fitter in site.both]
        checkpoint = self.checkpoint(f"attribution-{hash_of(placed)}")
        for batch, gradient in checkpoint.resume(gradients, states):
            for at, site in zip(placed, fitters, strict=True):
                x = batch[at.reads]
                site.latents.update(attribute(at.sae, at.encode(x), x, gradient[at.writes]))
                site.mean.update(batch[at.writes])
        return [
            _ranking(f.latents.sum / gradients.chats, [f.latents], f.mean.mean) for f in fitters
        ]

    def _compare(self, pair: Pair, placed: list[PlacedSAE], rows: Dataset) -> list[_Ranking]:
        tuned_side = [LatentFitter(at.sae.n_latents) for at in placed]
        base_side = [SAEFitters(at.sae.n_latents) for at in placed]
        pairs = stream_pair(
            pair,
            rows,
            sites_of(placed),
            **self.reading("base and tuned activations"),
        )
        states = [*tuned_side, *(fitter for site in base_side for fitter in site.both)]
        checkpoint = self.checkpoint(f"{self.by}-{hash_of(placed)}")
        for base, tuned in checkpoint.resume(pairs, states):
            for at, above, below in zip(placed, tuned_side, base_side, strict=True):
                below.mean.update(base[at.writes])
                if self.by == "difference":
                    above.update(at.encode(tuned[at.reads]))
                    below.latents.update(at.encode(base[at.reads]))
                else:
                    above.update(at.encode(tuned[at.reads] - base[at.reads]))
        return [
            _ranking(above.mean - below.latents.mean, [above, below.latents], below.mean.mean)
            for above, below in zip(tuned_side, base_side, strict=True)
        ]

    def _concepts(
        self, placed: list[PlacedSAE], rankings: list[_Ranking], provenance: Provenance
    ) -> list[Concept]:
        concepts = []
        for at, ranking in zip(placed, rankings, strict=True):
            values, latents = ranking.score.topk(min(self.top, len(ranking.score)))
            for rank, latent in enumerate(latents[values > 0].tolist(), start=1):
                scores = {
                    "rank": rank,
                    self.by: ranking.score[latent].item(),
                    "firing_rate": ranking.rate[latent].item(),
                    "never_fired": int((ranking.rate == 0).sum()),
                    "tokens": ranking.tokens,
                }
                concepts.append(
                    latent_concept(
                        at,
                        latent,
                        provenance,
                        kind=self.concept,
                        centre=ranking.centre,
                        scores=scores,
                    )
                )
        if not concepts:
            raise NarrowlyError(
                f"sae_latents: no latent scores above 0 by {self.by}. Do the sides differ, and was "
                "the autoencoder trained on this model, at this place?"
            )
        if not self.joint:
            return concepts
        hashes = {f"sae at {at.writes}": at.hash for at in placed}
        everything = provenance.model_copy(update={"data": provenance.data | hashes})
        return [self._joined(concepts, everything)]

    def _joined(self, concepts: list[Concept], provenance: Provenance) -> Concept:
        by_site: dict[str, list[Concept]] = {}
        for concept in concepts:
            by_site.setdefault(next(iter(concept.subspaces)), []).append(concept)
        return Concept(
            name=f"{self.concept}s",
            subspaces={
                site: join([concept.subspaces[site] for concept in joined])
                for site, joined in by_site.items()
            },
            provenance=provenance,
            scores={"latents": {site: len(joined) for site, joined in by_site.items()}},
            explanation=", ".join(concept.name for concept in concepts),
        )


def _ranking(score: Tensor, fitters: list[LatentFitter], centre: Tensor) -> _Ranking:
    tokens = sum(fitter.tokens for fitter in fitters)
    fired = torch.stack([fitter.fired for fitter in fitters]).sum(dim=0)
    return _Ranking(score, fired / tokens, tokens, centre)


def _listed(sae: SAELike) -> list[Any]:
    return list(sae) if isinstance(sae, list | tuple) else [sae]


def _limits(finder: Contrast, saes: list[SAE]) -> dict[str, Any]:
    """The tokens to leave out: what the finder leaves out, and what an autoencoder never saw."""
    norms = [limit for limit in (finder.max_norm, *(sae.max_norm for sae in saes)) if limit]
    return {
        "max_norm": min(norms, default=None),
        "skip_first": max([finder.skip_first, *(sae.skip_first for sae in saes)]),
    }
