"""Chat models for tests: one that answers by a function, and prompts taken apart again."""

import re
from collections.abc import Callable, Sequence

from narrowly.models.chat import Reply, Request


class Scripted:
    """A `ChatModel` whose reply to a prompt is `answer(prompt)`; it keeps the prompts."""

    name = "scripted"

    def __init__(self, answer: Callable[[str], str | Reply]):
        self.answer = answer
        self.requests: list[Request] = []

    def ask(self, requests: Sequence[Request], progress: str | None = None) -> list[Reply]:
        self.requests += requests
        replies = [self.answer(request.messages[-1]["content"]) for request in requests]
        return [Reply(reply) if isinstance(reply, str) else reply for reply in replies]

    def likelihoods(self, pairs, progress=None):
        return [-float(len(more)) / len(text) for text, more in pairs]

    @property
    def prompts(self) -> list[str]:
        return [request.messages[-1]["content"] for request in self.requests]


def beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, c in enumerate(first) if last[i] != c), len(first))]


def explanation_in(prompt: str) -> str:
    return re.findall(r"^Explanation: (.*)$", prompt, re.M)[-1]


def passages_in(prompt: str) -> list[str]:
    """The numbered lines of a reader's prompt."""
    after = prompt.rpartition("\n\nExplanation: ")[2]
    lines = re.findall(r"^(\d+)\. (.*)$", after, re.M)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    return [text for _, text in lines]


def finds_words(prompt: str) -> str:
    """Fits where a word that the explanation quotes stands in the passage (between marks, if any
    stand in the prompt)."""
    words = re.findall(r'"(\w+)"', explanation_in(prompt))
    seen = passages_in(prompt)
    if "<<" in prompt:
        seen = [" ".join(re.findall("<<(.*?)>>", text)) for text in seen]
    return str([int(any(word in text for word in words)) for text in seen])
