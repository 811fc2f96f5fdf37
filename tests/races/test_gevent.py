"""Threads that gevent has patched: the link's thread is a greenlet, and callers are others."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pybreaker_redis.embedded import EmbeddedServer

pytest.importorskip("gevent", reason="gevent is not installed")

SCRIPT = """
from gevent import monkey
monkey.patch_all()
import json, os, signal, sys, time
import gevent
from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy

url, pid = sys.argv[1], int(sys.argv[2])
breaker = CircuitBreaker("greenlets", redis=url, policy=Policy(failure_threshold=3, reset_timeout=60), redis_timeout=1)
took, stopped = [], []

def work():
    while not stopped:
        began = time.monotonic()
        breaker.call(int)
        took.append(time.monotonic() - began)
        gevent.sleep(0.01)

breaker.call(int)
greenlets = [gevent.spawn(work) for _ in range(20)]
gevent.sleep(1)
ages = []
for _ in range(10):
    ages.append(time.monotonic() - breaker._view.seen.sent)
    gevent.sleep(0.05)
took.clear()
os.kill(pid, signal.SIGSTOP)
gevent.sleep(2)
os.kill(pid, signal.SIGCONT)
hung = {"calls": len(took), "longest": max(took), "down": breaker._line.local is not None}
while breaker.snapshot().source != "redis":
    breaker.call(int)
    gevent.sleep(0.01)
stopped.append(True)
gevent.joinall(greenlets)
outcomes = []
for _ in range(4):
    try:
        breaker.call(int, "x")
    except (ValueError, CircuitOpenError) as error:
        outcomes.append(type(error).__name__)
print(json.dumps({"oldest": max(ages), "hung": hung, "outcomes": outcomes}))
"""


def test_greenlets(own_server: EmbeddedServer) -> None:
    """Views are refreshed in the background, no call waits for a server that hangs, and failures trip."""
    command = [sys.executable, "-c", SCRIPT, own_server.url, str(own_server.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["oldest"] < 0.5
    assert found["hung"]["down"]
    assert found["hung"]["calls"] > 200
    assert found["hung"]["longest"] < 0.5  # half a redis_timeout
    assert found["outcomes"] == ["ValueError"] * 3 + ["CircuitOpenError"]
