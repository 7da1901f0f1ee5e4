"""A browser and a server for the tests of the page."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.review import shelves

TOKEN = "a-token"
# Headless in a container without a GPU, and quiet: it looks nothing up by itself.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright.

    Closed with the module: while it is open an event loop runs, and other tests start their own.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    pytest.importorskip("fastapi", reason="needs narrowly[review]")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        launched.close()


@contextmanager
def serving(folder: Path, model: Any = None) -> Iterator[str]:
    """A server in a thread; yields its address."""
    import uvicorn

    from narrowly.review import create_app

    app = create_app(folder, TOKEN, model, by="ada")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder of concepts."""
    return shelves.shelf(tmp_path / "concepts")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a folder in a new browser; fails on any error or refusal that the page logs."""
    faults: list[str] = []
    with ExitStack() as stack:

        def opened(folder: Path, name: str = "", model: Any = None, **options: Any) -> Any:
            address = stack.enter_context(serving(folder, model))
            options = {"viewport": {"width": 1366, "height": 900}} | options
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(15_000)
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            # A conflict is an answer, which the browser logs as an error all the same.
            context.on("console", lambda m: _keep(faults, m.type, m.text))
            context.on("weberror", lambda e: faults.append(str(e.error)))
            page = context.new_page()
            page.goto(f"{address}/?token={TOKEN}")
            page.locator(".row").first.wait_for()
            if name:
                page.goto(f"{address}/#{name}")
                page.locator("#name", has_text=name).wait_for()
            return page

        yield opened
    assert not faults


def _keep(faults: list[str], kind: str, text: str) -> None:
    if kind in ("error", "warning") and "409" not in text and "400" not in text:
        faults.append(text)
