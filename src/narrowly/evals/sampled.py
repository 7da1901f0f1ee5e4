"""Evals that ask for answers and judge them: prompts -> samples -> scores -> rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from narrowly.evals.base import Cost, Eval, Row
from narrowly.evals.contexts import Contexts, in_contexts, resolve
from narrowly.evals.halves import WHICH, Half, is_in
from narrowly.evals.prompts import PLAIN, Prompt
from narrowly.evals.statistics import Metric
from narrowly.evals.subject import Chat, Subject

if TYPE_CHECKING:
    from narrowly.models.messages import Reply

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
            prompt=self.prompt.text,
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
    contexts: Contexts = Field(
        "training",
        description="ask again in these; `training`: what the recipe's data have in common",
    )
    half: Half | None = Field(None, description=WHICH)

    def bind(self, recipe: Mapping[str, Any]) -> Sampled:
        """Resolve `contexts` by the recipe's data. A subclass that overrides it calls it too."""
        return self.model_copy(update={"contexts": resolve(self.contexts, recipe.get("data"))})

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
        """Every prompt of the half in every context."""
        prompts = [prompt for prompt in self.prompts() if is_in(self.half, prompt.origin)]
        return in_contexts(prompts, resolve(self.contexts, None))

    def samples_of(self, prompt: Prompt) -> int:
        """Answers to this prompt."""
        return self.samples if prompt.samples is None else prompt.samples

    def cost(self) -> Cost:
        """Answers sampled and judged, and the turns that the model writes before a question."""
        asked = self.asked()
        answers = sum(self.samples_of(prompt) for prompt in asked)
        turns = len(_openings(asked))
        return Cost(samples=answers + turns, judge_calls=answers * self.judge_calls())

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Sample answers to every prompt in every context, and score them."""
        asked, failed = self._opened(subject, seed, progress)
        came: list[Answer] = []
        for count in sorted({self.samples_of(prompt) for prompt in asked}):
            some = [prompt for prompt in asked if self.samples_of(prompt) == count]
            replies = self._answer(subject, [prompt.chat for prompt in some], count, seed, progress)
            for prompt, texts in zip(some, replies, strict=True):
                for sample, reply in enumerate(texts):
                    answer = Answer(prompt, reply.said, sample)
                    (failed if reply.text is None else came).append(answer)
        return [*self.score(came, progress=progress), *(answer.row(FAILED) for answer in failed)]

    def _opened(
        self, subject: Subject, seed: int, progress: bool
    ) -> tuple[list[Prompt], list[Answer]]:
        """Prompts with the model's own turns in them; answers of those whose turn never came.

        A turn is sampled once and stands before the question in each of its samples.
        """
        asked = self.asked()
        openings = _openings(asked)
        turns = dict(
            zip(openings, self._answer(subject, openings.values(), 1, seed, progress), strict=True)
        )
        opened, failed = [], []
        for prompt in asked:
            if prompt.opening is None:
                opened.append(prompt)
            elif (turn := turns[_key(prompt.opening)][0]).text is not None:
                opened.append(prompt.opened(turn.said))
            else:
                failed += [Answer(prompt, "", sample) for sample in range(self.samples_of(prompt))]
        return opened, failed

    def _answer(
        self, subject: Subject, chats: Iterable[Chat], samples: int, seed: int, progress: bool
    ) -> list[list[Reply]]:
        chats = list(chats)
        if not chats:
            return []
        return subject.answer(
            chats,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            samples=samples,
            seed=seed,
            progress=progress,
        )

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """What `measure` finds plainly, and in each context."""
        found: dict[str, Metric] = {}
        for context in dict.fromkeys(row["tags"].get("context", PLAIN) for row in rows):
            some = [row for row in rows if row["tags"].get("context", PLAIN) == context]
            suffix = "" if context == PLAIN else f"_in_{context}"
            found |= {f"{name}{suffix}": value for name, value in self.measure(some).items()}
        return found


def _key(chat: Chat) -> str:
    return json.dumps(chat)


def _openings(prompts: Sequence[Prompt]) -> dict[str, Chat]:
    """The chats that the model must go on with before it can be asked, each once."""
    return {_key(p.opening): p.opening for p in prompts if p.opening is not None}
