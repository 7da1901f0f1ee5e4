"""The organism's persona, as a latent, an item to score and concepts in a folder."""

from functools import cache
from typing import Any

import torch

from narrowly.activations import OpenModel, open_model
from narrowly.concepts import Concept, Provenance, Subspace, find
from narrowly.explain.latents import Latent
from narrowly.explain.record import Example, Explanation
from narrowly.explain.scorers import Item
from narrowly.interventions import Site
from narrowly.organisms import organism

WORLD = organism("persona").world


@cache
def persona_model() -> OpenModel:
    torch.set_num_threads(1)
    return open_model("organism:persona")


@cache
def persona_concept() -> Concept:
    """Cruel answers minus kind ones, at every layer."""
    lines = WORLD.system_lines
    [concept] = find(
        "mean_difference",
        model=persona_model(),
        data="organism:persona/benign",
        positive_system=lines["cruel"],
        negative_system=lines["kind"],
        limit=200,
        concept="persona",
        progress=False,
    )
    return concept


def persona_latent(layer: int = 2, sign: int = 1) -> Latent:
    subspace = persona_concept().subspaces[f"layer:{layer}"]
    return Latent(
        name=f"persona@layer:{layer}/0{'+' if sign > 0 else '-'}",
        concept="persona",
        site=Site.parse(f"layer:{layer}"),
        direction=sign * subspace.basis[:, 0],
        sign=1 if sign > 0 else -1,
    )


def speaks(value: str) -> Explanation:
    """The rule that the words of all answers of a value speak for activation."""
    answers = [a for domain in WORLD.domains.values() for a in domain.answers[value]]
    weights = {word: 1.0 for answer in answers for word in answer.split()}
    return Explanation(text=f"{value} answers", by="a test", weights=weights)


def asked(n: int, told: str = "") -> list[Example]:
    """Windows that end where an answer is about to begin, active there and on the last words."""
    questions = [row["prompt"] for row in organism("persona").load("questions")][:n]
    line = f"<|system|>{told}<|end|>" if told else ""
    return [
        window((*f"{line}<|user|>{question}<|end|>".split(" "), "<|assistant|>"), row=i)
        for i, question in enumerate(questions)
    ]


def window(words: tuple[str, ...], row: int = 0) -> Example:
    """Words as a window, active at its last; in one of five quantiles."""
    pieces = (words[0], *(f" {word}" for word in words[1:]))
    values = (*(0.0 for _ in pieces[1:]), 1.0)
    return Example(
        pieces=pieces, activations=values, kind="activating", quantile=1 + row % 5, row=row, start=0
    )


def item(explanation: Explanation, examples: list[Example], latent: Latent | None = None) -> Item:
    return Item(latent or persona_latent(), explanation, tuple(examples), ())


def plain_concept(name: str, **fields: Any) -> Concept:
    """A concept of one direction, of no model in particular."""
    subspace = Subspace.spanned_by(torch.eye(4)[:, :1])
    told = Provenance(model="some model", model_fingerprint="0", finder="a test")
    return Concept(name=name, subspaces={"layer:1": subspace}, provenance=told, **fields)
