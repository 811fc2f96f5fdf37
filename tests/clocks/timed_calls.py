"""What the tests of clocks call, and the breaker of another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis.embedded import EmbeddedServer

LASTING = Policy(failure_threshold=1, reset_timeout=3600)


class Boom(Exception):
    """A failure of the guarded service."""


def fine() -> str:
    """A call that succeeds."""
    return "fine"


def boom() -> None:
    """A call that fails."""
    raise Boom


def admits(breaker: Any, func: Callable[[], Any] = fine) -> bool:
    """Whether a call is admitted now."""
    try:
        breaker.call(func)
    except CircuitOpenError:
        return False
    except Boom:
        pass
    return True


def elsewhere(server: EmbeddedServer, policy: Policy = LASTING) -> CircuitBreaker:
    """The breaker of another process: it shares no link with the others."""
    return CircuitBreaker("discovery", redis=redis.Redis.from_url(server.url), policy=policy, redis_timeout=5.0)
