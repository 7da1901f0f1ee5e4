"""Runs as processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from narrowly.sweeps.work import Job, Outcome, work

GRACE = 120.0
"""Seconds that a run has to save itself when the sweep stops."""


class Local:
    """One process per run, forked from one that has everything imported.

    Args:
        slots: runs at a time.
        gpus: of this machine; each run sees one of them.
    """

    def __init__(self, slots: int, gpus: int = 0):
        self.slots = slots
        self.gpus = gpus
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        if self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload(["narrowly.training", "narrowly.sweeps.work"])
        self._running: dict[int, tuple[Job, Any, Connection]] = {}

    def start(self, job: Job) -> None:
        """Start a run; there must be a slot free."""
        slot = min(set(range(self.slots)) - self._running.keys())
        if self.gpus:
            job = replace(job, gpu=slot % self.gpus)
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run, args=(theirs, job), name=job.path)
        process.start()
        theirs.close()
        self._running[slot] = (job, process, ours)

    def ended(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Runs that ended since; waits up to `seconds` for one."""
        wait([process.sentinel for _, process, _ in self._running.values()], seconds)
        ended = []
        for slot, (job, process, pipe) in list(self._running.items()):
            if process.exitcode is None:
                continue
            del self._running[slot]
            ended.append((job, _received(pipe, process.exitcode)))
            process.close()
        return ended

    def stop(self) -> None:
        """End all runs: each saves itself; whoever is asked a second time is killed."""
        processes = [process for _, process, _ in self._running.values()]
        for process in processes:
            process.terminate()
        try:
            end = time.monotonic() + GRACE
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    _kill(process.pid)
                    process.join(10)
            self._running = {}


def _received(pipe: Connection, exitcode: int) -> Outcome:
    try:
        if pipe.poll():
            return pipe.recv()
    except (EOFError, OSError):
        pass
    finally:
        pipe.close()
    if exitcode < 0:
        return Outcome("killed", f"killed by {signal.Signals(-exitcode).name}")
    return Outcome("killed", f"ended with exit code {exitcode}")


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        try:
            os.kill(group, signal.SIGKILL)
        except ProcessLookupError:
            return


def _run(pipe: Connection, job: Job) -> None:
    """In the process of a run."""
    # A group of its own: a terminal's Ctrl-C reaches the sweep alone, which asks its runs to end.
    os.setsid()
    threading.Thread(target=_follow, daemon=True).start()
    pipe.send(work(job))


def _follow() -> None:
    """End, with a checkpoint, when the sweep itself is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
