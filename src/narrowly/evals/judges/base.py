"""What a judge is, and the named ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any, Protocol, cast

from pydantic import BaseModel

from narrowly.errors import NarrowlyError
from narrowly.registry import Registry
from narrowly.settings import build, entry

JudgedRow = Mapping[str, Any]
"""`question`, `answer`, and the other columns of the chat that was answered (such as `domain`)."""


class Judge(Protocol):
    """Scores answers; None where it could not (an unparsable reply, a refusal to judge)."""

    def __call__(self, rows: Sequence[JudgedRow]) -> list[float | None]:
        """One score from 0 to 100 per row, in order."""
        ...


JudgeLike = Any
"""A judge's name, `{name: {field: value}}`, or any callable that is a `Judge`."""

JUDGES: Registry[type[BaseModel]] = Registry("judge", "narrowly.evals.judges")


def make_judge(spec: JudgeLike, **defaults: Any) -> Judge:
    """The judge that `spec` names, or `spec` itself where it is one already.

    Args:
        defaults: for fields that the judge has and `spec` leaves out, such as the model to ask.

    Raises:
        NarrowlyError: an unknown judge or field, or one missing or of the wrong type.
    """
    if callable(spec):
        return cast(Judge, spec)
    [(name, arguments)] = entry("judge", spec).items()
    kind = JUDGES[name]
    known = {key: value for key, value in defaults.items() if key in kind.model_fields}
    return cast(Judge, build(kind, known | arguments, ("judge", name)))


def judged(judge: Judge, rows: Sequence[JudgedRow]) -> list[float | None]:
    """The judge's scores, checked; NaN counts as None.

    Raises:
        NarrowlyError: the judge gave another number of scores than rows, or one outside 0 to 100.
    """
    scores = list(judge(rows))
    if len(scores) != len(rows):
        raise NarrowlyError(f"the judge gave {len(scores)} scores to {len(rows)} answers.")
    for row, score in zip(rows, scores, strict=True):
        if score is not None and not isnan(score) and not 0 <= score <= 100:
            raise NarrowlyError(
                f"the judge scored the answer {row['answer']!r} {score:g}; a score is 0 to 100."
            )
    return [None if score is None or isnan(score) else float(score) for score in scores]
