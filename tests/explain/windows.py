"""Windows written down in a line, and readers whose answers are known."""

import torch

from narrowly.explain.latents import Latent
from narrowly.explain.record import Example, Explanation
from narrowly.explain.scorers import Item
from narrowly.interventions import layer


def example(text: str, kind: str = "activating", quantile: int | None = 1, row: int = 0) -> Example:
    """A window of words; the latent is active on those with a star: `the cat* sat`."""
    words = text.split()
    return Example(
        pieces=tuple(" " * (i > 0) + word.rstrip("*") for i, word in enumerate(words)),
        activations=tuple(5.0 if word.endswith("*") else 0.0 for word in words),
        kind=kind,
        quantile=quantile if kind == "activating" else None,
        row=row,
        start=0,
    )


def silent(text: str, kind: str = "random") -> Example:
    return example(text, kind)


def item(
    explanation: str | Explanation,
    activating: list[Example],
    others: list[Example],
    name: str = "one",
    concept: str | None = None,
) -> Item:
    if isinstance(explanation, str):
        explanation = Explanation(text=explanation, by="a test")
    latent = Latent(name, concept or name, layer(0), torch.eye(4)[0])
    return Item(latent, explanation, tuple(activating), tuple(others))


class Scripted:
    """A reader that answers each passage by a function of explanation and passage."""

    name = "scripted"

    def __init__(self, answer, probabilities=True):
        self.answer = answer
        self.probabilities = probabilities
        self.questions: list = []

    def judge(self, questions):
        self.questions += questions
        return [[self.answer(q.explanation, p) for p in q.passages] for q in questions]

    def simulate(self, pairs):
        return [self.answer(z, p) for z, p in pairs]

    def odd_one_out(self, sets):
        self.questions += sets
        return [self.answer(passages) for passages in sets]

    def text_given_explanation(self, pairs):
        self.questions += pairs
        return [self.answer(z, p) for z, p in pairs]
