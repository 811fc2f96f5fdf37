"""What does a guarded call cost, compared with the bare call, with every peer, and with an empty script?"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import importlib.metadata
import inspect
import itertools
import json
import logging
import os
import pathlib
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import contenders
import redis
from contenders import (
    ACQUIRE,
    ASYNC_ACQUIRE,
    ASYNC_WITH,
    CALL,
    CIRCUITBREAKER,
    DECORATOR,
    EVERYBODY,
    FAILING,
    IN_PROCESS,
    INSIDE,
    INTERLOCK,
    LISTENERS,
    NOPANIC,
    NOT_RUN,
    ON_CALL,
    ON_REDIS,
    OURS,
    PACKAGES,
    PREDICATE,
    PYBREAKER,
    PYBREAKER_REDIS,
    STRICT,
    TWO_EVALSHA,
    TWO_SCRIPTS,
    WAYS,
    WITH,
    Contender,
    Env,
    Made,
    settled,
    way,
)

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Policy
from pybreaker_redis._protocol import Keys
from pybreaker_redis.embedded import EmbeddedServer

BARE = "bare call"
RESULTS = pathlib.Path(__file__).parent / "results" / "bench.json"
SLOW_SLICE, SLOW_ROUNDS = 0.8, 3  # a slice that takes more seconds is measured in fewer rounds
HOPELESS = 5.0  # seconds; a slice that takes more is measured once, and its contender skips what is left at that width
LEASE = 0.1
TRIPS_PER_SLICE = 5
SUCCESS, FAILURE, REJECT, MIXED = "closed success", "closed failure", "open reject", "mixed 1 % failures"
EVERY_WAY = "closed success, every way to guard"
MEMORY_FAILURE = "closed failure, in memory"
STRICT_CALL = "closed success, two scripts per call"
logger = logging.getLogger("pybreaker_redis")


class Boom(Exception):
    """What the guarded function raises."""


class Tripped(Exception):
    """A circuit opened at a work that measures guarded calls: a time of it would be that of rejections."""


class Alarms(logging.Handler):
    """Counts how often a breaker of this package gave up on Redis: its times then say nothing about Redis."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a warning about Redis."""
        self.count += "does not answer" in record.msg


# The guarded functions -------------------------------------------------------------------------


def succeed() -> int:
    """A healthy service."""
    return 1


def fail() -> int:
    """A dead service."""
    raise Boom


async def asucceed() -> int:
    """A healthy service that answers without suspending its task."""
    return 1


async def ayield() -> int:
    """A healthy service that takes one turn of the loop, so that the calls of all tasks run at once."""
    await asyncio.sleep(0)
    return 1


async def afail() -> int:
    """A dead service."""
    raise Boom


def mixed() -> Callable[[], int]:
    """A service that fails every hundredth call."""
    tick = itertools.count(1).__next__
    return lambda: succeed() if tick() % 100 else fail()


def amixed() -> Callable[[], Any]:
    """The same for asyncio."""
    tick = itertools.count(1).__next__

    async def call() -> int:
        return await (asucceed() if tick() % 100 else afail())

    return call


# The loops -------------------------------------------------------------------------------------

# One for each way to guard, so that no frame of the benchmark is measured with the call. func: the guarded function;
# target: what a Made has for this way.
LOOP = """
{start} loop(target, func, calls, caught):
    for _ in repeat(None, calls):
        try:
            {body}
        except caught:
            pass
"""
BODIES = {
    "sync": {
        DECORATOR: "target()",
        CALL: "target(func)",
        ACQUIRE: "with target() as permit: func()",
        WITH: "with target: func()",
    },
    "asyncio": {
        DECORATOR: "await target()",
        CALL: "await target(func)",
        ASYNC_ACQUIRE: "async with target() as permit: await func()",
        ASYNC_WITH: "async with target: await func()",
        WITH: "with target: await func()",
    },
}


def compiled(start: str, body: str) -> Callable[..., Any]:
    """The loop function of one way to guard."""
    scope: dict[str, Any] = {"repeat": itertools.repeat}
    exec(LOOP.format(start=start, body=body), scope)
    loop: Callable[..., Any] = scope["loop"]
    return loop


LOOPS = {
    shell: {how: compiled("def" if shell == "sync" else "async def", body) for how, body in bodies.items()}
    for shell, bodies in BODIES.items()
}


# The works -------------------------------------------------------------------------------------


def title(shell: str, width: int, name: str) -> str:
    """The name of a table of times."""
    unit = "thread" if shell == "sync" else "task"
    return f"{shell}, {width:,} {unit}{'s' * (width > 1)}, {name}"


class Work(NamedTuple):
    """One table of times. width: threads or tasks. trips: whether failures may trip the breakers."""

    shell: str
    name: str
    width: int
    func: Callable[[], Any]
    contenders: dict[str, Contender]
    trips: bool = True

    @property
    def title(self) -> str:
        """The name of its table."""
        return title(self.shell, self.width, self.name)


def works(quick: bool) -> Iterator[Work]:
    """Every contender at every kind of service."""
    sync, aio = EVERYBODY["sync"], EVERYBODY["asyncio"]
    for threads in (1, 16):
        yield Work("sync", SUCCESS, threads, succeed, sync)
        yield Work("sync", FAILURE, threads, fail, sync, trips=False)
        yield Work("sync", REJECT, threads, fail, sync)
        yield Work("sync", MIXED, threads, mixed(), sync, trips=False)
    for tasks in (1, 100) if quick else (1, 100, 10_000):
        yield Work("asyncio", SUCCESS, tasks, asucceed if tasks == 1 else ayield, aio)
        yield Work("asyncio", REJECT, tasks, afail, aio)
        if tasks < 10_000:
            yield Work("asyncio", FAILURE, tasks, afail, aio, trips=False)
            yield Work("asyncio", MIXED, tasks, amixed(), aio, trips=False)


def client_works() -> Iterator[Work]:
    """What the client costs: each way to guard, a failure that asks no server, and a call with two scripts."""
    crowds = [("sync", 1, succeed), ("sync", 16, succeed), ("asyncio", 1, asucceed), ("asyncio", 100, ayield)]
    for shell, width, func in crowds:
        yield Work(shell, EVERY_WAY, width, func, WAYS[shell])
    yield Work("sync", MEMORY_FAILURE, 1, fail, FAILING, trips=False)
    for shell, width, func in crowds:
        yield Work(shell, STRICT_CALL, width, func, TWO_SCRIPTS[shell])


# Measuring -------------------------------------------------------------------------------------


class Entry:
    """One contender at one work. Its breaker lives through all rounds."""

    def __init__(self, name: str, made: Made, call: Callable[[int], Any]) -> None:
        self.name, self.made, self.call = name, made, call
        self.calls = 0
        self.rounds = 0
        self.seconds: dict[int, float] = {}  # per call, by round
        self.gave_up = 0


def sync_slice(call: Callable[[int], Any], calls: int, threads: int) -> float:
    """Seconds for that many calls, spread over threads."""
    if threads == 1:
        began = perf_counter()
        call(calls)
        return perf_counter() - began
    gate = threading.Barrier(threads + 1)
    errors: list[BaseException] = []

    def run() -> None:
        gate.wait()
        try:
            call(calls // threads)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    began = perf_counter()
    gate.wait()
    for worker in workers:
        worker.join()
    taken = perf_counter() - began
    if errors:
        raise errors[0]
    return taken


async def async_slice(call: Callable[[int], Any], calls: int, tasks: int) -> float:
    """Seconds for that many calls, spread over tasks."""
    began = perf_counter()
    if tasks == 1:
        await call(calls)
    else:
        # wait for every task: one that outlived an error would slow down the next contender
        ended = await asyncio.gather(*(call(calls // tasks) for _ in range(tasks)), return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException):
                raise error
    return perf_counter() - began


class Bench:
    """One run: its server, its event loop, and the contenders that could not take part."""

    def __init__(self, env: Env, runner: asyncio.Runner, rounds: int, slice_seconds: float) -> None:
        self.env, self.runner, self.rounds, self.slice_seconds = env, runner, rounds, slice_seconds
        self.control = env.client()
        self.alarms = Alarms()
        self.hopeless: dict[tuple[str, int, str], str] = {}
        self.not_run: dict[str, dict[str, str]] = {shell: dict(reasons) for shell, reasons in NOT_RUN.items()}

    def run(self, work: Any) -> Any:
        """The result of a coroutine, on the one loop of this run."""
        return self.runner.run(work) if inspect.iscoroutine(work) else work

    def build(self, shell: str, build: contenders.Build, trips: bool) -> Made:
        """A breaker. One for asyncio is made inside the loop."""
        if shell == "sync":
            return build(self.env, trips)

        async def make() -> Made:
            made: Made = await settled(build(self.env, trips))
            return made

        made: Made = self.run(make())
        return made

    def close(self, made: Made) -> None:
        """End a breaker."""

        async def end() -> None:
            await settled(made.close())

        try:
            self.run(end())
        except Exception as error:
            print(f"closing failed: {error!r}", file=sys.stderr)

    def slice(self, work: Work, entry: Entry, calls: int) -> float:
        """Seconds for that many calls. Raises Tripped."""
        before = self.alarms.count
        try:
            if work.shell == "sync":
                taken = sync_slice(entry.call, calls, work.width)
            else:
                taken = self.run(async_slice(entry.call, calls, work.width))
        except entry.made.rejected as error:
            raise Tripped(f"its circuit opened: {error}") from error
        entry.gave_up += self.alarms.count - before
        return taken

    def bare(self, work: Work) -> Entry:
        """The function itself, unguarded."""
        loop = LOOPS[work.shell][DECORATOR]
        return Entry(BARE, Made(lambda func: func), lambda calls: loop(work.func, None, calls, Boom))

    def entry(self, work: Work, name: str) -> Entry:
        """A new breaker, in the state that the work is about."""
        build, how = work.contenders[name]
        made = self.build(work.shell, build, work.trips)
        loop, target = LOOPS[work.shell][how], made.wrap(work.func) if how == DECORATOR else made.ways[how]
        if work.name == REJECT:
            self.open(target, made.rejected)
        caught = made.rejected if work.name == REJECT else Boom
        return Entry(name, made, lambda calls: loop(target, work.func, calls, caught))

    def open(self, guarded: Any, rejected: Any) -> None:
        """Fail until the breaker rejects."""

        async def once() -> None:
            await settled(guarded())

        for _ in range(50):
            try:
                self.run(once())
            except rejected:
                return
            except Boom:
                pass
        raise RuntimeError("does not trip after 50 failures")

    def entries(self, work: Work) -> list[Entry]:
        """The bare call and every contender that can do this work, each with its number of calls per slice."""
        found = [self.bare(work)]
        self.calibrate(work, found[0])
        for name in work.contenders:
            if name in self.not_run.setdefault(work.shell, {}):
                continue
            if reason := self.hopeless.get((work.shell, work.width, name)):
                self.not_run.setdefault(work.title, {})[name] = reason
                continue
            entry = None
            try:
                entry = self.entry(work, name)
                self.calibrate(work, entry)
            except Exception as error:
                if entry:
                    self.close(entry.made)
                # a contender that trips, or fails only with many threads or tasks, still takes part in the other works
                where = work.title if work.width > 1 or isinstance(error, Tripped) else work.shell
                self.leave_out(where, name, error)
            else:
                found.append(entry)
        return found

    def calibrate(self, work: Work, entry: Entry) -> None:
        """Find how many calls fill a slice, and how many rounds they are worth."""
        calls = max(work.width, 20)
        self.slice(work, entry, calls)  # the first slice connects, which may take longer than all the others
        taken = self.slice(work, entry, calls)
        while taken < self.slice_seconds / 2:
            grow = min(self.slice_seconds / taken, 20.0)
            calls = max(int(calls * grow) // work.width, 1) * work.width
            taken = self.slice(work, entry, calls)
        entry.calls, entry.gave_up = calls, 0
        entry.rounds = self.rounds if taken < SLOW_SLICE else min(SLOW_ROUNDS, self.rounds)
        if taken > HOPELESS:
            entry.rounds, entry.seconds = 0, {0: taken / calls}
            self.hopeless[work.shell, work.width, entry.name] = f"{taken:.0f} s for {calls:,} calls, {work.name}"

    def times(self, work: Work) -> dict[str, Any]:
        """Microseconds per call of each contender, in alternating rounds."""
        entries = self.entries(work)
        for turn in range(self.rounds):
            first = turn % len(entries)
            for entry in entries[first:] + entries[:first]:
                if turn < entry.rounds:
                    gc.collect()
                    self.round(work, entry, turn)
        for entry in entries:
            self.close(entry.made)
        bare = entries[0].seconds
        return {entry.name: summary(entry, bare, work.name != REJECT) for entry in entries if entry.seconds}

    def round(self, work: Work, entry: Entry, turn: int) -> None:
        """One slice of one contender. One that trips has no figure, but a note."""
        try:
            entry.seconds[turn] = self.slice(work, entry, entry.calls) / entry.calls
        except Tripped as error:
            entry.rounds, entry.seconds = 0, {}
            self.leave_out(work.title, entry.name, error)

    def leave_out(self, where: str, name: str, error: Exception) -> None:
        """Note why a contender has no figure there."""
        self.not_run.setdefault(where, {})[name] = f"{type(error).__name__}: {error}"

    def trips(self, shell: str) -> dict[str, Any]:
        """Microseconds from the first failure to the first rejection, and the calls let through meanwhile."""
        found: dict[str, list[tuple[float, int]]] = {}
        for _ in range(self.rounds * TRIPS_PER_SLICE):
            for name, contender in EVERYBODY[shell].items():
                if name not in self.not_run.get(shell, {}):
                    found.setdefault(name, []).append(self.trip(shell, contender.build))
        return {
            name: {
                "median_us": statistics.median(seconds for seconds, _ in trips) * 1e6,
                "let_through": statistics.median(calls for _, calls in trips),
            }
            for name, trips in found.items()
        }

    def trip(self, shell: str, build: contenders.Build) -> tuple[float, int]:
        """One new breaker, connected by a success, that fails until it rejects."""
        made = self.build(shell, build, True)
        ok = made.wrap(succeed if shell == "sync" else asucceed)
        bad = made.wrap(fail if shell == "sync" else afail)
        if shell == "sync":
            ok()
            result = trip(bad, made.rejected)
        else:
            result = self.run(atrip(ok, bad, made.rejected))
        self.close(made)
        return result

    # What the server is asked, and what it stores ----------------------------------------------

    def commands(self, shell: str) -> dict[str, dict[str, float]]:
        """Commands that a client sends for 1,000 calls, one after the other."""
        found: dict[str, dict[str, float]] = {}
        for work in works(True):
            if work.shell != shell or work.width > 1:
                continue
            for name in ON_REDIS:
                if name in work.contenders and name not in self.not_run.get(shell, {}):
                    entry = self.entry(work, name)
                    self.slice(work, entry, 20)
                    before = self.sent(name)
                    self.slice(work, entry, 1000)
                    found.setdefault(name, {})[work.name] = self.sent(name) - before
                    self.close(entry.made)
        return found

    def sent(self, name: str) -> int:
        """Commands that clients have sent so far, without those of the measuring itself."""
        skipped = INSIDE.get(name, set()) | {"info", "config", "hello", "ping"}
        stats = self.control.info("commandstats")
        return sum(
            int(stat["calls"])
            for command, stat in stats.items()
            if command.removeprefix("cmdstat_").split("|")[0] not in skipped
        )

    def exchanges(self) -> int:
        """Exchanges with the server so far: it reads a pipeline once. This asking is one of them."""
        return int(self.control.info("stats")["total_reads_processed"])

    def healthy(self, seconds: float) -> float:
        """Exchanges per second of a process whose 16 threads call all the time, at lease 0.1."""
        breaker = CircuitBreaker(self.env.name(), redis=self.env.client(), lease=LEASE)
        guarded = breaker(succeed)
        guarded()
        before, began = self.exchanges(), perf_counter()
        end = began + seconds

        def run() -> None:
            while perf_counter() < end:
                guarded()
                time.sleep(0.001)

        workers = [threading.Thread(target=run) for _ in range(16)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        exchanges = self.exchanges() - before - 1
        taken = perf_counter() - began
        breaker.close()
        return exchanges / taken

    async def swarm(self, tasks: int, seconds: float, pause: float) -> dict[str, float]:
        """Exchanges per lease of many tasks. pause: seconds that a task sleeps at most between two calls."""
        breaker = AsyncCircuitBreaker(self.env.name(), redis=self.env.async_client(), lease=LEASE)
        guarded = breaker(ayield)
        await guarded()
        before, began = self.exchanges(), perf_counter()
        end = began + seconds
        calls = itertools.count()
        pauses = itertools.cycle([pause * part / 97 for part in range(1, 98)])

        async def run() -> None:
            while perf_counter() < end:
                await guarded()
                next(calls)
                if pause:
                    await asyncio.sleep(next(pauses))

        await asyncio.gather(*(run() for _ in range(tasks)))
        taken = perf_counter() - began
        exchanges = self.exchanges() - before - 1
        await breaker.close()
        per_lease = exchanges / (taken / LEASE)
        return {"tasks": tasks, "calls": next(calls), "seconds": taken, "exchanges_per_lease": per_lease}

    def document_bytes(self) -> dict[str, int]:
        """The length of the state document in each state."""
        states = ("closed", "closed, 4 failures", "open", "half_open, 1 probe", "half_open, 10 probes", "forced open")
        return {state: int(self.control.strlen(self.in_state(state).state)) for state in states}

    def in_state(self, state: str) -> Keys:
        """The keys of a breaker that calls have brought into a state."""
        policy = Policy(reset_timeout=0.001, half_open_max_calls=10, success_threshold=100)
        breaker = CircuitBreaker(self.env.name(), redis=self.env.client(), policy=policy, lease=0)
        failures = {"closed": 0, "closed, 4 failures": 4}.get(state, 5)
        breaker.call(succeed)
        LOOPS["sync"][DECORATOR](breaker(fail), None, failures, Boom)
        if state.startswith("half_open"):
            time.sleep(0.01)
            for _ in range(10 if "10" in state else 1):
                breaker.acquire()  # and never settled
        if state == "forced open":
            breaker.force_open(600)
        return breaker.keys

    def footprints(self) -> dict[str, dict[str, int]]:
        """Bytes of all keys of one tripped breaker, as MEMORY USAGE counts them."""
        found: dict[str, dict[str, int]] = {}
        for name in ON_REDIS:
            shell = "asyncio" if name in self.not_run.get("sync", {}) else "sync"
            if name in self.not_run.get(shell, {}):
                continue
            before = set(self.control.keys())
            made = self.build(shell, EVERYBODY[shell][name].build, True)
            self.open(made.wrap(fail if shell == "sync" else afail), made.rejected)
            time.sleep(0.05)  # interlock-cb writes in the background
            sizes = {key.decode(): self.control.memory_usage(key) or 0 for key in set(self.control.keys()) - before}
            found[name] = {
                "all": sum(sizes.values()),
                "history": sum(size for key, size in sizes.items() if key.endswith(":history")),
            }
            self.close(made)
        return found


def trip(bad: Callable[[], Any], rejected: Any) -> tuple[float, int]:
    """Seconds and calls until the breaker rejects."""
    began, calls = perf_counter(), 0
    while True:
        try:
            bad()
        except rejected:
            return perf_counter() - began, calls
        except Boom:
            calls += 1


async def atrip(ok: Any, bad: Any, rejected: Any) -> tuple[float, int]:
    """The same for asyncio."""
    await ok()
    began, calls = perf_counter(), 0
    while True:
        try:
            await bad()
        except rejected:
            return perf_counter() - began, calls
        except Boom:
            calls += 1


def summary(entry: Entry, bare: dict[int, float], subtract: bool) -> dict[str, Any]:
    """Medians in microseconds. The overhead is over the bare call of the same round."""
    each = [seconds * 1e6 for seconds in entry.seconds.values()]
    over = [(seconds - (bare[turn] if subtract else 0.0)) * 1e6 for turn, seconds in entry.seconds.items()]
    found = {
        "median_us": statistics.median(each),
        "overhead_us": statistics.median(over),
        "low_us": min(over),
        "high_us": max(over),
        "rounds": len(each),
        "calls": entry.calls,
    }
    if entry.gave_up:
        found["redis_given_up"] = entry.gave_up
    return found


# The targets -----------------------------------------------------------------------------------


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of targets, from the medians of this run. A partial run has only those that it measured."""
    times = found["times"]

    def ratio(field: str, work: tuple[str, str], one: str, other: str) -> float | None:
        rows = times.get(title(work[0], 1, work[1]), {})
        return rows[one][field] / rows[other][field] if one in rows and other in rows else None

    over, whole = functools.partial(ratio, "overhead_us"), functools.partial(ratio, "median_us")
    sync, aio = ("sync", EVERY_WAY), ("asyncio", EVERY_WAY)
    memory, strict = ("sync", MEMORY_FAILURE), ("sync", STRICT_CALL)
    success, reject = ("sync", SUCCESS), ("sync", REJECT)
    plain, call, block = way(OURS, DECORATOR), way(OURS, CALL), way(OURS, ACQUIRE)
    peer, peer_call, peer_block = (way(CIRCUITBREAKER, how) for how in (DECORATOR, CALL, WITH))
    observed, on_call, judged = way(OURS, LISTENERS), way(OURS, ON_CALL), way(OURS, PREDICATE)
    rows: list[tuple[str, float | None, str, float, float | None]] = [
        ("`call` / circuitbreaker's, overhead", over(sync, call, peer_call), "<=", 1.1, 0.95),
        ("`with acquire()` / circuitbreaker's `with`, overhead", over(sync, block, peer_block), "<=", 3, 2),
        ("decorator / circuitbreaker's, overhead", over(sync, plain, peer), "<=", 0.5, None),
        ("decorator / interlock-cb's, asyncio, overhead", over(aio, plain, way(INTERLOCK, DECORATOR)), "<=", 0.1, None),
        ("decorator with `listeners` / without, overhead", over(sync, observed, plain), "<=", 1.1, None),
        ("the same, asyncio", over(aio, observed, plain), "<=", 1.1, None),
        ("decorator with `on_call` / without, overhead", over(sync, on_call, plain), "<=", 6, None),
        ("the same, asyncio", over(aio, on_call, plain), "<=", 6, None),
        ("decorator with a function as `failures` / without, overhead", over(sync, judged, plain), "<=", 1.05, None),
        ("the same, asyncio", over(aio, judged, plain), "<=", 1.05, None),
    ]
    for how in (DECORATOR, CALL):
        ours, theirs = way(IN_PROCESS, how), way(CIRCUITBREAKER, how)
        name = f"failing call, redis=None, {how} / circuitbreaker's"
        rows.append((f"{name}, overhead", over(memory, ours, theirs), "<=", 8, 4))
        rows.append((f"{name}, whole time", whole(memory, ours, theirs), "<=", 8, 4))
    rows += [
        ("strict call / two empty EVALSHA over redis-py", whole(strict, STRICT, TWO_EVALSHA), "<=", 1.25, 1.1),
        ("strict call / nopanic-redis", whole(strict, STRICT, NOPANIC), "<=", 0.9, 0.75),
        ("decorator / pybreaker's in memory, overhead", over(success, OURS, PYBREAKER), "<=", 0.5, 0.3),
        ("pybreaker's decorator with Redis / ours, overhead", over(success, PYBREAKER_REDIS, OURS), ">=", 200, 500),
        ("rejection / pybreaker's in memory", whole(reject, OURS, PYBREAKER), "<=", 1.0, 0.5),
    ]
    if "swarm" not in found:
        return [target(*row) for row in rows if row[1] is not None]
    swarm = max(row["exchanges_per_lease"] for row in found["swarm"].values())
    sizes = found["document_bytes"]
    largest = max(size for state, size in sizes.items() if "10 probes" not in state)
    rows += [
        ("10,000 tasks on one breaker: exchanges per lease", swarm, "<=", 1.5, 1),
        ("healthy process: exchanges per second, lease 0.1", found["healthy_exchanges_per_second"], "<=", 12, 10),
        ("state document, bytes, the largest of the default policy", largest, "<=", 300, 200),
        ("state document, bytes, with 10 probes running", sizes["half_open, 10 probes"], "<=", 300, 200),
    ]
    return [target(*row) for row in rows]


def target(measure: str, value: float | None, sense: str, must: float, aim: float | None) -> dict[str, Any]:
    """One target, and whether it is reached. aim: a stricter limit, if there is one."""

    def reached(limit: float | None) -> bool | None:
        if limit is None:
            return None
        return value is not None and (value <= limit if sense == "<=" else value >= limit)

    return {
        "measure": measure,
        "value": value,
        "must": f"{sense} {must:g}",
        "aim": None if aim is None else f"{sense} {aim:g}",
        "must_reached": reached(must),
        "aim_reached": reached(aim),
    }


# Printing --------------------------------------------------------------------------------------


def table(title: str, heads: list[str], rows: list[list[Any]]) -> None:
    """One table, with its numbers to the right."""
    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
    print(f"\n{title}")
    for row in [heads, ["-" * width for width in widths], *cells]:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
        print("  ".join([first, *rest]).rstrip())


def number(value: Any) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_times(title: str, rows: dict[str, Any]) -> None:
    """Microseconds per call, and each overhead as a multiple of that in the first row of ours."""
    ours = next((row["overhead_us"] for name, row in rows.items() if name.startswith("pybreaker_redis")), None)
    lines = [
        [
            name + (f"  [gave up on Redis {row['redis_given_up']} times]" if "redis_given_up" in row else ""),
            row["median_us"],
            row["overhead_us"] if name != BARE else "-",
            f"{number(row['low_us'])} .. {number(row['high_us'])}" if name != BARE else "-",
            row["overhead_us"] / ours if ours and name != BARE else "-",
            str(row["rounds"]),
        ]
        for name, row in rows.items()
    ]
    table(f"{title} (microseconds per call)", ["", "median", "overhead", "spread", "x ours", "rounds"], lines)


def print_all(found: dict[str, Any]) -> None:
    """Every table that was measured, the targets last."""
    for name, rows in found["times"].items():
        print_times(name, rows)
    for shell, rows in found.get("trips", {}).items():
        lines = [[name, row["median_us"], str(int(row["let_through"]))] for name, row in rows.items()]
        table(f"{shell}, trip: first failure to first rejection", ["", "microseconds", "calls let through"], lines)
    for shell, rows in found.get("commands", {}).items():
        kinds = list(next(iter(rows.values())))
        lines = [[name, *(str(row.get(kind, "-")) for kind in kinds)] for name, row in rows.items()]
        table(f"{shell}, commands sent to Redis per 1,000 calls, one after the other", ["", *kinds], lines)
    if "swarm" in found:
        print_stored(found)
    for where, reasons in found["not_run"].items():
        if reasons:
            table(f"not run ({where})", ["", "reason"], [[name, reason] for name, reason in reasons.items()])
    words = {True: "yes", False: "NO", None: "-"}
    lines = [
        [t["measure"], t["value"], t["must"], words[t["must_reached"]], t["aim"], words[t["aim_reached"]]]
        for t in found["targets"]
    ]
    table("targets", ["measure", "measured", "must", "reached", "aim", "reached"], lines)


def print_stored(found: dict[str, Any]) -> None:
    """Bytes in Redis, and the commands of a crowd."""
    lines = [[state, str(size)] for state, size in found["document_bytes"].items()]
    table("state document of pybreaker_redis", ["state", "bytes"], lines)
    lines = [[name, row["all"] - row["history"], row["history"]] for name, row in found["footprints"].items()]
    table("bytes in Redis of one tripped breaker (MEMORY USAGE)", ["", "state", "history of transitions"], lines)
    lines = [[how, row["calls"] / row["seconds"], row["exchanges_per_lease"]] for how, row in found["swarm"].items()]
    table("10,000 asyncio tasks on one breaker", ["", "calls per second", "exchanges per lease"], lines)


def machine(client: redis.Redis) -> dict[str, Any]:
    """What a reader needs to know about the machine; no names."""
    server = client.info("server")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "server": f"Valkey {server['valkey_version']}" if "valkey_version" in server else server["redis_version"],
        "libraries": {name: importlib.metadata.version(name) for name in PACKAGES if installed(name)},
    }


def installed(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def measure(quick: bool, only: str | None, rounds: int) -> dict[str, Any]:
    """One run on one server. only: "ways" measures the client alone."""
    with EmbeddedServer() as server, asyncio.Runner() as runner:
        bench = Bench(Env(server.url), runner, rounds, 0.03 if quick else 0.06)
        logger.addHandler(bench.alarms)
        logger.propagate = False
        gc.freeze()  # the collections between slices need not look at what was imported
        found: dict[str, Any] = {"machine": machine(bench.control), "rounds": rounds, "lease": LEASE, "times": {}}
        for work in [*client_works(), *([] if only else works(quick))]:
            print(f"measuring: {work.title}", file=sys.stderr)
            found["times"][work.title] = bench.times(work)
        if not only:
            print("measuring: trips, commands, bytes", file=sys.stderr)
            seconds = 1.0 if quick else 5.0
            found["trips"] = {shell: bench.trips(shell) for shell in ("sync", "asyncio")}
            found["commands"] = {shell: bench.commands(shell) for shell in ("sync", "asyncio")}
            found["healthy_exchanges_per_second"] = bench.healthy(seconds)
            found["swarm"] = {
                "paced": bench.run(bench.swarm(10_000, seconds, 2.0)),
                "flat out": bench.run(bench.swarm(10_000, seconds, 0.0)),
            }
            found["document_bytes"] = bench.document_bytes()
            found["footprints"] = bench.footprints()
        found["not_run"] = bench.not_run
        found["targets"] = targets(found)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="5 short rounds of everything, in a minute and a half; not for figures"
    )
    parser.add_argument("--only", choices=["ways"], help="only the tables of the client, in 40 seconds")
    parser.add_argument("--rounds", type=int, help="alternating rounds (default 7)")
    parser.add_argument("--json", type=pathlib.Path, help="where to write (default: results/bench.json for a full run)")
    options = parser.parse_args()
    found = measure(options.quick, options.only, options.rounds or (5 if options.quick else 7))
    print_all(found)
    path = options.json or (None if options.quick or options.only else RESULTS)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
