"""What an eval is: prompts to samples to scores to rows, and from rows its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from pydantic import BaseModel, ConfigDict

from narrowly.errors import NarrowlyError
from narrowly.evals.listing import named_evals
from narrowly.evals.statistics import Metric
from narrowly.registry import Registry
from narrowly.settings import build

if TYPE_CHECKING:
    from narrowly.evals.subject import Subject


class Row(TypedDict):
    """One answer, scored; one row of `samples.parquet`.

    Attributes:
        prompt_id: the prompt's name within the eval, the same in every run; rows of one prompt are
            resampled together.
        prompt, answer: as a person reads them, without the template's marks.
        sample: number of the answer among those to the same prompt.
        label: the class a judge gave, or None. Unparsable replies and refusals are classes.
        scores: any numbers that were measured.
        tags: anything to group by (domain, context, ...).
    """

    prompt_id: str
    prompt: str
    answer: str
    sample: int
    label: str | None
    scores: dict[str, float]
    tags: dict[str, str]


@dataclass(frozen=True)
class Cost:
    """What an eval asks for on one model."""

    samples: int
    """Answers sampled, or texts read."""
    judge_calls: int = 0
    """Replies asked of a judge model."""


class Eval(BaseModel):
    """Base of every eval: a small class whose fields are its arguments.

    A new eval is one file in `narrowly/evals/`: subclass this, or `sampled.Sampled` where answers
    are sampled and judged; decorate with `@EVALS.register("name")`; write `run` and `metrics`, or
    `prompts`, `score` and `measure`. The first line of the docstring says what it measures, for
    `narrowly evals`. Heavy imports belong inside `run`, so that reading results is quick.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def bind(self, recipe: Mapping[str, Any]) -> Eval:
        """This eval with the arguments that the run's own recipe answers (its data, its domain).

        Args:
            recipe: the run's resolved recipe; only `{"model": spec}` for a bare model, and empty
                for a model in memory.
        """
        return self

    def check(self) -> None:
        """Raise, once bound, what `run` would raise whatever the model: a judge that is missing.

        A training asks before it begins.
        """

    def cost(self) -> Cost:
        """What `run` will ask for, once bound.

        Raises:
            NarrowlyError: as `run`, where the eval's data are absent or broken.
        """
        raise NotImplementedError

    def run(self, subject: Subject, *, seed: int, progress: bool = False) -> list[Row]:
        """Measure: one row per answer. The model is in eval mode; `seed` is of the sampling."""
        raise NotImplementedError

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Per-prompt values of every metric, from the rows alone."""
        raise NotImplementedError


EVALS: Registry[type[Eval]] = Registry("eval", "narrowly.evals")


def parse(evals: str | Eval | Mapping[str, Any] | Iterable[Any]) -> dict[str, Eval]:
    """Evals by name, from any way of writing them: the names and arguments of a recipe's list.

    Args:
        evals: `"misalignment"`, `{"misalignment": {"samples": 4}}`, an Eval, a YAML file of evals
            or questions (`listing.read_evals`), or a list of such.

    Raises:
        NarrowlyError: an unknown eval or argument (with the nearest known one), a wrong type, or
            the same eval twice.
    """
    if isinstance(evals, str):
        pairs = [
            (name, make(name, arguments))
            for each in named_evals([evals])
            for name, arguments in each.items()
        ]
    elif isinstance(evals, Eval):
        pairs = [(_name(type(evals)), evals)]
    elif isinstance(evals, Mapping):
        pairs = [(name, make(name, arguments or {})) for name, arguments in evals.items()]
    else:
        pairs = [pair for entry in evals for pair in parse(entry).items()]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise NarrowlyError(f"the eval {name!r} is listed twice: a run holds each eval once.")
    return dict(pairs)


def make(name: str, arguments: Mapping[str, Any]) -> Eval:
    """The eval of that name with these arguments.

    Raises:
        NarrowlyError: as `parse`.
    """
    kind = EVALS[name]
    if not isinstance(arguments, Mapping):
        raise NarrowlyError(f"eval {name!r}: its arguments must be a mapping, not {arguments!r}.")
    return build(kind, arguments, ("evals", name))


def _name(kind: type[Eval]) -> str:
    for name in EVALS.names():
        if EVALS[name] is kind:
            return name
    raise NarrowlyError(
        f'{kind.__name__} is no registered eval. Decorate it with @EVALS.register("name").'
    )


def mean_by_prompt(
    rows: Iterable[Row],
    value: Callable[[Row], float],
    weight: Callable[[Row], float] = lambda row: 1.0,
    *,
    unit: str = "share",
    exponential: bool = False,
) -> Metric | None:
    """The metric whose value at each prompt is the weighted mean of `value` over its rows.

    Rows of weight 0 do not count (a rate among coherent answers gives the others weight 0).

    Returns:
        None where no row counts: what was not measured has no metric, rather than a zero.
    """
    totals: dict[str, tuple[float, float]] = {}
    for row in rows:
        weighs = weight(row)
        if weighs:
            total, weights = totals.get(row["prompt_id"], (0.0, 0.0))
            totals[row["prompt_id"]] = total + weighs * value(row), weights + weighs
    if not totals:
        return None
    sums, weights = np.array(list(totals.values())).T
    return Metric(sums / weights, weights, unit, exponential, tuple(totals))
