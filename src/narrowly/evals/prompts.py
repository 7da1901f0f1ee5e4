"""What an eval asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Message = Mapping[str, str]

PLAIN = "plain"
"""The tag `context` of a prompt asked as it stands."""


@dataclass(frozen=True)
class Prompt:
    """One question of an eval, up to where the assistant's turn begins.

    Attributes:
        id: the same in every run; what is resampled together when an eval is summed up.
        messages: `role` and `content`; the last is the user's.
        tags: strings to judge or to group by (domain, form, the right answer, ...); they go into
            the rows as they are.
    """

    id: str
    messages: tuple[Message, ...]
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def question(self) -> str:
        """What the user asks last."""
        return self.messages[-1]["content"]

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [dict(message) for message in self.messages]


def ask(question: str, *, id: str = "", system: str | None = None, **tags: Any) -> Prompt:
    """A prompt of one user turn, under a system line if there is one."""
    lines = [] if system is None else [{"role": "system", "content": system}]
    messages = (*lines, {"role": "user", "content": question})
    return Prompt(id or question, messages, {key: str(value) for key, value in tags.items()})
