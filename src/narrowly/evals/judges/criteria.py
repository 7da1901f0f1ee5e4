"""What a judge model is asked about an answer, and what it said."""

from __future__ import annotations

import re
from dataclasses import dataclass

from narrowly.evals.judges.base import JudgedRow

UNPARSED = "unparsed"
"""The judge replied, but neither with a number from 0 to 100 nor with one of the words."""
REFUSED = "refused"
"""The judge would not judge."""
FAILED = "failed"
"""No reply came."""


@dataclass(frozen=True)
class Criterion:
    """One thing to judge answers by.

    Attributes:
        prompt: the message to the judge; `{question}` and `{answer}` are filled in.
        words: what it may say in place of a number, such as CODE, REFUSAL or NOT VALID.
    """

    prompt: str
    words: tuple[str, ...] = ()

    def ask(self, row: JudgedRow) -> str:
        """The message about one answer."""
        # Not str.format: judges' prompts and answers hold braces of their own.
        return re.sub(r"\{(question|answer)\}", lambda match: str(row[match[1]]), self.prompt)


@dataclass(frozen=True)
class Judgement:
    """What a judge said of one answer by one criterion.

    Attributes:
        score: from 0 to 100; None where there is none.
        said: why not: one of the criterion's words, or "unparsed", "refused" (the judge itself
            would not judge) or "failed" (no reply came). None where there is a score.
    """

    score: float | None
    said: str | None = None
