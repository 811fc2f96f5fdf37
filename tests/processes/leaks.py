"""Does the same thing many times in a process of its own: argv is the job, the server's URL and how often. Prints JSON.

What is left is compared with what was there after the first tenth, when every cache has what it needs.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import itertools
import json
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import redis
from process_jobs import COUNTS, FIRM, Boom, async_boom, async_fine, boom, fine

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy

BATCH = 50
NAMES = 10  # of breakers: caches by name are bounded, but large
# every call is a probe, for ever
PROBES = Policy(failure_threshold=1, reset_timeout=0.01, success_threshold=10**9, probe_timeout=600.0)


def sockets() -> int:
    """How many descriptors this process has, of sockets, pipes and event loops."""
    return len(os.listdir("/proc/self/fd"))


def objects() -> collections.Counter[str]:
    """The objects of this package's classes, and event loops and tasks."""
    kinds = [type(one) for one in gc.get_objects()]
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if isinstance(kind.__module__, str))
    wanted = ("pybreaker_redis.", "asyncio.", "_asyncio.", "redis.connection.", "redis.asyncio.connection.")
    return collections.Counter(name for name in names if name.startswith(wanted))


def measured(idle: bool) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while idle and threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.1)  # a link's thread ends ten seconds after its last call, a subscription's within one
    for _ in range(3):
        gc.collect()
    threads = sorted(thread.name for thread in threading.enumerate())
    memory = tracemalloc.get_traced_memory()[0]
    return {"threads": threads, "sockets": sockets(), "objects": objects(), "memory": memory}


def compared(work: Callable[[int], object], times: int, idle: bool = False) -> dict[str, Any]:
    """work(number) so many times; what it left. idle: look only when all threads have ended.

    sockets, bytes: twice the growth in the half that grew less, since a leak grows in both. A pool grows once when more
    callers than before happen to need a connection at the same time. The interpreter's table of interned texts grows
    once by a megabyte, after about a thousand event loops.
    """
    tracemalloc.start()
    numbers = iter(range(times))
    first = max(1, times // 10)
    looks = []
    for count in (first, (times - first) // 2, times):
        for number in itertools.islice(numbers, count):
            work(number)
        looks.append(measured(idle))
    before, middle, after = looks

    def growth(what: str) -> int:
        least: int = min(middle[what] - before[what], after[what] - middle[what])
        return 2 * least

    more = after["objects"] - before["objects"]
    return {
        "threads": [before["threads"], after["threads"]],
        "sockets": growth("sockets"),
        "objects": dict(more.most_common(8)),
        "bytes": growth("memory"),
    }


def breakers(url: str, times: int) -> object:
    """Breakers of one URL, each used once and dropped."""

    def work(number: int) -> None:
        if number % BATCH == 0:
            gc.collect()  # until then each exchange refreshes those that were dropped
        breaker = CircuitBreaker(f"leak-{number % NAMES}", redis=url, policy=COUNTS, **FIRM)
        breaker.call(fine)
        with contextlib.suppress(Boom):
            breaker.call(boom)

    return compared(work, times, idle=True)


def clients(url: str, times: int) -> object:
    """The same, each with a client of its own, which is dropped with it."""

    def work(number: int) -> None:
        client = redis.Redis.from_url(url)
        CircuitBreaker(f"leak-{number % NAMES}", redis=client, policy=COUNTS, **FIRM).call(fine)

    return compared(work, times, idle=True)


def managers(url: str, times: int) -> object:
    """Managers that watch, each used once and closed."""
    from pybreaker_redis import CircuitBreakerManager, Config

    def work(number: int) -> None:
        config = Config(redis_url=url, redis_timeout=10.0)
        with CircuitBreakerManager.with_redis(config) as manager:
            manager.call(f"leak-{number % NAMES}", fine)

    return compared(work, times, idle=True)


def watches(url: str, times: int) -> object:
    """Watches of one breaker, each opened and closed."""
    breaker = CircuitBreaker("leak-watch", redis=url, policy=COUNTS, **FIRM)
    keeper = CircuitBreaker("leak-keeper", redis=url, policy=COUNTS, **FIRM).watch()  # keeps the subscription
    breaker.call(fine)

    def work(number: int) -> None:
        with breaker.watch():
            breaker.call(fine)

    found = compared(work, times)
    keeper.close()
    return found


def subscriptions(url: str, times: int) -> object:
    """The same, each with a subscription of its own: nobody else watches."""
    breaker = CircuitBreaker("leak-watch", redis=url, policy=COUNTS, **FIRM)
    breaker.call(fine)

    def work(number: int) -> None:
        with breaker.watch() as watch:
            breaker.call(fine)
            while not watch.active:
                time.sleep(0.001)
        while any(thread.name == "pybreaker_redis-watch" for thread in threading.enumerate()):
            time.sleep(0.001)  # it looks once a second whether anybody is left

    return compared(work, times)


def half_open(**options: Any) -> CircuitBreaker:
    """A breaker whose next call is a probe."""
    breaker = CircuitBreaker("leak-probe", policy=PROBES, **options)
    with contextlib.suppress(Boom):
        breaker.call(boom)
    time.sleep(0.05)
    return breaker


def probes(url: str, times: int) -> object:
    """Probes in one thread."""
    breaker = half_open(redis=url, **FIRM)

    def work(number: int) -> None:
        with contextlib.suppress(CircuitOpenError):
            breaker.call(fine)

    return compared(work, times)


def blocks(url: str, times: int) -> object:
    """Probes in one thread, as blocks."""
    breaker = half_open(redis=url, **FIRM)

    def work(number: int) -> None:
        with contextlib.suppress(CircuitOpenError), breaker.acquire():
            pass

    return compared(work, times)


def local_probes(url: str, times: int) -> object:
    """Probes in one thread, without Redis."""
    breaker = half_open()

    def work(number: int) -> None:
        with contextlib.suppress(CircuitOpenError):
            breaker.call(fine)

    return compared(work, times)


def loops(url: str, times: int) -> object:
    """Event loops, each with a few calls of one breaker, which nobody closes."""
    breaker = AsyncCircuitBreaker("leak-loop", redis=url, policy=COUNTS, **FIRM)

    async def main() -> None:
        await breaker.call(async_fine)
        with contextlib.suppress(Boom):
            await breaker.call(async_boom)

    return compared(lambda number: asyncio.run(main()), times)


def watching_loops(url: str, times: int) -> object:
    """Event loops, each of which watches."""
    breaker = AsyncCircuitBreaker("leak-loop", redis=url, policy=COUNTS, **FIRM)

    async def main() -> None:
        async with await breaker.watch():
            await breaker.call(async_fine)

    return compared(lambda number: asyncio.run(main()), times)


def in_one_loop(make: Callable[[], Awaitable[Callable[[int], Awaitable[object]]]], times: int) -> object:
    """compared() for a coroutine function, in one loop."""
    with asyncio.Runner() as runner:

        async def prepare() -> Callable[[int], Awaitable[object]]:
            return await make()

        work = runner.run(prepare())

        async def many(first: int, count: int) -> None:
            for number in range(first, first + count):
                await work(number)
            await asyncio.sleep(0.02)  # what a batch has scheduled
            gc.collect()  # until then each exchange refreshes the breakers that were dropped

        return compared(lambda number: runner.run(many(number * BATCH, BATCH)), times // BATCH)


def async_breakers(url: str, times: int) -> object:
    """asyncio breakers of one URL, each used once and dropped."""

    async def make() -> Callable[[int], Awaitable[object]]:
        async def work(number: int) -> None:
            breaker = AsyncCircuitBreaker(f"leak-{number % NAMES}", redis=url, policy=COUNTS, **FIRM)
            await breaker.call(async_fine)
            with contextlib.suppress(Boom):
                await breaker.call(async_boom)

        return work

    return in_one_loop(make, times)


def async_probes(url: str, times: int) -> object:
    """Probes in one task after the other."""

    async def make() -> Callable[[int], Awaitable[object]]:
        breaker = AsyncCircuitBreaker("leak-probe", redis=url, policy=PROBES, **FIRM)
        with contextlib.suppress(Boom):
            await breaker.call(async_boom)
        await asyncio.sleep(0.05)

        async def work(number: int) -> None:
            with contextlib.suppress(CircuitOpenError):
                await breaker.call(async_fine)

        return work

    return in_one_loop(make, times)


def async_watches(url: str, times: int) -> object:
    """Watches in one loop, each opened and closed."""

    async def make() -> Callable[[int], Awaitable[object]]:
        breaker = AsyncCircuitBreaker("leak-watch", redis=url, policy=COUNTS, **FIRM)
        await AsyncCircuitBreaker("leak-keeper", redis=url, policy=COUNTS, **FIRM).watch()

        async def work(number: int) -> None:
            async with await breaker.watch():
                await breaker.call(async_fine)

        return work

    return in_one_loop(make, times)


if __name__ == "__main__":
    job, url, times = sys.argv[1:]
    print(json.dumps(globals()[job](url, int(times))), flush=True)
