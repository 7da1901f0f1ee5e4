"""From a recipe to a run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig

from narrowly.data import load_chats, tokenize
from narrowly.defenses import make_defenses
from narrowly.defenses.base import bind_all
from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate, parse
from narrowly.files import atomic, write_json
from narrowly.models import fingerprint, load_model
from narrowly.training.callback import DefenseCallback
from narrowly.training.card import write_card
from narrowly.training.defend import defend
from narrowly.training.housekeeping import Checkpoints, MetricsLog, ProgressBar
from narrowly.training.inputs import check_same_inputs, prepare_chats
from narrowly.training.processes import sharding, whole_weights
from narrowly.training.recipe import Recipe
from narrowly.training.record import describe, now, peak_memory
from narrowly.training.run import Run
from narrowly.training.trainer import make_arguments, make_lora, make_trainer

Loaded = tuple[Any, Any]


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train what a recipe says, defended as it says, and measure the result.

    A run that was killed goes on from its last checkpoint to the same weights; a finished one is
    not redone; new evals of a trained one are run. With `seeds`, every seed is a run of its own.
    A run that fails before its first checkpoint leaves nothing behind.

    Args:
        recipe: a recipe or its YAML file.
        overrides: `key=value` settings, such as `training.max_steps=50`.
        progress: show on the terminal what is going on.
        callbacks: of the Trainer, after those of the run; what they raise ends the training.

    Raises:
        NarrowlyError: a mistake in the recipe, its data or concepts; an intervention or defense
            that changes nothing; an output folder that holds something else.
        KeyboardInterrupt: Ctrl-C; the run is left where the same call goes on.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.read(recipe, overrides)
    elif overrides:
        recipe = recipe.with_overrides(overrides)
    run = Run(Path(recipe.output))
    parts = {Run(Path(part.output)): part for part in recipe.per_seed()}
    for each, its_recipe in {run: recipe, **parts}.items():
        each.check(its_recipe)
    for eval_ in parse(recipe.evals).values():
        eval_.bind(recipe.model_dump()).check()  # what it lacks is better known before the training
    for part, its_recipe in parts.items():
        # Also sets up the processes, which must all have looked before one of them writes.
        arguments = make_arguments(its_recipe, part.path / "checkpoints")
        arguments.distributed_state.wait_for_everyone()
        console = Console(stderr=True, quiet=not (progress and arguments.should_save))
        try:
            if arguments.should_save:
                run.claim(recipe)
                part.claim(its_recipe)
            _train_one(its_recipe, part, arguments, console, callbacks)
        except BaseException:
            if arguments.should_save:
                part.forget_if_empty()
                run.forget_if_empty()
            raise
    return run


def _train_one(
    recipe: Recipe,
    run: Run,
    arguments: SFTConfig,
    console: Console,
    callbacks: Sequence[TrainerCallback],
) -> None:
    loaded = None
    if run.trained:
        console.print(f"{run.path} is trained already")
    else:
        loaded = _fit(recipe, run, arguments, console, callbacks)
    if not arguments.should_save:
        return
    if recipe.evals:
        console.print(f"measuring {', '.join(parse(recipe.evals))}")
        evaluate(loaded or run, recipe.evals, out=run.path, progress=not console.quiet)
    record = run.reproduce
    if "finished" not in record:
        write_json(run.path / "reproduce.json", record | {"finished": now()})
    write_card(run)


def _fit(
    recipe: Recipe,
    run: Run,
    arguments: SFTConfig,
    console: Console,
    callbacks: Sequence[TrainerCallback],
) -> Loaded | None:
    """Train until the weights lie in the run's folder; returns model and tokenizer if whole."""
    started = time.monotonic()
    main = arguments.should_save
    resume = run.checkpoint()
    defenses = make_defenses(recipe.defenses)
    # FSDP gives each device its part of the weights; no device need hold them all.
    device = "cpu" if sharding() else arguments.device
    model, tokenizer = load_model(recipe.model, device=device, **_model_options(recipe))
    if isinstance(model, PeftModel):
        raise NarrowlyError(
            f"model: {recipe.model} is an adapter on another model. Train from that model, or "
            "merge the two into a folder first (peft's `merge_and_unload`)."
        )
    bind_all(defenses, model, tokenizer, recipe.seed)
    chats, data = prepare_chats(recipe, defenses, main=main)
    record = {
        "model": {"source": recipe.model, "fingerprint": fingerprint(model)},
        "data": data,
    }
    earlier: dict[str, Any] = {}
    if resume is not None:
        check_same_inputs(run, record)
        earlier = run.reproduce

    limit = recipe.training.get("max_length", 1024)
    rows = tokenize(chats, tokenizer, max_length=limit)
    data["train"]["tokenized_rows"] = len(rows)
    held_out = None
    if recipe.validation is not None and arguments.eval_strategy != "no":
        held_out = tokenize(load_chats(recipe.validation), tokenizer, max_length=limit)

    guard = DefenseCallback(defenses, run.path)
    guard.resumes = True
    checkpoints = Checkpoints()
    bar = ProgressBar(console, str(run.path))
    trainer = make_trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if recipe.lora is None else make_lora(recipe.lora),
        callbacks=[MetricsLog(run.path / "metrics.jsonl"), checkpoints, bar, *callbacks],
    )
    defend(trainer, guard)
    if main:
        record = describe(recipe) | record | {"started": earlier.get("started", now())}
        write_json(run.path / "reproduce.json", record)
        if resume is not None:
            console.print(f"going on from {resume}")
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        guard.close()
        checkpoints.close()
        bar.close()
    if main:
        seconds = earlier.get("wall_seconds", 0) + time.monotonic() - started
        record |= {"wall_seconds": round(seconds, 3), "peak_memory_bytes": peak_memory()}
        write_json(run.path / "reproduce.json", record)
    trained: Any = trainer.model
    gathered = whole_weights(trained) if guard.finished else None
    if guard.finished and main:
        _save_weights(trained, tokenizer, run, gathered)
        if "save_total_limit" not in recipe.training:
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    checkpoints.stop_if_asked()
    # A model in parts answers only in all processes at once; one of them measures the saved run.
    return None if gathered is not None else (trained, tokenizer)


def _model_options(recipe: Recipe) -> dict[str, Any]:
    """How to load: trained weights in fp32, frozen ones in the type they were published in."""
    given = recipe.training.get("model_init_kwargs") or {}
    options = {"dtype": "auto" if recipe.lora is not None else "float32"} | given
    if recipe.training.get("trust_remote_code"):
        options["trust_remote_code"] = True
    return options


def _save_weights(
    model: PeftModel | PreTrainedModel,
    tokenizer: Any,
    run: Run,
    gathered: dict[str, Tensor] | None,
) -> None:
    """The last thing written in training: its presence says that training is done."""
    if isinstance(model, PeftModel):
        with atomic(run.path / "adapter") as part:
            model.save_pretrained(str(part), state_dict=gathered)
            (part / "README.md").unlink(missing_ok=True)  # peft's empty card; the run has its own
    else:
        with atomic(run.path / "model") as part:
            model.save_pretrained(part, state_dict=gathered)
            tokenizer.save_pretrained(part)
