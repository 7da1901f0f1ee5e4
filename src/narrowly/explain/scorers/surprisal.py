"""Surprisal: does an explanation make activating windows less surprising?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from narrowly.explain.readers import Passage, Reader
from narrowly.explain.record import Explanation, ScoreResult
from narrowly.explain.scorers.base import SCORERS, Item, Scorer
from narrowly.explain.scorers.ranking import ranked

EMPTY = Explanation(text="Various unrelated sentences.", by="control: nothing in common")


@SCORERS.register("surprisal")
class Surprisal(Scorer):
    """AUROC of the information that an explanation gives of a window.

    Paulo et al. 2025 (arXiv 2410.13928), section 3.2: log p(x | z) - log p(x | z0) for window x,
    explanation z and the explanation z0 that says nothing, "Various unrelated sentences.", all by a
    reader that knows the probability of texts.
    """

    name: ClassVar[str] = "surprisal"

    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """A result per item."""
        examples = [[*item.activating, *item.silent] for item in items]
        passages = [[Passage(example.pieces) for example in each] for each in examples]
        # A text that several items use is asked about without an explanation once.
        distinct = list(dict.fromkeys(passage for each in passages for passage in each))
        pairs = [
            (item.explanation, passage)
            for item, each in zip(items, passages, strict=True)
            for passage in each
        ]
        answers = reader.text_given_explanation([*pairs, *((EMPTY, p) for p in distinct)])
        without = dict(zip(distinct, answers[len(pairs) :], strict=True))
        given = iter(answers[: len(pairs)])
        results = []
        for item_examples, each in zip(examples, passages, strict=True):
            values = [_difference(next(given), without[passage]) for passage in each]
            results.append(ranked(self.name, reader.name, item_examples, values, self.seed))
        return results


def _difference(nats: float | None, without: float | None) -> float | None:
    return None if nats is None or without is None else nats - without
