"""What a search found: its trials, those that no other beats, and the best as a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table

from narrowly.errors import NarrowlyError
from narrowly.files import write_text
from narrowly.sweeps.search import Setting, TuneFile

Status = Literal["finished", "dropped", "failed"]


@dataclass(frozen=True)
class Figures:
    """What is searched by, on the half to tune on; less is better in both."""

    broad: float
    narrow: float

    def beats(self, other: Figures, margin: float = 0.0) -> bool:
        """Whether these are nowhere worse, and in one of the two better by more than `margin`."""
        gains = other.broad - self.broad, other.narrow - self.narrow
        return min(gains) >= 0 and max(gains) > margin


@dataclass(frozen=True)
class Tried:
    """One trial.

    Attributes:
        figures: at the end; of one that was dropped, where it was.
        why: of one that failed.
    """

    number: int
    setting: Setting
    status: Status
    figures: Figures | None = None
    why: str = ""


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        base: the model before any fine-tune.
        undefended: the fine-tune without defenses.
        at_most: the narrow loss that the best trial may have.
        best: the one of least broad change whose narrow loss is allowed; None: there is none.
        pareto: finished trials that no other beats in both figures, from the least narrow loss on.
    """

    file: TuneFile
    trials: list[Tried]
    base: Figures
    undefended: Figures

    @property
    def at_most(self) -> float:
        """The bound on the narrow loss, as the file says it."""
        if self.file.at_most is not None:
            return self.file.at_most
        learned = self.base.narrow - self.undefended.narrow
        return self.undefended.narrow + (1 - self.file.keep) * learned

    @property
    def finished(self) -> list[tuple[Figures, Tried]]:
        """Trials that were trained to their end, with their figures."""
        return [(t.figures, t) for t in self.trials if t.status == "finished" and t.figures]

    @property
    def best(self) -> Tried | None:
        """Where broad change ties, the one that learned the task better, then the earlier."""
        allowed = [(f.broad, f.narrow, t) for f, t in self.finished if f.narrow <= self.at_most]
        return min(allowed, key=lambda each: each[:2])[2] if allowed else None

    @property
    def pareto(self) -> list[Tried]:
        """As the class says."""
        front = [
            (figures.narrow, trial)
            for figures, trial in self.finished
            if not any(other.beats(figures) for other, _ in self.finished)
        ]
        return [trial for _, trial in sorted(front, key=lambda each: each[0])]

    def write_best(self) -> Path | None:
        """Write the best trial's recipe, measured on the other half, as `best.yaml`."""
        path = Path(self.file.output) / "best.yaml"
        if self.best is None or self.best.figures is None:
            path.unlink(missing_ok=True)
            return None
        recipe = self.file.applied(self.best.setting)
        output = str(Path(self.file.output) / "best")
        recipe = recipe.model_copy(update={"evals": self.file.reported_on(), "output": output})
        told = [
            f"Trial {self.best.number} of {len(self.trials)} of a search (`narrowly tune`).",
            f"On the half of the questions that it was chosen by: {self.file.broad} "
            f"{self.best.figures.broad:.4f}, {self.file.narrow} {self.best.figures.narrow:.4f} "
            f"(at most {self.at_most:.4f}).",
            f"Undefended: {self.undefended.broad:.4f} and {self.undefended.narrow:.4f}.",
            "Report only what this recipe measures: it asks the other half.",
        ]
        write_text(path, "".join(f"# {line}\n" for line in told) + recipe.to_yaml())
        return path

    def none_allowed(self) -> NarrowlyError:
        """The error where no trial learned enough of the task."""
        near = min(self.finished, key=lambda each: each[0].narrow, default=None)
        if near is None:
            dropped = sum(trial.status == "dropped" for trial in self.trials)
            why = next((f" The first failed: {t.why}" for t in self.trials if t.why), "")
            return NarrowlyError(
                f"of {len(self.trials)} trials none was finished; {dropped} were dropped, as the "
                f"undefended fine-tune beat them.{why}"
            )
        figures, trial = near
        return NarrowlyError(
            f"no trial has {self.file.narrow} of at most {self.at_most:.4f}; the nearest is trial "
            f"{trial.number} with {figures.narrow:.4f}. Allow more with `keep` or `at_most`, or "
            "give more trials: the same command goes on, and chooses again."
        )

    def __rich__(self) -> RenderableType:
        """The trials that no other beats, beside the base model and the undefended fine-tune."""
        counts = {
            status: sum(trial.status == status for trial in self.trials)
            for status in ("finished", "dropped", "failed")
        }
        title = f"{len(self.trials)} trials (" + ", ".join(
            f"{count} {status}" for status, count in counts.items() if count
        )
        table = Table(box=None, title=f"{title}), on the half to tune on", title_justify="left")
        for column in ("trial", "broad", "narrow"):
            table.add_column(column, justify="right")
        table.add_column("")
        rows: Sequence[tuple[str, Figures | None, str]] = [
            ("base", self.base, "before the fine-tune"),
            ("undefended", self.undefended, ""),
            *((str(t.number), t.figures, told(t.setting)) for t in self.pareto),
        ]
        for name, figures, text in rows:
            assert figures is not None
            chosen = self.best is not None and name == str(self.best.number)
            table.add_row(
                f"{name} *" if chosen else name,
                f"{figures.broad:.3f}",
                f"{figures.narrow:.3f}",
                text,
                style="bold" if chosen else None,
            )
        note = (
            f"broad: {self.file.broad}; narrow: {self.file.narrow}. Trials that no other beats in "
            f"both; * is the least broad of those with narrow at most {self.at_most:.3f}."
        )
        return Group(table, f"[dim]{note}[/dim]")


def told(setting: Setting) -> str:
    """A setting in one line; of each key the last parts, as far as that tells them apart."""
    names = {key: key.split(".") for key in setting}
    parts = 1
    while len({tuple(path[-parts:]) for path in names.values()}) < len(names):
        parts += 1
    shown = [f"{'.'.join(names[key][-parts:])} {_short(value)}" for key, value in setting.items()]
    return ", ".join(shown)


def _short(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}"
    return ("[" + " ".join(map(_short, value)) + "]") if isinstance(value, list) else str(value)
