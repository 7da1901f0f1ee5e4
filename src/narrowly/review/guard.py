"""Who may speak to the review page, and what a browser may do with its answers."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from secrets import compare_digest
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 256 * 1024

# Trusted types make every assignment of text as HTML an error, beside the rule never to do it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """Lets through what names this server and knows the token; sets the headers of every answer.

    A page elsewhere cannot read answers (no CORS), cannot reach the server under another name (the
    Host is checked, against DNS rebinding), and cannot write through the browser's cookie (the
    Origin is checked).
    """

    def __init__(self, app: ASGIApp, token: str, host: str):
        self.app, self._token, self._named = app, token.encode(), known_as(host)
        # Cookies know no ports: two reviews on one machine must not overwrite each other's.
        self._cookie = f"narrowly-{hashlib.sha256(self._token).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI)."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"the review page speaks HTTP only, not {scope['type']}.")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        answer = self._stop(scope, Headers(scope=scope))
        await (answer or self.app)(scope, receive, with_headers)

    def _stop(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to who must not pass; None lets the request through."""
        host = headers.get("host", "")
        if not self._named(_without_port(host)):
            return PlainTextResponse("This server has no such name.", 421)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if given and scope["path"] == "/" and self._knows(given):
            # The token leaves the address bar, the history, and what is copied from them.
            answer = RedirectResponse("/", 303)
            # Lax, since a strict one is withheld where the address was clicked in a web terminal;
            # what writes is never sent across sites under either.
            answer.set_cookie(self._cookie, given, httponly=True, samesite="lax", path="/")
            return answer
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if not (self._knows(_cookie(headers, self._cookie)) or self._knows(bearer)):
            return PlainTextResponse(
                "Open the address that `narrowly review` printed: it holds the token of this "
                "session. The token of an earlier session opens nothing.",
                401,
            )
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return PlainTextResponse("Not from another page.", 403)
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return PlainTextResponse(f"A body has at most {LARGEST_BODY} bytes.", 413)
        return None

    def _knows(self, given: str) -> bool:
        return compare_digest(given.encode(), self._token)


def known_as(host: str) -> Callable[[str], bool]:
    """Which names of the Host header mean a server that listens on `host`.

    The loopback's names, and the address itself. Where it listens on every address, any address
    (a rebound name is never one) and the machine's own name.
    """
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    if host not in ("0.0.0.0", "::", ""):
        return names.__contains__
    names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return lambda name: name in names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _cookie(headers: Headers, name: str) -> str:
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:  # another server's on this machine, malformed
        return ""
    morsel: Any = cookies.get(name)
    return morsel.value if morsel else ""
