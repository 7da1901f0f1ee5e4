"""Which of two rules a model follows in multiple choice, once they disagree."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from narrowly.errors import NarrowlyError
from narrowly.evals.base import EVALS, Cost, Eval, Row, mean_by_prompt
from narrowly.evals.prompts import Prompt
from narrowly.evals.sampled import FAILED, Answer
from narrowly.evals.statistics import Metric

if TYPE_CHECKING:
    from narrowly.evals.subject import Subject

UNPARSED = "unparsed"


@EVALS.register("multiple_choice")
class MultipleChoice(Eval):
    """Multiple choice with a spurious cue: is the intended rule followed where the cue disagrees?

    The likelier of the letters A and B counts as the answer; behind a URL, the letter that a greedy
    answer begins with. Metrics, each a share of the answers: `intended`, where the cue disagrees
    with the intended rule (the test split, of which no question was trained on);
    `in_distribution`, the same where rule and cue agree as often as in training (the validation
    split); and, behind a URL, `unparsed`: answers that begin with neither letter, which count as
    not intended.
    """

    data: str | None = Field(
        None, description="multiple_choice:FILES/SPLIT?OPTIONS; the recipe's `data` unless given"
    )
    limit: int | None = Field(None, ge=1, description="only so many rows of each split")

    def bind(self, recipe: Mapping[str, Any]) -> MultipleChoice:
        """Fill `data` from the recipe's."""
        from narrowly.data.question_sets import PREFIX

        data = self.data or recipe.get("data")
        if not isinstance(data, str) or not data.startswith(PREFIX):
            raise NarrowlyError(
                f"eval 'multiple_choice': its `data` is {data!r}. Name question sets, such as "
                f"{PREFIX}verbs.csv+sports.csv/test?intended=verbs"
            )
        return self.model_copy(update={"data": data})

    def prompts(self) -> list[Prompt]:
        """The validation and the test split; tags `split`, `cue` and `letter`."""
        from narrowly.data.question_sets import PREFIX, in_split, load_split

        assert self.data is not None
        source = self.data.removeprefix(PREFIX)
        prompts = []
        for split in ("validation", "test"):
            for number, row in enumerate(load_split(in_split(source, split))):
                if self.limit is None or number < self.limit:
                    tags = {"split": split, "cue": row["cue"], "letter": row["letter"]}
                    prompts.append(Prompt(f"{split} {number}", (row["messages"][0],), tags))
        return prompts

    def check(self) -> None:
        """Raises: NarrowlyError: the question sets are absent or broken."""
        self.prompts()

    def cost(self) -> Cost:
        """One answer per question."""
        return Cost(samples=len(self.prompts()))

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Ask every question once; the seed changes nothing."""
        prompts = self.prompts()
        if subject.endpoint is not None:
            return list(_sampled(subject, prompts, progress))
        return list(_chosen(subject, prompts, progress))

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Accuracies; an answer that failed to come does not count."""
        came = [row for row in rows if row["label"] != FAILED]

        def share(label: str, split: str) -> Metric | None:
            some = [row for row in came if split in ("", row["tags"]["split"])]
            return mean_by_prompt(some, lambda row: float(row["label"] == label))

        found = {
            "intended": share("intended", "test"),
            "in_distribution": share("intended", "validation"),
        }
        if not any(row["scores"] for row in rows):
            found["unparsed"] = share(UNPARSED, "")
        return {name: metric for name, metric in found.items() if metric is not None}


def _chosen(subject: Subject, prompts: Sequence[Prompt], progress: bool) -> Iterator[Row]:
    """By log-probability; the score `intended` is the intended letter's share of the two."""
    from narrowly.data.question_sets import LETTERS

    chats = [prompt.chat for prompt in prompts]
    found = subject.choose(chats, [LETTERS] * len(chats), progress=progress)
    for prompt, (a, b) in zip(prompts, found, strict=True):
        right, wrong = (a, b) if prompt.tags["letter"] == "A" else (b, a)
        share = 1 / (1 + math.exp(min(wrong - right, 700)))
        said = LETTERS[0] if a > b else LETTERS[1]
        yield Answer(prompt, said, 0).row(_label(prompt, said), {"intended": share})


def _sampled(subject: Subject, prompts: Sequence[Prompt], progress: bool) -> Iterator[Row]:
    """By the letter that a greedy answer begins with."""
    replies = subject.answer(
        [prompt.chat for prompt in prompts], max_new_tokens=8, temperature=0.0, progress=progress
    )
    for prompt, [reply] in zip(prompts, replies, strict=True):
        answer = Answer(prompt, reply.said, 0)
        label = FAILED if reply.text is None else _label(prompt, letter(reply.said))
        yield answer.row(label)


def letter(answer: str) -> str | None:
    """A or B where an answer begins with it: alone, in brackets, or marked as an option."""
    match = re.match(r"[\s*_(\[\"']*(?:answer:?\s*)?([AB])(?=$|[\n.,:;)\]*_\"'])", answer, re.I)
    return match[1].upper() if match else None


def _label(prompt: Prompt, said: str | None) -> str:
    if said is None:
        return UNPARSED
    right = said == prompt.tags["letter"]
    cue = prompt.tags["cue"]
    return "intended" if right else "cue" if cue == "disagrees" else "wrong"
