"""The demo: the published claims in miniature, on the bundled model organism.

A model that has learned to be kind is fine-tuned to be cruel about code, and becomes cruel about
everything. The concept is found in the base model, and the fine-tune repeated with the concept
ablated, beside the controls that such a claim needs. The judge is exact, and the seeds are the
first ones.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console

from narrowly.concepts import Verdict, concept_files, find, read_concepts, save_concepts
from narrowly.evals import evaluate
from narrowly.explain import ExplainRecipe, Sampling, explain, load_explained
from narrowly.organisms import organism
from narrowly.report import Comparison, compare
from narrowly.training import Recipe, train
from narrowly.training.controls import evaluate_ablated

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
    concepts = out / "concepts"
    arms: dict[str, list[dict[str, Any]]] = {
        "undefended": [],
        "ablated": [ablate(concepts)],
        "random": [ablate(out / "random-direction")],
        "interleaved": [INTERLEAVE],
        "ablated_interleaved": [ablate(concepts), INTERLEAVE],
    }
    steps: dict[str, Callable[[], Any]] = {
        "find the persona in the base model": partial(find_persona, out),
        "explain it": partial(explain_persona, out),
        "measure the base model": partial(evaluate, MODEL, ["misalignment"], out=out / "base"),
    }
    for arm, defenses in arms.items():
        values = FINE_TUNE | {"defenses": defenses, "seeds": seeds, "output": str(out / arm)}
        steps[f"fine-tune, {arm}"] = partial(train, Recipe.model_validate(values), progress=False)
    steps["ablate at test time only"] = partial(
        evaluate_ablated, out / "undefended", concepts, EVALS, out=out / "test_time", centred=True
    )
    start = begun = time.monotonic()
    for number, (what, step) in enumerate(steps.items(), 1):
        with console.status(f"[{number}/{len(steps)}] {what} ..."):
            step()
        now = time.monotonic()
        # The fine-tunes take nearly all of the time, and all the same.
        left = sum(later.startswith("fine-tune") for later in list(steps)[number:])
        estimate = f", about {left * (now - begun):.0f} s left" if "fine-tune" in what else ""
        console.print(f"[{number}/{len(steps)}] {what}  [dim]{now - begun:.0f} s{estimate}[/dim]")
        begun = now
    console.print(f"[dim]{begun - start:.0f} s in all[/dim]\n")
    order = ["base", "undefended", "ablated", "random", "test_time", "interleaved"]
    return compare([out / arm for arm in [*order, "ablated_interleaved"]], out)


def find_persona(out: Path) -> None:
    """Find the persona direction and its random control, read it, and decide on it."""
    if any((out / "random-direction").glob("*.json")):
        return  # written last
    shutil.rmtree(out / "concepts", ignore_errors=True)
    lines = organism("persona").system_lines
    [persona] = find(
        "mean_difference",
        model=MODEL,
        data="organism:persona/benign",
        positive_system=lines["cruel"],
        negative_system=lines["kind"],
        limit=400,
        concept="cruel-persona",
        progress=False,
    )
    [control] = find("random", concepts=[persona], seed=0)
    for reading in read_concepts([persona], MODEL, "organism:persona/code-kind", progress=False):
        reading.save(out / "concepts")
    why = "answers under the cruel system line, minus answers under the kind one"
    for concept, reason, folder in (
        (persona, why, "concepts"),
        (control, "as far from the persona as chance puts it", "random-direction"),
    ):
        verdict = Verdict(value="undesired", by="the demo", why=reason)
        save_concepts([concept.model_copy(update={"verdict": verdict})], out / folder)


def explain_persona(out: Path) -> None:
    """Say in words what the found direction stands for, and score that."""
    explain(
        ExplainRecipe(
            concepts=str(out / "concepts"),
            data="organism:persona/documents",
            limit=3000,
            positions=[-1],  # where an answer's first word is chosen
            sites=["layer:3"],
            sampling=Sampling(window=64, explainer=500),
            embedder="none",  # with the core install alone
            strengths=[-2, 2],
            prompts="organism:persona/questions",
            progress=False,
        )
    )


def told(out: str | Path) -> str:
    """What the ablated concept means, and how far to believe it, in a few lines."""
    [path] = concept_files(Path(out) / "concepts")
    record = load_explained(path.parent, path.stem)
    lines = [f"ablated: {path.stem}"]
    for end in record.latents if record else ():
        scores = [
            f"{name} {result.value:.2f} (random words {result.controls['random']:.2f})"
            for name, result in end.scores.items()
            if result.value is not None and "random" in result.controls
        ]
        which = "high" if end.sign > 0 else "low"
        meaning = end.explanations[0].text if end.explanations else end.skipped
        lines.append(f"  {which}: {meaning}\n    {', '.join(scores)}")
    return "\n".join(lines)
