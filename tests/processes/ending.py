"""A process that ends amid its own work: argv is the way and the server's URL.

Prints a line when it is ready, and waits for one on its input. Then it prints when it begins to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from typing import Any

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Policy

TIMEOUT = 1.0
logging.getLogger("pybreaker_redis").setLevel(logging.CRITICAL)  # what it says of the outage is not looked at
COUNTS = Policy(failure_threshold=10**9, error_rate_threshold=1.0, minimum_calls=10**9, window=3600.0)
OPTIONS: dict[str, Any] = {"policy": COUNTS, "redis_timeout": TIMEOUT}


async def coroutine() -> int:
    return 1


def wait_for_test() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def ends() -> None:
    print(time.monotonic(), flush=True)


def idle(url: str) -> None:
    """With gathered successes, and nothing under way."""
    breaker = CircuitBreaker("ending", redis=url, **OPTIONS)
    breaker.call(int)
    wait_for_test()
    breaker.call(int)
    ends()


def refreshing(url: str) -> None:
    """While the link's thread is in an exchange."""
    breaker = CircuitBreaker("ending", redis=url, **OPTIONS)
    breaker.call(int)
    wait_for_test()
    time.sleep(0.11)  # longer than a lease
    breaker.call(int)
    time.sleep(0.05)
    ends()


def watching(url: str) -> None:
    """While a subscription stands, and another thread is in a call."""
    breaker = CircuitBreaker("ending", redis=url, **OPTIONS)
    watch = breaker.watch()
    breaker.call(int)
    while not watch.active:
        time.sleep(0.01)

    def work() -> None:
        while True:
            breaker.call(int)

    threading.Thread(target=work, daemon=True).start()
    wait_for_test()
    time.sleep(0.11)
    ends()


def asking(url: str) -> None:
    """While daemon threads ask for permits and report failures."""
    breaker = CircuitBreaker("ending", redis=url, lease=0, **OPTIONS)

    def work() -> None:
        while True:
            with contextlib.suppress(ValueError):
                breaker.call(int, "x")

    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    wait_for_test()
    time.sleep(0.05)
    ends()


def outage(url: str) -> None:
    """While a retry of an outage is under way."""
    breaker = CircuitBreaker("ending", redis=url, lease=0, **OPTIONS)
    breaker.call(int)
    wait_for_test()
    deadline = time.monotonic() + TIMEOUT + 0.5
    while time.monotonic() < deadline:
        breaker.call(int)
        time.sleep(0.01)
    ends()


def closed(url: str) -> None:
    """After close(), which everybody may call."""
    breaker = CircuitBreaker("ending", redis=url, **OPTIONS)
    breaker.call(int)
    wait_for_test()
    breaker.call(int)
    ends()
    breaker.close()


async def async_idle(url: str) -> None:
    """With gathered successes, and nothing under way."""
    breaker = AsyncCircuitBreaker("ending", redis=url, **OPTIONS)
    await breaker.call(coroutine)
    wait_for_test()
    await breaker.call(coroutine)
    ends()


async def async_refreshing(url: str) -> None:
    """While the loop's task is in an exchange."""
    breaker = AsyncCircuitBreaker("ending", redis=url, **OPTIONS)
    await breaker.call(coroutine)
    wait_for_test()
    await asyncio.sleep(0.11)
    await breaker.call(coroutine)
    await asyncio.sleep(0.05)
    ends()


async def async_watching(url: str) -> None:
    """While a subscription stands, and another task is in a call."""
    breaker = AsyncCircuitBreaker("ending", redis=url, **OPTIONS)
    watch = await breaker.watch()
    await breaker.call(coroutine)
    while not watch.active:
        await asyncio.sleep(0.01)

    async def work() -> None:
        while True:
            await breaker.call(coroutine)
            await asyncio.sleep(0)

    task = asyncio.create_task(work())
    await asyncio.to_thread(wait_for_test)
    await asyncio.sleep(0.11)
    ends()
    task.cancel()


async def async_asking(url: str) -> None:
    """While tasks ask for permits and report failures; asyncio.run() cancels them."""
    breaker = AsyncCircuitBreaker("ending", redis=url, lease=0, **OPTIONS)

    async def fails() -> None:
        raise ValueError

    async def work() -> None:
        while True:
            with contextlib.suppress(ValueError):
                await breaker.call(fails)

    tasks = [asyncio.create_task(work()) for _ in range(4)]
    await asyncio.to_thread(wait_for_test)
    await asyncio.sleep(0.05)
    ends()
    assert len(tasks) == 4


async def async_closed(url: str) -> None:
    """After close()."""
    breaker = AsyncCircuitBreaker("ending", redis=url, **OPTIONS)
    await breaker.call(coroutine)
    wait_for_test()
    await breaker.call(coroutine)
    ends()
    await breaker.close()


if __name__ == "__main__":
    way, url = sys.argv[1:]
    made = globals()[way](url)
    if way.startswith("async"):
        asyncio.run(made)
