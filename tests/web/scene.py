"""A fleet as operators meet it, for the tests and the pictures of the page: services in every condition, on a Redis."""

from __future__ import annotations

import contextlib
import itertools
import random
import time

import redis

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy

RATES = Policy(
    failure_threshold=20,
    error_rate_threshold=0.5,
    slow_call_duration=0.5,
    slow_call_rate_threshold=0.8,
    reset_timeout=45,
)
AREAS = ("billing", "catalog", "checkout", "identity", "inventory", "mail", "media", "payments", "search", "shipping")
PARTS = ("api", "cache", "db-eu-1", "db-us-1", "events", "gateway", "geo", "partner", "reports", "webhooks")
HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "\x1b]0;owned\x07\x1b[2J",
    "'; drop table breakers; --",
    "a/../b?c=d#e",
    "..",
    "line\nbreak",
    "\u202egnp.eliforp",
    "\u05e9\u05dc\u05d5\u05dd/\u0645\u062f\u0641\u0648\u0639\u0627\u062a",
    "n" * 200,
)


def names(count: int) -> list[str]:
    """So many names of services."""
    pairs = (f"{area}-{part}" for area, part in itertools.product(AREAS, PARTS))
    more = (f"tenant-{number:04}" for number in itertools.count(1))
    return list(itertools.islice(itertools.chain(pairs, more), count))


def breaker(client: redis.Redis, name: str, policy: Policy = RATES, host: str = "web-3") -> CircuitBreaker:
    """A breaker that asks Redis at every call."""
    return CircuitBreaker(name, redis=client, policy=policy, lease=0, redis_timeout=20, host=host)


def fail(one: CircuitBreaker, times: int, error: Exception) -> None:
    """So many failing calls."""

    def failing() -> None:
        raise error

    for _ in range(times):
        with contextlib.suppress(type(error), CircuitOpenError):
            one.call(failing)


def trip(client: redis.Redis, name: str, message: str = "connection refused") -> None:
    """Open a circuit: one of five failures in a row."""
    fail(breaker(client, name, Policy(failure_threshold=5, reset_timeout=45)), 5, ConnectionError(message))


def busy(client: redis.Redis, name: str, seed: int) -> None:
    """Calls of which some fail."""
    chance = random.Random(seed)
    one = breaker(client, name)
    for _ in range(chance.randrange(5, 18)):
        if chance.random() < 0.12:
            fail(one, 1, TimeoutError("no answer within 2 s"))
        else:
            one.call(int)


def bounce(client: redis.Redis, name: str, times: int) -> CircuitBreaker:
    """Trips whose probes fail, a few moments apart."""
    one = breaker(client, name, Policy(failure_threshold=3, reset_timeout=0.3, backoff_multiplier=1.2))
    fail(one, 3, ConnectionError("[Errno 111] connection refused"))
    for _ in range(times):
        time.sleep(one.snapshot().retry_after or 0)
        fail(one, 1, TimeoutError("no answer within 2 s"))
    return one


def build(client: redis.Redis, count: int = 120) -> None:
    """So many breakers, a few of them in each condition."""
    for number, name in enumerate(names(count)):
        busy(client, name, number)
    trip(client, "payments-gateway", "[Errno 111] connection refused")
    trip(client, "search-api", "503 Service Unavailable")
    again = bounce(client, "shipping-partner", 4)
    time.sleep(again.snapshot().retry_after or 0)
    again.acquire().release()
    probing = bounce(client, "identity-api", 2)
    time.sleep(probing.snapshot().retry_after or 0)
    _kept.append(probing.acquire())
    breaker(client, "mail-gateway").acquire().failure(ConnectionError("429 Too Many Requests"), retry_after=90)


_kept: list[object] = []  # a permit that is dropped would give its slot back
