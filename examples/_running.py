"""What the examples of whole applications share: a service that can be down, programs, and HTTP requests."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 60.0  # seconds


class Service(http.server.ThreadingHTTPServer):
    """The service that the applications call. Answers 500 while it is down. Keeps the paths of all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.down = False
        self.refused: list[str] = []
        self.answered: list[str] = []

    def __enter__(self) -> Service:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        service = self.server
        (service.refused if service.down else service.answered).append(self.path)
        body = b'{"ok": true}'
        self.send_response(500 if service.down else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


class Answer(NamedTuple):
    """What a web application answered."""

    status: int
    headers: Message
    body: str


def request(url: str, method: str = "GET") -> Answer:
    """The answer, whatever its status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=PATIENCE) as answer:
            return Answer(answer.status, answer.headers, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read().decode())


@contextlib.contextmanager
def program(*arguments: str, **environment: str) -> Iterator[None]:
    """A Python program that runs for a `with` block, from this folder. It prints to standard error."""
    if importlib.util.find_spec(arguments[0]) is None:
        raise SystemExit(f"this example needs {arguments[0]}: README.md says what to install")
    command, variables = [sys.executable, "-m", *arguments], {**os.environ, **environment}
    process = subprocess.Popen(command, cwd=HERE, env=variables, stdout=sys.stderr)
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; what does not answer yet may answer later."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError("the example did not come this far in a minute")
