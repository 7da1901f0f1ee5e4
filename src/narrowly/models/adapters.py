"""The tuned model and its base in one: adapters switched off and on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from narrowly.errors import NarrowlyError


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what its base computes.

    Raises:
        NarrowlyError: the model has no peft adapter.
    """
    if not isinstance(model, PeftModel):
        raise NarrowlyError(
            f"{type(model).__name__} has no adapter to switch off. Load a LoRA run or an adapter "
            "folder; a full fine-tune is compared with its base by loading both."
        )
    # Switching back on, peft makes every weight of the adapter trainable, also those of an
    # adapter loaded for inference and those that an adapter keeps frozen.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
