"""Programs of the process tests, each run in a process of its own: argv is the job and its arguments. Prints JSON.

Spawned children import this module by its name, so every function that they run is at its top level.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import redis

from pybreaker_redis import (
    AsyncCircuitBreaker,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    Config,
    Event,
    Policy,
)
from pybreaker_redis.instrumentation._meter import Meter
from pybreaker_redis.wire import exits, sync

PATIENCE = 15.0  # seconds for what always happens, on however slow a machine
AT_ONCE = 8  # children that live at the same time
FIRM: dict[str, Any] = {"redis_timeout": 10.0}  # a slow machine is no outage
# counts what happens, and never trips
COUNTS = Policy(failure_threshold=10**9, error_rate_threshold=1.0, minimum_calls=10**9, window=3600.0)
TRIPS = Policy(failure_threshold=3, reset_timeout=600.0)
TRIPS_AT_ONCE = Policy(failure_threshold=1, reset_timeout=600.0)  # healthy siblings would end a longer run


class Boom(Exception):
    """What the guarded functions of these tests raise."""


def boom() -> None:
    raise Boom


def fine() -> int:
    return 1


async def async_boom() -> None:
    raise Boom


async def async_fine() -> int:
    return 1


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    """So many failing calls."""
    for _ in range(times):
        with contextlib.suppress(Boom):
            breaker.call(boom)


def admitted(breaker: CircuitBreaker) -> bool:
    """One call; whether the breaker lets it through."""
    try:
        breaker.call(fine)
    except CircuitOpenError:
        return False
    return True


def outages(events: list[Event]) -> list[str]:
    """What the listener was notified of, except transitions."""
    return [event.kind for event in events if event.kind != "state_change"]


# Forks ----------------------------------------------------------------------------------------------


def c_fork() -> int:
    """A fork that Python is not told of, as uWSGI does it: none of its hooks runs, in the parent or in the child.

    No other thread must be running: a child of which a thread waited for the interpreter's lock hangs as soon as it
    starts a thread, whatever it does. So this waits until the threads of the links wait for something else.
    """
    servers = [server for server in list(exits.servers) if isinstance(server, sync.Server)]
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.02:
        time.sleep(0.002)
        if any(one.link.wanted or one.link.is_busy() or one._worker.is_awake() for one in servers):
            quiet_since = time.monotonic()
    return int(ctypes.PyDLL(None).fork())


FORKS: dict[str, Callable[[], int]] = {"os": os.fork, "c": c_fork}


class Children:
    """Forked children that do some work and end by os._exit(), with what each of them found."""

    def __init__(self, how: str) -> None:
        self._fork = FORKS[how]
        self._alive: dict[int, tuple[int, float]] = {}  # by pid: the end of its pipe, and when its time is over
        self.found: list[Any] = []
        self.errors: list[str] = []

    def start(self, work: Callable[[], Any]) -> int:
        """Fork a child. Waits until there is room for it."""
        while len(self._alive) >= AT_ONCE:
            self._wait()
        ours, theirs = os.pipe()
        child = self._fork()
        if child:
            os.close(theirs)
            self._alive[child] = ours, time.monotonic() + PATIENCE
            return child
        try:
            os.close(ours)
            report = {"found": work()}
        except BaseException:
            report = {"error": traceback.format_exc()[-1500:]}
        os.write(theirs, json.dumps(report).encode())
        os._exit(0)

    def wait(self) -> None:
        """Wait for all children."""
        while self._alive:
            self._wait()

    def _wait(self) -> None:
        while True:
            for pid, (pipe, deadline) in list(self._alive.items()):
                ended, _ = os.waitpid(pid, os.WNOHANG)
                if not ended and time.monotonic() < deadline:
                    continue
                del self._alive[pid]
                if not ended:
                    os.kill(pid, signal.SIGUSR1)  # says on stderr where it hangs
                    time.sleep(0.5)
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                self._take(pipe, hung=not ended)
                return
            time.sleep(0.001)

    def _take(self, pipe: int, hung: bool) -> None:
        with os.fdopen(pipe, "rb") as stream:
            text = b"" if hung else stream.read()
        report = json.loads(text or '{"error": "hung, or died without a word"}')
        if "error" in report:
            self.errors.append(report["error"])
        else:
            self.found.append(report["found"])

    def report(self) -> dict[str, Any]:
        """What they found, and the first few errors."""
        self.wait()
        return {"found": self.found, "failed": len(self.errors), "errors": self.errors[:3]}


def many(url: str, how: str, forks: str, lease: str) -> object:
    """Forks of a process with 20 breakers, which calls them meanwhile. Breaker n has n + 1 failures."""
    events: list[Event] = []
    options: dict[str, Any] = {"policy": COUNTS, "lease": float(lease), "listeners": [events.append], **FIRM}
    breakers = [CircuitBreaker(f"service-{number}", redis=url, **options) for number in range(20)]
    for number, breaker in enumerate(breakers):
        fail(breaker, number + 1)
        breaker.call(fine)

    def child() -> object:
        del events[:]
        order = list(range(20))
        random.Random(os.getpid()).shuffle(order)
        wrong = []
        for number in order:
            snapshot = breakers[number].snapshot()
            if (snapshot.name, snapshot.failures, snapshot.source) != (f"service-{number}", number + 1, "redis"):
                wrong.append(f"service-{number}: {snapshot}")
            admitted(breakers[number])
        for breaker in breakers:
            breaker.flush()
        instances = [breaker.instance for breaker in breakers]
        return {"wrong": wrong[:1], "outages": outages(events), "instances": instances}

    children, calls = Children(how), 1
    for _ in range(int(forks)):
        children.start(child)
        calls += 1
        for breaker in breakers:
            breaker.call(fine)
        if len(children.errors) > 2:  # each that hangs costs its whole patience
            break
    report = children.report()
    for breaker in breakers:
        breaker.flush()
    counted = [(snapshot.failures, snapshot.calls) for snapshot in (breaker.snapshot() for breaker in breakers)]
    expected = [(number + 1, number + 1 + calls + len(report["found"])) for number in range(20)]
    own = [breaker.instance for breaker in breakers]
    return {**report, "outages": outages(events), "instances": own, "counted": counted, "expected": expected}


def many_async(url: str, how: str, forks: str) -> object:
    """The same with 5 asyncio breakers: forks between two runs of a loop that stays open, and calls go on in it."""
    events: list[Event] = []
    options: dict[str, Any] = {"policy": COUNTS, "lease": 0.02, "listeners": [events.append], **FIRM}
    breakers = [AsyncCircuitBreaker(f"service-{number}", redis=url, **options) for number in range(5)]

    async def prepare() -> None:
        for number, breaker in enumerate(breakers):
            for _ in range(number + 1):
                with contextlib.suppress(Boom):
                    await breaker.call(async_boom)
            await breaker.call(async_fine)

    async def call_all() -> None:
        for breaker in breakers:
            await breaker.call(async_fine)
        await asyncio.sleep(0.001)

    async def in_child() -> object:
        wrong = []
        for number, breaker in enumerate(breakers):
            snapshot = await breaker.snapshot()
            if (snapshot.name, snapshot.failures, snapshot.source) != (f"service-{number}", number + 1, "redis"):
                wrong.append(f"service-{number}: {snapshot}")
            await breaker.call(async_fine)
        for breaker in breakers:
            await breaker.flush()
        instances = [breaker.instance for breaker in breakers]
        return {"wrong": wrong[:1], "outages": outages(events), "instances": instances}

    def child() -> object:
        del events[:]
        return asyncio.run(in_child())

    async def counted() -> list[Any]:
        for breaker in breakers:
            await breaker.flush()
        return [(one.failures, one.calls) for one in [await breaker.snapshot() for breaker in breakers]]

    children, calls = Children(how), 1
    with asyncio.Runner() as runner:
        runner.run(prepare())
        for _ in range(int(forks)):
            children.start(child)
            calls += 1
            runner.run(call_all())
            if len(children.errors) > 2:
                break
        report = children.report()
        totals = runner.run(counted())
    expected = [(number + 1, number + 1 + calls + len(report["found"])) for number in range(5)]
    own = [breaker.instance for breaker in breakers]
    return {**report, "outages": outages(events), "instances": own, "counted": totals, "expected": expected}


def generations(url: str, how: str) -> object:
    """A fork of a fork of a fork; each fails once and succeeds once."""
    breaker = CircuitBreaker("generations", redis=url, policy=COUNTS, **FIRM)
    breaker.call(fine)

    def descend(left: int) -> Any:
        fail(breaker)
        breaker.call(fine)
        breaker.flush()
        if left == 0:
            return [breaker.instance]
        children = Children(how)
        children.start(lambda: descend(left - 1))
        report = children.report()
        if report["errors"]:
            raise RuntimeError(report["errors"][0])
        fail(breaker)
        return [breaker.instance, *report["found"][0]]

    instances = descend(3)
    breaker.flush()
    snapshot = breaker.snapshot()
    return {"instances": instances, "failures": snapshot.failures, "calls": snapshot.calls}


def gathered(url: str, how: str) -> object:
    """The parent has gathered seven successes. Children call by its view before they ask Redis anything."""
    breaker = CircuitBreaker("gathered", redis=url, policy=COUNTS, lease=600.0, **FIRM)
    breaker.call(fine)
    breaker.flush()
    for _ in range(7):
        breaker.call(fine)

    def child() -> object:
        for _ in range(5):
            breaker.call(fine)
        breaker.flush()
        breaker.call(fine)
        breaker.flush()
        return None

    children = Children(how)
    for _ in range(4):
        children.start(child)
    report = children.report()
    breaker.flush()
    return {**report, "calls": breaker.snapshot().calls}


def ended(url: str, how: str) -> object:
    """The parent has gathered seven successes on one link. Children call over another link only, and end."""
    breaker, other = (CircuitBreaker(name, redis=redis.Redis.from_url(url), policy=COUNTS, lease=600.0, **FIRM)
                      for name in ("gathered", "other"))  # fmt: skip
    breaker.call(fine)
    breaker.flush()
    for _ in range(7):
        breaker.call(fine)

    def child() -> None:
        other.call(fine)
        exits._end()

    children = Children(how)
    for _ in range(4):
        children.start(child)
    report = children.report()
    breaker.flush()
    return {**report, "calls": (breaker.snapshot().calls, other.snapshot().calls)}


def closed_managers(url: str, how: str) -> object:
    """The parent's manager has gathered seven successes. Children close it before they call anything."""
    config = Config(redis_url=url, defaults=COUNTS, watch=False, lease=600.0, redis_timeout=10.0)
    manager = CircuitBreakerManager.with_redis(config)
    manager.call("managed", fine)
    manager.get_or_create("managed").flush()
    for _ in range(7):
        manager.call("managed", fine)

    children = Children(how)
    for _ in range(4):
        children.start(manager.close)
    report = children.report()
    manager.close()
    return {**report, "calls": manager.get_or_create("managed").snapshot().calls}


def made_in_child(url: str, how: str) -> object:
    """A child has breakers of its own, and a meter of its parent's, of the client over which its parent calls."""
    client = redis.Redis.from_url(url)
    breaker, meter = CircuitBreaker("parent", redis=client, lease=0, **FIRM), Meter(redis=client)
    meter._attach(breaker)
    breaker.call(fine)
    meter._read_all()

    def sockets(server: Any) -> list[int]:
        return [os.fstat(pipe._socket.fileno()).st_ino for pipe in server._nodes[None]._idle]

    def makes() -> object:
        made = CircuitBreaker("child", redis=client, lease=0, **FIRM)
        made.call(fine)
        return sockets(made._redis)

    def reads() -> object:
        meter._read_all()
        return sockets(meter._server)

    children = Children(how)
    for work in (makes, reads):
        children.start(work)
    return {**children.report(), "parent": [*sockets(breaker._redis), *sockets(meter._server)]}


def probe(url: str, how: str) -> object:
    """A probe's function forks; the child outlives the probe, which fails, and goes on calling."""
    policy = Policy(failure_threshold=1, reset_timeout=0.05, probe_timeout=600.0)
    breaker = CircuitBreaker("probe", redis=url, policy=policy, lease=0.01, **FIRM)
    fail(breaker)
    deadline = time.monotonic() + PATIENCE
    while (permit := permit_of(breaker)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert permit is not None
    assert permit.probe is not None
    told, tell = os.pipe()
    children = Children(how)

    def child() -> object:
        os.close(tell)
        os.read(told, 1)  # until the probe has failed and the circuit is half open again, with no free slot
        return [admitted(breaker) for _ in range(20)]

    with permit:
        children.start(child)
        permit.failure()
    while (second := permit_of(breaker)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert second is not None
    assert second.probe is not None
    os.close(tell)
    report = children.report()
    second.success()
    return {**report, "state": breaker.snapshot().state, "history": [entry.new for entry in breaker.history()]}


def probe_of_two(url: str, how: str) -> object:
    """A probe's function forks, and both processes leave its block."""
    policy = Policy(failure_threshold=1, reset_timeout=0.05, probe_timeout=600.0, success_threshold=2)
    breaker = CircuitBreaker("probe-of-two", redis=url, policy=policy, lease=0.01, **FIRM)
    fail(breaker)
    deadline = time.monotonic() + PATIENCE
    while (permit := permit_of(breaker)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert permit is not None
    assert permit.probe is not None
    children = Children(how)

    def child() -> object:
        permit.__exit__(None, None, None)
        return None

    with permit:
        children.start(child)
        children.wait()
    snapshot = breaker.snapshot()
    return {**children.report(), "state": snapshot.state, "successes": snapshot.success_count}


def permit_of(breaker: CircuitBreaker) -> Any:
    """A permit, or None where the breaker rejects."""
    try:
        return breaker.acquire()
    except CircuitOpenError:
        return None


def siblings(url: str, how: str, watching: str) -> object:
    """Four children call and call; a sibling trips the circuit once all of them have begun."""
    events: list[Event] = []
    breaker = CircuitBreaker("siblings", redis=url, policy=TRIPS_AT_ONCE, listeners=[events.append], **FIRM)
    if watching == "watch":
        breaker.watch()
    breaker.call(fine)
    began, begin = os.pipe()
    told, tell = os.pipe()

    def child() -> object:
        os.close(tell)
        breaker.call(fine)
        deadline = time.monotonic() + PATIENCE / 2
        while watching == "watch" and not active(breaker) and time.monotonic() < deadline:
            admitted(breaker)
            time.sleep(0.01)
        os.write(begin, b"b")
        while admitted(breaker) and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"instance": breaker.instance, "watches": active(breaker), "rejects": not admitted(breaker)}

    def sibling() -> object:
        os.close(tell)
        os.read(told, 1)
        fail(breaker)
        return {"instance": breaker.instance, "watches": None, "rejects": not admitted(breaker)}

    children = Children(how)
    for _ in range(4):
        children.start(child)
    children.start(sibling)
    for _ in range(4):
        os.read(began, 1)
    subscribed = psubscriptions(url)
    os.close(tell)
    report = children.report()
    deadline = time.monotonic() + PATIENCE
    while admitted(breaker) and time.monotonic() < deadline:
        time.sleep(0.01)
    ends = {"parent": breaker.instance, "parent_rejects": not admitted(breaker), "outages": outages(events)}
    return {**report, **ends, "subscribed": subscribed}


def active(breaker: CircuitBreaker) -> bool:
    watch = breaker._watch
    return watch is not None and watch.active


def psubscriptions(url: str) -> int:
    """The clients of the server that subscribe to a pattern."""
    import redis

    with redis.Redis.from_url(url) as client:
        return sum(one["psub"] != "0" for one in client.client_list())


# Children of every kind -----------------------------------------------------------------------------


def ordinary_child(url: str, breaker: CircuitBreaker | None = None) -> str:
    """What a worker does that nobody told of Redis: a failure, some successes, and it ends."""
    breaker = breaker or CircuitBreaker("ways", redis=url, policy=COUNTS, lease=60.0, **FIRM)
    fail(breaker)
    for _ in range(5):
        breaker.call(fine)
    return breaker.instance


def queued_child(url: str, queue: Any, breaker: CircuitBreaker | None = None) -> None:
    queue.put(ordinary_child(url, breaker or inherited))


inherited: CircuitBreaker | None = None  # the parent's, in a forked child


def ways(url: str, way: str) -> object:
    """Four children of one kind; the parent, which has called before, goes on calling, and ends normally."""
    global inherited
    breaker = inherited = CircuitBreaker("ways", redis=url, policy=COUNTS, lease=60.0, **FIRM)
    breaker.call(fine)
    breaker.call(fine)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)  # a fork copies its locks, but not the thread
    thread.start()
    instances = list(CHILDREN[way](url, breaker))
    stop.set()
    thread.join()
    breaker.call(fine)
    breaker.flush()
    return {"instances": instances, "parent": breaker.instance}


def by_process(make: Any, url: str, breaker: CircuitBreaker) -> Iterator[str]:
    queue = make.SimpleQueue()
    processes = [make.Process(target=queued_child, args=(url, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    for _ in processes:
        yield queue.get()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0, process.exitcode


def by_multiprocessing(method: str) -> Callable[[str, CircuitBreaker], Iterator[str]]:
    return lambda url, breaker: by_process(multiprocessing.get_context(method), url, breaker)


def by_billiard(url: str, breaker: CircuitBreaker) -> Iterator[str]:
    import billiard

    return by_process(billiard, url, breaker)


def by_executor(url: str, breaker: CircuitBreaker) -> Iterator[str]:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as executor:
        barrier = [executor.submit(slow_job, url) for _ in range(4)]
        yield from [one.result(PATIENCE) for one in barrier]


def slow_job(url: str) -> str:
    instance = ordinary_child(url, inherited)
    time.sleep(0.5)  # so that each worker has one
    return instance


def by_subprocess(url: str, breaker: CircuitBreaker) -> Iterator[str]:
    command = [sys.executable, __file__, "print_child", url]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for child in children:
        out, _ = child.communicate(timeout=PATIENCE)
        assert child.returncode == 0
        yield json.loads(out)


def by_fork(url: str, breaker: CircuitBreaker) -> Iterator[str]:
    """os.fork() and a normal end: the child leaves Python by itself, and runs its exit functions."""
    pipe, theirs = os.pipe()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os.write(theirs, (ordinary_child(url, breaker) + "\n").encode())
            sys.exit(0)
        children.append(child)
    os.close(theirs)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with os.fdopen(pipe) as stream:
        yield from stream.read().split()


def print_child(url: str) -> object:
    return ordinary_child(url)


CHILDREN: dict[str, Callable[[str, CircuitBreaker], Iterator[str]]] = {
    "multiprocessing-fork": by_multiprocessing("fork"),
    "multiprocessing-spawn": by_multiprocessing("spawn"),
    "multiprocessing-forkserver": by_multiprocessing("forkserver"),
    "billiard": by_billiard,
    "executor": by_executor,
    "subprocess": by_subprocess,
    "fork": by_fork,
}


# Before the first call ------------------------------------------------------------------------------


def started() -> dict[str, Any]:
    """What this process has started: threads besides the main one, and sockets, an event loop's set included."""
    descriptors = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if opened(number)]
    sockets = [one for one in descriptors if one.startswith(("socket:", "anon_inode:[eventpoll]"))]
    return {"threads": [one.name for one in threading.enumerate()][1:], "sockets": sockets}


def opened(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def imported(url: str, how: str, kind: str) -> object:
    """Managers made at import, with watch on; children make the first calls."""
    import manager_app

    before = started()
    events = manager_app.events

    def child() -> object:
        return manager_app.first_calls() if kind == "sync" else asyncio.run(manager_app.async_first_calls())

    children = Children(how)
    for _ in range(8):
        children.start(child)
    report = children.report()
    after = started()
    own = child()
    return {**report, "before": before, "after": after, "parent": own, "outages": outages(events)}


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
