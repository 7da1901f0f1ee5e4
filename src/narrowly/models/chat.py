"""Ask a chat model, in this process or behind a URL."""

from __future__ import annotations

import json
from typing import Any, cast
from weakref import WeakValueDictionary

from narrowly.models.endpoint import Endpoint
from narrowly.models.local_chat import LocalChat
from narrowly.models.messages import ChatModel, Reply, Request
from narrowly.settings import build

__all__ = ["ChatModel", "Reply", "Request", "chat_model"]

_OPEN: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""Chat models in use, by their settings."""


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
    if hasattr(model, "ask"):
        return cast(ChatModel, model)
    kind = LocalChat if url is None else Endpoint
    fields = {"model": model, **settings} | ({} if url is None else {"url": url})
    made: Any = build(kind, fields, ("model",))
    if not isinstance(model, str):
        return made
    return _OPEN.setdefault(kind.__name__ + json.dumps(fields, sort_keys=True, default=str), made)
