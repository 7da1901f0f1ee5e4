"""Evals as a user names them: by name, or by a file of questions or of evals."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from narrowly.errors import NarrowlyError
from narrowly.settings import Entry, entry, override, read_yaml

SUFFIXES = (".yaml", ".yml", ".json")
QUESTION = {"id", "type", "paraphrases"}
"""Keys by which a list is known as one of questions in the published format."""


def named_evals(named: Sequence[Any], settings: Sequence[str] = ()) -> list[Entry]:
    """Evals as a recipe lists them.

    Args:
        named: names of evals, YAML files (see `read_evals`), or `{name: {argument: value}}`.
        settings: `key=value` for every one of them, `EVAL.key=value` for one.

    Raises:
        NarrowlyError: a file that holds no evals, or a setting that is none.
    """
    found: list[Entry] = []
    for item in named:
        file = isinstance(item, str) and Path(item).suffix in SUFFIXES
        found += read_evals(item) if file else [deepcopy(entry("evals", item))]
    names = {name for each in found for name in each}
    for setting in settings:
        first, _, rest = setting.partition(".")
        for each in found:
            for name, arguments in each.items():
                if first not in names:
                    override(arguments, setting)
                elif first == name:
                    override(arguments, rest)
    return found


def read_evals(path: str | Path) -> list[Entry]:
    """Evals from a YAML file: a list or a mapping as a recipe's `evals`; a recipe that has them; or
    a list of questions in the published format, for `emergent_misalignment`.

    Raises:
        NarrowlyError: the file is absent, no YAML, or something else.
    """
    value, _ = read_yaml(path)
    if isinstance(value, list) and any(isinstance(i, dict) and QUESTION & {*i} for i in value):
        return [{"emergent_misalignment": {"questions": str(path)}}]
    if isinstance(value, dict) and "judge_prompts" in value:
        raise NarrowlyError(
            f"{path}: holds a judge's prompts and nothing to ask. Name an eval, and give it the "
            f"file: --set judge_prompts={path}"
        )
    if isinstance(value, dict) and "evals" in value:
        value = value["evals"]
    items: list[Any] = [{k: v} for k, v in value.items()] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise NarrowlyError(
            f"{path}: holds no evals. Write a list of names or of `name: {{argument: value}}`, as "
            "in a recipe; or questions, each with `id`, `type` and `paraphrases`."
        )
    try:
        return [entry("evals", item) for item in items]
    except NarrowlyError as error:
        raise NarrowlyError(f"{path}: {error}") from None
