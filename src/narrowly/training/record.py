"""What one would need to run it again: `reproduce.json`."""

from __future__ import annotations

import os
import platform
import resource
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from accelerate.state import PartialState

from narrowly.training.recipe import Recipe

PACKAGES = ("narrowly", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def describe(recipe: Recipe) -> dict[str, Any]:
    """Software, machine and command that numbers and times depend on."""
    gpus = range(torch.cuda.device_count())
    return {
        "command": " ".join(sys.argv),
        "seed": recipe.seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in gpus],
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "parallel": PartialState().distributed_type.value,
        },
    }


def now() -> str:
    """UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> dict[str, int]:
    """Bytes at the worst moment of this process: main memory, and each GPU's."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"main": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for i in range(torch.cuda.device_count()):
        peak[f"gpu{i}"] = torch.cuda.max_memory_allocated(i)
    return peak
