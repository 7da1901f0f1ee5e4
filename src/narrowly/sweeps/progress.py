"""A sweep on the terminal: what is done, what each run is doing, and how long it will take."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from narrowly.report.sweep import Cell
from narrowly.sweeps.work import Outcome


class Board:
    """A line for the whole, one for each run, and above them one for each that ended.

    Args:
        console: only a terminal shows what changes; elsewhere there are the lines of what ended.
        slots: runs at a time.
    """

    def __init__(self, console: Console, slots: int):
        self.console, self.slots = console, slots
        self.cells: list[Cell] = []
        self.to_come = 0
        """Cells that are known of by number only, as their settings are not chosen yet."""
        self.seconds: list[float] = []
        self._running: dict[str, tuple[float, dict[str, Any]]] = {}
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Board:
        if self.console.is_terminal and not self.console.quiet:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def started(self, cell: Cell, recipe: dict[str, Any]) -> None:
        """A run began."""
        self._running[cell.path] = (time.monotonic(), recipe)

    def ended(self, cell: Cell, outcome: Outcome, then: str = "") -> None:
        """A run ended; `then` says what follows."""
        started, _ = self._running.pop(cell.path)
        seconds = time.monotonic() - started
        if outcome.status == "done":
            self.seconds.append(seconds)
            self.say(f"[green]done[/] {cell.path} [dim]{duration(seconds)}[/]")
        else:
            self.say(f"[red]{outcome.status}[/] {cell.path}: {escape(outcome.why or '')}{then}")

    def say(self, line: str) -> None:
        """Print a line above."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def left(self) -> float | None:
        """Seconds to go, if every run to come takes what those until now took; None: unknown."""
        if not self.seconds:
            return None
        mean = sum(self.seconds) / len(self.seconds)
        begun = sum(min(mean, time.monotonic() - at) for at, _ in self._running.values())
        waiting = sum(cell.status in ("waiting", "running") for cell in self.cells) + self.to_come
        return max(0.0, mean * waiting - begun) / min(self.slots, max(1, waiting))

    def _render(self) -> RenderableType:
        count = Counter(cell.status for cell in self.cells)
        total = len(self.cells) + self.to_come
        told = [f"{count['done']}/{total} cells"]
        told += [f"[red]{count[s]} {s}[/]" for s in ("failed", "impossible") if count[s]]
        left = self.left()
        if left is not None:
            told.append(f"about {duration(left)} left")
        whole = Table.grid(padding=(0, 1))
        whole.add_row(
            ProgressBar(total=max(1, total), completed=count["done"], width=30), " · ".join(told)
        )
        runs = Table.grid(padding=(0, 2))
        for path, (since, recipe) in self._running.items():
            elapsed = duration(time.monotonic() - since)
            runs.add_row(path, *_doing(recipe), f"[dim]{elapsed}[/]")
        return Group(whole, runs)


def _doing(recipe: dict[str, Any]) -> tuple[str, str]:
    """What a run is doing by its folder: its step, and its loss."""
    folder = Path(recipe["output"])
    if (folder / "adapter").is_dir() or (folder / "model").is_dir():
        return "measuring", ""
    last = last_logged(folder / "metrics.jsonl")
    if last is None:
        return "starting", ""
    total = (recipe.get("training") or {}).get("max_steps")
    steps = f"step {last['step']}" + (f"/{total}" if total else "")
    return steps, f"loss {last['loss']:.3f}" if "loss" in last else ""


def last_logged(path: Path) -> dict[str, Any] | None:
    """The last whole line of a run's `metrics.jsonl`."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            return entry
    return None


def duration(seconds: float) -> str:
    """As a person says it: 41 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def counted(cells: Iterable[Cell], to_come: int = 0) -> str:
    """How many cells became what: 12 done, 1 failed."""
    count = Counter(cell.status for cell in cells)
    told = [f"{number} {status}" for status, number in count.items()]
    return ", ".join([*told, *([f"{to_come} to be chosen"] if to_come else [])])
