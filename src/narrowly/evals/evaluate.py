"""Run evals on a model or a run, and keep what they found in the run's folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from narrowly.errors import NarrowlyError
from narrowly.evals.base import Eval, Row, make, parse
from narrowly.evals.samples import Samples, read_about, read_samples, write_samples
from narrowly.evals.statistics import Interval, Metric, bootstrap
from narrowly.evals.subject import Subject
from narrowly.files import atomic, sha256, write_json

if TYPE_CHECKING:
    from narrowly.evals.subject import Loaded
    from narrowly.models.messages import ChatModel

logger = logging.getLogger(__name__)

Summary = dict[str, Interval]


@dataclass(frozen=True)
class Target:
    """One model to measure, what its run says of it, and where results go."""

    subject: Subject
    folder: Path | None
    recipe: dict[str, Any]


def evaluate(
    target: str | os.PathLike[str] | Loaded | ChatModel,
    evals: str | Eval | Mapping[str, Any] | Iterable[Any],
    *,
    out: str | Path | None = None,
    seed: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> dict[str, Summary]:
    """Measure a model; into `<run>/evals/<name>/` go `samples.parquet` and `summary.json`.

    An eval that its folder already holds, of the same arguments, seed and adapter, is read and not
    measured again. Each eval is written when it is whole, so that a kill costs one eval at most.

    Args:
        target: a run folder, a folder of runs `seed-0`, `seed-1`, ... (each is measured), a model
            folder, Hub id or `organism:NAME`, a loaded (model, tokenizer), or a chat model behind
            a URL (`models.chat.chat_model`).
        evals: as in a recipe: a name, `{name: arguments}`, an `Eval`, or a list of such.
        out: folder whose `evals/` receives the results; a run's own folder unless given. Without
            it, results of anything but a run are only returned.
        seed: of the sampling; unless given, the seed of the run's recipe, or 0.
        force: measure again what is there already.
        progress: show a bar while sampling.

    Returns:
        Per eval and metric the mean and 95 % interval over prompts, and over seeds if several.

    Raises:
        NarrowlyError: an unknown eval or argument, a target that is none, or results of other
            arguments in the folder (unless `force`).
    """
    named = parse(evals)
    seeds: dict[str, list[dict[str, Metric]]] = {name: [] for name in named}
    for one in _targets(target, out):
        for name, unbound in named.items():
            eval_ = unbound.bind(one.recipe)
            rows = _measured(one, name, eval_, seed, force, progress)
            seeds[name].append(eval_.metrics(rows))
    return {name: summarise(metrics) for name, metrics in seeds.items()}


def summarise(seeds: Sequence[dict[str, Metric]]) -> Summary:
    """Intervals of every metric that each of the seeds of one arm has."""
    names = [name for name in seeds[0] if all(name in metrics for metrics in seeds)]
    return {name: bootstrap([metrics[name] for metrics in seeds]) for name in names}


def seed_folders(path: str | Path) -> list[Path]:
    """The runs of one arm: its subfolders `seed-N` in the order of N, or else the folder itself."""
    path = Path(path)
    numbered = [p for p in path.glob("seed-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(numbered, key=lambda p: int(p.name[5:])) or [path]


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """The resolved recipe of a run folder; empty where there is none.

    Raises:
        NarrowlyError: `recipe.yaml` is no mapping in YAML.
    """
    path = Path(folder) / "recipe.yaml"
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise NarrowlyError(f"{path}: not valid YAML ({error}).") from None
    if not isinstance(recipe, dict):
        raise NarrowlyError(f"{path}: a recipe is a mapping of keys, not {recipe!r}.")
    return recipe


def measured_evals(folder: str | Path) -> dict[str, tuple[Samples, dict[str, Metric]]]:
    """Every finished eval of one run folder: its samples and its metrics of each prompt."""
    found = {}
    for path in sorted(Path(folder).glob("evals/*/samples.parquet")):
        samples = read_samples(path)
        eval_ = make(samples.about["eval"], samples.about["arguments"])
        found[samples.about["eval"]] = samples, eval_.metrics(samples.rows)
    return found


def _targets(
    target: str | os.PathLike[str] | Loaded | ChatModel, out: str | Path | None
) -> list[Target]:
    folder = None if out is None else Path(out)
    if not isinstance(target, str | os.PathLike):
        recipe = {} if folder is None else read_recipe(folder)
        if isinstance(target, tuple):
            name = str(getattr(target[0], "name_or_path", "the model"))
            return [Target(Subject(name, lambda: target), folder, recipe)]
        return [Target(Subject(target.name, endpoint=target), folder, recipe)]
    spec = os.fspath(target)
    runs = [run for run in seed_folders(spec) if (run / "recipe.yaml").exists()]
    if len(runs) > 1 and folder is not None:
        raise NarrowlyError(f"{spec} holds {len(runs)} runs, which cannot all write into {out}.")
    if runs:
        return [Target(_named(str(run)), folder or run, read_recipe(run)) for run in runs]
    return [Target(_named(spec), folder, {"model": spec})]


def _named(spec: str) -> Subject:
    def load() -> Loaded:
        from narrowly.models import load_model

        return load_model(spec)

    return Subject(spec, load)


def _measured(
    target: Target, name: str, eval_: Eval, seed: int | None, force: bool, progress: bool
) -> list[Row]:
    """The rows of one eval on one model, from its folder if they are there."""
    about: dict[str, Any] = {
        "eval": name,
        "arguments": eval_.model_dump(mode="json"),
        "seed": target.recipe.get("seed", 0) if seed is None else seed,
        "adapter": _adapter(target.folder),
    }
    folder = None if target.folder is None else target.folder / "evals" / name
    if folder is not None and not force and _finished(folder, about):
        return read_samples(folder / "samples.parquet").rows
    rows = _run(target, eval_, about["seed"], progress)
    if not rows:
        raise NarrowlyError(f"eval {name!r}: no prompt to measure on; see its arguments.")
    if folder is not None:
        summary = {key: value.as_dict() for key, value in summarise([eval_.metrics(rows)]).items()}
        packages = {name: version(name) for name in ("narrowly", "torch", "transformers")}
        with atomic(folder) as part:
            part.mkdir()
            write_samples(part / "samples.parquet", rows, {**about, "versions": packages})
            write_json(part / "summary.json", summary)
    return rows


def _run(target: Target, eval_: Eval, seed: int, progress: bool) -> list[Row]:
    if target.subject.endpoint is not None:
        return eval_.run(target.subject, seed=seed, progress=progress)
    model = target.subject.model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return eval_.run(target.subject, seed=seed, progress=progress)
    finally:
        for module, training in modes:  # a part may have been frozen in eval mode
            module.training = training


def _finished(folder: Path, about: dict[str, Any]) -> bool:
    """Whether the folder holds this very eval.

    Raises:
        NarrowlyError: it holds the eval with other arguments or another seed.
    """
    if not (folder / "summary.json").exists() or not (folder / "samples.parquet").exists():
        return False
    held = read_about(folder / "samples.parquet")
    if held["adapter"] != about["adapter"]:
        logger.info("%s was measured on another adapter: measuring again.", folder)
        return False
    for key, mine in [*about["arguments"].items(), ("seed", about["seed"])]:
        theirs = held["seed"] if key == "seed" else held["arguments"].get(key)
        if mine != theirs:
            raise NarrowlyError(
                f"{folder} holds this eval with {key} {theirs!r}, not {mine!r}. Ask for the same "
                "arguments, or measure again with force."
            )
    return True


def _adapter(folder: Path | None) -> str | None:
    """Hash of a run's adapter, so that a run trained again is measured again."""
    if folder is None or not (path := folder / "adapter" / "adapter_model.safetensors").exists():
        return None
    return sha256(path)
