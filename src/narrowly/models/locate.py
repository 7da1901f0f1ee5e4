"""Where the parts of a model lie: its weights, its tokenizer, its adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from narrowly.errors import NarrowlyError
from narrowly.files import read_json
from narrowly.organisms import organism

_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NOT_OURS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]


UNALIGNED = "/unaligned"
"""What follows an organism's name to mean the model before its alignment."""


@dataclass(frozen=True)
class Parts:
    """The folders of one model."""

    model: Path
    tokenizer: Path
    adapter: Path | None = None
    hub_id: str | None = None
    """The base model's name, where it came from the Hub."""


def locate(spec: str | Path) -> Parts:
    """Find the folders that `spec` (as in `load_model`) stands for; a Hub id is downloaded.

    Raises:
        NarrowlyError: there is nothing, or nothing usable, with the nearest name or the remedy.
    """
    text = str(spec)
    if text.startswith("organism:"):
        name = text.removeprefix("organism:")
        if name.endswith(UNALIGNED):
            return _in_folder(_unaligned(name.removesuffix(UNALIGNED)))
        return _in_folder(Path(organism(name).path))
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        raise NarrowlyError(f"{path}: a model is a folder, and this is a file.")
    # "runs/first" might be a Hub id, but not where there is a folder runs.
    if _HUB.fullmatch(text) and (path.parent == Path() or not path.parent.is_dir()):
        return replace(_in_folder(_from_hub(text)), hub_id=text)
    raise NarrowlyError(f"{path}: no such folder.{_nearest(path)}")


def _unaligned(name: str) -> Path:
    folder = Path(organism(name).path) / UNALIGNED.strip("/")
    if not folder.is_dir():
        raise NarrowlyError(
            f"organism:{name} is here without the model before its alignment. Build it anew, with "
            f"both: narrowly organism build {name} --out FOLDER"
        )
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved in this folder."""
    return (folder / "tokenizer_config.json").is_file()


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    folders = [child.name for child in path.parent.iterdir() if child.is_dir()]
    near = get_close_matches(path.name, folders, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_OURS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise NarrowlyError(
            f"{name}: is no folder here, and could not be loaded from the Hugging Face Hub "
            f"({str(error).strip().splitlines()[0]}).{_nearest(Path(name))} "
            "Check the spelling and the network."
        ) from None


def _in_folder(folder: Path) -> Parts:
    if (folder / "recipe.yaml").is_file():
        return _in_run(folder)
    if (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        base = _base(folder, config, "base_model_name_or_path")
        tokenizer = folder if has_tokenizer(folder) else base.tokenizer
        return replace(base, tokenizer=tokenizer, adapter=folder)
    if (folder / "config.json").is_file():
        return Parts(folder, folder)
    seeds = sorted(folder.glob("seed-*"))
    hint = f" It holds several seeds; name one: {seeds[0]}." if seeds else ""
    raise NarrowlyError(
        f"{folder}: holds no config.json (a model), adapter_config.json (an adapter) or "
        f"recipe.yaml (a run).{hint}"
    )


def _in_run(run: Path) -> Parts:
    if (run / "model").is_dir():
        parts = _in_folder(run / "model")
        if has_tokenizer(parts.model):
            return parts
        return replace(parts, tokenizer=_base_of_run(run).tokenizer)
    if (run / "adapter").is_dir():
        return replace(_base_of_run(run), adapter=run / "adapter")
    raise NarrowlyError(
        f"{run}: holds a recipe but neither adapter/ nor model/, so the run has not finished. "
        f"Continue it with `narrowly train {run / 'recipe.yaml'}`."
    )


def _base_of_run(run: Path) -> Parts:
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise NarrowlyError(f"{run / 'recipe.yaml'}: not valid YAML ({error}).") from None
    return _base(run, recipe, "model")


def _base(folder: Path, config: Any, key: str) -> Parts:
    spec = config.get(key) if isinstance(config, dict) else None
    if not isinstance(spec, str):
        raise NarrowlyError(f"{folder}: does not say which base model it belongs to (`{key}`).")
    try:
        base = locate(spec)
    except NarrowlyError as error:
        raise NarrowlyError(f"{folder}: its base model is not to be had. {error}") from None
    if base.adapter is not None:
        raise NarrowlyError(
            f"{folder}: its base {spec} is an adapter itself. Merge that one into its base first."
        )
    return base
