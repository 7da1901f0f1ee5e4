"""Callbacks that show a training, log it, and keep it on disk so that it can go on."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from narrowly.files import write_text


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
    would take one step too many when going on from there, unless an epoch ends at that step. The
    best of several checkpoints may be the last, though.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self.ended = False
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
        # Another callback may end the training early; a signal asks to go on later.
        self.ended = control.should_training_stop or state.global_step >= state.max_steps
        if self.received is not None and not self.ended:
            control.should_save = True
            control.should_training_stop = True
        if self.ended and not args.load_best_model_at_end:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As after a step."""
        if self.ended and not args.load_best_model_at_end:
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
