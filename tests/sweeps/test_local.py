"""Runs of a sweep as processes of this machine: killed, stopped, over their memory."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from narrowly.files import write_text
from narrowly.settings import build
from narrowly.sweeps import Sweep, sweep
from narrowly.training import Recipe, Run, train
from tests.sweeps.conftest import statuses

SCRIPT = """
import sys
from narrowly.sweeps import sweep
if __name__ == "__main__":
    sweep(sys.argv[1], progress=False)
"""
LONG = {"max_steps": 400, "save_steps": 5}


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def logged_steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return sum('"loss"' in line for line in lines)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def workers(parent: int) -> list[psutil.Process]:
    """Processes of runs: what the fork server has forked."""
    servers = [
        child
        for child in psutil.Process(parent).children()
        if any("forkserver" in part for part in child.cmdline())
    ]
    return [run for server in servers for run in server.children()]


def uninterrupted(a_sweep: Sweep, path: str, out: Path) -> Run:
    """The same run, made by itself."""
    [cell] = [cell for cell in a_sweep.cells() if cell.path == path]
    recipe = a_sweep.recipe_of(cell) | {"output": str(out)}
    return train(build(Recipe, recipe), progress=False)


@pytest.mark.slow
def test_a_run_of_a_sweep_is_the_run_of_its_recipe(tiny_sweep, tmp_path):
    two = tiny_sweep()
    record = sweep(two, progress=False)
    assert [cell.status for cell in record.cells] == ["done", "done"]
    for cell in record.cells:
        alone = uninterrupted(two, cell.path, tmp_path / cell.arm)
        there = weights(Path(two.output) / cell.path)
        assert all(torch.equal(there[name], tensor) for name, tensor in weights(alone).items())
    assert not list(Path(two.output).glob("logs/*.txt")), "nothing was said"
    assert all(run.status() == psutil.STATUS_ZOMBIE for run in workers(os.getpid()))


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(tiny_sweep, tmp_path):
    one = tiny_sweep(training={"max_steps": 60, "save_steps": 5}, defenses={"undefended": []})
    run = Path(one.output) / "sums/undefended/seed-0"
    killed = []

    def kill() -> None:
        wait_until(lambda: logged_steps(run) > 20, "step 20")
        [process] = [w for w in workers(os.getpid()) if w.status() != psutil.STATUS_ZOMBIE]
        process.kill()
        killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    record = sweep(one, progress=False)
    killer.join()
    assert killed
    assert [cell.status for cell in record.cells] == ["done"]
    alone = uninterrupted(one, "sums/undefended/seed-0", tmp_path / "alone")
    assert all(torch.equal(weights(run)[name], each) for name, each in weights(alone).items())


@pytest.mark.slow
def test_a_run_over_its_memory_is_stopped_and_told(tiny_sweep):
    record = sweep(tiny_sweep(memory=0.05, training=LONG), progress=False)
    assert [cell.status for cell in record.cells] == ["failed", "failed"]
    for cell in record.cells:
        assert "GB, and its limit is 0.05. Raise `memory`" in (cell.why or "")


@pytest.fixture
def started(tmp_path):
    """Start a sweep as a process of its own; killed if the test leaves it."""
    processes = []

    def start(a_sweep: Sweep) -> subprocess.Popen:
        write_text(tmp_path / "sweep.yaml", json.dumps(a_sweep.model_dump(exclude_none=True)))
        write_text(tmp_path / "script.py", SCRIPT)
        command = [sys.executable, tmp_path / "script.py", tmp_path / "sweep.yaml"]
        processes.append(subprocess.Popen(command, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_process_and_goes_on(tiny_sweep, started, number):
    one = tiny_sweep(training=LONG, defenses={"undefended": []})
    run = Run(Path(one.output) / "sums/undefended/seed-0")
    process = started(one)
    wait_until(lambda: logged_steps(run.path) > 8 or process.poll() is not None, "step 8")
    [its_run] = workers(process.pid)
    process.send_signal(number)
    assert process.wait(120) != 0
    # The run of a killed sweep notices by itself.
    wait_until(lambda: not its_run.is_running(), "the run has ended")
    checkpoint = run.checkpoint()
    assert checkpoint is not None and not run.trained
    assert int(checkpoint.name.removeprefix("checkpoint-")) == logged_steps(run.path)
    if number == signal.SIGTERM:
        assert set(statuses(Path(one.output)).values()) == {"waiting"}
