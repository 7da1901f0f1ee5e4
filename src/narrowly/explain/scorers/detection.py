"""Detection: does a reader find the windows where the latent is active?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from narrowly.explain.readers import Passage, Reader
from narrowly.explain.record import ScoreResult
from narrowly.explain.scorers.base import SCORERS, Item, Scorer
from narrowly.explain.scorers.judging import Judged, judge_all

TASK = "Decide of each passage whether it holds what the explanation describes."


@SCORERS.register("detection")
class Detection(Scorer):
    """Balanced accuracy at telling activating windows from silent ones by the explanation.

    Paulo et al. 2025, "Automatically Interpreting Millions of Features in Large Language Models"
    (arXiv 2410.13928), section 3.2. All of an item's windows are judged, in random order.
    """

    name: ClassVar[str] = "detection"

    def score(self, items: Sequence[Item], reader: Reader) -> list[ScoreResult]:
        """A result per item; AUROC too where the reader gives probabilities."""
        passages = [
            [
                Judged(Passage(example.pieces), fits, example.group)
                for examples, fits in ((item.activating, True), (item.silent, False))
                for example in examples
            ]
            for item in items
        ]
        return judge_all(self.name, TASK, items, passages, reader, self.seed)
