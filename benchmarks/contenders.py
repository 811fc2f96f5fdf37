"""The breakers that are compared, each used as its own documentation recommends."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import redis
import redis.asyncio

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy

MANY = 10**9  # a threshold that no run reaches
LONG = 3600.0  # seconds; an open period that outlasts every run
TRIP = 5  # failures that trip a breaker
POOL = 64  # connections for an asyncio contender that leaves the pool to its user

OURS, STRICT, IN_PROCESS = "pybreaker_redis (lease 0.1)", "pybreaker_redis (strict)", "pybreaker_redis (redis=None)"
PYBREAKER, PYBREAKER_REDIS = "pybreaker (memory)", "pybreaker (Redis)"
CIRCUITBREAKER = "circuitbreaker"
AIOBREAKER, AIOBREAKER_REDIS = "aiobreaker (memory)", "aiobreaker (Redis)"
PURGATORY, NOPANIC = "purgatory (Redis)", "nopanic-redis"
INTERLOCK, INTERLOCK_REDIS = "interlock-cb (memory)", "interlock-cb (Redis)"
TWO_EVALSHA, TWO_RAW = "two empty EVALSHA (redis-py)", "two empty EVALSHA (bare socket)"
NOOP = "return 1"

# The ways to guard a call. A benchmark loop exists for each.
DECORATOR, CALL = "decorator", "call"
ACQUIRE, ASYNC_ACQUIRE = "with acquire()", "async with acquire()"
WITH, ASYNC_WITH = "with", "async with"

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

# Commands that a contender's scripts run inside the server. INFO commandstats counts them as well.
INSIDE = {
    OURS: {"get", "mget", "exists", "set", "time", "xadd", "publish", "pexpire", "hset", "hgetall", "hget", "del"},
    NOPANIC: {"hget", "hset", "hincrby", "hgetall", "hdel", "expire", "del"},
    INTERLOCK_REDIS: {"hget", "hset", "hmget", "hincrby", "pexpire", "time"},
}
INSIDE[STRICT] = INSIDE[OURS]


@dataclasses.dataclass
class Env:
    """The server that all contenders share, and a supply of unused names."""

    url: str
    numbers: Any = dataclasses.field(default_factory=lambda: itertools.count(1))

    def name(self) -> str:
        """A name that no breaker has had."""
        return f"bench{next(self.numbers)}"

    def client(self) -> redis.Redis:
        """A plain blocking client."""
        return redis.Redis.from_url(self.url)

    def async_client(self) -> redis.asyncio.Redis:
        """An asyncio client with POOL connections; callers wait for one instead of opening thousands."""
        pool = redis.asyncio.BlockingConnectionPool.from_url(self.url, max_connections=POOL, timeout=None)
        return redis.asyncio.Redis.from_pool(pool)


@dataclasses.dataclass
class Made:
    """One breaker.

    wrap: decorates a function. rejected: what a rejected call raises. close: ends the breaker.
    ways: what the loop of each other way to guard needs: a method, or the breaker itself.
    """

    wrap: Callable[[Any], Any]
    rejected: type[BaseException] | tuple[type[BaseException], ...] = ()
    close: Callable[[], Any] = lambda: None
    ways: dict[str, Any] = dataclasses.field(default_factory=dict)


# Takes the environment, and whether the breaker may trip. Returns a Made, or an awaitable of one.
Build = Callable[[Env, bool], Any]


class Contender(NamedTuple):
    """A breaker, and the way in which it guards the call."""

    build: Build
    way: str = DECORATOR


def listener(event: Any) -> None:
    """The cheapest listener."""


def fails(error: BaseException) -> bool:
    """The cheapest function that tells which exceptions are failures."""
    return True


def _ours(kind: Any, lease: float, client: Callable[[Env], Any], **options: Any) -> Build:
    def build(env: Env, trips: bool) -> Made:
        policy = Policy(failure_threshold=TRIP if trips else MANY, reset_timeout=LONG)
        breaker = kind(env.name(), redis=client(env), policy=policy, lease=lease, **options)
        ways = {CALL: breaker.call, ACQUIRE: breaker.acquire, ASYNC_ACQUIRE: breaker.acquire}
        return Made(breaker, CircuitOpenError, breaker.close, ways)

    return build


def _pybreaker(stored: bool, observed: bool = False) -> Build:
    def build(env: Env, trips: bool) -> Made:
        import pybreaker

        storage = (
            pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, env.client(), namespace=env.name())
            if stored
            else pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)
        )
        breaker = pybreaker.CircuitBreaker(
            fail_max=TRIP if trips else MANY,
            reset_timeout=LONG,
            state_storage=storage,
            listeners=[pybreaker.CircuitBreakerListener()] if observed else (),
        )
        return Made(breaker, pybreaker.CircuitBreakerError)

    return build


def _circuitbreaker(method: str) -> Build:
    def build(env: Env, trips: bool) -> Made:
        import circuitbreaker

        breaker = circuitbreaker.circuit(
            failure_threshold=TRIP if trips else MANY, recovery_timeout=int(LONG), name=env.name()
        )
        ways = {CALL: getattr(breaker, method), WITH: breaker}
        return Made(breaker, circuitbreaker.CircuitBreakerError, ways=ways)

    return build


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
    # its own client opens a connection for each running call, and a server does not take 10,000
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


class InterlockListener:
    """The cheapest listener of interlock-cb."""

    def ignore(self, **_: Any) -> None:
        """Do nothing."""

    on_state_change = on_call = on_rejected = on_reset = ignore


def _interlock(storage: str | None, client: Callable[[Env], Any], asynchronous: bool, observed: bool = False) -> Build:
    def build(env: Env, trips: bool) -> Made:
        import interlock

        config = interlock.Config(minimum_number_of_calls=TRIP if trips else MANY, wait_duration_in_open=LONG)
        stored = None
        if storage:
            stored = getattr(importlib.import_module("interlock.integrations.redis"), storage)(client(env))
        breaker = interlock.CircuitBreaker(
            name=env.name(), config=config, storage=stored, listener=InterlockListener() if observed else None
        )
        close = breaker.aclose if asynchronous else breaker.close
        return Made(breaker, interlock.CircuitOpenError, close, {CALL: breaker.call, ASYNC_WITH: breaker})

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


def _two_raw(env: Env, trips: bool) -> Made:
    """The floor of a strict call: bytes packed in advance, one sendall and one recv for each script."""
    client = env.client()
    path = client.connection_pool.connection_kwargs["path"]
    command = b"*3\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n0\r\n" % client.script_load(NOOP).encode()
    idle: list[socket.socket] = []  # one for each thread

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return connection

    def wrap(func: Any) -> Any:
        def call() -> Any:
            try:
                connection = idle.pop()
            except IndexError:
                connection = connect()
            connection.sendall(command)
            connection.recv(64)
            result = func()
            connection.sendall(command)
            if connection.recv(64) != b":1\r\n":
                raise RuntimeError("the empty script was not run")
            idle.append(connection)
            return result

        return call

    def close() -> None:
        for connection in idle:
            connection.close()

    return Made(wrap, (), close)


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
    IN_PROCESS: _ours(CircuitBreaker, 0.1, _nobody),
    PYBREAKER: _pybreaker(False),
    PYBREAKER_REDIS: _pybreaker(True),
    CIRCUITBREAKER: _circuitbreaker("call"),
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
    IN_PROCESS: _ours(AsyncCircuitBreaker, 0.1, _nobody),
    CIRCUITBREAKER: _circuitbreaker("call_async"),
    AIOBREAKER: _aiobreaker(False),
    AIOBREAKER_REDIS: _aiobreaker(True),
    PURGATORY: _purgatory_async,
    NOPANIC: _nopanic(Env.async_client),
    INTERLOCK: _interlock(None, _nobody, True),
    INTERLOCK_REDIS: _interlock("AsyncRedisStorage", Env.async_client, True),
}
EVERYBODY = {
    "sync": {name: Contender(build) for name, build in SYNC.items()},
    "asyncio": {name: Contender(build) for name, build in ASYNC.items()},
}
ON_REDIS = (OURS, STRICT, PYBREAKER_REDIS, AIOBREAKER_REDIS, PURGATORY, NOPANIC, INTERLOCK_REDIS)

NOT_RUN = {
    "asyncio": {
        PYBREAKER: "its call_async guards Tornado coroutines, not those of asyncio",
        PYBREAKER_REDIS: "its call_async guards Tornado coroutines, not those of asyncio",
    }
}


def way(name: str, how: str) -> str:
    """The row of one contender and one way to guard."""
    return f"{name}: {how}"


def _ways(name: str, build: Build, *hows: str) -> dict[str, Contender]:
    return {way(name, how): Contender(build, how) for how in hows}


LISTENERS, ON_CALL, PREDICATE = "decorator, listeners=[f]", "decorator, on_call=[f]", "decorator, failures=f"
WAYS = {
    "sync": {
        **_ways(OURS, SYNC[OURS], DECORATOR, CALL, ACQUIRE),
        way(OURS, LISTENERS): Contender(_ours(CircuitBreaker, 0.1, Env.client, listeners=[listener])),
        way(OURS, ON_CALL): Contender(_ours(CircuitBreaker, 0.1, Env.client, on_call=[listener])),
        way(OURS, PREDICATE): Contender(_ours(CircuitBreaker, 0.1, Env.client, failures=fails)),
        **_ways(CIRCUITBREAKER, SYNC[CIRCUITBREAKER], DECORATOR, CALL, WITH),
        way(PYBREAKER, LISTENERS): Contender(_pybreaker(False, observed=True)),
    },
    "asyncio": {
        **_ways(OURS, ASYNC[OURS], DECORATOR, CALL, ASYNC_ACQUIRE),
        way(OURS, LISTENERS): Contender(_ours(AsyncCircuitBreaker, 0.1, Env.async_client, listeners=[listener])),
        way(OURS, ON_CALL): Contender(_ours(AsyncCircuitBreaker, 0.1, Env.async_client, on_call=[listener])),
        way(OURS, PREDICATE): Contender(_ours(AsyncCircuitBreaker, 0.1, Env.async_client, failures=fails)),
        **_ways(CIRCUITBREAKER, ASYNC[CIRCUITBREAKER], DECORATOR, CALL, WITH),
        **_ways(INTERLOCK, ASYNC[INTERLOCK], DECORATOR, CALL, ASYNC_WITH),
        way(INTERLOCK, LISTENERS): Contender(_interlock(None, _nobody, True, observed=True)),
    },
}
FAILING = {
    **_ways(IN_PROCESS, SYNC[IN_PROCESS], DECORATOR, CALL, ACQUIRE),
    **_ways(CIRCUITBREAKER, SYNC[CIRCUITBREAKER], DECORATOR, CALL, WITH),
}
TWO_SCRIPTS = {
    "sync": {
        STRICT: Contender(SYNC[STRICT]),
        NOPANIC: Contender(SYNC[NOPANIC]),
        TWO_EVALSHA: Contender(_two_evalsha),
        TWO_RAW: Contender(_two_raw),
    },
    "asyncio": {
        STRICT: Contender(ASYNC[STRICT]),
        NOPANIC: Contender(ASYNC[NOPANIC]),
        TWO_EVALSHA: Contender(_two_evalsha_async),
    },
}


def in_turn(number: int, names: list[str]) -> list[str]:
    """The order of a round, which moves on by one."""
    shift = number % len(names)
    return names[shift:] + names[:shift]


async def settled(value: Any) -> Any:
    """value, or the result of awaiting it."""
    return await value if inspect.isawaitable(value) else value
