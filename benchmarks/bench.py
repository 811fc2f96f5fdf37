"""What does a guarded call cost, beside the bare call, beside every peer and beside a no-op EVALSHA?"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

import contenders
import redis
from contenders import (
    ASYNC,
    BARE_ASYNC,
    BARE_SYNC,
    CIRCUITBREAKER,
    INSIDE,
    INTERLOCK,
    NOOP,
    NOPANIC,
    NOT_RUN,
    ON_REDIS,
    OURS,
    PACKAGES,
    PYBREAKER,
    PYBREAKER_REDIS,
    STRICT,
    SYNC,
    TWO_EVALSHA,
    Env,
    Made,
    settled,
)

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Policy, _protocol, _scripts
from pybreaker_redis.embedded import EmbeddedServer

BARE = "bare call"
RESULTS = pathlib.Path(__file__).parent / "results" / "bench.json"
SLOW_SLICE = 0.8  # seconds; what takes longer is measured in fewer rounds
SLOW_ROUNDS = 3
HOPELESS = 5.0  # seconds; what takes longer is measured once, and is left out of the next work of that width
LEASE = 0.1
TRIPS_PER_SLICE = 5
RATES = {"error_rate_threshold": 0.5, "slow_call_duration_ms": 1000, "slow_call_rate_threshold": 0.5}
logger = logging.getLogger("pybreaker_redis")


class Boom(Exception):
    """What the guarded function raises."""


class Alarms(logging.Handler):
    """Counts how often one of our breakers gave up on Redis: its times are then not those of Redis."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """One warning."""
        self.count += "does not answer" in record.msg


# The work --------------------------------------------------------------------------------------


def succeed() -> int:
    """The guarded function of a healthy service."""
    return 1


def fail() -> int:
    """That of a dead one."""
    raise Boom


async def asucceed() -> int:
    """The same for asyncio; it does not suspend."""
    return 1


async def ayield() -> int:
    """One turn of the loop: with many tasks all are in flight at once."""
    await asyncio.sleep(0)
    return 1


async def afail() -> int:
    """A dead one."""
    raise Boom


def mixed() -> Callable[[], int]:
    """Every hundredth call fails."""
    tick = itertools.count(1).__next__

    def call() -> int:
        if tick() % 100:
            return 1
        raise Boom

    return call


def amixed() -> Callable[[], Any]:
    """The same for asyncio."""
    tick = itertools.count(1).__next__

    async def call() -> int:
        if tick() % 100:
            return 1
        raise Boom

    return call


def loop(func: Callable[[], Any], calls: int, caught: Any) -> None:
    """Call func so often."""
    for _ in itertools.repeat(None, calls):
        try:  # noqa: SIM105 - a context manager would be measured with it
            func()
        except caught:
            pass


async def aloop(func: Callable[[], Any], calls: int, caught: Any) -> None:
    """Await func so often."""
    for _ in itertools.repeat(None, calls):
        try:  # noqa: SIM105
            await func()
        except caught:
            pass


def sync_slice(func: Callable[[], Any], calls: int, caught: Any, threads: int) -> float:
    """Seconds for that many calls, spread over threads."""
    if threads == 1:
        began = perf_counter()
        loop(func, calls, caught)
        return perf_counter() - began
    gate = threading.Barrier(threads + 1)
    errors: list[BaseException] = []

    def run() -> None:
        gate.wait()
        try:
            loop(func, calls // threads, caught)
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


async def async_slice(func: Callable[[], Any], calls: int, caught: Any, tasks: int) -> float:
    """Seconds for that many calls, spread over tasks."""
    began = perf_counter()
    if tasks == 1:
        await aloop(func, calls, caught)
    else:
        work = (aloop(func, calls // tasks, caught) for _ in range(tasks))
        # all of them to their end: what goes on after an error would be measured with the next contender
        ended = await asyncio.gather(*work, return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException):
                raise error
    return perf_counter() - began


class Work:
    """One question: what is called, by how many, and whether breakers may trip."""

    def __init__(self, shell: str, name: str, width: int, func: Callable[[], Any], *, trips: bool) -> None:
        self.shell, self.name, self.width, self.make_func, self.trips = shell, name, width, func, trips
        unit = "thread" if shell == "sync" else "task"
        self.title = f"{shell}, {width:,} {unit}{'s' * (width > 1)}, {name}"

    def functions(self) -> tuple[Any, Any]:
        """What a breaker guards, and what opens it first (or nothing)."""
        func = self.make_func()
        return func, (func if self.name == "open reject" else None)


def works(quick: bool) -> Iterable[Work]:
    """All questions that are answered by a time per call."""
    for threads in (1, 16):
        yield Work("sync", "closed success", threads, lambda: succeed, trips=True)
        yield Work("sync", "closed failure", threads, lambda: fail, trips=False)
        yield Work("sync", "open reject", threads, lambda: fail, trips=True)
        yield Work("sync", "mixed 1 % failures", threads, mixed, trips=True)
    for tasks in (1, 100, 10_000) if not quick else (1, 100):
        yield Work("asyncio", "closed success", tasks, lambda: asucceed if tasks == 1 else ayield, trips=True)  # noqa: B023
        yield Work("asyncio", "open reject", tasks, lambda: afail, trips=True)
        if tasks < 10_000:
            yield Work("asyncio", "closed failure", tasks, lambda: afail, trips=False)
            yield Work("asyncio", "mixed 1 % failures", tasks, amixed, trips=True)


# Measuring -------------------------------------------------------------------------------------


class Entry:
    """One contender at one work: its breaker lives through all rounds."""

    def __init__(self, name: str, made: Made, func: Any, guarded: Any, caught: Any) -> None:
        self.name, self.made, self.func, self.guarded, self.caught = name, made, func, guarded, caught
        self.calls = 0
        self.rounds = 0
        self.seconds: dict[int, float] = {}  # per call, by round
        self.gave_up = 0


class Bench:
    """One run: the server, the loop, and what was found."""

    def __init__(self, env: Env, runner: asyncio.Runner, rounds: int, slice_seconds: float) -> None:
        self.env, self.runner, self.rounds, self.slice_seconds = env, runner, rounds, slice_seconds
        self.control = env.client()
        self.alarms = Alarms()
        self.hopeless: dict[tuple[str, int, str], str] = {}
        self.not_run: dict[str, dict[str, str]] = {shell: dict(reasons) for shell, reasons in NOT_RUN.items()}

    def run(self, work: Any) -> Any:
        """A coroutine's result on the one loop of this run."""
        return self.runner.run(work) if inspect.iscoroutine(work) else work

    def build(self, shell: str, build: contenders.Build, trips: bool) -> Made:
        """A breaker, made inside the loop where that is needed."""
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
        """Seconds for that many calls."""
        before = self.alarms.count
        if work.shell == "sync":
            taken = sync_slice(entry.guarded, calls, entry.caught, work.width)
        else:
            taken = self.run(async_slice(entry.guarded, calls, entry.caught, work.width))
        entry.gave_up += self.alarms.count - before
        return taken

    def entry(self, work: Work, name: str, build: contenders.Build) -> Entry:
        """A breaker in the state that the work is about."""
        made = self.build(work.shell, build, work.trips)
        func, opener = work.functions()
        guarded = made.wrap(func)
        if opener:
            self.open(guarded, made.rejected)
        return Entry(name, made, func, guarded, made.rejected if opener else Boom)

    def open(self, guarded: Any, rejected: Any) -> int:
        """Fail until it rejects: the calls that were let through."""

        async def once() -> None:
            await settled(guarded())

        for calls in range(50):
            try:
                self.run(once())
            except rejected:
                return calls
            except Boom:
                pass
        raise RuntimeError("does not trip after 50 failures")

    def entries(self, work: Work) -> list[Entry]:
        """Everybody who can do this work, each tried once and given its number of calls."""
        everybody = dict(SYNC if work.shell == "sync" else ASYNC)
        if work.name == "closed success":
            everybody |= BARE_SYNC if work.shell == "sync" else BARE_ASYNC
        func = work.functions()[0]
        found = [Entry(BARE, Made(lambda func: func), func, func, Boom)]
        self.calibrate(work, found[0])
        for name, build in everybody.items():
            if name in self.not_run.setdefault(work.shell, {}):
                continue
            if reason := self.hopeless.get((work.shell, work.width, name)):
                self.not_run.setdefault(work.title, {})[name] = reason
                continue
            entry = None
            try:
                entry = self.entry(work, name, build)
                self.calibrate(work, entry)
            except Exception as error:
                if entry:
                    self.close(entry.made)
                # one that fails only in a crowd still does the other works
                where = work.shell if work.width == 1 else work.title
                self.not_run.setdefault(where, {})[name] = f"{type(error).__name__}: {error}"
            else:
                found.append(entry)
        return found

    def calibrate(self, work: Work, entry: Entry) -> None:
        """As many calls as fill a slice, and fewer rounds for what takes long."""
        calls = max(work.width, 20)
        taken = self.slice(work, entry, calls)  # connects
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
        """Microseconds per call of everybody, in alternating rounds."""
        entries = self.entries(work)
        for turn in range(self.rounds):
            first = turn % len(entries)
            for entry in entries[first:] + entries[:first]:
                if turn < entry.rounds:
                    gc.collect()
                    entry.seconds[turn] = self.slice(work, entry, entry.calls) / entry.calls
        for entry in entries:
            self.close(entry.made)
        bare = entries[0].seconds
        return {entry.name: summary(entry, bare, work.name != "open reject") for entry in entries}

    def trips(self, shell: str) -> dict[str, Any]:
        """Microseconds from the first failure to the first rejection, and the calls let through."""
        found: dict[str, list[tuple[float, int]]] = {}
        for _ in range(self.rounds * TRIPS_PER_SLICE):
            for name, build in (SYNC if shell == "sync" else ASYNC).items():
                if name not in self.not_run.get(shell, {}):
                    found.setdefault(name, []).append(self.trip(shell, build))
        return {
            name: {
                "median_us": statistics.median(seconds for seconds, _ in trips) * 1e6,
                "let_through": statistics.median(calls for _, calls in trips),
            }
            for name, trips in found.items()
        }

    def trip(self, shell: str, build: contenders.Build) -> tuple[float, int]:
        """One fresh breaker, connected by one success, that fails until it rejects."""
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

    # Counting and asking the server ------------------------------------------------------------

    def commands(self, shell: str) -> dict[str, dict[str, float]]:
        """Top-level commands per 1,000 calls, one call after the other."""
        found: dict[str, dict[str, float]] = {}
        for work in works(True):
            if work.shell != shell or work.width > 1:
                continue
            for name, build in (SYNC if shell == "sync" else ASYNC).items():
                if name in ON_REDIS and name not in self.not_run.get(shell, {}):
                    entry = self.entry(work, name, build)
                    self.slice(work, entry, 20)
                    before = self.top_level(name)
                    self.slice(work, entry, 1000)
                    found.setdefault(name, {})[work.name] = self.top_level(name) - before
                    self.close(entry.made)
        return found

    def top_level(self, name: str) -> int:
        """Commands that clients have sent so far, without ours of measuring."""
        skipped = INSIDE.get(name, set()) | {"info", "config", "hello", "ping"}
        stats = self.control.info("commandstats")
        return sum(
            int(stat["calls"])
            for command, stat in stats.items()
            if command.removeprefix("cmdstat_").split("|")[0] not in skipped
        )

    def evalsha(self, work: Callable[[], Any]) -> tuple[float, int]:
        """Server microseconds and number of the EVALSHA that the work causes."""
        self.control.config_resetstat()
        work()
        stat = self.control.info("commandstats")["cmdstat_evalsha"]
        return float(stat["usec"]), int(stat["calls"])

    def healthy(self, seconds: float) -> float:
        """Commands per second of a process whose 16 threads call all the time, at lease 0.1."""
        breaker = CircuitBreaker(self.env.name(), redis=self.env.client(), lease=LEASE)
        guarded = breaker(succeed)
        guarded()
        before, began = self.top_level(OURS), perf_counter()
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
        sent = self.top_level(OURS) - before
        taken = perf_counter() - began
        breaker.close()
        return sent / taken

    async def swarm(self, tasks: int, seconds: float, pause: float) -> dict[str, float]:
        """EVALSHA per lease with that many tasks that pause for up to so many seconds between calls, or never."""
        breaker = AsyncCircuitBreaker(self.env.name(), redis=self.env.async_client(), lease=LEASE)
        guarded = breaker(ayield)
        await guarded()
        before, began = self.top_level(OURS), perf_counter()
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
        sent = self.top_level(OURS) - before
        await breaker.close()
        return {"tasks": tasks, "calls": next(calls), "seconds": taken, "evalsha_per_lease": sent / (taken / LEASE)}


def trip(bad: Callable[[], Any], rejected: Any) -> tuple[float, int]:
    """Seconds and calls until it rejects."""
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
    """Medians in microseconds; overhead is over the bare call of the same round."""
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


# Server time per script ------------------------------------------------------------------------


def script_work(bench: Bench, times: int) -> dict[str, Callable[[], Any]]:
    """EVALSHA of one kind each, on documents in the state that is named."""
    client = bench.env.client()
    noop = client.script_load(NOOP)
    for script in _scripts.SCRIPTS:
        client.script_load(_scripts.compose(script))

    def run(keys: Any, script: str, request: dict[str, Any]) -> dict[str, Any]:
        body = _protocol.encode({"instance": "bench-00000000", **request})
        reply: dict[str, Any] = _protocol.decode(client.evalsha(_scripts.sha1(script), 3, *keys, body))
        return reply

    def repeat(script: str, request: dict[str, Any], prepare: Iterable[tuple[str, dict[str, Any]]] = ()) -> Any:
        keys = _protocol.keys_of(bench.env.name())
        generation = run(keys, "acquire", {})["generation"]
        for name, fields in prepare:
            generation = run(keys, name, {"generation": generation, **fields} if name == "record" else fields)[
                "generation"
            ]
        stamped = {"generation": generation, **request} if script == "record" else request
        body = _protocol.encode({"instance": "bench-00000000", **stamped})
        sha = _scripts.sha1(script)

        def work() -> None:
            for _ in range(times):
                client.evalsha(sha, 3, *keys, body)

        return work

    def nothing() -> None:
        for _ in range(times):
            client.evalsha(noop, 0)

    def with_window(script: str, request: dict[str, Any], window_ms: int = 36_000_000, pause: float = 0.0) -> Any:
        """On a window whose ten buckets all hold counts; pause: between calls, so that each meets an ended bucket."""
        policy = {**RATES, "window_ms": window_ms}
        keys = _protocol.keys_of(bench.env.name())
        generation = run(keys, "acquire", {"policy": policy})["generation"]
        run(keys, "record", {"generation": generation, "successes": 1000, "policy": policy})
        document = json.loads(client.get(keys.state))
        document["window"] |= {"calls": 91_000, "failures": 900, "slow": 450, "past": " ".join(["10000,100,50"] * 9)}
        client.set(keys.state, json.dumps(document, separators=(",", ":")))
        stamped = {"generation": generation, **request} if script == "record" else request
        body = _protocol.encode({"instance": "bench-00000000", "policy": policy, **stamped})
        sha = _scripts.sha1(script)

        def work() -> None:
            for _ in range(times):
                client.evalsha(sha, 3, *keys, body)
                if pause:
                    time.sleep(pause)

        return work

    patient = {"policy": {"failure_threshold": 10**9}}
    tripped = [("record", {"failures": 5})]
    return {
        "no-op": nothing,
        "acquire, closed": repeat("acquire", {}),
        "acquire, open": repeat("acquire", {}, tripped),
        "record, closed, success": repeat("record", {"successes": 1}),
        # a success counts first and ends the row of failures: never more than one of the five that trip
        "record, closed, failure": repeat("record", {"successes": 1, "failures": 1}),
        "record, closed, failure, policy": repeat("record", {"failures": 1, **patient}),
        "record, window, successes": with_window("record", {"successes": 100}),
        "record, window, failure": with_window("record", {"successes": 99, "failures": 1}),
        "record, a bucket of the window ends": with_window("record", {"successes": 100}, window_ms=10, pause=0.001),
        "acquire, window": with_window("acquire", {}),
        "record, open (a late failure)": repeat("record", {"failures": 1}, tripped),
        "snapshot, closed": repeat("snapshot", {}),
        "snapshot, open": repeat("snapshot", {}, tripped),
        "control, force_closed": repeat("control", {"action": "force_closed", "duration_ms": 600_000}),
        "control, reset": repeat("control", {"action": "reset"}, tripped),
    }


def strict_work(bench: Bench, times: int) -> dict[str, Callable[[], Any]]:
    """Calls that go through two scripts each."""
    found: dict[str, Callable[[], Any]] = {}
    for name in (STRICT, NOPANIC, TWO_EVALSHA):
        made = (SYNC | BARE_SYNC)[name](bench.env, True)
        guarded = made.wrap(succeed)
        guarded()
        found[f"call: {name}"] = lambda guarded=guarded: loop(guarded, times, Boom)
    return found


def server_times(bench: Bench, times: int) -> dict[str, dict[str, float]]:
    """Server microseconds per script and per strict call, in alternating rounds."""
    works = script_work(bench, times) | strict_work(bench, times)
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(bench.rounds):
        names = list(works)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(bench.evalsha(works[name])[0] / times)
    noop = statistics.median(found["no-op"])
    return {
        name: {
            "median_us": statistics.median(values),
            "low_us": min(values),
            "high_us": max(values),
            "per_noop": statistics.median(values) / noop,
        }
        for name, values in found.items()
    }


# Bytes -----------------------------------------------------------------------------------------


def document_bytes(bench: Bench) -> dict[str, dict[str, int]]:
    """The length of the state document in every state, in both encodings."""
    found: dict[str, dict[str, int]] = {}
    for encoding in ("json", "msgpack"):
        for state in ("closed", "closed, 4 failures", "open", "half_open, 1 probe", "half_open, 10 probes", "forced"):
            keys = in_state(bench, state, encoding)
            found.setdefault(state, {})[encoding] = int(bench.control.strlen(keys.state))
    return found


def in_state(bench: Bench, state: str, encoding: Any) -> _protocol.Keys:
    """The keys of a breaker that was brought into a state by calls."""
    policy = Policy(reset_timeout=0.001, half_open_max_calls=10, success_threshold=100)
    breaker = CircuitBreaker(bench.env.name(), redis=bench.env.client(), policy=policy, lease=0, encoding=encoding)
    failures = {"closed": 0, "forced": 5, "closed, 4 failures": 4}.get(state, 5)
    breaker.call(succeed)
    loop(breaker(fail), failures, Boom)
    if state.startswith("half_open"):
        time.sleep(0.01)
        for _ in range(10 if "10" in state else 1):
            breaker.acquire()
    if state == "forced":
        breaker.force_open(600)
    return breaker.keys


def footprints(bench: Bench) -> dict[str, dict[str, int]]:
    """Bytes of all keys of one tripped breaker, as MEMORY USAGE counts them."""
    found: dict[str, dict[str, int]] = {}
    for name in ON_REDIS:
        shell = "asyncio" if name in bench.not_run.get("sync", {}) else "sync"
        if name in bench.not_run.get(shell, {}):
            continue
        before = set(bench.control.keys())
        made = bench.build(shell, (SYNC if shell == "sync" else ASYNC)[name], True)
        bench.open(made.wrap(fail if shell == "sync" else afail), made.rejected)
        time.sleep(0.05)  # interlock-cb writes in the background
        sizes = {key.decode(): bench.control.memory_usage(key) or 0 for key in set(bench.control.keys()) - before}
        found[name] = {
            "all": sum(sizes.values()),
            "history": sum(size for key, size in sizes.items() if key.endswith(":history")),
        }
        bench.close(made)
    return found


# The targets -----------------------------------------------------------------------------------


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of the goals, from the medians of this run."""
    sync = found["times"]["sync, 1 thread, closed success"]
    reject = found["times"]["sync, 1 thread, open reject"]
    loop_ = found["times"]["asyncio, 1 task, closed success"]
    server = found["server"]
    all_scripts = {name: row["per_noop"] for name, row in server.items() if not name.startswith(("no-op", "call"))}
    windowed = {name: value for name, value in all_scripts.items() if ", window" in name}
    window = max(windowed, key=lambda name: windowed[name])
    scripts = {name: value for name, value in all_scripts.items() if name not in windowed}
    worst = max(scripts, key=lambda name: scripts[name])
    hot = max((name for name in scripts if name.startswith(("acquire", "record"))), key=lambda name: scripts[name])
    largest = max(sizes["json"] for state, sizes in found["document_bytes"].items() if "10 probes" not in state)

    crowded = found["document_bytes"]["half_open, 10 probes"]["json"]

    def over(row: dict[str, Any], ours: str, other: str) -> float | None:
        return row[ours]["overhead_us"] / row[other]["overhead_us"] if other in row and ours in row else None

    def whole(row: dict[str, Any], ours: str, other: str) -> float:
        ratio: float = row[ours]["median_us"] / row[other]["median_us"]
        return ratio

    shared = over(sync, PYBREAKER_REDIS, OURS)
    swarm = max(row["evalsha_per_lease"] for row in found["swarm"].values())
    strict = server[f"call: {STRICT}"]["median_us"] / server[f"call: {NOPANIC}"]["median_us"]
    rows = [
        ("closed success, sync, overhead: ours / pybreaker in memory", over(sync, OURS, PYBREAKER), "<=", 0.5, 0.3),
        ("closed success, sync, overhead: ours / circuitbreaker", over(sync, OURS, CIRCUITBREAKER), "<=", 1.0, 0.6),
        ("closed success, asyncio, overhead: ours / interlock-cb", over(loop_, OURS, INTERLOCK), "<=", 0.5, 0.2),
        ("closed success, overhead: pybreaker with Redis / ours", shared, ">=", 200, 500),
        ("open reject: ours / pybreaker in memory", over(reject, OURS, PYBREAKER), "<=", 1.0, 0.5),
        ("strict call: ours / two bare EVALSHA", whole(sync, STRICT, TWO_EVALSHA), "<=", 1.25, 1.1),
        ("strict call: ours / nopanic-redis", whole(sync, STRICT, NOPANIC), "<=", 0.9, 0.75),
        ("10,000 tasks on one breaker: EVALSHA per lease", swarm, "<=", 1.5, 1),
        ("healthy process: commands per second, lease 0.1", found["healthy_commands_per_second"], "<=", 12, 10),
        (f"server time per script / no-op (worst: {worst})", scripts[worst], "<=", 16, 8),
        (f"the same, of a call's own scripts (worst: {hot})", scripts[hot], "<=", 16, 8),
        (f"the same, with a window of 10 buckets (worst: {window})", windowed[window], "<=", 24, 14),
        ("server time per strict call: ours / nopanic-redis", strict, "<=", 2.5, 1.2),
        ("state document, bytes (largest state of the default policy, JSON)", largest, "<=", 300, 200),
        ("the same, with half_open_max_calls=10 and all 10 probes in flight", crowded, "<=", 300, 200),
    ]
    return [target(*row) for row in rows]


def target(measure: str, value: float | None, sense: str, must: float, aim: float) -> dict[str, Any]:
    """One row: whether a value is on the right side."""

    def reached(limit: float) -> bool:
        return value is not None and (value <= limit if sense == "<=" else value >= limit)

    return {
        "measure": measure,
        "value": value,
        "must": f"{sense} {must:g}",
        "aim": f"{sense} {aim:g}",
        "must_reached": reached(must),
        "aim_reached": reached(aim),
    }


# Printing --------------------------------------------------------------------------------------


def table(title: str, heads: list[str], rows: list[list[Any]]) -> None:
    """One table, numbers to the right."""
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
    """Microseconds per call, and how many times ours each peer takes."""
    ours = rows.get(OURS, {}).get("overhead_us")
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
    """Every table, the goals last."""
    for title, rows in found["times"].items():
        print_times(title, rows)
    for shell, rows in found["trips"].items():
        lines = [[name, row["median_us"], str(int(row["let_through"]))] for name, row in rows.items()]
        table(f"{shell}, trip: first failure to first rejection", ["", "microseconds", "calls let through"], lines)
    for shell, rows in found["commands"].items():
        kinds = list(next(iter(rows.values())))
        lines = [[name, *(str(row.get(kind, "-")) for kind in kinds)] for name, row in rows.items()]
        table(f"{shell}, commands sent to Redis per 1,000 calls in a row", ["", *kinds], lines)
    lines = [
        [name, row["median_us"], f"{number(row['low_us'])} .. {number(row['high_us'])}", row["per_noop"]]
        for name, row in found["server"].items()
    ]
    table("server time (INFO commandstats, EVALSHA only)", ["", "microseconds", "spread", "x no-op"], lines)
    lines = [[state, str(row["json"]), str(row["msgpack"])] for state, row in found["document_bytes"].items()]
    table("bytes of our state document", ["state", "json", "msgpack"], lines)
    lines = [[name, row["all"] - row["history"], row["history"]] for name, row in found["footprints"].items()]
    table("bytes in Redis of one tripped breaker (MEMORY USAGE)", ["", "state", "history of transitions"], lines)
    lines = [[how, row["calls"] / row["seconds"], row["evalsha_per_lease"]] for how, row in found["swarm"].items()]
    table("10,000 asyncio tasks on one breaker", ["", "calls per second", "EVALSHA per lease"], lines)
    for shell, reasons in found["not_run"].items():
        table(f"not run ({shell})", ["", "reason"], [[name, reason] for name, reason in reasons.items()])
    yes = {True: "yes", False: "NO"}
    lines = [
        [t["measure"], t["value"], t["must"], yes[t["must_reached"]], t["aim"], yes[t["aim_reached"]]]
        for t in found["targets"]
    ]
    table("targets", ["measure", "measured", "must", "reached", "aim", "reached"], lines)


def machine(client: redis.Redis) -> dict[str, Any]:
    """What a reader needs to know of where this ran; no names."""
    server = client.info("server")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "server": f"Valkey {server['valkey_version']}" if "valkey_version" in server else server["redis_version"],
        "libraries": {name: importlib.metadata.version(name) for name in PACKAGES if installed(name)},
    }


def installed(name: str) -> bool:
    """Whether a distribution is there."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """Everything, in one run on one server."""
    with EmbeddedServer() as server, asyncio.Runner() as runner:
        env = Env(server.url)
        bench = Bench(env, runner, rounds, 0.02 if quick else 0.06)
        logger.addHandler(bench.alarms)
        logger.propagate = False
        found: dict[str, Any] = {"machine": machine(bench.control), "rounds": rounds, "lease": LEASE, "times": {}}
        for work in works(quick):
            print(f"measuring: {work.title}", file=sys.stderr)
            found["times"][work.title] = bench.times(work)
        print("measuring: trips, commands, server time, bytes", file=sys.stderr)
        found["trips"] = {shell: bench.trips(shell) for shell in ("sync", "asyncio")}
        found["commands"] = {shell: bench.commands(shell) for shell in ("sync", "asyncio")}
        found["server"] = server_times(bench, 300 if quick else 2000)
        found["healthy_commands_per_second"] = bench.healthy(1.0 if quick else 5.0)
        found["swarm"] = {
            "paced": bench.run(bench.swarm(10_000, 1.0 if quick else 5.0, 2.0)),
            "flat out": bench.run(bench.swarm(10_000, 1.0 if quick else 5.0, 0.0)),
        }
        found["document_bytes"] = document_bytes(bench)
        found["footprints"] = footprints(bench)
        found["not_run"] = bench.not_run
        found["targets"] = targets(found)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 short rounds: to see that it runs, not for figures")
    parser.add_argument("--rounds", type=int, help="alternating rounds (default 7)")
    parser.add_argument("--json", type=pathlib.Path, help="where to write (default results/bench.json; quick: nowhere)")
    options = parser.parse_args()
    found = measure(options.quick, options.rounds or (3 if options.quick else 7))
    print_all(found)
    target = options.json or (None if options.quick else RESULTS)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
