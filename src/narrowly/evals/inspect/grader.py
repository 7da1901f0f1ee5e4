"""A model of Inspect as the chat model that a judge asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
)

from narrowly.errors import NarrowlyError
from narrowly.models.messages import Reply, Request

ROLES: dict[str, type[Any]] = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


def chat_messages(chat: Sequence[dict[str, str]]) -> list[ChatMessage]:
    """A chat as Inspect has it."""
    return [ROLES[message["role"]](content=message["content"]) for message in chat]


class Grader:
    """A `ChatModel` that asks a model of Inspect, so that it is in the log as any other call.

    `ask` must be called from a thread that Inspect's event loop waits for, as scorers do.
    """

    def __init__(self, model: Model):
        self.model = model

    @property
    def name(self) -> str:
        """The model's, with its provider."""
        return str(self.model)

    def ask(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        """A reply to each, in order."""
        return [anyio.from_thread.run(self._ask, request) for request in requests]

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], progress: str | None = None
    ) -> list[float | None]:
        """Not told by Inspect's models."""
        raise NarrowlyError(f"{self.name}: Inspect does not tell the likelihood of given texts.")

    async def _ask(self, request: Request) -> Reply:
        told = request.top_logprobs > 0
        config = GenerateConfig(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            logprobs=True if told else None,
            top_logprobs=request.top_logprobs if told else None,
        )
        return _reply(await self.model.generate(chat_messages(request.messages), config=config))


def _reply(output: ModelOutput) -> Reply:
    if not output.choices or output.stop_reason == "content_filter":
        reason = output.error or f"no text (finish_reason {output.stop_reason})"
        return Reply(None, reason)
    logprobs = output.choices[0].logprobs
    tokens = [] if logprobs is None else logprobs.content
    alternatives = [
        {token.token: token.logprob} | {one.token: one.logprob for one in token.top_logprobs or ()}
        for token in tokens
    ]
    return Reply(
        output.completion,
        logprobs=tuple(alternatives) or None,
        cut=output.stop_reason == "max_tokens",
    )
