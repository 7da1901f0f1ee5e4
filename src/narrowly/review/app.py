"""The review page's interface: what is listed, what is shown, what is written."""

from __future__ import annotations

import getpass
import threading
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from narrowly.activations import ModelLike
from narrowly.concepts import mark
from narrowly.concepts.concept import VerdictValue
from narrowly.concepts.folder import explain_as
from narrowly.errors import NarrowlyError
from narrowly.review.guard import Guard
from narrowly.review.journal import Change, Journal
from narrowly.review.live import Live
from narrowly.review.shelf import Entry, Shelf, version

STATIC = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HISTORY = 200

Name = Annotated[str, InPath(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=255)]
Tab = Annotated[str, Field(max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Decision(_Body):
    """A verdict to write."""

    value: VerdictValue
    why: Annotated[str, Field(max_length=10_000)] = ""
    version: str
    """Of the verdict that the person saw: another one is not written over."""
    tab: Tab = ""


class Wording(_Body):
    """An explanation to write."""

    text: Annotated[str, Field(max_length=10_000)]
    version: str
    tab: Tab = ""


class Undo(_Body):
    """What to take back: one change, or the tab's last."""

    number: int | None = None
    tab: Tab = ""


class Typed(_Body):
    """A text to read."""

    text: Annotated[str, Field(max_length=20_000)]


class ConflictError(Exception):
    """Somebody else changed what was to be changed."""

    def __init__(self, message: str, entry: Entry):
        super().__init__(message)
        self.message, self.entry = message, entry


class Desk:
    """Where decisions are written: checked against what the person saw, journalled, undoable."""

    def __init__(self, shelf: Shelf, by: str):
        self._shelf, self._by = shelf, by
        self._journal = Journal(shelf.folder)
        self._lock = threading.Lock()

    def decide(self, name: str, decision: Decision) -> Entry:
        """Write a verdict."""
        after = {"value": decision.value, "by": self._by, "why": decision.why.strip()}
        return self._change(name, "verdict", after, decision.version, decision.tab)

    def word(self, name: str, wording: Wording) -> Entry:
        """Write an explanation."""
        after = {"text": wording.text.strip(), "by": self._by}
        return self._change(name, "explanation", after, wording.version, wording.tab)

    def undo(self, undo: Undo) -> tuple[Entry, Change]:
        """Take a change back, if what it wrote still stands."""
        with self._lock:
            standing = self._journal.standing(undo.tab if undo.number is None else None)
            if undo.number is not None:
                standing = [change for change in standing if change.number == undo.number]
            if not standing:
                raise NarrowlyError("Nothing to undo.")
            change = standing[-1]
            entry = self._shelf.entry(change.name)
            if entry.state(change.field) != change.after:
                raise ConflictError(
                    f"{change.name}: the {change.field} was changed again since, so nothing is "
                    "undone.",
                    entry,
                )
            self._write(
                change.name,
                change.field,
                change.after,
                change.before,
                tab=undo.tab,
                undoes=change.number,
            )
            return self._shelf.entry(change.name), change

    def history(self) -> list[dict[str, Any]]:
        """The last changes, the newest first; `standing` ones can be undone."""
        with self._lock:
            standing = {change.number for change in self._journal.standing()}
            changes = self._journal.changes[: -HISTORY - 1 : -1]
        return [
            {**change.model_dump(mode="json"), "standing": change.number in standing}
            for change in changes
        ]

    def _change(
        self,
        name: str,
        field: Literal["verdict", "explanation"],
        after: dict[str, str],
        seen: str,
        tab: str,
    ) -> Entry:
        with self._lock:
            entry = self._shelf.entry(name)
            before = entry.state(field)
            if before == after:
                return entry
            if version(before) != seen:
                raise ConflictError(f"{name}: the {field} was changed elsewhere meanwhile.", entry)
            self._write(name, field, before, after, tab=tab)
            return self._shelf.entry(name)

    def _write(
        self,
        name: str,
        field: Literal["verdict", "explanation"],
        before: dict[str, str],
        after: dict[str, str],
        **about: Any,
    ) -> None:
        # The journal first: after a kill in between, undoing finds a state that is not `after` and
        # changes nothing.
        self._journal.add(name, field, before, after, **about)
        if field == "verdict":
            verdict: Any = after["value"]
            mark(self._shelf.folder, name, verdict, by=after["by"], why=after["why"])
        else:
            explain_as(self._shelf.folder, name, after["text"], by=after["by"])


def create_app(
    folder: str | Path,
    token: str,
    model: ModelLike | None = None,
    *,
    by: str | None = None,
    host: str = "127.0.0.1",
) -> FastAPI:
    """See `narrowly.review.create_app`."""
    shelf = Shelf(folder)
    desk = Desk(shelf, by or getpass.getuser())
    live = None if model is None else Live(model)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token, host=host)

    @app.exception_handler(NarrowlyError)
    def told(_: Request, error: NarrowlyError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(ConflictError)
    def conflicting(_: Request, error: ConflictError) -> Response:
        return JSONResponse({"error": error.message, "concept": error.entry.listed()}, 409)

    @app.get("/static/{file}")
    def static(file: str) -> Response:
        if file not in _static():
            return Response(status_code=404)
        content, kind = _static()[file]
        return Response(content, media_type=kind)

    @app.get("/")
    def page() -> Response:
        return static("index.html")

    @app.get("/api/concepts")
    def concepts() -> dict[str, Any]:
        return {**shelf.listed(), "live": live is not None}

    @app.get("/api/concepts/{name}")
    def concept(name: Name) -> dict[str, Any]:
        return shelf.detail(name)

    @app.get("/api/concepts/{name}/latents/{index}")
    def latent(name: Name, index: int) -> dict[str, Any]:
        return shelf.latent(name, index).model_dump(mode="json")

    @app.post("/api/concepts/{name}/verdict")
    def decide(name: Name, decision: Decision) -> dict[str, Any]:
        return desk.decide(name, decision).listed()

    @app.post("/api/concepts/{name}/explanation")
    def word(name: Name, wording: Wording) -> dict[str, Any]:
        return desk.word(name, wording).listed()

    @app.post("/api/concepts/{name}/read")
    def read(name: Name, typed: Typed) -> dict[str, Any]:
        if live is None:
            raise NarrowlyError("No model was given: start with --model to read texts.")
        return live.read(shelf, name, typed.text)

    @app.get("/api/history")
    def history() -> list[dict[str, Any]]:
        return desk.history()

    @app.post("/api/undo")
    def undo(what: Undo) -> dict[str, Any]:
        entry, change = desk.undo(what)
        return {"concept": entry.listed(), "undone": change.model_dump(mode="json")}

    return app


@cache
def _static() -> dict[str, tuple[bytes, str]]:
    """The page's files by name, from memory: no path of a request ever reaches the disk."""
    return {
        path.name: (path.read_bytes(), TYPES[path.suffix])
        for path in sorted(STATIC.iterdir())
        if path.suffix in TYPES
    }
