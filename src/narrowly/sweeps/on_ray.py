"""Runs as tasks of a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from narrowly.errors import NarrowlyError
from narrowly.sweeps.work import GB, Job, Outcome, work

OBJECT_STORE = 100 * 10**6
"""Bytes of a cluster of this machine: a recipe goes in, and a line comes out."""


class OnRay:
    """One Ray task per run, in a process that ends with it.

    Only recipes go to the cluster: every node must have narrowly installed, and see the output
    folder, and whatever files recipes name, at the same paths.

    Args:
        slots: runs at a time; None: as many as the cluster has room for now.
        threads, memory, gpus: of each run: cores, GB and GPUs (or a fraction) that Ray sets aside.
    """

    def __init__(self, slots: int | None, threads: int, memory: float | None, gpus: float):
        try:
            import ray
        except ImportError:
            raise NarrowlyError(
                "--on ray needs Ray. Install it: pip install 'narrowly[ray]'"
            ) from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(ray, (slots or 0) * threads or None)
        there = ray.cluster_resources()
        self._options: dict[str, Any] = {"num_cpus": threads, "max_retries": 0, "max_calls": 1}
        if gpus and there.get("GPU"):
            self._options["num_gpus"] = gpus
        if memory is not None:
            self._options["memory"] = int(memory * GB)
        if slots is None:
            slots = _room(there, self._options)
        self.slots = slots
        self._running: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Start a run; there must be a slot free."""
        task = self._ray.remote(**self._options)(_run)
        self._running[task.options(name=job.path).remote(job, str(Path.cwd()))] = job

    def ended(self, seconds: float) -> list[tuple[Job, Outcome]]:
        """Runs that ended since; waits up to `seconds` for one."""
        ready, _ = self._ray.wait(list(self._running), timeout=seconds)
        return [(self._running.pop(reference), self._received(reference)) for reference in ready]

    def _received(self, reference: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:  # what `work` does not catch
            return Outcome("failed", str(error).strip().splitlines()[-1])
        except errors.RayError as error:
            return Outcome("killed", f"{type(error).__name__}")

    def stop(self) -> None:
        """End all runs: each saves itself. Leaves a cluster that was there before."""
        for reference in self._running:
            self._ray.cancel(reference)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=120)
        self._running = {}
        if self._ours:
            self._ray.shutdown()


def _connect(ray: Any, cores: int | None) -> None:
    """To the cluster of `RAY_ADDRESS`, or a new one of this machine."""
    shared = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**shared)
        else:
            ray.init(
                num_cpus=cores,
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                **shared,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NarrowlyError(f"--on ray: no cluster: {error}") from None


def _room(there: dict[str, float], options: dict[str, Any]) -> int:
    """Runs that the cluster has room for at a time."""
    room = [there.get("CPU", 0) / options["num_cpus"]]
    if "num_gpus" in options:
        room.append(there["GPU"] / options["num_gpus"])
    if "memory" in options:
        room.append(there.get("memory", 0) / options["memory"])
    if min(room) < 1:
        raise NarrowlyError(
            f"--on ray: no run of {options} fits into the cluster, which has {there}. "
            "Lower `threads`, `memory` or `gpus`."
        )
    return int(min(room))


def _run(job: Job, folder: str) -> Outcome:
    """In a worker of the cluster. Relative paths are meant from where the sweep was started."""
    if Path(folder).is_dir():
        os.chdir(folder)
    return work(job)
