"""What was decided on the review page, in order, so that it can be undone."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

Field = Literal["verdict", "explanation"]


class Change(BaseModel):
    """One change of one concept."""

    model_config = ConfigDict(frozen=True)

    number: int
    at: datetime
    name: str
    field: Field
    before: dict[str, str]
    after: dict[str, str]
    tab: str = ""
    """The browser tab it came from: a tab undoes its own work first."""
    undoes: int | None = None
    """The change that this one took back."""


class Journal:
    """`review.jsonl` beside the concepts: a line per change, appended and never rewritten."""

    def __init__(self, folder: Path):
        self.path = folder / "review.jsonl"
        self.changes: list[Change] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    self.changes.append(Change.model_validate_json(line))
                except ValidationError:  # torn by a kill; the concepts' own files are whole
                    continue

    def add(self, name: str, field: Field, before: Any, after: Any, **more: Any) -> Change:
        """Append a change; it is on the disk when this returns."""
        change = Change(
            number=self.changes[-1].number + 1 if self.changes else 1,
            at=datetime.now(UTC).replace(microsecond=0),
            name=name,
            field=field,
            before=before,
            after=after,
            **more,
        )
        line = json.dumps(change.model_dump(mode="json"), ensure_ascii=False)
        with self.path.open("ab+") as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(f"{chr(10) * torn}{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.changes.append(change)
        return change

    def standing(self, tab: str | None = None) -> list[Change]:
        """Changes that nothing took back and that take back nothing, the newest last."""
        undone = {change.undoes for change in self.changes}
        return [
            change
            for change in self.changes
            if change.undoes is None
            and change.number not in undone
            and (tab is None or change.tab == tab)
        ]
