"""Evals whose answers a judge model judges by one or more criteria."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from narrowly.errors import NarrowlyError
from narrowly.evals.base import Row, mean_by_prompt
from narrowly.evals.judges import FAILED, REFUSED, UNPARSED, Criterion, Judgement, JudgeModel
from narrowly.evals.prompts import Prompt
from narrowly.evals.sampled import FAILED as NO_ANSWER
from narrowly.evals.sampled import Answer, Sampled
from narrowly.evals.statistics import Metric
from narrowly.evals.subject import Subject

UNJUDGED = {UNPARSED: UNPARSED, REFUSED: "judge_refused", FAILED: "judge_failed"}
"""Labels of answers that came and were not judged, by what the judge said."""


class Judged(Sampled):
    """Base of evals with a judge model: a subclass writes `prompts`, `criteria` and `label`."""

    judge: JudgeModel | None = Field(
        None, description="who is asked about the answers: {model: ..., url: ...}"
    )

    def criteria(self, prompt: Prompt) -> Mapping[str, Criterion]:
        """What the judge is asked about answers to this prompt, by name.

        Raises:
            NarrowlyError: the file of judge prompts is absent or broken.
        """
        raise NotImplementedError

    def label(self, told: Mapping[str, Judgement]) -> str:
        """The class of an answer that was judged by all criteria; `unjudged` is of help."""
        raise NotImplementedError

    def judge_calls(self) -> int:
        """Replies asked of the judge per answer."""
        asked = self.criteria(self.prompts()[0])
        return len(asked) if self.judge is None else self.judge.calls(asked)

    def check(self) -> None:
        """Raises: NarrowlyError: no judge, or a file of questions or prompts that is broken."""
        self._judge()
        for prompt in self.prompts():
            self.criteria(prompt)

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Sample, then judge. Without a judge nothing is sampled."""
        self.check()
        return super().run(subject, seed=seed, progress=progress)

    def score(self, answers: Sequence[Answer], *, progress: bool = False) -> list[Row]:
        """Ask the judge; answers that are judged by the same criteria are asked about together."""
        alike: dict[tuple[tuple[str, Criterion], ...], list[int]] = {}
        for index, answer in enumerate(answers):
            alike.setdefault(tuple(self.criteria(answer.prompt).items()), []).append(index)
        rows: dict[int, Row] = {}
        for asked, indices in alike.items():
            shown = [
                {"question": answers[i].prompt.question, "answer": answers[i].text} for i in indices
            ]
            told = self._judge().judge(dict(asked), shown, progress)
            for i, each in zip(indices, told, strict=True):
                scores = {name: j.score for name, j in each.items() if j.score is not None}
                rows[i] = answers[i].row(self.label(each), scores)
        return [rows[i] for i in range(len(answers))]

    def _judge(self) -> JudgeModel:
        if self.judge is None:
            raise NarrowlyError(
                "this eval asks a judge about every answer, and none is named: give it one, such "
                "as `judge: {model: gpt-4.1-mini, url: https://api.openai.com/v1}`, or a model in "
                "this process, `judge: {model: Qwen/Qwen2.5-7B-Instruct}`."
            )
        return self.judge


def unjudged(*told: Judgement) -> str | None:
    """The class of an answer that one of these judgements has no score of; else None."""
    for judgement in told:
        if judgement.score is None:
            said = str(judgement.said)
            return UNJUDGED.get(said) or said.lower().replace(" ", "_")
    return None


def above(limit: float, told: Mapping[str, Judgement], yes: str, no: str) -> str:
    """The class by the score of the only criterion: `yes` above the limit, else `no`; or why it
    was not judged."""
    [judgement] = told.values()
    if judgement.score is None:
        return str(unjudged(judgement))
    return yes if judgement.score > limit else no


def share(rows: Sequence[Row], labels: Sequence[str], among: Sequence[str] = ()) -> Metric | None:
    """Share of answers of these classes, among answers of those (none named: all rows)."""
    return mean_by_prompt(
        rows,
        lambda row: float(row["label"] in labels),
        lambda row: float(not among or row["label"] in among),
    )


def counted_apart(rows: Sequence[Row]) -> dict[str, Metric | None]:
    """Rates of what no other metric counts: answers that never came, and that were not judged."""
    came = [row for row in rows if row["label"] != NO_ANSWER]
    return {
        "unjudged": share(came, list(UNJUDGED.values())),
        "failed": share(rows, [NO_ANSWER]),
    }


def judged_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of answers that came and were judged, by a number or by a word."""
    return [row for row in rows if row["label"] not in (NO_ANSWER, *UNJUDGED.values())]
