"""Defenses in anyone's Trainer: transformers', trl's, or one that is derived from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from narrowly.defenses import Defense
from narrowly.training.callback import DefenseCallback


def defend(trainer: Trainer, guard: DefenseCallback | Sequence[Defense]) -> DefenseCallback:
    """Defend what a Trainer will train.

    Adds the callback that attaches interventions and verifies them, and wraps `compute_loss` where
    a defense adds to the loss. The first door changes chats, which this Trainer already holds as
    tokens: pass them through `prepare_data` before.

    Args:
        trainer: not yet training.
        guard: the defenses, or their callback.
    """
    if not isinstance(guard, DefenseCallback):
        guard = DefenseCallback(guard)
    # The first of them, so that the others' `on_log` sees the losses.
    trainer.callback_handler.callbacks.insert(0, guard)
    guard.wired = True
    if guard.losses:
        trainer.compute_loss = _Defended(trainer, guard)  # type: ignore[method-assign]
    return guard


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
