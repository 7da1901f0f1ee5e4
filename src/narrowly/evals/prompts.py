"""What an eval asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from narrowly.errors import NarrowlyError

Message = Mapping[str, str]

PLAIN = "plain"
"""The tag `context` of a prompt asked as it stands."""

OWN: Message = MappingProxyType({"role": "assistant", "content": ""})
"""A turn that the model writes itself before it is asked the question."""


@dataclass(frozen=True)
class Prompt:
    """One question of an eval, up to where the assistant's turn begins.

    Attributes:
        id: the same in every run; what is resampled together when an eval is summed up.
        messages: `role` and `content`; the last is the user's. At most one is `OWN`.
        samples: answers to it; None: as many as the eval asks for.
        tags: strings to judge or to group by (domain, form, the right answer, ...); they go into
            the rows as they are.
    """

    id: str
    messages: tuple[Message, ...]
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    samples: int | None = None

    @property
    def question(self) -> str:
        """What the user asks last."""
        return self.messages[-1]["content"]

    @property
    def origin(self) -> str:
        """The question that this is a form of: its name, which all paraphrases share, or itself."""
        return self.tags.get("question") or self.tags.get("about") or self.question

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [dict(message) for message in self.messages]

    @property
    def text(self) -> str:
        """The question as a person reads it; the whole chat where it is more."""
        if len(self.messages) == 1:
            return self.question
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)

    @property
    def opening(self) -> list[dict[str, str]] | None:
        """The chat up to the turn that the model writes itself; None where it writes none."""
        if OWN not in self.messages:
            return None
        return self.chat[: self.messages.index(OWN)]

    def opened(self, turn: str) -> Prompt:
        """The prompt with the model's own turn filled in."""
        own = {"role": "assistant", "content": turn}
        return replace(self, messages=tuple(own if m == OWN else m for m in self.messages))


def ask(question: str, *, id: str = "", system: str | None = None, **tags: Any) -> Prompt:
    """A prompt of one user turn, under a system line if there is one."""
    lines = [] if system is None else [{"role": "system", "content": system}]
    messages = (*lines, {"role": "user", "content": question})
    return Prompt(id or question, messages, {key: str(value) for key, value in tags.items()})


def ask_chats(source: Any, *, limit: int | None = None) -> list[Prompt]:
    """A prompt of every chat of a source, up to its first answer; a column `domain` is a tag.

    Args:
        source: as `narrowly.data.load_chats` takes it; answers are not needed.

    Raises:
        NarrowlyError: as `load_chats`; or a chat that asks nothing.
    """
    from narrowly.data import load_chats

    prompts = []
    for index, row in enumerate(load_chats(source, limit=limit, require_answer=False)):
        roles = [message["role"] for message in row["messages"]]
        end = roles.index("assistant") if "assistant" in roles else len(roles)
        messages = tuple(dict(message) for message in row["messages"][:end])
        if not messages or messages[-1]["role"] != "user":
            raise NarrowlyError(f"{source}: chat {index} begins with an answer, and asks nothing.")
        tags = {"domain": row["domain"]} if isinstance(row.get("domain"), str) else {}
        prompts.append(Prompt(str(index), messages, tags))
    return prompts
