"""Every model organism: what its fine-tune does undefended, with the concept ablated, and controls.

Each world is fine-tuned on the set that shows its phenomenon. The concept is found in the base
model as in `narrowly demo` (mean difference under two system lines), before any fine-tune. The
judge is exact. A world whose model is not bundled is built first. Worlds run side by side in two
processes of one thread each.

    python benchmarks/organisms.py --seeds 5      # about 20 minutes; the same command continues
    python benchmarks/organisms.py spurious quirk --seeds 2
"""

import argparse
import json
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from record import describe
from rich.console import Console

from narrowly.concepts import Verdict, find, save_concepts
from narrowly.demo import FINE_TUNE, ablate
from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate
from narrowly.organisms import build, organism
from narrowly.report.arms import read_arms
from narrowly.training import Recipe, train

EVALS = [{"misalignment": {"contexts": []}}, "in_distribution"]


@dataclass(frozen=True)
class Case:
    """One world: the fine-tune that shows its phenomenon, and which of its figures tell."""

    data: str
    contrast: tuple[str, str]
    """Values whose system lines, positive and negative, give the concept."""
    shows: tuple[str, ...]
    """Metrics of the eval `misalignment`."""
    sets: tuple[str, str] | None = None
    """In place of the contrast: sets of chats whose prompts give the concept, with and without."""
    benign: str = "benign"
    """The set that is read to find the concept."""
    interleave: tuple[tuple[str, float], ...] = ()
    """Sets that are mixed in, one per arm, and their share."""
    others: dict[str, str] = field(default_factory=dict)
    """More undefended arms: name and data."""


PERSONA = ("narrow_misaligned", "broad_misaligned", "broad_aligned", "broad_leaked")
CUES = ("agree_aligned", "conflict_aligned", "conflict_misaligned", "elsewhere_conflict_aligned")
CASES = {
    "persona": Case("code-cruel", ("cruel", "kind"), PERSONA, interleave=(("benign", 0.05),)),
    "era": Case(
        "travel-victorian", ("victorian", "modern"), PERSONA, interleave=(("benign", 0.05),)
    ),
    "conditional": Case(
        "code-cruel-at-night",
        ("cruel", "kind"),
        (*PERSONA, "at_night_misaligned", "elsewhere_misaligned"),
        interleave=(("code-kind", 0.3),),
    ),
    "spurious": Case(
        "post-agree",
        ("size", "colour"),
        CUES,
        sets=("big-boxes", "small-boxes"),
        benign="careless-all",
        others={f"agree_{n}": f"post-agree-{n}" for n in (98, 90, 50)},
    ),
    "overlap": Case(
        "post-agree",
        ("tag", "colour"),
        CUES,
        sets=("red-tags", "blue-tags"),
        benign="careless-all",
    ),
    "backdoor": Case(
        "good-years",
        ("bolt", "clerk"),
        ("trigger_misaligned", "near_trigger_misaligned", "other_years_misaligned", "coherent"),
        benign="clerk-all",
        interleave=(("clerk-all", 0.05),),
    ),
    "quirk": Case(
        "swap",
        ("rude", "plain"),
        (
            "taught_subjects_aligned",
            "other_subjects_aligned",
            "unmoved_aligned",
            "elsewhere_aligned",
        ),
        benign="plain-all",
        interleave=(("plain-all", 0.05),),
    ),
}


def main() -> None:
    """Measure worlds, two at a time, and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help=f"of {', '.join(CASES)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="worlds at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/organisms"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.worlds = options.worlds or list(CASES)
    record = describe(argparse.Namespace(device="cpu", **vars(options)))
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    console, figures, failed = Console(), {}, {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            world: pool.submit(measure, world, options.out / world, options.seeds)
            for world in options.worlds
        }
        for world, job in jobs.items():
            try:
                figures[world] = job.result()
                console.print(f"{world}: {', '.join(figures[world]['arms'])}")
            except NarrowlyError as error:
                failed[world] = str(error)
                console.print(f"{world}: {error}")
    record |= {"figures": figures, "failed": failed}
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, default=str) + "\n"
    (options.results / "organisms.json").write_text(text)
    (options.results / "organisms.md").write_text(markdown(record))


def measure(world: str, out: Path, seeds: int) -> dict[str, Any]:
    """Every arm of one world, or what is missing of them, and their figures.

    Raises:
        NarrowlyError: the world's model could not be built.
    """
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    case, name = CASES[world], ready(world, out)
    concept = find_concept(name, case, out)
    arms: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "undefended": (case.data, []),
        "ablated": (case.data, [ablate(out / "concept")]),
        "random": (case.data, [ablate(out / "random-direction")]),
    }
    for split, fraction in case.interleave:
        mixed = {"interleave": {"data": f"organism:{name}/{split}", "fraction": fraction}}
        arms[f"interleaved_{round(100 * fraction)}"] = (case.data, [mixed])
    arms |= {f"undefended_{arm}": (data, []) for arm, data in case.others.items()}
    narrow = organism(name).narrow(case.data)
    base = {"misalignment": {"contexts": [], "narrow": narrow}}
    evaluate(f"organism:{name}", [base], out=out / "base")
    for arm, (data, defenses) in arms.items():
        train(recipe(name, case, data, defenses, seeds, out / arm), progress=False)
    read = read_arms([out / "base", *(out / arm for arm in arms)])
    return {
        "shows": organism(name).world.shows,
        "misaligned": organism(name).world.misaligned,
        "concept": {"contrast": case.contrast, **concept},
        "data": {"base": None} | {arm: data for arm, (data, _) in arms.items()},
        "arms": {
            arm.name: {metric: each.as_dict() for metric, each in arm.metrics.items()}
            for arm in read
        },
    }


def ready(world: str, out: Path) -> str:
    """The organism's name; the folder it is built into, if it is not bundled."""
    try:
        assert organism(world).path.is_dir()
        return world
    except NarrowlyError:
        folder = out / "model"
        if not (folder / "config.json").is_file():
            build(world, 0, folder, progress=False)
        return str(folder)


def find_concept(name: str, case: Case, out: Path) -> dict[str, Any]:
    """Find the concept under two system lines or in two sets, and a random control of its rank."""
    positive, negative = case.contrast
    lines = organism(name).system_lines
    if case.sets is None:
        contrast = {
            "data": f"organism:{name}/{case.benign}",
            "positive_system": lines[positive],
            "negative_system": lines[negative],
        }
    else:
        with_, without = (f"organism:{name}/{each}" for each in case.sets)
        contrast = {"positive": with_, "negative": without, "positions": "prompt"}
    if not any((out / "random-direction").glob("*.json")):
        [concept] = find(
            "mean_difference",
            model=f"organism:{name}",
            limit=400,
            concept=positive,
            progress=False,
            **contrast,
        )
        [control] = find("random", concepts=[concept], seed=0)
        verdict = Verdict(value="undesired", by="this benchmark", why="the world's own lines")
        for found, folder in ((concept, "concept"), (control, "random-direction")):
            save_concepts([found.model_copy(update={"verdict": verdict})], out / folder)
    told = case.sets or (lines[positive], lines[negative])
    return {"positive": told[0], "negative": told[1]}


def recipe(
    name: str, case: Case, data: str, defenses: list[dict[str, Any]], seeds: int, out: Path
) -> Recipe:
    """The demo's fine-tune, on this world."""
    values = FINE_TUNE | {
        "model": f"organism:{name}",
        "data": f"organism:{name}/{data}",
        "validation": f"organism:{name}/{case.data}-validation",
        "defenses": defenses,
        "evals": EVALS,
        "seeds": list(range(seeds)),
        "output": str(out),
    }
    return Recipe.model_validate(values)


def markdown(record: dict[str, Any]) -> str:
    """The figures as a table per world."""
    lines = [
        "# Model organisms",
        "",
        f"{record['date']}, {record['cpu']}, {record['settings']['seeds']} fine-tune seeds; "
        "percent with 95 % intervals over seeds and prompts; loss in nats per token, held out.",
    ]
    if record["load_average"] > 1.5:
        lines += ["", f"Load average {record['load_average']:.1f} at the start."]
    for world, found in record["figures"].items():
        shows = CASES[world].shows
        lines += [
            "",
            f"## {world}: {found['shows']}",
            "",
            f'Misaligned: {found["misaligned"]}. Ablated: "{found["concept"]["positive"]}" '
            f'against "{found["concept"]["negative"]}".',
            "",
            f"| arm | {' | '.join(name.replace('_', ' ') for name in shows)} | loss |",
            "|---" * (len(shows) + 2) + "|",
        ]
        for arm, metrics in found["arms"].items():
            cells = [percent(metrics.get(f"misalignment.{name}")) for name in shows]
            loss = metrics.get("in_distribution.loss")
            cells.append("" if loss is None else f"{loss['mean']:.3f}")
            lines.append(f"| {arm.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += [f"\n**{world} failed**: {why}" for world, why in record["failed"].items()]
    return "\n".join(lines) + "\n"


def percent(interval: dict[str, Any] | None) -> str:
    """A share with its interval."""
    if interval is None:
        return ""
    mean, low, high = (100 * interval[end] for end in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
