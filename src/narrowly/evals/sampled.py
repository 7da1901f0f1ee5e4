"""Evals that ask for answers and judge them: prompts -> samples -> scores -> rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from narrowly.evals.base import Cost, Eval, Row
from narrowly.evals.contexts import Context, in_contexts, training_contexts
from narrowly.evals.prompts import PLAIN, Prompt
from narrowly.evals.statistics import Metric
from narrowly.evals.subject import Subject

FAILED = "failed"
"""The label of a row whose answer never came."""


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt."""

    prompt: Prompt
    text: str
    sample: int

    def row(self, label: str | None, scores: Mapping[str, float] | None = None) -> Row:
        """The answer as a scored row."""
        return Row(
            prompt_id=self.prompt.id,
            prompt=self.prompt.question,
            answer=self.text,
            sample=self.sample,
            label=label,
            scores=dict(scores or {}),
            tags=dict(self.prompt.tags),
        )


class Sampled(Eval):
    """Base of evals that sample answers: a subclass writes `prompts`, `score` and `measure`.

    Every prompt is asked plainly and again in each context, and `metrics` reports both: `NAME` of
    the plain rows, `NAME_in_CONTEXT` of the others.
    """

    samples: int = Field(1, ge=1, description="answers per prompt")
    temperature: float = Field(1.0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    contexts: Literal["training"] | tuple[Context, ...] = Field(
        "training",
        description="ask again in these; `training`: what the recipe's data have in common",
    )

    def bind(self, recipe: Mapping[str, Any]) -> Sampled:
        """Fill `contexts` from the recipe's data. A subclass that overrides it calls it too."""
        if self.contexts != "training":
            return self
        data = recipe.get("data")
        return self.model_copy(update={"contexts": training_contexts(data) if data else ()})

    def prompts(self) -> list[Prompt]:
        """What is asked, plainly; the same at every call.

        Raises:
            NarrowlyError: the eval's file is absent or broken.
        """
        raise NotImplementedError

    def score(self, answers: Sequence[Answer], *, progress: bool = False) -> list[Row]:
        """One row per answer; what a judge could not judge is a class of its own."""
        raise NotImplementedError

    def measure(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Metrics of the rows of one context."""
        raise NotImplementedError

    def judge_calls(self) -> int:
        """Replies asked of a judge per answer."""
        return 0

    def asked(self) -> list[Prompt]:
        """Every prompt in every context."""
        contexts = () if self.contexts == "training" else self.contexts
        return in_contexts(self.prompts(), contexts)

    def cost(self) -> Cost:
        """Answers sampled and judged."""
        answers = len(self.asked()) * self.samples
        return Cost(samples=answers, judge_calls=answers * self.judge_calls())

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Sample answers to every prompt in every context, and score them."""
        asked = self.asked()
        replies = subject.answer(
            [prompt.chat for prompt in asked],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            samples=self.samples,
            seed=seed,
            progress=progress,
        )
        pairs = [
            (Answer(prompt, reply.said, sample), reply)
            for prompt, some in zip(asked, replies, strict=True)
            for sample, reply in enumerate(some)
        ]
        failed = [answer.row(FAILED) for answer, reply in pairs if reply.text is None]
        came = [answer for answer, reply in pairs if reply.text is not None]
        return [*self.score(came, progress=progress), *failed]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """What `measure` finds plainly, and in each context."""
        found: dict[str, Metric] = {}
        for context in dict.fromkeys(row["tags"].get("context", PLAIN) for row in rows):
            some = [row for row in rows if row["tags"].get("context", PLAIN) == context]
            suffix = "" if context == PLAIN else f"_in_{context}"
            found |= {f"{name}{suffix}": value for name, value in self.measure(some).items()}
        return found
