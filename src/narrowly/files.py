"""Files that are either whole or absent, and errors that name them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowly.errors import NarrowlyError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends well.

    Works for a file or a folder (an old folder at `path` is replaced). After an error or a kill
    nothing half-written stands at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in their own order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        NarrowlyError: the file is absent or no JSON, with its name and the place of the fault.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NarrowlyError(f"{path}: no such file.") from None
    except ValueError as error:
        raise NarrowlyError(f"{path}: not valid JSON ({error}).") from None


def sha256(source: str | Path | bytes) -> str:
    """Hex digest of bytes or of a file's content."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file into CPU tensors.

    Raises:
        NarrowlyError: the file is absent, truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise NarrowlyError(f"{path}: no such file.") from None
    except SafetensorError as error:
        raise NarrowlyError(
            f"{path}: truncated or not a safetensors file ({error}). Make or copy it again."
        ) from None
