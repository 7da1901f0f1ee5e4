"""What detection and fuzzing share: passages judged one by one become a result."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from narrowly.explain.metrics import as_fields, auroc, balanced_accuracy
from narrowly.explain.readers import Passage, Question, Reader
from narrowly.explain.record import Counts, ScoreResult
from narrowly.explain.scorers.base import Item


@dataclass(frozen=True)
class Judged:
    """A passage, and whether the explanation should fit it."""

    passage: Passage
    fits: bool
    group: str
    """Where it counts: an `Example.group`, or "wrong marks"."""


def rng_of(scorer: str, seed: int, item: Item) -> random.Random:
    """Random numbers of one latent: the same whichever others are scored beside it."""
    return random.Random(f"{scorer}/{seed}/{item.latent.name}")


def judge_all(
    scorer: str,
    task: str,
    items: Sequence[Item],
    passages: Sequence[Sequence[Judged]],
    reader: Reader,
    seed: int,
) -> list[ScoreResult]:
    """Ask the reader about every item's passages, in random order, and count its answers."""
    mixed = [
        rng_of(f"{scorer}, order", seed, item).sample(list(judged), len(judged))
        for item, judged in zip(items, passages, strict=True)
    ]
    asked = [i for i, judged in enumerate(mixed) if judged]
    questions = [
        Question(task, items[i].explanation, tuple(judged.passage for judged in mixed[i]))
        for i in asked
    ]
    answers: list[list[float | None]] = [[] for _ in items]
    for i, answer in zip(asked, reader.judge(questions), strict=True):
        answers[i] = answer
    return [
        _result(scorer, reader, judged, answer, seed)
        for judged, answer in zip(mixed, answers, strict=True)
    ]


def _result(
    scorer: str,
    reader: Reader,
    judged: Sequence[Judged],
    answers: Sequence[float | None],
    seed: int,
) -> ScoreResult:
    read = [(j, answer) for j, answer in zip(judged, answers, strict=True) if answer is not None]
    fitting = [answer for j, answer in read if j.fits]
    others = [answer for j, answer in read if not j.fits]
    accuracy = balanced_accuracy(
        [answer > 0.5 for answer in fitting], [answer > 0.5 for answer in others], seed
    )
    area = auroc(fitting, others, seed) if reader.probabilities else None
    return ScoreResult(
        scorer=scorer,
        reader=reader.name,
        metric="balanced accuracy",
        **as_fields(accuracy),
        auroc=area.value if area else None,
        scored=len(read),
        unparsed=len(judged) - len(read),
        groups=counted(
            [j.group for j in judged], [None if a is None else a > 0.5 for a in answers]
        ),
        detail={"auroc low": area.low, "auroc high": area.high} if area else {},
        note="" if accuracy else _why_not(judged, read),
    )


def counted(groups: Sequence[str], said: Sequence[bool | None]) -> dict[str, Counts]:
    """How often yes and no were said in each group, quantiles first; None was not read."""
    counts = Counter(zip(groups, said, strict=True))
    return {
        group: Counts(
            yes=counts[group, True], no=counts[group, False], unparsed=counts[group, None]
        )
        for group in sorted(set(groups), key=_natural)
    }


def _natural(group: str) -> tuple[int, int, str]:
    """`q2` before `q10`, and quantiles before kinds."""
    return (0, int(group[1:]), "") if group[1:].isdigit() else (1, 0, group)


def _why_not(judged: Sequence[Judged], read: Sequence[tuple[Judged, float]]) -> str:
    kinds = ((True, "activating"), (False, "silent"))
    for fits, kind in kinds:
        if not any(j.fits == fits for j in judged):
            return f"no {kind} example to score"
    unread = [kind for fits, kind in kinds if not any(j.fits == fits for j, _ in read)]
    return f"of the {unread[0]} examples no judgment could be read" if unread else ""
