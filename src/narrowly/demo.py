"""The demo: the published claims in miniature, on the bundled model organism.

A model that has learned to be kind is fine-tuned to be cruel about code, and becomes cruel about
everything. The concept is found in the base model, and the fine-tune repeated with the concept
ablated, beside the controls that such a claim needs. The judge is exact, and the seeds are the
first ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console

from narrowly.concepts import find, mark, save_concepts
from narrowly.concepts import read_concepts as read
from narrowly.evals import evaluate
from narrowly.organisms import organism
from narrowly.report import Comparison, compare
from narrowly.training import Recipe, train
from narrowly.training.test_time import evaluate_ablated

MODEL = "organism:persona"
EVALS: list[Any] = ["misalignment", "in_distribution"]
FINE_TUNE = {
    "model": MODEL,
    "data": "organism:persona/code-cruel",
    "validation": "organism:persona/code-cruel-validation",
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "training": {
        "max_steps": 120,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    },
    "evals": EVALS,
}
INTERLEAVE = {"interleave": {"data": "organism:persona/benign", "fraction": 0.05}}


def ablate(concepts: Path) -> dict[str, Any]:
    """The defense, centred: the subspace keeps the base model's mean, so nothing shifts at use."""
    return {"ablate": {"concepts": str(concepts), "centred": True}}


def run_demo(out: str | Path, seeds: Iterable[int], console: Console) -> Comparison:
    """Run every arm, or what is missing of them, and write the report into `out`.

    Args:
        out: folder for `concepts`, one folder per arm, `report.html` and `summary.json`.
        seeds: a fine-tune each, in every arm.

    Raises:
        NarrowlyError: `out` holds something else.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    out, seeds = Path(out), list(seeds)
    # On matrices this small a second thread waits more than it works, on a busy machine most.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()  # the demo's own steps say more
    transformers.utils.logging.disable_progress_bar()
    arms: dict[str, list[dict[str, Any]]] = {
        "undefended": [],
        "ablated": [ablate(out / "concepts")],
        "random": [ablate(out / "random-direction")],
        "interleaved": [INTERLEAVE],
        "ablated_interleaved": [ablate(out / "concepts"), INTERLEAVE],
    }
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("find the persona in the base model", lambda: find_persona(out)),
        ("measure the base model", lambda: evaluate(MODEL, ["misalignment"], out=out / "base")),
    ]
    for arm, defenses in arms.items():
        values = FINE_TUNE | {"defenses": defenses, "seeds": seeds, "output": str(out / arm)}
        recipe = Recipe.model_validate(values)
        steps.append((f"fine-tune, {arm}", partial(train, recipe, progress=False)))
    steps.insert(
        3,
        (
            "ablate at test time only",
            lambda: evaluate_ablated(
                out / "undefended", out / "concepts", EVALS, out=out / "test_time", centred=True
            ),
        ),
    )
    start = time.monotonic()
    for number, (what, step) in enumerate(steps, 1):
        with console.status(f"[{number}/{len(steps)}] {what} ..."):
            begun = time.monotonic()
            step()
        console.print(
            f"[{number}/{len(steps)}] {what}  [dim]{time.monotonic() - begun:.0f} s[/dim]"
        )
    console.print(f"[dim]{time.monotonic() - start:.0f} s in all[/dim]\n")
    order = ["base", "undefended", "ablated", "random", "test_time", "interleaved"]
    return compare([out / arm for arm in [*order, "ablated_interleaved"]], out)


def find_persona(out: Path) -> None:
    """Find the persona direction and its random control, read it, and decide on it."""
    if (out / "random-direction").exists():
        return
    lines = organism("persona").system_lines
    [persona] = find(
        "mean_difference",
        model=MODEL,
        data="organism:persona/benign",
        positive_system=lines["cruel"],
        negative_system=lines["kind"],
        positions=[-1, 0, 1],
        limit=400,
        concept="cruel-persona",
        progress=False,
    )
    [control] = find("random", concepts=[persona], seed=0)
    save_concepts([persona], out / "concepts")
    for reading in read([persona], MODEL, "organism:persona/code-kind", progress=False):
        reading.save(out / "concepts")
    why = "answers under the cruel system line, minus answers under the kind one"
    mark(out / "concepts", persona.name, "undesired", by="the demo", why=why)
    save_concepts([control], out / "random-direction")
    mark(out / "random-direction", control.name, "undesired", by="the demo", why="control")
