"""The pytest plugin of pybreaker_redis: the fixtures of docs/how-to/testing.md.

A module of its own, so that pytest loads it without the package: a conftest.py may still have to patch for gevent, or
coverage to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

__all__ = ["breaker_redis", "breakers"]

if TYPE_CHECKING:
    from pybreaker_redis.embedded import EmbeddedServer
    from pybreaker_redis.testing import Breakers


@pytest.fixture
def breakers() -> Breakers:
    """Makes breakers in memory, all on one clock that the test moves: `breakers.clock.advance(30)`."""
    from pybreaker_redis.testing import Breakers

    return Breakers()


@pytest.fixture(scope="session")
def _breaker_server() -> Iterator[EmbeddedServer]:
    from pybreaker_redis.embedded import EmbeddedServer

    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def breaker_redis(_breaker_server: EmbeddedServer) -> EmbeddedServer:
    """A real server of the test run's own, started once and emptied for each test: `breaker_redis.url`."""
    import redis

    with redis.Redis.from_url(_breaker_server.start().url) as client:
        client.flushall()
    return _breaker_server
