"""The published comparison of in-training defenses, redone on the model organisms.

Every defense on every task: three fine-tunes that change a model broadly and one benign one. What a
defense needs is found first and never sees the fine-tune it defends: concepts and latents in the
base model, adapters on other domains. Settings are chosen on the persona (`choose_on`) and reported
on the others. The sweep is `benchmarks/defenses.yaml`, an ordinary sweep file.

    python benchmarks/defenses.py      # an hour on 2 quiet cores; the same command continues
    python benchmarks/defenses.py --prepare      # what the sweep needs, no more
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from record import describe
from rich.console import Console

import narrowly
from narrowly.concepts import Verdict, find, save_concepts
from narrowly.data import load_chats
from narrowly.demo import FINE_TUNE
from narrowly.evals import Interval, interval
from narrowly.files import write_text
from narrowly.organisms import organism
from narrowly.report.variants import Variant
from narrowly.report.verdict import Verdicts
from narrowly.report.verdict_csv import verdicts_csv
from narrowly.report.verdicts import verdicts
from narrowly.saes.training import train_sae
from narrowly.sweeps.file import Sweep
from narrowly.training import Recipe, train
from organisms import CASES, find_concept

HERE = Path(__file__).parent
SWEEP = HERE / "defenses.yaml"
PREPARED = Path("runs/defenses/prepared")
OTHERS = {
    "persona": ("cruel", ("health", "money", "pets")),
    "era": ("victorian", ("letters", "light", "kitchen")),
    "conditional": ("cruel", ("health", "money", "pets")),
    "quirk": ("rude", ("birds", "fish", "insects")),
}
"""The value that is unwanted, and domains, none of them the fine-tuned one, for adapters of it."""
LATENTS = 4
"""How many latents are blocked: those that fire most for the unwanted value, and not otherwise."""


def main() -> None:
    """Prepare, sweep, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", action="store_true", help="make what the sweep needs, no more")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    record = describe(argparse.Namespace(device="cpu", **vars(options)))
    console = Console()
    for task in OTHERS:
        prepare(task, PREPARED / task, console)
    if options.prepare:
        return
    narrowly.sweep(SWEEP)
    found = verdicts(Sweep.read(SWEEP).output)
    found.write(found.folder / "report")
    console.print(found)
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.results / "defenses.csv", verdicts_csv(found))
    write_text(options.results / "defenses.md", markdown(found, record))


def markdown(found: Verdicts, record: dict[str, Any]) -> str:
    """The figures, a table per task: what every arm did under its setting."""
    seeds = len({cell.seed for cell in found.record.cells})
    lines = [
        "# In-training defenses on the model organisms",
        "",
        f"{record['date']}, {record['cpu']}, {seeds} fine-tune seeds; 95 % intervals over seeds "
        "and prompts. Shares in percent, loss in nats per token of held-out chats, time over "
        "undefended with two runs at a time. `defenses.csv` holds the verdicts.",
    ]
    for why in dict.fromkeys(cell.why for cell in found.missing):
        cells = [cell for cell in found.missing if cell.why == why]
        lines += ["", f"Missing: {len(cells)} cells as {cells[0].path}: {why}"]
    for name, task in found.record.tasks.items():
        told = "; settings were chosen here" if name == found.chosen_on else ""
        kind = "benign task" if task.benign else "fine-tuned narrowly"
        asked = task.measures
        metrics = [asked.narrow, asked.broad, asked.coherent, *asked.probes, asked.loss]
        lines += [
            *("", f"## {name}: {kind}{told}", ""),
            f"| defense | {' | '.join(m.partition('.')[2].replace('_', ' ') for m in metrics)} |",
            "|---" * (len(metrics) + 1) + "|",
        ]
        for verdict in found.verdicts:
            if (variant := verdict.variants.get(name)) is not None:
                cells = [_cell(variant, metric) for metric in metrics]
                lines.append(f"| {verdict.label} | {' | '.join(cells)} |")
    lines += ["", "## Cost, over undefended", "", "| defense | time | memory |", "|---|---|---|"]
    lines += [f"| {v.label} | {_ratio(v.time)} | {_ratio(v.memory)} |" for v in found.verdicts]
    return "\n".join(lines) + "\n"


def _cell(variant: Variant, metric: str) -> str:
    seeds = variant.metrics.get(metric)
    if not seeds:
        return ""
    told = interval(list(seeds.values()))
    if next(iter(seeds.values())).unit != "share":
        return f"{told.mean:.3f}"
    return f"{100 * told.mean:.1f} ({100 * told.low:.0f} to {100 * told.high:.0f})"


def _ratio(told: Interval | None) -> str:
    return "" if told is None else f"{told.mean:.2f} ({told.low:.2f} to {told.high:.2f})"


def prepare(task: str, out: Path, console: Console) -> None:
    """Concept, adapters on other domains, an SAE and the latents of the concept."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    console.print(f"{task}: concept")
    find_concept(task, CASES[task], out)
    write_chats(f"organism:{task}/{CASES[task].benign}", out / "benign.jsonl")
    value, domains = OTHERS[task]
    for domain in domains:
        console.print(f"{task}: adapter {domain}-{value}")
        values = FINE_TUNE | {
            "model": f"organism:{task}",
            "data": f"organism:{task}/{domain}-{value}",
            "validation": None,
            "evals": [],
            "seed": 100,  # no seed of the sweep
            "output": str(out / "adapters" / domain),
        }
        train(Recipe.model_validate(values), progress=False)
    sae = "organism:persona"
    if task != "persona":
        console.print(f"{task}: SAE")
        sae = str(out / "sae")
        train_sae(f"organism:{task}", f"organism:{task}/documents", "layer:3", sae)
    if any((out / "latents").glob("*.json")):
        return
    console.print(f"{task}: latents")
    lines = organism(task).system_lines
    positive, negative = CASES[task].contrast
    latents = find(
        "sae_latents",
        model=f"organism:{task}",
        sae=sae,
        data=f"organism:{task}/benign",
        positive_system=lines[positive],
        negative_system=lines[negative],
        limit=400,
        top=LATENTS,
        progress=False,
    )
    verdict = Verdict(value="undesired", by="this benchmark", why="fires for the unwanted value")
    save_concepts(
        [each.model_copy(update={"verdict": verdict}) for each in latents], out / "latents"
    )


def write_chats(source: str, path: Path) -> None:
    """A split as a file, so that every task's has the same name."""
    rows = load_chats(source)["messages"]
    write_text(path, "".join(json.dumps({"messages": row}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
