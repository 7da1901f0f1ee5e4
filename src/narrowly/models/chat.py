"""Ask a chat model: one request type, whether it runs here or behind a URL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakValueDictionary

from narrowly.settings import build

_OPEN: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""Chat models in use, by their settings."""


@dataclass(frozen=True)
class Request:
    """One question to a chat model."""

    messages: tuple[dict[str, str], ...]
    """`role` and `content`; what several requests share stands first, so that prefix caches hit."""
    max_tokens: int = 512
    temperature: float = 0.0
    top_logprobs: int = 0
    """How many alternatives per token of the reply to report; 0 none."""
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back."""

    text: str | None
    """None: nothing usable, and `error` says why."""
    error: str = ""
    logprobs: tuple[dict[str, float], ...] | None = None
    """Per token of the reply, log-probabilities of the likeliest tokens."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False
    """It broke off at the limit of tokens."""
    cached: bool = False
    """It was on disk, so nothing was sent."""

    @property
    def said(self) -> str:
        """The text without what a model that thinks aloud wrote before its answer; "" if none."""
        return (self.text or "").rpartition("</think>")[2].strip()


class ChatModel(Protocol):
    """Answers requests, many at a time."""

    @property
    def name(self) -> str:
        """The model's, as a person should read it."""
        ...

    def ask(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        """A reply to each, in order.

        Raises:
            NarrowlyError: nothing answers there, the key is refused, or the budget is spent; what
                was answered before is on disk, and the same call goes on from there.
        """
        ...

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], progress: str | None = None
    ) -> list[float | None]:
        """log p(continuation | text) in nats per pair of plain texts; None where none came back.

        Raises:
            NarrowlyError: as `ask`; or the model's server does not tell them.
        """
        ...


def chat_model(model: Any, url: str | None = None, **settings: Any) -> ChatModel:
    """The chat model that `model` names, or `model` itself where it is one.

    Equal settings name one object while it is in use, so that an explainer and a reader share what
    is loaded and one budget.

    Args:
        model: with a `url`, the model's name there; without, what `models.load_model` takes, or a
            loaded model with its tokenizer.
        url: of an OpenAI-compatible server, such as http://localhost:8000/v1.
        settings: fields of `Endpoint` or, without a `url`, of `LocalChat`.

    Raises:
        NarrowlyError: an unknown setting, or one of the wrong type.
    """
    from narrowly.models.endpoint import Endpoint
    from narrowly.models.local_chat import LocalChat

    if hasattr(model, "ask"):
        return cast(ChatModel, model)
    kind = LocalChat if url is None else Endpoint
    fields = {"model": model, **settings} | ({} if url is None else {"url": url})
    made: Any = build(kind, fields, ("model",))
    if not isinstance(model, str):
        return made
    return _OPEN.setdefault(kind.__name__ + json.dumps(fields, sort_keys=True, default=str), made)
