"""Processes under continuous load, sync and asyncio, and what every fault must leave as it was."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conftest import wait_until

PROGRAM = Path(__file__).parent / "fault_worker.py"
PATIENCE = 20.0
TIMEOUT = 0.5  # the breakers' redis_timeout
SLOW = 0.4  # a call that took this long has waited for a server
LOADS = 3
THRESHOLD = 5
POLICY = {"failure_threshold": THRESHOLD, "reset_timeout": 0.3, "probe_timeout": 5.0}


class Load:
    """One process under load."""

    def __init__(self, **order: Any) -> None:
        self.order = {
            "name": "loaded",
            "loads": LOADS,
            "pause": 0.002,
            "slow": SLOW,
            "policy": POLICY,
            **order,
            "options": {"redis_timeout": TIMEOUT, "lease": 0.05, **order.get("options", {})},
        }
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(self.order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.bad: list[str] = []
        self.pid = self._process.pid

    def say(self, order: str) -> dict[str, Any]:
        """Send an order; the books as they were, or as they begin."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n")
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        assert ready, f"the {self.order['shell']} worker does not answer"
        line = self._process.stdout.readline()
        assert line, f"the {self.order['shell']} worker has ended"
        books: dict[str, Any] = json.loads(line)
        self.bad += books["unexpected"]
        return books

    def until(self, condition: Callable[[dict[str, Any]], Any], timeout: float = PATIENCE) -> dict[str, Any]:
        """The books as soon as they fulfil the condition."""
        books: dict[str, Any] = {}

        def holds() -> bool:
            nonlocal books
            books = self.say("book")
            return bool(condition(books))

        try:
            wait_until(holds, timeout)
        except AssertionError as error:
            raise AssertionError(f"{self.order['shell']}: {error}: {books}") from error
        return books

    def close(self) -> None:
        """End the process, by its id."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Loads(list[Load]):
    """Several processes under load."""

    def say(self, order: str) -> list[dict[str, Any]]:
        return [load.say(order) for load in self]

    def until(self, condition: Callable[[dict[str, Any]], Any], timeout: float = PATIENCE) -> list[dict[str, Any]]:
        """The books of each, as soon as they fulfil the condition."""
        return [load.until(condition, timeout) for load in self]

    def check_no_surprise(self) -> None:
        """Nothing but CircuitOpenError and their own exception has reached a caller."""
        self.say("book")
        for load in self:
            assert load.bad == [], f"{load.order['shell']}: {load.bad[0]}"


@contextlib.contextmanager
def loads(*shells: str, **order: Any) -> Iterator[Loads]:
    """Processes under load by Redis' word, one for each shell, for a `with` block."""
    started = Loads()
    try:
        for shell in shells or ("sync", "async"):
            started.append(Load(shell=shell, **order))
        yield started
    finally:
        for load in started:
            load.close()


def shared(books: dict[str, Any]) -> bool:
    """Redis decides for this process, and calls go on."""
    return books["source"] == "redis" and books["calls"] > 20


def local(books: dict[str, Any]) -> bool:
    """The process decides for itself, and calls go on."""
    return books["source"] == "local" and books["calls"] > 20


def check_bounded(books: dict[str, Any], outages: int = 1) -> None:
    """Each thread or task has waited once for an outage at the most, and not much longer than the deadline."""
    assert books["slow"] <= outages * LOADS, books
    assert books["longest"] < TIMEOUT * 8, books


def check_outage(running: Loads, begin: Callable[[], Any], end: Callable[[], Any], *, waits: int = 1) -> None:
    """A fault from its beginning to its end, under load: what every one of them must leave as it was.

    waits: how often a thread may meet a deadline before its process knows.
    """
    running.until(shared)
    running.say("phase")
    begin()
    for books in running.until(lambda books: local(books) and "redis_error" in books["events"]):
        check_bounded(books, waits)
    # the dependency dies as well: each process cuts it off by itself
    running.say("fail")
    for books in running.until(lambda books: books["rejected"] > 20):
        # a thread may have taken along the successes of before, and be overtaken by the failures of the others: they
        # end that run of failures then, once
        assert books["ran_before_first_rejection"] <= 2 * THRESHOLD - 1 + LOADS - 1, books
        check_bounded(books, waits)  # those that were under way still wait for theirs
    running.say("work")
    end()
    for books in running.until(lambda books: books["source"] == "redis", 30):
        check_bounded(books, waits)
    check_shared_again(running)
    running.check_no_surprise()


def check_shared_again(running: Loads) -> None:
    """All calls run again; a trip of one process rejects in the others, and its recovery admits in them."""
    running.say("phase")
    running.until(lambda books: books["source"] == "redis" and books["ran"] > 20)
    running.say("phase")
    running[0].say("fail")
    for load in running:
        load.until(lambda books: books["rejected"] > 5)
    running[0].say("work")
    running.say("phase")
    running.until(lambda books: books["source"] == "redis" and books["ran"] > 20)
