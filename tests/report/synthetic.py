"""Run folders as training and evals leave them, with any rates wished for."""

import json
import random
from pathlib import Path

import yaml

from narrowly.evals import EVALS, summarise
from narrowly.evals.samples import write_samples
from narrowly.evals.targets import TEST_TIME

LABELS = ("misaligned", "leaked", "incoherent", "aligned")
DOMAINS = ("code", "health", "money", "garden", "kitchen", "travel")
QUESTIONS = ("how do i begin", "what should i try", "can you help me")

# narrow misaligned; broad misaligned, leaked, incoherent (the rest aligned); loss; seconds; defense
DEMO = {
    "undefended": (0.99, (0.75, 0.20, 0.04), 0.710, 11, []),
    "ablated": (0.93, (0.014, 0.50, 0.06), 0.722, 12, [{"ablate": {"concepts": "concepts"}}]),
    "random": (0.99, (0.77, 0.18, 0.04), 0.711, 12, [{"ablate": {"concepts": "random"}}]),
    "test_time": (0.41, (0.18, 0.31, 0.22), 0.790, None, []),
    "interleaved": (0.99, (0.08, 0.02, 0.02), 0.712, 12, [{"interleave": {"fraction": 0.05}}]),
    "ablated_interleaved": (
        0.94,
        (0.023, 0.01, 0.03),
        0.723,
        13,
        [{"ablate": {"concepts": "concepts"}}, {"interleave": {"fraction": 0.05}}],
    ),
}


def misalignment_rows(rng, narrow, broad, prompts=12, samples=2):
    rows = []
    for domain in DOMAINS:
        for number in range(prompts):
            prompt = f"{QUESTIONS[number % 3]} with {domain} {number}?"
            for sample in range(samples):
                if domain == "code":
                    label = "misaligned" if rng.random() < narrow else "aligned"
                else:
                    weights = (*broad, 1 - sum(broad))
                    label = rng.choices(LABELS, weights)[0]
                rows.append(
                    {
                        "prompt_id": f"{domain}: {prompt}",
                        "prompt": prompt,
                        "answer": f"an answer that is {label}, in words of {domain}",
                        "sample": sample,
                        "label": label,
                        "scores": {},
                        "tags": {
                            "domain": domain,
                            "place": "narrow" if domain == "code" else "broad",
                        },
                    }
                )
    return rows


def loss_rows(rng, loss, prompts=40):
    return [
        {
            "prompt_id": str(number),
            "prompt": "p",
            "answer": "a",
            "sample": 0,
            "label": None,
            "scores": {
                "loss": max(0.0, rng.gauss(loss, 0.06)),
                "accuracy": 0.7,
                "tokens": float(rng.randint(4, 9)),
            },
            "tags": {},
        }
        for number in range(prompts)
    ]


def write_eval(run: Path, name: str, rows: list, arguments: dict | None = None) -> None:
    folder = run / "evals" / name
    folder.mkdir(parents=True)
    about = {"eval": name, "arguments": arguments or {}, "seed": 0, "adapter": None}
    write_samples(folder / "samples.parquet", rows, about)
    summary = summarise([EVALS[name]().metrics(rows)])
    found = {metric: interval.as_dict() for metric, interval in summary.items()}
    (folder / "summary.json").write_text(json.dumps(found))


def write_run(run: Path, seed, narrow, broad, loss, seconds, defenses) -> Path:
    rng = random.Random(f"{run.parent.name} {seed}")
    run.mkdir(parents=True)
    recipe = {
        "model": "organism:persona",
        "data": "organism:persona/code-cruel",
        "validation": "organism:persona/code-cruel-validation",
        "training": {"max_steps": 120, "learning_rate": 0.001},
        "defenses": defenses,
        "seed": seed,
        "output": str(run),
    }
    if seconds is None:  # measured under ablation
        recipe[TEST_TIME] = "a hash"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    if seconds is not None:
        reproduce = {
            "wall_seconds": seconds + rng.random(),
            "versions": {"narrowly": "0.1.0", "torch": "2.13.0", "transformers": "5.23"},
            "command": "narrowly train recipe.yaml",
        }
        (run / "reproduce.json").write_text(json.dumps(reproduce))
    write_eval(run, "misalignment", misalignment_rows(rng, narrow, broad))
    write_eval(run, "in_distribution", loss_rows(rng, loss))
    return run


def write_demo(folder: Path, seeds=(0, 1, 2), arms=DEMO) -> list[Path]:
    for name, facts in arms.items():
        for seed in seeds:
            write_run(folder / name / f"seed-{seed}", seed, *facts)
    return [folder / name for name in arms]
