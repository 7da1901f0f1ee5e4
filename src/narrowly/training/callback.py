"""Defenses inside anyone's Trainer, as a callback."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from narrowly.defenses import Defense
from narrowly.defenses.ablate import Ablate, Concepts, Knots, listed
from narrowly.errors import NarrowlyError
from narrowly.interventions import Attachment, Intervention, attach


class DefenseCallback(TrainerCallback, ExportableState):
    """Keeps the interventions of defenses attached for the whole of a training.

    Attaches when training begins (after accelerate has prepared the model), sets scheduled
    strengths before every step, and after the first step stops the training with an error unless
    every intervention has acted. How often they acted survives a checkpoint.

    A Trainer calls no callback when a step raises, so the hooks would stay: call `close` then, or
    use `with narrowly.ablate(...)`, which cleans up by itself.

    Args:
        defenses: only their second door and their strengths are used here.
    """

    def __init__(self, defenses: Sequence[Defense]):
        self.defenses = list(defenses)
        self._attached: list[tuple[Defense, Attachment]] = []
        self._forwards_before: list[int] = []
        self._verified = False
        self._micro_batches = 0
        self._digest = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach; take up the counts of the checkpoint that training goes on from."""
        self.close()
        model: nn.Module = kwargs["model"]
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {})
        self._forwards_before = saved.get("forwards", [])
        self._attached, self._verified, self._micro_batches = [], False, 0
        digest = hashlib.sha256()
        try:
            for defense in self.defenses:
                if defense.opens("interventions"):
                    interventions = defense.interventions(model)
                    if not interventions:
                        raise defense.idle("interventions", "activation")
                    self._attached.append((defense, attach(model, interventions)))
                    digest.update(_content(interventions))
            self._digest = digest.hexdigest()
            if state.global_step and saved.get("digest") != self._digest:
                raise NarrowlyError(
                    "the interventions are not those that this training began with: a concept "
                    "changed since the checkpoint. Bring the old one back, or begin anew."
                )
        except BaseException:
            self.close()
            raise

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
        """After the first step: refuse to train on undefended.

        Raises:
            NarrowlyError: an intervention did not act.
        """
        self._micro_batches += 1
        if not self._verified:
            for _, attachment in self._attached:
                attachment.verify()
            self._verified = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count."""
        self._micro_batches += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self.close()

    def close(self) -> None:
        """Take the interventions off the model. `report` still answers."""
        for _, attachment in self._attached:
            attachment.close()

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

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which interventions, and how often each has acted."""
        forwards = [entry["forwards"] for entries in self.report() for entry in entries]
        return {"args": {}, "attributes": {"forwards": forwards, "digest": self._digest}}


def _content(interventions: Sequence[Intervention]) -> bytes:
    """Sites and tensors, as bytes; the strength may follow a schedule."""
    return b"".join(
        str(each.site).encode() + name.encode() + tensor.cpu().numpy().tobytes()
        for each in interventions
        for name, tensor in each.named_buffers()
        if name != "strength"
    )


class AblationCallback(DefenseCallback):
    """Concept ablation for people who can only pass callbacks (axolotl, trl's command line).

    `Trainer(..., callbacks=[narrowly.AblationCallback("runs/demo/concepts")])`. Evaluation during
    training sees the model without the ablation. Not exception-safe; see `DefenseCallback`.

    Args:
        concepts: a folder of concepts, a concept, or several.
        names: which of them; by default those whose verdict is undesired.
        strength: a number, or knots [(progress, strength), ...] interpolated over the training.
        centred: keep the base model's mean in the subspace instead of zero.
        gradient: "through" the projection, or only the "forward" or "backward" half.
        layers: only these of the concepts' layers.

    Raises:
        NarrowlyError: when training begins: nothing to ablate, another model's concepts; after the
            first step: a projection that did not act.
    """

    def __init__(
        self,
        concepts: Concepts,
        *,
        names: list[str] | None = None,
        strength: float | Knots = 1.0,
        centred: bool = False,
        gradient: Literal["through", "forward", "backward"] = "through",
        layers: list[int] | None = None,
    ):
        ablate = Ablate(
            concepts=listed(concepts),
            names=names,
            strength=strength,
            centred=centred,
            gradient=gradient,
            layers=layers,
        )
        super().__init__([ablate])
