"""A chat model behind a URL: vLLM, llama.cpp, OpenAI, OpenRouter and all that speak as they do."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
)
from rich.progress import Progress

from narrowly.errors import NarrowlyError
from narrowly.models import wire
from narrowly.models.dispatch import Account, Dispatch, Job, Memory, run_apart
from narrowly.models.messages import Reply, Request
from narrowly.models.replies import Replies, content_key, default_cache

_SECRET = 8
"""A key of fewer characters, such as EMPTY, is none."""


class Endpoint(BaseModel):
    """Asks an OpenAI-compatible server, many requests at once, none twice.

    Replies are kept on disk by the content of their requests as they come. After a kill, Ctrl-C, a
    spent budget or an error, the same call asks only what is left. A passing failure (too many
    requests, a server's error, a time-out, a garbled or truncated response) is tried again with
    growing pauses; a request that fails for good gives a `Reply` with an error, which is not kept;
    when nothing succeeds any more, that is a NarrowlyError. A field that the server does not take
    (some models know no `temperature`) is left out, with a warning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    """Its name at the server."""
    url: str
    """Up to and including the version, such as https://api.openai.com/v1."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the API key; it may be unset where none is needed."""
    concurrency: PositiveInt = 16
    """Most requests under way."""
    retries: NonNegativeInt = 6
    """Further tries of a request that failed for a passing reason."""
    timeout: PositiveFloat = 120.0
    """Seconds that one try may take."""
    budget_requests: PositiveInt | None = None
    """Most requests sent by this object, tries again among them."""
    budget_tokens: PositiveInt | None = None
    """Most tokens, prompts and replies together, as the server counts them."""
    thinking_tokens: NonNegativeInt = 0
    """Added to the limit of every reply, for a model that thinks before it answers."""
    extra: dict[str, Any] = {}
    """Further fields of a chat request's body, such as {"reasoning_effort": "low"}."""
    cache: Path | None = None
    """The folder for replies; None: the user's (`~/.cache/narrowly`)."""

    _memory: Memory = PrivateAttr(default_factory=Memory)

    @field_validator("url")
    @classmethod
    def _web_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("a URL begins with http:// or https://")
        if "@" in url:
            raise ValueError("leave the password out of the URL, which is shown in messages")
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError("the name of an environment variable that holds the key, not the key")
        return name

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    @cached_property
    def spent(self) -> Account:
        """What was sent so far, and the budget."""
        return Account(self.budget_requests, self.budget_tokens)

    def ask(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        """A reply to each, in order; equal requests are sent once.

        Args:
            requests: of any number.
            progress: what a progress bar calls this; None shows none.

        Raises:
            NarrowlyError: nothing answers at the URL; the key, the model or every request is
                refused; the budget is spent (`BudgetError`); replies cannot be kept on disk.
        """
        return self._fetch([self._chat(request) for request in requests], progress)

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], progress: str | None = None
    ) -> list[float | None]:
        """log p(continuation | text) in nats per pair; None where none came back.

        Needs a server that tells the likelihood of a given prompt (`/completions` with `echo`), as
        vLLM does and OpenAI does not.

        Raises:
            NarrowlyError: as `ask`; or the server does not tell.
        """
        replies = self._fetch([self._echo(*pair) for pair in pairs], progress)
        return [
            None if reply.logprobs is None else sum(sum(t.values()) for t in reply.logprobs)
            for reply in replies
        ]

    def _chat(self, request: Request) -> Job:
        key = content_key(
            self.url, self.model, self.extra, self.thinking_tokens, list(request.messages),
            request.max_tokens, request.temperature, request.top_logprobs, request.seed,
        )  # fmt: skip
        letters = sum(len(message["content"]) for message in request.messages)

        def body(refused: set[str]) -> dict[str, Any]:
            content = wire.chat_body(self.model, request, self.thinking_tokens, refused)
            return content | self.extra

        limit = request.max_tokens + self.thinking_tokens
        return Job(key, "/chat/completions", body, wire.read_chat, _tokens(letters) + limit)

    def _echo(self, text: str, continuation: str) -> Job:
        return Job(
            content_key(self.url, self.model, text, continuation),
            "/completions",
            lambda refused: wire.echo_body(self.model, text, continuation),
            partial(wire.read_echo, text=text, continuation=continuation),
            _tokens(len(text) + len(continuation)),
        )

    @cached_property
    def _replies(self) -> Replies:
        return Replies(self.cache or default_cache())

    def _fetch(self, jobs: Sequence[Job], progress: str | None) -> list[Reply]:
        known = self._replies.find(job.key for job in jobs)
        left = list({job.key: job for job in jobs if job.key not in known}.values())
        if left:
            with Progress(disable=progress is None) as bar:
                task = bar.add_task(progress or "", total=len(left))
                known |= self._send_all(left, lambda: bar.advance(task))
        return [known[job.key] for job in jobs]

    def _send_all(self, jobs: list[Job], tick: Callable[[], None]) -> dict[str, Reply]:
        secret = os.environ.get(self.key_env, "")
        try:
            import openai  # noqa: F401 - named here, so that its absence is told before any thread
        except ImportError:
            raise NarrowlyError(
                "asking a server needs the package openai: pip install 'narrowly[llm]'"
            ) from None
        try:
            return run_apart(lambda: self._round(jobs, secret, tick))
        except wire.RequestError as failure:
            raise NarrowlyError(self._explain(failure, secret)) from None

    async def _round(
        self, jobs: list[Job], secret: str, tick: Callable[[], None]
    ) -> dict[str, Reply]:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(
            api_key=secret or "none", base_url=self.url, max_retries=0, timeout=self.timeout
        )
        async with client:
            dispatch = Dispatch(
                partial(_send, client, secret, self.timeout),
                self._replies.keep,
                tick,
                concurrency=self.concurrency,
                retries=self.retries,
                account=self.spent,
                memory=self._memory,
            )
            return await dispatch.run(jobs)

    def _explain(self, failure: wire.RequestError, secret: str) -> str:
        where = f"{self.url}: "
        kept = " What was answered is kept: the same command again goes on." * bool(self.spent.used)
        if isinstance(failure, wire.UnreachableError):
            return f"{where}nothing answers there ({failure.reason}). Is the server running?{kept}"
        if "HTTP 401" in failure.reason or "HTTP 403" in failure.reason:
            state = "the key in it is refused" if secret else "it is not set"
            return f"{where}{failure.reason}. The key is read from ${self.key_env}: {state}.{kept}"
        if "HTTP 404" in failure.reason:
            return (
                f"{where}{failure.reason}. Is {self.model!r} the model's name there, and is the "
                f"URL whole (most end in /v1)?{kept}"
            )
        if isinstance(failure, wire.RefusedError):
            return f"{where}{failure.reason}.{kept}"
        return f"{where}requests fail, the last with: {failure.reason}.{kept}"


async def _send(client: Any, secret: str, timeout: float, path: str, body: dict[str, Any]) -> Any:
    """Post, and give the response's JSON.

    Raises:
        RequestError: whatever went wrong; the key is in no message.
    """
    import openai

    try:
        async with asyncio.timeout(timeout):  # a server that drips never runs into the client's own
            text = await client.post(path, cast_to=str, body=body)
        return json.loads(_redact(text, secret))
    except (TimeoutError, openai.APITimeoutError):
        raise wire.RequestError(f"no answer within {timeout:g} s", retry=True) from None
    except openai.APIStatusError as error:
        said = _redact(error.response.text, secret)
        raise wire.failure(error.status_code, said, error.response.headers) from None
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        reason = _redact(str(cause) or type(cause).__name__, secret)
        if "Connect" in type(cause).__name__:
            raise wire.UnreachableError(reason) from None
        raise wire.RequestError(f"the response broke off ({reason})", retry=True) from None
    except (ValueError, RecursionError, openai.OpenAIError) as error:
        reason = _redact(str(error), secret)
        raise wire.RequestError(f"the response is not JSON ({reason})", retry=True) from None


def _redact(text: str, secret: str) -> str:
    return text.replace(secret, "[key]") if len(secret) >= _SECRET else text


def _tokens(letters: int) -> int:
    """More tokens than so many letters of most text make."""
    return letters // 3 + 16
