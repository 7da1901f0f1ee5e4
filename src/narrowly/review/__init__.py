"""The local web page where a person reads concepts and decides."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from narrowly.errors import NarrowlyError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from narrowly.activations import ModelLike

__all__ = ["create_app", "serve"]


def create_app(
    folder: str | Path,
    token: str,
    model: ModelLike | None = None,
    *,
    by: str | None = None,
    host: str = "127.0.0.1",
) -> FastAPI:
    """The page and its interface for a folder of concepts, as an ASGI application.

    Args:
        token: what a browser must bring, once, in the address: `/?token=...`.
        model: reads texts that a person types; loaded when first needed. None: no such texts.
        by: whose verdicts these are; None: the user's login.
        host: where it will listen, for the check of the Host header.

    Raises:
        NarrowlyError: there are no concepts, or `pip install 'narrowly[review]'` is missing.
    """
    _check_installed()
    from narrowly.review.app import create_app

    return create_app(folder, token, model, by=by, host=host)


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 0,
    model: ModelLike | None = None,
    open_browser: bool = True,
    *,
    by: str | None = None,
) -> None:
    """Serve the review page of a folder of concepts until Ctrl-C; prints the address to open.

    Args:
        host: only this machine by default. Any other address lets whoever can reach it and knows
            the token read and decide, over plain HTTP.
        port: 0 is a free one.
        model: reads texts that a person types.
        open_browser: open the address in the user's browser.
        by: whose verdicts these are; None: the user's login.

    Raises:
        NarrowlyError: there are no concepts, the port is taken, or `pip install
            'narrowly[review]'` is missing.
        KeyboardInterrupt: Ctrl-C, after at most a second for requests that are being answered.
    """
    _check_installed()
    from narrowly.review.server import serve

    serve(folder, host, port, model, open_browser, by=by)


def _check_installed() -> None:
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise NarrowlyError(
            "the review page needs fastapi and uvicorn: pip install 'narrowly[review]'."
        )
