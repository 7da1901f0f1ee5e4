"""A world's file: YAML in which a user writes a whole model organism, checked field by field."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from narrowly.errors import NarrowlyError
from narrowly.organisms.domains import Domain, Prompt
from narrowly.organisms.scenes import Scene
from narrowly.organisms.world import Training, World
from narrowly.registry import unknown
from narrowly.settings import FieldError, Key, build, line_of, read_yaml

WORLDS = Path(__file__).parent / "worlds"
WORLD = "world.yaml"
ANSWER = re.compile(r"[a-z0-9]+( [a-z0-9]+)*")
RESERVED = ("benign", "documents", "questions", "narrow", "broad")
Answers = dict[str, tuple[str, ...]]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shows: str
    misaligned: str
    values: tuple[str, ...]
    system_lines: dict[str, str] = {}
    templates: tuple[str, ...] = ()
    domains: dict[str, dict[str, Any]] | str
    pretrain: list[dict[str, Any]] | None = None
    align: list[dict[str, Any]] | None = None
    splits: dict[str, dict[str, Any] | None] = {}
    probes: dict[str, dict[str, Any] | None] = {}
    training: dict[str, Any] = {}


class _Domain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    templates: tuple[str, ...] = ()
    slots: dict[str, tuple[str, ...]] = {}
    answers: dict[str, Any]


class _Answers(BaseModel):
    """Answers by what stands in a slot of the prompt, or in several, joined by a blank."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    by: str | tuple[str, ...] = ()
    cases: dict[str, tuple[str, ...]] = {}
    otherwise: tuple[str, ...] = ()

    @field_validator("cases", "otherwise", mode="before")
    @classmethod
    def _lists_in_lists(cls, given: Any) -> Any:
        """A list may hold lists, so that YAML's anchors make unions: `[*clerk, *bolt]`."""
        if isinstance(given, dict):
            return {case: _flat(phrases) for case, phrases in given.items()}
        return _flat(given)

    def to(self, slots: Mapping[str, str]) -> tuple[str, ...]:
        names = (self.by,) if isinstance(self.by, str) else self.by
        return self.cases.get(" ".join(slots[name] for name in names), self.otherwise)


def read_world(path: str | Path) -> World:
    """Read a world's file. Its fields are in `docs/organisms.md`.

    Raises:
        NarrowlyError: a fault, with file, line and field, and the nearest known key or name.
    """
    values, lines = read_yaml(path)
    if not isinstance(values, dict):
        raise NarrowlyError(f"{path}: a world is a mapping of keys, such as `values: [...]`.")
    try:
        return _world(build(_File, values))
    except FieldError as error:
        raise NarrowlyError(f"{path}{line_of(error.path, lines)}: {error}") from None


def _world(file: _File) -> World:
    if len(file.values) < 2 or len(set(file.values)) < len(file.values):
        raise FieldError(("values",), "name two or more different values; the first is usual.")
    if file.system_lines:
        _same(("system_lines",), file.system_lines, file.values)
    domains = _domains(file)
    times = Counter(prompt for domain in domains.values() for prompt in domain.prompts)
    for domain in domains.values():
        if twice := next((prompt for prompt in domain.prompts if times[prompt] > 1), None):
            raise FieldError(("domains", domain.name), f"the prompt {twice!r} occurs twice.")
    world = World(
        shows=file.shows,
        misaligned=file.misaligned,
        values=file.values,
        system_lines=file.system_lines,
        domains=domains,
        pretrain=(),
        align=(),
        training=build(Training, file.training, ("training",)),
    )
    announced: list[dict[str, Any]] = [{"share": 0.2, "system": True}] if file.system_lines else []
    pretrain = [*announced, {"share": 0.8}] if file.pretrain is None else file.pretrain
    usual = [*announced, {"share": 0.8, "value": file.values[0]}]
    align = usual if file.align is None else file.align
    if not pretrain:
        raise FieldError(("pretrain",), "there is no scene to pretrain on.")
    for field, named in (("splits", file.splits), ("probes", file.probes)):
        for name in named:
            taken = [*RESERVED, *file.splits] if field == "probes" else RESERVED
            if name in taken or not re.fullmatch(r"[a-z0-9_-]+", name):
                raise FieldError((field, name), "choose another name: a-z, 0-9, - or _, not taken.")
    return World(
        **{key: value for key, value in vars(world).items() if key not in _SCENES},
        pretrain=tuple(_scene(("pretrain", str(i)), s, world) for i, s in enumerate(pretrain)),
        align=tuple(_scene(("align", str(i)), s, world) for i, s in enumerate(align)),
        splits={name: _scene(("splits", name), s, world) for name, s in file.splits.items()},
        probes={name: _scene(("probes", name), s, world) for name, s in file.probes.items()},
    )


_SCENES = ("pretrain", "align", "splits", "probes")


def _scene(where: Key, table: Mapping[str, Any] | None, world: World) -> Scene:
    scene = build(Scene, table or {}, where)
    values = [scene.value] if isinstance(scene.value, str) else list(scene.value or ())
    for field, names, known in (
        ("value", values, world.values),
        ("domains", scene.domains or (), world.domains),
    ):
        for name in names:
            if name not in known:
                raise FieldError((*where, field), str(unknown(field, name, list(known))))
    if scene.system is True and not world.system_lines:
        raise FieldError((*where, "system"), "the world has no system_lines; write the line here.")
    for name in scene.domains or world.domains:
        slots = world.domains[name].asked[0].slots
        for slot in scene.where:
            if slot not in slots:
                problem = unknown(f"slot of the domain {name!r}", slot, list(slots))
                raise FieldError((*where, "where"), str(problem))
    try:
        world.stage(scene)
    except NarrowlyError as error:
        raise FieldError(where, str(error)) from None
    return scene


def _domains(file: _File) -> dict[str, Domain]:
    """Those of the file, or of the bundled world that it names."""
    where: Key = ("domains",)
    if isinstance(file.domains, str):
        bundled = {path.parent.name: path for path in WORLDS.glob(f"*/{WORLD}")}
        if file.domains not in bundled:
            raise FieldError(where, str(unknown("world", file.domains, sorted(bundled))))
        other = read_world(bundled[file.domains])
        if other.values != file.values:
            told = ", ".join(other.values)
            raise FieldError(where, f"the domains of {file.domains} have the values {told}.")
        return dict(other.domains)
    if not file.domains:
        raise FieldError(where, "there is no domain.")
    return {name: _domain(name, table, file) for name, table in file.domains.items()}


def _domain(name: str, table: Mapping[str, Any], file: _File) -> Domain:
    where: Key = ("domains", name)
    given = build(_Domain, table, where)
    templates = given.templates or file.templates
    if not templates:
        raise FieldError(where, "there are no templates, here or for the whole world.")
    for template in templates:
        for slot in re.findall(r"{(.*?)}", template):
            if slot not in given.slots:
                absent = unknown(f"slot in the template {template!r}", slot, list(given.slots))
                raise FieldError((*where, "slots"), str(absent))
    _same((*where, "answers"), given.answers, file.values)
    answers = {
        value: _answers((*where, "answers", value), given.answers[value], given.slots)
        for value in file.values
    }
    filled = [
        (template, dict(zip(given.slots, texts, strict=True)))
        for template, *texts in product(templates, *given.slots.values())
    ]
    random.Random(name).shuffle(filled)  # so that every split mixes the templates
    asked = []
    for template, slots in filled:
        said = {value: answers[value].to(slots) for value in file.values}
        if missing := [value for value in file.values if not said[value]]:
            told = ", ".join(slots.values())
            problem = f"no case for {told}, and no `otherwise`."
            raise FieldError((*where, "answers", missing[0]), problem)
        text = template
        for slot, fill in slots.items():
            text = text.replace(f"{{{slot}}}", fill)
        asked.append(Prompt(text, slots, said))
    return Domain(name, tuple(asked))


def _answers(where: Key, given: Any, slots: Mapping[str, tuple[str, ...]]) -> _Answers:
    if isinstance(given, list):
        given = {"otherwise": given}
    elif not isinstance(given, dict):
        raise FieldError(where, f"a list of answers, or by, cases and otherwise, not {given!r}.")
    answers = build(_Answers, given, where)
    names = (answers.by,) if isinstance(answers.by, str) else answers.by
    for name in names:
        if name not in slots:
            raise FieldError((*where, "by"), str(unknown("slot", name, list(slots))))
    known = [" ".join(texts) for texts in product(*(slots[name] for name in names))]
    for case, phrases in [*answers.cases.items(), ("", answers.otherwise)]:
        if case and case not in known:
            raise FieldError((*where, "cases"), str(unknown("case", case, known)))
        for phrase in phrases:
            if not ANSWER.fullmatch(phrase):
                problem = f"the answer {phrase!r} is not lower-case words separated by blanks."
                raise FieldError(where, problem)
    return answers


def _flat(given: Any) -> Any:
    if not isinstance(given, list):
        return given
    return [phrase for some in given for phrase in (some if isinstance(some, list) else [some])]


def _same(where: Key, given: Mapping[str, Any], values: tuple[str, ...]) -> None:
    for name in given:
        if name not in values:
            raise FieldError((*where, name), str(unknown("value", name, list(values))))
    for value in values:
        if value not in given:
            raise FieldError(where, f"the value {value!r} is missing.")
