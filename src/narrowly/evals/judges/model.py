"""A language model as judge, in this process or behind a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from narrowly.evals.judges.base import JUDGES, JudgedRow
from narrowly.evals.judges.criteria import Criterion, Judgement


class JudgeModel(BaseModel):
    """Asks a chat model to judge answers by one or more criteria.

    Replies are kept, retried and budgeted as `models.chat.chat_model` does it.
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
    former where the likelihoods of whole numbers can be had."""
    together: bool = False
    """Ask by all criteria in one call, for a text."""
    settings: dict[str, Any] = {}
    """Further fields of `models.endpoint.Endpoint` or `models.local_chat.LocalChat`."""

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
            NarrowlyError: nothing answers at the URL, the key is refused or the budget is spent;
                what was judged before is on disk, and the same call goes on from there.
        """
        raise NotImplementedError


@JUDGES.register("model")
class ModelJudge(JudgeModel):
    """A chat model as judge of one trait.

    A judge that says a word in place of a number, or nothing usable, gives None.
    """

    prompt: str
    """The one message to the judge; `{question}` and `{answer}` are filled in."""
    batch_tokens: int = 16384
    """For a model in this process."""
    progress: bool = True

    @field_validator("prompt")
    @classmethod
    def _asks_about_the_answer(cls, prompt: str) -> str:
        if "{answer}" not in prompt:
            raise ValueError("the prompt must have a place for {answer}")
        return prompt

    def __call__(self, rows: Sequence[JudgedRow]) -> list[float | None]:
        """The score of each row."""
        from narrowly.evals.judges.numbers import expected_numbers
        from narrowly.models import load_model

        model, tokenizer = (
            self.model[:2] if isinstance(self.model, tuple) else load_model(self.model)
        )
        asked = [Criterion(self.prompt).ask(row) for row in rows]
        progress = "Judging" if self.progress else None
        return expected_numbers(
            model, tokenizer, asked, batch_tokens=self.batch_tokens, progress=progress
        )
