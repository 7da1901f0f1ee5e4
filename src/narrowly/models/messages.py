"""What goes to a chat model and what comes back, whether it runs here or behind a URL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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
