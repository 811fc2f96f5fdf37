"""Does a healthy fleet stay closed, and how soon does a dead service trip it? A simulation on a virtual clock.

The view, the line and the link of every process are the real ones, and the server decides with the real state machine
(pybreaker_redis._memory). Only time, the network and the guarded service are simulated: a message takes 0.2 ms and a
random part of 0.2 ms more, one way; a call takes 5 ms.

    python benchmarks/fleet_sim.py             # the table, in about five minutes
    python benchmarks/fleet_sim.py --quick     # a tenth of the time
    python benchmarks/fleet_sim.py --only dead # the rows whose name contains this
    python benchmarks/fleet_sim.py --cost      # what 10,000 processes with 100 breakers each send
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import pathlib
import random
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pybreaker_redis import CircuitOpenError, Policy, _clock, _core, _line, _runner, _slow, _view
from pybreaker_redis._classify import FAILURE
from pybreaker_redis._core import BreakerCore
from pybreaker_redis._memory import MemoryEngine
from pybreaker_redis._permit import BasePermit
from pybreaker_redis._protocol import decode, encode
from pybreaker_redis._rules import Document
from pybreaker_redis._view import Verdict
from pybreaker_redis.wire import link as link_module
from pybreaker_redis.wire import outage
from pybreaker_redis.wire.commands import Command
from pybreaker_redis.wire.link import Link
from pybreaker_redis.wire.scripts import FLEET

RESULTS = pathlib.Path(__file__).parent / "results" / "fleet_sim.json"
START_MS = 1_700_000_000_000
ONE_WAY, JITTER, HOP, CALL = 0.0002, 0.0002, 0.00005, 0.005  # seconds
_CLOCKED = (_clock, _core, _runner, _line, _slow, _view, link_module, outage)  # the modules that read a clock


class World:
    """The clock, and what happens when."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.random = random.Random(seed)
        random.seed(seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for module in _CLOCKED:
            module.monotonic = lambda: self.now  # type: ignore[attr-defined]
        _core.address_of = id  # a process is its own client

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), action))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = until

    def delay(self) -> float:
        return ONE_WAY + self.random.random() * JITTER


class Server:
    """Redis: one engine for each breaker, and the processes that watch."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.engines: dict[bytes, MemoryEngine] = {}
        self.watchers: dict[bytes, list[BreakerCore]] = {}
        self.transitions: list[tuple[float, str, str]] = []
        self.scripts = self.reads = self.keys = self.pipelines = 0
        self._texts: dict[bytes, tuple[Document, bytes]] = {}

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        self.pipelines += 1
        return [self._execute(command) for command in commands]

    def _execute(self, command: Command) -> Any:
        if command.script:
            self.scripts += 1
            if command.script == FLEET:
                return 1
            return encode(self._engine(command.key).run(command.script, decode(command.words[-1])))
        if command.words[0] == b"MGET":
            self.reads += 1
            self.keys += len(command.words) - 1
            return [self._text(key) if place % 2 == 0 else None for place, key in enumerate(command.words[1:])]
        return []

    def _engine(self, key: bytes) -> MemoryEngine:
        engine = self.engines.get(key)
        if engine is None:
            clock = self.world
            engine = MemoryEngine(
                now_ms=lambda: START_MS + int(clock.now * 1000), publish=lambda message: self._publish(key, message)
            )
            self.engines[key] = engine
        return engine

    def _publish(self, key: bytes, message: dict[str, Any]) -> None:
        if "to" in message:
            self.transitions.append((self.world.now, message["from"], message["to"]))
        for breaker in self.watchers.get(key, ()):
            self.world.after(self.world.delay() + HOP, breaker._hinted)

    def _text(self, key: bytes) -> bytes | None:
        engine = self.engines.get(key)
        document = None if engine is None else engine._document
        if document is None:
            return None
        known = self._texts.get(key)
        if known is None or known[0] is not document:
            known = self._texts[key] = document, stored(document)
        return known[1]


def stored(document: Document) -> bytes:
    """The document as save() in lua/document.lua writes it; for an unhealthy breaker, with the same beginning."""
    text = (
        f'{{"state":"{document.state}","failure_count":{document.failure_count},'
        f'"success_count":{document.success_count},'
        f'"last_failure_time":{json.dumps(document.last_failure_time)},"opened_at":{json.dumps(document.opened_at)},'
        f'"version":1,"generation":{document.generation},"failure_number":{document.failure_number}'
    )
    other = {
        "trips": document.trips,
        "forced_until_ms": document.forced_until_ms,
        "open_until_ms": document.open_until_ms if document.state == "open" else None,
        "probes": document.probes,
        "closed_at_ms": document.closed_at_ms,
        "reporters": document.reporters,
    }
    for name, value in other.items():
        if value:
            text += f',"{name}":{json.dumps(value)}'
    window = document.window
    if window is None:
        return f"{text}}}".encode()
    past = ",".join(map(str, itertools.chain(*window.past)))
    return (
        f'{text},"window":{{"bucket_ms":{window.bucket_ms},"newest":{window.newest},"calls":{window.calls},'
        f'"failures":{window.failures},"slow":{window.slow},"past":"{past}"}}}}'
    ).encode()


class Process:
    """One process: its link, which stands for its client too, and its breakers."""

    def __init__(self, server: Server) -> None:
        self.server, self.world = server, server.world
        self.link = Link(0.25)
        self.address = "simulated"
        self.exchanges = 0
        self._running = self._scheduled = False
        self._waiting: list[Callable[[], None]] = []

    def soon(self, line: Any, urgent: bool = False) -> None:
        if self.link.need(line, urgent):
            self._schedule(HOP)

    def hint(self, line: Any) -> None:
        self.link.hint(line)
        self._schedule(HOP)

    def refreshed(self, then: Callable[[], None]) -> None:
        self._waiting.append(then)
        self.link.wanted = True
        self._schedule(0.0)

    def _schedule(self, seconds: float) -> None:
        if not self._running and not self._scheduled:
            self._scheduled = True
            self.world.after(seconds, self._exchange)

    def _exchange(self) -> None:
        self._scheduled = False
        if self._running:
            return
        self._running = True
        self.send(self.link.exchange(), self.server.execute, self._ended)

    def _ended(self, _: Any) -> None:
        self._running = False
        self.link.undelivered.clear()
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()
        if self.link.wanted:
            self._schedule(HOP)
        elif (pause := self.link.pause()) is not None:
            self.exchanges += 1
            self.world.after(pause, functools.partial(self._poll, self.exchanges))

    def _poll(self, exchange: int) -> None:
        """Look at what is due, unless there was an exchange in the meantime."""
        if exchange == self.exchanges and not self._running and not self._scheduled:
            self._exchange()

    def send(self, steps: Iterator[Any], perform: Callable[[Any], Any], then: Callable[[Any], None]) -> None:
        """Perform each step on the server; a step and its reply each take a network delay."""

        def advance(reply: Any) -> None:
            try:
                step = steps.send(reply)  # type: ignore[attr-defined]
            except StopIteration as end:
                then(end.value)
            except CircuitOpenError as rejection:
                then(rejection)
            else:
                self.world.after(self.world.delay(), lambda: arrive(step))

        def arrive(step: Any) -> None:
            reply = perform(step)
            self.world.after(self.world.delay(), lambda: advance(reply))

        advance(None)


KIND = types.SimpleNamespace(__name__="simulation", Redis=Process, RedisCluster=Process)


class Breaker(BreakerCore):
    """The breaker of one process. Its shell is the simulation: nothing blocks, each step happens at its time."""

    _kind, _permit_type = KIND, BasePermit
    _server_of = staticmethod(lambda client, _: client)

    def _deliver_events(self, events: list[Any]) -> None:
        events.clear()


class Fleet:
    """Processes that call one service through a breaker each, or several."""

    def __init__(
        self, seed: int, size: int, policy: Policy, *, breakers: int = 1, lease: float = 0.1, watch: bool = False
    ) -> None:
        self.world = World(seed)
        self.server = Server(self.world)
        self.calls = self.failed = self.rejected = 0
        self.oldest = 0.0  # the age of the oldest view that has decided, in seconds
        self.rejecting: set[int] = set()
        self.first_rejection: int | None = None  # failures before it
        self.processes = [Process(self.server) for _ in range(size)]
        self.breakers = [
            [Breaker(f"service-{number}", redis=process, policy=policy, lease=lease) for number in range(breakers)]
            for process in self.processes
        ]
        if watch:
            for breaker in itertools.chain(*self.breakers):
                self.server.watchers.setdefault(breaker.keys.state.encode(), []).append(breaker)

    def load(self, number: int, per_second: float, fails: Callable[[], bool], breaker: int = 0) -> None:
        """Let one process call its breaker so often, at times that vary by a tenth."""
        world, one = self.world, self.breakers[number][breaker]

        def again() -> None:
            self.call(number, one, fails())
            world.after(world.random.uniform(0.9, 1.1) / per_second, again)

        world.after(world.random.random() / per_second, again)

    def call(self, number: int, breaker: Breaker, fails: bool) -> None:
        """One call: admitted or rejected now, or after it has waited; its outcome follows 5 ms later."""
        began = self.world.now
        self.calls += 1

        def consult(refreshed: bool = False) -> None:
            seen = breaker._view.seen
            try:
                answer = breaker._consult(began, refreshed)
            except CircuitOpenError as rejection:
                return decided(rejection)
            if answer is Verdict.WAIT:
                return process.refreshed(lambda: consult(True))
            if answer is Verdict.ASK:
                return process.send(breaker._ask(), execute, decided)
            self.oldest = max(self.oldest, began - seen.sent) if seen.sent > 0 and not refreshed else self.oldest
            decided(answer)

        def decided(answer: Any) -> None:
            breaker._notices.take()
            if isinstance(answer, CircuitOpenError):
                self.rejected += 1
                self.rejecting.add(number)
                if self.first_rejection is None:
                    self.first_rejection = self.failed
            else:
                self.world.after(CALL, lambda: ended(answer))

        def ended(permit: Any) -> None:
            self.failed += fails
            steps = breaker._report(permit, FAILURE if fails else "success")
            if steps is not None:
                process.send(steps, execute, lambda _: None)

        def execute(ask: Any) -> Any:
            key = breaker.keys.state.encode()
            self.server.pipelines += 1
            return decode(self.server._execute(Command(key, (encode(ask.request),), ask.name)))

        process = self.processes[number]
        consult()

    def trips(self) -> int:
        return sum(new == "open" and old == "closed" for _, old, new in self.server.transitions)


ROWS: list[tuple[str, str, Callable[[float], tuple[bool, str]]]] = []


def row(name: str, must: str) -> Callable[[Callable[[float], tuple[bool, str]]], Callable[[float], tuple[bool, str]]]:
    """Add a row to the table. Its function takes a factor for the simulated time, and returns what it measured."""

    def add(measure: Callable[[float], tuple[bool, str]]) -> Callable[[float], tuple[bool, str]]:
        ROWS.append((name, must, measure))
        return measure

    return add


def with_share(world: World, share: float) -> Callable[[], bool]:
    return lambda: world.random.random() < share


def summary(fleet: Fleet, seconds: float, processes: int) -> str:
    server = fleet.server
    return (
        f"{fleet.trips()} trips, {fleet.rejected / max(fleet.calls, 1):.2%} of {fleet.calls:,} calls rejected;"
        f" per second {server.pipelines / seconds:,.0f} exchanges, {server.scripts / seconds:,.0f} scripts,"
        f" {server.reads / seconds:,.0f} reads; oldest view {fleet.oldest * 1000:.0f} ms"
    )


def spread(size: int, per_second: float, share: float, seconds: float, **options: Any) -> tuple[bool, str]:
    """A fleet whose failures are spread over it."""
    fleet = Fleet(1, size, Policy(**options.pop("policy", {})), **options)
    for number in range(size):
        fleet.load(number, per_second, with_share(fleet.world, share))
    fleet.world.run(seconds)
    return fleet.trips() == 0 and fleet.oldest <= 0.2, summary(fleet, seconds, size)


def one_bad(healthy: int, bad_per_second: float, seconds: float, seed: int = 1, **options: Any) -> tuple[bool, str]:
    """A fleet in which one process fails at every call."""
    policy = Policy(**{"failure_threshold": 5, "reset_timeout": 2.0, **options.pop("policy", {})})
    fleet = Fleet(seed, healthy + 1, policy, **options)
    for number in range(healthy):
        fleet.load(number, 50.0, lambda: False)
    fleet.world.run(0.5)
    fleet.load(healthy, bad_per_second, lambda: True)
    fleet.world.run(seconds)
    return fleet.trips() == 0, summary(fleet, seconds, healthy + 1)


def dead(size: int, per_second: float, seconds: float, most: int, threshold: int = 5) -> tuple[bool, str]:
    """A service that dies for all processes at one moment."""
    dies = [False]
    fleet = Fleet(1, size, Policy(failure_threshold=threshold, reset_timeout=30.0))
    for number in range(size):
        fleet.load(number, per_second, lambda: dies[0])
    fleet.world.run(3.0)
    dies[0] = True
    fleet.world.run(seconds)
    first = fleet.first_rejection
    return first is not None and first <= most, f"{first} failures before the first rejection, {fleet.failed} in all"


def recovering(size: int, seconds: float) -> tuple[bool, str]:
    """A service that is dead for three seconds."""
    dies = [False]
    fleet = Fleet(1, size, Policy(failure_threshold=5, reset_timeout=1.0))
    for number in range(size):
        fleet.load(number, 10.0, lambda: dies[0])
    fleet.world.run(2.0)
    dies[0], died = True, fleet.world.now
    fleet.world.run(3.0)
    dies[0], repaired = False, fleet.world.now
    fleet.world.run(seconds)
    closed = next((at for at, _, new in fleet.server.transitions if new == "closed" and at > repaired), None)
    tripped = next((at for at, _, new in fleet.server.transitions if new == "open"), 0.0)
    late = f"closed {closed - repaired:.2f} s after the repair" if closed else "never closed"
    return (
        closed is not None and closed - repaired < 2.0 and fleet.trips() == 1,
        f"open {tripped - died:.2f} s after the failure, {late}; {fleet.failed} failed, {fleet.rejected} rejected",
    )


@row("healthy, 100 x 10/s", "0 trips")
def _(factor: float) -> tuple[bool, str]:
    return spread(100, 10.0, 0.0, 30.0 * factor)


@row("spread failures, 100 x 10/s at 3 %", "0 trips")
def _(factor: float) -> tuple[bool, str]:
    return spread(100, 10.0, 0.03, 120.0 * factor)


@row("spread failures, 1,000 x 10/s at 1 %", "0 trips")
def _(factor: float) -> tuple[bool, str]:
    return spread(1000, 10.0, 0.01, 30.0 * factor)


@row("spread failures, 1,000 x 10/s at 3 %", "0 trips")
def _(factor: float) -> tuple[bool, str]:
    return spread(1000, 10.0, 0.03, 30.0 * factor)


for _healthy, _rate, _watch in itertools.product((8, 30), (10.0, 50.0), (False, True)):
    if _rate == 50.0 and not _watch:
        continue  # documented: one process that fails that fast trips a fleet that does not watch

    @row(f"one bad at {_rate:.0f}/s, {_healthy} healthy x 50/s{', watching' * _watch}", "0 trips")
    def _(factor: float, healthy: int = _healthy, rate: float = _rate, watch: bool = _watch) -> tuple[bool, str]:
        return one_bad(healthy, rate, 120.0 * factor, watch=watch)


@row("one bad at 10/s, 8 healthy x 50/s, error rate 0.5 alone", "0 trips")
def _(factor: float) -> tuple[bool, str]:
    return one_bad(8, 10.0, 60.0 * factor, policy={"failure_threshold": 10**9, "error_rate_threshold": 0.5})


@row("dead service, 128 x 1/s, threshold 5", "<= 8 failures")
def _(factor: float) -> tuple[bool, str]:
    return dead(128, 1.0, 2.0, 8)


@row("dead service, 128 x 50/s, threshold 5", "<= 140 failures")
def _(factor: float) -> tuple[bool, str]:
    return dead(128, 50.0, 2.0, 140)


@row("recovering service, 100 x 10/s", "1 trip, closed within 2 s")
def _(factor: float) -> tuple[bool, str]:
    return recovering(100, 5.0)


def cost(processes: int, breakers: int, per_second: float, lease: float, seconds: float) -> str:
    """What a healthy fleet sends."""
    fleet = Fleet(1, processes, Policy(), breakers=breakers, lease=lease)
    for number, breaker in itertools.product(range(processes), range(breakers)):
        fleet.load(number, per_second, lambda: False, breaker)
    fleet.world.run(2.0)
    server = fleet.server
    server.scripts = server.reads = server.keys = server.pipelines = 0
    fleet.oldest = 0.0
    fleet.world.run(seconds)
    exchanges, keys = server.pipelines / seconds, server.keys / seconds
    return (
        f"{processes:,} x {breakers}, lease {lease:g} s: {exchanges / processes:.1f} exchanges/s and"
        f" {keys / processes:,.0f} keys/s of each process; in all {exchanges:,.0f} exchanges, {keys:,.0f} keys and"
        f" {server.scripts / seconds:,.0f} scripts/s; oldest view {fleet.oldest * 1000:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="simulate a tenth of the time")
    parser.add_argument("--only", default="", help="the rows whose name contains this")
    parser.add_argument("--cost", action="store_true", help="only what large healthy fleets send")
    given = parser.parse_args()
    if given.cost:
        for size, breakers in ((10, 1), (10_000, 1), (10, 100), (1_000, 100)):
            for lease in (0.1, 1.0):
                print(cost(size, breakers, 1.0, lease, 3.0), flush=True)
        print("10,000 x 100 is ten times 1,000 x 100: the processes of a healthy fleet do not affect each other")
        return
    found = []
    for name, must, measure in ROWS:
        if given.only in name:
            met, measured = measure(0.1 if given.quick else 1.0)
            found.append({"measure": name, "must": must, "measured": measured, "met": met})
            print(f"{'ok  ' if met else 'MISS'} {name} | {must} | {measured}", flush=True)
    if not given.only and not given.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
