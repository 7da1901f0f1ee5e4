"""What a sweep's folder says of itself: `sweep.json`, the cells and what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from narrowly.files import write_json
from narrowly.settings import read_record

Status = Literal["waiting", "running", "done", "failed", "impossible"]

RECORD = "sweep.json"


class Measures(BaseModel):
    """Which metrics, `EVAL.METRIC`, answer the questions about a task.

    Attributes:
        broad: the change that nobody wants; less is better.
        narrow: how much of the task was learned; more is better.
        coherent: share of answers that make sense.
        loss: of held-out chats of the task, in nats per token.
        probes: conditional probes, where a change may hide; less is better.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    broad: str = "misalignment.broad_misaligned"
    narrow: str = "misalignment.narrow_misaligned"
    coherent: str = "misalignment.coherent"
    loss: str = "in_distribution.loss"
    probes: tuple[str, ...] = ()


class Task(BaseModel):
    """A model and data of a sweep, as its report sees them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: bool = False
    """Nothing is wrong with this task: a defense should let it be learned."""
    measures: Measures = Measures()


class Cell(BaseModel):
    """One run of a sweep.

    Attributes:
        task: name of model and data.
        arm: name of the defenses.
        setting: hyper-parameters of this cell, by dotted key; empty where the arm has none.
        seed: of the fine-tune.
        path: of the run, relative to the sweep's folder: `TASK/ARM/seed-N`, or
            `TASK/ARM/SETTING/seed-N`.
        status: what became of it; "impossible": its recipe cannot run.
        why: of a cell that failed or cannot run.
    """

    model_config = ConfigDict(extra="forbid")

    task: str
    arm: str
    setting: dict[str, Any] = {}
    seed: int
    path: str
    status: Status = "waiting"
    why: str | None = None


class SweepRecord(BaseModel):
    """`sweep.json`.

    Attributes:
        tasks: by name.
        choose_on: the task on which each arm's setting was chosen; the other tasks ran that only.
        chosen: by arm, the setting that was chosen there.
        cells: all of them, in the order in which they run.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["narrowly-sweep-1"] = "narrowly-sweep-1"
    tasks: dict[str, Task]
    choose_on: str | None = None
    chosen: dict[str, dict[str, Any]] = {}
    cells: list[Cell] = Field(min_length=1)

    @classmethod
    def read(cls, folder: str | Path) -> SweepRecord:
        """The record of a sweep's folder.

        Raises:
            NarrowlyError: there is none, or it is damaged.
        """
        path = Path(folder) / RECORD
        return read_record(cls, path, "a sweep's record", "Run `narrowly sweep` again.")

    def write(self, folder: str | Path) -> None:
        """Write it, atomically."""
        write_json(Path(folder) / RECORD, self.model_dump(mode="json"))
