"""Programs that fork, each run in a process of its own: argv is the scenario and the server's URL. Prints JSON."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from race_workers import FIRM, PATIENCE, Boom, boom, fine, run_threads

from pybreaker_redis import CircuitBreaker, Policy, _process

MANY = Policy(failure_threshold=1_000_000_000)
CHILD_PATIENCE = 10.0


def fork(work: Callable[[], object]) -> int:
    """A child that does the work and ends: 0 when it succeeded."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(1)
    return child


def ended(child: int, patience: float = CHILD_PATIENCE) -> str:
    """How a child ended: "ok", "failed", or "hung" (then it says where on stderr, and is killed)."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "failed" if status else "ok"
        time.sleep(0.001)
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def counts(url: str) -> object:
    """The parent and four children fail on the same breaker object at once, each from four threads."""
    breaker = CircuitBreaker("fork-counts", redis=url, policy=MANY, lease=0, **FIRM)
    breaker.call(fine)

    def fail(number: int = 0) -> None:
        for _ in range(25):
            with contextlib.suppress(Boom):
                breaker.call(boom)

    children = [fork(lambda: run_threads(4, fail)) for _ in range(4)]
    run_threads(4, fail)
    return {"ends": [ended(child, PATIENCE) for child in children], "failures": 5 * 4 * 25}


def kept(url: str) -> object:
    """The same, each with a breaker made after the fork, of the client over which the parent has called before."""
    client = redis.Redis.from_url(url)
    CircuitBreaker("fork-kept", redis=client, policy=MANY, lease=0, **FIRM).call(fine)
    gc.collect()

    def fail(number: int = 0) -> None:
        breaker = CircuitBreaker("fork-kept", redis=client, policy=MANY, lease=0, **FIRM)
        for _ in range(100):
            with contextlib.suppress(Boom):
                breaker.call(boom)

    children = [fork(fail) for _ in range(4)]
    fail()
    return {"ends": [ended(child, PATIENCE) for child in children], "failures": 500}


def busy(url: str) -> object:
    """A hundred forks while eight threads of the parent are in the middle of calls."""
    breakers = [CircuitBreaker("fork-busy", redis=url, policy=MANY, lease=lease, **FIRM) for lease in (0, 0.001)]
    stop = threading.Event()

    def call(number: int) -> None:
        while not stop.is_set():
            breakers[number % 2].call(fine)
            breakers[number % 2].flush()

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(8)]
    for breaker in breakers:
        breaker.call(fine)
    for thread in threads:
        thread.start()

    def child() -> None:
        for breaker in breakers:
            breaker.call(fine)
            breaker.flush()

    ends: list[str] = []
    while len(ends) < 100 and "hung" not in ends:  # a hanging child costs its whole patience
        ends.append(ended(fork(child)))
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    return {"ends": ends}


def held(url: str, which: str) -> object:
    """Forked at the very moment when another thread holds one of the locks that a call needs."""
    policy = Policy(failure_threshold=1_000_000_000, quorum=2 if which == "isolated" else 1)
    breaker = CircuitBreaker("fork-held", redis=url, policy=policy, lease=0.001, **FIRM)
    breaker.call(fine)
    line: Any = breaker._line
    isolated: Any = breaker._isolation._own
    server = breaker._redis
    server.link.failed(line, redis.ConnectionError("lost")) if which == "outage" else None
    server.link.failed(line, redis.ResponseError("refused")) if which == "refusal" else None
    outage = server.link.outage(line)
    locks = {
        "isolated": isolated and isolated._lock,
        "breaker": breaker._view.lock,
        "nested": _process.own_lock(),
        "refreshing": server._refreshing,
        "outage": outage and outage._lock,
        "refusal": outage and outage._lock,
        "worker": server._worker._lock,
        "messenger": server._messenger._lock,
        "subscription": server.subscription()._lock,
    }
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locks[which]:
            inside.set()
            done.wait(PATIENCE)

    def call() -> None:
        breaker.call(fine)
        with contextlib.suppress(Boom):
            breaker.call(boom)
        breaker.call(fine)
        breaker.flush()
        breaker.reset()
        breaker.watch().close()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    inside.wait(PATIENCE)
    end = ended(fork(call), CHILD_PATIENCE / 2)
    done.set()
    thread.join(PATIENCE)
    return {"ends": [end]}


def held_in_memory(url: str, which: str) -> object:
    """The same without Redis: a failing call takes the fast path, which does not check the process id."""
    breaker = CircuitBreaker("fork-held", policy=MANY, lease=600.0)
    breaker.call(fine)

    def call() -> None:
        with contextlib.suppress(Boom):
            breaker.call(boom)
        breaker.call(fine)
        assert (breaker.counts.failures, breaker.counts.successes) == (1, 1)

    return while_held({"breaker": breaker._view.lock, "nested": _process.own_lock()}[which], call)


def freed(url: str) -> object:
    """Forked while a thread reads the counts of a breaker that is not in use; the child only frees the breaker."""
    breaker = CircuitBreaker("fork-freed", redis=url, policy=MANY, lease=0.001, **FIRM)
    breaker.call(fine)
    breaker._redis.link.leave(breaker._line)
    breakers, lock = [breaker], breaker._view.lock
    del breaker

    def free() -> None:
        breakers.clear()
        gc.collect()

    return while_held(lock, free)


def while_held(lock: Any, child: Callable[[], None]) -> object:
    """How a child ends that is forked while another thread holds a lock."""
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            inside.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    inside.wait(PATIENCE)
    end = ended(fork(child), CHILD_PATIENCE / 2)
    done.set()
    thread.join(PATIENCE)
    return {"ends": [end]}


def renewed(url: str) -> object:
    """Forked while another thread renews a part of this process."""
    began, goes_on = threading.Event(), threading.Event()

    class Part:
        _pid = 0  # as if it were of the parent

        def _after_fork(self) -> None:
            began.set()
            goes_on.wait(PATIENCE)

    part = Part()
    thread = threading.Thread(target=_process.renew, args=(part,))
    thread.start()
    began.wait(PATIENCE)

    def child() -> None:
        goes_on.set()
        _process.renew(part)
        assert part._pid == os.getpid()

    ends = [ended(fork(child))]
    goes_on.set()
    thread.join(PATIENCE)
    return {"ends": ends}


def watched(url: str) -> object:
    """Forked while a thread holds the lock of the subscription; the child only ends its watch."""
    breaker = CircuitBreaker("fork-watched", redis=url, **FIRM)
    watch = breaker.watch()
    lock = breaker._redis.subscription()._lock
    holds, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            holds.set()
            goes_on.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait(PATIENCE)
    ends = [ended(fork(watch.close))]
    goes_on.set()
    thread.join(PATIENCE)
    return {"ends": ends}


def gathered(url: str) -> object:
    """Seven successes before the fork and two in the child."""
    breaker = CircuitBreaker("fork-gathered", redis=url, policy=MANY, lease=3600.0, **FIRM)
    for _ in range(7):
        breaker.call(fine)

    def child() -> None:
        breaker.flush()
        breaker.call(fine)
        breaker.call(fine)
        breaker.flush()

    end = ended(fork(child))
    breaker.flush()
    return {"ends": [end]}


def identity(url: str) -> object:
    """The parent trips the breaker, a child resets it: the history tells who did it."""
    breaker = CircuitBreaker("fork-identity", redis=url, policy=Policy(failure_threshold=1), lease=0, **FIRM)
    with contextlib.suppress(Boom):
        breaker.call(boom)
    end = ended(fork(breaker.reset))
    entries = breaker.history()
    return {"ends": [end], "instances": len({entry.instance for entry in entries}), "entries": len(entries)}


def outage(url: str, server_pid: str) -> object:
    """Forked while the parent's retry waits for a hung server: the child finds back by itself."""
    breaker = CircuitBreaker("fork-outage", redis=url, policy=MANY, lease=0, redis_timeout=1.0)
    breaker.call(fine)
    os.kill(int(server_pid), signal.SIGSTOP)
    try:
        breaker.call(fine)
        deadline = time.monotonic() + PATIENCE
        while not breaker._redis.link.outage(breaker._line).abandoned:  # the retry is under way
            assert time.monotonic() < deadline
            breaker.call(fine)
            time.sleep(0.01)

        def child() -> None:
            while breaker.snapshot().source != "redis":
                time.sleep(0.01)

        forked = fork(child)
    finally:
        os.kill(int(server_pid), signal.SIGCONT)
    return {"ends": [ended(forked)]}


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
