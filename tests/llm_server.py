"""A language model's server that does what a script says, and remembers what it was asked."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = str | Callable[["Asked"], Any]
"""One of `BEHAVIOURS`, "status:N", or a function from what was asked to the reply's text (or to the
response's whole JSON)."""


@dataclass
class Asked:
    """One request as it came."""

    path: str
    body: dict[str, Any]
    key: str
    did: str = ""
    """What the server did with it."""
    number: int = 0
    """How often the same body had come before."""

    @property
    def content(self) -> str:
        """Of the last message."""
        return self.body["messages"][-1]["content"]


def chat(text: str | None, asked: Asked, **fields: Any) -> dict[str, Any]:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    prompt = sum(len(m["content"]) for m in asked.body.get("messages", ())) // 4
    usage = {"prompt_tokens": prompt, "completion_tokens": len(text or "") // 4 + 1}
    return {
        "id": "1",
        "object": "chat.completion",
        "model": asked.body.get("model"),
        "choices": [{**choice, "finish_reason": "stop", **fields}],
        "usage": usage,
    }


@dataclass
class Server:
    """`with Server(behaviour) as server: ... server.url, server.asked`.

    Args:
        behave: given a request, what to do with it; a plain text is what it always does.
    """

    behave: Callable[[Asked], Behaviour] | Behaviour = "echo"
    delay: float = 0.0
    """Seconds before each answer."""
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0

    def __enter__(self) -> "Server":
        self._lock, self._at_once = threading.Lock(), 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.serve(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *arguments: Any) -> None:  # clients that were killed
                pass

        self._http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    @property
    def answered(self) -> list[Asked]:
        """Requests that got a whole answer, written out to the client."""
        return [asked for asked in self.asked if asked.did == "answered"]

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        body = json.loads(handler.rfile.read(length))
        key = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        asked = Asked(handler.path, body, key)
        with self._lock:
            asked.number = sum(other.body == body for other in self.asked)
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            behaviour = self.behave
            if callable(behaviour):
                behaviour = behaviour(asked)
            if isinstance(behaviour, str) and behaviour in BEHAVIOURS:
                BEHAVIOURS[behaviour](handler, asked)
                asked.did = asked.did or behaviour
            elif isinstance(behaviour, str) and (
                status := re.fullmatch(r"status:(\d+)", behaviour)
            ):
                refuse(handler, int(status[1]), {"error": {"message": "so it is scripted"}})
                asked.did = behaviour
            else:
                content = behaviour if isinstance(behaviour, dict) else chat(behaviour, asked)
                respond(handler, 200, json.dumps(content).encode())
                asked.did = "answered"
        except (BrokenPipeError, ConnectionResetError):
            asked.did = "client gone"
        finally:
            with self._lock:
                self._at_once -= 1


def respond(
    handler: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    claimed: int | None = None,
    **headers: str,
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content) if claimed is None else claimed))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def refuse(handler: BaseHTTPRequestHandler, status: int, content: Any, **headers: str) -> None:
    respond(handler, status, json.dumps(content).encode(), **headers)


def echo(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    """Say again what was said."""
    respond(handler, 200, json.dumps(chat(f"reply to: {asked.content}", asked)).encode())
    asked.did = "answered"


def rate_limit(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    error = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
    refuse(handler, 429, error, Retry_After="0.1")


def no_quota(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    error = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    refuse(handler, 429, error)


def wrong_key(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    """As some servers do, with the key in the message."""
    refuse(handler, 401, {"error": {"message": f"Incorrect API key provided: {asked.key}"}})


def no_model(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    message = f"The model `{asked.body['model']}` does not exist"
    refuse(handler, 404, {"error": {"message": message, "code": "model_not_found"}})


def malformed(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    respond(handler, 200, b'{"choices": [{"message": {"content": ')


def truncated(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    """The connection breaks in the middle of the body."""
    content = json.dumps(chat("never seen whole", asked)).encode()
    respond(handler, 200, content[: len(content) // 2], claimed=len(content))
    handler.close_connection = True


def chunk_lost(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    """A chunked stream without its end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'10\r\n{"choices": [{"m\r\n')
    handler.close_connection = True


def hangs(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    time.sleep(30)


def drips(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    """A byte at a time, for ever, so that no read times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def not_json(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    """A proxy's page."""
    page = b"<html>502 but with status 200</html>"
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.send_header("Content-Length", str(len(page)))
    handler.end_headers()
    handler.wfile.write(page)


def other_json(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    respond(handler, 200, b'{"choices": [], "usage": null}')


def hangs_up(handler: BaseHTTPRequestHandler, asked: Asked) -> None:
    handler.close_connection = True
    handler.connection.close()


BEHAVIOURS: dict[str, Callable[[BaseHTTPRequestHandler, Asked], None]] = {
    function.__name__: function
    for function in (
        echo, rate_limit, no_quota, wrong_key, no_model, malformed, truncated, chunk_lost, hangs,
        drips, not_json, other_json, hangs_up,
    )
}  # fmt: skip
