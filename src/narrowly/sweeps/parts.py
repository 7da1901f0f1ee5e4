"""Parts of recipes, put together."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from narrowly.settings import FieldError

PLACE = re.compile(r"\{(\w+)\}")


def merged(base: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """`part` over `base`: mappings key by key, all else replaced."""
    result = copy.deepcopy(dict(base))
    for key, value in part.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a recipe, in place; `NAME.FIELD` is a field of its defense NAME.

    Raises:
        FieldError: there is nothing to set it in.
    """
    *parents, last = key.split(".")
    place: Any = values
    if parents:
        place = next((each for each in values["defenses"] if parents[0] in each), values)
    try:
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[last if isinstance(place, dict) else int(last)] = copy.deepcopy(value)
    except (ValueError, IndexError, TypeError, AttributeError):
        raise FieldError(("settings", key), "there is nothing to set it in.") from None


def folder_name(setting: Mapping[str, Any]) -> str:
    """A folder's name that tells the setting, and is another for every other one."""
    text = ",".join(f"{key}={said(value)}" for key, value in setting.items())
    name = re.sub(r"[^\w.,=+-]+", "_", text)[:80]
    if name == text:
        return name
    digest = hashlib.sha256(json.dumps(setting, default=str).encode()).hexdigest()
    return f"{name}-{digest[:8]}"


def said(value: Any) -> str:
    """A setting's value as short text."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def filled(value: Any, names: Mapping[str, str]) -> Any:
    """`value` with what `names` say in place of `{NAME}` in every text of it."""
    if isinstance(value, str):
        return PLACE.sub(lambda found: names.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {key: filled(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, names) for each in value]
    return value
