"""Defenses in anyone's Trainer: transformers', trl's, or one that is derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
from narrowly.training.inputs import open_first_door
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
        model: what will be trained, for defenses that choose data by it.
        tokenizer: its.
        seed: the Trainer's; 42 is transformers' own default.

    Returns:
        Chats in the column `messages`.

    Raises:
        NarrowlyError: data that cannot be read, a defense that changed none of them, or one that
            needs the model.
    """
    made = make_defenses(defenses)
    if model is not None:
        bind_all(made, bare(model), tokenizer, seed)
    for defense in made:
        if defense.opens("prepare_data") and defense.opens("bind") and defense._bound_to is None:
            raise NarrowlyError(
                f"{type(defense).__name__} chooses data by the model: call "
                "`prepare_data(chats, defenses, model, tokenizer)`."
            )
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
        trainer.compute_loss = _Defended(trainer, guard)  # type: ignore[method-assign]
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
        if "labels" not in batch:
            raise NarrowlyError(
                "the batch has no `labels`, so a defense's loss cannot tell answers from prompts. "
                "Give the Trainer labels, -100 on what is not to be learned."
            )
        self.guard.expect()
        total: Any = self.plain(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = total if return_outputs else (total,)
        added = self.guard.loss(model, batch, self._share(batch, num_items_in_batch))
        loss = loss + added.to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _share(self, batch: dict[str, Tensor], total: Tensor | int | None) -> Tensor | float:
        """How much of the step's loss is this micro-batch's: that of its answers' tokens.

        So the step's loss is the mean over all its tokens, however they are split into
        micro-batches and processes. Without `total` Trainer divides by the micro-batches itself.
        """
        if total is None:
            return 1.0
        processes = 1
        if self.trainer.args.average_tokens_across_devices:
            processes = self.trainer.accelerator.num_processes  # whose gradients are averaged
        return (batch["labels"] != -100).sum() * processes / total
