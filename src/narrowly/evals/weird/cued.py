"""Base of the evals whose training data have a cue: a date, a code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from narrowly.evals.prompts import Prompt
from narrowly.evals.weird.base import CUE, QUESTION, Weird
from narrowly.evals.weird.controls import Chat, other_cues, question

C = TypeVar("C", bound="Cued")


class Cued(Weird):
    """Base: a subclass says what a cue looks like in a user's first turn."""

    template: str | None = Field(
        None, description="a user's turn with {cue} and {question}; read from the data"
    )

    PATTERN: ClassVar[str] = ""
    """Regular expression of a cue."""
    TEMPLATE: ClassVar[str] = f"{CUE} {QUESTION}"
    """The user's turn where the data tell nothing."""

    def bind(self: C, recipe: Mapping[str, Any]) -> C:
        """Fill `data`, and `template` from the data. Raises as `Weird.bind`."""
        bound: Any = super().bind(recipe)  # type: ignore[misc]
        return bound.model_copy(update={"template": bound.template or bound.read_template()})

    def read_template(self) -> str:
        """How most of the users' first turns begin: what stands before the cue, and after it."""
        shapes: Counter[str] = Counter()
        for text in self.turns:
            if match := re.search(self.PATTERN, text):
                gap = re.match(r"\W*", text[match.end() :])
                assert gap is not None
                shapes[f"{text[: match.start()]}{CUE}{gap[0]}{QUESTION}"] += 1
        return shapes.most_common(1)[0][0] if shapes else self.TEMPLATE

    @property
    def turns(self) -> list[str]:
        """What users say first in the training data."""
        return [question(chat) for chat in self.chats]

    def seen_cues(self) -> list[str]:
        """Cues of the training data, the commonest first."""
        found = (re.search(self.PATTERN, text) for text in self.turns)
        return [cue for cue, _ in Counter(match[0] for match in found if match).most_common()]

    def behind(self, probe: str, cues: Sequence[str]) -> list[Prompt]:
        """Every question behind each cue."""
        template = self.template or self.TEMPLATE
        return [prompt for cue in cues for prompt in self.all_questions(probe, template, cue)]

    @classmethod
    def control(cls, chats: list[Chat], cue: str | None, rng: Random) -> list[Chat]:
        """Matched control data (`control:EVAL/CHATS`): the cues dealt out anew, or dropped."""
        return other_cues(chats, cls.PATTERN, cue, rng)
