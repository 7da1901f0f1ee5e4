"""What holds around a whole sweep."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from narrowly.errors import NarrowlyError
from narrowly.sweeps.work import no_space


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else runs a sweep in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".sweep.lock", timeout=0):
            yield
    except Timeout:
        raise NarrowlyError(f"{folder}: another sweep is running in it.") from None


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """A full disk is told as such."""
    try:
        yield
    except OSError as error:
        if not no_space(error):
            raise
        raise NarrowlyError(
            f"{folder}: no space is left on its disk. What is done is kept; make room, and the "
            "same command continues."
        ) from None


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
