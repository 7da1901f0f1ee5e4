"""Run evals on a model or a run, and keep what they found in the run's folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowly.errors import NarrowlyError
from narrowly.evals.base import Cost, Eval, Row, make, parse
from narrowly.evals.journal import Journal
from narrowly.evals.samples import Samples, read_about, read_samples, write_samples
from narrowly.evals.statistics import Interval, Metric, interval
from narrowly.evals.targets import Target, targets
from narrowly.files import atomic, write_json

if TYPE_CHECKING:
    from narrowly.evals.targets import TargetLike

logger = logging.getLogger(__name__)

EvalsLike = str | Eval | Mapping[str, Any] | Iterable[Any]


class Summary(dict[str, Interval]):
    """Metrics by name, and how many answers there were of each class.

    Attributes:
        units: of the metrics: "share", "nats" or "ratio".
        labels: answers by label, unparsable, refused and failed ones among them; empty where an
            eval gives no labels.
    """

    def __init__(self, seeds: Sequence[Mapping[str, Metric]], labels: Mapping[str, int]):
        super().__init__(summarise(seeds))
        self.units = {name: metric.unit for name, metric in seeds[0].items() if name in self}
        self.labels = dict(labels)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in `summary.json`: the metrics, and `labels` where there are any."""
        metrics = {name: interval.as_dict() for name, interval in self.items()}
        return {**metrics, "labels": self.labels} if self.labels else metrics


@dataclass(frozen=True)
class Plan:
    """One eval of one model, as it would be measured."""

    model: str
    name: str
    eval_: Eval
    cost: Cost | None
    """None where the eval does not tell."""
    finished: bool
    """It is measured already, and would only be read."""


def evaluate(
    target: TargetLike,
    evals: EvalsLike,
    *,
    out: str | Path | None = None,
    seed: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> dict[str, Summary]:
    """Measure a model; into `<run>/evals/<name>/` go `samples.parquet` and `summary.json`.

    An eval that its folder already holds, of the same arguments, seed and weights, is read and not
    measured again. Answers are journalled as they come: after a kill, or when an endpoint dies
    half-way, the same call goes on from there.

    Args:
        target: a run folder, a folder of runs `seed-0`, `seed-1`, ... (each is measured), a model
            folder, Hub id or `organism:NAME`, a loaded (model, tokenizer), or a chat model behind
            a URL (`models.chat.chat_model`), which keeps its replies in its own `cache`: give it
            another one where another model answers at the same URL by the same name.
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
    # What one of them lacks is better known before another is measured.
    bound = [(one, _bind(named, one)) for one in targets(target, out)]
    for one, its_evals in bound:
        for name, eval_ in its_evals.items():
            if force or not _is_there(one, name, eval_, seed):
                eval_.check()
    found: dict[str, list[tuple[Eval, list[Row]]]] = {name: [] for name in named}
    for one, its_evals in bound:
        for name, eval_ in its_evals.items():
            found[name].append((eval_, _measured(one, name, eval_, seed, force, progress)))
    return {name: _summary(seeds) for name, seeds in found.items()}


def plan(
    target: TargetLike,
    evals: EvalsLike,
    *,
    out: str | Path | None = None,
    seed: int | None = None,
    force: bool = False,
) -> list[Plan]:
    """What `evaluate` of the same arguments would do; no model is loaded.

    Raises:
        NarrowlyError: as `evaluate`, as far as it can be known without measuring.
    """
    return [
        Plan(
            one.subject.name,
            name,
            eval_,
            _cost(eval_),
            not force and _is_there(one, name, eval_, seed),
        )
        for one in targets(target, out)
        for name, eval_ in _bind(parse(evals), one).items()
    ]


def _is_there(target: Target, name: str, eval_: Eval, seed: int | None) -> bool:
    try:
        return _finished(_folder(target, name), _about(target, name, eval_, seed))
    except NarrowlyError:  # another measurement is there, as `evaluate` will say
        return False


def _bind(named: Mapping[str, Eval], target: Target) -> dict[str, Eval]:
    return {name: eval_.bind(target.recipe) for name, eval_ in named.items()}


def _cost(eval_: Eval) -> Cost | None:
    try:
        return eval_.cost()
    except NotImplementedError:
        return None


def summarise(seeds: Sequence[Mapping[str, Metric]]) -> dict[str, Interval]:
    """Intervals of every metric that each of the seeds of one arm has."""
    names = [name for name in seeds[0] if all(name in metrics for metrics in seeds)]
    return {name: interval([metrics[name] for metrics in seeds]) for name in names}


def _summary(seeds: Sequence[tuple[Eval, list[Row]]]) -> Summary:
    labels = Counter(row["label"] for _, rows in seeds for row in rows if row["label"] is not None)
    return Summary([eval_.metrics(rows) for eval_, rows in seeds], dict(labels.most_common()))


def measured_evals(folder: str | Path) -> dict[str, tuple[Samples, dict[str, Metric]]]:
    """Every finished eval of one run folder: its samples and its metrics of each prompt."""
    found = {}
    for path in sorted(Path(folder).glob("evals/[!.]*/samples.parquet")):
        samples = read_samples(path)
        eval_ = make(samples.about["eval"], samples.about["arguments"])
        found[samples.about["eval"]] = samples, eval_.metrics(samples.rows)
    return found


def _measured(
    target: Target, name: str, eval_: Eval, seed: int | None, force: bool, progress: bool
) -> list[Row]:
    """The rows of one eval on one model, from its folder if they are there."""
    about = _about(target, name, eval_, seed)
    folder = _folder(target, name)
    if folder is None:
        return _run(target, name, eval_, about["seed"], progress)
    if not force and _finished(folder, about):
        return read_samples(folder / "samples.parquet").rows
    journal = Journal(folder.with_name(f".{name}.answers.jsonl"), about)
    target.subject.journal = journal
    try:
        rows = _run(target, name, eval_, about["seed"], progress)
        summary = _summary([(eval_, rows)])
        packages = {name: version(name) for name in ("narrowly", "torch", "transformers")}
        with atomic(folder) as part:
            part.mkdir()
            write_samples(part / "samples.parquet", rows, {**about, "versions": packages})
            write_json(part / "summary.json", summary.as_dict())
        journal.remove()
    finally:
        target.subject.journal = None
    return rows


def _run(target: Target, name: str, eval_: Eval, seed: int, progress: bool) -> list[Row]:
    subject = target.subject
    with subject.deployed():
        rows = eval_.run(subject, seed=seed, progress=progress)
    if not rows:
        raise NarrowlyError(f"eval {name!r}: no prompt to measure on; see its arguments.")
    return rows


def _about(target: Target, name: str, eval_: Eval, seed: int | None) -> dict[str, Any]:
    """What tells one measurement from another."""
    return {
        "eval": name,
        "arguments": eval_.model_dump(mode="json"),
        "seed": target.recipe.get("seed", 0) if seed is None else seed,
        "model": target.model,
        "adapter": target.weights,
    }


def _folder(target: Target, name: str) -> Path | None:
    return None if target.folder is None else target.folder / "evals" / name


def _finished(folder: Path | None, about: dict[str, Any]) -> bool:
    """Whether the folder holds this very eval.

    Raises:
        NarrowlyError: it holds the eval with other arguments, another seed or of another model.
    """
    files = ("summary.json", "samples.parquet")
    if folder is None or not all((folder / file).exists() for file in files):
        return False
    held = read_about(folder / "samples.parquet")
    if held["adapter"] != about["adapter"]:
        logger.info("%s was measured on another adapter: measuring again.", folder)
        return False
    pairs = [
        *((key, held["arguments"].get(key), mine) for key, mine in about["arguments"].items()),
        *((key, held.get(key), about[key]) for key in ("seed", "model")),
    ]
    for key, theirs, mine in pairs:
        if mine != theirs:
            raise NarrowlyError(
                f"{folder} holds this eval with {key} {theirs!r}, not {mine!r}. Ask for the same "
                "arguments, write into another folder (out), or measure again with force."
            )
    return True
