"""Calls of a breaker amid its own work: from the guarded function, a signal handler, a finalizer, a log handler."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from conftest import wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event, PermitError, Policy
from pybreaker_redis.embedded import EmbeddedServer

PROBING = Policy(failure_threshold=1, reset_timeout=0.001, probe_timeout=3600)
FIRM: dict[str, Any] = {"redis_timeout": 20.0}


def boom() -> None:
    raise OSError("boom")


def trip(breaker: CircuitBreaker) -> None:
    """Opens it, and waits until a probe may run."""
    with pytest.raises(OSError):
        breaker.call(boom)
    time.sleep(0.01)


# From the guarded function ---------------------------------------------------------------------


@pytest.mark.parametrize("url", ["memory", "redis"])
@pytest.mark.parametrize("way", ["call", "block"])
def test_a_probe_that_calls_its_own_breaker_recovers(server: EmbeddedServer, url: str, way: str) -> None:
    """Calls inside of a probe are part of it: they need no slot of their own, and its outcome decides."""
    redis_url = server.url if url == "redis" else None
    breaker = CircuitBreaker(f"within-{way}", redis=redis_url, policy=PROBING, **FIRM)
    trip(breaker)
    if way == "call":
        assert breaker.call(breaker.call, breaker.call, int, "5") == 5
    else:
        with breaker as outer, breaker as inner:
            assert (outer.probe, inner.probe) == (1, None)
    assert breaker.state == "closed"
    trip(breaker)
    outer = breaker.acquire()
    with pytest.raises(CircuitOpenError):  # not inside of it
        breaker.call(int)
    outer.success()


def test_an_asyncio_probe_that_calls_its_own_breaker_recovers(server: EmbeddedServer) -> None:
    """The same, also for tasks that the probe starts and waits for; but not for those that outlive it."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("within-async", redis=server.url, policy=PROBING, **FIRM)
        go = asyncio.Event()
        late: list[asyncio.Task[Any]] = []

        async def fail() -> None:
            raise OSError

        async def leaf() -> int:
            return 5

        async def outlives() -> int:
            await go.wait()
            return await breaker.call(leaf)

        async def probe() -> list[int]:
            late.append(asyncio.create_task(outlives()))
            return await asyncio.gather(*(breaker.call(leaf) for _ in range(5)))

        for _ in range(2):
            with pytest.raises(OSError):
                await breaker.call(fail)
            await asyncio.sleep(0.01)
            assert await breaker.call(probe) == [5] * 5
            assert await breaker.state == "closed"
        with pytest.raises(OSError):
            await breaker.call(fail)
        await asyncio.sleep(0.01)
        permit = await breaker.acquire()  # the only slot
        go.set()
        for task in late:
            with pytest.raises(CircuitOpenError):
                await task
        await permit.release()
        await breaker.close()

    asyncio.run(main())


def test_an_own_rejection_is_no_failure() -> None:
    """A call that fails since its own breaker rejects what it calls counts as nothing; another's rejection counts."""
    breaker, other = CircuitBreaker("outer"), CircuitBreaker("inner")
    other.force_open()

    def both(rejecting: CircuitBreaker) -> None:
        raise CircuitOpenError(rejecting.name, "open", 1.0)

    for rejecting, failures in ((breaker, 0), (other, 1)):
        with pytest.raises(CircuitOpenError):
            breaker.call(both, rejecting)
        assert breaker.snapshot().failure_count == failures


# By the thread that is at work on it -----------------------------------------------------------


@pytest.mark.parametrize("url", ["memory", "redis"])
@pytest.mark.parametrize("lock", ["view", "refreshing", "engine", "blocks"])
def test_a_thread_that_holds_a_lock_may_call(server: EmbeddedServer, url: str, lock: str) -> None:
    """A signal handler or a finalizer calls the breaker while its thread holds any of the locks: no deadlock."""
    breaker = CircuitBreaker("held-by-itself", redis=server.url if url == "redis" else None, **FIRM)
    engine: Any = breaker._engine
    engine = engine if url == "redis" else engine._memory
    locks = {"view": breaker._view._lock, "refreshing": breaker._refreshing, "engine": engine._lock}
    with {**locks, "blocks": breaker._blocks_lock}[lock]:
        breaker._view.drop()
        assert breaker.call(int, "5") == 5
        with pytest.raises(OSError):
            breaker.call(boom)
        with breaker:
            pass
    breaker.flush()
    assert breaker.snapshot().failure_count == 0


def test_a_refresh_that_died_with_its_lock_holds_up_nobody_for_ever(server: EmbeddedServer) -> None:
    """A signal's exception can hit a thread after it took the lock and before it would release it again."""
    breaker = CircuitBreaker("died", redis=server.url, **FIRM)
    breaker._patience = 0.05
    thread = threading.Thread(target=breaker._refreshing.acquire)
    thread.start()
    thread.join()
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(breaker.call(int, "5"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [5] * 8


# Blocks that others enter and leave ------------------------------------------------------------


def test_stacks_of_many_threads_beside_plain_blocks() -> None:
    """Blocks entered through an ExitStack in some threads, by `with` in others: none is lost, none raises."""
    breaker = CircuitBreaker("stacks", policy=Policy(failure_threshold=10**6))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(500):
                if number % 2:
                    with breaker:
                        pass
                else:
                    with contextlib.ExitStack() as stack:
                        stack.enter_context(breaker)
                        stack.enter_context(breaker)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (errors, breaker._blocks) == ([], {})


def test_a_block_left_by_another_thread_or_task(server: EmbeddedServer) -> None:
    """What one thread or task entered may be left in another; one that was not entered is an error."""
    breaker = CircuitBreaker("left-elsewhere")
    stack = contextlib.ExitStack()
    stack.enter_context(breaker)
    thread = threading.Thread(target=stack.close)
    thread.start()
    thread.join()
    assert breaker._blocks == {}
    with pytest.raises(PermitError, match="not entered"):
        breaker.__exit__(None, None, None)

    async def main() -> None:
        breaker = AsyncCircuitBreaker("left-elsewhere", redis=server.url, **FIRM)
        stack = contextlib.AsyncExitStack()

        async def enter() -> None:
            await stack.enter_async_context(breaker)

        async def leave() -> None:
            error = OSError()
            await stack.__aexit__(OSError, error, None)

        await asyncio.create_task(enter())
        await asyncio.create_task(leave())
        assert (await breaker.snapshot()).failure_count == 1
        await breaker.close()

    asyncio.run(main())


def test_abandoned_blocks_are_collected() -> None:
    """A generator that holds a block and itself, and a loop that ended with a block entered, are garbage."""
    breaker = CircuitBreaker("abandoned")
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Stream:
        def __init__(self) -> None:
            self.items = self.run()

        def run(self) -> Iterator[int]:
            with breaker:
                yield 1
                yield 2

    for _ in range(20):
        stream = Stream()
        alive.add(stream)
        next(stream.items)
    del stream
    gc.collect()
    assert (len(alive), breaker._blocks) == (0, {})

    waiting = AsyncCircuitBreaker("abandoned")
    loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

    async def hold() -> None:
        async with waiting:
            await asyncio.get_running_loop().create_future()

    async def begin() -> None:
        task = asyncio.create_task(hold())
        await asyncio.sleep(0.01)
        assert not task.done()

    for _ in range(5):
        loop = asyncio.new_event_loop()
        loops.add(loop)
        loop.run_until_complete(begin())
        loop.close()
        del loop
    gc.collect()
    assert len(loops) <= 1


# Watches whose listener is in trouble ----------------------------------------------------------


@pytest.mark.parametrize("trouble", ["ends its thread", "takes its time"])
def test_a_listener_in_trouble_leaves_no_long_lease(server: EmbeddedServer, client: redis.Redis, trouble: str) -> None:
    """A listener ends the subscription's thread, or blocks it: another breaker hears of its own trip."""
    hold, held = threading.Event(), threading.Event()

    def listener(event: Event) -> None:
        if event.source == "watch":
            held.set()
            if trouble == "ends its thread":
                raise SystemExit
            hold.wait(100)

    names = [f"trouble-{trouble[0]}-{number}" for number in range(2)]
    first = CircuitBreaker(names[0], redis=server.url, listeners=[listener], **FIRM)
    second = CircuitBreaker(names[1], redis=server.url, **FIRM)
    try:
        with first.watch(3600), second.watch(3600) as watch:
            wait_until(lambda: watch.active)
            second.call(int)
            for name in names:
                CircuitBreaker(name, redis=server.url, **FIRM).force_open(3000)
                assert held.wait(60)
            wait_until(lambda: second.state == "open")
            assert second._view.lease == 3600 or trouble == "ends its thread"
    finally:
        hold.set()


def test_a_watch_of_a_loop_that_is_gone_leaves_no_long_lease(server: EmbeddedServer) -> None:
    """The loop was closed without cancelling its tasks: in another one the breaker hears of a trip all the same."""
    breaker = AsyncCircuitBreaker("gone", redis=server.url, **FIRM)

    async def watch() -> None:
        watch = await breaker.watch(3600)
        while not watch.active:
            await asyncio.sleep(0.01)
        await breaker.call(asyncio.sleep, 0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(watch())
    loop.close()
    CircuitBreaker("gone", redis=server.url, **FIRM).force_open(3000)

    async def state() -> str:
        return await breaker.state

    wait_until(lambda: asyncio.run(state()) == "open")


# A view that is trusted no longer, when Redis goes ----------------------------------------------


@pytest.mark.parametrize("way", ["watched", "dropped"])
def test_an_open_circuit_whose_view_was_dropped_stays_open_without_redis(own_server: EmbeddedServer, way: str) -> None:
    """The subscription is lost with its server, or an operator did something: the open time is still known."""
    breaker = CircuitBreaker("dropped", redis=own_server.url, policy=Policy(failure_threshold=1, reset_timeout=3000))
    with pytest.raises(OSError):
        breaker.call(boom)
    breaker._watched(3600 if way == "watched" else None)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            with pytest.raises(CircuitOpenError) as rejection:
                breaker.call(int)
            assert 2000 < rejection.value.retry_after <= 3000
        assert breaker.snapshot().source == "local"
    finally:
        os.kill(own_server.pid, signal.SIGCONT)


def test_loops_for_one_call_each_find_back(own_server: EmbeddedServer) -> None:
    """A retry beside the call is cancelled with each loop: then a call waits for one, and the outage ends."""
    breaker = AsyncCircuitBreaker("short", redis=own_server.url, policy=Policy(failure_threshold=1, reset_timeout=3000))

    async def one() -> str:
        with contextlib.suppress(OSError, CircuitOpenError):
            await breaker.call(fail)
        return "local" if breaker._engine.alone else "redis"

    async def fail() -> None:
        raise OSError

    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        assert asyncio.run(one()) == "local"
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    wait_until(lambda: asyncio.run(one()) == "redis", 60)


def test_a_fork_from_a_loop_is_no_outage(server: EmbeddedServer) -> None:
    """A child that ends at once does not take the connections out of the parent's loop."""
    events: list[str] = []

    async def main() -> None:
        breaker = AsyncCircuitBreaker(
            "forking", redis=server.url, lease=0, listeners=[lambda event: events.append(event.kind)], redis_timeout=5.0
        )
        for _ in range(3):
            await breaker.call(asyncio.sleep, 0)
            child = os.fork()
            if child == 0:
                gc.collect()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        await breaker.call(asyncio.sleep, 0)
        await breaker.close()

    asyncio.run(main())
    assert events == ["success"] * 4


def test_a_stack_beside_a_suspended_block() -> None:
    """An ExitStack that ends while a generator's block is suspended in the same thread settles its own permit."""
    breaker = CircuitBreaker("stacked", policy=Policy(failure_threshold=9))
    stack = contextlib.ExitStack()
    straggler = stack.enter_context(breaker)

    def block() -> Iterator[Any]:
        with breaker as permit:
            yield permit

    suspended = block()
    permit = next(suspended)
    stack.close()
    assert (straggler.settled, permit.settled) == (True, False)
    suspended.close()
    assert permit.settled
