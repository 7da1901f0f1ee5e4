"""Answers on disk as they come, so that a kill half-way through an eval costs none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from narrowly.files import sha256


class Journal:
    """One file of sampled answers, by the content of what was asked.

    Args:
        path: read if it is there, made at the first answer.
        about: what all answers have in common (the eval's arguments, the weights, ...); answers
            with another `about` are those of another measurement, and are asked anew.
    """

    def __init__(self, path: Path, about: Any):
        self.path = path
        self._about = json.dumps(about, sort_keys=True)
        self._answers: dict[str, str] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, answer = json.loads(line)
                except ValueError:  # torn by a kill
                    continue
                self._answers[key] = answer

    def find(self, *asked: Any) -> str | None:
        """The answer to this, if it is here."""
        return self._answers.get(self._key(asked))

    def keep(self, answer: str, *asked: Any) -> None:
        """Append an answer; a kill after this returns does not lose it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            # A line break before, too: the last line may be torn.
            file.write(f"\n{json.dumps([self._key(asked), answer])}\n")

    def remove(self) -> None:
        """The answers stand in the eval's samples now."""
        self.path.unlink(missing_ok=True)

    def _key(self, asked: Any) -> str:
        return sha256(f"{self._about}\n{json.dumps(asked)}".encode())
