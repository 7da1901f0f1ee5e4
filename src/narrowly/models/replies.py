"""Replies on disk, by the content of what was asked."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from narrowly.errors import NarrowlyError
from narrowly.files import sha256
from narrowly.models.messages import Reply


def content_key(*parts: Any) -> str:
    """A name for what is asked: equal for equal parts (as JSON can hold them), and only then."""
    return sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode())


def default_cache() -> Path:
    """Where replies are kept unless told otherwise."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "narrowly"


class Replies:
    """One SQLite file of replies.

    A reply is kept as soon as it has come, and `kill -9` loses none that was kept: SQLite's
    write-ahead log sees to it. Several processes may share the file.

    Args:
        folder: holds `replies.sqlite`, and is made if it is not there.

    Raises:
        NarrowlyError: from here and from every method: the file is damaged or cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder).expanduser() / "replies.sqlite"
        with self._telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Kept by the thread that asks, found by the one that waits for it: never at once.
            self._file = sqlite3.connect(
                self.path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) "
                "WITHOUT ROWID"
            )

    def find(self, keys: Iterable[str]) -> dict[str, Reply]:
        """Those of the replies that are here."""
        found = {}
        with self._telling():
            for key in keys:
                row = self._file.execute("SELECT reply FROM replies WHERE key = ?", (key,))
                if text := row.fetchone():
                    found[key] = _reply(json.loads(text[0]))
        return found

    def keep(self, key: str, reply: Reply) -> None:
        """Keep a reply; the first one of a key stays."""
        fields = asdict(reply).items()
        content = {name: value for name, value in fields if value or name == "text"}
        with self._telling():
            self._file.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?)",
                (key, json.dumps(content, ensure_ascii=False)),
            )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise NarrowlyError(
                f"{self.path}: cannot keep replies there, or read them ({error}). Is the disk full "
                "or the file damaged? Without the file, all is asked anew."
            ) from None


def _reply(content: dict[str, Any]) -> Reply:
    if "logprobs" in content:
        content["logprobs"] = tuple(content["logprobs"])
    return Reply(**content, cached=True)
