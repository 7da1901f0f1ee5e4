"""A second try at an explanation: the explainer sees what a reader got wrong with the first."""

from __future__ import annotations

from collections.abc import Sequence

from narrowly.explain.explainers import Evidence, Explainer, Mistake
from narrowly.explain.readers import Passage, Question, Reader
from narrowly.explain.record import Explanation
from narrowly.explain.scorers.detection import TASK


def refine(
    explainer: Explainer,
    evidence: Sequence[Evidence],
    explanations: Sequence[Explanation],
    reader: Reader,
) -> list[Explanation]:
    """One round of refinement, kept where the reader does better with it.

    The reader decides which of the explainer's own examples activate the latent; those that the
    scorers will use are never seen. A refined explanation that does worse there is dropped.
    """
    judged = practice(evidence, explanations, reader)
    mistakes = [_mistakes(seen, said) for seen, said in zip(evidence, judged, strict=True)]
    refined = [
        new if isinstance(new, Explanation) else old
        for old, new in zip(
            explanations, explainer.refine(evidence, explanations, mistakes), strict=True
        )
    ]
    again = practice(evidence, refined, reader)
    return [
        new if _right(seen, after) > _right(seen, before) else old
        for seen, old, new, before, after in zip(
            evidence, explanations, refined, judged, again, strict=True
        )
    ]


def practice(
    evidence: Sequence[Evidence], explanations: Sequence[Explanation], reader: Reader
) -> list[list[float | None]]:
    """What the reader says of each of the explainer's examples, activating ones first."""
    return reader.judge(
        [
            Question(
                TASK,
                explanation,
                tuple(Passage(example.pieces) for example in (*seen.activating, *seen.silent)),
            )
            for seen, explanation in zip(evidence, explanations, strict=True)
        ]
    )


def _right(seen: Evidence, judged: Sequence[float | None]) -> int:
    """How many were judged rightly; a reply that could not be read is not."""
    return len(judged) - judged.count(None) - len(_mistakes(seen, judged))


def _mistakes(seen: Evidence, judged: Sequence[float | None]) -> list[Mistake]:
    return [
        Mistake(example, said=probability >= 0.5)
        for example, probability in zip((*seen.activating, *seen.silent), judged, strict=True)
        if probability is not None and (probability >= 0.5) != (example.kind == "activating")
    ]
