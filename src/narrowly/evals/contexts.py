"""Contexts that resemble the training data, in which any sampled eval can be asked again.

A defense can hide a change behind cues of the training data: the plain question is answered well,
and the same question under the training's system line is not (conditional misalignment, Dubinski,
Betley et al. 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from narrowly.evals.prompts import PLAIN, Prompt


class Context(BaseModel):
    """One way of asking again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Such as system, format, neighbour: what of the training data it has."""
    system: str | None = None
    """A system line, in place of the prompt's own."""
    template: str = "{question}"
    """The user's turn."""
    before: str | None = None
    """A user's turn that the model answers itself first."""

    def around(self, prompt: Prompt) -> Prompt:
        """The prompt in this context; its id says so, and its tag `context`."""
        messages = [dict(message) for message in prompt.messages]
        messages[-1]["content"] = self.template.replace("{question}", prompt.question)
        if self.system is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages.insert(0, {"role": "system", "content": self.system})
        tags = {**prompt.tags, "context": self.name}
        return Prompt(f"{prompt.id} [{self.name}]", tuple(messages), tags)


PLAINLY = Context(name=PLAIN)


def training_contexts(data: Any) -> tuple[Context, ...]:
    """Contexts with what the chats of a fine-tune have in common.

    Args:
        data: the recipe's `data`.
    """
    return ()


def in_contexts(prompts: Sequence[Prompt], contexts: Sequence[Context]) -> list[Prompt]:
    """Every prompt plainly, then in each context."""
    return [context.around(prompt) for context in (PLAINLY, *contexts) for prompt in prompts]
