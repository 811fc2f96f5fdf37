"""A process that calls all the time, and that a test stops and continues: argv is the kind and the server's URL.

Prints a line when it has begun. Ends when its input does; then it prints what happened, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from typing import Any

from process_jobs import TRIPS, async_fine, fine, outages

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event

CALLERS = 4
events: list[Event] = []
admitted: list[float] = []  # when each call began that was let through, on a clock that all processes share
over = threading.Event()
OPTIONS: dict[str, dict[str, Any]] = {"sync": {}, "strict": {"lease": 0}, "watch": {}, "async": {}, "async-watch": {}}


def options(kind: str, url: str) -> dict[str, Any]:
    return {"redis": url, "policy": TRIPS, "listeners": [events.append], "redis_timeout": 1.0, **OPTIONS[kind]}


def end_with_input() -> None:
    sys.stdin.read()
    over.set()


def sync(kind: str, url: str) -> None:
    """Calls from several threads."""
    breaker = CircuitBreaker("frozen", **options(kind, url))
    if kind == "watch":
        breaker.watch()

    def work() -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                breaker.call(fine)
                admitted.append(began)
            except CircuitOpenError:
                pass
            if kind != "strict":  # else its threads are always amid an exchange
                time.sleep(0.001)

    breaker.call(fine)
    threads = [threading.Thread(target=work) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    print("begun", flush=True)
    for thread in threads:
        thread.join()


async def asynchronous(kind: str, url: str) -> None:
    """Calls from several tasks."""
    breaker = AsyncCircuitBreaker("frozen", **options(kind, url))
    if kind == "async-watch":
        await breaker.watch()

    async def work() -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                await breaker.call(async_fine)
                admitted.append(began)
            except CircuitOpenError:
                pass
            await asyncio.sleep(0.001)

    await breaker.call(async_fine)
    print("begun", flush=True)
    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(work())
    await breaker.close()


if __name__ == "__main__":
    threading.Thread(target=end_with_input, daemon=True).start()
    kind, url = sys.argv[1:]
    if kind.startswith("async"):
        asyncio.run(asynchronous(kind, url))
    else:
        sync(kind, url)
    print(json.dumps({"outages": outages(events), "admitted": admitted}), flush=True)
