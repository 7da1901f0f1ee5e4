"""Run the finders of a recipe, one after the other, and describe what they found.

The folder holds the concepts, a reading of each, `finders.json` (what each finder did) and
`layers.json` (how long the activations are at each layer, and how much a fine-tune changes them).
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, RootModel
from rich.console import Console

from narrowly.activations import ModelLike, OpenModel, open_model
from narrowly.activations.pair import adapter_folder
from narrowly.concepts.concept import Concept
from narrowly.concepts.finder import ChatsLike, Finder
from narrowly.concepts.folder import add_scores, forget, load_concepts, save_concepts
from narrowly.concepts.reading import read_concepts
from narrowly.concepts.recipe import FindRecipe
from narrowly.concepts.shares import measure_shares
from narrowly.errors import NarrowlyError
from narrowly.files import write_json, write_text
from narrowly.settings import read_record

OUTCOMES, LAYERS = "finders.json", "layers.json"

TEXTS = 1000
"""Texts that concepts are measured and read on, unless the recipe's `limit` says otherwise."""


class Outcome(BaseModel):
    """What a finder of a recipe did."""

    key: str
    """The finder's name, numbered where a recipe lists it more than once."""
    arguments: dict[str, Any]
    status: Literal["found", "failed"]
    concepts: list[str] = []
    seconds: float
    error: str = ""


class Outcomes(RootModel[list[Outcome]]):
    """What all finders of a recipe did."""


def find_all(
    recipe: FindRecipe, *, force: bool = False, console: Console | None = None
) -> list[Outcome]:
    """Find concepts with every finder of a recipe, and measure and read them on its texts.

    Saved as soon as found. What a former call finished with the same arguments is not done again; a
    finder that was interrupted continues. One that fails is recorded, and the others go on.

    Args:
        force: find again what is there already.
        console: says what is going on.

    Raises:
        NarrowlyError: the model cannot be loaded, or a concept that would be replaced carries a
            verdict.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    say = (console or Console(quiet=True)).print
    folder, work = Path(recipe.output), Path(recipe.output) / ".work"
    before = {outcome.key: outcome for outcome in load_outcomes(folder)}
    opened = _open(recipe)
    outcomes: list[Outcome] = []
    found: list[Concept] = []
    anew = False
    for position, key in enumerate(recipe.keys()):
        place = f"[{position + 1}/{len(recipe.finders)}] {key}"
        finder = recipe.finder(position, found, opened)
        finder._work = work / key
        arguments = finder.arguments()
        old = before.get(key)
        derived = "concepts" in arguments
        same = old is not None and old.status == "found" and old.arguments == arguments
        if old and same and _there(folder, old) and not force and not (derived and anew):
            say(f"{place}: found before", highlight=False)
            outcomes.append(old)
        else:
            say(f"{place} ...", highlight=False)
            anew = True
            outcomes.append(_run(key, finder, folder, old, {concept.name for concept in found}))
            if outcomes[-1].status == "found":  # one that failed may go on from what it has
                shutil.rmtree(work / key, ignore_errors=True)
            # Those of finders that follow stay on record, in case this call is interrupted.
            rest = [outcome for k, outcome in before.items() if k in recipe.keys()[position + 1 :]]
            _write(folder, [*outcomes, *rest])
            say(f"{place}: {_told(outcomes[-1])}", highlight=False, markup=False)
        found += [load_concepts(folder / f"{name}.json")[0] for name in outcomes[-1].concepts]
    texts = recipe.texts or recipe.data
    if found and texts is not None and "model" in opened:
        tuned = opened.get("tuned")
        limit = (recipe.model_extra or {}).get("limit", TEXTS)
        model, progress = opened["model"], recipe.progress
        describe(folder, found, model, texts, tuned, limit=limit, progress=progress)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()
    return outcomes


def describe(
    folder: str | Path,
    concepts: Sequence[Concept],
    base: OpenModel,
    texts: ChatsLike,
    tuned: ModelLike | None = None,
    *,
    limit: int | None = TEXTS,
    progress: bool = True,
) -> None:
    """Measure what share of the activations each concept holds, and read those not read yet."""
    folder = Path(folder)
    reading: dict[str, Any] = {"limit": limit, "progress": progress}
    shares = measure_shares(concepts, base, texts, tuned, **reading)
    for concept in concepts:
        add_scores(folder, concept.name, shares.concepts[concept.name])
    write_json(folder / LAYERS, shares.layers)
    unread = [c for c in concepts if not (folder / f"{c.name}.reading.json").exists()]
    for read in read_concepts(unread, base, texts, **reading) if unread else []:
        read.save(folder)


def load_outcomes(folder: str | Path) -> list[Outcome]:
    """What each finder of a folder did, as far as it is known.

    Raises:
        NarrowlyError: the record is damaged.
    """
    path = Path(folder) / OUTCOMES
    return read_record(Outcomes, path, "a record of finders").root if path.exists() else []


def _open(recipe: FindRecipe) -> dict[str, Any]:
    """The models, loaded once for all finders; an adapter is lent to the base model by them."""
    opened: dict[str, Any] = {}
    if recipe.model is not None:
        opened["model"] = open_model(recipe.model)
    if recipe.tuned is not None:
        lent = recipe.model is not None and adapter_folder(recipe.tuned) is not None
        opened["tuned"] = recipe.tuned if lent else open_model(recipe.tuned)
    return opened


def _there(folder: Path, outcome: Outcome) -> bool:
    return all((folder / f"{name}.json").exists() for name in outcome.concepts)


def _run(key: str, finder: Finder, folder: Path, old: Outcome | None, taken: set[str]) -> Outcome:
    start = time.monotonic()
    outcome = Outcome(key=key, arguments=finder.arguments(), status="failed", seconds=0)
    try:
        concepts = finder.find()
        for name in taken & {concept.name for concept in concepts}:
            raise NarrowlyError(
                f"a finder before it found a concept named {name!r} too. Give one of them another "
                "name, or a folder of its own."
            )
        # Readings go too: one of an earlier concept of the same name would be taken for this one's.
        names = [concept.name for concept in concepts]
        forget(folder, [*(old.concepts if old else []), *names])
        save_concepts(concepts, folder)
        outcome = outcome.model_copy(update={"status": "found", "concepts": names})
    except NarrowlyError as error:
        outcome.error = str(error)
    except Exception as error:  # a fault of ours or of a library: the other finders still count
        log = folder / f"{key}.error.txt"
        write_text(log, traceback.format_exc())
        outcome.error = f"{type(error).__name__}: {error} (see {log})"
    return outcome.model_copy(update={"seconds": round(time.monotonic() - start, 1)})


def _told(outcome: Outcome) -> str:
    if outcome.status == "failed":
        return f"failed. {outcome.error}"
    number = len(outcome.concepts)
    return f"{number} concept{'s' * (number != 1)} in {outcome.seconds:.0f} s"


def _write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    if not any(outcome.status == "found" for outcome in outcomes):
        return  # nothing is there that failures could be recorded beside
    write_json(folder / OUTCOMES, [outcome.model_dump() for outcome in outcomes])
