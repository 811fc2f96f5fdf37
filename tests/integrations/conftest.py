"""A misbehaving service, and managers whose breakers share a real Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from pybreaker_redis import AsyncCircuitBreakerManager, CircuitBreakerManager, Config, Policy
from pybreaker_redis.embedded import EmbeddedServer

from .service import Service, running_service


@pytest.fixture(scope="session")
def _service() -> Iterator[Service]:
    with running_service() as service:
        yield service


@pytest.fixture
def service(_service: Service) -> Iterator[Service]:
    """The service, with no calls counted yet."""
    _service.calls.clear()
    _service.answer = None
    yield _service
    _service.answer = None


def config_of(server: EmbeddedServer, **policy: Any) -> Config:
    """Every service trips at the third failure in a row, and stays open for long."""
    policy = {"failure_threshold": 3, "reset_timeout": 60.0, **policy}
    return Config(defaults=Policy(**policy), redis_url=server.url, redis_timeout=10.0)


@pytest.fixture
def make_manager(client: redis.Redis, server: EmbeddedServer) -> Iterator[Callable[..., CircuitBreakerManager]]:
    """Makes managers on an empty server."""
    made: list[CircuitBreakerManager] = []

    def make(**policy: Any) -> CircuitBreakerManager:
        made.append(CircuitBreakerManager.with_redis(config_of(server, **policy)))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


@pytest.fixture
def manager(make_manager: Callable[..., CircuitBreakerManager]) -> CircuitBreakerManager:
    """One with the defaults of config_of()."""
    return make_manager()


@pytest.fixture
def make_async_manager(client: redis.Redis, server: EmbeddedServer) -> Callable[..., AsyncCircuitBreakerManager]:
    """Makes managers on an empty server; the test closes them."""
    return lambda **policy: AsyncCircuitBreakerManager.with_redis(config_of(server, **policy))
