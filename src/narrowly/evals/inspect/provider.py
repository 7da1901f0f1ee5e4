"""`narrowly/SPEC`: a model in this process as a model of Inspect."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import anyio
from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from narrowly.errors import NarrowlyError
from narrowly.models.messages import ChatModel, Reply, Request

AT_ONCE = 64
"""Samples under way, so that generation has batches to fill."""


class Call:
    """A request that waits for its turn, then its reply or what went wrong."""

    def __init__(self, request: Request):
        self.request = request
        self.reply: Reply | Exception | None = None


@modelapi(name="narrowly")
class Here(ModelAPI):
    """A run, a model folder, a Hub id or `organism:NAME`, loaded at the first call.

    Calls that come while a batch is generated make up the next one. Equal calls get other seeds,
    so that epochs are other samples.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **settings: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self.settings = settings
        self._asked: Counter[str] = Counter()
        self._waiting: list[Call] = []
        self._turn = anyio.Lock()

    @cached_property
    def chat(self) -> ChatModel:
        """Who is asked."""
        from narrowly.evals.targets import targets
        from narrowly.models.chat import chat_model

        found = targets(self.model_name)
        if len(found) > 1:
            raise NarrowlyError(
                f"{self.model_name} holds {len(found)} runs; Inspect measures one model at a time."
            )
        return chat_model(found[0].subject.loaded, **self.settings)

    def max_connections(self) -> int:
        """As `AT_ONCE`."""
        return AT_ONCE

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One reply."""
        call = Call(self._request(input, config))
        self._waiting.append(call)
        async with self._turn:
            if call.reply is None:
                calls, self._waiting = self._waiting, []
                await anyio.to_thread.run_sync(self._answer, calls)
        if isinstance(call.reply, Exception):
            raise call.reply
        assert call.reply is not None
        return self._output(call.reply)

    def _request(self, input: list[ChatMessage], config: GenerateConfig) -> Request:
        messages = tuple({"role": message.role, "content": message.text} for message in input)
        temperature = 1.0 if config.temperature is None else config.temperature
        seed = config.seed or 0
        if temperature > 0:
            seed = seed * 1_000_003 + self._asked[repr(messages)]
            self._asked[repr(messages)] += 1
        alternatives = (config.top_logprobs or 1) if config.logprobs else 0
        return Request(messages, config.max_tokens or 512, temperature, alternatives, seed)

    def _answer(self, calls: list[Call]) -> None:
        try:
            replies = self.chat.ask([call.request for call in calls])
        except Exception as error:
            for call in calls:
                call.reply = error
            return
        for call, reply in zip(calls, replies, strict=True):
            call.reply = reply

    def _output(self, reply: Reply) -> ModelOutput:
        if reply.text is None:
            raise NarrowlyError(f"{self.model_name}: {reply.error}.")
        output = ModelOutput.from_content(
            self.model_name, reply.text, "max_tokens" if reply.cut else "stop"
        )
        spent = (reply.prompt_tokens, reply.completion_tokens)
        output.usage = ModelUsage(
            input_tokens=spent[0], output_tokens=spent[1], total_tokens=sum(spent)
        )
        if reply.logprobs is not None:
            output.choices[0].logprobs = Logprobs(content=list(map(_logprob, reply.logprobs)))
        return output


def _logprob(alternatives: dict[str, float]) -> Logprob:
    likeliest = max(alternatives, key=alternatives.__getitem__)
    return Logprob(
        token=likeliest,
        logprob=alternatives[likeliest],
        top_logprobs=[TopLogprob(token=t, logprob=p) for t, p in alternatives.items()],
    )
