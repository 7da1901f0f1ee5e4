"""The same sweeps on a Ray cluster of this machine."""

import builtins
import threading
from pathlib import Path

import psutil
import pytest
import torch

from narrowly.errors import NarrowlyError
from narrowly.sweeps import sweep
from narrowly.sweeps.on_ray import OnRay
from tests.sweeps.test_local import logged_steps, uninterrupted, wait_until, weights


def ray_workers(task: str) -> list[psutil.Process]:
    """Ray's workers name themselves after what they run."""
    return [
        process
        for process in psutil.process_iter()
        if any("ray::" in part and task in part for part in _command(process))
    ]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_a_killed_worker_goes_on_from_its_checkpoint(tiny_sweep, tmp_path):
    ray = pytest.importorskip("ray")
    training = {"max_steps": 60, "save_steps": 5}
    one = tiny_sweep(training=training, defenses={"undefended": []}, memory=2)
    path = "sums/undefended/seed-0"
    run = Path(one.output) / path
    killed = []

    def kill() -> None:
        wait_until(lambda: logged_steps(run) > 20, "step 20")
        [process] = ray_workers(path)
        process.kill()
        killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    record = sweep(one, on="ray", progress=False)
    killer.join()
    assert killed
    assert [cell.status for cell in record.cells] == ["done"]
    assert not ray.is_initialized(), "the cluster that it started is gone"
    alone = uninterrupted(one, path, tmp_path / "alone")
    assert all(torch.equal(weights(run)[name], each) for name, each in weights(alone).items())


@pytest.mark.slow
def test_what_a_run_takes_is_asked_of_the_cluster():
    """Ray believes in the GPUs that it is told of."""
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=4,
        num_gpus=2,
        object_store_memory=10**8,
        include_dashboard=False,
        log_to_driver=False,
        _memory=6 * 10**9,
    )
    try:
        pool = OnRay(None, threads=1, memory=1.5, gpus=0.25)
        asked = {"num_cpus": 1, "num_gpus": 0.25, "memory": 1_500_000_000}
        assert asked.items() <= pool._options.items()
        assert pool.slots == 4
        assert OnRay(None, threads=1, memory=None, gpus=1).slots == 2
        assert OnRay(3, threads=1, memory=None, gpus=0).slots == 3
        with pytest.raises(NarrowlyError, match=r"no run of .* fits into the cluster"):
            OnRay(None, threads=64, memory=None, gpus=0)
        pool.stop()
        assert ray.is_initialized(), "a cluster that was there stays"
    finally:
        ray.shutdown()


def test_without_ray_the_extra_is_named(monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ray":
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NarrowlyError, match=r"pip install 'narrowly\[ray\]'"):
        OnRay(1, 1, None, 0)
