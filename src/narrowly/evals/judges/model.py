"""A language model as judge, in this process or behind a URL."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from narrowly.errors import NarrowlyError
from narrowly.evals.judges.base import JUDGES, JudgedRow
from narrowly.evals.judges.criteria import Criterion, Judgement
from narrowly.evals.judges.reading import expected, separate, whole_numbers, written

if TYPE_CHECKING:
    from narrowly.models.messages import ChatModel, Reply, Request

logger = logging.getLogger(__name__)

ALTERNATIVES = 20
"""Of a token of the reply; more are told by no server."""
WORDS = 16
"""Tokens of a reply: a number or a word, with a label or a blank before it."""

TOGETHER = """Judge one answer by {n} criteria, each for itself.

{criteria}

Each of the criteria says what to reply to it. Give these replies together, in one line of JSON, \
and nothing else:
{{{form}}}"""


class JudgeModel(BaseModel):
    """Asks a chat model to judge answers by one or more criteria.

    A score is the mean of the numbers from 0 to 100 by the probability that the judge gives each
    as its reply, and None where it gives all of them together less than a quarter (Betley et al.
    2025, arXiv 2502.17424; Chen et al. 2025, arXiv 2507.21509). A model in this process is read
    exactly, however many tokens it writes a number with. A server tells the likelihoods of one
    token, so there the judge must write whole numbers as one (OpenAI's and Llama 3 do, Qwen and
    Gemma write digits); one more request, the first, finds that out. Otherwise the score is the
    number that the judge writes.

    Replies are kept, tried again and budgeted as `models.chat.chat_model` does it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    model: Any
    """Its name at `url`, or what `models.load_model` takes, or a loaded model with its tokenizer,
    or a `ChatModel`."""
    url: str | None = None
    """Of an OpenAI-compatible server; None: the model runs in this process."""
    mode: Literal["logprobs", "text"] | None = None
    """The score: the number that the judge expects to write, or the one it writes. None: the
    former where it can be had."""
    together: bool = False
    """Ask by all criteria in one call, and read the numbers written: cheaper and coarser."""
    settings: dict[str, Any] = {}
    """Further fields of `models.endpoint.Endpoint` or `models.local_chat.LocalChat`."""

    @model_validator(mode="after")
    def _one_way(self) -> JudgeModel:
        if self.together and self.mode == "logprobs":
            raise ValueError("several criteria in one call are read as text: leave out mode")
        return self

    @field_serializer("model", when_used="json")
    def _by_name(self, model: Any) -> str:
        """What an eval's record says of a judge that is an object in memory: its name."""
        if isinstance(model, str | os.PathLike):
            return os.fspath(model)
        model = model[0] if isinstance(model, tuple) else model
        return str(getattr(model, "name_or_path", None) or getattr(model, "name", model))

    @cached_property
    def chat(self) -> ChatModel:
        """Who is asked."""
        from narrowly.models.chat import chat_model

        return chat_model(self.model, self.url, **self.settings)

    def calls(self, criteria: Mapping[str, Criterion]) -> int:
        """Replies asked for per answer."""
        return min(1, len(criteria)) if self.together else len(criteria)

    def judge(
        self,
        criteria: Mapping[str, Criterion],
        rows: Sequence[JudgedRow],
        progress: bool = False,
    ) -> list[dict[str, Judgement]]:
        """Per row its judgement by each criterion, by name.

        Raises:
            NarrowlyError: nothing answers at the URL, the key is refused or the budget is spent
                (what was judged before is on disk, and the same call goes on from there); the
                likelihoods of whole numbers were asked for and cannot be had.
        """
        if not rows or not criteria:
            return [{} for _ in rows]
        bar = "Judging" if progress else None
        if self.together:
            words = {name: criterion.words for name, criterion in criteria.items()}
            asked = [_message(_together(criteria, row), WORDS * (1 + len(words))) for row in rows]
            return [separate(reply, words) for reply in self.chat.ask(asked, bar)]
        asks = [(criterion, criterion.ask(row)) for row in rows for criterion in criteria.values()]
        said = iter(self._judge(asks, bar))
        return [{name: next(said) for name in criteria} for _ in rows]

    def _judge(self, asks: list[tuple[Criterion, str]], bar: str | None) -> list[Judgement]:
        from narrowly.models.local_chat import LocalChat

        if self.mode != "text" and isinstance(self.chat, LocalChat):
            return self._exactly(self.chat, asks, bar)
        if self._likelihoods:
            read, told = expected, ALTERNATIVES
        else:
            read, told = written, 0
        replies = self.chat.ask([_message(text, WORDS, told) for _, text in asks], bar)
        return [
            read(reply, criterion.words)
            for reply, (criterion, _) in zip(replies, asks, strict=True)
        ]

    def _exactly(
        self, chat: Any, asks: list[tuple[Criterion, str]], bar: str | None
    ) -> list[Judgement]:
        """Of a model in this process; only where it expects no number is its reply written out."""
        requests = [_message(text, WORDS) for _, text in asks]
        numbers = chat.numbers(requests, bar)
        others = [i for i, number in enumerate(numbers) if number is None]
        replies = iter(chat.ask([requests[i] for i in others], bar))
        return [
            expected(next(replies), criterion.words) if number is None else Judgement(number)
            for number, (criterion, _) in zip(numbers, asks, strict=True)
        ]

    @cached_property
    def _likelihoods(self) -> bool:
        """Whether the judge writes whole numbers as one token, and its server tells how likely."""
        if self.mode == "text":
            return False
        ask = _message("Reply with the number 85 and nothing else.", WORDS, ALTERNATIVES)
        [reply] = self.chat.ask([ask])
        if whole_numbers(reply):
            return True
        if reply.text is None:
            raise NarrowlyError(f"judge {self.chat.name}: it does not answer ({reply.error}).")
        lacks = (
            f"judge {self.chat.name}: it does not tell the likelihoods of whole numbers "
            f"({_why_not(reply)})"
        )
        if self.mode == "logprobs":
            raise NarrowlyError(f"{lacks}. Leave out mode, or name another judge.")
        logger.warning("%s, so scores are the numbers it writes.", lacks)
        return False


@JUDGES.register("model")
class ModelJudge(JudgeModel):
    """A chat model as judge of one trait; a word in place of a number is None."""

    prompt: str
    """The one message to the judge; `{question}` and `{answer}` are filled in."""
    batch_tokens: PositiveInt = 16384
    """Most tokens in a batch of a model in this process."""
    progress: bool = True

    @field_validator("prompt")
    @classmethod
    def _asks_about_the_answer(cls, prompt: str) -> str:
        if "{answer}" not in prompt:
            raise ValueError("the prompt must have a place for {answer}")
        return prompt

    @cached_property
    def chat(self) -> ChatModel:
        """Who is asked."""
        from narrowly.models.chat import chat_model

        local = {"batch_tokens": self.batch_tokens} if self.url is None else {}
        return chat_model(self.model, self.url, **local | self.settings)

    def __call__(self, rows: Sequence[JudgedRow]) -> list[float | None]:
        """The score of each row."""
        judged = self.judge({"trait": Criterion(self.prompt)}, rows, self.progress)
        return [judgement["trait"].score for judgement in judged]


def _message(text: str, limit: int, alternatives: int = 0) -> Request:
    from narrowly.models.messages import Request

    return Request(({"role": "user", "content": text},), limit, top_logprobs=alternatives)


def _together(criteria: Mapping[str, Criterion], row: JudgedRow) -> str:
    each = [f"### {name}\n{criterion.ask(row)}" for name, criterion in criteria.items()]
    form = ", ".join(f'"{name}": ...' for name in criteria)
    return TOGETHER.format(n=len(criteria), criteria="\n\n".join(each), form=form)


def _why_not(reply: Reply) -> str:
    if reply.logprobs is None:
        return "its server tells no log-probabilities"
    return f"asked for 85, its first token is not that, and it says {reply.said[:20]!r}"
