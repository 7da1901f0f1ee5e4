"""What can be measured: runs, models, models in memory and models behind a URL."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from narrowly.errors import NarrowlyError
from narrowly.evals.subject import Subject
from narrowly.files import sha256

if TYPE_CHECKING:
    from narrowly.evals.subject import Loaded
    from narrowly.models.messages import ChatModel

    TargetLike = str | os.PathLike[str] | Loaded | ChatModel


TEST_TIME = "ablated_at_test_time"
"""The key in the recipe of a measurement under ablation: the hash of what is ablated."""


@dataclass(frozen=True)
class Target:
    """One model to measure, what its run says of it, and where results go."""

    subject: Subject
    folder: Path | None
    recipe: dict[str, Any]

    @property
    def model(self) -> str:
        """The model's name as results keep it; of a run, the name of its base."""
        return str(self.recipe.get("model", self.subject.name))

    @cached_property
    def weights(self) -> str | None:
        """Hash of what the run trained and of what stays attached at test time, so that a run
        trained again is measured again."""
        if self.folder is None:
            return None
        adapter = self.folder / "adapter" / "adapter_model.safetensors"
        files = [adapter] if adapter.exists() else sorted(self.folder.glob("model/*.safetensors"))
        files += self.folder.glob("at_test_time/interventions.json")  # it holds its tensors' hash
        hashes = [sha256(file) for file in files]
        return sha256("".join(hashes).encode()) if len(hashes) > 1 else next(iter(hashes), None)


def targets(target: TargetLike, out: str | Path | None = None) -> list[Target]:
    """The models that `target` stands for: several where it is a folder of runs `seed-N`.

    Raises:
        NarrowlyError: several runs, which cannot all write into one `out`.
    """
    folder = None if out is None else Path(out)
    if not isinstance(target, str | os.PathLike):
        recipe = {} if folder is None else read_recipe(folder)
        if isinstance(target, tuple):
            name = str(getattr(target[0], "name_or_path", "the model"))
            return [Target(Subject(name, lambda: target, folder=folder), folder, recipe)]
        return [Target(Subject(target.name, endpoint=target), folder, recipe)]
    spec = os.fspath(target)
    runs = [run for run in seed_folders(spec) if (run / "recipe.yaml").exists()]
    if len(runs) > 1 and folder is not None:
        raise NarrowlyError(f"{spec} holds {len(runs)} runs, which cannot all write into {out}.")
    if runs:
        return [Target(_named(str(run)), folder or run, read_recipe(run)) for run in runs]
    return [Target(_named(spec), folder, {"model": spec})]


def _named(spec: str) -> Subject:
    def load() -> Loaded:
        from narrowly.models import load_model

        return load_model(spec)

    return Subject(spec, load, folder=Path(spec))


def seed_folders(path: str | Path) -> list[Path]:
    """The runs of one arm: its subfolders `seed-N` in the order of N, or else the folder itself."""
    path = Path(path)
    numbered = [p for p in path.glob("seed-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(numbered, key=lambda p: int(p.name[5:])) or [path]


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """The resolved recipe of a run folder; empty where there is none.

    Raises:
        NarrowlyError: `recipe.yaml` is no mapping in YAML.
    """
    path = Path(folder) / "recipe.yaml"
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise NarrowlyError(f"{path}: not valid YAML ({error}).") from None
    if not isinstance(recipe, dict):
        raise NarrowlyError(f"{path}: a recipe is a mapping of keys, not {recipe!r}.")
    return recipe
