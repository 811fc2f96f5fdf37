"""Who is compared, each used as its own documentation recommends."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import redis
import redis.asyncio

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy

MANY = 10**9  # a threshold that no run reaches
LONG = 3600.0  # an open time that no run outlives
TRIP = 5  # failures that trip
POOL = 64  # connections of an asyncio contender that leaves the pool to its user

OURS, STRICT, ALONE = "pybreaker_redis (lease 0.1)", "pybreaker_redis (strict)", "pybreaker_redis (redis=None)"
PYBREAKER, PYBREAKER_REDIS = "pybreaker (memory)", "pybreaker (Redis)"
CIRCUITBREAKER = "circuitbreaker"
AIOBREAKER, AIOBREAKER_REDIS = "aiobreaker (memory)", "aiobreaker (Redis)"
PURGATORY, NOPANIC = "purgatory (Redis)", "nopanic-redis"
INTERLOCK, INTERLOCK_REDIS = "interlock-cb (memory)", "interlock-cb (Redis)"
TWO_EVALSHA = "two bare EVALSHA"
NOOP = "return 1"

PACKAGES = (
    "pybreaker",
    "circuitbreaker",
    "aiobreaker",
    "purgatory",
    "nopanic-redis",
    "interlock-cb",
    "redis",
    "hiredis",
)

# Commands that a contender's scripts run inside the server; INFO commandstats counts them too.
INSIDE = {
    OURS: {"get", "mget", "exists", "set", "time", "xadd", "publish", "pexpire", "hset", "hgetall", "hget", "del"},
    NOPANIC: {"hget", "hset", "hincrby", "hgetall", "hdel", "expire", "del"},
    INTERLOCK_REDIS: {"hget", "hset", "hmget", "hincrby", "pexpire", "time"},
}
INSIDE[STRICT] = INSIDE[OURS]


@dataclasses.dataclass
class Env:
    """The server that all share, and names that were never used before."""

    url: str
    numbers: Any = dataclasses.field(default_factory=lambda: itertools.count(1))

    def name(self) -> str:
        """A breaker's name that nobody has used."""
        return f"bench{next(self.numbers)}"

    def client(self) -> redis.Redis:
        """A plain blocking client."""
        return redis.Redis.from_url(self.url)

    def async_client(self) -> redis.asyncio.Redis:
        """An asyncio client whose callers wait for one of POOL connections, rather than open thousands."""
        pool = redis.asyncio.BlockingConnectionPool.from_url(self.url, max_connections=POOL, timeout=None)
        return redis.asyncio.Redis.from_pool(pool)


@dataclasses.dataclass
class Made:
    """One breaker: how it guards a function, what it raises when it rejects, how it ends."""

    wrap: Callable[[Any], Any]
    rejected: type[BaseException] | tuple[type[BaseException], ...] = ()
    close: Callable[[], Any] = lambda: None


# Each takes the environment and whether the breaker may trip.
Build = Callable[[Env, bool], Any]


def _ours(kind: Any, lease: float, client: Callable[[Env], Any]) -> Build:
    def build(env: Env, trips: bool) -> Made:
        policy = Policy(failure_threshold=TRIP if trips else MANY, reset_timeout=LONG)
        breaker = kind(env.name(), redis=client(env), policy=policy, lease=lease)
        return Made(breaker, CircuitOpenError, breaker.close)

    return build


def _pybreaker(stored: bool) -> Build:
    def build(env: Env, trips: bool) -> Made:
        import pybreaker

        storage = (
            pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, env.client(), namespace=env.name())
            if stored
            else pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)
        )
        breaker = pybreaker.CircuitBreaker(fail_max=TRIP if trips else MANY, reset_timeout=LONG, state_storage=storage)
        return Made(breaker, pybreaker.CircuitBreakerError)

    return build


def _circuitbreaker(env: Env, trips: bool) -> Made:
    import circuitbreaker

    breaker = circuitbreaker.circuit(
        failure_threshold=TRIP if trips else MANY, recovery_timeout=int(LONG), name=env.name()
    )
    return Made(breaker, circuitbreaker.CircuitBreakerError)


def _aiobreaker(stored: bool) -> Build:
    def build(env: Env, trips: bool) -> Made:
        import aiobreaker

        closed = importlib.import_module("aiobreaker.state").CircuitBreakerState.CLOSED
        module = importlib.import_module(f"aiobreaker.storage.{'redis' if stored else 'memory'}")
        storage = (
            module.CircuitRedisStorage(closed, env.client(), namespace=env.name())
            if stored
            else module.CircuitMemoryStorage(closed)
        )
        breaker = aiobreaker.CircuitBreaker(
            fail_max=TRIP if trips else MANY, timeout_duration=timedelta(seconds=LONG), state_storage=storage
        )
        return Made(breaker, aiobreaker.CircuitBreakerError)

    return build


def _purgatory_sync(env: Env, trips: bool) -> Made:
    import purgatory
    from purgatory.domain.model import OpenedState

    factory = purgatory.SyncCircuitBreakerFactory(
        default_threshold=TRIP if trips else MANY, default_ttl=LONG, uow=purgatory.SyncRedisUnitOfWork(env.url)
    )
    factory.initialize()
    return Made(factory(env.name()), OpenedState)


async def _purgatory_async(env: Env, trips: bool) -> Made:
    import purgatory
    from purgatory.domain.model import OpenedState

    unit = purgatory.AsyncRedisUnitOfWork(env.url)
    # its own client opens a connection for every call in flight, and 10,000 are more than a server takes
    unit.contexts.redis = env.async_client()
    factory = purgatory.AsyncCircuitBreakerFactory(
        default_threshold=TRIP if trips else MANY, default_ttl=LONG, uow=unit
    )
    await factory.initialize()
    return Made(factory(env.name()), OpenedState, unit.contexts.redis.aclose)


def _nopanic(client: Callable[[Env], Any]) -> Build:
    def build(env: Env, trips: bool) -> Made:
        import nopanic
        import nopanic_redis

        breaker = nopanic_redis.redis_circuit_breaker(
            client(env), name=env.name(), min_calls=TRIP if trips else MANY, reset_timeout=LONG, fail_open=False
        )
        return Made(breaker, nopanic.CircuitOpen)

    return build


def _interlock(storage: str | None, client: Callable[[Env], Any], asynchronous: bool) -> Build:
    def build(env: Env, trips: bool) -> Made:
        import interlock

        config = interlock.Config(minimum_number_of_calls=TRIP if trips else MANY, wait_duration_in_open=LONG)
        stored = None
        if storage:
            stored = getattr(importlib.import_module("interlock.integrations.redis"), storage)(client(env))
        breaker = interlock.CircuitBreaker(name=env.name(), config=config, storage=stored)
        return Made(breaker, interlock.CircuitOpenError, breaker.aclose if asynchronous else breaker.close)

    return build


def _two_evalsha(env: Env, trips: bool) -> Made:
    client = env.client()
    sha = client.script_load(NOOP)

    def wrap(func: Any) -> Any:
        def call() -> Any:
            client.evalsha(sha, 0)
            result = func()
            client.evalsha(sha, 0)
            return result

        return call

    return Made(wrap)


async def _two_evalsha_async(env: Env, trips: bool) -> Made:
    client = env.async_client()
    sha = await client.script_load(NOOP)

    def wrap(func: Any) -> Any:
        async def call() -> Any:
            await client.evalsha(sha, 0)
            result = await func()
            await client.evalsha(sha, 0)
            return result

        return call

    return Made(wrap, (), client.aclose)


def _nobody(env: Env) -> None:
    return None


SYNC: dict[str, Build] = {
    OURS: _ours(CircuitBreaker, 0.1, Env.client),
    STRICT: _ours(CircuitBreaker, 0.0, Env.client),
    ALONE: _ours(CircuitBreaker, 0.1, _nobody),
    PYBREAKER: _pybreaker(False),
    PYBREAKER_REDIS: _pybreaker(True),
    CIRCUITBREAKER: _circuitbreaker,
    AIOBREAKER: _aiobreaker(False),
    AIOBREAKER_REDIS: _aiobreaker(True),
    PURGATORY: _purgatory_sync,
    NOPANIC: _nopanic(Env.client),
    INTERLOCK: _interlock(None, _nobody, False),
    INTERLOCK_REDIS: _interlock("RedisStorage", Env.client, False),
}
ASYNC: dict[str, Build] = {
    OURS: _ours(AsyncCircuitBreaker, 0.1, Env.async_client),
    STRICT: _ours(AsyncCircuitBreaker, 0.0, Env.async_client),
    ALONE: _ours(AsyncCircuitBreaker, 0.1, _nobody),
    CIRCUITBREAKER: _circuitbreaker,
    AIOBREAKER: _aiobreaker(False),
    AIOBREAKER_REDIS: _aiobreaker(True),
    PURGATORY: _purgatory_async,
    NOPANIC: _nopanic(Env.async_client),
    INTERLOCK: _interlock(None, _nobody, True),
    INTERLOCK_REDIS: _interlock("AsyncRedisStorage", Env.async_client, True),
}
BARE_SYNC: dict[str, Build] = {TWO_EVALSHA: _two_evalsha}
BARE_ASYNC: dict[str, Build] = {TWO_EVALSHA: _two_evalsha_async}
ON_REDIS = (OURS, STRICT, PYBREAKER_REDIS, AIOBREAKER_REDIS, PURGATORY, NOPANIC, INTERLOCK_REDIS)

NOT_RUN = {
    "asyncio": {
        PYBREAKER: "its call_async is for Tornado coroutines; it has none for asyncio",
        PYBREAKER_REDIS: "its call_async is for Tornado coroutines; it has none for asyncio",
    }
}


async def settled(value: Any) -> Any:
    """value, or what awaiting it gives."""
    return await value if inspect.isawaitable(value) else value
