"""Defenses in anyone's Trainer: transformers', trl's, or one that is derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import Trainer

from narrowly.data import load_chats
from narrowly.defenses import Defense
from narrowly.defenses import make_defenses as make
from narrowly.defenses.base import bind_all
from narrowly.errors import NarrowlyError
from narrowly.interventions.sites import bare
from narrowly.registry import unknown
from narrowly.settings import Entry, FieldError, read_settings
from narrowly.training.callback import DefenseCallback
from narrowly.training.doors import open_first_door
from narrowly.training.recipe import Recipe

Given = str | Path | Sequence[Defense | Entry | str]


def make_defenses(given: Given) -> list[Defense]:
    """Defenses from a recipe's list, from a YAML file that holds `defenses:`, or as they are.

    Args:
        given: a file (a recipe will do), or a list of defenses, their names, and
            `{name: {field: value}}`.

    Raises:
        NarrowlyError: an unknown name or field, a wrong value, or two that cannot be together;
            of a file, with the line.
    """
    if isinstance(given, str | Path):
        return make(read_settings(_File, given).defenses)
    return make(given)


def prepare_data(
    chats: str | Path | Dataset | Iterable[dict],
    defenses: Given,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    seed: int = 42,
) -> Dataset:
    """The first door: the chats to train on, as the defenses change them.

    Make the defenses once, and give the same to `defend`.

    Args:
        chats: as for `narrowly.data.load_chats`.
        defenses: as for `make_defenses`; those without a first door do nothing here.
        model: what will be trained, peft not yet around it. Defenses that choose data by it need
            it, and the others check with it that their chats suit it.
        tokenizer: its.
        seed: the Trainer's; 42 is transformers' own default.

    Returns:
        Chats in the column `messages`.

    Raises:
        NarrowlyError: data that cannot be read, or a defense that changed none of them, does not
            fit the model, or lacks it.
    """
    made = make_defenses(defenses)
    if model is not None:
        bind_all(made, bare(model), tokenizer, seed)
    return open_first_door(load_chats(chats), made)


def defend(trainer: Trainer, defenses: DefenseCallback | Given) -> DefenseCallback:
    """Defend what a Trainer will train.

    Adds the callback that attaches interventions, verifies them and writes `defenses.json` into
    the Trainer's output folder, and wraps `compute_loss` where a defense adds to the loss. The
    first door changes chats, which this Trainer already holds as tokens: pass them through
    `prepare_data` before.

    Args:
        trainer: not yet training.
        defenses: as for `make_defenses`, or their callback.

    Returns:
        The callback. A Trainer calls none when a step raises; its `close` takes the hooks off.

    Raises:
        NarrowlyError: a defense does not fit the model, or could not act in this Trainer.
    """
    guard = defenses
    if not isinstance(guard, DefenseCallback):
        guard = DefenseCallback(make_defenses(guard))
    if trainer.model is not None:
        guard.check(trainer.model, trainer.args)
        tokenizer = trainer.processing_class
        bind_all(guard.defenses, bare(trainer.model), tokenizer, trainer.args.seed)
    # The first of them, so that the others' `on_log` sees the losses.
    trainer.callback_handler.callbacks.insert(0, guard)
    guard.wired = True
    if guard.losses:
        defended = _Defended(trainer, guard)
        trainer.compute_loss = defended  # type: ignore[method-assign]
        trainer.get_batch_samples = defended.count  # type: ignore[method-assign]
    return guard


class _File(BaseModel):
    """A YAML file with defenses: a recipe, or that part of one."""

    model_config = ConfigDict(extra="allow")

    defenses: list[Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _known(self) -> _File:
        for key in self.model_extra or {}:
            if key not in Recipe.model_fields:
                raise FieldError((key,), str(unknown("key", key, [*Recipe.model_fields])))
        make(self.defenses)
        return self


class _Defended:
    """`compute_loss` of a Trainer, plus the mean over the step's tokens of every defense's."""

    def __init__(self, trainer: Trainer, guard: DefenseCallback):
        self.trainer, self.guard, self.plain = trainer, guard, trainer.compute_loss
        self._fetch = trainer.get_batch_samples
        self._totals: dict[int, Tensor] = {}

    def count(self, *args: Any, **kwargs: Any) -> Any:
        """`get_batch_samples` of the Trainer; counts each defense's own tokens of the step."""
        batches, total = self._fetch(*args, **kwargs)
        self._totals = {}
        for loss in self.guard.losses:
            if total is not None and type(loss.defense).tokens is not Defense.tokens:
                counts = [loss.defense.tokens(batch).sum() for batch in batches]
                own = torch.stack(counts).sum().to(self.trainer.args.device)
                if self._processes > 1:
                    own = self.trainer.accelerator.gather(own).sum()
                self._totals[id(loss.defense)] = own
        return batches, total

    @property
    def _processes(self) -> int:
        """How many processes' tokens the Trainer counts together, and averages gradients over."""
        together = self.trainer.args.average_tokens_across_devices
        return self.trainer.accelerator.num_processes if together else 1

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return self.plain(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)
        if batch.get("labels") is None:
            raise NarrowlyError(
                "the batch has no `labels`, so a defense's loss cannot tell answers from prompts. "
                "Give the Trainer labels, -100 on what is not to be learned."
            )
        self.guard.expect()
        total: Any = self.plain(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = total if return_outputs else (total,)

        def share(defense: Defense) -> Tensor | float:
            return self._share(defense, batch, num_items_in_batch)

        with self.trainer.accelerator.autocast():
            added = self.guard.loss(model, batch, share)
        loss = loss + added.to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _share(
        self, defense: Defense, batch: dict[str, Tensor], total: Tensor | int | None
    ) -> Tensor | float:
        """How much of the step's loss is this micro-batch's: that of the defense's tokens.

        So the step's loss is the mean over all its tokens, however they are split into
        micro-batches and processes. Without `total` Trainer divides by the micro-batches itself.
        """
        if total is None:
            return 1.0
        own = self._totals.get(id(defense))
        tokens = Defense.tokens(defense, batch) if own is None else defense.tokens(batch)
        return tokens.sum() * self._processes / (total if own is None else own.clamp(min=1))
