"""An explainer without a model: the words and phrases that tell activating windows apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import log
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float
from pydantic import PositiveInt

from narrowly.explain.explainers.base import EXPLAINERS, Evidence, Explainer
from narrowly.explain.record import Example, Explanation
from narrowly.explain.words import (
    ANY_TEXT,
    COMMON,
    LONGEST,
    Word,
    find_phrases,
    marks,
    near,
    of_words,
    split_words,
)

SURE = 0.6
"""Standard errors that a phrase's log odds must lie from 0 to be in the rule. One seen once in
activating windows and never in silent ones has 0.65."""

AWAY = (0.0, 0.25, 1.0)
"""What a phrase counts, in the rule's prior, that mostly stands away from where the latent is
active, beside 1 near it: cross-validation tells."""
FOLDS = 5
SIZES = (5, 15, 50, 150)
MARGIN = 0.015
"""Nats by which a less simple rule must do better on windows left out."""
WEIGHTY = 0.05
"""Nats of the least weight in the rule."""

FILLER = 1.0
"""What every word of a phrase that is filler or a sign takes from how sure it counts."""

PLAIN = 1.2
"""How sure a phrase must be to be named before others: four windows with it, none without."""
NAMED = 8
"""Phrases that the sentence names."""

UNSURE = "its phrases did not tell apart windows that were left out: noise, or too few windows"


@EXPLAINERS.register("lexical")
class Lexical(Explainer):
    """Phrases of one to three words that separate activating from silent windows.

    Phrases are ranked by the log odds of their presence in an activating window against a silent
    one, with a Dirichlet prior, over its standard error (Monroe, Colaresi & Quinn 2008, "Fightin'
    Words", equations 16, 20 and 22). The first of them that add to one another are weighed by a
    logistic regression with a prior; how many, and how far those count that stand away from where
    the latent is active, is chosen by cross-validation. The weights of a text's phrases add up to
    its log odds. Needs no model, says nothing that is not in the text, and is the baseline that
    every other explainer must beat.
    """

    name: ClassVar[str] = "lexical"

    phrases: PositiveInt = 300
    """Phrases in the rule at most; the sentence names the first few."""

    def explain(self, evidence: Sequence[Evidence]) -> list[Explanation | str]:
        """A sentence and its rule for each latent, or why there is none."""
        return [self._explain(one) for one in evidence]

    def _explain(self, evidence: Evidence) -> Explanation | str:
        if not evidence.activating:
            return "no activating window to explain"
        if not evidence.silent:
            return "no silent window to compare with"
        activating = [_Window(example) for example in evidence.activating]
        silent = [_Window(example) for example in evidence.silent]
        active = np.arange(len(activating) + len(silent)) < len(activating)
        known = _counted(_phrases(activating, silent), active)
        phrases, any_text, loss = _fitted(known, activating, silent, self.phrases)
        # The weightiest first: those a text is known by, rather than those seen most.
        phrases.sort(key=lambda phrase: (phrase.sure < PLAIN, -abs(phrase.weight)))
        speaking = [phrase for phrase in phrases if phrase.weight > 0]
        against = [phrase for phrase in phrases if phrase.weight < 0]
        if not speaking:
            return "no word or phrase tells its windows from silent ones"
        text = f"{_where(speaking)} {_named(speaking)}."
        if against:
            text += f" Silent with {_named(against)}."
        weights = {phrase.text: round(phrase.weight, 3) for phrase in [*speaking, *against]}
        return Explanation(
            text=text,
            by=self.name,
            weights=weights | {ANY_TEXT: round(any_text, 3)},
            note="" if loss < log(2) else UNSURE,
        )


class _Window:
    """A window's words, and which of them the latent is active on."""

    def __init__(self, example: Example):
        self.words: list[Word] = split_words(example.text)
        self.active = np.zeros(len(self.words), dtype=bool)
        if example.peak > 0:
            self.active = of_words(self.words, example.pieces, marks(example)) > 0


@dataclass
class _Phrase:
    text: str
    activating: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    """Windows that hold it, by number."""
    at: set[int] = field(default_factory=set)
    ahead: set[int] = field(default_factory=set)
    """Activating windows where it ends where the latent is active, or just before."""
    z: float = 0.0
    """Log odds over standard error: how sure it is, and which way it speaks."""
    weight: float = 0.0
    """Log odds in nats."""

    @property
    def sure(self) -> float:
        """Standard errors from 0, less for filler: of many phrases some are sure by chance."""
        return abs(self.z) - FILLER * sum(map(_is_filler, self.text.split(" ")))

    @property
    def beside(self) -> bool:
        """Whether it stands at or ahead of activation in most activating windows that hold it."""
        return 2 * len(self.at | self.ahead) > len(self.activating)


def _phrases(activating: Sequence[_Window], silent: Sequence[_Window]) -> list[_Phrase]:
    """Every phrase of the windows."""
    known: dict[str, _Phrase] = {}
    for windows, holding in ((activating, "activating"), (silent, "silent")):
        for number, window in enumerate(windows):
            ahead = near(window.active)
            words = [word.text for word in window.words]
            for first in range(len(words)):
                for stop in range(first + 1, min(first + LONGEST, len(words)) + 1):
                    text = " ".join(words[first:stop])
                    phrase = known.setdefault(text, _Phrase(text))
                    getattr(phrase, holding).add(number)
                    if window.active[stop - 1]:
                        phrase.at.add(number)
                    elif ahead[stop - 1]:
                        phrase.ahead.add(number)
    return list(known.values())


def _counted(phrases: list[_Phrase], active: Bool[np.ndarray, " windows"]) -> list[_Phrase]:
    """The phrases with their log odds over the standard error.

    Of being present in an activating window against a silent one; half a count is added to each of
    the four counts (Jeffreys' prior).
    """
    here = np.array([len(phrase.activating) for phrase in phrases], dtype=float)
    there = np.array([len(phrase.silent) for phrase in phrases], dtype=float)
    yes, no = here + 0.5, active.sum() - here + 0.5
    other_yes, other_no = there + 0.5, (~active).sum() - there + 0.5
    error = np.sqrt(1 / yes + 1 / no + 1 / other_yes + 1 / other_no)
    zs = (np.log(yes / no) - np.log(other_yes / other_no)) / error
    for phrase, z in zip(phrases, zs.tolist(), strict=True):
        phrase.z = z
    return phrases


def _distinct(phrases: Sequence[_Phrase], most: int) -> list[_Phrase]:
    """The surest phrases either way, without those that only say again what another says."""
    able = sorted((p for p in phrases if p.sure > SURE), key=_rank)
    chosen: list[_Phrase] = []
    by_word: dict[str, list[_Phrase]] = defaultdict(list)
    for phrase in able:
        if len(chosen) == most:
            break
        words = phrase.text.split(" ")
        telling = [word for word in words if not _is_filler(word)] or words
        if not any(_same(phrase, other) for word in telling for other in by_word[word]):
            chosen.append(phrase)
            for word in words:
                by_word[word].append(phrase)
    return chosen


def _rank(phrase: _Phrase) -> tuple[float, int, int, str]:
    words = phrase.text.count(" ") + 1
    recurs = len(phrase.activating) + len(phrase.silent) > 1
    # Of phrases as sure the longer, unless seen but once; and those the latent is active on.
    return (-round(phrase.sure, 2), -words if recurs else words, -len(phrase.at), phrase.text)


def _is_filler(word: str) -> bool:
    return word in COMMON or not word[0].isalnum()


def _same(phrase: _Phrase, other: _Phrase) -> bool:
    """Whether one stands in few windows where the other does not."""
    both = len(phrase.activating & other.activating) + len(phrase.silent & other.silent)
    return both >= 0.8 * (len(phrase.activating) + len(phrase.silent))


def _fitted(
    phrases: Sequence[_Phrase],
    activating: Sequence[_Window],
    silent: Sequence[_Window],
    most: int,
) -> tuple[list[_Phrase], float, float]:
    """The rule that does best on windows left out, whose words chose no phrase either.

    Returns:
        The phrases with their weights, the nats of a text with none of them, and the mean loss on
        windows left out, in nats: log 2 where none does better than guessing.
    """
    windows = [*activating, *silent]
    active = np.arange(len(windows)) < len(activating)
    fold = np.concatenate([np.arange(len(activating)), np.arange(len(silent))]) % FOLDS
    losses: dict[tuple[float, int], list[float]] = defaultdict(list)
    for held in (fold == i for i in range(FOLDS)):
        kinds = held & active, held & ~active
        if not all(part.any() for part in (*kinds, active & ~held, ~active & ~held)):
            continue
        known = _distinct(_counted(_left(phrases, held, len(activating)), active[~held]), most)
        present = _present(known, windows)
        for away, size in product(AWAY, (*SIZES, most)):
            weights, any_text = _logistic(present[~held], _scale(known[:size], away), active[~held])
            odds = present[:, : len(weights)] @ weights + any_text
            loss = np.logaddexp(0, np.where(active, -odds, odds))
            losses[away, size].append(float(np.mean([loss[kind].mean() for kind in kinds])))
    away, size, least = AWAY[1], SIZES[2], log(2)
    for choice, each in losses.items():
        # The simpler of two that do about as well, if they do better than guessing.
        if np.mean(each) < least - MARGIN:
            (away, size), least = choice, float(np.mean(each))
    known = _distinct(phrases, most)[:size]
    weights, any_text = _logistic(_present(known, windows), _scale(known, away), active)
    kept = [replace(p, weight=w) for p, w in zip(known, weights.tolist(), strict=True)]
    return [phrase for phrase in kept if abs(phrase.weight) >= WEIGHTY], any_text, least


def _left(
    phrases: Sequence[_Phrase], held: Bool[np.ndarray, " windows"], activating: int
) -> list[_Phrase]:
    """The phrases as the windows that are not held out show them."""
    out = set(np.flatnonzero(held[:activating]).tolist())
    others = set(np.flatnonzero(held[activating:]).tolist())
    return [
        _Phrase(p.text, p.activating - out, p.silent - others, p.at - out, p.ahead - out)
        for p in phrases
    ]


def _scale(phrases: Sequence[_Phrase], away: float) -> Float[np.ndarray, " phrases"]:
    """The standard deviation of each phrase's weight before the data, in nats."""
    # A phrase of two words that always stand together counts as both would.
    scale = [(p.text.count(" ") + 1) ** 0.5 * (1.0 if p.beside else away) for p in phrases]
    return np.array(scale, dtype=float)


def _logistic(
    present: Bool[np.ndarray, "windows phrases"],
    scale: Float[np.ndarray, " phrases"],
    active: Bool[np.ndarray, " windows"],
) -> tuple[Float[np.ndarray, " phrases"], float]:
    """Weights and intercept of a logistic regression, each weight N(0, scale^2) before the data.

    Both kinds of window weigh as if they were equally many, so that 0 parts them. By Newton's
    method.
    """
    features = present[:, : len(scale)] * scale
    # Along other axes than those the windows span the weights stay 0.
    axes = np.eye(len(scale))
    if len(features) < len(scale):
        axes = np.linalg.svd(features, full_matrices=False)[2]
    x = np.hstack([features @ axes.T, np.ones((len(features), 1))])
    share = np.where(active, 0.5 / active.mean(), 0.5 / (1 - active.mean()))
    prior = np.append(np.ones(x.shape[1] - 1), 1e-3)
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (share * (p - active)) + prior * w
        curvature = (x.T * (share * p * (1 - p))) @ x + np.diag(prior)
        step = np.linalg.solve(curvature, gradient)
        w -= step
        if np.abs(step).max() < 1e-6:
            break
    return (w[:-1] @ axes) * scale, float(w[-1])


def _present(
    phrases: Sequence[_Phrase], windows: Sequence[_Window]
) -> Bool[np.ndarray, "windows phrases"]:
    """Which phrases a reader finds in which windows: of two that overlap the longer."""
    number = {phrase.text: i for i, phrase in enumerate(phrases)}
    present = np.zeros((len(windows), len(phrases)), dtype=bool)
    for row, window in zip(present, windows, strict=True):
        row[[number[text] for _, _, text in find_phrases(window.words, number)]] = True
    return present


def _where(speaking: Sequence[_Phrase]) -> str:
    """How the sentence begins: where the phrases stand that it names."""
    windows, at, beside = (
        sum(phrase.weight * len(held(phrase)) for phrase in speaking[:NAMED])
        for held in (
            lambda phrase: phrase.activating,
            lambda phrase: phrase.at,
            lambda phrase: phrase.at | phrase.ahead,
        )
    )
    if 2 * at >= windows:
        return "Active on"
    return "Active right after" if 2 * beside >= windows else "Active in texts after"


def _named(phrases: Sequence[_Phrase]) -> str:
    top = phrases[:NAMED]
    more = len(phrases) - len(top)
    return ", ".join(f"“{phrase.text}”" for phrase in top) + (f" and {more} more" if more else "")
