"""Processes that gevent or eventlet has patched: watching, hanging servers, forks and trips."""

from __future__ import annotations

import importlib.util

import pytest
from programs import run

from pybreaker_redis.embedded import EmbeddedServer


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_green_threads(own_server: EmbeddedServer, library: str) -> None:
    """Views stay fresh, no call waits for a server that hangs, a child is on its own, and a trip reaches all."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} has no wheel for this Python")
    found = run(library, own_server.url, own_server.pid, program="green.py")
    assert found["watches"]
    assert found["oldest"] < 1.0  # ten leases
    assert found["calls_while_hung"] > 100  # of 20 green threads in a second
    assert found["rejects"]
    status, (instance, source) = found["child"]
    assert (status, source) == (0, "redis")
    assert instance not in (None, found["instance"])
