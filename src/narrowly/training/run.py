"""A run: a folder that explains itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_text
from narrowly.training.recipe import Recipe

# May change without making it another run: where it lies, and what is measured afterwards.
FREE = {"output", "evals"}

WRITTEN_FIRST = ("recipe.yaml", "reproduce.json", "metrics.jsonl", "defenses.json")
"""Files that lie there before the weights do; then folders that do."""
FOLDERS_FIRST = ("checkpoints", "concepts", "at_test_time")


@dataclass(frozen=True)
class Run:
    """A folder that holds a run, or the runs `seed-N` of a recipe with several seeds."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return Recipe.read(self.path / "recipe.yaml")

    @property
    def seeds(self) -> list[Run]:
        """The run of each seed; of a recipe with one seed, the run itself."""
        recipe = self.recipe
        if recipe.seeds is None:
            return [self]
        return [self._seed(seed) for seed in recipe.seeds]

    def _seed(self, seed: int) -> Run:
        return Run(self.path / f"seed-{seed}")

    @property
    def trained(self) -> bool:
        """Whether the weights are there."""
        return (self.path / "adapter").is_dir() or (self.path / "model").is_dir()

    @property
    def reproduce(self) -> dict[str, Any]:
        """`reproduce.json`, or nothing yet."""
        path = self.path / "reproduce.json"
        return read_json(path) if path.exists() else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was logged in training, in order."""
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def checkpoint(self) -> Path | None:
        """The last whole checkpoint; halves of one, left by a kill, do not count."""
        whole: dict[int, Path] = {}
        for folder in (self.path / "checkpoints").glob("checkpoint-*"):
            try:
                # Trainer writes its state last.
                json.loads((folder / "trainer_state.json").read_text())
            except (FileNotFoundError, ValueError):
                continue
            whole[int(folder.name.removeprefix("checkpoint-"))] = folder
        return whole[max(whole)] if whole else None

    @property
    def empty(self) -> bool:
        """Whether no work is kept here: no weights, no checkpoint, no run of a seed."""
        seeds = any(not Run(path).empty for path in self.path.glob("seed-*"))
        return not (self.trained or seeds or self.checkpoint() is not None)

    def forget_if_empty(self) -> None:
        """Remove what a run wrote that failed before it had anything to keep."""
        if self.empty:
            for name in WRITTEN_FIRST:
                (self.path / name).unlink(missing_ok=True)
            for name in FOLDERS_FIRST:
                shutil.rmtree(self.path / name, ignore_errors=True)
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def check(self, recipe: Recipe) -> None:
        """Fail unless the folder is free for this recipe: absent, empty, or a run of the same.

        Raises:
            NarrowlyError: it holds another recipe's run (with what differs), or something else.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if (self.path / "recipe.yaml").exists() and self.empty:
            return
        if not (self.path / "recipe.yaml").exists():
            raise NarrowlyError(
                f"{self.path}: exists and is no run. Choose another `output`; nothing was changed."
            )
        ours, theirs = _identity(recipe), _identity(self.recipe)
        differing = [
            f"{key} ({theirs.get(key)!r}, now {ours.get(key)!r})"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]
        if differing:
            raise NarrowlyError(
                f"{self.path}: holds another recipe's run; it differs in {'; '.join(differing)}. "
                "Choose another `output`, or delete the folder. Nothing was changed."
            )

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe into the folder; seeds that are there already stay in it."""
        if recipe.seeds is not None and (self.path / "recipe.yaml").exists():
            there = [seed for seed in self.recipe.seeds or [] if self._seed(seed).path.is_dir()]
            seeds = [*there, *recipe.seeds]
            recipe = recipe.model_copy(update={"seeds": list(dict.fromkeys(seeds))})
        for half_written in self.path.glob(".*.part"):
            shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        write_text(self.path / "recipe.yaml", recipe.to_yaml())


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What makes a run this run and no other. Seeds may be added to a recipe of several."""
    # As JSON, in which the keys of a mapping are strings, as they are read back.
    told = recipe.model_dump(mode="json").items()
    values = {key: value for key, value in told if key not in FREE}
    if recipe.seeds is not None:
        values["seeds"] = "several"
    return values
