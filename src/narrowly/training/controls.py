"""The control that every ablation needs: the same concepts ablated at test time only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from narrowly.defenses.ablate import Concepts, listed
from narrowly.defenses.test_time_ablation import AblationAtTestTime
from narrowly.evals import Summary, evaluate, read_recipe, seed_folders
from narrowly.evals.targets import TEST_TIME
from narrowly.files import sha256, write_text
from narrowly.interventions import save_interventions
from narrowly.models import load_model
from narrowly.models.test_time import STAYS, staying


def evaluate_ablated(
    run: str | Path,
    concepts: Concepts,
    evals: Any,
    *,
    out: str | Path,
    centred: bool = False,
    seed: int | None = None,
    force: bool = False,
) -> dict[str, Summary]:
    """Measure a run as it is, but with concepts ablated while it answers.

    Args:
        run: a run, or a folder of runs `seed-N` (each is measured into `out/seed-N`), or a model.
        concepts: as for `narrowly.ablate`.
        evals, seed, force: as for `narrowly.evaluate`.
        out: folder that receives recipes and evals, for `compare` to read as an arm of its own.

    Raises:
        NarrowlyError: as `narrowly.ablate` and `narrowly.evaluate`.
    """
    out = Path(out)
    folders = seed_folders(run) if Path(run).is_dir() else [Path(run)]
    results: dict[str, Summary] = {}
    for folder in folders:
        model, tokenizer = load_model(str(folder))
        defense = AblationAtTestTime(concepts=listed(concepts), centred=centred)
        defense.bind(model, tokenizer, seed=0)
        target = out / folder.name if len(folders) > 1 else out
        stays = target / STAYS
        save_interventions([*staying(folder), *defense.at_test_time(model)], stays)
        recipe: Mapping[str, Any] = read_recipe(folder) or {"model": str(folder)}
        about = {"output": str(target), TEST_TIME: sha256(stays / "interventions.json")}
        write_text(target / "recipe.yaml", yaml.safe_dump({**recipe, **about}))
        results = evaluate((model, tokenizer), evals, out=target, seed=seed, force=force)
    return results
