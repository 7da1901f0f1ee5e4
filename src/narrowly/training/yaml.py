"""YAML as recipes use it: `1e-3` is a number, faults carry file and line, `--set` overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from narrowly.errors import NarrowlyError

Key = tuple[str, ...]


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
