"""The control that every ablation needs: the same concepts ablated at test time only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from narrowly.defenses.ablate import Ablate, Concepts, listed
from narrowly.evals import Summary, evaluate, read_recipe, seed_folders
from narrowly.evals.targets import TEST_TIME
from narrowly.files import sha256, write_text
from narrowly.interventions import Intervention, attach
from narrowly.models import load_model


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
        ablation = Ablate(concepts=listed(concepts), centred=centred).interventions(model)
        for projection in ablation:
            projection.phases = ("eval", "generate")
        target = out / folder.name if len(folders) > 1 else out
        recipe: Mapping[str, Any] = read_recipe(folder) or {"model": str(folder)}
        about = {"output": str(target), TEST_TIME: _digest(ablation)}
        write_text(target / "recipe.yaml", yaml.safe_dump({**recipe, **about}))
        attached = attach(model, ablation)
        try:
            results = evaluate((model, tokenizer), evals, out=target, seed=seed, force=force)
            if attached.counts:  # finished evals are read, and run no model
                attached.verify()
        finally:
            attached.close()
    return results


def _digest(ablation: Sequence[Intervention]) -> str:
    """A hash of what is ablated, so that another ablation is measured anew."""
    parts = [
        f"{each.site} {name}".encode() + buffer.cpu().float().numpy().tobytes()
        for each in ablation
        for name, buffer in each.named_buffers()
    ]
    return sha256(b"".join(parts))
