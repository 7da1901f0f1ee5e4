"""What `narrowly tune` searches: a recipe, and which of its keys may take which values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from narrowly.errors import NarrowlyError
from narrowly.evals import EVALS
from narrowly.evals.listing import named_evals
from narrowly.registry import unknown
from narrowly.settings import Entry, FieldError, build
from narrowly.training.recipe import Recipe

if TYPE_CHECKING:
    from optuna.trial import Trial

Setting = dict[str, Any]
"""Values of a recipe's keys, by dotted key."""


class Dimension(BaseModel):
    """The values that one key of a recipe may take."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def suggest(self, trial: Trial, key: str) -> Any:
        """Optuna's choice for this trial; the same one when it is asked again."""
        raise NotImplementedError

    def examples(self) -> list[Any]:
        """Values that must all make a valid recipe."""
        raise NotImplementedError


class Range(Dimension):
    """Numbers; whole ones where both ends are written as such.

    Attributes:
        low, high: both may be taken.
        log: as many below as above the geometric mean.
    """

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError("a range on a log scale begins above 0")
        return self

    def suggest(self, trial: Trial, key: str) -> int | float:
        """A number of the range."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def examples(self) -> list[Any]:
        """Both ends."""
        return [self.low, self.high]


class Choices(Dimension):
    """Any of these values."""

    choices: tuple[Any, ...] = Field(min_length=2)

    def suggest(self, trial: Trial, key: str) -> Any:
        """One of them."""
        texts = [json.dumps(choice) for choice in self.choices]  # Optuna takes no lists
        return json.loads(trial.suggest_categorical(key, texts))

    def examples(self) -> list[Any]:
        """All."""
        return list(self.choices)


class Subset(Dimension):
    """Any of these, but at least one: layers, or names of concepts."""

    subset: tuple[int | str, ...] = Field(min_length=2)

    def suggest(self, trial: Trial, key: str) -> list[int | str]:
        """In or out, each for itself; where all are out, all are in."""
        drawn = {
            each: trial.suggest_categorical(f"{key}: {each}", [False, True]) for each in self.subset
        }
        return [each for each in self.subset if drawn[each]] or list(self.subset)

    def examples(self) -> list[Any]:
        """Each alone, and all."""
        return [*([each] for each in self.subset), list(self.subset)]


KINDS: dict[str, type[Dimension]] = {"low": Range, "choices": Choices, "subset": Subset}


class TuneFile(BaseModel):
    """A search for the least broad change at a given narrow loss.

    Attributes:
        recipe: the fine-tune with its defenses: a YAML file, or its keys. Of several seeds the
            first is tried.
        search: values by dotted key, such as `defenses.0.ablate.strength: {low: 0.2, high: 1}`,
            `defenses.1.kl.weight: {low: 1e-3, high: 10, log: true}`,
            `defenses.0.ablate.gradient: {choices: [through, backward]}` or
            `defenses.0.ablate.layers: {subset: [1, 2, 3]}`.
        broad: what nobody wants, EVAL.METRIC; less is better.
        narrow: the loss on held-out chats of the task, EVAL.METRIC; less is better.
        keep: share of what the undefended fine-tune learned (by how much `narrow` fell from the
            base model's) that the best trial must learn, too.
        at_most: the largest `narrow` allowed, in place of `keep`.
        trials: how many; those that are dropped count.
        rung: share of the training after which a trial that others already beat is dropped; null:
            none is. One whose defenses act after the training, or at test time, is never dropped.
        margin: by how much they must beat it there, in the figures' own units.
        seed: of the search.
        output: the folder of the search.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    recipe: Recipe
    search: dict[str, Dimension] = Field(min_length=1)
    broad: str = "misalignment.broad_misaligned"
    narrow: str = "in_distribution.loss"
    keep: float = Field(default=0.95, gt=0, le=1)
    at_most: float | None = None
    trials: int = Field(default=30, ge=1)
    rung: float | None = Field(default=0.3, gt=0, lt=1)
    margin: float = Field(default=0.1, ge=0)
    seed: int = 0
    output: str

    @model_validator(mode="before")
    @classmethod
    def _parts(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        if isinstance(values.get("recipe"), str | Path):
            values["recipe"] = Recipe.read(values["recipe"])
        elif isinstance(values.get("recipe"), dict):
            best = {"output": str(Path(str(values.get("output"))) / "best")}
            values["recipe"] = build(Recipe, best | values["recipe"], ("recipe",))
        if isinstance(values.get("search"), dict):
            values["search"] = {key: _dimension(key, v) for key, v in values["search"].items()}
        return values

    @field_validator("broad", "narrow")
    @classmethod
    def _measured(cls, metric: str) -> str:
        name, dot, rest = metric.partition(".")
        if not dot or not rest:
            raise ValueError("write EVAL.METRIC, such as misalignment.broad_misaligned")
        if name not in EVALS.names():
            raise ValueError(str(unknown("eval", name, EVALS.names())).removesuffix("."))
        if "half" not in EVALS[name].model_fields:
            raise ValueError(
                f"the eval {name!r} cannot be split into a half to tune on and a half to report on"
            )
        return metric

    @model_validator(mode="after")
    def _is_a_search(self) -> TuneFile:
        for position, item in enumerate(named_evals(self.recipe.evals)):
            for name, arguments in item.items():
                if arguments.get("half") == "tune":
                    raise FieldError(
                        ("recipe", "evals", str(position), name, "half"),
                        "the recipe would report on the half that is tuned on. Leave `half` out.",
                    )
        if self.recipe.training.get("load_best_model_at_end"):
            raise FieldError(
                ("recipe", "training", "load_best_model_at_end"),
                "would choose a checkpoint by all validation chats, and half of them are reported "
                "on. Leave it out.",
            )
        for key, dimension in self.search.items():
            for value in dimension.examples():
                try:
                    self.applied({key: value})
                except NarrowlyError as error:
                    text = str(error).removeprefix(f"--set {key}={json.dumps(value)}: ")
                    raise FieldError(("search", key), text) from None
        return self

    def applied(self, setting: Setting) -> Recipe:
        """The recipe with these values.

        Raises:
            NarrowlyError: they make no recipe.
        """
        settings = [f"{key}={json.dumps(value)}" for key, value in setting.items()]
        return self.recipe.with_overrides(settings)

    def tuned_on(self) -> list[Entry]:
        """The evals that are searched by, on their half."""
        listed = _by_name(self.recipe.evals)
        return [{name: listed.get(name, {}) | {"half": "tune"}} for name in self._searched_by]

    def reported_on(self) -> list[Entry]:
        """The recipe's own evals and those searched by, on the other half where they have one."""
        listed = {name: dict[str, Any]() for name in self._searched_by} | _by_name(
            self.recipe.evals
        )
        other = {"half": "report"}
        return [
            {name: arguments | (other if "half" in EVALS[name].model_fields else {})}
            for name, arguments in listed.items()
        ]

    @property
    def _searched_by(self) -> list[str]:
        return list(dict.fromkeys(each.partition(".")[0] for each in (self.broad, self.narrow)))

    def identity(self) -> dict[str, Any]:
        """What makes this search this one; all else may change when it goes on."""
        free = {"output", "trials", "keep", "at_most"}
        values = self.model_dump(mode="json", exclude={"search", "recipe", *free})
        search = {key: each.model_dump(mode="json") for key, each in self.search.items()}
        recipe = self.recipe.model_dump(mode="json", exclude={"output"})
        return {"recipe": recipe, "search": search, **values}


def _by_name(evals: Sequence[Any]) -> dict[str, dict[str, Any]]:
    return {
        name: dict(arguments) for item in named_evals(evals) for name, arguments in item.items()
    }


def _dimension(key: str, value: Any) -> Dimension:
    """A dimension as a file writes it.

    Raises:
        FieldError: it is none.
    """
    if isinstance(value, Dimension):
        return value
    given = value if isinstance(value, dict) else {}
    for field, kind in KINDS.items():
        if field in given:
            return build(kind, given, ("search", key))
    raise FieldError(
        ("search", key),
        "write {low: ..., high: ...} (and log: true), {choices: [...]} or {subset: [...]}, "
        f"not {value!r}.",
    )
