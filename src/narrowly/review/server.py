"""Serving the review page from this machine."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import webbrowser
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from narrowly.activations import ModelLike
from narrowly.errors import NarrowlyError
from narrowly.review.app import create_app

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 0,
    model: ModelLike | None = None,
    open_browser: bool = True,
    *,
    by: str | None = None,
) -> None:
    """See `narrowly.review.serve`."""
    token = secrets.token_urlsafe(24)
    app = create_app(folder, token, model, by=by, host=host)
    listening = _listen(host, port)
    address = _address(host, listening.getsockname()[1], token)
    console = Console()
    console.print(f"reviewing {folder}", highlight=False)
    console.print(f"  {address}", highlight=False, soft_wrap=True)
    if host not in LOOPBACK:
        console.print(
            "[yellow]reachable from other machines[/], over plain HTTP: whoever has this address "
            "can read and decide.",
            highlight=False,
        )
    console.print("[dim]Ctrl-C ends it; every decision is saved as it is made.[/dim]")
    # Quiet, for the access log would print the token with the first address.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,  # or Ctrl-C would wait for a model that is being loaded
    )
    if open_browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    _Server(config).run(sockets=[listening])


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A request that Ctrl-C cuts short is no fault to print a traceback of.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise NarrowlyError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Another --port, or 0 for "
            "any that is free."
        ) from None
    return listening


def _address(host: str, port: int, token: str) -> str:
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/?token={token}"
