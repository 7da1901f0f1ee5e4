"""One run of a sweep, in a process of its own: what it may take, and what became of it."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import psutil
import torch
import transformers
from filelock import FileLock

from narrowly.errors import NarrowlyError
from narrowly.evals import parse
from narrowly.settings import build
from narrowly.training import Recipe, Run, train

GB = 10**9
FULL = ("No space left on device", "inline_container.cc")
"""What safetensors and pyarrow say of a full disk, and torch's writer of checkpoints."""
OVER = "memory: "
"""Begins the last line of the log of a run that took too much."""


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        path: of the cell, which names it.
        recipe: its values.
        log: file that receives what it prints.
        threads: of it.
        memory: in GB.
        gpu: number of the GPU that it sees, of those that this machine shows; None: as it is.
    """

    path: str
    recipe: dict[str, Any]
    log: str
    threads: int = 1
    memory: float | None = None
    gpu: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    `impossible`: its recipe or what it names cannot run; `failed`: it broke; `killed`: its process
    is gone, and nobody knows why; `full`: no space is left on the disk.
    """

    status: Literal["done", "impossible", "failed", "killed", "full"]
    why: str | None = None


def work(job: Job) -> Outcome:
    """Train and measure."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    torch.set_num_threads(job.threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if job.gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = seen.split(",") if seen else None
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[job.gpu] if gpus else str(job.gpu)
    with logged(Path(job.log)):
        if job.memory is not None:
            threading.Thread(target=_hold, args=(job.memory,), daemon=True).start()
        try:
            train(build(Recipe, job.recipe), progress=False)
        except NarrowlyError as error:
            return Outcome("impossible", str(error))
        except (KeyboardInterrupt, SystemExit):
            return Outcome("killed", "it was told to stop")
        except Exception as error:
            traceback.print_exc()
            if no_space(error):
                return Outcome("full")
            what = str(error).strip().splitlines() or [""]
            return Outcome("failed", f"{type(error).__name__}: {what[0]} (see {job.log})")
    return Outcome("done")


def look(values: dict[str, Any]) -> Outcome | None:
    """What is known of a run without making it: that it is done, or cannot be done."""
    try:
        recipe = build(Recipe, values)
        run = Run(Path(recipe.output))
        run.check(recipe)
        evals = [run.path / "evals" / name / "summary.json" for name in parse(recipe.evals)]
        if run.trained and "finished" in run.reproduce and all(path.exists() for path in evals):
            written = (run.path / "recipe.yaml").read_text(encoding="utf-8")
            return Outcome("done") if written == recipe.to_yaml() else None
    except NarrowlyError as error:
        return Outcome("impossible", str(error))
    return None


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """Everything that the process prints goes to `log`; an empty one is removed again.

    A process of an earlier sweep that has not ended yet is waited for.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(log.with_name(f".{log.name}.lock")):
        with log.open("w", encoding="utf-8") as file:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if log.exists() and not log.stat().st_size:
                log.unlink()


def over_memory(log: str | Path) -> str | None:
    """What a process wrote last, if it ended itself because it took too much memory."""
    try:
        lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    return lines[-1] if lines and lines[-1].startswith(OVER) else None


def no_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error, whoever raised it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _hold(limit: float) -> None:
    """End this process once it takes more than `limit` GB of main memory."""
    own = psutil.Process()
    while True:
        taken = 0
        for process in (own, *own.children(recursive=True)):
            try:
                taken += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        if taken > limit * GB:
            told = f"{OVER}{taken / GB:.2f} GB, and its limit is {limit:g}"
            os.write(2, f"\n{told}\n".encode())
            os._exit(1)
        time.sleep(0.1)
