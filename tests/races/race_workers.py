"""Worker processes for the race tests: a fleet of spawned processes, and the jobs that they run.

Spawned processes import this module by its name, so every job is a function at its top level. A job gets its
station first: its number, a barrier for all of this run, a stop signal, and a line to the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import sys
import threading
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import redis

import pybreaker_redis
from pybreaker_redis import CircuitBreaker, CircuitOpenError, Event, Permit, Policy

PATIENCE = 60.0  # seconds for what always happens, on however slow a machine
PARTIES = (2, 4, 8, 16)
PACKAGE = pathlib.Path(pybreaker_redis.__file__).parent
FIRM = {"redis_timeout": 30.0}  # a slow machine is no outage


class Boom(Exception):
    """What the guarded functions of these tests raise."""


def boom() -> None:
    raise Boom


def fine() -> int:
    return 1


def permit_or_none(breaker: CircuitBreaker) -> Permit | None:
    """A permit, or None where the breaker rejects."""
    try:
        return breaker.acquire()
    except CircuitOpenError:
        return None


def run_threads(count: int, work: Callable[[int], object]) -> None:
    """work(number) in count threads at once; raises the first exception of any of them."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def body(number: int) -> None:
        try:
            barrier.wait(PATIENCE)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def interrupted_at(line: int, work: Callable[[], object], other: Callable[[], object]) -> bool:
    """work(), with other() in a second thread before so many lines of this package; False where work() has fewer."""
    lines = itertools.count()
    others: list[threading.Thread] = []

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        if PACKAGE not in pathlib.Path(frame.f_code.co_filename).parents:
            return None
        if event == "line" and next(lines) == line:
            others.append(threading.Thread(target=other))
            others[0].start()
            others[0].join(0.02)  # not longer: it may need a lock that is held here
        return trace

    def traced(_: int) -> None:
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)

    run_threads(1, traced)
    for one in others:
        one.join(PATIENCE)
        assert not one.is_alive()
    return bool(others)


def signalled_at(
    place: int, module: types.ModuleType, work: Callable[[], object], handler: Callable[[], object]
) -> bool:
    """work(), with handler() at one of the places of a module where a signal may interrupt it; False beyond the last.

    Python handles signals when a function begins, after each call, and when a loop goes round.
    """
    places = itertools.count()
    reached: list[int] = []

    def pass_place() -> None:
        if next(places) == place:
            reached.append(place)
            handler()

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != module.__file__:
            return None
        names = [dis.opname[code] for code in frame.f_code.co_code]
        may_come = False

        def step(frame: types.FrameType, event: str, _: object) -> Any:
            nonlocal may_come
            frame.f_trace_opcodes = True  # each time: in Python 3.13 a call resets it
            if event == "opcode":
                if may_come:
                    pass_place()
                may_come = names[frame.f_lasti] in {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"}
            return step

        pass_place()
        return step

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return bool(reached)


def make_stale(breaker: CircuitBreaker, leases: float) -> None:
    """Let the view be as old as that many leases, without waiting for it."""
    view = breaker._view
    view.seen.sent = time.monotonic() - leases * view.lease
    view.seen.closed_until = view.seen.watched_until = view.seen.open_until = float("-inf")


class Exchanges:
    """Counts the exchanges of a breaker's link from now on. most: how many were under way together."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.began = self.ended = self.most = 0
        self._lock = threading.Lock()
        server: Any = breaker._redis
        self._exchange, server.exchange = server.exchange, self._counted

    def _counted(self, commands: Any) -> Any:
        with self._lock:
            self.began += 1
            self.most = max(self.most, self.began - self.ended)
        try:
            return self._exchange(commands)
        finally:
            with self._lock:
                self.ended += 1


@dataclasses.dataclass
class Station:
    """What a job has besides its arguments."""

    index: int
    barrier: Any
    stop: Any
    line: Connection

    def meet(self) -> None:
        """Wait for all workers of this run."""
        self.barrier.wait(PATIENCE)

    def send(self, what: Any) -> None:
        """A message to the test, before the job's result."""
        self.line.send(("message", what))

    def receive(self) -> Any:
        """Wait for a message of the test."""
        assert self.line.poll(PATIENCE), "the test says nothing"
        return self.line.recv()


class Fleet:
    """Worker processes that live over many tests and run one job after the other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pending: set[int] = set()
        context = multiprocessing.get_context("spawn")
        self.barriers = {parties: context.Barrier(parties) for parties in PARTIES if parties <= size}
        self.stop = context.Event()
        self.processes, self.lines = [], []
        for index in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(index, self.barriers, self.stop, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.lines.append(ours)

    def start(self, job: Callable[..., Any], count: int, *args: Any) -> None:
        """Let the first count workers run job(station, *args)."""
        self.stop.clear()
        if count in self.barriers:
            self.barriers[count].reset()
        self.pending.update(range(count))
        for line in self.lines[:count]:
            line.send((job.__name__, count, args))

    def message_of(self, index: int) -> Any:
        """The next message of one worker."""
        return self._receive(index, "message")

    def say(self, count: int, what: Any = "go") -> None:
        """A message to the first count workers."""
        for line in self.lines[:count]:
            line.send(what)

    def results(self, count: int) -> list[Any]:
        """What the jobs returned; raises what one of them raised."""
        return [self._receive(index, "returned") for index in range(count)]

    def run(self, job: Callable[..., Any], count: int, *args: Any) -> list[Any]:
        """start() and results()."""
        self.start(job, count, *args)
        return self.results(count)

    def _receive(self, index: int, expected: str) -> Any:
        assert self.lines[index].poll(PATIENCE), f"worker {index} does not answer"
        kind, value = self.lines[index].recv()
        if kind != "message":
            self.pending.discard(index)
        assert kind == expected, f"worker {index}: {value}"
        return value

    def renew(self) -> None:
        """After a test that failed half way: other processes for those that are still at it."""
        if self.pending:
            self.close()
            self.__init__(self.size)  # type: ignore[misc]

    def close(self) -> None:
        """End every process, by its id."""
        for index, (process, line) in enumerate(zip(self.processes, self.lines, strict=True)):
            if index in self.pending:
                process.kill()
            with contextlib.suppress(OSError):
                line.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def fleet_of(size: int) -> Iterator[Fleet]:
    """A fleet for a `with` block."""
    fleet = Fleet(size)
    try:
        yield fleet
    finally:
        fleet.stop.set()
        fleet.close()


def _serve(index: int, barriers: dict[int, Any], stop: Any, line: Connection) -> None:
    while (order := line.recv()) is not None:
        name, count, args = order
        station = Station(index, barriers.get(count), stop, line)
        try:
            line.send(("returned", globals()[name](station, *args)))
        except BaseException:
            if station.barrier is not None:
                station.barrier.abort()
            line.send(("raised", traceback.format_exc()))


# Jobs -----------------------------------------------------------------------------------------------


def fail_together(station: Station, url: str, names: list[str]) -> list[tuple[int, list[str]]]:
    """One failing call per breaker, all admitted before the first one fails; the transitions that this caller made."""
    made = []
    for name in names:
        events: list[Event] = []
        policy = Policy(failure_threshold=5, reset_timeout=60.0)
        breaker = CircuitBreaker(name, redis=url, policy=policy, lease=0, listeners=[events.append], **FIRM)

        def work() -> None:
            station.meet()
            raise Boom

        with contextlib.suppress(Boom):
            breaker.call(work)
        changes = [f"{event.old}>{event.new}" for event in events if event.kind == "state_change"]
        made.append((os.getpid(), changes))
    return made


def ask_together(station: Station, url: str, names: list[str], half_open_max_calls: int) -> list[Any]:
    """One request per breaker at the same moment; its slot, or the retry_after of its refusal."""
    answers: list[Any] = []
    for name in names:
        policy = Policy(half_open_max_calls=half_open_max_calls, probe_timeout=60.0, failure_threshold=1)
        breaker = CircuitBreaker(name, redis=url, policy=policy, **FIRM)
        breaker.snapshot()  # connects before the race
        station.meet()
        permit = None
        try:
            permit = breaker.acquire()
            answers.append(("slot", permit.probe))
        except CircuitOpenError as error:
            answers.append((error.state, error.retry_after))
        station.meet()  # every answer is in before a slot is given back
        if permit is not None:
            permit.release()
        station.meet()
    return answers


def hold_call(station: Station, url: str, name: str, options: dict[str, Any], policy: dict[str, Any]) -> Any:
    """One call that ends when the test says how: "success", "failure" or "release"."""
    breaker = CircuitBreaker(name, redis=url, policy=Policy(**policy), **options)
    permit = permit_or_none(breaker)
    station.send(permit and (permit.generation, permit.probe))
    outcome = station.receive()
    if isinstance(outcome, list):
        outcome = outcome[station.index]
    if permit is not None:
        getattr(permit, outcome)()
    breaker.flush()
    return breaker.snapshot().state


def probe_again_and_again(station: Station, url: str, name: str, policy: dict[str, Any], probes: int) -> list[Any]:
    """So many probes of any length and outcome, and a trip wherever it is closed; (generation, begin, end) of each.

    Begin and end lie within the time for which the slot is held, on a clock that all processes of a machine share.
    """
    breaker = CircuitBreaker(name, redis=url, policy=Policy(**policy), lease=0, **FIRM)
    chance, ran = random.Random(station.index), []
    deadline = time.monotonic() + PATIENCE
    station.meet()
    while len(ran) < probes:
        assert time.monotonic() < deadline, f"only {len(ran)} probes were admitted"
        permit = permit_or_none(breaker)
        if permit is None:
            continue
        if permit.probe is None:
            permit.failure()
            continue
        began = time.monotonic()
        time.sleep(chance.uniform(0, 0.004))
        ran.append((permit.generation, began, time.monotonic()))
        getattr(permit, chance.choice(["success", "success", "failure", "release", "release"]))()
    return ran


def poll_until_admitted(station: Station, url: str, name: str, policy: dict[str, Any]) -> tuple[int, Any, list[float]]:
    """Ask all the time until admitted; how many refusals, (slot, document) if admitted, each retry_after while open."""
    breaker = CircuitBreaker(name, redis=url, policy=Policy(**policy), lease=0, **FIRM)
    refusals, waits = 0, []
    deadline = time.monotonic() + PATIENCE
    with redis.Redis.from_url(url) as client:
        while time.monotonic() < deadline:
            try:
                permit = breaker.acquire()
            except CircuitOpenError as error:
                if station.stop.is_set():
                    return refusals, None, waits
                refusals += 1
                if error.state == "open":
                    waits.append(error.retry_after)
                continue
            document = json.loads(client.get(breaker.keys.state))
            station.stop.set()
            if permit.probe is not None:
                permit.success()
            return refusals, (permit.probe, document), waits
    raise AssertionError("never admitted")


def poll_until_admitted_after_trip(station: Station, url: str, name: str, policy: dict[str, Any]) -> Any:
    """poll_until_admitted() as soon as the test says that the breaker is open."""
    station.send("ready")
    station.receive()
    return poll_until_admitted(station, url, name, policy)


def succeed_until_rejected(station: Station, url: str, name: str, lease: float) -> tuple[int, str, float]:
    """Successful calls only, until one is rejected; how many ran, what the rejection said, and when it came."""
    breaker = CircuitBreaker(name, redis=url, lease=lease, **FIRM)
    ran = 0
    breaker.call(fine)
    station.send("warm")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            ran += breaker.call(fine)
        except CircuitOpenError as error:
            return ran, error.state, error.retry_after
    raise AssertionError("never rejected")


def load(station: Station, url: str, name: str, threads: int, share: int, options: dict[str, Any]) -> dict[str, Any]:
    """Calls from several threads, each share-th one failing, until the test stops it; what happened."""
    kinds: list[str] = []
    breaker = CircuitBreaker(
        name,
        redis=url,
        policy=Policy(failure_threshold=1_000_000_000),
        listeners=[lambda event: kinds.append(event.kind)] if share else (),
        # called for each outcome, which slows a load down: only where failures matter
        on_call=[lambda event: kinds.append(event.kind)] if share else (),
        **options,
    )
    breaker.call(fine)
    station.meet()
    station.send("running")
    began = time.monotonic()
    tally: list[tuple[int, int]] = []

    def work(number: int) -> None:
        ran = failed = 0
        deadline = began + PATIENCE
        while not station.stop.is_set() and time.monotonic() < deadline:
            ran += 1
            if share and ran % share == 0:
                failed += 1
                with contextlib.suppress(Boom):
                    breaker.call(boom)
            else:
                breaker.call(fine)
        tally.append((ran, failed))

    run_threads(threads, work)
    elapsed = time.monotonic() - began
    deadline = time.monotonic() + PATIENCE
    # another thread may notify of the return
    while breaker.snapshot().source != "redis" or kinds.count("redis_restored") < kinds.count("redis_error"):
        assert time.monotonic() < deadline, "Redis is back, but this breaker stays local"
        breaker.call(fine)
    breaker.flush()
    ran, failed = (sum(numbers) for numbers in zip(*tally, strict=True))
    return {"elapsed": elapsed, "ran": ran, "failed": failed, "kinds": Counter(kinds)}


def fixed_calls(station: Station, url: str, name: str, lease: float, threads: int, calls: int, share: int) -> int:
    """calls per thread, each share-th one failing, then a flush; how many failed."""
    breaker = CircuitBreaker(name, redis=url, policy=Policy(failure_threshold=1_000_000_000), lease=lease, **FIRM)
    breaker.snapshot()  # connects
    station.meet()

    def work(number: int) -> None:
        for call in range(1, calls + 1):
            if share and call % share == 0:
                with contextlib.suppress(Boom):
                    breaker.call(boom)
            else:
                breaker.call(fine)

    run_threads(threads, work)
    breaker.flush()
    return threads * (calls // share if share else 0)


def die_probing(url: str, name: str, policy: dict[str, Any], line: Connection) -> None:
    """The process ends with its probe running."""
    permit = CircuitBreaker(name, redis=url, policy=Policy(**policy), lease=0, **FIRM).acquire()
    line.send(permit.probe)
    os._exit(9)
