"""A Django project under a real gunicorn and a real uvicorn."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
import redis
from conftest import free_port, wait_until

from pybreaker_redis.embedded import EmbeddedServer

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


@contextlib.contextmanager
def served(redis_url: str, *command: str) -> Iterator[httpx.Client]:
    """A client of the project under a server that listens on {port}."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "PROJECT_REDIS": redis_url}
    words = [sys.executable, "-m", *(word.format(port=port) for word in command)]
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, headers={"Connection": "close"}) as client:

            def answers() -> bool:
                assert process.poll() is None
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/health").status_code == 200
                return False

            wait_until(answers)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


GUNICORN = ("gunicorn", "project:wsgi", "--preload", "--workers=2", "--log-level=error", "--bind=127.0.0.1:{port}")
UVICORN = ("uvicorn", "project:asgi", "--log-level=error", "--port={port}")


@pytest.mark.parametrize(("command", "path"), [(GUNICORN, "/search"), (UVICORN, "/search"), (UVICORN, "/async-search")])
def test_a_rejection_is_a_503(client: redis.Redis, server: EmbeddedServer, command: tuple[str, ...], path: str) -> None:
    """In threads and on asyncio, with Retry-After; other errors stay what they are."""
    with served(server.url, *command) as browser:
        for _ in range(3):
            assert browser.get(path).status_code == 200
        wait_until(lambda: browser.get(path).status_code == 503)
        answer = browser.get(path)
        assert 0 < int(answer.headers["retry-after"]) <= 20
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json() == {"detail": "a service that this request needs is not available"}
        assert browser.get("/broken").status_code == 500


def test_workers_that_are_forked_from_a_loaded_project_share_a_circuit(
    client: redis.Redis, server: EmbeddedServer
) -> None:
    """Each has its own connections; what one process sees, the other one knows."""
    with served(server.url, *GUNICORN) as browser:
        pids: set[int] = set()

        def is_open() -> bool:
            answer = browser.get("/search")
            if answer.status_code == 200:
                pids.add(answer.json()["pid"])
            return answer.status_code == 503

        wait_until(is_open)
        for _ in range(20):
            assert browser.get("/search").status_code == 503
        assert browser.get("/health").json() == {"search": "open"}
        [name] = [key for key in client.keys("*:state") if b"search" in key]
        assert client.exists(name)


def test_in_memory() -> None:
    """CIRCUIT_BREAKERS_SHARED = False needs no server."""
    code = "import project; print(project.breakers(), project.breakers() is project.breakers())"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    environment.pop("PROJECT_REDIS", None)
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "<CircuitBreakerManager []> True\n"
