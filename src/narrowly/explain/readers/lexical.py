"""A reader that only looks words up: no model, no network, every answer traceable."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, log, log1p
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from narrowly.explain.readers.base import READERS, Passage, Question
from narrowly.explain.record import Explanation
from narrowly.explain.words import (
    COMMON,
    content_words,
    find_phrases,
    near,
    of_words,
    split_words,
    words_of,
)

_QUOTED = re.compile(r"“([^”]+)”|\"([^\"]+)\"|(?<!\w)'([^']+)'(?!\w)|«([^»]+)»|`([^`]+)`")
_AGAINST = re.compile(r"\b(?:silent|not|never|unlike|without|except)\b", re.IGNORECASE)


@READERS.register("lexical")
class Lexical(BaseModel):
    """Adds up the log odds of the explanation's phrases that stand in a passage (naive Bayes).

    An explanation without weights is read by its quoted words, each speaking for it, or against it
    where the words before the quotes say "not", "silent on" or the like; without quotes, by its
    content words. Each weighs one nat.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str] = "lexical"
    probabilities: ClassVar[bool] = True

    doubt: float = 0.5
    """Nats against an explanation before a word is read: so many the words found must outweigh."""

    def judge(self, questions: Sequence[Question]) -> list[list[float | None]]:
        """The probability that a passage fits; of marked passages, that the marks do."""
        answers: list[list[float | None]] = []
        for question in questions:
            weights = rule(question.explanation)
            answers.append([_sigmoid(self._odds(weights, p)) for p in question.passages])
        return answers

    def simulate(self, pairs: Sequence[tuple[Explanation, Passage]]) -> list[list[float] | None]:
        """On the pieces of each phrase that speaks for activation its weight, scaled to 10."""
        expected: list[list[float] | None] = []
        for explanation, passage in pairs:
            weights = rule(explanation)
            largest = max(weights.values(), default=0.0)
            words = split_words(passage.text)
            stops = np.cumsum([len(piece) for piece in passage.pieces])
            starts = stops - [len(piece) for piece in passage.pieces]
            values = np.zeros(len(passage.pieces))
            for first, stop, phrase in find_phrases(words, weights):
                if weights[phrase] > 0:
                    over = (stops > words[first].start) & (starts < words[stop - 1].stop)
                    values[over] = np.maximum(values[over], 10 * weights[phrase] / largest)
            expected.append(values.tolist())
        return expected

    def odd_one_out(self, sets: Sequence[tuple[Passage, ...]]) -> list[int | None]:
        """The passage that shares least with the others: of its marked words if any, else all.

        Words are weighed by their rarity among all passages asked about, and passages compared by
        the cosine of their binary vectors.
        """
        bags = [[_bag(passage) for passage in passages] for passages in sets]
        spread = Counter(word for passages in bags for bag in passages for word in bag)
        n = sum(map(len, bags))
        rarity = {word: log((n + 1) / count) for word, count in spread.items()}
        return [_least_alike(passages, rarity) for passages in bags]

    def text_given_explanation(
        self, pairs: Sequence[tuple[Explanation, Passage]]
    ) -> list[float | None]:
        """By Bayes log p(explanation | text) - log p(explanation), plus log p(text), left out.

        The term left out is of the text alone, so it cancels between two explanations.
        """
        prior = _log_sigmoid(-self.doubt)
        return [
            _log_sigmoid(self._odds(rule(explanation), passage)) - prior
            for explanation, passage in pairs
        ]

    def explanation_given_text(
        self, pairs: Sequence[tuple[Explanation, Passage]]
    ) -> list[float | None]:
        """Log of the probability that the text fits the explanation."""
        return [
            _log_sigmoid(self._odds(rule(explanation), passage)) for explanation, passage in pairs
        ]

    def _odds(self, weights: dict[str, float], passage: Passage) -> float:
        """Log odds that the passage, or the marks in it, fit.

        Every phrase counts once. With marks, a phrase that speaks for activation counts where it
        is marked, or stands just before a mark; one that speaks against counts anywhere.
        """
        words = split_words(passage.text)
        touched = np.ones(len(words), dtype=bool)
        if passage.marked is not None:
            touched = near(of_words(words, passage.pieces, passage.marked) > 0)
        found = {
            phrase
            for first, stop, phrase in find_phrases(words, weights)
            if weights[phrase] < 0 or touched[first:stop].any()
        }
        return sum(weights[phrase] for phrase in found) - self.doubt


def rule(explanation: Explanation) -> dict[str, float]:
    """Phrases, of words joined by single spaces, and how many nats each speaks for activation."""
    weights = explanation.weights
    if not weights:
        start = 0
        for match in _QUOTED.finditer(explanation.text):
            quoted = next(group for group in match.groups() if group)
            # Of "Active on “a”, “b”; silent on “c”" the part that the word stands in.
            clause = re.split(r"[.;]", explanation.text[: match.start()])[-1]
            weights = weights | {quoted: -1.0 if _AGAINST.search(clause) else 1.0}
            start = match.end()
        if not start:
            weights = dict.fromkeys(content_words(explanation.text), 1.0)
    folded = {" ".join(words_of(phrase)): weight for phrase, weight in weights.items()}
    return {phrase: weight for phrase, weight in folded.items() if phrase}


def _bag(passage: Passage) -> set[str]:
    words = split_words(passage.text)
    chosen = np.ones(len(words), dtype=bool)
    if passage.marked is not None and any(passage.marked):
        chosen = of_words(words, passage.pieces, passage.marked) > 0
    return {w.text for w, take in zip(words, chosen, strict=True) if take and w.text not in COMMON}


def _least_alike(bags: Sequence[set[str]], rarity: dict[str, float]) -> int:
    def length(bag: set[str]) -> float:
        return sum(rarity[word] ** 2 for word in bag) ** 0.5

    def likeness(i: int) -> float:
        return sum(
            sum(rarity[word] ** 2 for word in bags[i] & other)
            / ((length(bags[i]) * length(other)) or 1.0)
            for j, other in enumerate(bags)
            if j != i
        )

    return min(range(len(bags)), key=likeness)


def _sigmoid(x: float) -> float:
    return exp(_log_sigmoid(x))


def _log_sigmoid(x: float) -> float:
    return -log1p(exp(-x)) if x > -500 else x
