"""Intruder: can a reader tell, without an explanation, which window does not belong?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from narrowly.explain.metrics import as_fields, mean_over_latents
from narrowly.explain.readers import Passage, Reader
from narrowly.explain.record import Example, ScoreResult
from narrowly.explain.scorers.base import SCORERS, Item, Scorer
from narrowly.explain.scorers.fuzzing import moved
from narrowly.explain.scorers.judging import counted, rng_of
from narrowly.explain.words import marks


@dataclass(frozen=True)
class _Set:
    passages: tuple[Passage, ...]
    intruder: int
    group: str


@SCORERS.register("intruder")
class Intruder(Scorer):
    """How often a silent window is found among activating ones of one quantile.

    Paulo & Belrose 2025 (arXiv 2507.08473). It asks for no explanation, so it says how far a latent
    can be explained at all: an explanation with low scores of a latent with a high one can be
    bettered. Active tokens are marked, and as many of the intruder's. Every window is used once at
    most. Chance is one in `size`, and stands in `detail`.
    """

    name: ClassVar[str] = "intruder"
    explained: ClassVar[bool] = False

    size: int = Field(5, ge=3)
    """Windows in a set, the intruder among them."""

    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """A result per item; the counts are of intruders found, by the others' quantile."""
        sets = [self._sets(item) for item in items]
        asked = [one.passages for each in sets for one in each]
        answers = iter(reader.odd_one_out(asked) if asked else [])
        return [self._result([(one, next(answers)) for one in each], reader) for each in sets]

    def _sets(self, item: Item) -> list[_Set]:
        rng = rng_of(self.name, self.seed, item)
        silent = rng.sample(item.silent, len(item.silent))
        quantiles: defaultdict[str, list[Example]] = defaultdict(list)
        for example in rng.sample(item.activating, len(item.activating)):
            quantiles[example.group].append(example)
        sets = []
        for group, examples in sorted(quantiles.items()):
            for start in range(0, len(examples) - self.size + 2, self.size - 1):
                if not silent:
                    break
                others = examples[start : start + self.size - 1]
                odd = silent.pop()
                pattern = moved(marks(rng.choice(others)), len(odd.pieces), rng)
                passages = [Passage(example.pieces, marks(example)) for example in others]
                place = rng.randrange(self.size)
                passages.insert(place, Passage(odd.pieces, pattern))
                sets.append(_Set(tuple(passages), place, group))
        return sets

    def _result(self, answers: Sequence[tuple[_Set, int | None]], reader: Reader) -> ScoreResult:
        said = [None if answer is None else answer == one.intruder for one, answer in answers]
        found = [float(answer) for answer in said if answer is not None]
        accuracy = mean_over_latents(found, self.seed)
        note = ""
        if not answers:
            note = f"no quantile has {self.size - 1} windows to hide a silent one among"
        elif not accuracy:
            note = "no reply could be read"
        return ScoreResult(
            scorer=self.name,
            reader=reader.name,
            metric="accuracy",
            **as_fields(accuracy),
            scored=len(found),
            unparsed=len(answers) - len(found),
            groups=counted([one.group for one, _ in answers], said),
            detail={"chance": 1 / self.size},
            note=note,
        )
