"""The service: an HTTP server in a process of its own that behaves as its phase says."""

from __future__ import annotations

import collections
import contextlib
import http.server
import threading
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from .plan import FAILS_EVERY

Hits: TypeAlias = collections.Counter[tuple[str, str]]  # by phase and path


class _Service(http.server.ThreadingHTTPServer):
    """Counts the calls that reach it."""

    phase = "healthy"
    request_queue_size = 128  # with the default of 5, TCP makes further connections wait for a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hits: Hits = collections.Counter()
        self._lock = threading.Lock()

    def status_for(self, path: str) -> int | None:
        """The status to answer a call with; None to hang up without an answer."""
        with self._lock:
            phase = self.phase
            self.hits[phase, path] += 1
            fails = phase == "failing" and self.hits[phase, path] % FAILS_EVERY == 0
        return None if phase == "dead" else 500 if fails else 200

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore workers that hang up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Service

    def do_GET(self) -> None:
        status = self.server.status_for(self.path)
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def serve_http(pipe: Connection) -> None:
    """The service's process: sends its port, then answers each phase that it receives with all hits so far."""
    service = _Service()
    threading.Thread(target=service.serve_forever, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the demo has ended
        pipe.send(service.server_port)
        while True:
            service.phase = pipe.recv()
            pipe.send(service.hits.copy())
