"""Models that answer as a test says, without weights."""

from collections.abc import Callable
from dataclasses import dataclass, field

from narrowly.evals.subject import Subject
from narrowly.models.messages import Reply, Request

Answers = Callable[[Request], str | Reply | None]


@dataclass
class Answering:
    """A chat model whose reply to a request is `answers(request)`; None: no reply came."""

    answers: Answers
    name: str = "answering"
    asked: list[Request] = field(default_factory=list)

    def ask(self, requests, progress=None):
        self.asked += requests
        return [_reply(self.answers(request)) for request in requests]

    def likelihoods(self, pairs, progress=None):
        return [None for _ in pairs]


def answering(answers: Answers) -> Subject:
    """A subject that answers so."""
    return Subject("answering", endpoint=Answering(answers))


def _reply(answer: str | Reply | None) -> Reply:
    if isinstance(answer, Reply):
        return answer
    return Reply(answer, "" if answer is not None else "timed out")
