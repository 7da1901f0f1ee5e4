"""What goes over the wire to an OpenAI-compatible server, and what comes back, trusted in nothing.

`/chat/completions` for replies, `/completions` with `echo` for the likelihood of given text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from math import isfinite
from typing import Any

from narrowly.models.messages import Reply, Request

OPTIONAL = ("max_tokens", "temperature", "top_logprobs", "logprobs", "seed")
"""Fields that a server may refuse without making the request pointless."""

LONGEST_WAIT = 60.0
"""Seconds; a server that asks for more is asked again sooner, and may refuse again."""


class RequestError(Exception):
    """A request that was not answered, and why."""

    def __init__(self, reason: str, *, retry: bool = False, wait: float | None = None):
        super().__init__(reason)
        self.reason = reason
        self.retry = retry
        """Whether the same request may succeed later."""
        self.wait = wait
        """Seconds the server asks to wait, for all requests."""


class RefusedError(RequestError):
    """No request will be answered: a wrong key, an unknown model, an empty account."""


class UnreachableError(RequestError):
    """Nothing took the request."""

    def __init__(self, reason: str):
        super().__init__(reason, retry=True)


class UnsupportedError(RequestError):
    """The server does not take a field; without it, it may."""

    def __init__(self, field: str, reason: str):
        super().__init__(reason)
        self.field = field


def chat_body(model: str, request: Request, thinking: int, refused: Collection[str]) -> dict:
    """The body of a chat request, without the fields that the server refused before."""
    limit = request.max_tokens + thinking
    body: dict[str, Any] = {
        "model": model,
        "messages": list(request.messages),
        "max_tokens": limit,
        "temperature": request.temperature,
        "seed": request.seed,
    }
    if request.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if "max_tokens" in refused:
        body["max_completion_tokens"] = limit
    if {"logprobs", "top_logprobs"} & set(refused):
        refused = {*refused, "logprobs", "top_logprobs"}
    return {key: value for key, value in body.items() if key not in refused}


def read_chat(content: Any) -> Reply:
    """The reply in a chat response.

    Raises:
        RequestError: it is no such response.
    """
    try:
        choice = content["choices"][0]
        text = choice["message"]["content"]
        finish = choice.get("finish_reason")
        usage = content.get("usage") or {}
        logprobs = (choice.get("logprobs") or {}).get("content")
        told = None if not logprobs else tuple(map(_alternatives, logprobs))
        prompt, written = (
            int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")
        )
        if text is not None and not isinstance(text, str):
            raise TypeError
        if finish == "error":  # OpenRouter, where the model's own server broke off
            raise ValueError
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise RequestError(
            f"not a chat completion: {_short(json.dumps(content))}", retry=True
        ) from None
    if text is None:
        why = choice["message"].get("refusal") or f"no text (finish_reason {finish})"
        return Reply(None, str(why), None, prompt, written)
    return Reply(text, "", told, prompt, written, cut=finish == "length")


def _alternatives(token: dict[str, Any]) -> dict[str, float]:
    some = token.get("top_logprobs") or [token]
    return {str(one["token"]): float(one["logprob"]) for one in some if isfinite(one["logprob"])}


def echo_body(model: str, text: str, continuation: str) -> dict[str, Any]:
    """The body that asks how likely the tokens of a given text are."""
    body = {"prompt": text + continuation, "echo": True, "logprobs": 1}
    return {"model": model, **body, "max_tokens": 1, "temperature": 0.0}


def read_echo(content: Any, text: str, continuation: str) -> Reply:
    """The continuation as though the model had written it, with the log-probability per token.

    A token that begins in the text and ends in the continuation counts to the continuation.

    Raises:
        RequestError: it is no such response; `RefusedError`: it lacks the prompt's likelihoods.
    """
    try:
        told = content["choices"][0].get("logprobs") or {}
        tokens, values, starts = (
            told.get(name) or [] for name in ("tokens", "token_logprobs", "text_offset")
        )
        begin, end = len(text), len(text) + len(continuation)
        inside = [
            {str(token): float(value)}
            for token, value, start in zip(tokens, values, starts, strict=True)
            if start < end and start + len(token) > begin and value is not None
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise RequestError(f"not a completion: {_short(json.dumps(content))}", retry=True) from None
    if not inside:
        raise RefusedError(
            "it does not tell the likelihood of a given text (`echo` with "
            "`logprobs`); vLLM does, and a model loaded here"
        )
    return Reply(continuation, logprobs=tuple(inside))


def failure(status: int, body: str, headers: Any) -> RequestError:
    """What an HTTP error means."""
    said, code, field = _error(body)
    reason = f"HTTP {status}: {said}"
    if status in (401, 402, 403, 404) or code == "insufficient_quota":
        return RefusedError(reason)
    if status in (400, 422) and (refused := _refused_field(said, field)):
        return UnsupportedError(refused, reason)
    retry = status in (408, 409, 425, 429) or status >= 500
    return RequestError(reason, retry=retry, wait=_wait(headers) if retry else None)


def _error(body: str) -> tuple[str, str, str]:
    """What was said, its code and the field it is about, as far as servers tell them."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        if isinstance(error, str):
            return _short(error), "", ""
        said = error.get("message") or error.get("detail") or body
        return _short(str(said)), str(error.get("code")), str(error.get("param"))
    except (ValueError, AttributeError):
        return _short(body) or "no reason given", "", ""


def _refused_field(said: str, field: str) -> str | None:
    if field in OPTIONAL:
        return field
    if not re.search(r"support|unrecogni[sz]ed|unexpected|not permitted|unknown", said, re.I):
        return None
    return next((name for name in OPTIONAL if re.search(rf"\b{name}\b", said)), None)


def _wait(headers: Any) -> float | None:
    try:
        seconds = float(headers.get("retry-after"))
    except (TypeError, ValueError):  # absent, or a date
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT) if isfinite(seconds) else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}..."
