"""From a sweep file to its runs: what is missing runs, wherever it was stopped."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
import yaml
from rich.console import Console
from rich.markup import escape

from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from narrowly.report.choose import choose
from narrowly.report.sweep import Cell, SweepRecord
from narrowly.sweeps.file import Sweep
from narrowly.sweeps.guards import alone, room, terminable
from narrowly.sweeps.local import Local
from narrowly.sweeps.progress import Board, counted
from narrowly.sweeps.work import Job, Outcome, look, over_memory

TRIES = 2
"""Of a run whose process was killed."""


class Pool(Protocol):
    """Where runs run."""

    slots: int

    def start(self, job: Job) -> None:
        """Start a run; there must be a slot free."""

    def ended(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Runs that ended since; waits up to `seconds` for one."""

    def stop(self) -> None:
        """End all runs: each saves itself."""


def sweep(
    file: Sweep | str | Path,
    overrides: Sequence[str] = (),
    *,
    on: str = "local",
    progress: bool = True,
) -> SweepRecord:
    """Run what is missing of a sweep, and keep `sweep.json` in its folder up to date.

    What is done is not done again, and a run that was stopped goes on from its checkpoint. A cell
    that cannot run, or fails, is told in the record, and all others run. A run whose process was
    killed is started once more. From a script, call this under `if __name__ == "__main__":`, since
    runs are processes of their own.

    Args:
        file: a sweep or its YAML file.
        overrides: `key=value` settings of a file, such as `jobs=2`.
        on: processes of this machine, or Ray (extra `ray`): the cluster of `RAY_ADDRESS`, or else
            one of this machine. All its nodes must see the output folder.
        progress: show on the terminal what is going on.

    Returns:
        The record: every cell, and what became of it.

    Raises:
        NarrowlyError: a mistake in the file, no cell that can run, a full disk, or another sweep
            that runs in the same folder.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise NarrowlyError(
            "narrowly.sweep starts processes, which read this script first: call it under "
            '`if __name__ == "__main__":`.'
        )
    if not isinstance(file, Sweep):
        file = Sweep.read(file, overrides)
    elif overrides:
        raise ValueError("overrides go with a file")
    folder = Path(file.output)
    with room(folder), alone(folder), terminable():
        pool = _pool(file, on)
        try:
            with Board(Console(stderr=True, quiet=not progress), pool.slots) as board:
                return _Run(file, folder, pool, board).all()
        finally:
            pool.stop()


class _Run:
    """One call of `sweep`."""

    def __init__(self, sweep: Sweep, folder: Path, pool: Pool, board: Board):
        self.sweep, self.folder, self.pool, self.board = sweep, folder, pool, board
        self.record = SweepRecord(tasks=sweep.tasks, choose_on=sweep.choose_on, cells=sweep.cells())
        self.waiting: deque[Cell] = deque()
        self.running: dict[str, Cell] = {}
        self.tries: dict[str, int] = {}
        self.to_choose = sweep.choose_on is not None
        board.cells = self.record.cells
        if self.to_choose:
            several = [arm for arm in sweep.defenses if len(sweep.arm_settings(arm)) > 1]
            board.to_come = len(several) * (len(sweep.tasks) - 1) * len(sweep.seeds)

    def all(self) -> SweepRecord:
        """Run everything."""
        self._queue(self.record.cells)
        broken = [cell for cell in self.record.cells if cell.status == "impossible"]
        broken.sort(key=lambda cell: cell.why or "")
        if len(broken) == len(self.record.cells):
            raise NarrowlyError(f"no cell can run. {broken[0].path}: {broken[0].why}")
        resolved = self.sweep.model_dump(mode="json", exclude_none=True)
        write_text(self.folder / "sweep.yaml", yaml.safe_dump(resolved, sort_keys=False))
        self.board.say(
            f"{self.folder}: {len(self.sweep.tasks)} tasks x {len(self.sweep.defenses)} arms x "
            f"{len(self.sweep.seeds)} seeds: {counted(self.record.cells, self.board.to_come)}; "
            f"{self.pool.slots} at a time"
        )
        for why, cells in groupby(broken, lambda cell: cell.why):
            first, *more = cells
            told = f" and {len(more)} more" if more else ""
            self.board.say(f"[red]impossible[/] {first.path}{told}: {escape(why or '')}")
        try:
            self._loop()
        finally:
            for cell in self.running.values():
                cell.status = "waiting"
            self.record.write(self.folder)
        return self.record

    def _loop(self) -> None:
        while True:
            if self.to_choose and not self._open(self.sweep.choose_on):
                self._choose()
            while self.waiting and len(self.running) < self.pool.slots:
                self._start(self.waiting.popleft())
            if not self.running:
                return
            for job, outcome in self.pool.ended(0.5):
                self._end(self.running.pop(job.path), job, outcome)

    def _queue(self, cells: Sequence[Cell]) -> None:
        """Line up what is neither done nor impossible."""
        for cell in cells:
            known = look(self.sweep.recipe_of(cell))
            if known is None:
                self.waiting.append(cell)
            else:
                cell.status, cell.why = known.status, known.why  # type: ignore[assignment]
        self.record.write(self.folder)

    def _open(self, task: str | None) -> bool:
        return any(
            cell.task == task and cell.status in ("waiting", "running")
            for cell in self.record.cells
        )

    def _start(self, cell: Cell) -> None:
        self.tries[cell.path] = self.tries.get(cell.path, 0) + 1
        recipe = self.sweep.recipe_of(cell)
        log = self.folder / "logs" / f"{cell.path.replace('/', '--')}.txt"
        self.pool.start(Job(cell.path, recipe, str(log), self.sweep.threads, self.sweep.memory))
        self.running[cell.path] = cell
        cell.status, cell.why = "running", None
        self.board.started(cell, recipe)
        self.record.write(self.folder)

    def _end(self, cell: Cell, job: Job, outcome: Outcome) -> None:
        if outcome.status == "killed" and (told := over_memory(job.log)):
            outcome = Outcome("failed", f"{told}. Raise `memory`, or make its batches smaller.")
        again = outcome.status == "killed" and self.tries[cell.path] < TRIES
        self.board.ended(cell, outcome, "; started once more" if again else "")
        if outcome.status == "full":
            cell.status = "waiting"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if again:
            cell.status = "waiting"
            self.waiting.appendleft(cell)
        elif outcome.status == "killed":
            cell.status, cell.why = "failed", f"{outcome.why}, {TRIES} times"
        else:
            cell.status, cell.why = outcome.status, outcome.why
        self.record.write(self.folder)

    def _choose(self) -> None:
        """Settle the settings of the other tasks."""
        self.to_choose = False
        self.board.to_come = 0
        why = "none of its settings was measured there"
        try:
            self.record.chosen = choose(self.record, self.folder)
        except NarrowlyError as error:
            why = str(error)
        known = {cell.path for cell in self.record.cells}
        settled = [c for c in self.sweep.cells(self.record.chosen) if c.path not in known]
        self.record.cells += settled
        self._queue(settled)
        for arm in self.sweep.defenses:
            if len(self.sweep.arm_settings(arm)) == 1:
                continue
            setting = self.record.chosen.get(arm)
            told = ", ".join(f"{key} = {value}" for key, value in (setting or {}).items())
            self.board.say(
                f"chosen on {self.sweep.choose_on} for {arm}: {escape(told) or '[red]nothing[/]'}"
            )
            if setting is None:
                self.record.cells += self._unsettled(arm, why)
        self.record.write(self.folder)

    def _unsettled(self, arm: str, why: str) -> list[Cell]:
        why = f"no setting could be chosen on {self.sweep.choose_on}: {why}"
        return [
            self.sweep.cell(task, arm, {}, seed).model_copy(
                update={"status": "impossible", "why": why}
            )
            for seed in self.sweep.seeds
            for task in self.sweep.tasks
            if task != self.sweep.choose_on
        ]


def _pool(sweep: Sweep, on: str) -> Pool:
    if on == "ray":
        from narrowly.sweeps.on_ray import OnRay

        return OnRay(sweep.jobs, sweep.threads, sweep.memory, sweep.gpus)
    if on != "local":
        raise NarrowlyError(f"--on {on}: runs run on `local` or on `ray`.")
    gpus = torch.cuda.device_count() if sweep.gpus else 0
    fitting = int(gpus / sweep.gpus) if gpus else _cores() // sweep.threads
    return Local(sweep.jobs or max(1, fitting), gpus)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
