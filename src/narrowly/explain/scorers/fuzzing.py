"""Fuzzing: does a reader see whether the right tokens are marked?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Literal

from narrowly.explain.readers import Passage, Reader
from narrowly.explain.record import Example, ScoreResult
from narrowly.explain.scorers.base import SCORERS, Item, Scorer
from narrowly.explain.scorers.judging import Judged, judge_all, rng_of
from narrowly.explain.words import marks

TASK = (
    "In each passage some tokens are marked. Decide of each passage whether all that is marked is "
    "what the explanation describes."
)


@SCORERS.register("fuzzing")
class Fuzzing(Scorer):
    """Balanced accuracy at telling rightly marked windows from wrongly marked ones.

    Paulo et al. 2025 (arXiv 2410.13928), section 3.2. Marked are the tokens above 0.3 of the
    window's peak. A wrong marking has the pattern of an activating window, moved by a random
    distance, so that neither the number of marks nor how they lie together gives it away.
    """

    name: ClassVar[str] = "fuzzing"

    wrong: Literal["silent", "active"] = "silent"
    """Where wrong marks are: on silent windows; or, which is harder, on tokens of activating ones
    where the latent is silent. Then half of the activating windows are marked wrongly."""

    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """A result per item; AUROC too where the reader gives probabilities."""
        passages = [self._marked(item) for item in items]
        results = judge_all(self.name, TASK, items, passages, reader, self.seed)
        if self.wrong == "silent":
            return results
        return [
            result.model_copy(update={"note": _left_out(item, judged) or result.note})
            for item, judged, result in zip(items, passages, results, strict=True)
        ]

    def _marked(self, item: Item) -> list[Judged]:
        rng = rng_of(self.name, self.seed, item)
        patterns = [marks(example) for example in item.activating]
        if self.wrong == "silent":
            right = item.activating
            wrong = [
                Judged(
                    Passage(example.pieces, moved(rng.choice(patterns), len(example.pieces), rng)),
                    False,
                    example.group,
                )
                for example in item.silent
                if patterns
            ]
        else:
            # By peak, every second one: both halves hold every quantile.
            mixed = rng.sample(item.activating, len(item.activating))
            ordered = sorted(mixed, key=lambda example: example.peak)
            right = tuple(ordered[::2])
            wrong = [
                Judged(Passage(example.pieces, elsewhere), False, "wrong marks")
                for example in ordered[1::2]
                if (elsewhere := silent_marks(example, rng)) is not None
            ]
        return [Judged(Passage(e.pieces, marks(e)), True, e.group) for e in right] + wrong


def moved(pattern: Sequence[bool], length: int, rng: random.Random) -> tuple[bool, ...]:
    """A pattern of marks on a window of `length` tokens, turned by a random distance."""
    fitted = [*pattern, *[False] * length][:length]
    if not any(fitted):
        fitted[0] = True
    by = rng.randrange(length)
    return tuple(fitted[by:] + fitted[:by])


def silent_marks(example: Example, rng: random.Random) -> tuple[bool, ...] | None:
    """As many marks as the window has active tokens, on tokens where the latent is silent.

    As many as there are such tokens, where they are fewer; None where there is none.
    """
    silent = [i for i, activation in enumerate(example.activations) if activation <= 0]
    if not silent:
        return None
    chosen = set(rng.sample(silent, min(sum(marks(example)), len(silent))))
    return tuple(i in chosen for i in range(len(example.pieces)))


def _left_out(item: Item, judged: Sequence[Judged]) -> str:
    missing = len(item.activating) - len(judged)
    if not missing:
        return ""
    return f"{missing} windows have no silent token to mark wrongly, and are left out"
