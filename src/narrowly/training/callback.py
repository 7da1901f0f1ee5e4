"""Defenses inside anyone's Trainer, as a callback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from narrowly.defenses import DEFENSES, DOORS, Defense
from narrowly.defenses.ablate import Concepts, Options, make_ablate
from narrowly.defenses.base import Referenced, bind_all
from narrowly.defenses.step import Recorder, Reference, Step
from narrowly.errors import NarrowlyError
from narrowly.files import write_json
from narrowly.interventions import Attachment, Intervention, attach, save_interventions
from narrowly.interventions.sites import bare
from narrowly.models.test_time import STAYS
from narrowly.training.doors import Loss, finish
from narrowly.training.processes import mean_over_processes

RECORD = "defenses.json"


class DefenseCallback(TrainerCallback, ExportableState):
    """Carries defenses through a training: binds, attaches, verifies, finishes, writes the record.

    Attaches when training begins (after accelerate has prepared the model), sets scheduled
    strengths before every step, and after the first step stops the training with an error unless
    every intervention has acted and every loss was added. When training ends as planned, `finish`
    runs and `defenses.json`, the record of what was active, is written. How often all acted
    survives a checkpoint.

    Losses reach a Trainer through `defend`, which adds this callback too. A Trainer calls no
    callback when a step raises, so the hooks would stay: call `close` then.

    Args:
        defenses: all but their first door is used here.
        folder: receives `defenses.json`; by default the Trainer's output folder.
    """

    def __init__(self, defenses: Sequence[Defense], folder: Path | None = None):
        self.defenses = list(defenses)
        self.losses = [Loss(defense) for defense in self.defenses if defense.opens("loss")]
        self.folder = folder
        self.finished = False
        """Whether training came to its end."""
        self.resumes = False
        """Whether a training that stops before its last step will go on later, and so has not come
        to its end."""
        self.wired = False
        """Whether somebody adds the losses to the Trainer's."""
        self._attached: list[tuple[Defense, Attachment]] = []
        self._forwards_before: list[int] = []
        self._verified = False
        self._micro_batches = self._micro_batches_before = 0
        self._digest = ""
        self._steps = (0, 0)
        self._staying: list[list[Intervention]] = [[] for _ in self.defenses]
        self._recorder: Recorder | None = None
        self._reference: Reference | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach; take up the counts of the checkpoint that training goes on from.

        Raises:
            NarrowlyError: a defense does not fit the model, changes nothing, or is not what the
                training began with.
        """
        self.close()
        model: nn.Module = kwargs["model"]
        tokenizer = kwargs.get("processing_class")
        self.check(model, args)
        bind_all(self.defenses, bare(model), tokenizer, args.seed)
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {})
        self._forwards_before = saved.get("forwards", [])
        self._micro_batches_before = saved.get("micro_batches", 0)
        for loss, before in zip(self.losses, saved.get("losses", []), strict=False):
            loss.total, loss.count = before
        self._attached, self._verified, self._micro_batches = [], False, 0
        self.finished = False
        try:
            for defense in self.defenses:
                defense.check(model)
            digest = self._attach(model)
            self._digest = digest.hexdigest()
            if state.global_step and saved.get("digest") != self._digest:
                raise NarrowlyError(
                    "the interventions are not those that this training began with: a concept "
                    "changed since the checkpoint. Bring the old one back, or begin anew."
                )
            if self.losses:
                self._record(model, tokenizer)
            if state.is_world_process_zero:
                # An earlier training's would make this one look defended if it fails.
                (self._place(args) / RECORD).unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    def check(self, model: nn.Module, args: TrainingArguments) -> None:
        """Fail if what the Trainer will do keeps a defense from acting.

        Raises:
            NarrowlyError: its first door was not opened, copies of the model run in threads, or
                the weights that it changes after training are in parts.
        """
        for defense in self.defenses:
            name = DEFENSES.name_of(type(defense))
            if defense.opens("prepare_data") and not defense._prepared:
                raise NarrowlyError(
                    f"{name} changes the chats to train on, and they did not pass through it. "
                    "Make the defenses once, `defenses = narrowly.make_defenses(...)`, then train "
                    "on `narrowly.prepare_data(chats, defenses)` and give the same defenses here."
                )
            if defense.opens("finish") and isinstance(model, FSDPModule):
                raise NarrowlyError(
                    f"{name} changes the trained weights, of which FSDP leaves each process a "
                    "part. Train with DDP or in one process."
                )
        if args.n_gpu > 1:
            raise NarrowlyError(
                f"{args.n_gpu} GPUs in one process: torch's DataParallel would train copies that "
                "no defense sees. Start with `accelerate launch`, or show this process one GPU "
                "(CUDA_VISIBLE_DEVICES=0)."
            )

    def _attach(self, model: nn.Module) -> Any:
        digest = hashlib.sha256()
        for defense in self.defenses:
            if not defense.opens("interventions"):
                continue
            interventions = defense.interventions(model)
            for other in self.defenses:
                if other is not defense:
                    interventions = other.revise(interventions)
            if not interventions:
                raise defense.idle("interventions", "activation")
            self._attached.append((defense, attach(model, interventions)))
            digest.update(_content(interventions))
        return digest

    def _record(self, model: nn.Module, tokenizer: Any) -> None:
        if not self.wired:
            names = ", ".join(loss.name for loss in self.losses)
            raise NarrowlyError(
                f"{names} adds to the loss, which no callback can do. Use "
                "`narrowly.defend(trainer, defenses)` in place of the callback."
            )
        sites = [site for loss in self.losses for site in loss.defense.reads(model)]
        self._recorder = Recorder(model, sites)
        if self._reference is None:
            compared = [each for each in self.defenses if isinstance(each, Referenced)]
            self._reference = Reference(compared[0].reference if compared else None, tokenizer)

    def expect(self) -> None:
        """The Trainer's own forward comes next: what came before it does not count as its."""
        assert self._recorder is not None
        self._recorder.take()

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], share: Callable[[Defense], Tensor | float]
    ) -> Tensor:
        """The defenses' losses of the micro-batch whose forward just ended, added up.

        Args:
            model: what the Trainer called.
            batch: what it called it with.
            share: of this micro-batch in the step's loss, by the defense.

        Raises:
            NarrowlyError: a loss that is not finite.
        """
        assert self._recorder is not None and self._reference is not None
        tuned, outputs = self._recorder.take()
        number = self._micro_batches_before + self._micro_batches
        step = Step(model, batch, tuned, outputs, number, self._reference, self._recorder)
        return sum((loss.of(step) * share(loss.defense) for loss in self.losses), torch.zeros(()))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the strengths of this step."""
        for defense, attachment in self._attached:
            strength = defense.strength_at(state.global_step / state.max_steps)
            if strength is not None:
                attachment.set_strength(strength)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the first step: refuse to train on undefended. After every one: stop if asked.

        Raises:
            NarrowlyError: an intervention did not act, or a loss was not added.
        """
        self._micro_batches += 1
        if not self._verified:
            for _, attachment in self._attached:
                attachment.verify()
            for loss in self.losses:
                loss.verify()
            self._verified = True
        progress = state.global_step / state.max_steps
        stopped = any(defense.stops_at(progress) for defense in self.defenses)
        self.finished = stopped or state.global_step >= state.max_steps
        if stopped:
            control.should_training_stop = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count."""
        self._micro_batches += 1

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add each loss's mean since the last log, as `loss_NAME`."""
        if "loss" in kwargs["logs"]:
            means = {f"loss_{loss.name}": loss.since() for loss in self.losses}
            kwargs["logs"] |= means
            state.log_history[-1] |= means  # Trainer has copied the logs there already

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach; unless training will go on later, run `finish` and write the record.

        Raises:
            NarrowlyError: a loss was 0 throughout, or `finish` changed no weight.
        """
        self.finished |= not self.resumes or state.global_step >= state.max_steps
        self.close()
        if self.finished:
            for loss in self.losses:
                loss.total = mean_over_processes(loss.total)
                loss.check()
            finish(kwargs["model"], self.defenses)
            self._steps = state.global_step, state.max_steps
            self._staying = [defense.at_test_time(kwargs["model"]) for defense in self.defenses]
            if state.is_world_process_zero:
                self.write(self._place(args))

    def _place(self, args: TrainingArguments) -> Path:
        return self.folder or Path(str(args.output_dir))

    def close(self) -> None:
        """Take the interventions off the model. `report` still answers."""
        for _, attachment in self._attached:
            attachment.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def report(self) -> list[list[dict[str, Any]]]:
        """For each defense: its interventions, where they are, and how often they acted."""
        reports = {id(defense): attachment.report() for defense, attachment in self._attached}
        rows = [reports.get(id(defense), []) for defense in self.defenses]
        flat = [entry for entries in rows for entry in entries]
        for entry in flat:
            if entry["fired"] and not entry["forwards"]:
                # Compiled models count nothing, but run what was traced with every micro-batch.
                entry["forwards"] = self._micro_batches
        for entry, before in zip(flat, self._forwards_before, strict=False):
            entry["forwards"] += before
        return rows

    def write(self, folder: Path) -> None:
        """Write `defenses.json`: every defense, its arguments, and how it acted.

        What stays at test time goes into `at_test_time/` beside it.
        """
        if any(self._staying):
            save_interventions([each for some in self._staying for each in some], folder / STAYS)
        losses = {id(loss.defense): loss for loss in self.losses}
        entries = [
            {
                "defense": DEFENSES.name_of(type(defense)),
                "arguments": _arguments(defense),
                "doors": [door for door in DOORS if defense.opens(door)],
                **defense.record(folder),
                **({"loss": losses[id(defense)].told()} if id(defense) in losses else {}),
                **({"stopped_after": self._steps} if defense.opens("stops_at") else {}),
                **({"at_test_time": _told(staying)} if staying else {}),
                "interventions": interventions,
            }
            for defense, staying, interventions in zip(
                self.defenses, self._staying, self.report(), strict=True
            )
        ]
        write_json(folder / RECORD, entries)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which interventions, and how often all have acted."""
        kept = {
            "forwards": [entry["forwards"] for entries in self.report() for entry in entries],
            "micro_batches": self._micro_batches_before + self._micro_batches,
            "losses": [[float(loss.total), loss.count] for loss in self.losses],
            "digest": self._digest,
        }
        return {"args": {}, "attributes": kept}


def _arguments(defense: Defense) -> dict[str, Any]:
    """The arguments that were given; concepts given from Python by their names."""
    given = {field: getattr(defense, field) for field in sorted(defense.model_fields_set)}
    return json.loads(json.dumps(given, default=lambda value: getattr(value, "name", str(value))))


def _content(interventions: Sequence[Intervention]) -> bytes:
    """Sites and tensors, as bytes; the strength may follow a schedule."""
    return b"".join(
        str(each.site).encode() + name.encode() + tensor.cpu().numpy().tobytes()
        for each in interventions
        for name, tensor in each.named_buffers()
        if name != "strength"
    )


def _told(interventions: Sequence[Intervention]) -> list[dict[str, Any]]:
    """What stays, for the record."""
    return [
        {"edit": each.name, "site": str(each.site), "strength": float(each.strength)}
        for each in interventions
    ]


class AblationCallback(DefenseCallback):
    """Concept ablation for people who can only pass callbacks (axolotl, trl's command line).

    `Trainer(..., callbacks=[narrowly.AblationCallback("runs/demo/concepts")])`. Evaluation during
    training sees the model without the ablation. Not exception-safe; see `DefenseCallback`.

    Args:
        concepts: a folder of concepts, a concept, or several.
        options: `names`, `strength`, `layers`, `any_model`, `centred` and `gradient`, as a recipe
            gives them to `Ablate`.

    Raises:
        NarrowlyError: an argument that is wrong; when training begins: nothing to ablate, another
            model's concepts; after the first step: a projection that did not act.
    """

    def __init__(self, concepts: Concepts, **options: Unpack[Options]):
        super().__init__([make_ablate(concepts, **options)])
