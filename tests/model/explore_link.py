"""An explicit-state search over the client: every order in which threads, messages, timers and outages can interleave.

The view, the line, the link and the decisions of every process are the real ones, on a virtual clock, and the real
in-memory engine answers for Redis. Only the shell is simulated: what a thread does until it sends something or waits is
one step, and so is each message that is executed, answered or lost. The real objects cannot be copied, so a state is
reached by repeating the choices that led to it. A state whose fingerprint was seen is not entered again.

The steps:
  call       a thread calls through a breaker; it is admitted, rejected, asks for a permit, or waits for a refresh
  succeed    its call ends with a success; fail: with a failure
  work       the background thread begins an exchange
  execute    Redis executes what is under way: a pipeline of the link, or the script of a thread; arrive: it is answered
  break      a connection breaks, before or after Redis has executed what was sent
  time out   an answer is overdue; late: Redis executes it after its sender has given up
  hint       a notification arrives, is lost, or arrives twice
  refuse     Redis refuses writes and still answers reads; accept: it takes writes again
  reset      an operator resets
  interrupt  a step of another thread comes in between, just after a thread has taken the gathered successes
  time       the clock advances to the next moment at which something ends or is due
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import logging
import math
import random
import sys
import time
import types
from collections.abc import Generator, Iterator
from typing import Any

import redis
from fleet_sim import stored

from pybreaker_redis import CircuitOpenError, Policy, _clock, _core, _line, _memory, _rules, _runner, _view
from pybreaker_redis._classify import FAILURE, SUCCESS
from pybreaker_redis._core import BreakerCore
from pybreaker_redis._events import Notices
from pybreaker_redis._memory import MemoryEngine
from pybreaker_redis._permit import BasePermit
from pybreaker_redis._protocol import decode, encode
from pybreaker_redis._view import JUST_NOW, Seen, Successes, Verdict, View
from pybreaker_redis.wire import commands as build
from pybreaker_redis.wire import link as link_module
from pybreaker_redis.wire import listing
from pybreaker_redis.wire import outage as outage_module
from pybreaker_redis.wire.commands import Command
from pybreaker_redis.wire.link import IDLE, Link
from pybreaker_redis.wire.outage import FIRST_PAUSE, Outage
from pybreaker_redis.wire.scripts import FLEET

START_MS = 1_700_000_000_000
LEASE, TIMEOUT = 0.125, 0.25  # binary fractions: sums of times are exact
STEPS_OF_CLOCK = 1024  # in a second
INSTANT = 2.0**-30  # seconds
NEVER = float("-inf")
_CLOCKED = (_clock, _core, _runner, _line, _view, link_module, outage_module)
LEGAL = {
    ("closed", "open"): {"failure_threshold", "error_rate", "slow_rate"},
    ("open", "half_open"): {"timeout"},
    ("half_open", "open"): {"probe_failed", "probe_slow"},
    ("half_open", "closed"): {"probe_succeeded"},
}
Choice = tuple[Any, ...]


class Broken(AssertionError):
    """An invariant does not hold. path: the choices that lead there."""

    path: list[Choice]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What there is, and how often each step may be taken. warm: each process has called each breaker before."""

    processes: int = 2
    threads: int = 2
    breakers: int = 1
    watch: bool = True
    warm: bool = True
    calls: int = 3
    failures: int = 2
    times: int = 2
    breaks: int = 0
    late: int = 0
    refusals: int = 0
    resets: int = 0
    lost_hints: int = 0
    repeated_hints: int = 0
    interrupts: int = 0
    begins_open: bool = False
    policy: tuple[tuple[str, Any], ...] = (("failure_threshold", 3), ("reset_timeout", 0.5), ("probe_timeout", 0.5))


class Still:
    """Stands in for the module random: always the middle."""

    @staticmethod
    def uniform(low: float, high: float) -> float:
        return (low + high) / 2

    @staticmethod
    def random() -> float:
        return 0.5


_world: World


@contextlib.contextmanager
def virtual_time() -> Iterator[None]:
    """The clock and the chance of the client are those of the world that was made last."""
    kept = [(module, "monotonic", module.monotonic) for module in _CLOCKED]
    kept += [(module, "random", module.random) for module in (_line, _view, outage_module, listing)]
    kept += [
        (_memory, "clock_ms", _memory.clock_ms),
        (_runner, "clock_ms", _runner.clock_ms),
        (_runner, "View", _runner.View),
    ]
    kept.append((_core, "Notices", _core.Notices))
    kept += [(_rules, "_local_generations", _rules._local_generations), (_core, "address_of", _core.address_of)]
    level = logging.getLogger("pybreaker_redis").level
    try:
        for module in _CLOCKED:
            module.monotonic = lambda: getattr(_world, "now", 0.0)  # type: ignore[attr-defined]
        for module in (_line, _view, outage_module, listing):
            module.random = Still  # type: ignore[attr-defined]
        _memory.clock_ms = _runner.clock_ms = lambda: _world.now_ms()
        _runner.View = TrueView  # type: ignore[misc]
        _core.Notices = OpenNotices  # type: ignore[misc]
        _core.address_of = id  # a process is its own client
        logging.getLogger("pybreaker_redis").setLevel(logging.CRITICAL + 1)
        yield
    finally:
        logging.getLogger("pybreaker_redis").setLevel(level)
        for module, name, value in kept:
            setattr(module, name, value)


# The truth about outcomes, which the client cannot know ----------------------------------------------


@dataclasses.dataclass(eq=False)
class Success:
    """A gathered success. ended: when, as a number of the world's order of events. at: the same on the clock."""

    ended: int
    at: float
    counted: int = 0


@dataclasses.dataclass(eq=False)
class Failure:
    """A failed call. counted: when Redis has counted it; 0 if it has not."""

    process: int
    ended: int
    counted: int = 0
    in_redis: int = 0
    here: int = 0
    fate: str = ""


@dataclasses.dataclass(eq=False)
class Taken:
    """Successes that were taken for a report. fate: what became of it; empty while it is under way."""

    process: int
    generation: int
    successes: list[Success]
    fate: str = ""
    given_up: bool = False


class OpenNotices(Notices):
    """Notices whose methods an instance may replace: unlike those of the package, it has a dictionary."""


class TrueView(View):
    """The real view, beside which the world notes each success that it gathers. A report carries the note's number."""

    process: int

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.gathered_truly: dict[Successes, list[Success]] = collections.defaultdict(list)
        self.process = _world.making

    def ticked(self, counter: Successes) -> None:
        self.gathered_truly[counter].append(Success(_world.event(), _world.now))

    def gather(self, generation: int) -> bool:
        counter = self.seen.counter
        gathered = super().gather(generation)
        if gathered:
            self.ticked(counter)
        return gathered

    def take(self, generation: int | None = None, shared: bool = True, as_it_ends: bool = False) -> dict[str, Any]:
        request, counter = super().take(generation, shared, as_it_ends), self.seen.counter
        if number := request.get("successes", 0):
            gathered = self.gathered_truly[counter]
            if number > len(gathered):
                raise Broken(f"{number} successes are reported, and only {len(gathered)} ended")
            taken, gathered[:] = gathered[:number], gathered[number:]
            request["_taken"] = _world.note(Taken(self.process, request["generation"], taken))
            if shared and "seen_failure" not in request and _world.now - taken[-1].at > JUST_NOW + 0.001:
                raise Broken("a late report does not say which failures it comes after")
        _world.interrupted(self.process)
        return request

    def give_back(self, request: dict[str, Any]) -> None:
        super().give_back(request)
        if "_taken" in request:
            taken = _world.taken[request["_taken"]]
            if request["generation"] == self.seen.generation:
                gathered = self.gathered_truly[self.seen.counter]
                gathered[:] = [*taken.successes, *gathered]
                taken.fate = "given back"
            else:
                taken.fate = "generation ended"


# Redis -----------------------------------------------------------------------------------------------


class Redis:
    """The server: one engine for each breaker. Checks each execution."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.engines: dict[bytes, MemoryEngine] = {}
        self.refuses = False
        self.failures: dict[tuple[bytes, int, int], Failure] = {}
        self.executions = 0
        self.ends: dict[tuple[bytes, int], float] = {}  # when an open generation ends

    def engine(self, key: bytes) -> MemoryEngine:
        if key not in self.engines:
            self.engines[key] = MemoryEngine(
                now_ms=self.world.now_ms, publish=lambda message: self.world.published(key, message)
            )
        return self.engines[key]

    def document(self, key: bytes) -> Any:
        return self.engine(key)._document

    def text(self, key: bytes) -> bytes | None:
        document = self.document(key)
        return None if document is None else stored(document)

    def execute(self, message: Message) -> list[Any]:
        self.executions += 1
        return [self._execute(command, message) for command in message.commands]

    def _execute(self, command: Command, message: Message) -> Any:
        if command.script:
            if self.refuses:
                return redis.exceptions.OutOfMemoryError("OOM command not allowed when used memory > 'maxmemory'.")
            if command.script == FLEET:
                return 1
            return encode(self.run(command.key, command.script, decode(command.words[-1]), message))
        if command.words[0] == b"MGET":
            return [self.text(key) if place % 2 == 0 else None for place, key in enumerate(command.words[1:])]
        name = command.key.decode().removeprefix("{").partition("}")[0].encode()
        return [
            (b"0-0", [part for pair in entry.items() for part in (pair[0].encode(), str(pair[1]).encode())])
            for entry in self.engine(name).history(10)
        ]

    def run(self, key: bytes, script: str, request: dict[str, Any], message: Message) -> dict[str, Any]:
        before = self.document(key)
        counts = (
            before is not None
            and before.state == "closed"
            and before.forced is None
            and request.get("generation") == before.generation
            and request.get("probe") is None
        )
        if "_taken" in request and "successes" not in request:  # left out: of a local generation
            self.world.taken[request["_taken"]].fate = "generation ended"
        elif "_taken" in request:
            taken = self.world.taken[request["_taken"]]
            self.world.check_executed(taken)
            if taken.generation != request.get("generation"):
                raise Broken("successes are reported under another generation than theirs")
            if counts:
                self._check_successes(key, before, request)
        failure = message.failure if request.get("failures") else None
        if failure is not None:
            failure.in_redis += 1
            if failure.in_redis > 1:
                raise Broken("a failure is counted twice")
        reply = self.engine(key).run(script, request)
        after = self.document(key)
        if failure is not None:
            failure.fate = "executed"
            if counts and after.state == "closed":
                failure.counted = self.world.event()
                self.failures[key, after.generation, after.failure_number] = failure
        if change := reply.get("transition"):
            self._check_transition(before, change, reply, request)
        if after is not None:
            self._check_document(key, after)
        if script == "acquire" and not reply["admitted"] and reply["state"] == "half_open":
            self._check_refusal(key, message)
        return reply

    def _check_successes(self, key: bytes, before: Any, request: dict[str, Any]) -> None:
        """Gathered successes end no failure that came later."""
        number, count, taken = before.failure_number, before.failure_count, self.world.taken[request["_taken"]]
        left = min(count, number - min(request.get("seen_failure", number), number))
        newest = taken.successes[-1].ended
        for one in range(number - count + 1, number - left + 1):
            failure = self.failures[key, before.generation, one]
            if "seen_failure" in request:
                if failure.counted > newest:
                    raise Broken(f"a success ended a later failure: {request}")
            elif failure.process == taken.process and failure.ended > newest and not taken.given_up:
                raise Broken(f"a success ended a later failure of its own process: {request}")

    def _check_transition(self, before: Any, change: dict[str, Any], reply: Any, request: dict[str, Any]) -> None:
        old = "closed" if before is None else before.state
        if change["from"] != old or change["to"] != reply["state"]:
            raise Broken(f"a transition that does not fit its states: {change}")
        if request.get("action") != "reset" and change["reason"] not in LEGAL.get((change["from"], change["to"]), ()):
            raise Broken(f"an illegal transition: {change}")
        if not change["generation"] == reply["generation"] > (before.generation if before is not None else 0):
            raise Broken(f"a generation that does not grow: {change}")
        self.world.transitions[f"{change['from']} > {change['to']}"] += 1

    def _check_document(self, key: bytes, document: Any) -> None:
        now = self.world.now_ms()
        live = [end for end in document.probes.values() if end > now]
        if len(live) > self.world.policy.half_open_max_calls:
            raise Broken(f"{len(live)} live probes")
        if document.state == "open":
            self.ends[key, document.generation] = (document.open_until_ms - START_MS) / 1000

    def _check_refusal(self, key: bytes, message: Message) -> None:
        """A process whose call was refused asks no more for a lease, unless something has changed."""
        process, now = self.world.processes[message.process], self.world.now_ms()
        document = self.document(key)
        known = (document.generation, tuple(document.probes))
        for sent, then, end in process.refusals[key]:
            if then == known and message.view == sent and message.sent < sent + LEASE and now < end:
                raise Broken("a refused process asks again within its lease")
        message.refusal = key, known, min(document.probes.values())


# Messages and threads --------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Message:
    """Commands under way. replies: their answers, once Redis has executed them."""

    process: int
    commands: list[Command]
    sent: float
    order: int
    failure: Failure | None = None
    replies: list[Any] | None = None
    refusal: tuple[bytes, Any, int] | None = None
    retries: set[bytes | None] = dataclasses.field(default_factory=set)  # the server (None), or breakers by key
    view: float = NEVER  # when the view was asked for that its sender had


class Actor:
    """A thread: of the process's calls, or the one in the background. before: the refreshes when it began to wait."""

    def __init__(self, process: Process, number: int) -> None:
        self.process, self.number = process, number
        self.message: Message | None = None
        self.before: int | None = None
        self.until = 0.0

    def waits(self) -> bool:
        return self.before is not None

    def wait(self) -> None:
        self.before, self.until = self.process.refreshes, self.process.world.now + TIMEOUT

    def send(self, commands: list[Command], failure: Failure | None = None) -> None:
        world = self.process.world
        self.message = Message(self.process.number, commands, world.now, world.event(), failure)
        self.process.sent += 1
        self.process.check_sending(self.message, self is self.process.holder)

    def holds(self) -> bool:
        return self.process.holder is self

    def begin_exchange(self) -> None:
        self.process.holder = self
        self.process.exchange = self.process.link.exchange()
        self.advance_exchange(None)

    def advance_exchange(self, replies: Any) -> None:
        process = self.process
        assert process.exchange is not None
        try:
            step = process.exchange.send(replies)
        except StopIteration:
            process.exchange = process.holder = None
            process.refreshes += 1
            process.link.undelivered.clear()
            self.exchanged()
        else:
            self.send(list(step))

    def exchanged(self) -> None:
        """The exchange has ended, whoever carried it out, or was waited for too long."""
        raise NotImplementedError

    def received(self, replies: Any, error: BaseException | None) -> None:
        message, self.message = self.message, None
        assert message is not None
        self.advance_exchange(replies if error is None else [error] * len(message.commands))  # as the server does


class Worker(Actor):
    """wire.sync.Worker: awake: it was woken. at: when its pause is over; None while it has no thread."""

    def __init__(self, process: Process) -> None:
        super().__init__(process, -1)
        self.awake = False
        self.at: float | None = None

    def is_due(self) -> bool:
        free = self.message is None and not self.waits() and not self.holds()
        return free and (self.awake or (self.at is not None and self.process.world.now >= self.at))

    def work(self) -> None:
        self.awake = False
        if self.process.holder is None:
            self.begin_exchange()
        else:
            self.wait()

    def resumes(self) -> None:
        """The lock is free, or was waited for too long."""
        before, self.before = self.before, None
        if self.process.holder is None and before == self.process.refreshes:
            self.begin_exchange()
        else:
            self.exchanged()

    def exchanged(self) -> None:
        pause = self.process.link.pause()
        self.at = None if pause is None else self.process.world.now + pause


class Caller(Actor):
    """A thread that calls through the breakers, as _sync does."""

    def __init__(self, process: Process, number: int) -> None:
        super().__init__(process, number)
        self.stage = "idle"
        self.breaker: Breaker | None = None
        self.began = 0.0
        self.permit: Any = None
        self.seen: Seen | None = None
        self.steps: Generator[Any, Any, Any] | None = None
        self.ask: Any = None
        self.failure: Failure | None = None

    def call(self, breaker: Breaker) -> None:
        view, now = breaker._view, self.process.world.now
        seen = view.seen
        self.breaker, self.began, self.stage = breaker, now, "deciding"
        if now < seen.closed_until:
            breaker.check_decision(self, seen, now)
            self.seen, self.permit, self.stage = seen, None, "running"
        elif now < seen.open_until:
            breaker.check_decision(self, seen, now)
            breaker._notices.count("rejected")
            self.end()
        elif now < seen.watched_until:
            breaker.check_decision(self, seen, now)
            self.running(breaker._admitted(seen.generation))
        else:
            self.consult()

    def consult(self, refreshed: bool = False) -> None:
        breaker = self.breaker
        assert breaker is not None
        seen, asking = breaker._view.seen, breaker._asking
        try:
            answer = breaker._consult(self.began, refreshed)
        except CircuitOpenError:
            if not (asking and seen.verdict(self.process.world.now) is Verdict.ASK):
                breaker.check_decision(self, breaker._view.seen, self.began, refreshed)
            return self.end()
        if answer is Verdict.WAIT:
            self.stage = "refreshing"
            if self.process.holder is None:
                self.process.link.wanted = True
                return self.begin_exchange()
            return self.wait()
        if answer is Verdict.ASK:
            self.stage = "asking"
            self.drive(breaker._ask())
            if breaker._asking > breaker._view.policy.half_open_max_calls:
                raise Broken("more calls of a process ask than there can be probes")
            return None
        breaker.check_decision(self, breaker._view.seen, self.began, refreshed)
        self.running(answer)
        return None

    def running(self, permit: Any) -> None:
        self.seen, self.permit, self.stage = None, permit, "running"

    def succeed(self) -> None:
        breaker = self.breaker
        assert breaker is not None
        if self.permit is None:
            assert self.seen is not None
            self.seen.tick()
            breaker._view.ticked(self.seen.counter)
            self.end()
        else:
            self.report(SUCCESS)

    def fail(self) -> None:
        world = self.process.world
        self.failure = Failure(self.process.number, world.event())
        world.failures.append(self.failure)
        if self.permit is None:
            assert self.seen is not None
            self.permit = BasePermit(self.breaker, self.seen.generation, self.began)
        self.report(FAILURE)

    def report(self, outcome: Any) -> None:
        breaker = self.breaker
        assert breaker is not None
        self.stage = "reporting"
        permit, self.permit, self.seen = self.permit, None, None
        self.process.active = self
        if permit.generation is None and self.failure is not None:
            self.failure.fate = "counts for nothing"
        steps = breaker._report(permit, outcome)
        if steps is None:
            self.end()
        else:
            self.drive(steps)

    def drive(self, steps: Generator[Any, Any, Any]) -> None:
        self.steps = steps
        self.advance(None, None)

    def advance(self, reply: Any, error: BaseException | None) -> None:
        assert self.steps is not None
        self.process.active = self
        try:
            ask = self.steps.send(reply) if error is None else self.steps.throw(error)
        except StopIteration as end:
            self.steps = None
            if self.stage == "asking":
                self.running(end.value)
            else:
                self.end()
        except CircuitOpenError:
            self.steps = None
            self.end()
        else:
            self.perform(ask)

    def perform(self, ask: Any) -> None:
        """_sync._run_script."""
        assert self.breaker is not None
        _, request = ask
        if self.failure is not None and "failures" not in request:
            self.failure.fate = "generation ended"  # of a local engine
        if "failures" in request and self.process.link.is_reporting(self.breaker._line):
            self.ask = ask
            self.wait()
        else:
            self.send_ask(ask)

    def send_ask(self, ask: Any) -> None:
        assert self.breaker is not None
        name, request = ask
        failure = self.failure if "failures" in request else None
        self.send([build.run(name, self.breaker._key, request)], failure)
        assert self.message is not None
        self.message.view = self.breaker._view.seen.sent

    def resumes(self) -> None:
        before, self.before = self.before, None
        if self.ask is not None:  # wait_for_reports
            ask, self.ask = self.ask, None
            outage = self.process.link.outage(self.breaker._line)
            error = outage and outage.error
            if error is None:
                self.send_ask(ask)
            else:
                if self.failure is not None and "_taken" in ask[1]:
                    self.process.world.taken[ask[1]["_taken"]].fate = "down"
                self.advance(None, error)
        elif self.process.holder is None and (before == self.process.refreshes or self.process.link.wanted):
            self.process.link.wanted = True
            self.begin_exchange()
        else:
            self.exchanged()

    def exchanged(self) -> None:
        self.consult(refreshed=True)

    def received(self, replies: Any, error: BaseException | None) -> None:
        if self.holds():
            return super().received(replies, error)
        message, self.message = self.message, None
        assert message is not None
        if error is None and isinstance(replies[0], Exception):
            error = replies[0]
        if error is None and message.refusal is not None:
            key, known, end = message.refusal
            self.process.refusals[key].append((message.sent, known, end))
        self.advance(None if error else decode(replies[0]), error)
        return None

    def end(self) -> None:
        self.stage, self.breaker, self.permit, self.seen, self.failure, self.ask = "idle", None, None, None, None, None


# Processes -------------------------------------------------------------------------------------------


class Process:
    """One process: its link, which stands for its client too, its breakers and threads."""

    def __init__(self, world: World, number: int, setup: Setup) -> None:
        self.world, self.number = world, number
        self.address = "simulated"
        self.link = Link(TIMEOUT)
        self.refreshes = self.sent = 0
        # of the server (None), or of a breaker by its key: no retry may come sooner
        self.retry_at: dict[bytes | None, float] = {}
        self.exchange: Any = None
        self.holder: Actor | None = None  # of the lock
        self.active: Caller | None = None
        self.worker = Worker(self)
        self.callers = [Caller(self, index) for index in range(setup.threads)]
        self.refusals: dict[bytes, list[Any]] = collections.defaultdict(list)
        self.notified: set[tuple[bytes, int]] = set()
        self.hint_due: dict[bytes, bool] = {}
        world.making = number
        self.breakers = [
            # a listener, since the history is read for listeners only
            Breaker(f"service-{index}", redis=self, policy=world.policy, lease=LEASE, listeners=[repr])
            for index in range(setup.breakers)
        ]
        for breaker in self.breakers:
            breaker.process = self
            if setup.watch:
                breaker._watch = Watching()  # type: ignore[assignment]

    def soon(self, line: Any, urgent: bool = False) -> None:
        if self.link.need(line, urgent):
            self.worker.awake = True

    def hint(self, line: Any) -> None:
        self.link.hint(line)
        self.worker.awake = True

    def actors(self) -> list[Any]:
        return [self.worker, *self.callers]

    def check_sending(self, message: Message, by_link: bool) -> None:
        """While Redis is down only the link sends, and only retries: one script at a time until one is answered."""
        if not outages_of(self) or self.world.interrupting:  # an outage may have begun since this was decided
            return
        if by_link and {"_decide", "_announce"} & set(_where(self.exchange)):  # of an exchange that began before
            return
        for command in message.commands:
            for breaker in self.breakers:
                if breaker.keys.state.encode() != command.key or self.link.outage(breaker._line) is None:
                    continue
                if not by_link:
                    raise Broken(f"a call asks Redis while it is down: {command.words[-1]!r}")
                if command.script != "record" or (len(message.commands) > 1 and self.link._outages):
                    raise Broken("an exchange sends something else than one retry while Redis is down")
                whose = None if self.link._outages else command.key
                message.retries.add(whose)
                if self.world.now < self.retry_at.get(whose, NEVER):
                    raise Broken("a retry comes too soon after the last one")
                if {"successes", "failures"} & decode(command.words[-1]).keys():
                    raise Broken("a retry carries outcomes")

    def retried(self, message: Message, replies: list[Any]) -> None:
        """Note the replies of a retry. An answer of the server allows all breakers to ask; a lost batch, each of it."""
        for command, reply in zip(message.commands, replies, strict=True):
            for one in message.retries & {None, command.key}:
                if isinstance(reply, Exception) and len(replies) == 1:
                    self.retry_at[one] = self.world.now + FIRST_PAUSE / 2
                elif one is None and not isinstance(reply, Exception):
                    self.retry_at.clear()


def outages_of(process: Process) -> list[Outage]:
    """Why this process cannot use Redis, or cannot use it for one of its breakers."""
    refusals = [breaker._line.refusal for breaker in process.breakers if breaker._line.refusal]
    return [*process.link._outages.values(), *refusals]


class Watching:
    """Stands in for a Watch."""

    def _join(self) -> None:
        """Its messages come all the same."""

    def _after_fork(self) -> None:
        """Nothing to do."""


KIND = types.SimpleNamespace(__name__="simulation", Redis=Process, RedisCluster=Process)


class Breaker(BreakerCore):
    """The breaker of one process. Its shell is the simulation."""

    _kind, _permit_type = KIND, BasePermit
    _server_of = staticmethod(lambda client, _: client)
    process: Process
    _view: TrueView

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._permit = BasePermit  # no warning of permits that are lost: a walk ends amid calls
        self._notices.start_process(f"process-{_world.making}", self._view.lock)
        changed = self._notices.changed

        def once(change: dict[str, Any], source: str, instance: str | None = None) -> None:
            told = self.keys.state.encode(), change["generation"]
            if told in self.process.notified:
                raise Broken(f"the listeners of process {self.process.number} are notified twice of {change}")
            self.process.notified.add(told)
            self.process.world.notifications[source] += 1
            changed(change, source, instance)

        self._notices.changed = once  # type: ignore[method-assign]

    def _adopt(self, reply: Any, sent: float) -> bool:
        before = self._view.seen
        adopted = super()._adopt(reply, sent)
        if self._view.seen is not before and self._view.seen.sent == before.sent:
            # a late reply, which may describe a later moment than the refusal: at worst the next call asks in vain
            refusals = self.process.refusals[self._key]
            refusals[:] = [one for one in refusals if one[0] != before.sent]
        return adopted

    def _deliver_events(self, events: list[Any]) -> None:
        events.clear()

    def _last_known(self) -> Any:
        engine: Any = super()._last_known()
        engine._now_ms = self.process.world.now_ms
        return engine

    def _run_on(self, engine: Any, name: str, request: dict[str, Any]) -> Any:
        if "_taken" in request:
            self.process.world.taken[request["_taken"]].fate = "here"
        if request.get("failures") and self.process.active is not None and self.process.active.failure is not None:
            failure = self.process.active.failure
            failure.here += 1
            failure.fate = failure.fate or "here"
            if failure.here > 1:
                raise Broken("a failure is counted twice by the engine of its process")
        return super()._run_on(engine, name, request)

    def check_decision(self, caller: Caller, seen: Seen, began: float, refreshed: bool = False) -> None:
        """A decision without asking relies on a view that is fresh enough, or on this process's engine."""
        world, line, link = self.process.world, self._line, self.process.link
        assert line is not None
        world.decisions += 1
        if line.local is not None:
            if link.outage(line) is None and world.now - seen.sent >= LEASE:
                raise Broken("an engine of this process decides although Redis does not count as down")
            world.local_decisions += 1
            return
        if link.outage(line) is not None and world.now - seen.sent >= LEASE:
            raise Broken("a view decides although Redis counts as down")
        most = 2 * LEASE + (TIMEOUT if self.process.holder is not None else 0.0)
        waited = world.now - began >= TIMEOUT
        if began - seen.sent > most and not (refreshed and waited):
            raise Broken(f"a view decides that is {began - seen.sent:.3f} s old")
        if seen.state == "open":
            end = world.redis.ends.get((self.keys.state.encode(), seen.generation), math.inf)
            if seen.generation > 0 and world.now > end + TIMEOUT + 0.001:
                raise Broken(f"an open circuit rejects {world.now - end:.3f} s after its end")


# The world -------------------------------------------------------------------------------------------


class World:
    """Everything, at one moment, and what can happen next."""

    def __init__(self, setup: Setup) -> None:
        global _world
        _world = self
        _rules._local_generations = itertools.count(2)
        self.setup = setup
        self.policy = Policy(**dict(setup.policy))
        self.now = 1024.0
        self.making = 0
        self._events = itertools.count(1)
        self.taken: dict[int, Taken] = {}
        self.failures: list[Failure] = []
        self.transitions: collections.Counter[str] = collections.Counter()
        self.notifications: collections.Counter[str] = collections.Counter()
        self.decisions = self.local_decisions = self.outages = self.recoveries = 0
        self.redis = Redis(self)
        self.late: list[Message] = []
        self.hints: list[tuple[int, bytes]] = []
        self.processes = [Process(self, number, setup) for number in range(setup.processes)]
        self.left = {
            field: getattr(setup, field)
            for field in (
                *("calls", "failures", "times", "breaks", "late", "refusals", "resets", "lost_hints"),
                *("repeated_hints", "interrupts"),
            )
        }
        self.interrupt: Choice | None = None
        self.interrupting = False
        self.arrived: Message | None = None
        if setup.warm:
            self._warm_up()

    def now_ms(self) -> int:
        return START_MS + int(self.now * 1000)

    def event(self) -> int:
        return next(self._events)

    def note(self, taken: Taken) -> int:
        number = len(self.taken) + 1
        self.taken[number] = taken
        return number

    def _warm_up(self) -> None:
        """As after a first call of each breaker in each process; with begins_open, the open time has just passed."""
        for process in self.processes:
            for breaker in process.breakers:
                key = breaker.keys.state.encode()
                message = Message(process.number, [], self.now, 0)
                reply = self.redis.run(key, "record", dict(breaker._with_policy), message)
                assert breaker._line is not None
                breaker.process.link.asked(breaker._line)
                breaker._adopt({**reply, "source": "redis"}, self.now)
            process.worker.at = self.now + LEASE
        if self.setup.begins_open:
            for key, engine in self.redis.engines.items():
                document = engine._load(engine._policy, self.now_ms())
                _rules.trip(document, engine._policy, "failure_threshold")
                engine._document = document
                self.redis._check_document(key, document)
            self.now += dict(self.setup.policy)["reset_timeout"]
        self.transitions.clear()

    def _answer_all(self) -> None:
        """Let everything that is under way arrive, and every exchange end."""
        while (choice := self._harmless()) is not None:
            self.take(choice)

    def _harmless(self) -> Choice | None:
        kinds = ("time out", "execute", "arrive", "resume", "hint", "work")
        return min(
            (one for one in self.choices() if one[0] in kinds), key=lambda one: kinds.index(one[0]), default=None
        )

    # Choices

    def choices(self) -> list[Choice]:
        found: list[Choice] = []
        left = self.left
        for process in self.processes:
            for actor in process.actors():
                found += self._choices_of(process, actor)
            if left["interrupts"] > 0 and any(
                one._view.gathered_truly[one._view.seen.counter] for one in process.breakers
            ):
                found += self._interrupts_of(process)
            idle = next((one for one in process.callers if one.stage == "idle"), None)
            if idle is not None and left["calls"] > 0:
                found += [("call", process.number, idle.number, index) for index in range(len(process.breakers))]
        for hint in dict.fromkeys(self.hints):
            found.append(("hint", *hint))
            if left["lost_hints"] > 0:
                found.append(("lose hint", *hint))
            if left["repeated_hints"] > 0:
                found.append(("repeat hint", *hint))
        if self.late:
            found.append(("late",))
        if self.redis.refuses:
            found.append(("accept",))
        elif left["refusals"] > 0:
            found.append(("refuse",))
        if left["resets"] > 0:
            found.append(("reset",))
        if left["times"] > 0 and (deadline := self.next_deadline()) is not None:
            found.append(("time", deadline))
        return found

    def _choices_of(self, process: Process, actor: Any) -> Iterator[Choice]:
        number, index, message = process.number, actor.number, actor.message
        if message is not None:
            if self.now >= message.sent + TIMEOUT:
                yield "time out", number, index
            else:
                yield ("execute" if message.replies is None else "arrive"), number, index
                if self.left["breaks"] > 0:
                    yield "break", number, index
        elif actor.waits():
            if process.holder is None or self.now >= actor.until:
                yield "resume", number, index
        elif actor is process.worker:
            if actor.is_due():
                yield "work", number, index
        elif actor.stage == "running":
            yield "succeed", number, index
            if self.left["failures"] > 0:
                yield "fail", number, index

    def _interrupts_of(self, process: Process) -> Iterator[Choice]:
        steps = [one for actor in process.actors() for one in self._choices_of(process, actor)]
        for outer, inner in itertools.permutations(steps, 2):
            if outer[2] != inner[2] and outer[0] in ("work", "resume", "fail"):
                yield "interrupt", outer, inner

    def interrupted(self, number: int) -> None:
        """A thread of this process has taken what was gathered; now another thread takes its step."""
        if self.interrupt is not None:
            choice, self.interrupt = self.interrupt, None
            self.left["interrupts"] -= 1
            active = self.processes[number].active
            self.take(choice)
            self.processes[number].active = active

    def take(self, choice: Choice) -> None:
        """Take one step. Raises Broken."""
        if choice[0] == "interrupt":
            _, outer, self.interrupt = choice
            self.interrupting = True
            self.take(outer)
            self.interrupt, self.interrupting = None, False
            return
        kind, *given = choice
        self.arrived = None
        self.now += INSTANT  # no two things happen at the same time
        before = {outage for process in self.processes for outage in outages_of(process)}
        views = self._views()
        self._take(kind, given)
        self._check_outage_ends(before)
        for (generation, sent), (later, sent_later) in zip(views, self._views(), strict=True):
            if 0 < later < generation:
                raise Broken(f"a view goes back to an earlier generation: from {generation} to {later}")
            if 0 < later == generation and NEVER < sent_later < sent:
                raise Broken(f"a view goes back to an earlier reply: from {sent} to {sent_later}")

    def _views(self) -> list[tuple[int, float]]:
        """Generation and age of each view; zeros while an engine of its process decides, which keeps its generation."""
        lines = [breaker._line for process in self.processes for breaker in process.breakers]
        views = [None if line is None or line.local else line.view.seen for line in lines]
        return [(0, NEVER) if seen is None else (seen.generation, seen.sent) for seen in views]

    def _take(self, kind: str, given: list[Any]) -> None:
        left = self.left
        if kind in ("hint", "lose hint", "repeat hint"):
            hint = given[0], given[1]
            if kind != "repeat hint":
                self.hints.remove(hint)
            process = self.processes[given[0]]
            if kind == "lose hint":
                left["lost_hints"] -= 1
                process.hint_due[given[1]] = False
            else:
                left["repeated_hints"] -= kind == "repeat hint"
                next(one for one in process.breakers if one.keys.state.encode() == given[1])._hinted()
        elif kind == "late":
            self.redis.execute(self.late.pop(0))
        elif kind in ("refuse", "accept"):
            self.redis.refuses = kind == "refuse"
            left["refusals"] -= kind == "refuse"
        elif kind == "reset":
            left["resets"] -= 1
            for breaker in self.processes[0].breakers:
                request = {"action": "reset", "instance": "operator"}
                self.redis.run(breaker.keys.state.encode(), "control", request, Message(-1, [], self.now, 0))
        elif kind == "time":
            left["times"] -= 1
            self.now = max(self.now, given[0])
        else:
            self._act(kind, *given)

    def _act(self, kind: str, number: int, index: int, breaker: int = 0) -> None:
        process, left = self.processes[number], self.left
        actor = process.worker if index < 0 else process.callers[index]
        process.active = None if index < 0 else actor
        message = actor.message
        if kind == "call":
            left["calls"] -= 1
            actor.call(process.breakers[breaker])
        elif kind == "fail":
            left["failures"] -= 1
            actor.fail()
        elif kind == "execute":
            message.replies = self.redis.execute(message)
        elif kind == "arrive":
            self.arrived = message
            process.retried(message, message.replies)
            actor.received(message.replies, None)
        elif kind in ("break", "time out"):
            left["breaks"] -= kind == "break"
            self._give_up(message)
            error = redis.ConnectionError("broken") if kind == "break" else redis.TimeoutError("overdue")
            process.retried(message, [error] * len(message.commands))
            actor.received(None, error)
        else:
            getattr(actor, {"resume": "resumes"}.get(kind, kind))()

    def _give_up(self, message: Message) -> None:
        """The sender expects no answer any more. What was not executed is lost, or executed later."""
        late = message.replies is None and self.left["late"] > 0 and any(one.script for one in message.commands)
        for request in filter(None, map(_request_of, message.commands)):
            if "_taken" in request:
                taken = self.taken[request["_taken"]]
                taken.given_up, taken.fate = True, taken.fate or "lost"
        if message.failure is not None:
            message.failure.fate = message.failure.fate or "lost"
        if late:
            self.left["late"] -= 1
            self.late.append(message)

    # Checks

    def check_executed(self, taken: Taken) -> None:
        taken.fate = "executed"
        for success in taken.successes:
            success.counted += 1
            if success.counted > 1:
                raise Broken("successes are counted twice")

    def published(self, key: bytes, message: dict[str, Any]) -> None:
        if self.setup.watch:
            for process in self.processes:
                process.hint_due[key] = True
                self.hints.append((process.number, key))
            self.hints.sort()

    def _check_outage_ends(self, before: set[Outage]) -> None:
        """An outage begins with an error, and ends only with the answer of a script."""
        arrived = self.arrived
        now = {outage for process in self.processes for outage in outages_of(process)}
        self.outages += len(now - before)
        if ended := before - now:
            self.recoveries += len(ended)
            answered = arrived is not None and any(
                command.script and isinstance(reply, bytes)
                for command, reply in zip(arrived.commands, arrived.replies or (), strict=False)
            )
            if not answered:
                raise Broken("an outage ended although Redis has executed no script")

    # Time

    def next_deadline(self) -> float | None:
        """When something next ends, or is due."""
        later = [moment for moment in self._moments() if moment > self.now and moment < math.inf]
        return math.ceil(min(later) * STEPS_OF_CLOCK) / STEPS_OF_CLOCK if later else None

    def _moments(self) -> Iterator[float]:
        for process in self.processes:
            if process.worker.at is not None:
                yield process.worker.at
            for actor in process.actors():
                if actor.message is not None:
                    yield actor.message.sent + TIMEOUT
                if actor.waits():
                    yield actor.until
            for outage in outages_of(process):
                yield outage._waits_since + outage._waits_for
            for breaker in process.breakers:
                view, seen = breaker._view, breaker._view.seen
                yield from (seen.sent + LEASE, seen.sent + 2 * LEASE, seen.retry_at)
                if process.holder is not None:
                    yield seen.sent + 2 * LEASE + TIMEOUT
                if view._ended_at > view._reported_at and view.gathered_truly[seen.counter]:
                    yield view._ended_at + JUST_NOW + 0.001
                local = breaker._line.local if breaker._line is not None else None
                if local is not None and local._document is not None and local._document.state == "open":
                    yield (local._document.open_until_ms - START_MS) / 1000
        for engine in self.redis.engines.values():
            document = engine._document
            if document is not None:
                ends = [document.open_until_ms] if document.state == "open" else document.probes.values()
                yield from ((end - START_MS) / 1000 for end in ends)

    # The end

    def settle(self, silence: bool = True) -> None:
        """Let all calls end and everything arrive; check that views and document agree, and that silence follows."""
        self.left = dict.fromkeys(self.left, 0)
        if self.redis.refuses:
            self.take(("accept",))
        self._finish_calls()
        self._run_for(2 * LEASE)
        self._check_agreement()
        retried = {
            member
            for process in self.processes
            for member in process.link._used
            if self.now - member.used_at < IDLE / 2
        }
        self._run_for(4.0 if any(outages_of(process) for process in self.processes) else 0.0)
        self._check_outages(retried)
        self._check_outcomes()
        if not silence:
            return
        self._run_for(IDLE + 2.0)
        sent = [process.sent for process in self.processes]
        self._run_for(3 * IDLE)
        if sent != [process.sent for process in self.processes]:
            raise Broken("a process sends something although nobody has called it for a long time")
        if any(process.worker.at is not None for process in self.processes):
            raise Broken("a background thread does not end")

    def _finish_calls(self) -> None:
        while True:
            self._answer_all()
            running = [one for one in self.choices() if one[0] == "succeed"]
            if running:
                self.take(running[0])
                continue
            if all(one.stage == "idle" for process in self.processes for one in process.callers):
                return
            self._advance(math.inf)

    def _advance(self, until: float) -> bool:
        deadline = self.next_deadline()
        if deadline is None or deadline > until:
            self.now = until if until < math.inf else self.now
            return False
        self.now = deadline
        self._answer_all()
        return True

    def _run_for(self, seconds: float) -> None:
        until = self.now + seconds
        self._answer_all()
        while self._advance(until):
            pass
        self._answer_all()

    def _check_agreement(self) -> None:
        for process in self.processes:
            for breaker in process.breakers:
                key = breaker.keys.state.encode()
                document, seen = self.redis.document(key), breaker._view.seen
                assert breaker._line is not None
                if breaker._line.local is not None or process.link.outage(breaker._line) or seen.generation == 0:
                    continue
                if document is None or not process.hint_due.get(key) or breaker._watch is None:
                    continue
                if seen.generation != document.generation or seen.state != document.state:
                    raise Broken(f"a view disagrees when all is quiet: {seen.state} and {document.state}")

    def _check_outages(self, retried: set[Any]) -> None:
        for process in self.processes:
            for breaker in process.breakers:
                line = breaker._line
                assert line is not None
                if process.link.outage(line) is not None and line in retried:
                    raise Broken("an outage does not end although Redis answers")
                if process.link.outage(line) is None and process.link.engine(line) is not None:
                    raise Broken("an outage is over, and a breaker has not returned")

    def _check_outcomes(self) -> None:
        """Nothing is lost but with a lost message, an ended generation or an outage."""
        for taken in self.taken.values():
            if not taken.fate and taken.generation > 0:
                raise Broken(f"{len(taken.successes)} successes were taken and never reported")
        for failure in self.failures:
            if not failure.fate:
                raise Broken("a failure was neither reported nor counted here")
        for process in self.processes:
            for breaker in process.breakers:
                held, total = breaker._view.gathered_truly[breaker._view.seen.counter], breaker._view.seen.counter
                if (waiting := total.look(self.now)) != len(held):
                    raise Broken(f"{len(held)} successes wait, and the view knows of {waiting}")

    # Fingerprint

    def fingerprint(self) -> Any:
        """Equal for states from which the same can happen. Processes are alike."""
        return hash(_Fingerprint(self).whole())


class _Fingerprint:
    """A state as a tuple: times relative to the clock, generations and events by rank."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.generations: dict[int, int] = {}
        documents = [engine._document for engine in world.redis.engines.values()]
        numbers = {one.generation for one in documents if one is not None}
        for process in world.processes:
            for breaker in process.breakers:
                numbers.add(breaker._view.seen.generation)
            for actor in process.callers:
                numbers |= {one.generation for one in (actor.seen, actor.permit) if one is not None}
                numbers -= {None}
            for actor in process.actors():
                if actor.message is not None:
                    numbers |= {
                        request.get("generation", 0) for request in map(_request_of, actor.message.commands) if request
                    }
        self.generations = {number: rank for rank, number in enumerate(sorted(numbers))}
        self.ranks = self._ranks_of_events()
        self.order: dict[float, int] = {}  # of the moments that one process compares, by rank

    def _ranks_of_events(self) -> dict[int, int]:
        world, found = self.world, set()
        for failure in self._live().values():
            found |= {failure.counted, failure.ended}
        for process in world.processes:
            for breaker in process.breakers:
                found |= {one.ended for one in breaker._view.gathered_truly[breaker._view.seen.counter]}
            for caller in process.callers:
                found |= {caller.failure.ended} if caller.failure is not None else set()
        for taken in world.taken.values():
            if not taken.fate or taken.fate == "lost":
                found.add(taken.successes[-1].ended)
        return {event: rank for rank, event in enumerate(sorted(found))}

    def _live(self) -> dict[tuple[bytes, int], Failure]:
        found = {}
        for key, engine in self.world.redis.engines.items():
            document = engine._document
            if document is not None and document.state == "closed":
                for number in range(document.failure_number - document.failure_count + 1, document.failure_number + 1):
                    if (failure := self.world.redis.failures.get((key, document.generation, number))) is not None:
                        found[key, number] = failure
        return found

    def whole(self) -> Any:
        world = self.world
        documents = tuple(self.document(engine._document) for engine in world.redis.engines.values())
        processes = sorted((self.process(one) for one in world.processes), key=repr)
        late = tuple(self.message(one) for one in world.late)
        return documents, tuple(processes), late, world.redis.refuses, tuple(world.left.values())

    def time(self, moment: float, oldest: float = 0.6) -> Any:
        """Relative to the clock; what is older than that counts as never."""
        passed = self.world.now - moment
        if passed > oldest or moment == math.inf:
            return None
        return math.floor(passed * STEPS_OF_CLOCK), self.order.get(moment)

    def future(self, moment: float) -> Any:
        return self.time(moment, 0.0)

    def document(self, one: Any) -> Any:
        if one is None:
            return None
        ms = self.world.now_ms()
        until = max(one.open_until_ms - ms, 0) if one.state == "open" else None
        probes = tuple((slot, max(end - ms, 0)) for slot, end in one.probes.items())
        return (
            *(
                one.state,
                one.failure_count,
                one.failure_number,
                one.success_count,
                self.generations.get(one.generation),
            ),
            *(until, probes, one.probe_seq, one.trips),
        )

    def process(self, process: Process) -> Any:
        world, link = self.world, process.link
        moments = {actor.message.sent for actor in process.actors() if actor.message is not None}
        for breaker in process.breakers:
            moments |= {breaker._view.seen.sent, breaker._view.seen.arrived, breaker._view._not_before}
        self.order = {moment: rank for rank, moment in enumerate(sorted(moments))}
        members = [breaker._line for breaker in process.breakers]
        outage = link._outages.get(None)
        events = [
            (key, number, self.ranks.get(one.counted), self.ranks.get(one.ended), one.process == process.number)
            for (key, number), one in sorted(self._live().items())
        ]
        hints = tuple(sorted(key for number, key in world.hints if number == process.number))
        used = tuple(member in link._used for member in members)
        hinted = tuple(member in link._hinted for member in members)
        needing = tuple(link._needing.get(member) for member in members)
        return (
            *(link.wanted, self.time(link.busy_since, link.patience), used, hinted, needing, self.outage(outage)),
            *(link.sweeps, self.future(link._swept_at + link._sweep_after)),
            *(tuple(member in link._reporting for member in members), link._turn % len(members)),
            *(hints, tuple(events)),
            *(process.worker.awake, None if process.worker.at is None else self.time(process.worker.at, 0.0)),
            tuple(self.breaker(breaker) for breaker in process.breakers),
            (self.actor(process.worker), *sorted((self.actor(one) for one in process.callers), key=repr)),
        )

    def outage(self, outage: Outage | None) -> Any:
        if outage is None:
            return None
        return outage.abandoned, self.future(outage._waits_since + outage._waits_for), outage._pause

    def breaker(self, breaker: Breaker) -> Any:
        view, line = breaker._view, breaker._line
        assert line is not None
        seen = view.seen
        counter: Any = seen.counter
        total = counter.total()
        gathered = tuple(self.ranks.get(one.ended) for one in view.gathered_truly[counter])
        text = self.world.redis.text(breaker.keys.state.encode())
        known = line._known and (
            line._known[0].document == text,
            line._known[1] is seen,
            self.future(line._known[2] + line._known[3]),
        )
        local = line.local and self.document(getattr(line.local, "_document", None))
        return (
            *(seen.state, self.generations.get(seen.generation), seen.failure_count, self.time(seen.sent)),
            *(self.time(seen.arrived), self.future(seen.retry_at), self.future(seen.closed_until)),
            *(self.future(seen.watched_until), self.future(seen.open_until)),
            *(total - counter._taken, total - counter._looked_at, total - counter._read_at),
            *(counter.read_number, counter.proved, gathered),
            *(
                self.time(view._not_before),
                self.future(view._alerted_at + view._alert_for),
                self.future(view._claimed_at + LEASE),
            ),
            *(self.time(view._ended_at, JUST_NOW), view._ended_at > view._reported_at),
            *(view._base[0], self.time(view._base[1], 1.0), breaker._asking),
            *(known, local, bool(line.news), self.outage(line.refusal)),
        )

    def actor(self, actor: Any) -> Any:
        process = actor.process
        waits = None if actor.before is None else (actor.before == process.refreshes, self.future(actor.until))
        rest: Any = None
        if isinstance(actor, Caller):
            seen, permit = actor.seen, actor.permit
            rest = (
                *(actor.stage, None if actor.breaker is None else actor.breaker.name),
                None if seen is None else (self.generations.get(seen.generation), seen is actor.breaker._view.seen),
                None if permit is None else (self.generations.get(permit.generation), permit.probe),
                None if actor.failure is None else (self.ranks.get(actor.failure.ended), actor.failure.in_redis),
                None if actor.ask is None else self.request(actor.ask[1]),
                None if actor.stage == "idle" else self.time(actor.began),
            )
        where = _where(process.exchange) if actor.holds() else None
        return waits, rest, where, None if actor.message is None else self.message(actor.message)

    def message(self, message: Message) -> Any:
        commands = tuple(
            (one.key, one.script or one.words[0], self.request(_request_of(one))) for one in message.commands
        )
        replies = None if message.replies is None else tuple(map(self.reply, message.replies))
        return self.time(message.sent), commands, replies

    def request(self, request: dict[str, Any] | None) -> Any:
        if request is None:
            return None
        taken = self.world.taken.get(request.get("_taken", 0))
        newest = None if taken is None else self.ranks.get(taken.successes[-1].ended)
        rest = tuple(request.get(name) for name in ("successes", "failures", "seen_failure", "probe"))
        return self.generations.get(request.get("generation", 0)), newest, *rest

    def reply(self, reply: Any) -> Any:
        if isinstance(reply, bytes):
            fields = decode(reply)
            names = ("state", "failure_count", "failure_number", "admitted", "probe", "retry_after_ms")
            return (*map(fields.get, names), self.generations.get(fields["generation"]), "transition" in fields)
        if isinstance(reply, Exception):
            return type(reply).__name__
        return repr(reply)


def _request_of(command: Command) -> dict[str, Any] | None:
    return decode(command.words[-1]) if command.script not in ("", FLEET) else None


def _where(generator: Any) -> tuple[str, ...]:
    """The functions in which a generator stands."""
    names = []
    while generator is not None and hasattr(generator, "gi_code"):
        names.append(generator.gi_code.co_name)
        generator = generator.gi_yieldfrom
    return tuple(names)


# The search and the walks ----------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What a search or walks have seen."""

    states: int = 0
    steps: int = 0
    complete: bool = True
    seconds: float = 0.0
    transitions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notifications: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    outages: int = 0
    recoveries: int = 0
    decisions: int = 0
    local_decisions: int = 0

    def add(self, world: World) -> None:
        self.transitions += world.transitions
        self.notifications += world.notifications
        self.outages += world.outages
        self.recoveries += world.recoveries
        self.decisions += world.decisions
        self.local_decisions += world.local_decisions


def replay(setup: Setup, path: list[Choice]) -> World:
    """The world after these choices."""
    world = World(setup)
    for choice in path:
        world.take(choice)
    return world


def told(broken: BaseException, path: list[Choice]) -> Broken:
    found = Broken("\n".join([str(broken) or repr(broken), *(f"  {choice}" for choice in path)]))
    found.path = path
    return found


def search(setup: Setup, seconds: float = math.inf) -> Found:
    """Visit every state within the setup's bounds, depth first. Let some settle of those whose calls have all begun.

    seconds: end after so long.
    """
    began, found = time.monotonic(), Found()
    with virtual_time():
        world = World(setup)
        seen = {world.fingerprint()}
        stack: list[list[Choice]] = [[choice] for choice in world.choices()]
        reached: list[Choice] | None = []  # what led to the world
        while stack:
            if time.monotonic() - began > seconds:
                found.complete = False
                break
            path = stack.pop()
            if reached != path[:-1]:
                world = replay(setup, path[:-1])
            reached = path
            found.steps += 1
            try:
                world.take(path[-1])
                state = world.fingerprint()
                if state in seen:
                    continue
                seen.add(state)
                found.add(world)
                stack += [[*path, choice] for choice in world.choices()]
                if world.left["calls"] == 0 and state % 16 == 0:
                    reached = None
                    world.settle(silence=state % 512 == 0)
            except Broken as broken:
                raise told(broken, path) from broken
    found.states, found.seconds = len(seen), time.monotonic() - began
    return found


WEIGHTS = {
    "execute": 8.0,
    "arrive": 8.0,
    "succeed": 5.0,
    "call": 5.0,
    "work": 4.0,
    "resume": 4.0,
    "hint": 4.0,
    "time": 5.0,
    "fail": 3.0,
    "time out": 6.0,
    "accept": 1.0,
    "late": 0.5,
    "break": 0.3,
    "lose hint": 0.3,
    "repeat hint": 0.3,
    "refuse": 0.05,
    "reset": 0.03,
    "interrupt": 0.2,
}
WALK = Setup(
    **dict.fromkeys(("calls", "failures", "times", "breaks", "late", "refusals", "resets"), 10**9),
    **dict.fromkeys(("lost_hints", "repeated_hints", "interrupts"), 10**9),
)


def walk(setup: Setup, seed: int, steps: int, found: Found) -> None:
    """Take random steps, then let the world settle. Raises Broken, with the path."""
    chance, path = random.Random(seed), []
    world = World(setup)
    weights = {**WEIGHTS}
    for kind in ("fail", "break", "time", "refuse", "call", "succeed"):  # each walk has its own weather
        weights[kind] *= chance.choice((0.1, 0.5, 1.0, 2.0))
    try:
        for _ in range(steps):
            choices = world.choices()
            choice = chance.choices(choices, [weights[one[0]] for one in choices])[0]
            path.append(choice)
            world.take(choice)
        path.append(("settle",))
        world.settle()
    except Broken as broken:
        raise told(broken, [("seed", seed), *path]) from broken
    finally:
        found.steps += len(path)
        found.add(world)


def walks(setup: Setup, count: int, steps: int, first: int = 0, seconds: float = math.inf) -> Found:
    """Many walks."""
    began, found = time.monotonic(), Found()
    with virtual_time():
        for seed in range(first, first + count):
            if time.monotonic() - began > seconds:
                found.complete = False
                break
            walk(setup, seed, steps, found)
            found.states += 1
    found.seconds = time.monotonic() - began
    return found


def shortened(setup: Setup, path: list[Choice], says: str) -> list[Choice]:
    """A path that breaks the same rule with fewer steps: leaves out whatever can be left out."""

    def breaks(steps: list[Choice]) -> list[Choice] | None:
        world, taken = World(setup), []
        for choice in steps:
            if choice[0] in ("seed", "settle"):
                continue
            if choice[0] == "time":
                deadline = world.next_deadline()
                if deadline is None:
                    continue
                choice = ("time", deadline)
            elif choice not in world.choices():
                continue
            taken.append(choice)
            try:
                world.take(choice)
            except Broken as broken:
                return taken if says in str(broken) else None
        try:
            world.settle()
        except Broken as broken:
            return taken if says in str(broken) else None
        return None

    with virtual_time():
        size = max(len(path) // 2, 1)
        while size:
            start = 0
            while start < len(path):
                shorter = breaks(path[:start] + path[start + size :])
                if shorter is not None and len(shorter) < len(path):
                    path = shorter
                else:
                    start += size
            size //= 2
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Setup):
        if field.type == "int":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--walks", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = vars(parser.parse_args())
    number, steps, limit = (options.pop(name) for name in ("walks", "steps", "seconds"))
    setup = WALK if number else Setup(**options)
    try:
        print(walks(setup, number, steps, seconds=limit) if number else search(setup, seconds=limit))
    except Broken as found:
        rule = str(found).partition("\n")[0]
        print(rule, *shortened(setup, found.path, rule[:30]), sep="\n  ")
        sys.exit(1)
