"""A real HTTP server that answers chat completions about pictures, and fails when it is told to.

It looks at the pictures: the answer names their number and mean colour, so that a caption on the wrong clip shows.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

SLOW_SECONDS = 3


@dataclass
class Asked:
    """One request as it came in."""

    time: float
    text: str
    colour: tuple[int, int, int]
    pictures: int
    authorization: str | None
    body: dict[str, Any]


@dataclass
class CaptionServer:
    """`plan(n, asked)` says what the n-th request (from 1) gets; `url` is what a client is given."""

    plan: Callable[[int, Asked], str | dict[str, Any]]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    now: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(plan: Callable[[int, Asked], str | dict[str, Any]]) -> Iterator[CaptionServer]:
    """A server on a free port; a plan is "ok", "429", "500", "400", "401", "slow", "half", "short", or a choice."""
    server = CaptionServer(plan)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            _serve(server, self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def answer_about(asked: Asked) -> str:
    """What the server says of a request that it answers."""
    return f"{asked.pictures} frames of colour {asked.colour}: {asked.text[:5]}"


def _serve(server: CaptionServer, handler: BaseHTTPRequestHandler) -> None:
    asked = _read(handler)
    with server.lock:
        server.asked.append(asked)
        number = len(server.asked)
        server.now += 1
        server.most_at_once = max(server.most_at_once, server.now)
    try:
        _answer(handler, server.plan(number, asked), asked)
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        with server.lock:
            server.now -= 1


def _read(handler: BaseHTTPRequestHandler) -> Asked:
    assert handler.path == "/v1/chat/completions", handler.path
    body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
    content = body["messages"][-1]["content"]
    pictures = [_picture(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
    (text,) = (part["text"] for part in content if part["type"] == "text")
    mean = np.mean([picture.mean(axis=(0, 1)) for picture in pictures], axis=0)
    # JPEG moves a flat colour by a step or two.
    red, green, blue = (int(round(value / 10) * 10) for value in mean)
    authorization = handler.headers.get("Authorization")
    return Asked(time.monotonic(), text, (red, green, blue), len(pictures), authorization, body)


def _picture(url: str) -> np.ndarray:
    head, data = url.split(",", 1)
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def _answer(handler: BaseHTTPRequestHandler, plan: str | dict[str, Any], asked: Asked) -> None:
    choice = plan if isinstance(plan, dict) else {"message": {"content": answer_about(asked)}, "finish_reason": "stop"}
    content = json.dumps({"choices": [choice]}).encode()
    if plan in ("429", "500", "400", "401"):
        wait = {"Retry-After": "0.4"} if plan == "429" else {}
        # As some servers do, the refused key is repeated.
        _send(handler, int(plan), json.dumps({"error": f"told to fail {asked.authorization}"}).encode(), wait)
    elif plan == "half":
        _send(handler, 200, content[: len(content) // 2])
    elif plan == "short":
        _send(handler, 200, content[:10], {"Content-Length": str(len(content))})
    else:
        if plan == "slow":
            time.sleep(SLOW_SECONDS)
        _send(handler, 200, content)


def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
