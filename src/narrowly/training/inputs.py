"""What a run is trained on: chats after the defenses' first door, hashed and checked for leaks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from narrowly.data import find_leaks, fingerprint, load_chats
from narrowly.defenses import Defense
from narrowly.errors import NarrowlyError
from narrowly.models import same_model
from narrowly.training.doors import open_first_door
from narrowly.training.recipe import Recipe
from narrowly.training.run import Run

logger = logging.getLogger(__name__)


def prepare_chats(
    recipe: Recipe, defenses: Sequence[Defense], *, main: bool = True
) -> tuple[Dataset, dict[str, Any]]:
    """The chats to train on, after the defenses' first door, and what to record of them.

    Prompts of the validation data that occur in what is trained on are recorded by row, and
    logged by name and count in the `main` process.

    Raises:
        NarrowlyError: data that cannot be read, or a defense that changed none of them.
    """
    chats = load_chats(recipe.data)
    given = fingerprint(chats)
    record: dict[str, Any] = {"train": {"source": recipe.data, "rows": len(chats), "sha256": given}}
    chats = open_first_door(chats, defenses)
    digest = fingerprint(chats)
    record["train"] |= {"defended_rows": len(chats), "defended_sha256": digest}
    if recipe.validation is not None:
        held_out = load_chats(recipe.validation)
        leaks = find_leaks(chats, held_out)
        record["validation"] = {
            "source": recipe.validation,
            "rows": len(held_out),
            "sha256": fingerprint(held_out),
        }
        record["leaks"] = {
            "prompts": leaks.distinct,
            "train_rows": list(leaks.train_rows),
            "validation_rows": list(leaks.validation_rows),
        }
        if leaks and main:
            logger.warning(leaks.describe(recipe.data, recipe.validation))
    return chats, record


def check_same_inputs(run: Run, record: dict[str, Any]) -> None:
    """Fail if the model or the data of an unfinished run have changed since it began.

    Raises:
        NarrowlyError: naming the model or the data.
    """
    earlier = run.reproduce
    for name, changed in {
        "model": not same_model(earlier["model"]["fingerprint"], record["model"]["fingerprint"]),
        "data": earlier["data"]["train"]["defended_sha256"]
        != record["data"]["train"]["defended_sha256"],
    }.items():
        if changed:
            raise NarrowlyError(
                f"{run.path}: the {name} changed since this run began, so it cannot go on. Bring "
                "the old one back, or choose another `output`."
            )
