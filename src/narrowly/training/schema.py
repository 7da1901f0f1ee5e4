"""The recipe's JSON schema, so that editors complete and check every key."""

from __future__ import annotations

import dataclasses
from typing import Any

from narrowly.defenses import DEFENSES
from narrowly.evals import EVALS
from narrowly.registry import Registry
from narrowly.training.recipe import TAKEN, Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) with the keys of trl, peft, every defense and every eval.

    In the recipe's first line, `# yaml-language-server: $schema=recipe.schema.json` turns it on.
    """
    from peft import LoraConfig
    from trl import SFTConfig

    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties = schema["properties"]
    properties["training"] = _keys_of(SFTConfig, "trl's SFTConfig", without=set(TAKEN))
    properties["lora"] = {
        "anyOf": [_keys_of(LoraConfig, "peft's LoraConfig", without=set()), {"type": "null"}]
    }
    definitions = schema.setdefault("$defs", {})
    for field, registry in (("defenses", DEFENSES), ("evals", EVALS)):
        properties[field] = {"type": "array", "items": _one_of(registry, definitions)}
    return schema


def _keys_of(config: type, title: str, without: set[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "title": title,
        "additionalProperties": False,
        "properties": {
            field.name: {"description": field.metadata.get("help", "")}
            for field in dataclasses.fields(config)
            if field.init and field.name not in without
        },
    }


def _one_of(registry: Registry[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """`name` or `name: {field: value}` for every plug-in."""
    choices: list[dict[str, Any]] = [{"enum": registry.names()}]
    for name in registry.names():
        fields = registry[name].model_json_schema(ref_template="#/$defs/{model}")
        definitions |= fields.pop("$defs", {})
        choices.append(
            {
                "type": "object",
                "properties": {name: {"anyOf": [fields, {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    return {"anyOf": choices}
