"""trl's SFTTrainer with the defenses' losses, set up from a recipe."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from narrowly.defenses import Defense
from narrowly.errors import NarrowlyError
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
