"""A sweep file: models x data x defenses x settings x seeds, and the recipe of each cell."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from narrowly.registry import unknown
from narrowly.report.sweep import Cell, Measures, Task
from narrowly.settings import Entry, FieldError, Key, build, entry, read_settings, read_yaml
from narrowly.sweeps.parts import filled, folder_name, merged, put, said
from narrowly.training import Recipe

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
OURS = ("seed", "seeds", "output")


class Data(BaseModel):
    """One data set of a sweep.

    Attributes:
        recipe: the part of the recipe that is this data's own: `data`, `validation`, ...
        words: what stands for `{WORD}` in the recipes of its runs, such as a system line.
        benign: nothing is wrong with it: a defense should let it be learned.
        measures: which metrics answer the report's questions about it.
    """

    model_config = ConfigDict(extra="forbid")

    recipe: dict[str, Any]
    words: dict[str, str] = Field(default_factory=dict)
    benign: bool = False
    measures: Measures = Measures()


class Arm(BaseModel):
    """One way of defending.

    Attributes:
        defenses: as in a recipe.
        settings: values to try, by dotted key: `NAME.FIELD` of one of these defenses, or a key of
            the recipe, such as `training.learning_rate`.
    """

    model_config = ConfigDict(extra="forbid")

    defenses: list[Entry] = Field(default_factory=list)
    settings: dict[str, list[Any]] = Field(default_factory=dict)


class Sweep(BaseModel):
    """What to run: every model, on every data set, defended in every way, with every seed.

    `{task}`, `{model}` and `{data}` in any text of a recipe become the names that stand here, and
    `{WORD}` what the data's `words` say.

    Attributes:
        recipe: what all runs share: a recipe without seeds, output and defenses, or its file, of
            which these are not read.
        models: by name, a model or a part of a recipe; may be left out if the recipe has a `model`.
        data: by name, a data source, or `{recipe, benign, measures}`.
        defenses: by name (an arm), a list as in a recipe, or `{defenses, settings}`.
        settings: values to try in every arm, by dotted key.
        seeds: of every arm.
        choose_on: the task (`DATA`, or `MODEL-DATA` with `models`) on which every setting runs; the
            other tasks run the setting that was chosen there only.
        jobs: runs at a time; by default as many as cores (or GPUs) allow.
        threads: of each run.
        memory: in GB, of each run; one that takes more is stopped.
        gpus: of each run, where there are any; a fraction lets several share one.
        output: folder of the runs, `TASK/ARM/seed-N`.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    recipe: dict[str, Any] | str = Field(default_factory=dict)
    models: dict[str, dict[str, Any]] | None = Field(default=None, min_length=1)
    data: dict[str, Data] = Field(min_length=1)
    defenses: dict[str, Arm] = Field(min_length=1)
    settings: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default=[0], min_length=1)
    choose_on: str | None = None
    jobs: int | None = Field(default=None, ge=1)
    threads: int = Field(default=1, ge=1)
    memory: float | None = Field(default=None, gt=0)
    gpus: float = Field(default=1, ge=0)
    output: str

    @model_validator(mode="before")
    @classmethod
    def _written_short(cls, values: dict[str, Any]) -> dict[str, Any]:
        models, data = _named(values, "models"), _named(values, "data")
        arms = _named(values, "defenses")
        values = dict(values)
        if models is not None:
            values["models"] = {
                name: {"model": model} if isinstance(model, str) else model
                for name, model in models.items()
            }
        if data is not None:
            values["data"] = {name: _data(name, one) for name, one in data.items()}
        if arms is not None:
            values["defenses"] = {name: _arm(name, arm) for name, arm in arms.items()}
        return values

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        if self.choose_on is not None and self.choose_on not in self.tasks:
            fault = unknown("task", self.choose_on, list(self.tasks))
            raise FieldError(("choose_on",), str(fault))
        if self.choose_on is not None and all(arm.defenses for arm in self.defenses.values()):
            raise FieldError(("choose_on",), "needs an arm without defenses, to compare with.")
        shared = self.shared
        if shared.get("defenses"):
            raise FieldError(
                ("recipe",), "has defenses of its own. Make them an arm under `defenses`."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise FieldError(("seeds",), "one stands here twice.")
        for name, arm in self.defenses.items():
            both = arm.settings.keys() & self.settings.keys()
            if both:
                place: Key = ("defenses", name, "settings", min(both))
                raise FieldError(place, "stands under `settings` of the sweep, too.")
        for where, settings, names in self._all_settings():
            for key, tried in settings.items():
                _check_setting((*where, key), key, tried, names)
        first = next(iter(self.tasks))
        for name in self.defenses:
            self.recipe_of(self.cell(first, name, self.arm_settings(name)[0], 0))
        if self.models is None:
            texts = [self.recipe, *(one.recipe for one in self.data.values())]
            texts += [arm.model_dump() for arm in self.defenses.values()]
            if "{model}" in json.dumps(texts, ensure_ascii=False, default=str):
                raise FieldError(("models",), "`{model}` stands in the file, which has no models.")
        return self

    def _all_settings(self) -> list[tuple[Key, dict[str, list[Any]], list[str]]]:
        every: list[tuple[Key, dict[str, list[Any]], list[str]]] = [
            (("settings",), self.settings, [])
        ]
        for name, arm in self.defenses.items():
            names = [each for one in arm.defenses for each in one]
            every.append((("defenses", name, "settings"), arm.settings, names))
        return every

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
        """Read a sweep file, with `key=value` overrides.

        Raises:
            NarrowlyError: a fault, with file and line, and the nearest known key if one is unknown.
        """
        return read_settings(cls, path, overrides)

    @property
    def shared(self) -> dict[str, Any]:
        """What all runs share, as a part of a recipe.

        Raises:
            NarrowlyError: the file that it names is absent or no recipe.
        """
        values: Any = self.recipe
        if isinstance(values, str):
            values, _ = read_yaml(values)
            if not isinstance(values, dict):
                raise FieldError(("recipe",), f"{self.recipe} is no recipe.")
        return {key: value for key, value in values.items() if key not in OURS}

    @property
    def tasks(self) -> dict[str, Task]:
        """Every model with every data set, by name."""
        return {
            name: Task(benign=self.data[data].benign, measures=self.data[data].measures)
            for name, (_, data) in self._pairs().items()
        }

    def _pairs(self) -> dict[str, tuple[str | None, str]]:
        if self.models is None:
            return {data: (None, data) for data in self.data}
        return {f"{model}-{data}": (model, data) for model in self.models for data in self.data}

    def arm_settings(self, arm: str) -> list[dict[str, Any]]:
        """Every setting of an arm, in order; `[{}]` where nothing is to be tried."""
        tried = self.settings | self.defenses[arm].settings
        return [
            dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())
        ]

    def cells(self, chosen: Mapping[str, dict[str, Any]] | None = None) -> list[Cell]:
        """The runs that can be named by now, in the order in which they should run.

        Where settings are chosen on one task, those of the other tasks are known of arms with one
        setting, and of the arms in `chosen`.
        """
        first, found = self.choose_on, chosen or {}
        cells = []
        for seed in self.seeds:
            for task in self.tasks:
                for arm in self.defenses:
                    settings = self.arm_settings(arm)
                    if first not in (None, task) and len(settings) > 1:
                        settings = [found[arm]] if arm in found else []
                    cells += [self.cell(task, arm, setting, seed) for setting in settings]
        return sorted(cells, key=lambda cell: first not in (None, cell.task))

    def cell(self, task: str, arm: str, setting: dict[str, Any], seed: int) -> Cell:
        """One run."""
        parts = [task, arm, *([folder_name(setting)] if setting else []), f"seed-{seed}"]
        return Cell(task=task, arm=arm, setting=setting, seed=seed, path="/".join(parts))

    def recipe_of(self, cell: Cell) -> dict[str, Any]:
        """The recipe of a cell, not validated."""
        model, data = self._pairs()[cell.task]
        part = (self.models or {}).get(model or "", {})
        values = merged(merged(self.shared, part), self.data[data].recipe)
        values["defenses"] = copy.deepcopy(self.defenses[cell.arm].defenses)
        for key, value in cell.setting.items():
            put(values, key, value)
        names = self.data[data].words | {"task": cell.task, "model": model or "", "data": data}
        return filled(values, names) | {
            "seed": cell.seed,
            "output": str(Path(self.output) / cell.path),
        }


def _named(values: dict[str, Any], field: str) -> dict[str, Any] | None:
    """A field that maps names to something; names become folders."""
    given = values.get(field)
    if not isinstance(given, dict):
        return None  # as absent or of a wrong type, which pydantic says
    for name in given:
        if not NAME.fullmatch(str(name)):
            raise FieldError(
                (field, str(name)), "a name is letters, digits and any of _ . + - after the first."
            )
    return {str(name): value for name, value in given.items()}


def _data(name: str, given: Any) -> Data:
    if isinstance(given, Data):
        return given
    if isinstance(given, str):
        return Data(recipe={"data": given})
    if not isinstance(given, dict):
        raise FieldError(("data", name), "write a data source, or {recipe: {data: ...}, ...}.")
    return build(Data, given, ("data", name))


def _arm(name: str, given: Any) -> Arm:
    if isinstance(given, Arm):
        return given
    where = ("defenses", name)
    values = given if isinstance(given, dict) else {"defenses": given or []}
    if not isinstance(values.get("defenses", []), list):
        raise FieldError(where, "write a list of defenses, or {defenses: [...], settings: {...}}.")
    listed = [entry(f"defenses.{name}", item) for item in values.get("defenses", [])]
    return build(Arm, {**values, "defenses": listed}, where)


def _check_setting(where: Key, key: str, tried: Sequence[Any], names: Sequence[str]) -> None:
    """Fail where a setting could change nothing, or something else than it says."""
    first, *rest = key.split(".")
    if first in OURS:
        raise FieldError(where, "is the sweep's own to set.")
    if first not in names and first not in Recipe.model_fields:
        raise FieldError(where, str(unknown("key", first, [*names, *Recipe.model_fields])))
    if first in names and (not rest or names.count(first) > 1):
        raise FieldError(
            where, f"name one field of one defense: {first}.FIELD, or defenses.0.{first}.FIELD."
        )
    told = [said(value) for value in tried]
    if not tried or len(set(told)) < len(told):
        raise FieldError(where, "list the values to try, each once.")
