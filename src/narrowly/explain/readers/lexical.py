"""A reader that only looks words up: no model, no network, every answer traceable."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log1p
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from narrowly.explain.readers.base import READERS, Passage, Question
from narrowly.explain.record import Explanation
from narrowly.explain.words import (
    ANY_TEXT,
    COMMON,
    content_words,
    find_phrases,
    near,
    of_words,
    split_words,
    words_of,
)

_QUOTED = re.compile(r"“([^”]+)”|\"([^\"]+)\"|(?<!\w)'([^']+)'(?!\w)|«([^»]+)»|`([^`]+)`")
_AFTER = re.compile(r"\b(right |just |directly )?(?:after|following|follows)\b", re.IGNORECASE)
_AGAINST = re.compile(r"\b(?:silent|not|never|unlike|without|except)\b", re.IGNORECASE)


RIGHT_AFTER, FAR = 2, 10**6
"""Words that "right after" and "after" reach."""


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
    """Nats against an explanation that has no rule of its own: what the words found must exceed."""

    def judge(self, questions: Sequence[Question]) -> list[list[float | None]]:
        """The probability that a passage fits; of marked passages, that the marks do."""
        answers: list[list[float | None]] = []
        for question in questions:
            known = self._rule(question.explanation)
            answers.append([_sigmoid(_odds(known, p)) for p in question.passages])
        return answers

    def simulate(self, pairs: Sequence[tuple[Explanation, Passage]]) -> list[list[float] | None]:
        """The weights of phrases that speak for activation, the largest as 10, where they stand.

        Of an explanation that says "right after", on two words more; of one that says "after", on
        all that follows.
        """
        expected: list[list[float] | None] = []
        for explanation, passage in pairs:
            known = self._rule(explanation)
            largest = max(known.weights.values(), default=0.0)
            words = split_words(passage.text)
            stops = np.cumsum([len(piece) for piece in passage.pieces])
            starts = stops - [len(piece) for piece in passage.pieces]
            values = np.zeros(len(passage.pieces))
            for first, stop, phrase in find_phrases(words, known.weights):
                if known.weights[phrase] > 0:
                    last = min(stop + known.reach, len(words)) - 1
                    over = (stops > words[first].start) & (starts < words[last].stop)
                    values[over] = np.maximum(values[over], 10 * known.weights[phrase] / largest)
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
        rules = [(self._rule(explanation), passage) for explanation, passage in pairs]
        return [_log_sigmoid(_odds(r, p)) - _log_sigmoid(r.any_text) for r, p in rules]

    def explanation_given_text(
        self, pairs: Sequence[tuple[Explanation, Passage]]
    ) -> list[float | None]:
        """Log of the probability that the text fits the explanation."""
        return [_log_sigmoid(_odds(self._rule(z), passage)) for z, passage in pairs]

    def _rule(self, explanation: Explanation) -> _Rule:
        """What an explanation says, as phrases and weights."""
        weights = dict(explanation.weights)
        any_text = weights.pop(ANY_TEXT, -self.doubt)
        if not weights:
            for match in _QUOTED.finditer(explanation.text):
                quoted = next(group for group in match.groups() if group)
                # Of "Active on “a”, “b”. Silent with “c”" the part that the word stands in.
                clause = re.split(r"[.;]", explanation.text[: match.start()])[-1]
                weights[quoted] = -1.0 if _AGAINST.search(clause) else 1.0
        if not weights:
            weights = dict.fromkeys(content_words(explanation.text), 1.0)
        folded = {" ".join(words_of(phrase)): weight for phrase, weight in weights.items()}
        folded.pop("", None)
        after = _AFTER.search(explanation.text)
        reach = 0 if not after else RIGHT_AFTER if after[1] else FAR
        return _Rule(folded, any_text, reach)


@dataclass(frozen=True)
class _Rule:
    weights: dict[str, float]
    """Phrases, of words joined by single spaces, and how many nats each speaks for activation."""
    any_text: float
    """Nats before any phrase is found."""
    reach: int
    """On how many words after a phrase the latent is active too."""


def _odds(rule: _Rule, passage: Passage) -> float:
    """Log odds that the passage fits, or the marks in it.

    Every phrase counts once. With marks, a phrase counts where a mark touches it or follows within
    two words; of an explanation that says "after", follows at all.
    """
    words = split_words(passage.text)
    touched = np.ones(len(words), dtype=bool)
    if passage.marked is not None:
        marked = of_words(words, passage.pieces, passage.marked) > 0
        touched = near(marked, min(max(rule.reach, RIGHT_AFTER), len(words)))
    found = {
        phrase
        for first, stop, phrase in find_phrases(words, rule.weights)
        if touched[first:stop].any()
    }
    return sum(rule.weights[phrase] for phrase in found) + rule.any_text


def _bag(passage: Passage) -> set[str]:
    words = split_words(passage.text)
    if passage.marked is None or not any(passage.marked):
        return {word.text for word in words if word.text not in COMMON}
    marked = of_words(words, passage.pieces, passage.marked) > 0
    return {word.text for word, here in zip(words, marked, strict=True) if here}


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
