"""trl's SFTTrainer, set up from a recipe."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from narrowly.errors import NarrowlyError
from narrowly.training.processes import sharding_on_cpu
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


def make_trainer(*args: Any, **kwargs: Any) -> SFTTrainer:
    """trl's SFTTrainer, silent.

    Raises:
        NarrowlyError: what trl and peft say about a recipe that cannot be trained.
    """
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads what transformers 5.23 renamed.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            trainer = _Trainer(*args, **kwargs)
    except ValueError as error:
        raise NarrowlyError(f"trl or peft refuses this recipe: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Trainer(SFTTrainer):
    """SFTTrainer that writes no card of its own and tells nobody what is trained."""

    def create_accelerator_and_postprocess(self) -> None:
        """With FSDP on the CPU too."""
        with sharding_on_cpu():
            super().create_accelerator_and_postprocess()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run's own says more than trl's."""

    def _send_telemetry(self) -> None:
        """No telemetry."""
