"""Processes that make calls and end, for test_exits: argv is what to do, the server's URL, and its arguments."""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import signal
import sys
import threading
import time
from typing import Any


@atexit.register  # before the import of pybreaker_redis, and thus run after its own handler
def run_last() -> None:
    """Calls of a breaker whose link has had its last exchange."""
    if sys.argv[1:2] == ["handlers"]:
        call(sys.argv[2])
        call(sys.argv[2])


import redis  # noqa: E402
import redis.asyncio  # noqa: E402

from pybreaker_redis import (  # noqa: E402
    AsyncCircuitBreaker,
    CircuitBreaker,
    CircuitOpenError,
    Policy,
)

RATE = Policy(failure_threshold=1_000_000, error_rate_threshold=0.5, minimum_calls=20, reset_timeout=600)
FIRM: dict[str, Any] = {"redis_timeout": 10.0}
NAME = "ends"
logging.getLogger("asyncio").setLevel(logging.ERROR)  # with -X dev it says what was slow


class Boom(Exception):
    """What a failing call raises."""


def work(fails: bool) -> None:
    """The guarded call."""
    if fails:
        raise Boom


async def async_work(fails: bool) -> None:
    """The guarded coroutine."""
    work(fails)


@functools.cache
def breaker_in(pid: int, kind: type[Any], url: Any, name: str = NAME, policy: Policy = RATE, **options: Any) -> Any:
    """The breaker of this process."""
    return kind(name, redis=url, policy=policy, **{**FIRM, **options})


def call(url: str, fails: bool = False, **options: Any) -> str:
    """One call: how it ended."""
    breaker = breaker_in(os.getpid(), CircuitBreaker, url, **options)
    try:
        breaker.call(work, fails)
    except Boom:
        return "failed"
    except CircuitOpenError:
        return "rejected"
    return "succeeded"


async def async_call(url: Any, fails: bool = False, **options: Any) -> str:
    """The same on asyncio."""
    breaker = breaker_in(os.getpid(), AsyncCircuitBreaker, url, **options)
    try:
        await breaker.call(async_work, fails)
    except Boom:
        return "failed"
    except CircuitOpenError:
        return "rejected"
    return "succeeded"


def one(job: tuple[str, str, bool]) -> str:
    """The only call of a process of a pool. kind: "sync" or "asyncio"."""
    kind, url, fails = job
    return asyncio.run(async_call(url, fails)) if kind == "asyncio" else call(url, fails)


def failing(share: float, count: int) -> list[bool]:
    """Which calls fail, spread evenly."""
    return [int((number + 1) * share) > int(number * share) for number in range(count)]


# Programs ----------------------------------------------------------------------------------------


def processes(url: str, kind: str, share: str, count: str) -> None:
    """Processes of one call each, one after the other. Each is a fork that then ends as the interpreter ends."""
    ends: list[int] = []
    for fails in failing(float(share), int(count)):
        child = os.fork()
        if child == 0:
            one((kind, url, fails))
            return
        ends.append(os.waitpid(child, 0)[1])
    assert set(ends) == {0}, ends


def calls(url: str, how: str, count: str = "1") -> None:
    """Calls, and an end of some kind."""
    for _ in range(int(count)):
        call(url)
    if how == "exit":
        sys.exit(3)
    if how == "error":
        raise Boom
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "sigint":
        os.kill(os.getpid(), signal.SIGINT)
    if how == "thread":
        threading.Thread(target=sys.exit, args=(3,)).start()


def closed(url: str, kind: str) -> None:
    """A call, then close(), then an end without any handler."""

    async def main() -> None:
        await async_call(url)
        await breaker_in(os.getpid(), AsyncCircuitBreaker, url).close()
        os._exit(0)

    if kind == "asyncio":
        asyncio.run(main())
    call(url)
    breaker_in(os.getpid(), CircuitBreaker, url).close()
    os._exit(0)


def busy(url: str) -> None:
    """Threads that call while the main thread is at its end, and reports all the time."""

    def many(name: str) -> None:
        for _ in range(300):
            call(url, name=name, lease=0.01)
            time.sleep(0.0001)

    for name in "abc":
        for _ in range(2):
            threading.Thread(target=many, args=(name,)).start()


def handlers(url: str) -> None:
    """Calls of handlers that run at the end, before and after the link's last exchange."""
    atexit.register(lambda: (call(url), call(url)))
    call(url)


def unused(url: str) -> None:
    """A breaker that is first used by a handler that runs at the end."""
    atexit.register(call, url)


def nothing(url: str, kind: str) -> None:
    """Calls that are reported before the end."""

    async def flushed() -> None:
        await async_call(url)
        await breaker_in(os.getpid(), AsyncCircuitBreaker, url).flush()

    if kind == "asyncio":
        asyncio.run(flushed())
    else:
        call(url)
        breaker_in(os.getpid(), CircuitBreaker, url).flush()


def healthy(url: str) -> None:
    """Calls to a service that never fails, by a breaker without a rate: nothing of it matters to anybody."""
    policy = Policy()
    call(url, policy=policy)
    breaker_in(os.getpid(), CircuitBreaker, url, policy=policy).flush()
    time.sleep(0.2)
    call(url, policy=policy)
    call(url, policy=policy)


def loops(url: str) -> None:
    """Event loops one after the other, and one that is not closed."""
    asyncio.run(async_call(url))
    asyncio.run(async_call(url))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(async_call(url))
    loop.run_until_complete(async_call(url))
    loop.close()


def told(url: str, kind: str, timeout: str) -> None:
    """Gathers five successes after it is told to, then ends. Nothing is due in between: the lease is long."""
    options: dict[str, Any] = {"lease": 60.0, "redis_timeout": float(timeout)}

    async def main() -> None:
        await async_call(url, **options)
        await breaker_in(os.getpid(), AsyncCircuitBreaker, url, **options).flush()
        tell()
        for _ in range(5):
            await async_call(url, **options)

    if kind == "asyncio":
        asyncio.run(main())
        return
    call(url, **options)
    breaker_in(os.getpid(), CircuitBreaker, url, **options).flush()
    tell()
    for _ in range(5):
        call(url, **options)


def outage(url: str) -> None:
    """Gathers five successes, then finds that Redis is down, and ends when it is told to."""
    call(url, lease=60.0)
    breaker_in(os.getpid(), CircuitBreaker, url, lease=60.0).flush()
    call(url, lease=60.0, name="other")
    tell()
    for _ in range(5):
        call(url, lease=60.0)
    call(url, fails=True, lease=60.0, name="other")
    tell()


def tell() -> None:
    """Say that this much is done, and wait for a line."""
    print("ready", flush=True)
    sys.stdin.readline()


def client(url: str, kind: str) -> None:
    """A call, and five that are gathered until the end, through asyncio. kind: how the server is given."""
    made: Any = {
        "url": lambda: url,
        "client": lambda: redis.asyncio.Redis.from_url(url),
        "cluster": lambda: redis.asyncio.RedisCluster.from_url(url.replace("+cluster", "")),
        "own-class": lambda: redis.asyncio.Redis(
            connection_pool=redis.asyncio.ConnectionPool.from_url(url, connection_class=OwnConnection)
        ),
    }[kind]()

    async def main() -> None:
        await async_call(made, lease=60.0)
        await breaker_in(os.getpid(), AsyncCircuitBreaker, made, lease=60.0).flush()
        for _ in range(5):
            await async_call(made, lease=60.0)

    asyncio.run(main())


class OwnConnection(redis.asyncio.Connection):
    """A class of connections that has no blocking counterpart."""


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
