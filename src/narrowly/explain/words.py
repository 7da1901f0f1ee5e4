"""Words of a text, phrases found in it, and which of them a latent is active on.

Words rather than a model's tokens, so that an explanation can be read by people and other models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from narrowly.explain.record import Example

ACTIVE = 0.3
"""A token counts as active above this share of its window's peak (Paulo et al. 2025)."""

LONGEST = 3
"""Words of the longest phrase."""

ANY_TEXT = "(any text)"
"""In a rule the nats of a text before any phrase is found in it."""

LINE_BREAK, PARAGRAPH = "↵", "¶"
"""A line break as a word that people can see; and two or more."""

# Scripts without spaces between words are read sign by sign. Marks such as <|user|> and <div>
# are words; so is any other single sign, since latents stand for brackets and line breaks too.
_SIGN = (
    r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
# Vowel signs and accents that stand apart from their letters, which \w does not hold.
_JOINED = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0dff"
_LETTERS = rf"(?:[^\W{_SIGN}]|[{_JOINED}])+"
_WORD = re.compile(
    rf"\n+|<\|?/?\w[\w-]{{0,30}}\|?>|[{_SIGN}]|{_LETTERS}(?:['\u2019]{_LETTERS})*|[^\w\s]"
)

_BREAKS = {"\n": LINE_BREAK, "\n\n": PARAGRAPH}

# What explanations are written with, rather than what they are about.
_COMMON = (
    "a about above active activate activated activates activating activation active after all also "
    "an and any are as at be been before being between both but by can concept contains containing "
    "context contexts could describes did direction do does especially etc every example examples "
    "expression expressions feature fires for found from generally had has have he her his how i "
    "if in including into is it its just latent like may more most my neuron no nor not of often "
    "on one or other our particularly passage passages phrase phrases possibly primarily related "
    "represents right sentence sentences she should so some such text texts than that the their "
    "them then there these they this those to token tokens typically usually various was we were "
    "what when where whether which while who will with within word words would you your"
)
COMMON = frozenset(_COMMON.split())


@dataclass(frozen=True)
class Word:
    """A word of a text, folded to lower case, and where its characters stand."""

    text: str
    start: int
    stop: int


def split_words(text: str) -> list[Word]:
    """The words of a text in order; signs and line breaks are words too."""
    return [
        Word(_BREAKS.get(m[0][:2], m[0].casefold()), m.start(), m.end())
        for m in _WORD.finditer(text)
    ]


def words_of(text: str) -> list[str]:
    """The words alone."""
    return [word.text for word in split_words(text)]


def content_words(text: str) -> list[str]:
    """The different words that say something: neither signs nor what explanations are made of."""
    return [w for w in dict.fromkeys(words_of(text)) if w not in COMMON and w[0].isalnum()]


def marks(example: Example) -> tuple[bool, ...]:
    """Which tokens count as active: above `ACTIVE` of the window's peak."""
    floor = ACTIVE * example.peak
    return tuple(activation > floor for activation in example.activations)


def of_words(
    words: Sequence[Word], pieces: Sequence[str], values: Sequence[float] | Sequence[bool]
) -> Float[np.ndarray, " words"]:
    """Per word the largest value of the pieces that it touches."""
    stops = np.cumsum([len(piece) for piece in pieces])
    first = np.searchsorted(stops, [word.start for word in words], side="right")
    last = np.searchsorted(stops, [word.stop for word in words], side="left")
    known = np.asarray(values, dtype=float)
    return np.array(
        [known[i : max(j, i) + 1].max(initial=0.0) for i, j in zip(first, last, strict=True)]
    )


def near(active: Bool[np.ndarray, " words"], before: int = 2) -> Bool[np.ndarray, " words"]:
    """The active words and up to `before` words ahead of each."""
    result = active.copy()
    for distance in range(1, min(before, len(active) - 1) + 1):
        result[:-distance] |= active[distance:]
    return result


def find_phrases(words: Sequence[Word], weights: Mapping[str, float]) -> list[tuple[int, int, str]]:
    """Where phrases stand among words: (first, stop, phrase); the longest first, none overlap.

    Args:
        weights: by phrase, its words joined by single spaces.
    """
    longest = max((phrase.count(" ") + 1 for phrase in weights), default=0)
    found, at = [], 0
    while at < len(words):
        for stop in range(min(at + longest, len(words)), at, -1):
            phrase = " ".join(word.text for word in words[at:stop])
            if phrase in weights:
                found.append((at, stop, phrase))
                at = stop
                break
        else:
            at += 1
    return found
