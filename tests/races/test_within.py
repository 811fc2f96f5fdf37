"""Calls of a breaker amid its own work: from the guarded function, a signal handler, a finalizer, a log handler."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import itertools
import os
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis
from conftest import nonzero, stopped, wait_until
from race_workers import signalled_at

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncPermit,
    CircuitBreaker,
    CircuitOpenError,
    Event,
    Permit,
    PermitError,
    Policy,
    _events,
    _memory,
    _process,
    _rules,
    _view,
)
from pybreaker_redis.embedded import EmbeddedServer

PROBING = Policy(failure_threshold=1, reset_timeout=0.001, probe_timeout=3600)
FIRM: dict[str, Any] = {"redis_timeout": 20.0}


def boom() -> None:
    raise OSError("boom")


def trip(breaker: CircuitBreaker) -> None:
    """Opens it, and waits until a probe may run."""
    with pytest.raises(OSError):
        breaker.call(boom)
    wait_until(lambda: breaker.state == "half_open")


async def async_trip(breaker: AsyncCircuitBreaker) -> None:
    """The same on a loop."""

    async def fail() -> None:
        boom()

    with pytest.raises(OSError):
        await breaker.call(fail)
    while breaker.state != "half_open":
        await asyncio.sleep(0.001)


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
        with breaker.acquire() as outer, breaker.acquire() as inner:
            assert (outer.probe, inner.probe, inner.generation) == (1, None, None)
    assert breaker.snapshot().state == "closed"
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

        async def leaf() -> int:
            return 5

        async def outlives() -> int:
            await go.wait()
            return await breaker.call(leaf)

        async def probe() -> list[int]:
            late.append(asyncio.create_task(outlives()))
            return await asyncio.gather(*(breaker.call(leaf) for _ in range(5)))

        for _ in range(2):
            await async_trip(breaker)
            assert await breaker.call(probe) == [5] * 5
            assert (await breaker.snapshot()).state == "closed"
        await async_trip(breaker)
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


IN_MEMORY = ["breaker", "nested", "engine"]
LINKED = ["breaker", "nested", "refreshing", "outage", "refusal", "worker", "messenger", "subscription"]


@pytest.mark.parametrize(
    ("url", "lock"), [*(("memory", lock) for lock in IN_MEMORY), *(("redis", lock) for lock in LINKED)]
)
def test_a_thread_that_holds_a_lock_may_call(server: EmbeddedServer, url: str, lock: str) -> None:
    """A signal handler or a finalizer calls the breaker while its thread holds any of the locks: no deadlock."""
    timeout = 2.0
    breaker = CircuitBreaker("held-by-itself", redis=server.url if url == "redis" else None, redis_timeout=timeout)
    line: Any = breaker._line
    locks: dict[str, Any] = {"breaker": breaker._view.lock, "nested": _process.own_lock()}
    if line is None:
        locks["engine"] = breaker._memory._lock  # type: ignore[union-attr]
    else:
        breaker.reset()
        server = breaker._redis
        locks["refreshing"] = server._refreshing
        if lock in ("outage", "refusal"):
            error = redis.ConnectionError("lost") if lock == "outage" else redis.ResponseError("refused")
            server.link.failed(line, error)
            locks[lock] = server.link.outage(line)._lock
        locks["worker"] = server._worker._lock
        locks["messenger"] = server._messenger._lock
        locks["subscription"] = server.subscription()._lock
    began = time.monotonic()
    with locks[lock]:
        breaker._view.drop()
        assert breaker.call(int, "5") == 5
        with pytest.raises(OSError):
            breaker.call(boom)
        with breaker.acquire():
            pass
        assert nonzero(breaker.counts) == {"successes": 2, "failures": 1}
        assert time.monotonic() - began < 5 * timeout  # a call may wait for a refresh, and then for its report
    breaker.flush()
    wait_until(lambda: breaker.snapshot().failure_count == 0)


def test_a_refresh_that_died_with_its_lock_holds_up_nobody_for_ever(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's exception can hit a thread after it took the lock and before it would release it again."""
    breaker = CircuitBreaker("died", redis=server.url, redis_timeout=1.0)
    monkeypatch.setattr(breaker._redis.link, "patience", 0.05)
    thread = threading.Thread(target=breaker._redis._refreshing.acquire)
    thread.start()
    thread.join()
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(breaker.call(int, "5"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [5] * 8


def fail(breaker: CircuitBreaker) -> None:
    """One failed or rejected call."""
    with contextlib.suppress(OSError, CircuitOpenError):
        breaker.call(boom)


def test_a_signal_handler_that_calls_the_breaker_loses_no_event() -> None:
    """A handler fails a call wherever a signal may interrupt the queue of events: each call is notified once."""
    received: list[Event] = []
    breaker = CircuitBreaker("signalled", policy=Policy(failure_threshold=10**6), on_call=[received.append])
    for place in itertools.count():
        if not signalled_at(place, _events, lambda: fail(breaker), lambda: fail(breaker)):
            break
        counts = breaker.counts  # a call around the handler's failure may count as nothing, as around any other
        assert len(received) == 2 * (place + 1) == counts.failures + counts.ignored, f"place {place}"
    assert place > 5


@pytest.mark.parametrize("handler", ["reads", "trips"])
def test_counts_never_decrease_under_signal_handlers(handler: str) -> None:
    """A handler reads the counts, or makes transitions, wherever a signal may interrupt a reading of the counts."""
    breaker = CircuitBreaker("read", policy=Policy(failure_threshold=1))
    read: list[int] = []

    def count() -> None:
        read.append(breaker.counts.successes)

    def trip_and_close() -> None:
        fail(breaker)
        breaker.reset()
        breaker.call(int)
        count()

    for place in itertools.count():
        breaker.call(int)
        before = breaker.counts.successes
        reached = signalled_at(place, _view, count, count if handler == "reads" else trip_and_close)
        assert before <= read[-1] <= breaker.counts.successes, f"place {place}"
        if not reached:
            break
    assert place > 5
    assert read[-1] == place + 1 + (place if handler == "trips" else 0)


def test_a_signal_handler_within_a_report_makes_it_exact(server: EmbeddedServer, client: redis.Redis) -> None:
    """A handler reports successes wherever a signal may interrupt a report: Redis counts each of them once."""
    events: list[Event] = []
    rate = Policy(error_rate_threshold=0.5, minimum_calls=10**6, window=3600)
    breaker = CircuitBreaker("taken", redis=server.url, policy=rate, lease=3600, listeners=[events.append], **FIRM)

    def call_and_report() -> None:
        breaker.call(int)
        breaker.flush()

    breaker.call(int)
    for place in itertools.count():
        breaker.call(int)
        if not signalled_at(place, _view, breaker.flush, call_and_report):
            break
        breaker.flush()
        assert breaker.snapshot().calls == breaker.counts.successes == 1 + 2 * (place + 1), f"place {place}"
    assert place > 3
    assert events == []


# Blocks that others enter and leave ------------------------------------------------------------


def in_thread(work: Callable[[], object]) -> None:
    """work() in another thread; raises what it raises."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)


def test_stacks_of_many_threads_next_to_plain_blocks() -> None:
    """Blocks entered through an ExitStack in some threads, by `with` in others: each counts once, none raises.

    A block around another one that failed counts as nothing.
    """
    breaker = CircuitBreaker("stacks", policy=Policy(failure_threshold=10**6))
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(500):
                if number % 2:
                    with breaker.acquire():
                        pass
                else:
                    with contextlib.ExitStack() as stack:
                        stack.enter_context(breaker.acquire())
                        stack.enter_context(breaker.acquire()).failure()
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
    assert (errors, nonzero(breaker.counts)) == ([], {"successes": 2000, "failures": 2000, "ignored": 2000})


def test_a_block_left_by_another_thread_or_task(server: EmbeddedServer) -> None:
    """What one thread or task entered may be left in another; a settled permit cannot be entered."""
    breaker = CircuitBreaker("left-elsewhere")
    stack = contextlib.ExitStack()
    permit = stack.enter_context(breaker.acquire())
    in_thread(stack.close)
    assert (permit.settled, breaker.counts.successes) == (True, 1)
    with pytest.raises(PermitError, match="already settled"):
        permit.__enter__()

    async def main() -> None:
        breaker = AsyncCircuitBreaker("left-elsewhere", redis=server.url, **FIRM)
        stack = contextlib.AsyncExitStack()

        async def enter() -> AsyncPermit:
            return await stack.enter_async_context(breaker.acquire())

        async def leave() -> None:
            error = OSError()
            await stack.__aexit__(OSError, error, None)

        permit = await asyncio.create_task(enter())
        await asyncio.create_task(leave())
        assert permit.settled
        assert (await breaker.snapshot()).failure_count == 1
        with pytest.raises(PermitError, match="already settled"):
            await permit.__aenter__()
        await breaker.close()

    asyncio.run(main())


def test_a_probe_left_by_another_thread_is_over_for_its_own() -> None:
    """A probe entered in one thread and left in another closes the circuit, and calls of the first are none of it."""
    breaker = CircuitBreaker("left-probe", policy=PROBING)
    trip(breaker)
    stack = contextlib.ExitStack()
    permit = stack.enter_context(breaker.acquire())
    in_thread(stack.close)
    assert (permit.probe, breaker.snapshot().state) == (1, "closed")
    trip(breaker)
    probe = breaker.acquire()
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    probe.success()


def test_an_async_block_left_in_another_context(server: EmbeddedServer) -> None:
    """An async generator fixture is resumed by another task: its probe's block ends there, without an error."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("contexts", redis=server.url, policy=PROBING, **FIRM)

        async def fixture() -> AsyncIterator[AsyncPermit]:
            async with breaker.acquire() as permit:
                yield permit

        for outcome in ("closed", "open"):
            await async_trip(breaker)
            items = fixture()
            permit = await anext(items)  # in this task's context
            assert permit.probe is not None
            assert await breaker.call(asyncio.sleep, 0, 5) == 5  # as part of the probe

            async def resume(items: Any = items, outcome: str = outcome) -> None:
                if outcome == "closed":
                    assert await anext(items, None) is None
                else:
                    with pytest.raises(OSError):
                        await items.athrow(OSError())

            await asyncio.create_task(resume())
            assert (permit.settled, (await breaker.snapshot()).state) == (True, outcome)
            await breaker.reset()
        await async_trip(breaker)
        other = await breaker.acquire()
        with pytest.raises(CircuitOpenError):  # the probe of this context is over
            await breaker.call(asyncio.sleep, 0)
        await other.release()
        await breaker.close()

    asyncio.run(main())


def test_probes_of_two_breakers_in_suspended_generators() -> None:
    """Two probes' blocks end in the order of their beginning: calls amid the second one are part of it to its end."""
    breakers = [CircuitBreaker(f"suspended-{number}", policy=PROBING) for number in range(2)]

    def block(breaker: CircuitBreaker) -> Iterator[Any]:
        with breaker.acquire() as permit:
            yield permit
            yield breaker.call(int, "5")

    for breaker in breakers:
        trip(breaker)
    first, second = (block(breaker) for breaker in breakers)
    assert [next(first).probe, next(second).probe] == [1, 1]
    assert next(first) == 5
    assert next(first, None) is None
    assert next(second) == 5
    assert next(second, None) is None
    assert [breaker.snapshot().state for breaker in breakers] == ["closed"] * 2


def test_a_stack_next_to_a_suspended_block() -> None:
    """An ExitStack that ends while a generator's block is suspended in the same thread settles its own permit."""
    breaker = CircuitBreaker("stacked", policy=Policy(failure_threshold=9))
    stack = contextlib.ExitStack()
    straggler = stack.enter_context(breaker.acquire())

    def block() -> Iterator[Permit]:
        with breaker.acquire() as permit:
            yield permit

    suspended = block()
    permit = next(suspended)
    stack.close()
    assert (straggler.settled, permit.settled) == (True, False)
    suspended.close()
    assert permit.settled
    assert nonzero(breaker.counts) == {"successes": 1, "ignored": 1}


def test_abandoned_blocks_are_collected() -> None:
    """A generator that holds a block and itself, and a loop that ended with a block entered, are garbage."""
    breaker = CircuitBreaker("abandoned")
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Stream:
        def __init__(self) -> None:
            self.items = self.run()

        def run(self) -> Iterator[int]:
            with breaker.acquire() as permit:
                alive.add(permit)
                yield 1
                yield 2

    for _ in range(20):
        stream = Stream()
        alive.add(stream)
        next(stream.items)
    del stream
    gc.collect()
    assert (len(alive), breaker.counts.ignored) == (0, 20)

    waiting = AsyncCircuitBreaker("abandoned")
    loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

    async def hold(entered: asyncio.Event) -> None:
        async with waiting.acquire():
            entered.set()
            await asyncio.get_running_loop().create_future()

    async def begin() -> None:
        entered = asyncio.Event()
        task = asyncio.create_task(hold(entered))
        await entered.wait()
        assert not task.done()

    for _ in range(5):
        loop = asyncio.new_event_loop()
        loops.add(loop)
        loop.run_until_complete(begin())
        loop.close()
        del loop
    gc.collect()
    assert len(loops) <= 1
    assert nonzero(waiting.counts) == {"ignored": 5}


def test_an_abandoned_permit_warns_once() -> None:
    """A permit that is collected unsettled, also as part of a cycle, is a ResourceWarning; a settled one is silent."""
    breaker = CircuitBreaker("lost")
    gc.collect()
    cycle: list[Any] = [breaker.acquire()]
    cycle.append(cycle)
    del cycle
    with pytest.warns(ResourceWarning, match="'lost' was lost") as warned:
        gc.collect()
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        breaker.acquire().release()
        with breaker.acquire():
            pass
        gc.collect()


# Watches whose listener is in trouble ----------------------------------------------------------


@pytest.mark.parametrize("trouble", ["ends its thread", "takes its time"])
def test_a_listener_in_trouble_delays_no_view(server: EmbeddedServer, client: redis.Redis, trouble: str) -> None:
    """A listener ends its thread, or blocks it: another breaker's view learns of its trip, and later its listener."""
    hold, held = threading.Event(), threading.Event()

    def listener(event: Event) -> None:
        if event.source == "watch":
            held.set()
            if trouble == "ends its thread":
                raise SystemExit
            hold.wait(100)

    names = [f"trouble-{trouble[0]}-{number}" for number in range(2)]
    received: list[Event] = []
    options: dict[str, Any] = {"redis": server.url, "lease": 3600, "redis_timeout": 20.0 + len(trouble) / 100}
    first = CircuitBreaker(names[0], listeners=[listener], **options)
    second = CircuitBreaker(names[1], listeners=[received.append], **options)
    try:
        with first.watch(), second.watch() as watch:
            wait_until(lambda: watch.active)
            first.call(int)
            second.call(int)
            for name in names:
                CircuitBreaker(name, redis=client, **FIRM).force_open(3000)
                assert held.wait(60)
            wait_until(lambda: second.state == "open")
            with pytest.raises(CircuitOpenError):
                second.call(int)
            assert watch.active
            hold.set()
            wait_until(lambda: received)
    finally:
        hold.set()
    assert [(event.new, event.source) for event in received] == [("open", "watch")]


def test_a_watch_of_a_loop_that_is_gone_leaves_no_old_view(server: EmbeddedServer) -> None:
    """The loop was closed without cancelling its tasks: in another one the breaker learns of a trip all the same."""
    breaker = AsyncCircuitBreaker("gone", redis=server.url, redis_timeout=2.0)

    async def watch() -> None:
        watch = await breaker.watch()
        while not watch.active:
            await asyncio.sleep(0.01)
        await breaker.call(asyncio.sleep, 0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(watch())
    loop.close()
    CircuitBreaker("gone", redis=server.url, **FIRM).force_open(3000)

    async def is_rejected() -> bool:
        try:
            await breaker.call(asyncio.sleep, 0)
        except CircuitOpenError:
            return True
        return False

    wait_until(lambda: asyncio.run(is_rejected()))


# A view that is trusted no longer, when Redis goes ----------------------------------------------


@pytest.mark.parametrize("way", ["hinted", "dropped"])
def test_an_open_circuit_whose_view_was_dropped_stays_open_without_redis(own_server: EmbeddedServer, way: str) -> None:
    """Something was published, or an operator did something, and the server hangs: the open time is still known."""
    breaker = CircuitBreaker("dropped", redis=own_server.url, policy=Policy(failure_threshold=1, reset_timeout=3000))
    with pytest.raises(OSError):
        breaker.call(boom)
    os.kill(own_server.pid, signal.SIGSTOP)
    if way == "hinted":
        breaker._hinted()
    else:
        breaker._view.drop()
    try:
        for _ in range(3):
            with pytest.raises(CircuitOpenError) as rejection:
                breaker.call(int)
            assert 2000 < rejection.value.retry_after <= 3000
        wait_until(lambda: breaker.snapshot().source == "local")
    finally:
        os.kill(own_server.pid, signal.SIGCONT)


def test_loops_for_one_call_each_find_back(own_server: EmbeddedServer) -> None:
    """A retry in the background is cancelled with each loop: then a call waits for one, and the outage ends."""
    breaker = AsyncCircuitBreaker("short", redis=own_server.url, policy=Policy(failure_threshold=1, reset_timeout=3000))

    async def one() -> str:
        with contextlib.suppress(OSError, CircuitOpenError):
            await breaker.call(fail)
        return (await breaker.snapshot()).source

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
        listeners = [lambda event: events.append(event.kind)]
        breaker = AsyncCircuitBreaker(
            "forking", redis=server.url, lease=0, listeners=listeners, on_call=listeners, redis_timeout=5.0
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


@pytest.mark.parametrize("module", [_memory, _view, _rules])
def test_a_signal_handler_that_fails_amid_a_failure_in_memory(module: types.ModuleType) -> None:
    """Both failures count, wherever the signal comes; a run that they complete trips with the next failure at last."""
    for place in itertools.count():
        breaker = CircuitBreaker("a", policy=Policy(failure_threshold=4), lease=60.0)
        breaker.call(int)
        fail(breaker)
        fail(breaker)
        again = functools.partial(fail, breaker)
        if not signalled_at(place, module, again, again):
            break
        assert breaker.counts.failures == 4
        assert breaker.snapshot().failure_count == 4, f"place {place}"
        fail(breaker)
        assert breaker.snapshot().state == "open", f"place {place}"
    assert place > 1


@pytest.mark.parametrize("module", [_memory, _view, _rules])
def test_a_signal_handler_that_raises_amid_a_failure_in_memory(module: types.ModuleType) -> None:
    """The exception reaches the caller, no lock stays held, and the breaker counts on."""
    for place in itertools.count():
        breaker = CircuitBreaker("a", policy=Policy(failure_threshold=4), lease=60.0)
        breaker.call(int)
        fail(breaker)
        try:
            reached = signalled_at(place, module, functools.partial(fail, breaker), interrupt)
        except KeyboardInterrupt:
            reached = True
        if not reached:
            break
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # of another thread: no lock is held
            seen = pool.submit(breaker.snapshot).result(20)
        assert seen.failure_count in (1, 2)
        for _ in range(4 - seen.failure_count):
            fail(breaker)
        assert breaker.snapshot().state == "open"
    assert place > 1


def interrupt() -> None:
    """A signal handler that raises."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["memory", "local"])
def test_an_error_that_needs_the_breaker_to_describe_itself(place: str, own_server: EmbeddedServer) -> None:
    """A message may take locks of other threads, or call the breaker: it is read outside of the breaker's locks."""
    url = own_server.url if place == "local" else None
    breaker = CircuitBreaker("a", redis=url, policy=Policy(failure_threshold=3))

    class Odd(OSError):
        def __str__(self) -> str:
            with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.suppress(OSError):
                pool.submit(breaker.call, boom).result(20)  # of another thread, which this one waits for
            return f"it was {breaker.state}"

    def fail() -> None:
        raise Odd

    breaker.call(int)
    with stopped(own_server):
        wait_until(lambda: breaker.snapshot().source == place)
        while breaker.state == "closed":
            with pytest.raises(Odd):
                breaker.call(fail)
        seen = breaker.snapshot()
        assert (seen.state, seen.source, seen.error) == ("open", place, "OSError: boom")


# What outlives a call --------------------------------------------------------------------------


class Request:
    """Something large that a request keeps in a context variable."""


def test_the_background_keeps_no_context_of_a_call(server: EmbeddedServer) -> None:
    """Exchanges, timers, connections and the subscription outlive the first request, but nothing of it stays; events of
    a call's own are delivered in its context."""
    variable: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)
    seen: list[Request | None] = []

    async def main() -> None:
        policy = Policy(failure_threshold=1)
        listeners = [lambda event: seen.append(variable.get())]
        breaker = AsyncCircuitBreaker("contexts", redis=server.url, policy=policy, listeners=listeners, redis_timeout=2)

        async def fine() -> None: ...

        async def first() -> weakref.ref[Request]:
            made = Request()
            variable.set(made)
            await breaker.watch()
            await breaker.call(fine)
            return weakref.ref(made)

        kept = await asyncio.create_task(first())
        while kept() is not None:  # until the timer of the last deadline is over
            gc.collect()
            await asyncio.sleep(0.01)
        await breaker.call(fine)

        async def fail() -> None:
            raise OSError

        mine = Request()
        variable.set(mine)
        with pytest.raises(OSError):
            await breaker.call(fail)
        assert seen[-1] is mine
        await breaker.close()

    asyncio.run(asyncio.wait_for(main(), 60))
