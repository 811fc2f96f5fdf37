"""Where a timeout belongs: what docs/how-to/timeouts.md says of each client and server."""

from __future__ import annotations

import asyncio
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import free_port, wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Policy
from pybreaker_redis.embedded import EmbeddedServer

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SLOW = Policy(slow_call_duration=0.1, slow_call_rate_threshold=0.9, minimum_calls=100)
QUICK = Policy(slow_call_duration=30, slow_call_rate_threshold=0.9, minimum_calls=100)


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a service that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


def counted(snapshot: Any) -> tuple[int, int, int]:
    return snapshot.calls, snapshot.failures, snapshot.slow


@pytest.mark.parametrize("client", ["httpx", "requests"])
def test_a_clients_own_time_out_is_a_failure(silent: str, client: str) -> None:
    """It is an error of the guarded call."""
    library = pytest.importorskip(client)
    breaker = CircuitBreaker("silent", policy=QUICK)
    with pytest.raises(Exception, match=r"(?i)timed out"):
        breaker.call(library.get, silent, timeout=0.2)
    assert counted(breaker.snapshot()) == (1, 1, 0)


def test_the_same_on_asyncio(silent: str) -> None:
    """The timeouts of httpx and aiohttp, and asyncio.timeout() within the guarded function."""

    async def by_httpx() -> None:
        httpx = pytest.importorskip("httpx")
        async with httpx.AsyncClient(timeout=0.2) as client:
            await client.get(silent)

    async def by_aiohttp() -> None:
        aiohttp = pytest.importorskip("aiohttp")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.2)) as session:
            await session.get(silent)

    async def by_asyncio() -> None:
        async with asyncio.timeout(0.2):
            await asyncio.sleep(60)

    async def main(func: Callable[[], Any]) -> tuple[int, int, int]:
        breaker = AsyncCircuitBreaker("silent", policy=QUICK)
        try:
            await breaker.call(func)
        except pytest.skip.Exception:
            return (1, 1, 0)
        except Exception:
            return counted(await breaker.snapshot())
        raise AssertionError("no timeout")

    for func in (by_httpx, by_aiohttp, by_asyncio):
        assert asyncio.run(main(func)) == (1, 1, 0)


def test_asyncio_timeout_around_a_guarded_call() -> None:
    """It cancels the call: that counts as nothing, or as slow once slow_call_duration is over."""

    async def main(policy: Policy, seconds: float) -> tuple[int, int, int]:
        breaker = AsyncCircuitBreaker("silent", policy=policy)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await breaker.call(asyncio.sleep, 60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(breaker.call(asyncio.sleep, 60), seconds)
        assert breaker.counts.failures == 0
        return counted(await breaker.snapshot())

    assert asyncio.run(main(QUICK, 0.05)) == (0, 0, 0)
    assert asyncio.run(main(SLOW, 0.2)) == (2, 0, 2)


GREEN = """
from gevent import monkey; monkey.patch_all()
import sys, time, gevent
from pybreaker_redis import CircuitBreaker, Policy

def outcome(within, error, limit):
    policy = Policy(slow_call_duration=limit, slow_call_rate_threshold=0.9, minimum_calls=100)
    breaker = CircuitBreaker("silent", policy=policy)
    def call():
        with gevent.Timeout(0.2, error):
            time.sleep(60)
    try:
        if within:
            breaker.call(call)
        else:
            with gevent.Timeout(0.2, error):
                breaker.call(time.sleep, 60)
    except (gevent.Timeout, TimeoutError):
        pass
    found = breaker.snapshot()
    return found.calls, found.failures, found.slow

assert outcome(False, None, 30) == (0, 0, 0)
assert outcome(False, None, 0.1) == (1, 0, 1)
assert outcome(False, TimeoutError, 30) == (1, 1, 0)
assert outcome(True, None, 30) == (0, 0, 0)
assert outcome(True, TimeoutError, 30) == (1, 1, 0)
"""


def test_gevent() -> None:
    """gevent.Timeout is a BaseException, so it counts as nothing, or slow. One with an Exception is a failure."""
    pytest.importorskip("gevent")
    subprocess.run([sys.executable, "-c", GREEN], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})


APPLICATION = """
import os, time
from pybreaker_redis import CircuitBreaker, Policy
policy = Policy(slow_call_duration=float(os.environ["LIMIT"]), slow_call_rate_threshold=0.9, minimum_calls=100)
breaker = CircuitBreaker("silent", redis=os.environ["URL"], policy=policy)

def application(environ, start_response):
    breaker.call(time.sleep, 60)
"""


@pytest.mark.parametrize(("limit", "expected"), [(0.3, (1, 0, 1)), (30, (0, 0, 0))])
def test_gunicorn_ends_a_worker(
    tmp_path: pathlib.Path, own_server: EmbeddedServer, limit: float, expected: tuple[int, int, int]
) -> None:
    """Its timeout raises SystemExit in a sync worker: nothing, or slow. The worker reports it before it ends."""
    pytest.importorskip("gunicorn")
    (tmp_path / "silent_app.py").write_text(textwrap.dedent(APPLICATION))
    port, log = free_port(), tmp_path / "log"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as output:
        gunicorn = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-t", "1", "-b", f"127.0.0.1:{port}", "silent_app:application"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "URL": own_server.url, "LIMIT": str(limit)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: b"Booting worker" in log.read_bytes())
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_until(lambda: b"WORKER TIMEOUT" in log.read_bytes(), 60)
            wait_until(lambda: log.read_bytes().count(b"Booting worker") == 2, 60)
        policy = Policy(slow_call_duration=limit, slow_call_rate_threshold=0.9, minimum_calls=100)
        breaker = CircuitBreaker("silent", redis=own_server.url, policy=policy)
        deadline = time.monotonic() + 5
        while counted(breaker.snapshot()) != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert counted(breaker.snapshot()) == expected
    finally:
        gunicorn.terminate()
        gunicorn.wait(30)
