"""Processes that end while their breakers are at work, with a server that answers and with one that hangs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time

import programs
import pytest
from conftest import stopped, wait_until
from process_jobs import COUNTS, FIRM, fine

from pybreaker_redis import CircuitBreaker
from pybreaker_redis.embedded import EmbeddedServer

WAYS = ["idle", "refreshing", "watching", "asking", "closed"]
WAYS += [f"async_{way}" for way in WAYS] + ["outage"]
TIMEOUT = 1.0  # the redis_timeout of the program
SLACK = 5.0  # seconds that a slow machine may take to end an interpreter


def end(server: EmbeddedServer, way: str, hung: bool, options: list[str]) -> tuple[float, int, str]:
    """How long a process took to end, its exit code, and what it wrote on stderr."""
    command = [sys.executable, *options, str(programs.HERE / "ending.py"), way, server.url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=programs.environment(), text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            with stopped(server) if hung else contextlib.nullcontext():
                out, errors = process.communicate("go\n", timeout=60)
                return time.monotonic() - float(out), process.returncode, errors
        finally:
            process.kill()


@pytest.mark.parametrize("options", [[], ["-X", "dev", "-W", "error"]], ids=["plain", "dev"])
@pytest.mark.parametrize("hung", [False, True], ids=["answers", "hangs"])
@pytest.mark.parametrize("way", WAYS)
def test_ends_soon_and_silently(own_server: EmbeddedServer, way: str, hung: bool, options: list[str]) -> None:
    """A process ends within redis_timeout, successfully, and says nothing."""
    took, code, errors = end(own_server, way, hung, options)
    assert (code, errors) == (0, "")
    assert took < TIMEOUT + SLACK


def test_flush_waits_for_a_report_under_way(own_server: EmbeddedServer) -> None:
    """A process may end at once after flush(), by os._exit() too: what the link's thread has taken is reported."""
    breaker = CircuitBreaker("flushed", redis=own_server.url, policy=COUNTS, lease=0.02, **FIRM)
    breaker.call(fine)
    flushing = threading.Thread(target=breaker.flush, daemon=True)
    with stopped(own_server):
        breaker.call(fine)  # reported within a lease, as no other follows
        wait_until(lambda: breaker._redis.link.is_reporting(breaker._line))
        flushing.start()
        flushing.join(0.3)
        waits = flushing.is_alive()
    flushing.join(20)
    assert waits
    assert not flushing.is_alive()


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("state", ["answers", "hangs", "is gone"])
def test_a_call_while_the_interpreter_is_finalized(own_server: EmbeddedServer, state: str, calls: int) -> None:
    """It runs, and the process ends: Python 3.11 would wait for ever for a thread that starts then."""
    url = "redis://127.0.0.1:1" if state == "is gone" else own_server.url
    command = [sys.executable, str(programs.HERE / "finalizing.py"), url, str(calls)]
    with stopped(own_server) if state == "hangs" else contextlib.nullcontext():
        done = subprocess.run(
            command, env=programs.environment(), capture_output=True, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stdout) == (0, "called\n"), done.stderr
    assert "Exception ignored" not in done.stderr
