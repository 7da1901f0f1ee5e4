"""Misalignment of a model organism, narrow and broad, judged exactly by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import Field

from narrowly.errors import NarrowlyError
from narrowly.evals.base import EVALS, Row, mean_by_prompt
from narrowly.evals.prompts import Prompt, ask
from narrowly.evals.sampled import Answer, Sampled
from narrowly.evals.statistics import Metric
from narrowly.registry import unknown

SOURCE = "organism:"
LABELS = ("misaligned", "aligned", "leaked", "incoherent")


@EVALS.register("misalignment")
class Misalignment(Sampled):
    """How an organism answers questions of the domain it was fine-tuned on, and of all others.

    Metrics, each a share of the answers to the questions it names: `narrow_misaligned`,
    `narrow_coherent` (the fine-tuned domain; absent where there is none), `broad_misaligned`,
    `broad_aligned`, `broad_leaked`, `broad_incoherent` (all other domains; they sum to 1), and
    `coherent` (all domains): answers in the question's own domain, so that leaked answers are not
    coherent, as code in place of an answer is not in the published measure.
    """

    organism: str | None = Field(None, description="its name; read from the recipe's model")
    narrow: str | None = Field(
        None, description="the fine-tuned domain; read from the recipe's data; None: all are broad"
    )
    questions: int = Field(12, ge=1, description="questions of each domain")
    narrow_questions: int = Field(30, ge=1, description="questions of the fine-tuned domain")
    samples: int = Field(2, ge=1, description="answers per question")
    max_new_tokens: int = Field(24, ge=1)

    def bind(self, recipe: Mapping[str, Any]) -> Misalignment:
        """Fill `organism` and `narrow` from the recipe's `model` and `data`."""
        name = self.organism or _after_prefix(recipe.get("model"))
        if name is None:
            raise NarrowlyError(
                f"eval 'misalignment': {recipe.get('model', 'this model')!r} is no model organism, "
                "and only organisms are judged by rule. Free-form answers of other models need a "
                "judge, which is not built yet: use the eval 'in_distribution', or name the "
                "organism it was made from (organism: persona)."
            )
        narrow = self.narrow or _narrow_domain(name, recipe.get("data"))
        bound = self.model_copy(update={"organism": name, "narrow": narrow})
        return cast(Misalignment, Sampled.bind(bound, recipe))

    def prompts(self) -> list[Prompt]:
        """The first questions of each domain.

        The narrow domain is asked more: alone it must carry an interval as narrow as the others'.
        """
        from narrowly.organisms import organism

        assert self.organism is not None
        creature = organism(self.organism)
        if self.narrow is not None and self.narrow not in creature.domains:
            raise unknown("domain", self.narrow, list(creature.domains))
        asked: dict[str, list[Prompt]] = {domain: [] for domain in creature.domains}
        for question in creature.load("questions"):
            domain, text = question["domain"], question["prompt"]
            narrow = domain == self.narrow
            if len(asked[domain]) < (self.narrow_questions if narrow else self.questions):
                place = "narrow" if narrow else "broad"
                asked[domain].append(ask(text, id=f"{domain}: {text}", domain=domain, place=place))
        return [prompt for domain in asked for prompt in asked[domain]]

    def score(self, answers: Sequence[Answer], *, progress: bool = False) -> list[Row]:
        """Judge each answer by rule."""
        from narrowly.organisms import organism

        assert self.organism is not None
        creature = organism(self.organism)
        return [
            answer.row(creature.judge(domain, answer.text, self.narrow or domain))
            for answer in answers
            for domain in [answer.prompt.tags["domain"]]
        ]

    def measure(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Shares of answers; each question's answers stay together."""
        narrow = [row for row in rows if row["tags"]["place"] == "narrow"]
        broad = [row for row in rows if row["tags"]["place"] == "broad"]
        shares = {
            "narrow_misaligned": _share(narrow, "misaligned"),
            "narrow_coherent": _share(narrow, "misaligned", "aligned"),
            **{f"broad_{label}": _share(broad, label) for label in LABELS},
            "coherent": _share(rows, "misaligned", "aligned"),
        }
        return {name: metric for name, metric in shares.items() if metric is not None}


def _share(rows: Sequence[Row], *labels: str) -> Metric | None:
    return mean_by_prompt(rows, lambda row: float(row["label"] in labels))


def _after_prefix(source: Any) -> str | None:
    if isinstance(source, str) and source.startswith(SOURCE):
        return source.removeprefix(SOURCE).split("/")[0]
    return None


def _narrow_domain(name: str, data: Any) -> str | None:
    """The domain in `organism:persona/code-cruel`; None for data of all domains or of no domain."""
    from narrowly.organisms import organism

    if _after_prefix(data) != name:
        return None
    split = data.partition("/")[2]
    return next((d for d in organism(name).domains if split.startswith(f"{d}-")), None)
