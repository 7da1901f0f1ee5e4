"""trl's SFTTrainer with the defenses' losses, and callbacks that keep a run on disk."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from narrowly.defenses import Defense
from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from narrowly.training.recipe import Recipe


def make_arguments(recipe: Recipe, checkpoints: Path) -> SFTConfig:
    """trl's arguments: the recipe's own keys over defaults that suit any machine.

    Unlike trl: gradient checkpointing is off and bf16 needs hardware for it, unless asked for.
    """
    given = recipe.training
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    # transformers 5.23 renamed it; the old name warns.
    checkpointing = {"activation_checkpointing", "gradient_checkpointing"} & known
    defaults: dict[str, Any] = {
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_total_limit": 1,
        "disable_tqdm": True,
    }
    if given.get("fp16"):
        del defaults["bf16"]
    if not checkpointing & given.keys():
        defaults[min(checkpointing)] = False
    merged = defaults | {key: given[key] for key in given if key != "model_init_kwargs"}
    # Without packing, trl has nothing left to do to tokenised chats: they are cut already.
    if not merged.get("packing"):
        merged["max_length"] = None
    try:
        return SFTConfig(output_dir=str(checkpoints), seed=recipe.seed, **merged)
    except (ValueError, TypeError) as error:
        raise NarrowlyError(f"training: trl refuses these keys: {error}") from error


def make_lora(given: dict[str, Any]) -> LoraConfig:
    """peft's configuration of a recipe's `lora`."""
    return LoraConfig(**{"task_type": "CAUSAL_LM"} | given)


def make_trainer(*args: Any, **kwargs: Any) -> DefendedTrainer:
    """A `DefendedTrainer` that prints nothing of its own.

    Raises:
        NarrowlyError: what trl and peft say about a recipe that cannot be trained.
    """
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads what transformers 5.23 renamed.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            trainer = DefendedTrainer(*args, **kwargs)
    except ValueError as error:
        raise NarrowlyError(f"trl or peft refuses this recipe: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


class DefendedTrainer(SFTTrainer):
    """SFTTrainer to whose loss the defenses add theirs."""

    def __init__(self, *args: Any, defenses: Sequence[Defense], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses = [defense for defense in defenses if defense.opens("loss")]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss plus the mean over micro-batches of every defense's."""
        if not self.losses or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)
        seen: list[Any] = []

        def forward(**kwargs: Any) -> Any:
            # trl keeps its outputs to itself, and returns others from a second forward if asked.
            seen.append(model(**kwargs))
            return seen[-1]

        total = super().compute_loss(forward, inputs, False, num_items_in_batch)
        # As trl scales its auxiliary loss: where tokens are counted over all micro-batches, Trainer
        # does not divide by their number.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        for defense in self.losses:
            loss = defense.loss(model, batch, seen[0])
            self._metrics["train"][f"loss_{type(defense).__name__.lower()}"].append(loss.item())
            total = total + loss / steps
        return total

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run's own says more than trl's."""

    def _send_telemetry(self) -> None:
        """narrowly tells nobody what is trained."""


class MetricsLog(TrainerCallback):
    """Every logged number, one JSON object a line; going on from a checkpoint rewinds it."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what was logged after the checkpoint."""
        if state.is_world_process_zero:
            lines = self.path.read_text().splitlines(True) if self.path.exists() else []
            kept = [line for line in lines if _step(line) <= state.global_step]
            write_text(self.path, "".join(kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **kwargs["logs"]}) + "\n")


def _step(line: str) -> float:
    """The step of a logged line; a line cut off by a kill comes after every step."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


class ProgressBar(TrainerCallback):
    """Steps, loss and the time that is left."""

    def __init__(self, console: Console, title: str):
        self.title = title
        self.task: TaskID | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps · {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar in the process that speaks."""
        if state.is_world_process_zero:
            self.task = self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step, loss=""
            )
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One further."""
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the loss."""
        if self.task is not None and "loss" in kwargs["logs"]:
            self.bar.update(self.task, loss=f"loss {kwargs['logs']['loss']:.3f}")

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.stop()


class Checkpoints(TrainerCallback):
    """When to save beyond trl's own schedule, so that a run can always go on exactly.

    Ctrl-C or SIGTERM ends the step, saves and stops; a second one stops at once. Only in the main
    thread of a single process: several would have to agree on the step, and their launcher kills
    them soon; they go on from their last checkpoint.

    Nothing is saved after the last step, when the weights themselves are about to be: Trainer
    would take one step too many when going on from there, unless an epoch ends at that step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen."""
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._receive) for each in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, if asked."""
        last = state.global_step >= state.max_steps
        if self.received is not None and not last:
            control.should_save = True
            control.should_training_stop = True
        if last:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As after a step."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def stop_if_asked(self) -> None:
        """After training: stop the program as the signal would have.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            SystemExit: SIGTERM (143).
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def close(self) -> None:
        """Hand the signals back."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}
