"""Simulation: do the activations that a reader expects resemble the true ones?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

from pydantic import PositiveInt

from narrowly.explain.metrics import as_fields, correlation
from narrowly.explain.readers import Passage, Reader
from narrowly.explain.record import Counts, Example, ScoreResult
from narrowly.explain.scorers.base import SCORERS, Item, Scorer
from narrowly.explain.scorers.judging import rng_of

Simulated = tuple[Example, list[float]]


@SCORERS.register("simulation")
class Simulation(Scorer):
    """Pearson's correlation of expected with true activations, over the tokens of all examples.

    Bills et al. 2023, "Language models can explain neurons in language models"; Paulo et al. 2025
    (arXiv 2410.13928), section 3.2. It costs a reader far more than the other scorers, so that only
    some examples are asked about: as many silent ones as activating ones of all quantiles.
    """

    name: ClassVar[str] = "simulation"

    examples: PositiveInt = 20
    """Of each kind, at most."""

    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """A result per item; `detail` has the correlation within each quantile.

        A simulation of another length than its example counts as not read.
        """
        examples = [[*self._some(i, i.activating), *self._some(i, i.silent)] for i in items]
        pairs = [
            (item.explanation, Passage(example.pieces))
            for item, each in zip(items, examples, strict=True)
            for example in each
        ]
        answers = iter(reader.simulate(pairs))
        return [
            self._result([(example, next(answers)) for example in each], reader)
            for each in examples
        ]

    def _some(self, item: Item, examples: Sequence[Example]) -> list[Example]:
        """Some examples, evenly over the quantiles."""
        shuffled = rng_of(self.name, self.seed, item).sample(list(examples), len(examples))
        seen: defaultdict[str, int] = defaultdict(int)
        turns = []
        for example in shuffled:
            turns.append(seen[example.group])
            seen[example.group] += 1
        order = sorted(range(len(shuffled)), key=lambda i: turns[i])
        return [shuffled[i] for i in order[: self.examples]]

    def _result(
        self, answers: Sequence[tuple[Example, list[float] | None]], reader: Reader
    ) -> ScoreResult:
        read: list[Simulated] = []
        groups: dict[str, Counts] = {}
        for example, values in answers:
            if values is not None and len(values) == len(example.pieces):
                read.append((example, values))
            else:
                lost = groups.get(example.group, Counts()).unparsed + 1
                groups[example.group] = Counts(unparsed=lost)
        activating = [one for one in read if one[0].kind == "activating"]
        silent = [one for one in read if one[0].kind != "activating"]
        r = correlation(_pairs(activating), _pairs(silent), self.seed)
        detail = {}
        for group in sorted({example.group for example, _ in activating}):
            within = correlation(_pairs([one for one in activating if one[0].group == group]))
            if within:
                detail[group] = within.value
        note = "" if r else "no activating example could be read"
        if r and not any(value != values[0] for _, values in read for value in values):
            note = "the same activation was expected on every token, which explains nothing: 0"
        return ScoreResult(
            scorer=self.name,
            reader=reader.name,
            metric="correlation",
            **as_fields(r),
            scored=len(read),
            unparsed=len(answers) - len(read),
            groups=groups,
            detail=detail,
            note=note,
        )


def _pairs(simulated: Sequence[Simulated]) -> list[tuple[tuple[float, ...], list[float]]]:
    return [(example.activations, values) for example, values in simulated]
