"""The doors through which a defense reaches a training: each must change something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from narrowly.data import fingerprint
from narrowly.defenses import DEFENSES, Defense
from narrowly.defenses.step import Step
from narrowly.errors import NarrowlyError
from narrowly.training.processes import mean_over_processes


def open_first_door(chats: Dataset, defenses: Sequence[Defense]) -> Dataset:
    """Chats (column `messages`) after the defenses' first door.

    Raises:
        NarrowlyError: a defense that changed none of them.
    """
    for defense in defenses:
        if defense.opens("prepare_data"):
            before = fingerprint(chats)
            chats = defense.prepare_data(chats)
            if fingerprint(chats) == before:
                raise defense.idle("prepare_data", "row")
            defense._prepared = True
    return chats


class Loss:
    """The third door of one defense, and the values that came through it."""

    def __init__(self, defense: Defense):
        self.defense = defense
        self.name = DEFENSES.name_of(type(defense))
        self.total: Any = 0.0
        self.count = 0
        self._logged: tuple[Any, int] = (0.0, 0)

    def of(self, step: Step) -> Tensor:
        """The loss of one micro-batch; a weight of 0 costs nothing, and trains as if undefended."""
        weight = getattr(self.defense, "weight", 1)
        value = self.defense.loss(step) if weight else torch.zeros(())
        if self.count == 0 and not value.isfinite():
            raise NarrowlyError(f"{self.name}: its loss is {float(value)} at the first step.")
        # Kept on the device: reading it would wait for every step of a GPU.
        self.total = self.total + value.detach().float()
        self.count += 1
        return value

    def since(self) -> float:
        """Mean since this was asked last."""
        total, count = self._logged
        self._logged = self.total, self.count
        return mean_over_processes(self.total - total) / max(1, self.count - count)

    def verify(self) -> None:
        """Fail unless it was added at all."""
        if not self.count:
            raise NarrowlyError(
                f"{self.name}: its loss was never added: this Trainer does not compute its loss "
                "where `narrowly.defend` adds to it."
            )

    def check(self) -> None:
        """Fail if every value was 0, and no weight of 0 asked for that."""
        if float(self.total) == 0 and getattr(self.defense, "weight", 1) != 0:
            raise self.defense.idle("loss", "loss")

    def told(self) -> dict[str, Any]:
        """For the record."""
        return {"mean": float(self.total) / max(1, self.count), "micro_batches": self.count}


def finish(model: nn.Module, defenses: Sequence[Defense]) -> None:
    """The defenses' fourth door.

    Raises:
        NarrowlyError: one changed no weight.
    """
    for defense in defenses:
        if defense.opens("finish"):
            before = _checksums(model)
            with torch.no_grad():
                defense.finish(model)
            if _checksums(model) == before:
                raise defense.idle("finish", "weight")


def _checksums(model: nn.Module) -> list[tuple[float, float]]:
    weights = [parameter.detach().double() for parameter in model.parameters()]
    return [(weight.sum().item(), weight.abs().sum().item()) for weight in weights]
