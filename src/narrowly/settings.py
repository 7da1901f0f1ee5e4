"""What a user wrote becomes checked objects, and every mistake names its file, line and field.

YAML as recipes use it: `1e-3` is a number, and `--set a.b=value` overrides a key.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.registry import unknown

Key = tuple[str, ...]
Entry = dict[str, dict[str, Any]]
"""One item of a recipe's list of plug-ins: a name and its arguments."""

M = TypeVar("M", bound=BaseModel)


class FieldError(NarrowlyError):
    """A mistake in one field.

    Attributes:
        path: the field's place, such as ("defenses", "0", "ablate", "strength"); whoever read a
            file can name the line.
    """

    def __init__(self, path: Key, message: str):
        super().__init__(f"{'.'.join(path)}: {message}" if path else message)
        self.path = path


def build(cls: type[M], arguments: Mapping[str, Any], where: Key = ()) -> M:
    """Make a pydantic object from its fields.

    Raises:
        FieldError: a field is unknown (with the nearest known one), missing or of a wrong type.
    """
    for key in arguments:
        if key not in cls.model_fields and cls.model_config.get("extra") != "allow":
            raise FieldError((*where, str(key)), str(unknown("key", str(key), [*cls.model_fields])))
    try:
        return cls.model_validate(dict(arguments))
    except ValidationError as error:
        # A union fails once per member: the first is the plainest.
        first = error.errors(include_url=False)[0]
        place = tuple(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] not in ("missing", "value_error"):
            # A model or a data set given where it does not belong would fill the screen.
            message += f", not {textwrap.shorten(repr(first['input']), 80)}"
        raise FieldError((*where, *place), f"{message}.") from None


def entry(field: str, item: Any) -> Entry:
    """`name` or `{name: {...}}` as `{name: {...}}`.

    Raises:
        FieldError: it is neither.
    """
    if isinstance(item, str):
        return {item: {}}
    if isinstance(item, dict) and len(item) == 1:
        ((name, arguments),) = item.items()
        if arguments is None or isinstance(arguments, dict):
            return {str(name): arguments or {}}
    raise FieldError((field,), f"each item is `name` or `name: {{field: value}}`, not {item!r}.")


def read_settings(cls: type[M], path: str | Path, overrides: Sequence[str] = ()) -> M:
    """A pydantic object from a YAML file, with `key=value` overrides.

    Raises:
        NarrowlyError: a fault, with file and line, and the nearest known key if one is unknown.
    """
    values, lines = read_yaml(path)
    if not isinstance(values, dict):
        raise NarrowlyError(f"{path}: a recipe is a mapping of keys, such as `model: ...`.")
    for setting in overrides:
        override(values, setting)
    try:
        return build(cls, values)
    except FieldError as error:
        raise NarrowlyError(f"{path}{line_of(error.path, lines)}: {error}") from None


def read_record(cls: type[M], path: str | Path, what: str, advice: str = "") -> M:
    """A pydantic object from a JSON file that narrowly wrote.

    Args:
        what: the file should be, such as "a concept", for the message.
        advice: what to do about another.

    Raises:
        NarrowlyError: the file is absent, no JSON, or something else, with the first wrong field.
    """
    value = read_json(path)
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        fault = f"{field}: {first['msg']}" if field else first["msg"]
        raise NarrowlyError(f"{path}: not {what}: {fault}.{advice and ' '}{advice}") from None


def line_of(path: Key, lines: dict[Key, int]) -> str:
    """`:line` of a field, or of the nearest mapping around it that the file holds."""
    while path and path not in lines:
        path = path[:-1]
    return f":{lines[path]}" if path else ""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string, which would reach the optimiser as one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: str | Path) -> tuple[Any, dict[Key, int]]:
    """A YAML file's value, and the 1-based line of every key in it.

    Raises:
        NarrowlyError: the file is absent, or no YAML; the message holds file, line and reason.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NarrowlyError(f"{path}: no such file.") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise NarrowlyError(f"{path}: not a YAML file ({error}).") from None
    try:
        value = yaml.load(text, _Loader)
        lines = dict(_lines(yaml.compose(text, _Loader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise NarrowlyError(f"{path}{line}: not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise NarrowlyError(f"{path}: not valid YAML: {error}.") from None
    return value, lines


def _lines(node: yaml.Node | None, key: Key = ()) -> list[tuple[Key, int]]:
    if isinstance(node, yaml.MappingNode):
        return [
            place
            for name, child in node.value
            for place in [
                ((*key, str(name.value)), name.start_mark.line + 1),
                *_lines(child, (*key, str(name.value))),
            ]
        ]
    if isinstance(node, yaml.SequenceNode):
        return [
            place
            for index, child in enumerate(node.value)
            for place in [
                ((*key, str(index)), child.start_mark.line + 1),
                *_lines(child, (*key, str(index))),
            ]
        ]
    return []


def override(values: dict[str, Any], setting: str) -> None:
    """Apply `a.b.0.c=value` (the value is YAML) to nested `values` in place.

    Raises:
        NarrowlyError: no `=`, a value that is no YAML, or a path into something that has no parts.
    """
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise NarrowlyError(f"--set {setting}: write key=value, such as training.max_steps=50.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise NarrowlyError(f"--set {setting}: {text!r} is not a YAML value.") from None
    *parents, last = path.split(".")
    place: Any = values
    for parent in parents:
        if isinstance(place, dict) and place.get(parent) is None:
            place[parent] = {}
        place = _part(place, parent, setting)
    if isinstance(place, dict):
        place[last] = value
    else:
        _part(place, last, setting)
        place[int(last)] = value


def _part(place: Any, name: str, setting: str) -> Any:
    if isinstance(place, dict):
        return place[name]
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    raise NarrowlyError(f"--set {setting}: there is no {name!r} to set it in.")
