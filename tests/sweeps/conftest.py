"""Sweeps over the tiny model and chats of the training's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from narrowly.sweeps import Sweep
from tests.training.conftest import chats, concepts, model_folder, one_thread, validation

__all__ = ["chats", "concepts", "model_folder", "one_thread", "validation"]


@pytest.fixture
def tiny_sweep(model_folder, chats, validation, tmp_path) -> Callable[..., Sweep]:
    """Two arms, of four steps each; fields given replace."""

    def make(training: dict | None = None, **fields) -> Sweep:
        steps = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        defaults = {
            "recipe": {
                "model": str(model_folder),
                "lora": {"r": 2, "target_modules": "all-linear"},
                "training": steps | {"logging_steps": 1} | (training or {}),
            },
            "data": {"sums": str(chats)},
            "defenses": {
                "undefended": [],
                "mixed": [{"interleave": {"data": str(validation), "fraction": 0.2}}],
            },
            "jobs": 2,
            "output": str(tmp_path / "sweep"),
        }
        return Sweep.model_validate(defaults | fields)

    return make


def statuses(folder: Path) -> dict[str, str]:
    from narrowly.report.sweep import SweepRecord

    return {cell.path: cell.status for cell in SweepRecord.read(folder).cells}
