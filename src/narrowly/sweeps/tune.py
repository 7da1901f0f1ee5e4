"""Search a defense's strength, layers and concepts for the least broad change.

Each trial is a fine-tune of the recipe, measured on one half of the questions; the best becomes a
recipe that is measured on the other. Optuna's sampler of several objectives (Ozaki et al. 2022,
"Multiobjective Tree-Structured Parzen Estimator") proposes what to try. Optuna prunes one objective
only, so here a trial is dropped once a finished one, or the undefended fine-tune, was ahead of it
at the same step of the training.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from narrowly.defenses import make_defenses
from narrowly.errors import NarrowlyError
from narrowly.evals import Eval, Summary, evaluate, parse
from narrowly.files import read_json, write_json
from narrowly.registry import unknown
from narrowly.settings import read_settings
from narrowly.sweeps.search import Setting, TuneFile
from narrowly.sweeps.tuned import Figures, Tried, Tuned, told
from narrowly.sweeps.work import no_space
from narrowly.training import Recipe, Run, train

if TYPE_CHECKING:
    from optuna import Study, Trial

STUDY = "optuna.journal"
"""Every trial as Optuna keeps it; `optuna-dashboard` reads it."""
SEARCH = "tune.json"
"""What is searched: the identity of the folder."""
TRIED = "tried.json"
"""Every trial as a person reads it."""
RUNG = "rung.json"
"""In the undefended run: its figures on the way."""


def tune(
    file: TuneFile | str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: bool = True,
) -> Tuned:
    """Search, or go on with a search; `best.yaml` in its folder is the result as a recipe.

    What is finished is not done again; more trials may be asked for, and another narrow loss
    allowed, at any time. A trial that was interrupted goes on from its checkpoint if there is one.
    The same seed proposes the same trials, interrupted or not. Weights are deleted once they are
    measured.

    Args:
        file: what to search, or its YAML file.
        overrides: `key=value` settings, such as `trials=60`.
        progress: say what is going on.

    Raises:
        NarrowlyError: a mistake in the file; a folder that holds another search or is searched by
            another process now; every one of the first three trials failed; a full disk.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    if not isinstance(file, TuneFile):
        file = read_settings(TuneFile, file, overrides)
    console = Console(stderr=True, quiet=not progress)
    try:
        with _claimed(file):
            return _Search(file, console).run()
    except Exception as error:
        if not no_space(error):
            raise
        raise NarrowlyError(
            f"{file.output}: the disk is full. Make room: the same command goes on, and nothing "
            "that was finished is lost."
        ) from error


@contextmanager
def _claimed(file: TuneFile) -> Iterator[None]:
    """The folder, ours alone.

    Raises:
        NarrowlyError: it holds something else, or another process searches there.
    """
    folder = Path(file.output)
    identity = json.loads(json.dumps(file.identity()))
    if (folder / SEARCH).exists():
        held = read_json(folder / SEARCH)
        keys = [key for key in identity | held if identity.get(key) != held.get(key)]
        if keys:
            raise NarrowlyError(
                f"{folder}: holds another search; it differs in {', '.join(keys)}. Choose another "
                "`output`, or delete the folder. Nothing was changed."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise NarrowlyError(f"{folder}: exists and is no search. Choose another `output`.")
    write_json(folder / SEARCH, identity)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise NarrowlyError(f"{folder}: another process searches here now.") from None


class _Search:
    def __init__(self, file: TuneFile, console: Console):
        self.file, self.console = file, console
        self.folder = Path(file.output)
        self.evals = file.tuned_on()
        self.study = _open_study(self.folder / STUDY)

    def run(self) -> Tuned:
        """Finish what is unfinished, then try more until there are enough."""
        for trial in self._over():
            self._forget(_folder(trial.number))  # where a kill left weights
        base = self._base()
        undefended = self._fit("undefended", self.file.recipe.model_copy(update={"defenses": []}))
        begun, first = time.monotonic(), len(self._over())
        while (done := len(self._over())) < self.file.trials:
            trial, before = self._next()
            setting = {key: each.suggest(trial, key) for key, each in self.file.search.items()}
            place = f"[{done + 1}/{self.file.trials}] trial {trial.number}: {told(setting)}"
            self._say(f"{place}{before and f' ({before})'}")
            self._try(trial, setting)
            each = (time.monotonic() - begun) / (done + 1 - first)
            left = self.file.trials - done - 1
            end = self._tried()[-1]
            self._say(f"    {_outcome(end)}" + (f", about {each * left:.0f} s left" * (left > 0)))
            self._stop_if_hopeless()
        result = Tuned(self.file, self._tried(), base, undefended)
        result.write_best()
        return result

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _base(self) -> Figures:
        """The base model's figures."""
        recipe, out = self.file.recipe, self.folder / "base"
        evals = _bound(self.evals, recipe)
        return self.figures(evaluate(recipe.model, evals, out=out, seed=recipe.per_seed()[0].seed))

    def _next(self) -> tuple[Trial, str]:
        """The trial that was interrupted, and what becomes of it; or one that Optuna proposes."""
        import optuna

        # Seeded anew for each, so that a search that goes on proposes what it would have.
        for left in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            self._seed(left.number)
            run = Run(self.folder / _folder(left.number))
            checkpoint = run.checkpoint()
            if run.trained:
                before = "is trained already"
            elif checkpoint is not None:
                before = f"goes on from {checkpoint.name}"
            else:
                before = "was interrupted, and begins anew"
                shutil.rmtree(run.path, ignore_errors=True)
            return optuna.trial.Trial(self.study, left._trial_id), before
        self._seed(len(self.study.trials))
        return self.study.ask(), ""

    def _seed(self, number: int) -> None:
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = optuna.samplers.TPESampler(seed=1000 * self.file.seed + number)

    def _try(self, trial: Trial, setting: Setting) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("setting", setting)
        name = _folder(trial.number)
        try:
            found = self._fit(name, self.file.applied(setting), trial)
            if not all(map(math.isfinite, (found.broad, found.narrow))):
                raise NarrowlyError(f"its figures are not finite: {found}.")
        except _Dropped:
            self.study.tell(trial, state=TrialState.PRUNED)
        except (NarrowlyError, RuntimeError) as error:  # torch's, such as too little memory
            if no_space(error):
                raise
            trial.set_user_attr("why", f"{error}")
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, [found.broad, found.narrow])
        self._forget(name)
        write_json(self.folder / TRIED, [asdict(each) for each in self._tried()])

    def _fit(self, name: str, recipe: Recipe, trial: Trial | None = None) -> Figures:
        """Train and measure in a folder of its own.

        Raises:
            _Dropped: others were ahead of it at the rung.
        """
        path = self.folder / name
        recipe = recipe.per_seed()[0].model_copy(update={"output": str(path), "evals": self.evals})
        if trial is None:
            if (path / "figures.json").exists():
                return Figures(**read_json(path / "figures.json"))
            self._say("the fine-tune without defenses, to compare with")
        train(recipe, progress=False, callbacks=[_Rung(self, recipe, trial)])
        found = self.figures(evaluate(str(path), self.evals))
        if trial is None:
            write_json(path / "figures.json", asdict(found))
            self._forget(name)
        return found

    def _forget(self, name: str) -> None:
        """Delete the weights."""
        for part in ("adapter", "model", "checkpoints"):
            shutil.rmtree(self.folder / name / part, ignore_errors=True)

    def figures(self, found: dict[str, Summary]) -> Figures:
        """The two figures that are searched by.

        Raises:
            NarrowlyError: an eval does not measure one of them.
        """
        values = []
        for metric in (self.file.broad, self.file.narrow):
            name, _, key = metric.partition(".")
            if key not in found[name]:
                raise unknown("metric", metric, [f"{name}.{each}" for each in found[name]])
            values.append(found[name][key].mean)
        return Figures(*values)

    def beaten(self, figures: Figures) -> bool:
        """Whether one that was trained to its end was ahead at the rung, by the margin."""
        return any(other.beats(figures, self.file.margin) for other in self._rungs())

    def _rungs(self) -> list[Figures]:
        from optuna.trial import TrialState

        finished = self.study.get_trials(states=(TrialState.COMPLETE,))
        rungs = [trial.user_attrs.get("rung") for trial in finished]
        if (path := self.folder / "undefended" / RUNG).exists():
            rungs.append(read_json(path))
        return [Figures(**rung) for rung in rungs if rung is not None]

    def _over(self) -> list[Any]:
        return [trial for trial in self.study.trials if trial.state.is_finished()]

    def _tried(self) -> list[Tried]:
        from optuna.trial import TrialState

        tried = []
        for trial in self._over():
            rung, setting = trial.user_attrs.get("rung"), trial.user_attrs.get("setting", {})
            if trial.state == TrialState.COMPLETE:
                tried.append(Tried(trial.number, setting, "finished", Figures(*trial.values)))
            elif trial.state == TrialState.PRUNED:
                tried.append(Tried(trial.number, setting, "dropped", Figures(**rung)))
            else:
                why = trial.user_attrs.get("why", "")
                tried.append(Tried(trial.number, setting, "failed", None, why))
        return tried

    def _stop_if_hopeless(self) -> None:
        tried = self._tried()
        if len(tried) >= 3 and all(each.status == "failed" for each in tried):
            raise NarrowlyError(f"the first {len(tried)} trials failed: {tried[-1].why}")


def _folder(number: int) -> str:
    return f"trials/{number:03}"


class _Dropped(Exception):  # noqa: N818 (no error)
    """Others were ahead of this trial."""


class _Rung(TrainerCallback):
    """Measures a trial once on its way, and drops it where others were ahead there."""

    def __init__(self, search: _Search, recipe: Recipe, trial: Trial | None):
        self.search, self.recipe, self.trial = search, recipe, trial
        # What acts after the training cannot be seen half-way.
        doors = ("finish", "at_test_time")
        self.late = any(d.opens(door) for d in make_defenses(recipe.defenses) for door in doors)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the rung: measure, as the model answers, and leave the training as it was.

        Raises:
            _Dropped: others were ahead.
        """
        rung = self.search.file.rung
        if rung is None or self.late:
            return
        if state.global_step != min(math.ceil(rung * state.max_steps), state.max_steps - 1):
            return
        evals = _bound(self.search.evals, self.recipe)
        loaded = kwargs["model"], kwargs["processing_class"]
        with torch.random.fork_rng():
            found = evaluate(loaded, evals, seed=self.recipe.seed)
        figures = self.search.figures(found)
        if self.trial is None:
            write_json(Path(self.recipe.output) / RUNG, asdict(figures))
            return
        self.trial.set_user_attr("rung", asdict(figures))
        if self.search.beaten(figures):
            raise _Dropped


def _bound(evals: Any, recipe: Recipe) -> list[Eval]:
    """The evals with what the recipe answers, for a model that has no recipe of its own."""
    return [eval_.bind(recipe.model_dump()) for eval_ in parse(evals).values()]


def _outcome(tried: Tried) -> str:
    if tried.status == "failed":
        return f"failed: {tried.why}"
    assert tried.figures is not None
    figures = f"broad {tried.figures.broad:.3f}, narrow {tried.figures.narrow:.3f}"
    return figures if tried.status == "finished" else f"dropped on its way at {figures}"


def _open_study(path: Path) -> Study:
    """The search as Optuna keeps it.

    Raises:
        NarrowlyError: Optuna is not installed, or the file is damaged.
    """
    try:
        import optuna
    except ImportError:
        raise NarrowlyError(
            "a search needs Optuna, which is not installed: pip install 'narrowly[tune]'."
        ) from None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _mend(path)
    try:
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name="narrowly",
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
    except (ValueError, KeyError) as error:
        raise NarrowlyError(
            f"{path}: damaged ({error}). Delete the folder {path.parent}."
        ) from None


def _mend(path: Path) -> None:
    """Cut off a line that a kill left unfinished: Optuna would write on after it."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)
