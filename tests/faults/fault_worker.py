"""A process under continuous load: calls one breaker from several threads or tasks, and keeps book of what they met.

Run as a program with one JSON argument. Lines on its standard input: "book" prints the books so far as JSON; "phase"
begins new books; "fail" and "work" say how the guarded function ends from now on; end of file ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import sys
import threading
import time
import traceback
from collections import Counter
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event, Policy

BROKEN_AFTER = 50


class Boom(Exception):
    """What the guarded function raises."""


class Books:
    """What the calls of one phase met. Small numbers only, so that a soak does not fill the memory itself."""

    def __init__(self) -> None:
        self.calls = self.ran = self.failed = self.rejected = self.slow = 0
        self.longest = 0.0
        self.unexpected: list[str] = []
        self.events: Counter[str] = Counter()
        self.running = self.ran_before_first_rejection = 0


class Worker:
    """The load of one process."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.books = Books()
        self.failing = bool(order.get("failing"))
        self.share = order.get("share", 0)
        self.stop = False
        self.lock = threading.Lock()
        self.broken = 0

    def note(self, event: Event) -> None:
        kind = f"{event.source}:{event.old}>{event.new}" if event.kind == "state_change" else event.kind
        with self.lock:
            self.books.events[kind] += 1

    def options(self) -> dict[str, Any]:
        return {
            "policy": Policy(**self.order.get("policy", {})),
            "listeners": [self.note],
            **self.order.get("options", {}),
        }

    def client(self, module: Any) -> Any:
        """A client as a user makes it, or the URL."""
        order = self.order
        if order.get("sentinels"):
            sentinel = module.sentinel.Sentinel([tuple(address) for address in order["sentinels"]])
            return sentinel.master_for("mymaster")
        if order.get("cluster"):
            host, port = order["cluster"]
            return module.RedisCluster(host, port)
        if order.get("plain"):
            host, port = order["plain"]
            return module.Redis(host, port)
        return order["url"]

    # What is guarded, and what comes of a call

    def work(self) -> int:
        with self.lock:
            books = self.books
            books.ran += 1
            if not books.rejected:
                books.ran_before_first_rejection += 1
            fails = self.failing or (self.share and books.ran % self.share == 0)
            books.failed += bool(fails)
        if fails:
            raise Boom
        return 1

    def met(self, began: float, error: BaseException | None) -> None:
        took = time.monotonic() - began
        with self.lock:
            books = self.books
            books.calls += 1
            books.longest = max(books.longest, took)
            books.slow += took > self.order["slow"]
            if isinstance(error, CircuitOpenError):
                books.rejected += 1
            elif error is not None and not isinstance(error, Boom):
                self.broken += 1
                if self.broken < BROKEN_AFTER:
                    books.unexpected.append("".join(traceback.format_exception(error)))

    # Shells

    def run_sync(self) -> None:
        self.breaker = CircuitBreaker(self.order["name"], redis=self.client(redis), **self.options())
        threads = [threading.Thread(target=self.call_sync, daemon=True) for _ in range(self.order["loads"])]
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            self.obey(line.strip(), self.breaker.snapshot().source)
        self.stop = True
        for thread in threads:
            thread.join(20)

    def call_sync(self) -> None:
        while not self.stop:
            began, error = time.monotonic(), None
            try:
                self.breaker.call(self.work)
            except BaseException as caught:
                error = caught
            self.met(began, error)
            time.sleep(self.order["pause"])

    async def run_async(self) -> None:
        breaker = AsyncCircuitBreaker(self.order["name"], redis=self.client(redis.asyncio), **self.options())
        tasks = [asyncio.create_task(self.call_async(breaker)) for _ in range(self.order["loads"])]
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            self.obey(line.strip(), (await breaker.snapshot()).source)
        self.stop = True
        await asyncio.gather(*tasks)

    async def call_async(self, breaker: AsyncCircuitBreaker) -> None:
        async def work() -> int:
            return self.work()

        while not self.stop:
            began, error = time.monotonic(), None
            try:
                await breaker.call(work)
            except BaseException as caught:
                error = caught
            self.met(began, error)
            await asyncio.sleep(self.order["pause"])

    # Orders

    def obey(self, order: str, source: str) -> None:
        with self.lock:
            if order == "phase":
                self.books = Books()
            elif order in ("fail", "work"):
                self.failing = order == "fail"
                self.books = Books()
            if order == "collect":
                gc.collect()
            books = {**vars(self.books), "source": source, "pid": os.getpid(), "memory": _memory_bytes()}
        print(json.dumps(books), flush=True)


def _memory_bytes() -> int:
    """What the process occupies now; at the most so far where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    worker = Worker(json.loads(sys.argv[1]))
    if worker.order.get("silent"):
        logging.disable()
    if worker.order["shell"] == "sync":
        worker.run_sync()
    else:
        asyncio.run(worker.run_async())
