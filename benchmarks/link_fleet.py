"""Situations of one process, or many, and one Redis: real servers, real processes, and what was counted in them.

benchmarks/link.py prints the figures, and tests/link asserts bounds on them. The guarded code uses only the public API.
The server is observed through INFO and MONITOR, and hangs by SIGSTOP to its process id. Each function takes a server
of its own, because it may hang it, fill it or count everything that it does.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import dataclasses
import inspect
import itertools
import logging
import math
import multiprocessing
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio

from pybreaker_redis import (
    AsyncCircuitBreaker,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    Config,
    Event,
    Policy,
)
from pybreaker_redis.embedded import EmbeddedServer

NEVER = 10**9  # a failure_threshold that no run of failures reaches
PATIENCE = 60.0  # seconds for what always happens, on however slow a machine
SLOW_MACHINE = 5.0  # redis_timeout where a slow machine must not be taken for an outage
THREADS = "pybreaker_redis"  # how the names of this library's threads begin
OWN_COMMANDS = {"INFO", "MONITOR", "CLIENT", "HELLO", "PING"}


class Boom(Exception):
    """What a dead service raises."""


def fail() -> None:
    """A dead service."""
    raise Boom


def fine() -> int:
    """A healthy service."""
    return 1


async def fine_async() -> int:
    """A healthy service of an event loop."""
    return 1


def outcome(call: Callable[[Callable[[], Any]], Any], function: Callable[[], Any]) -> str:
    """Call the function guarded; says "succeeded", "failed" or "rejected"."""
    try:
        call(function)
    except Boom:
        return "failed"
    except CircuitOpenError:
        return "rejected"
    return "succeeded"


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    """Whether the condition came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


# Observing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def hung(server: EmbeddedServer) -> Iterator[None]:
    """Stop the server's process for the length of the block."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


class Gauge:
    """What a server did between two readings.

    One reading costs one command on one connection. reads: times that the server read from a socket, which is the
    number of exchanges as long as a pipeline fits into its buffer. scripts: EVALSHA and EVAL. mgets: also those
    inside scripts.
    """

    def __init__(self, server: EmbeddedServer) -> None:
        self._client = redis.Redis.from_url(server.url)
        self._before = self.total()

    def total(self) -> dict[str, float]:
        """Everything since the server started."""
        info = self._client.info("all")

        def of(command: str, field: str) -> float:
            return float(info.get(f"cmdstat_{command}", {}).get(field, 0))

        return {
            "seconds": time.monotonic(),
            "reads": info["total_reads_processed"],
            "connections": info["total_connections_received"],
            "scripts": of("evalsha", "calls") + of("eval", "calls"),
            "script_usec": of("evalsha", "usec") + of("eval", "usec"),
            "mgets": of("mget", "calls"),
            "mget_usec": of("mget", "usec"),
        }

    def start(self) -> None:
        """Begin here."""
        self._before = self.total()

    def read(self) -> dict[str, float]:
        """What happened since start(), without the reading itself."""
        now = self.total()
        found = {name: now[name] - self._before[name] for name in now}
        found["reads"] -= 1
        return found


@contextlib.contextmanager
def monitored(server: EmbeddedServer) -> Iterator[list[list[bytes]]]:
    """The commands that clients send during the block, in order; complete once the block has ended."""
    commands: list[list[bytes]] = []
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(f"{server.directory}/r.sock")
        line.sendall(b"MONITOR\r\n")
        assert line.recv(5) == b"+OK\r\n"
        reader = threading.Thread(target=_read_commands, args=(line, commands), daemon=True)
        reader.start()
        try:
            yield commands
        finally:
            time.sleep(0.05)  # the server writes what it monitored after it has answered
            line.shutdown(socket.SHUT_RDWR)
            reader.join()


def _read_commands(line: socket.socket, commands: list[list[bytes]]) -> None:
    for text in line.makefile("rb"):
        _, _, rest = text.partition(b"[")
        source, _, words = rest.partition(b"] ")
        if source.endswith(b" lua"):
            continue
        command = [codecs.escape_decode(word)[0] for word in re.findall(rb'"((?:[^"\\]|\\.)*)"', words)]
        if command and command[0].decode().upper() not in OWN_COMMANDS:
            commands.append(command)


class Warnings(logging.Handler):
    """Counts the warnings of this library, as a `with` block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> Warnings:
        logging.getLogger("pybreaker_redis").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("pybreaker_redis").removeHandler(self)


# Processes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(*jobs: tuple[Any, ...]) -> Iterator[list[Connection]]:
    """A process for each (function, *arguments), which gets its end of a pipe as the first argument.

    Each says "ready" before the block begins. All end with the block.
    """
    context = multiprocessing.get_context("forkserver")  # as cheap as a fork, and inherits no thread and no socket
    context.set_forkserver_preload(["pybreaker_redis", "redis.asyncio"])
    started, pipes = [], []
    try:
        for function, *arguments in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            pipes.append(ours)
        for pipe in pipes:
            assert receive(pipe) == "ready"
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()


def receive(pipe: Connection) -> Any:
    """The next message of a process."""
    assert pipe.poll(PATIENCE), "a process does not answer"
    return pipe.recv()


def on_schedule(begin: float, until: float, rate: float) -> Iterator[float]:
    """Moments at which to call, so many a second from a random start; what is late is left out."""
    due = begin + random.random() / rate
    while due < until:
        time.sleep(max(0.0, due - time.monotonic()))
        yield due
        due = max(due + 1 / rate, time.monotonic())


# One bad process among healthy ones (A2, A3) ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OneBad:
    """A fleet of which one process fails at every call.

    client: "manager" as documented, "watch" for a breaker that watches, "plain" for one that does not. rule:
    "threshold" or "rate". late: seconds for which the fleet runs before the bad process starts.
    """

    client: str
    rule: str = "threshold"
    healthy: int = 8
    healthy_rate: float = 50.0
    bad_rate: float = 10.0
    late: float = 1.0
    seconds: float = 20.0

    def __str__(self) -> str:
        late = f", starting {self.late:g} s late" if self.late > 1 else ""
        return f"{self.client}, {self.rule}: {self.healthy} healthy, one bad at {self.bad_rate:g}/s{late}"

    def policy(self) -> Policy:
        """Five failures in a row or half of the calls, never both."""
        if self.rule == "threshold":
            return Policy(failure_threshold=5, reset_timeout=2.0)
        return Policy(failure_threshold=NEVER, reset_timeout=2.0, error_rate_threshold=0.5)


def one_bad_process(server: EmbeddedServer, case: OneBad) -> dict[str, Any]:
    """Trips, and what became of the calls, while the bad process called for so many seconds."""
    healthy = [(_call_steadily, server.url, case, case.healthy_rate, fine)] * case.healthy
    with processes(*healthy, (_call_steadily, server.url, case, case.bad_rate, fail)) as pipes:
        begin = time.monotonic() + 0.1
        until = begin + case.late + case.seconds
        for pipe in pipes[:-1]:
            pipe.send((begin, until))
        pipes[-1].send((begin + case.late, until))
        tally = sum((receive(pipe) for pipe in pipes), Counter[str]())
    history = CircuitBreaker("service", redis=server.url, policy=case.policy()).history(10_000)
    return {
        "trips": sum(entry.new == "open" for entry in history),
        **{kind: tally[kind] for kind in ("succeeded", "failed", "rejected", "redis_error")},
    }


def _call_steadily(pipe: Connection, url: str, case: OneBad, rate: float, function: Callable[[], Any]) -> None:
    tally: Counter[str] = Counter()

    def hear(event: Event) -> None:
        tally[event.kind] += 1

    guard: Callable[[Callable[[], Any]], Any]
    if case.client == "manager":
        config = Config(redis_url=url, defaults=case.policy())
        manager = CircuitBreakerManager.with_redis(config, listeners=[hear])
        guard = lambda function: manager.call("service", function)  # noqa: E731
    else:
        breaker = CircuitBreaker("service", redis=url, policy=case.policy(), listeners=[hear])
        if case.client == "watch":
            breaker.watch()
        guard = breaker.call
    pipe.send("ready")
    for _ in on_schedule(*pipe.recv(), rate):
        tally[outcome(guard, function)] += 1
    pipe.send(tally)


# Old successes (A4, A5) ---------------------------------------------------------------------------


def calls_until_trip(
    redis_url: str | None, *, lease: float = 0.1, window: float = 1.0, pause: float = 0.0, most: int = 600
) -> int | None:
    """200 good calls, silence for three windows, then every second call fails: how many calls until it is open.

    pause: seconds between the calls after the silence. None: it did not open within that many calls.
    """
    policy = Policy(failure_threshold=NEVER, error_rate_threshold=0.5, minimum_calls=20, window=window)
    breaker = CircuitBreaker(
        f"old-{lease}-{pause}", redis=redis_url, policy=policy, lease=lease, redis_timeout=SLOW_MACHINE
    )
    for _ in range(200):
        breaker.call(fine)
    time.sleep(3 * window)
    for number in range(most):
        if outcome(breaker.call, fail if number % 2 else fine) == "rejected":
            return number
        time.sleep(pause)
    return None


def failures_until_rejection(
    server: EmbeddedServer,
    *,
    rate: float,
    processes_of: int = 16,
    each: int = 8,
    healthy: float = 3.0,
    lease: float = 0.1,
) -> dict[str, Any]:
    """The service dies at one moment for a whole fleet, threshold 5: failed calls until the first rejection.

    Each of the instances (processes_of x each) has a thread, a client and a breaker, and calls `rate` times a second
    if the machine can. never: instances that were not rejected within three seconds.
    """
    jobs = [(_serve_until_dead, server.url, each, rate, lease)] * processes_of
    with processes(*jobs) as pipes:
        begin = time.monotonic() + 0.2
        dies = begin + healthy
        for pipe in pipes:
            pipe.send((begin, dies, dies + 3.0))
        found = [receive(pipe) for pipe in pipes]
    failures = [moment for moments, _, _ in found for moment in moments]
    rejections = [moment for _, moments, _ in found for moment in moments]
    first = min(rejections, default=math.inf)
    return {
        "instances": processes_of * each,
        "failures": sum(moment < first for moment in failures),
        "all_failures": len(failures),
        "never": processes_of * each - len(rejections),
        "calls_per_second": sum(calls for _, _, calls in found) / healthy,
        "seconds": first - dies,
    }


def _serve_until_dead(pipe: Connection, url: str, each: int, rate: float, lease: float = 0.1) -> None:
    policy = Policy(failure_threshold=5, reset_timeout=600.0)
    breakers = [
        CircuitBreaker(
            "doomed", redis=redis.Redis.from_url(url), policy=policy, lease=lease, redis_timeout=SLOW_MACHINE
        )
        for _ in range(each)
    ]
    pipe.send("ready")
    begin, dies, until = pipe.recv()
    failures: list[float] = []
    rejections: list[float] = []
    calls = [0] * each

    def service() -> None:
        now = time.monotonic()
        if now >= dies:
            failures.append(now)
            raise Boom

    def work(number: int) -> None:
        breaker = breakers[number]
        for due in on_schedule(begin, until, rate):
            calls[number] += due < dies
            if outcome(breaker.call, service) == "rejected":
                rejections.append(time.monotonic())
                return

    run_threads(each, work)
    pipe.send((failures, rejections, sum(calls)))


def run_threads(count: int, work: Callable[[int], object]) -> None:
    """work(number) in so many threads at once."""
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# A server that hangs (A1, A7) ---------------------------------------------------------------------


def one_outage(
    server: EmbeddedServer,
    *,
    breakers: int = 20,
    by_url: bool = False,
    redis_timeout: float = 0.25,
    calls_on: float = 5.0,
) -> dict[str, Any]:
    """The server hangs. One thread calls each of its breakers once, then all of them 20 times a second.

    by_url: whether each breaker gets the server's URL, instead of one client of all.
    waited: seconds that the first call of every breaker took, all together. waited_later: the same for the later calls
    that took longer than a fifth of redis_timeout. warnings: until the server answers again. threads: the most of this
    library at one moment. connections: how many were opened while the server hung, in `hung_for` seconds. back: whether
    all breakers returned to Redis.
    """
    gauge, threads = Gauge(server), ThreadCount()
    target = server.url if by_url else redis.Redis.from_url(server.url)
    made = [CircuitBreaker(f"b{number}", redis=target, redis_timeout=redis_timeout) for number in range(breakers)]
    for breaker in made:
        breaker.call(fine)
    time.sleep(0.5)  # more than two leases: each call would like to ask
    gauge.start()
    with Warnings() as warnings, threads:
        with hung(server):
            began = time.monotonic()
            for breaker in made:
                breaker.call(fine)
            waited = time.monotonic() - began
            later = _call_on(made, calls_on)
            during, most_threads = len(warnings.texts), threads.most
            hung_for = time.monotonic() - began
        connections = int(gauge.read()["connections"])  # those that were waiting to be accepted, too

        def all_back() -> bool:
            for breaker in made:
                breaker.call(fine)
            return all(breaker.snapshot().source == "redis" for breaker in made)

        back = wait_for(all_back, 10.0)
        time.sleep(0.1)
        after = len(warnings.texts) - during
    for breaker in made:
        breaker.close()
    return {
        "waited": waited,
        "waited_later": sum(took for took in later if took > redis_timeout / 5),
        "warnings": during,
        "warnings_after": after,
        "threads": most_threads,
        "connections": connections,
        "hung_for": hung_for,
        "back": back,
    }


def _call_on(breakers: Sequence[CircuitBreaker], seconds: float) -> list[float]:
    """How long each call took."""
    took = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for breaker in breakers:
            began = time.monotonic()
            breaker.call(fine)
            took.append(time.monotonic() - began)
        time.sleep(0.05)
    return took


class ThreadCount:
    """The most threads of this library at one moment of a `with` block, without those that ran when this was made."""

    def __init__(self) -> None:
        self.most = 0
        self._others = {*threading.enumerate()}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            now = sum(one.name.startswith(THREADS) for one in {*threading.enumerate()} - self._others)
            self.most = max(self.most, now)

    def __enter__(self) -> ThreadCount:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()


async def one_outage_async(
    server: EmbeddedServer, *, breakers: int = 20, redis_timeout: float = 0.25
) -> dict[str, Any]:
    """The same in one task of an event loop, for as long as the calls take and two more timeouts."""
    client = redis.asyncio.Redis.from_url(server.url)
    made = [AsyncCircuitBreaker(f"a{number}", redis=client, redis_timeout=redis_timeout) for number in range(breakers)]
    for breaker in made:
        await breaker.call(fine_async)
    await asyncio.sleep(0.5)
    with Warnings() as warnings:
        with hung(server):
            began = time.monotonic()
            for breaker in made:
                await breaker.call(fine_async)
            waited = time.monotonic() - began
            await asyncio.sleep(2 * redis_timeout)
        during = len(warnings.texts)
    for breaker in made:
        await breaker.close()
    await client.aclose()
    return {"waited": waited, "warnings": during}


@dataclasses.dataclass
class Times:
    """How long guarded calls took, in seconds, before a server hung and from then on."""

    stopped_at: float = math.inf
    before: list[float] = dataclasses.field(default_factory=list)
    during: list[float] = dataclasses.field(default_factory=list)

    def add(self, began: float) -> None:
        """A call that began then, and has ended now."""
        took = time.perf_counter() - began
        (self.during if began >= self.stopped_at else self.before).append(took)

    def figures(self) -> dict[str, Any]:
        """In milliseconds."""
        return {
            "calls": len(self.during),
            "p99_ms": percentile(self.during, 0.99) * 1000,
            "max_ms": max(self.during) * 1000,
            "max_before_ms": max(self.before) * 1000,
        }


def calls_while_hung(
    server: EmbeddedServer,
    *,
    watch: bool,
    threads: int = 16,
    hangs: float = 2.0,
    redis_timeout: float = 0.25,
    warm: float = 1.0,
) -> dict[str, Any]:
    """Threads call a healthy function while the server hangs, and for half a second after: times of the calls."""
    breaker = CircuitBreaker("calm", redis=server.url, redis_timeout=redis_timeout)
    if watch:
        breaker.watch()
    breaker.call(fine)
    times = Times()
    stop = threading.Event()

    def work(number: int) -> None:
        chance = random.Random(number)
        while not stop.is_set():
            began = time.perf_counter()
            breaker.call(fine)
            times.add(began)
            time.sleep(chance.uniform(0.02, 0.05))

    runner = threading.Thread(target=run_threads, args=(threads, work), daemon=True)
    runner.start()
    time.sleep(warm)
    times.stopped_at = time.perf_counter()
    with hung(server):
        time.sleep(hangs)
    time.sleep(0.5)
    stop.set()
    runner.join()
    breaker.close()
    return times.figures()


async def tasks_while_hung(
    server: EmbeddedServer,
    *,
    watch: bool,
    tasks: int = 1000,
    hangs: float = 2.0,
    redis_timeout: float = 0.25,
    warm: float = 1.0,
) -> dict[str, Any]:
    """The same for tasks of one event loop."""
    breaker = AsyncCircuitBreaker("calm", redis=redis.asyncio.Redis.from_url(server.url), redis_timeout=redis_timeout)
    if watch and inspect.isawaitable(joined := breaker.watch()):
        await joined
    await breaker.call(fine_async)
    times = Times()
    stop = False

    async def work(number: int) -> None:
        chance = random.Random(number)
        await asyncio.sleep(chance.uniform(0, 0.1))
        while not stop:
            began = time.perf_counter()
            await breaker.call(fine_async)
            times.add(began)
            await asyncio.sleep(chance.uniform(0.05, 0.15))

    running = [asyncio.create_task(work(number)) for number in range(tasks)]
    await asyncio.sleep(warm)
    times.stopped_at = time.perf_counter()
    with hung(server):
        await asyncio.sleep(hangs)
    await asyncio.sleep(0.5)
    stop = True
    await asyncio.gather(*running)
    await breaker.close()
    return times.figures()


# Many healthy breakers in one process (A15) -------------------------------------------------------


class Many:
    """A process with many breakers on one client, all called equally often; a `with` block.

    failing: the share of calls that fail. The process calls from go() to pause(), and is paused at first.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        *,
        breakers: int = 100,
        rate: float = 10.0,
        policy: Policy | None = None,
        failing: float = 0.0,
    ) -> None:
        self.breakers = breakers
        self._job = (_call_many, server.url, breakers, rate, policy or Policy(), failing)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Many:
        (self._pipe,) = self._stack.enter_context(processes(self._job))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def go(self) -> None:
        """Call."""
        self._pipe.send("go")

    def pause(self) -> int:
        """Stop calling; returns how many calls there were since go()."""
        self._pipe.send("pause")
        return int(receive(self._pipe))


def _call_many(pipe: Connection, url: str, count: int, rate: float, policy: Policy, failing: float) -> None:
    client = redis.Redis.from_url(url)
    made = [
        CircuitBreaker(f"service-{number}", redis=client, policy=policy, redis_timeout=SLOW_MACHINE)
        for number in range(count)
    ]
    for breaker in made:
        breaker.call(fine)
    chance = random.Random(1)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while pipe.recv() == "go":
            began, calls = time.monotonic(), 0
            while not pipe.poll():
                due = int((time.monotonic() - began) * rate * count)
                while calls < due:
                    function = fail if failing and chance.random() < failing else fine
                    outcome(made[calls % count].call, function)
                    calls += 1
                time.sleep(0.002)
            pipe.recv()
            pipe.send(calls)


def exchanges_of_many(
    server: EmbeddedServer, *, rate: float, breakers: int = 100, seconds: float, monitor: float = 0.0
) -> dict[str, Any]:
    """Exchanges and scripts a second of one process with healthy breakers.

    monitor: seconds for which all commands are counted, afterwards, because MONITOR slows the server down.
    """
    gauge = Gauge(server)
    with Many(server, breakers=breakers, rate=rate) as many:
        many.go()
        time.sleep(0.5)
        gauge.start()
        time.sleep(seconds)
        spent = gauge.read()
        with monitored(server) as commands:
            time.sleep(monitor)
        many.pause()
    return {
        "exchanges_per_second": spent["reads"] / spent["seconds"],
        "scripts_per_second": spent["scripts"] / spent["seconds"],
        "commands_per_second": len(commands) / monitor if monitor else None,
        "sent": dict(Counter(command[0].decode().upper() for command in commands)),
    }


def reports_of_many(
    cases: Sequence[tuple[EmbeddedServer, float, float]], *, warm: float, seconds: float, window: float = 60.0
) -> list[dict[str, Any]]:
    """Scripts a second of processes with 100 breakers that keep an error rate: (server, calls a second, failing).

    All cases run at the same time, each on its own server. warm: seconds for which they call before the count begins.
    """
    policy = Policy(failure_threshold=NEVER, error_rate_threshold=0.5, window=window)
    with contextlib.ExitStack() as stack:
        gauges = [Gauge(server) for server, _, _ in cases]
        all_many = [
            stack.enter_context(Many(server, rate=rate, policy=policy, failing=failing))
            for server, rate, failing in cases
        ]
        for many in all_many:
            many.go()
        time.sleep(warm)
        for gauge in gauges:
            gauge.start()
        time.sleep(seconds)
        spent = [gauge.read() for gauge in gauges]
    return [
        {"rate": rate, "failing": failing, "scripts_per_second": one["scripts"] / one["seconds"]}
        for (_, rate, failing), one in zip(cases, spent, strict=True)
    ]


def refresh_cost(
    server: EmbeddedServer, *, breakers: int = 100, rounds: int = 10, slice_: float = 1.0
) -> dict[str, Any]:
    """Server time of one refresh of all breakers, and of one bare MGET of the same keys, in alternating slices.

    Both from INFO commandstats, ten a second each. A refresh is as many scripts, or two keys each in MGET, as there are
    breakers. The MGET inside a script is part of that script's time.
    """
    gauge = Gauge(server)
    keys = [key for number in range(breakers) for key in keys_of(f"service-{number}")]
    bare = redis.Redis.from_url(server.url)
    rounds_spent, bare_usec = [], []
    with Many(server, breakers=breakers, rate=10.0) as many:
        for _ in range(rounds + 1):
            gauge.start()
            end = time.monotonic() + slice_
            while time.monotonic() < end:
                bare.mget(keys)
                time.sleep(0.1)
            spent = gauge.read()
            bare_usec.append(spent["mget_usec"] / spent["mgets"])
            gauge.start()
            many.go()
            time.sleep(slice_)
            many.pause()
            time.sleep(0.25)  # what was gathered goes out within a lease
            rounds_spent.append(gauge.read())
        with monitored(server) as commands:
            many.go()
            time.sleep(slice_)
            many.pause()
    reads = [len(command) - 1 for command in commands if command[0].upper() == b"MGET"]
    breakers_per_mget = statistics.mean(reads) / 2 if reads else 0.0
    # the first round connects and loads
    mget_usec = statistics.median(bare_usec[1:])
    refresh_usec = statistics.median(
        _refresh_usec(spent, breakers, breakers_per_mget, mget_usec) for spent in rounds_spent[1:]
    )
    return {"refresh_usec": refresh_usec, "mget_usec": mget_usec, "ratio": refresh_usec / mget_usec}


def _refresh_usec(spent: dict[str, float], breakers: int, breakers_per_mget: float, mget_usec: float) -> float:
    own_mgets = spent["mgets"] - spent["scripts"] if breakers_per_mget else 0.0  # each script has one inside
    refreshed = (spent["scripts"] + own_mgets * breakers_per_mget) / breakers
    inner_usec = spent["scripts"] * mget_usec / breakers
    own_usec = max(spent["mget_usec"] - inner_usec, 0.0) if own_mgets else 0.0
    return (spent["script_usec"] + own_usec) / refreshed


def keys_of(name: str) -> tuple[str, str]:
    """The state key and the policy key of a breaker, as the README documents them."""
    state = f"circuit_breaker:{name}:state"
    return state, f"{{{state}}}:policy"


# Half open (A14) ----------------------------------------------------------------------------------


def rejections_in_half_open(
    server: EmbeddedServer, *, seconds: float = 3.0, rejections: int = 20_000, most: float = 20.0
) -> dict[str, Any]:
    """One probe hangs, and a thread keeps calling: scripts a second.

    It calls until both the seconds and the rejections are reached, and no longer than `most` seconds.
    """
    policy = Policy(failure_threshold=1, reset_timeout=0.1, probe_timeout=600.0)
    breaker = CircuitBreaker("half", redis=server.url, policy=policy, redis_timeout=SLOW_MACHINE)
    outcome(breaker.call, fail)
    time.sleep(0.3)
    probing, over = threading.Event(), threading.Event()

    def hang() -> int:
        probing.set()
        over.wait(PATIENCE)
        return 1

    prober = threading.Thread(target=breaker.call, args=(hang,), daemon=True)
    prober.start()
    assert probing.wait(PATIENCE), "the probe was not admitted"
    gauge, rejected = Gauge(server), 0
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < most and (elapsed < seconds or rejected < rejections):
        assert outcome(breaker.call, fine) == "rejected"
        rejected += 1
    spent = gauge.read()
    over.set()
    prober.join()
    closed = outcome(breaker.call, fine) == "succeeded"
    return {
        "rejections": rejected,
        "scripts": int(spent["scripts"]),
        "seconds": spent["seconds"],
        "scripts_per_second": spent["scripts"] / spent["seconds"],
        "closed": closed,
    }


# A server that refuses writes ---------------------------------------------------------------------

REFUSALS = ("full", "READONLY", "MISCONF")


@contextlib.contextmanager
def refusing_writes(server: EmbeddedServer, how: str) -> Iterator[None]:
    """The server answers reads, and refuses writes, for the length of the block."""
    with redis.Redis.from_url(server.url) as client:
        dump = pathlib.Path(server.directory, "dump.rdb")
        if how == "full":
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
        elif how == "READONLY":
            client.replicaof("127.0.0.1", free_port())
        else:
            dump.mkdir()  # a file cannot replace it
            client.config_set("save", "3600 1")
            _save(client, "err")
        try:
            try:
                client.set("refused", 1)
            except redis.RedisError:
                pass
            else:
                raise AssertionError(f"the server takes writes: {how}")
            yield
        finally:
            if how == "full":
                client.config_set("maxmemory", 0)
            elif how == "READONLY":
                client.replicaof("NO", "ONE")
            else:
                dump.rmdir()
                _save(client, "ok")


def _save(client: redis.Redis, status: str) -> None:
    client.bgsave()
    assert wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == status), status


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def writes_refused(server: EmbeddedServer, how: str) -> dict[str, Any]:
    """Calls fail while the server refuses writes, which then takes them again.

    failures: until the first rejection, threshold 3. opened_by: the source of that transition. stayed: whether good
    calls left it local while writes were refused. back: whether it returned to Redis. trips: whether Redis counts.
    """
    changes: list[Event] = []
    kinds: Counter[str] = Counter()

    def hear(event: Event) -> None:
        kinds[event.kind] += 1
        if event.kind == "state_change":
            changes.append(event)

    policy = Policy(failure_threshold=3, reset_timeout=0.2)
    breaker = CircuitBreaker("refused", redis=server.url, policy=policy, listeners=[hear], redis_timeout=1.0)
    breaker.call(fine)
    failures = 0
    with Warnings() as warnings:
        with refusing_writes(server, how):
            while failures < 20 and outcome(breaker.call, fail) == "failed":
                failures += 1
            opened_by = changes[0].source if changes else None
            end = time.monotonic() + 1.0
            while time.monotonic() < end:  # the circuit closes again by a local probe
                outcome(breaker.call, fine)
                time.sleep(0.01)
            stayed = kinds["redis_restored"] == 0

        def is_back() -> bool:
            outcome(breaker.call, fine)
            return breaker.snapshot().source == "redis" and kinds["redis_restored"] > 0

        back = wait_for(is_back, 10.0)
    for _ in range(3):
        outcome(breaker.call, fail)
    history = breaker.history()
    breaker.close()
    return {
        "failures": failures,
        "opened_by": opened_by,
        "stayed": stayed,
        "back": back,
        "trips": bool(history) and history[0].new == "open",
        "errors": kinds["redis_error"],
        "warnings": len(warnings.texts),
    }


# The strict call ----------------------------------------------------------------------------------


def functions_of_a_refresh(server: EmbeddedServer, *, seconds: float = 1.0) -> list[str]:
    """The functions of the package that the link's thread enters, in order, to refresh one healthy breaker.

    Each once, without comprehensions. Of many refreshes, the one that enters the median number.
    """
    entered: list[str] = []

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        ours = "/pybreaker_redis/" in code.co_filename and not code.co_name.startswith("<")
        if event == "call" and ours and threading.current_thread().name == f"{THREADS}-link":
            entered.append(code.co_qualname)

    threading.setprofile(profile)
    try:
        breaker, end = CircuitBreaker("one", redis=server.url, redis_timeout=SLOW_MACHINE), time.monotonic() + seconds
        while time.monotonic() < end:
            breaker.call(fine)
            time.sleep(0.01)
        breaker.close()
    finally:
        threading.setprofile(None)
    starts = [place for place, name in enumerate(entered) if name == "Server._refresh"]
    parts = [entered[start:end] for start, end in itertools.pairwise([*starts, len(entered)])]
    # after the exchange, the thread looks when to make the next one
    refreshes = [dict.fromkeys(part[: part.index("Link.pause")]) for part in parts if "Line.read" in part]
    return list(sorted(refreshes, key=len)[len(refreshes) // 2])


def strict_call(server: EmbeddedServer, *, rounds: int = 25, calls: int = 200) -> dict[str, Any]:
    """Microseconds of a call with lease=0, and of its two scripts over a bare socket, in alternating slices.

    The bare socket sends the bytes of the same commands with the same requests, which MONITOR showed. The ratio is the
    median over the pairs of neighbouring slices.
    """
    breaker = CircuitBreaker("strict", redis=server.url, lease=0, redis_timeout=SLOW_MACHINE)
    breaker.call(fine)
    with monitored(server) as commands:
        breaker.call(fine)
    pair = [pack(command) for command in commands if command[0].upper() == b"EVALSHA"]
    assert len(pair) == 2, commands
    ours, raw = [], []
    with bare_socket(server) as line:

        def both() -> None:
            for command in pair:
                line.sendall(command)
                reply = line.recv(65536)
                assert reply[:1] == b"$", reply

        for _ in range(rounds):
            ours.append(_per_call(lambda: breaker.call(fine), calls))
            raw.append(_per_call(both, calls))
    breaker.close()
    return {
        "call_usec": statistics.median(ours) * 1e6,
        "raw_usec": statistics.median(raw) * 1e6,
        "ratio": statistics.median(one / other for one, other in zip(ours, raw, strict=True)),
    }


def bare_socket(server: EmbeddedServer) -> socket.socket:
    """A blocking connection to the server, of the kind that its URL names."""
    at = urlsplit(server.url)
    if at.scheme == "unix":
        line = socket.socket(socket.AF_UNIX)
        line.connect(at.path)
        return line
    line = socket.create_connection((at.hostname, at.port))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def _per_call(function: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def pack(words: Sequence[bytes]) -> bytes:
    """A command as the bytes of the protocol."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
