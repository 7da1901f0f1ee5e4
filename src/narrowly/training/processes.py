"""Several processes: what `accelerate launch` set up, and what it leaves to be done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule


def sharding() -> bool:
    """Whether the launcher asks for FSDP: each process holds a part of every weight."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Within the block accelerate obeys a demand for FSDP on the CPU too.

    accelerate 1.15 reads it for accelerators only; elsewhere it trains whole copies and says
    nothing. What it then builds runs on the CPU as it is.
    """
    state = PartialState._shared_state
    if not (sharding() and state.get("distributed_type") == DistributedType.MULTI_CPU):
        yield
        return
    state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if state["distributed_type"] == DistributedType.MULTI_GPU:
            state["distributed_type"] = DistributedType.MULTI_CPU


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The trained weights of a model in parts, put together; None for any other model.

    Every process must call this; the first receives the weights, on the CPU.
    """
    if not isinstance(model, FSDPModule):
        return None
    options = StateDictOptions(
        full_state_dict=True,
        cpu_offload=True,
        ignore_frozen_params=isinstance(model, PeftModel),
    )
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def mean_over_processes(value: Tensor | float) -> float:
    """The mean of a number that each process has; every process must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return float(value)
    total = torch.tensor(float(value), device=PartialState().device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
