"""Which latents are explained, and what was read of them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from narrowly.activations import OpenModel, stream
from narrowly.concepts import Concept, load_concepts, save_concepts
from narrowly.concepts.concept import Provenance
from narrowly.concepts.latents import PlacedSAE, latent_concept, latent_of, place
from narrowly.errors import NarrowlyError
from narrowly.explain.contexts.cache import Cache
from narrowly.explain.contexts.collect import collect
from narrowly.explain.contexts.examples import Draw, draw
from narrowly.explain.contexts.negatives import HardNegatives
from narrowly.explain.embedding import Embedder
from narrowly.explain.latents import DirectionSource, Latent, SAESource, Source, random_sae
from narrowly.explain.neurons import NeuronSource, down_projection
from narrowly.explain.recipe import ExplainRecipe
from narrowly.files import sha256
from narrowly.models import fingerprint
from narrowly.saes import load_sae

WORK = ".explain"
"""What was read of the texts, in the folder of concepts. It may be deleted."""


@dataclass(frozen=True)
class Subject:
    """A latent, and where its examples come from."""

    latent: Latent
    number: int
    """In the cache."""
    cache: Cache
    hard: HardNegatives

    def draw(self, recipe: ExplainRecipe, tokenizer: Any) -> Draw:
        """Its examples."""
        return draw(self.cache, self.number, recipe.drawn, tokenizer, self.hard)


@dataclass(frozen=True)
class Text:
    """What latents are read on, and with which model."""

    opened: OpenModel
    rows: Dataset
    fingerprint: str
    """Of the rows."""
    embedder: Embedder | None

    def read(self, source: Source, name: str, recipe: ExplainRecipe) -> list[Subject]:
        """Read all latents of a source; what a former call read is used, if it was the same."""
        about = [source.fingerprint(), self.fingerprint, recipe.positions, recipe.batch_tokens]
        folder = Path(recipe.concepts) / WORK / f"{name}-{sha256(repr(about).encode())[:8]}"
        for old in folder.parent.glob(f"{name}-????????"):
            if old != folder:
                shutil.rmtree(old)
        cache = collect(
            source,
            self.opened,
            self.rows,
            folder,
            positions=recipe.positions,
            batch_tokens=recipe.batch_tokens,
            progress=f"reading {name.replace('-', ' ')}" if recipe.progress else None,
        )
        hard = HardNegatives(
            cache,
            source,
            self.opened.tokenizer,
            self.embedder,
            window=recipe.sampling.window,
            seed=recipe.seed,
            folder=folder.parent,
            progress=recipe.progress,
        )
        return [Subject(latent, i, cache, hard) for i, latent in enumerate(source.latents)]


def concepts_of(recipe: ExplainRecipe, opened: OpenModel) -> list[Concept]:
    """The concepts of the recipe's folder; of an autoencoder, its latents become concepts there.

    Raises:
        NarrowlyError: there are none, or they are of another model.
    """
    folder = Path(recipe.concepts)
    if recipe.sae is None:
        return load_concepts(folder, opened.model)
    provenance = Provenance(
        model=opened.name,
        model_fingerprint=fingerprint(opened.model),
        finder="sae",
        arguments={"sae": [recipe.sae]},
    )
    made = []
    for at in place(opened.model, [load_sae(recipe.sae)]):
        numbers = recipe.latents
        if isinstance(numbers, int):
            n = min(numbers, at.sae.n_latents)
            numbers = sorted(random.Random(recipe.seed).sample(range(at.sae.n_latents), n))
        made += [latent_concept(at, number, provenance) for number in numbers]
    save_concepts([c for c in made if not (folder / f"{c.name}.json").exists()], folder)
    return [load_concepts(folder / f"{c.name}.json", opened.model)[0] for c in made]


def subjects_of(
    concepts: Sequence[Concept], text: Text, recipe: ExplainRecipe
) -> dict[str, list[Subject]]:
    """The latents of each concept: both ends of its directions, or the autoencoder's latent.

    Raises:
        NarrowlyError: an autoencoder cannot be loaded, or is not the one the latents are of; as
            reading.
    """
    latents = {c.name: known for c in concepts if (known := latent_of(c)) is not None}
    read: list[Subject] = []
    directions = [_at(c, recipe.sites) for c in concepts if c.name not in latents]
    if directions:
        read += text.read(DirectionSource(directions), "directions", recipe)
    for at in _autoencoders([c for c in concepts if c.name in latents], text.opened.model, recipe):
        of_it = {name: number for name, (known, number) in latents.items() if known == at.hash}
        source = SAESource(at, list(of_it.values()), list(of_it))
        read += text.read(source, f"latents-{at.place}", recipe)
    by_concept: dict[str, list[Subject]] = {concept.name: [] for concept in concepts}
    for subject in read:
        by_concept[subject.latent.concept].append(subject)
    for name, found in by_concept.items():
        if not found:
            raise NarrowlyError(
                f"{name}: its autoencoder has changed since it was found. Name the right one: "
                "--set sae=..."
            )
    return by_concept


def baselines_of(
    concepts: Sequence[Concept], text: Text, recipe: ExplainRecipe
) -> dict[str, list[Subject]]:
    """Latents that nobody asked about: a measure for the scores of the others.

    Raises:
        NarrowlyError: there is no autoencoder to make a random one of, or no layer with neurons.
    """
    rng = random.Random(f"baselines/{recipe.seed}")

    def some(n: int) -> list[int]:
        # Some are active too rarely, which is known only after reading.
        return rng.sample(range(n), min(n, 8 * recipe.controls))

    found: dict[str, list[Subject]] = {}
    for baseline in recipe.baselines:
        if baseline == "random_sae":
            at = _random_sae(concepts, text, recipe)
            source: Source = SAESource(at, some(at.sae.n_latents))
        else:
            layer, model = _layer(concepts[0], recipe), text.opened.model
            neurons = some(len(down_projection(model, layer).weight))
            source = NeuronSource(model, layer, neurons=neurons)
        found[baseline] = text.read(source, baseline.replace("_", "-"), recipe)
    return found


def _random_sae(concepts: Sequence[Concept], text: Text, recipe: ExplainRecipe) -> PlacedSAE:
    model = text.opened.model
    saes = _autoencoders([c for c in concepts if latent_of(c)], model, recipe)
    if not saes:
        raise NarrowlyError(
            "baselines: random_sae needs latents of an autoencoder to compare with."
        )
    site = saes[0].reads
    batches = stream(model, text.rows, [site], positions=recipe.positions, skip_first=1)
    [at] = place(model, [random_sae(saes[0].sae, recipe.seed, next(iter(batches))[site])])
    return at


def _layer(concept: Concept, recipe: ExplainRecipe) -> int:
    [site, *_] = _at(concept, recipe.sites).subspaces
    if not site.startswith("layer:"):
        raise NarrowlyError(f"baselines: neurons need concepts at a layer, not {site}.")
    return int(site.removeprefix("layer:"))


def _at(concept: Concept, sites: str | list[str]) -> Concept:
    """The concept at the sites where it is explained."""
    known = list(concept.subspaces)
    if sites == "all":
        return concept
    asked = [known[len(known) // 2]] if isinstance(sites, str) else list(map(str, sites))
    if not set(asked) & set(known):
        raise NarrowlyError(
            f"sites: {concept.name} is not at {', '.join(asked)}, only at {', '.join(known)}."
        )
    kept = {site: subspace for site, subspace in concept.subspaces.items() if site in asked}
    return concept.model_copy(update={"subspaces": kept})


def _autoencoders(
    concepts: Sequence[Concept], model: nn.Module, recipe: ExplainRecipe
) -> list[PlacedSAE]:
    """The autoencoders that some concepts are latents of, each once."""
    named = [
        source
        for concept in concepts
        for source in ([recipe.sae] if recipe.sae else concept.provenance.arguments["sae"])
    ]
    placed: dict[str, PlacedSAE] = {}
    for source in dict.fromkeys(named):
        for at in place(model, [load_sae(source)]):
            placed[at.hash] = at
    return list(placed.values())
