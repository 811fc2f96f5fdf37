"""A web server for the page, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import redis
import uvicorn
from conftest import free_port, wait_until
from sse_starlette.sse import AppStatus

from pybreaker_redis.web import breakers_app

OPERATOR = "ann"


class ByName:
    """Takes the operator's name from a header, and otherwise signs everybody in as ann."""

    def __call__(self, request: Any) -> str | None:
        return request.headers.get("x-operator", OPERATOR) or None


@contextlib.contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """The address under which a server of its own thread answers. port: 0 for any free one."""
    port = port or free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        AppStatus.should_exit = False  # of sse-starlette, for the next server of this process


@pytest.fixture
def site(client: redis.Redis) -> Iterator[Callable[..., httpx.Client]]:
    """Serves a page on the tests' server, by default with write access for ann; gives an HTTP client for it."""
    with contextlib.ExitStack() as stack:

        def make(given: Any = None, **options: Any) -> httpx.Client:
            options = {"read_only": False, "authorize": ByName(), **options}
            if options["read_only"] and isinstance(options["authorize"], ByName):
                del options["authorize"]
            address = stack.enter_context(served(breakers_app(given or client, **options)))
            return stack.enter_context(httpx.Client(base_url=address, timeout=20))

        yield make
