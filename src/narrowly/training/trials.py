"""Selection by effect: short trial fine-tunes tell which concepts carry the unwanted change."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div

from narrowly.activations import LanguageModel, Pair, open_pair
from narrowly.concepts import Concept, find, load_concepts, save_concepts
from narrowly.concepts.finder import ChatsLike
from narrowly.data import collate, fingerprint, load_chats, token_batches, tokenize
from narrowly.errors import NarrowlyError
from narrowly.evals.in_distribution import answer_losses
from narrowly.files import read_json, write_json
from narrowly.registry import unknown
from narrowly.settings import read_record
from narrowly.training.recipe import Recipe
from narrowly.training.train import train

UNDEFENDED = "(nothing)"
"""The trial in which no concept is ablated."""
ENOUGH = 0.1
"""Share of what the undefended trial learned, below which another learned too little to tell."""
TOKENS = 4096
"""Of a batch whose predictions are compared: the whole vocabulary's, of two models."""


class Trial(BaseModel):
    """What one short fine-tune did."""

    model_config = ConfigDict(frozen=True)

    concept: str
    """The one that was ablated in it."""
    learned: float
    """How much the loss on the held-out chats of the task fell, in nats per token."""
    changed: float
    """Mean KL(base || trial) in nats per answer token on the broad chats."""
    evals: dict[str, dict[str, float]] = {}
    """Means of the recipe's own evals."""
    directions: str = ""
    """Hash of what was ablated."""


class Effects(BaseModel):
    """Trials, and what each concept is worth."""

    model_config = ConfigDict(frozen=True)

    format: str = "narrowly-effects-1"
    settings: str
    """Hash of what the trials were made with."""
    steps: int
    by: str = "change"
    """What is unwanted: "change", or a metric of the recipe's evals, such as
    `misalignment.broad_misaligned`."""
    trials: list[Trial]

    @property
    def undefended(self) -> Trial:
        """The trial without ablation."""
        return self.trials[0]

    def unwanted(self, trial: Trial) -> float:
        """How much of what is unwanted a trial did.

        Raises:
            NarrowlyError: no eval of the trials has this metric.
        """
        if self.by == "change":
            return trial.changed
        name, _, metric = self.by.partition(".")
        if metric not in trial.evals.get(name, {}):
            known = [f"{name}.{key}" for name, keys in trial.evals.items() for key in keys]
            raise unknown("measure of what is unwanted", self.by, ["change", *known])
        return trial.evals[name][metric]

    def removed(self, trial: Trial) -> float | None:
        """The share of the unwanted per nat of the task learned that the ablation took away.

        1: the task was learned and nothing unwanted with it; 0: as much as undefended; below 0:
        more. None where too little of the task was learned to tell.
        """
        if trial.learned < ENOUGH * self.undefended.learned:
            return None
        undefended = self.unwanted(self.undefended) / self.undefended.learned
        return 1 - self.unwanted(trial) / trial.learned / undefended

    @property
    def ranked(self) -> list[Trial]:
        """The trials of concepts, the most effective first; those that learned too little last."""

        def effect(trial: Trial) -> float:
            removed = self.removed(trial)
            return float("-inf") if removed is None else removed

        return sorted(self.trials[1:], key=effect, reverse=True)

    def __rich__(self) -> RenderableType:
        """A row per concept."""
        title = f"Trial fine-tunes of {self.steps} steps, by {self.by}"
        table = Table(box=None, title=title, title_justify="left")
        table.add_column("ablated")
        for column in ("removed", "task learned", "unwanted", "KL from base"):
            table.add_column(column, justify="right")
        for trial in [*self.ranked, self.undefended]:
            removed = self.removed(trial)
            table.add_row(
                trial.concept,
                "" if removed is None else f"{100 * removed:.0f} %",
                f"{100 * trial.learned / self.undefended.learned:.0f} %",
                f"{self.unwanted(trial):.3f}",
                f"{trial.changed:.3f}",
            )
        return table


def rank_by_effect(
    recipe: Recipe | str | Path,
    concepts: str | Path,
    broad: ChatsLike,
    out: str | Path,
    *,
    by: str = "change",
    names: Sequence[str] | None = None,
    steps: int = 40,
    controls: int = 3,
    centred: bool = False,
    limit: int = 200,
    progress: bool = True,
) -> Effects:
    """Repeat a short fine-tune with each concept ablated, and rank concepts by what that spares.

    A concept's effect is how much of what is unwanted its ablation removes, at equal learning of
    the task: an ablation that merely slows the fine-tune down gains nothing. "change" needs no
    judge: how far the answers to chats of everything else moved from the base model's. But it
    cannot tell harm from other spread: on the bundled organism the ablation that removes nearly all
    misalignment moves those answers further, as it lets phrases of the task leak. Where an eval
    measures what is unwanted, name its metric. Random directions are tried too; a concept that does
    no better is noise. One seed each, so effects that are close may change places.

    Every finished trial is on record in `out/effects.json`, and the same call goes on from there.
    A trial's weights are deleted once it is measured.

    Args:
        recipe: the fine-tune, with `validation` data: held-out chats of the task. Its own defenses
            stay, and its evals are run on every trial. Of several seeds the first is tried.
        concepts: their folder.
        broad: chats with answers, of everything but the task.
        by: what is unwanted: "change", or a metric of the recipe's evals, `EVAL.METRIC`.
        names: which concepts; None: all.
        steps: of each trial.
        controls: how many random directions are tried, at the sites of concepts from across the
            list.
        centred: as for `ablate`.
        limit: measure on the first so many chats, of the task and broad.

    Raises:
        NarrowlyError: the recipe lacks validation data, an unknown name, the undefended trial
            learns nothing, or `out` holds trials of other settings.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    if recipe.validation is None:
        raise NarrowlyError(
            "trials need a recipe with `validation` chats, on which to measure how much of the "
            "task was learned."
        )
    recipe = recipe.per_seed()[0]
    folder, out = Path(concepts), Path(out)
    held_out = load_chats(recipe.validation, limit=limit)
    elsewhere = load_chats(broad, limit=limit)
    found = {concept.name: concept for concept in load_concepts(folder)}
    for name in names or []:
        if name not in found:
            raise unknown("concept", name, sorted(found))
    chosen = [found[name] for name in names or found]
    places = [chosen[i * len(chosen) // controls] for i in range(controls)]
    drawn = [find("random", concepts=[c], seed=i)[0] for i, c in enumerate(places, 1)]
    save_concepts(drawn, out / "controls")
    arms: dict[str, Path | None] = {UNDEFENDED: None}
    arms |= dict.fromkeys([concept.name for concept in chosen], folder)
    arms |= dict.fromkeys([concept.name for concept in drawn], out / "controls")
    ablated = {concept.name: _hash(concept) for concept in (*chosen, *drawn)} | {UNDEFENDED: ""}

    about = recipe.model_dump(exclude={"output"}) | {"steps": steps, "centred": centred}
    data = [fingerprint(held_out), fingerprint(elsewhere)]
    settings = hashlib.sha256(json.dumps([about, data], default=str).encode()).hexdigest()[:16]
    effects = Effects(settings=settings, steps=steps, by=by, trials=_load(out, settings))
    # Trials of concepts not asked about now are kept; one of a concept found anew is not.
    kept = [t for t in effects.trials if ablated.get(t.concept, t.directions) == t.directions]
    done = {trial.concept: trial for trial in kept}
    for arm in track(list(arms), "trial fine-tunes", disable=not progress):
        if arm not in done:
            trial = _trial(recipe, arm, arms[arm], out / "trial", steps, centred)
            measured = _measured(trial, arm, held_out, elsewhere)
            done[arm] = measured.model_copy(update={"directions": ablated[arm]})
            if done[UNDEFENDED].learned <= 0:
                raise NarrowlyError(
                    f"after {steps} steps the undefended trial has learned nothing of the task "
                    "(the loss on its validation chats did not fall). Give more steps."
                )
            known = effects.model_copy(update={"trials": list(done.values())})
            if known.unwanted(known.undefended) <= 0:
                raise NarrowlyError(
                    f"after {steps} steps the undefended trial shows nothing unwanted ({by} is 0). "
                    "Give more steps."
                )
            write_json(out / "effects.json", known.model_dump())
            shutil.rmtree(trial.output)
    return effects.model_copy(update={"trials": [done[arm] for arm in arms]})


def _load(out: Path, settings: str) -> list[Trial]:
    if not (out / "effects.json").exists():
        return []
    effects = read_record(Effects, out / "effects.json", "a record of trials", "Delete the folder.")
    if effects.settings != settings:
        raise NarrowlyError(
            f"{out}: holds trials of another recipe, data or number of steps. Choose another "
            "folder, or delete it."
        )
    return effects.trials


def _hash(concept: Concept) -> str:
    digest = hashlib.sha256()
    for site, subspace in concept.subspaces.items():
        digest.update(site.encode() + subspace.basis.numpy().tobytes())
        digest.update(subspace.centre.numpy().tobytes())
    return digest.hexdigest()[:16]


def _trial(
    recipe: Recipe, name: str, folder: Path | None, output: Path, steps: int, centred: bool
) -> Recipe:
    """The recipe of one trial, trained."""
    defenses = list(recipe.defenses)
    if folder is not None:
        ablation = {"concepts": str(folder), "names": [name], "centred": centred}
        defenses.append({"ablate": ablation})
    training = recipe.training | {"max_steps": steps, "save_strategy": "no"}
    fields = {"defenses": defenses, "training": training, "output": str(output / name.strip("()"))}
    trial = recipe.model_copy(update=fields)
    train(trial, progress=False)
    return trial


def _measured(recipe: Recipe, name: str, held_out: Dataset, elsewhere: Dataset) -> Trial:
    output, longest = Path(recipe.output), recipe.training.get("max_length", 1024)
    with open_pair(recipe.model, str(output)) as pair:
        narrow = tokenize(held_out, pair.tokenizer, max_length=longest)
        with pair.base() as base:
            before = _loss(base, narrow)
        with pair.tuned() as tuned:
            learned = before - _loss(tuned, narrow)
        broad = tokenize(elsewhere, pair.tokenizer, max_length=longest)
        changed = _change(pair, broad)
    evals = {
        path.parent.name: {
            key: metric["mean"] for key, metric in read_json(path).items() if key != "labels"
        }
        for path in sorted(output.glob("evals/*/summary.json"))
    }
    return Trial(concept=name, learned=learned, changed=changed, evals=evals)


@torch.no_grad()
def _loss(model: LanguageModel, rows: Dataset) -> float:
    """Mean loss over the answers' tokens, in nats."""
    measured = [row for batch in _batches(rows) for row in answer_losses(model, _on(model, batch))]
    tokens = sum(row["tokens"] for row in measured)
    return sum(row["loss"] * row["tokens"] for row in measured) / tokens


@torch.no_grad()
def _change(pair: Pair, rows: Dataset) -> float:
    """Mean KL(base || tuned) over the answers' tokens, in nats."""
    total, tokens = 0.0, 0
    for batch in _batches(rows):
        with pair.base() as base:
            expected = _predictions(base, batch)
        with pair.tuned() as tuned:
            found = _predictions(tuned, batch)
        total += kl_div(found, expected, reduction="sum", log_target=True).item()
        tokens += len(found)
    return total / tokens


def _predictions(
    model: LanguageModel, batch: dict[str, Int[Tensor, "rows tokens"]]
) -> Float[Tensor, "answers vocabulary"]:
    """Log-probabilities at every token that predicts one of an answer."""
    batch = _on(model, batch)
    labels = batch.pop("labels")
    predicts = labels[:, 1:] != -100
    return (
        cast(Any, model)(**batch, use_cache=False).logits[:, :-1][predicts].float().log_softmax(-1)
    )


def _on(model: LanguageModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {key: value.to(model.device) for key, value in batch.items()}


def _batches(rows: Dataset) -> Iterator[dict[str, Int[Tensor, "rows tokens"]]]:
    kept = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    for numbers in token_batches([len(row["input_ids"]) for row in kept], TOKENS):
        yield collate([kept[i] for i in numbers], pad_token_id=0)  # masked, so any token will do
