"""The workers: processes that call the service under one of three guards, and count the outcomes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from time import monotonic
from typing import TypeAlias

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Event, Permit, Policy

from .plan import PAUSE, TICK

Acquire: TypeAlias = Callable[[], AbstractContextManager[Permit | None]]


@dataclasses.dataclass
class Tally:
    """The figures of one worker in one run. Times are of the monotonic clock, which all processes share.

    state: the state of the breaker at the last call. transitions: those that the worker was notified of, and when.
    calls_made: for each call, when it began and how it ended: "answered", "failed" or "rejected", probes with "probe "
    before it.
    """

    number: int
    pid: int
    calls: int = 0
    failed: int = 0
    rejected: int = 0
    probes: int = 0
    state: str = "-"
    rejecting_since: float | None = None
    answering_since: float | None = None
    transitions: list[tuple[float, Event]] = dataclasses.field(default_factory=list)
    calls_made: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    @property
    def admitted(self) -> int:
        """The calls that the breaker admitted."""
        return self.calls - self.rejected

    def notify(self, event: Event) -> None:
        """The breaker's listener."""
        if event.kind == "state_change":
            self.transitions.append((monotonic(), event))


def work(pipe: Connection, number: int, url: str, name: str, policy: Policy) -> None:
    """A worker's process. For each (guard, port) that it receives, it calls until the next message arrives."""
    with contextlib.suppress(EOFError, ConnectionError):  # the demo has ended
        while True:
            pipe.send(None)
            kind, port = pipe.recv()
            tally = Tally(number, os.getpid())
            acquire = _guard(kind, name, url, policy, tally)
            service = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
            _call_until_stopped(pipe, tally, acquire, functools.partial(_get, service, f"/{kind}/{number}"))


def _guard(kind: str, name: str, url: str, policy: Policy, tally: Tally) -> Acquire:
    if kind == "none":
        return contextlib.nullcontext
    shared = url if kind == "shared" else None
    return CircuitBreaker(name, redis=shared, policy=policy, listeners=[tally.notify], redis_timeout=1.0).acquire


def _call_until_stopped(pipe: Connection, tally: Tally, acquire: Acquire, get: Callable[[], None]) -> None:
    due = 0.0
    while not pipe.poll(random.uniform(0.5, 1.5) * PAUSE):
        _call(tally, acquire, get)
        if monotonic() >= due:
            due = monotonic() + TICK
            pipe.send(tally)
    pipe.recv()
    pipe.send(tally)


def _call(tally: Tally, acquire: Acquire, get: Callable[[], None]) -> None:
    tally.calls += 1
    began, probe = monotonic(), ""
    try:
        with acquire() as permit:
            if permit is not None:
                tally.probes += permit.probe is not None
                tally.state = "closed" if permit.probe is None else "half_open"
                probe = "" if permit.probe is None else "probe "
            get()
    except CircuitOpenError as error:
        ended = "rejected"
        tally.rejected += 1
        tally.state, tally.answering_since = error.state, None
        tally.rejecting_since = tally.rejecting_since or monotonic()
    except (OSError, http.client.HTTPException):
        ended = "failed"
        tally.failed += 1
        tally.answering_since = None
    else:
        ended = "answered"
        tally.answering_since = tally.answering_since or monotonic()
    tally.calls_made.append((began, probe + ended))


def _get(service: http.client.HTTPConnection, path: str) -> None:
    try:
        service.request("GET", path)
        with service.getresponse() as response:
            response.read()
            if response.status != 200:
                raise http.client.HTTPException(f"status {response.status}")
    except (OSError, http.client.HTTPException):
        service.close()
        raise
