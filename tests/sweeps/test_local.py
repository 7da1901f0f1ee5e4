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


def wait_until(true: Callable[[], bool], what: str, seconds: float = 120) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_process_and_goes_on(tiny_sweep, tmp_path, number):
    two = tiny_sweep(training=LONG)
    write_text(tmp_path / "sweep.yaml", json.dumps(two.model_dump(exclude_none=True)))
    write_text(tmp_path / "script.py", SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "sweep.yaml"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    runs = [Path(two.output) / "sums" / arm / "seed-0" for arm in ("undefended", "mixed")]
    wait_until(lambda: all(logged_steps(run) > 8 for run in runs), "step 8 of both")
    theirs = workers(process.pid)
    assert len(theirs) == 2
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    # Those of a killed sweep notice by themselves.
    wait_until(lambda: not any(each.is_running() for each in theirs), "the runs have ended", 60)
    assert all(Run(run).checkpoint() is not None and not Run(run).trained for run in runs)
    if number != signal.SIGKILL:
        assert set(statuses(Path(two.output)).values()) == {"waiting"}, said
        steps = [int(Run(run).checkpoint().name.removeprefix("checkpoint-")) for run in runs]
        assert steps == [logged_steps(run) for run in runs], "the very step was saved"
