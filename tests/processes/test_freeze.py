"""A process is stopped for two seconds amid its calls, as a debugger, a container's host or a laptop's lid does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import programs
import pytest
import redis
from conftest import wait_until
from process_jobs import TRIPS, fail

from pybreaker_redis import CircuitBreaker
from pybreaker_redis.embedded import EmbeddedServer

KINDS = ["sync", "strict", "watch", "async", "async-watch"]
FREEZE = 2.0  # seconds; longer than two leases and a redis_timeout, after which no view holds


@contextlib.contextmanager
def calling(kind: str, server: EmbeddedServer) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process that calls, for a `with` block; afterwards the dictionary has what it found."""
    found: dict[str, Any] = {}
    command = [sys.executable, str(programs.HERE / "frozen.py"), kind, server.url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=programs.environment(), text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "begun\n", process.stderr.read()
            yield process, found
            out, errors = process.communicate(timeout=30)
            assert process.returncode == 0, errors
            found |= json.loads(out) | {"stderr": errors}
        finally:
            process.kill()


def stopped_state(pid: int) -> bool:
    """Whether the kernel has stopped the process."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("kind", KINDS)
def test_a_freeze_is_no_outage(server: EmbeddedServer, client: redis.Redis, kind: str) -> None:
    """Replies that came while the process was stopped are no outage, and no failure."""
    with calling(kind, server) as (process, found):
        for _ in range(3 if kind == "strict" else 1):
            time.sleep(0.3)  # amid calls
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(FREEZE)
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.3)
    assert found["outages"] == [], found["stderr"]
    snapshot = CircuitBreaker("frozen", redis=client, policy=TRIPS).snapshot()
    assert (snapshot.state, snapshot.failure_count, snapshot.trips) == ("closed", 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_call_goes_by_a_frozen_view(server: EmbeddedServer, client: redis.Redis, kind: str) -> None:
    """The circuit opens while a process is stopped: no call that begins later is let through."""
    other = CircuitBreaker("frozen", redis=client, policy=TRIPS, lease=0, redis_timeout=10.0)
    with calling(kind, server) as (process, found):
        time.sleep(0.3)  # amid calls
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: stopped_state(process.pid))
        time.sleep(FREEZE)
        fail(other, 3)
        continued = time.monotonic()
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
    assert len(found["admitted"]) > 10
    late = [began - continued for began in found["admitted"] if began > continued]
    assert late == [], f"{len(late)} calls, {late[-1]:.3f} s after the freeze"
    assert found["outages"] == [], found["stderr"]
