"""Readers: who is asked whether an explanation fits a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from pydantic import BaseModel

from narrowly.explain.record import Explanation
from narrowly.registry import Registry
from narrowly.settings import build, entry


@dataclass(frozen=True)
class Passage:
    """A text, some of its tokens perhaps marked."""

    pieces: tuple[str, ...]
    marked: tuple[bool, ...] | None = None
    """One per piece, if marks are shown."""

    @property
    def text(self) -> str:
        """The text without marks."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Question:
    """Which of these passages fit the explanation?"""

    task: str
    """In words, for a language model: what is to be decided of each passage."""
    explanation: Explanation
    passages: tuple[Passage, ...]


class Reader(Protocol):
    """Answers what scorers ask. None, or a shorter list's gap, is a reply that did not parse.

    A reader that cannot do one of these raises a NarrowlyError that names one that can.
    """

    name: str
    """With its model: scores of different readers are not comparable."""

    probabilities: bool
    """Whether `judge` gives probabilities rather than 0 and 1."""

    def judge(self, questions: Sequence[Question]) -> list[list[float | None]]:
        """Per question and passage, how probable it is that the passage fits; or 0 or 1."""
        ...

    def simulate(self, pairs: Sequence[tuple[Explanation, Passage]]) -> list[list[float] | None]:
        """Per pair, the activation expected at each piece, 0 to 10."""
        ...

    def odd_one_out(self, sets: Sequence[tuple[Passage, ...]]) -> list[int | None]:
        """Per set of passages, the index of the one that does not belong; no explanation."""
        ...

    def text_given_explanation(
        self, pairs: Sequence[tuple[Explanation, Passage]]
    ) -> list[float | None]:
        """log p(text | explanation) in nats."""
        ...

    def explanation_given_text(
        self, pairs: Sequence[tuple[Explanation, Passage]]
    ) -> list[float | None]:
        """log p(explanation | a text said to have an amplified amount of it) in nats."""
        ...


READERS: Registry[type[BaseModel]] = Registry("reader", "narrowly.explain.readers")

ReaderLike = Any
"""A reader's name, `{name: {field: value}}`, or a `Reader`."""


def make_reader(spec: ReaderLike) -> Reader:
    """The reader that `spec` names, or `spec` itself where it is one.

    Raises:
        NarrowlyError: an unknown reader or field, or one missing or of the wrong type.
    """
    if hasattr(spec, "judge"):
        return cast(Reader, spec)
    [(name, arguments)] = entry("reader", spec).items()
    return cast(Reader, build(READERS[name], arguments, ("reader", name)))
