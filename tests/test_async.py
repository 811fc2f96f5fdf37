"""AsyncCircuitBreaker as its user sees it, on both engines; each test starts loops of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event, PermitError, Policy
from pybreaker_redis import PolicyError as Refused
from pybreaker_redis._scripts import SCRIPTS, compose
from pybreaker_redis.embedded import EmbeddedServer

Make = Callable[..., AsyncCircuitBreaker]
PATIENT: dict[str, Any] = {"redis_timeout": 20.0}
STRICT: dict[str, Any] = {"lease": 0, **PATIENT}
ONE = Policy(failure_threshold=1, reset_timeout=3600)
PROBING = Policy(failure_threshold=1, reset_timeout=0.001, probe_timeout=3600)


class Boom(Exception):
    """A failure of the guarded service."""


class Answer(Exception):
    """An exception by which the guarded service answers."""


@pytest.fixture(params=["redis", "memory"])
def make(request: pytest.FixtureRequest, server: EmbeddedServer, client: redis.Redis) -> Make:
    """Makes breakers on either engine."""
    url = server.url if request.param == "redis" else None
    return lambda name="discovery", **options: AsyncCircuitBreaker(name, redis=url, **options)


async def fine() -> str:
    """A call that succeeds."""
    await asyncio.sleep(0)
    return "fine"


async def boom(*_: object) -> None:
    """A call that fails."""
    await asyncio.sleep(0)
    raise Boom("boom")


def raising(exception: BaseException) -> Callable[[], Awaitable[None]]:
    """A coroutine function that raises this."""

    async def function() -> None:
        raise exception

    return function


async def forever(started: asyncio.Event) -> None:
    """A call that hangs."""
    started.set()
    await asyncio.Event().wait()


async def under_way() -> None:
    """Return when what the other tasks have to send is sent."""
    for _ in range(50):
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)


async def true(condition: Callable[[], Awaitable[Any]]) -> None:
    """Return when the condition has come true."""
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.005)


async def half_open(make: Make, **options: Any) -> AsyncCircuitBreaker:
    """A breaker whose next call is a probe; its slot would be held for an hour."""
    breaker = make(policy=PROBING, **{**STRICT, **options})
    await (await breaker.acquire()).failure()

    async def due() -> bool:
        return (await breaker.snapshot()).retry_after == 0

    await true(due)
    return breaker


async def failed_once(make: Make, **options: Any) -> AsyncCircuitBreaker:
    """A closed breaker with one failure."""
    breaker = make(**{**STRICT, **options})
    await (await breaker.acquire()).failure()
    return breaker


async def failures(breaker: AsyncCircuitBreaker) -> int:
    """The failures in a row."""
    return (await breaker.snapshot()).failure_count


async def probes(breaker: AsyncCircuitBreaker) -> int:
    """The slots in use."""
    return (await breaker.snapshot()).probes_in_flight


async def slot_is_free(breaker: AsyncCircuitBreaker) -> None:
    """Return when the slot was given back and the circuit is still half open."""

    async def free() -> bool:
        seen = await breaker.snapshot()
        return seen.state == "half_open" and not seen.probes_in_flight

    await true(free)


# Calls


def test_call(make: Make) -> None:
    """call() awaits, hands over arguments, result and exception, and counts the failure."""

    async def main() -> None:
        breaker = make(**STRICT)

        async def echo(*args: Any, **kwargs: Any) -> Any:
            return args, kwargs

        assert await breaker.call(echo, 1, func=2) == ((1,), {"func": 2})
        with pytest.raises(Boom, match="boom"):
            await breaker.call(boom)
        assert await failures(breaker) == 1
        await breaker.close()

    asyncio.run(main())


@pytest.mark.parametrize("lease", [0, 60])
def test_trips_and_rejects(make: Make, lease: float) -> None:
    """The threshold-th failure opens it, and the function does not run any more."""

    async def main() -> None:
        breaker = make(policy=Policy(failure_threshold=3, reset_timeout=3600), lease=lease, **PATIENT)
        started = asyncio.Event()
        for _ in range(3):
            with pytest.raises(Boom):
                await breaker.call(boom)
        assert await breaker.state == "open"
        with pytest.raises(CircuitOpenError) as caught:
            await breaker.call(forever, started)
        assert (caught.value.name, caught.value.state) == ("discovery", "open")
        assert 3000 < caught.value.retry_after <= 3600
        assert not started.is_set()

    asyncio.run(main())


def test_success_ends_a_run_of_failures(make: Make) -> None:
    """A success that was only gathered goes ahead of the failure that comes after it."""

    async def main() -> None:
        breaker = make(policy=Policy(failure_threshold=2), lease=60, **PATIENT)
        for _ in range(3):
            with pytest.raises(Boom):
                await breaker.call(boom)
            await breaker.call(fine)
        assert await breaker.state == "closed"

    asyncio.run(main())


def test_recovers(make: Make) -> None:
    """A probe that succeeds closes the circuit."""

    async def main() -> None:
        breaker = await half_open(make)
        assert await breaker.call(fine) == "fine"
        assert await breaker.state == "closed"

    asyncio.run(main())


def test_decorator(make: Make) -> None:
    """The decorated function keeps name and signature, is a coroutine function, and knows its breaker."""
    breaker = make(**STRICT)

    @breaker
    async def search(query: str, *, limit: int = 3) -> str:
        """Search."""
        return query * limit

    assert asyncio.run(search("a", limit=2)) == "aa"
    assert (search.__name__, search.__doc__) == ("search", "Search.")
    assert list(inspect.signature(search).parameters) == ["query", "limit"]
    assert inspect.iscoroutinefunction(search)
    assert search.breaker is breaker


def generator_function() -> Iterator[None]:
    """Not for the asyncio breaker."""
    yield


@pytest.mark.parametrize("function", [int, len, generator_function, lambda: None])
def test_sync_function(make: Make, function: Any) -> None:
    """The decorator refuses what it could not await, and says what could guard it."""
    with pytest.raises(TypeError, match="use CircuitBreaker"):
        make(**STRICT)(function)


def test_calling_a_sync_function(make: Make) -> None:
    """call() wants something to await."""
    with pytest.raises(TypeError):
        asyncio.run(make(**STRICT).call(int))  # type: ignore[arg-type]


def test_calling_a_lambda(make: Make) -> None:
    """call() awaits what a lambda returns."""
    assert asyncio.run(make(**STRICT).call(lambda: fine())) == "fine"


# Blocks and permits


def test_block(make: Make) -> None:
    """A block counts as a call, and permit.failure() and ignore() overrule its end."""

    async def main() -> None:
        breaker = make(**STRICT)
        with pytest.raises(Boom):
            async with breaker:
                await boom()
        assert await failures(breaker) == 1
        async with breaker as permit:
            await permit.failure(Boom())
        assert await failures(breaker) == 2
        with contextlib.suppress(Boom):
            async with breaker as permit:
                await permit.ignore()
                await boom()
        assert await failures(breaker) == 2
        async with breaker:
            pass
        assert await failures(breaker) == 0

    asyncio.run(main())


@pytest.mark.parametrize("end", ["success", "failure", "release", "ignore"])
def test_second_settle(make: Make, end: str) -> None:
    """A permit is settled once, however it was."""

    async def main() -> None:
        permit = await make(**STRICT).acquire()
        await getattr(permit, end)()
        assert permit.settled
        for again in ("success", "failure", "release", "ignore"):
            with pytest.raises(PermitError, match="settled before"):
                await getattr(permit, again)()

    asyncio.run(main())


def test_blocks_of_many_tasks(make: Make) -> None:
    """Blocks of tasks that overlap in one loop keep their own permits."""

    async def main() -> None:
        breaker = make(policy=Policy(failure_threshold=100), lease=60, **PATIENT)

        async def work(number: int) -> None:
            async with breaker as permit:
                await asyncio.sleep(0.001 * (number % 3))
                if number % 2:
                    await permit.failure()
                else:
                    await permit.ignore()

        await asyncio.gather(*(work(number) for number in range(40)))
        assert await failures(breaker) == 20

    asyncio.run(main())


def test_exit_stack(make: Make) -> None:
    """An AsyncExitStack enters and leaves a breaker like an async with statement."""

    async def main() -> None:
        breaker = make(**STRICT)
        with contextlib.suppress(Boom):
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(breaker)
                await boom()
        assert await failures(breaker) == 1

    asyncio.run(main())


def test_delegated_block(make: Make) -> None:
    """A class that enters the breaker in its own __aenter__ and leaves it in its own __aexit__ guards its block."""

    async def main() -> None:
        breaker = make(**STRICT)

        class Session:
            async def __aenter__(self) -> None:
                await breaker.__aenter__()

            async def __aexit__(self, *exception: Any) -> None:
                await breaker.__aexit__(*exception)

        with pytest.raises(Boom):
            async with Session():
                await boom()
        assert await failures(breaker) == 1

    asyncio.run(main())


# What counts as what


def test_classification(make: Make) -> None:
    """Ignored exceptions count as nothing, and those outside `failures` as answers."""

    async def main() -> None:
        breaker = await failed_once(make, failures=(Boom, OSError), ignore=KeyError)
        with pytest.raises(KeyError):
            await breaker.call(raising(KeyError()))
        assert await failures(breaker) == 1
        with pytest.raises(Answer):
            await breaker.call(raising(Answer()))
        assert await failures(breaker) == 0

    asyncio.run(main())


@pytest.mark.parametrize("lease", [0, 60])
def test_is_failure(make: Make, lease: float) -> None:
    """A result that the predicate calls a failure counts as one."""

    async def main() -> None:
        breaker = make(is_failure=bool, policy=ONE, lease=lease, **PATIENT)
        assert await breaker.call(fine) == "fine"
        assert await breaker.state == "open"

    asyncio.run(main())


def test_predicate_that_raises(make: Make) -> None:
    """An exception of the predicate is the caller's; it counts as nothing and costs no slot."""

    def predicate(result: Any) -> bool:
        raise Boom

    async def main() -> None:
        breaker = await half_open(make, is_failure=predicate)
        with pytest.raises(Boom):
            await breaker.call(fine)
        await slot_is_free(breaker)

    asyncio.run(main())


@pytest.mark.parametrize("lease", [0, 60])
def test_cancelled_call(make: Make, lease: float) -> None:
    """A cancelled call is neither success nor failure."""

    async def main() -> None:
        breaker = await failed_once(make, lease=lease)
        started = asyncio.Event()
        task = asyncio.create_task(breaker.call(forever, started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await breaker.flush()
        assert await failures(breaker) == 1

    asyncio.run(main())


@pytest.mark.parametrize("way", ["call", "block", "timeout"])
def test_cancelled_probe(make: Make, way: str) -> None:
    """A cancelled probe gives its slot back, and the circuit stays half open."""

    async def main() -> None:
        breaker = await half_open(make)
        started = asyncio.Event()

        async def block() -> None:
            async with breaker:
                await forever(started)

        task = asyncio.create_task(block() if way == "block" else breaker.call(forever, started))
        await started.wait()
        assert await probes(breaker) == 1
        if way == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.01)
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await breaker.snapshot()).state == "half_open"
        assert await probes(breaker) == 0

    asyncio.run(main())


def on(server: EmbeddedServer) -> Make:
    """Makes breakers on this server."""
    return lambda name="discovery", **options: AsyncCircuitBreaker(name, redis=server.url, **options)


@pytest.mark.parametrize("way", ["call", "acquire", "block", "generator"])
def test_cancelled_while_it_asks(own_server: EmbeddedServer, way: str) -> None:
    """A caller that is cancelled while its acquire is under way leaves no slot taken."""

    async def main() -> None:
        breaker = await half_open(on(own_server))
        started = asyncio.Event()

        async def stream() -> AsyncIterator[None]:
            started.set()
            yield

        async def block() -> None:
            async with breaker:
                started.set()

        ask: dict[str, Callable[[], Any]] = {
            "call": lambda: breaker.call(forever, started),
            "acquire": breaker.acquire,
            "block": block,
            "generator": lambda: anext(breaker(stream)()),
        }

        async def run() -> None:
            await ask[way]()

        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            task = asyncio.create_task(run())
            await under_way()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        await slot_is_free(breaker)
        assert not started.is_set()
        await breaker.call(fine)
        assert await breaker.state == "closed"

    asyncio.run(main())


def test_cancelled_while_it_reports(own_server: EmbeddedServer) -> None:
    """A failure whose report is under way counts, though its caller is cancelled."""

    async def main() -> None:
        breaker = on(own_server)(policy=Policy(failure_threshold=100), **STRICT)
        permit = await breaker.acquire()
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            task = asyncio.create_task(permit.failure())
            await under_way()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            os.kill(own_server.pid, signal.SIGCONT)

        async def counted() -> bool:
            return await failures(breaker) == 1

        await true(counted)

    asyncio.run(main())


# Generators


async def numbers(end: BaseException | None = None) -> Any:
    """Yields what it is sent, then ends or raises."""
    got = yield "first"
    with contextlib.suppress(LookupError):
        got = yield got
    yield "last"
    if end:
        raise end


def test_generator_runs_through(make: Make) -> None:
    """A guarded async generator passes on what is sent and thrown."""

    async def main() -> None:
        guarded = make(**STRICT)(numbers)
        generator = guarded()
        assert await anext(generator) == "first"
        assert await generator.asend("sent") == "sent"
        assert await generator.athrow(LookupError()) == "last"
        with pytest.raises(StopAsyncIteration):
            await anext(generator)

    asyncio.run(main())


def test_generator_failure(make: Make) -> None:
    """A failure inside an async generator counts, however late it comes."""

    async def main() -> None:
        breaker = make(**STRICT)
        items = []
        with contextlib.suppress(Boom):
            async for item in breaker(numbers)(Boom()):
                items.append(item)
        assert items == ["first", None, "last"]
        assert await failures(breaker) == 1

    asyncio.run(main())


def test_generator_success(make: Make) -> None:
    """An async generator counts as one success, at its end."""

    async def main() -> None:
        breaker = await half_open(make)
        generator = breaker(numbers)()
        assert await probes(breaker) == 0
        await anext(generator)
        assert await probes(breaker) == 1
        assert [item async for item in generator] == [None, "last"]
        assert await breaker.state == "closed"

    asyncio.run(main())


@pytest.mark.parametrize("end", ["close", "collect", "cancel"])
def test_abandoned_generator(make: Make, end: str) -> None:
    """An async generator that is closed, forgotten or cancelled gives its slot back, and its own cleanup ran."""

    async def main() -> None:
        breaker = await half_open(make)
        cleaned = []

        async def stream() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.Event().wait()
            finally:
                cleaned.append(True)

        generator = breaker(stream)()
        await anext(generator)
        assert await probes(breaker) == 1
        if end == "close":
            await generator.aclose()
        elif end == "cancel":
            task = asyncio.ensure_future(anext(generator))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            del generator
            gc.collect()
        await slot_is_free(breaker)
        assert cleaned == [True]

    asyncio.run(main())


# Load


def test_a_stale_view_is_refreshed_by_one(server: EmbeddedServer, client: redis.Redis) -> None:
    """1,000 tasks that find a stale view send one command among them."""
    for name in SCRIPTS:
        client.script_load(compose(name))

    def asked() -> int:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    async def main() -> None:
        breaker = on(server)(lease=3600, **PATIENT)
        before = asked()
        assert await asyncio.gather(*(breaker.call(fine) for _ in range(1000))) == ["fine"] * 1000
        assert asked() - before == 1
        await breaker.flush()
        assert asked() - before == 2

    asyncio.run(main())


def test_one_probe_among_tasks(make: Make) -> None:
    """Of 100 tasks at a half-open breaker one runs."""

    async def main() -> None:
        breaker = await half_open(make)
        permits = await asyncio.gather(*(breaker.acquire() for _ in range(100)), return_exceptions=True)
        assert sum(not isinstance(permit, CircuitOpenError) for permit in permits) == 1

    asyncio.run(main())


def test_a_busy_loop_is_no_outage(server: EmbeddedServer, client: redis.Redis) -> None:
    """A loop that is blocked for longer than redis_timeout does not take Redis for dead."""
    events: list[str] = []

    async def main() -> None:
        breaker = on(server)(lease=0, redis_timeout=0.25, listeners=[lambda event: events.append(event.kind)])
        await breaker.call(fine)
        for _ in range(3):
            task = asyncio.create_task(breaker.call(fine))
            for _ in range(3):
                await asyncio.sleep(0)
            time.sleep(0.5)
            assert await task == "fine"
        assert (await breaker.snapshot()).source == "redis"

    asyncio.run(main())
    assert events == ["success"] * 4


# Loops


def test_made_outside_of_loops(make: Make) -> None:
    """A breaker made outside of any loop serves one loop after the other, with or without close()."""
    breaker = make(policy=Policy(failure_threshold=4), **STRICT)
    for number in range(4):

        async def main(closing: int = number % 2) -> None:
            with pytest.raises(Boom):
                await breaker.call(boom)
            if closing:
                await breaker.close()

        asyncio.run(main())
    assert asyncio.run(breaker.state) == "open"  # type: ignore[arg-type]


def test_two_loops_at_once(make: Make) -> None:
    """Loops in two threads share a breaker, and no outcome is lost."""
    breaker = make(policy=Policy(failure_threshold=1000), lease=0.01, **PATIENT)

    async def work() -> None:
        for _ in range(25):
            await asyncio.gather(*(breaker.call(boom) for _ in range(4)), return_exceptions=True)

    threads = [threading.Thread(target=lambda: asyncio.run(work())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asyncio.run(failures(breaker)) == 200


def test_uvloop(make: Make) -> None:
    """It works on uvloop: calls, blocks, cancellation."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        breaker = await half_open(make)
        started = asyncio.Event()
        task = asyncio.create_task(breaker.call(forever, started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with breaker:
            assert await probes(breaker) == 1
        assert await breaker.state == "closed"
        await breaker.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_nothing_is_left_in_the_loop(make: Make) -> None:
    """When all calls have returned, no task of the breaker is left."""

    async def main() -> None:
        breaker = make(**STRICT)
        await asyncio.gather(*(breaker.call(fine) for _ in range(10)))
        await breaker.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


# Listeners


def test_listeners(make: Make) -> None:
    """Listeners of both kinds hear of each outcome; those that are async are awaited before the call returns."""
    heard: list[tuple[str, Event]] = []

    def plain(event: Event) -> None:
        heard.append(("plain", event))

    async def awaited(event: Event) -> None:
        await asyncio.sleep(0.005)
        heard.append(("awaited", event))

    async def main() -> AsyncCircuitBreaker:
        breaker = make(listeners=[awaited, plain], policy=ONE, ignore=Answer, **STRICT)
        await breaker.call(fine)
        assert [who for who, _ in heard] == ["awaited", "plain"]
        for kind, function in ((Answer, raising(Answer())), (Boom, boom), (CircuitOpenError, fine)):
            with pytest.raises(kind):
                await breaker.call(function)
        return breaker

    breaker = asyncio.run(main())
    events = [event for who, event in heard if who == "awaited"]
    assert events == [event for who, event in heard if who == "plain"]
    assert [event.kind for event in events] == ["success", "ignored", "failure", "state_change", "rejected"]
    assert {(event.breaker, event.instance) for event in events} == {("discovery", breaker.instance)}
    assert isinstance(events[1].exception, Answer)
    assert isinstance(events[2].exception, Boom)
    assert (events[3].old, events[3].new, events[3].reason) == ("closed", "open", "failure_threshold")
    assert events[3].counts == {"failure_count": 1, "success_count": 0}
    assert events[4].retry_after is not None
    assert 3000 < events[4].retry_after <= 3600


def test_listener_that_raises(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a listener, awaited or not, is logged, and breaks nothing."""
    heard: list[Event] = []

    def plain(event: Event) -> None:
        raise Boom

    assert asyncio.run(make(listeners=[plain, boom, heard.append], **STRICT).call(fine)) == "fine"
    assert [event.kind for event in heard] == ["success"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


def test_listener_that_calls(make: Make) -> None:
    """A listener may await the breaker that tells it."""
    states: list[str] = []

    async def listener(event: Event) -> None:
        if event.kind == "state_change":
            states.append((await breaker.snapshot()).state)
            await breaker.reset() if event.new == "open" else None

    breaker = make(listeners=[listener], policy=ONE, **STRICT)
    with pytest.raises(Boom):
        asyncio.run(breaker.call(boom))
    assert states == ["open", "closed"]


# Looking and steering


def test_steering(make: Make) -> None:
    """The operator's commands, the state and the history work as in the sync breaker."""

    async def main() -> None:
        breaker = make(policy=ONE, **STRICT)
        await breaker.force_open(1000)
        assert (await breaker.state, (await breaker.snapshot()).forced) == ("open", "open")
        with pytest.raises(CircuitOpenError):
            await breaker.call(fine)
        await breaker.clear_override()
        await breaker.call(fine)
        await breaker.force_closed()
        with pytest.raises(Boom):
            await breaker.call(boom)
        await breaker.reset()
        assert (await breaker.state, (await breaker.snapshot()).forced) == ("closed", None)
        entries = await breaker.history()
        assert [entry.reason for entry in entries] == ["reset", "forced", "probe_succeeded", "timeout", "forced"]
        assert await breaker.history(1) == entries[:1]

    asyncio.run(main())


def test_out_of_range(make: Make) -> None:
    """A duration or a count that makes no sense is refused, and changes nothing."""

    async def main() -> None:
        breaker = make(**STRICT)
        for duration in (0, float("nan"), True, 31 * 86400):
            for action in (breaker.force_open, breaker.force_closed):
                with pytest.raises(Refused, match="duration"):
                    await action(duration)
        with pytest.raises(Refused, match="count"):
            await breaker.history(0)
        assert (await breaker.snapshot()).generation == 0

    asyncio.run(main())


def test_flush(make: Make) -> None:
    """Successes are gathered under a lease, and counted by flush() and close()."""

    async def main() -> None:
        breaker = await failed_once(make, lease=600)
        await breaker.call(fine)
        assert await failures(breaker) == 1
        await breaker.flush()
        assert await failures(breaker) == 0

    asyncio.run(main())


def test_shared_with_the_sync_breaker(server: EmbeddedServer, client: redis.Redis) -> None:
    """Both breakers share the state of one name."""
    CircuitBreaker("shared", redis=client, policy=ONE, **STRICT).acquire().failure()
    assert asyncio.run(on(server)("shared", **STRICT).state) == "open"  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [1, object(), redis.Redis()])
def test_wrong_clients(wrong: Any) -> None:
    """What is no asyncio client is refused, a sync client too."""
    with pytest.raises(Refused, match="redis must be"):
        AsyncCircuitBreaker("wrong", redis=wrong)


def test_client(server: EmbeddedServer, client: redis.Redis) -> None:
    """A redis.asyncio client serves, is left as it was, and may be used beside the breaker."""

    async def main() -> None:
        given = redis.asyncio.Redis.from_url(server.url, decode_responses=True)
        before = dict(given.connection_pool.connection_kwargs)
        breaker = AsyncCircuitBreaker("given", redis=given, policy=ONE, **STRICT)
        with pytest.raises(Boom):
            await breaker.call(boom)
        await breaker.close()
        assert given.connection_pool.connection_kwargs == before
        assert await given.exists(breaker.keys.state) == 1
        await given.aclose()

    asyncio.run(main())


def test_loops_that_ended_leave_nothing_behind(server: EmbeddedServer, client: redis.Redis) -> None:
    """One breaker in many loops, one after the other and none of them closed: sockets and loops go with them."""
    breaker = AsyncCircuitBreaker("loops", redis=server.url, policy=Policy(failure_threshold=10**6))
    loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

    async def main() -> None:
        loops.add(asyncio.get_running_loop())
        await (await breaker.acquire()).failure()
        breaker._view.drop()  # the next one refreshes the view, too
        await (await breaker.acquire()).release()

    before = len(client.client_list())
    for _ in range(20):
        asyncio.run(main())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    wait_until(lambda: len(client.client_list()) - before <= 2)
    assert len(loops) <= 2


def test_breakers_share_the_connections_of_a_client(server: EmbeddedServer, client: redis.Redis) -> None:
    """Fifty breakers that were given the same client, or URL, and ask one after the other need one connection."""

    async def main(target: Any) -> None:
        breakers = [AsyncCircuitBreaker(f"shared-{number}", redis=target, lease=0) for number in range(50)]
        for breaker in breakers:
            assert await breaker.call(asyncio.sleep, 0, result=5) == 5
        assert sum(one["name"] == "sharing-async" for one in client.client_list()) == 1
        for breaker in breakers:
            await breaker.close()

    async def given() -> None:
        async with redis.asyncio.Redis.from_url(url) as target:
            await main(target)

    url = f"{server.url}?client_name=sharing-async"
    asyncio.run(main(url))
    asyncio.run(given())


def test_a_crowd_shares_the_connections(server: EmbeddedServer, client: redis.Redis) -> None:
    """2,000 tasks that all ask go over a bounded number of connections, and every report counts."""
    breaker = AsyncCircuitBreaker("crowd", redis=server.url, lease=0, policy=Policy(failure_threshold=10**6))
    before = len(client.client_list())

    async def fail() -> None:
        await (await breaker.acquire()).failure()

    async def main() -> int:
        await asyncio.gather(*(fail() for _ in range(2000)))
        connections = len(client.client_list()) - before
        snapshot = await breaker.snapshot()
        assert (snapshot.failure_count, snapshot.source) == (2000, "redis")
        await breaker.close()
        return connections

    assert asyncio.run(main()) <= 128


def test_loops_for_one_call_each_lose_no_success(server: EmbeddedServer) -> None:
    """asyncio.run() ends while a refresh has only begun to connect: what that took is reported by the next one."""
    policy = Policy(error_rate_threshold=1.0, minimum_calls=10**6)
    breaker = AsyncCircuitBreaker("short-loops", redis=server.url, policy=policy, **PATIENT)

    async def one() -> None:
        await breaker.call(asyncio.sleep, 0)

    async def counted() -> int:
        await breaker.flush()
        return (await breaker.snapshot()).calls

    for _ in range(30):
        asyncio.run(one())
        time.sleep(0.06)
    assert asyncio.run(counted()) == 30


def test_a_listener_whose_own_future_was_cancelled(server: EmbeddedServer) -> None:
    """It failed like any other listener: the outcome counts, and the caller is not cancelled."""

    async def main() -> None:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        gone.cancel()

        async def listener(event: Event) -> None:
            if event.kind == "success":
                await gone

        breaker = AsyncCircuitBreaker("listener", redis=server.url, policy=PROBING, listeners=[listener], **PATIENT)
        with pytest.raises(Boom):
            await breaker.call(fail_once)
        await asyncio.sleep(0.01)
        await breaker.call(asyncio.sleep, 0)
        assert await breaker.state == "closed"
        await breaker.close()

    async def fail_once() -> None:
        raise Boom

    asyncio.run(main())


def test_two_breakers_on_one_generator() -> None:
    """An async generator function that is guarded already can be guarded again."""

    async def main() -> list[int]:
        @AsyncCircuitBreaker("outer")
        @AsyncCircuitBreaker("inner")
        async def numbers() -> AsyncIterator[int]:
            yield 1
            yield 2

        return [number async for number in numbers()]

    assert asyncio.run(main()) == [1, 2]


@pytest.mark.parametrize("shell", [CircuitBreaker, AsyncCircuitBreaker])
def test_a_refused_predicate(shell: Callable[..., Any]) -> None:
    """A coroutine function would be true of every result, a type that is none an error at the first failure."""

    async def predicate(_: object) -> bool:
        return False

    for options in ({"is_failure": predicate}, {"is_failure": 5}, {"failures": [lambda: 1]}, {"ignore": "OSError"}):
        with pytest.raises(Refused):
            shell("options", **options)


def test_a_credential_provider_that_fails(server: EmbeddedServer) -> None:
    """Whatever keeps a breaker from connecting is an outage, and reaches no caller."""

    class Tokens(redis.CredentialProvider):
        def get_credentials(self) -> Any:
            raise LookupError("the token service is down")

    path = f"{server.directory}/r.sock"
    sync = CircuitBreaker("tokens", redis=redis.Redis(unix_socket_path=path, credential_provider=Tokens()))
    assert (sync.call(int, "5"), sync.snapshot().source) == (5, "local")
    sync = CircuitBreaker("tokens", redis="redis://redis..internal")
    assert (sync.call(int, "5"), sync.snapshot().source) == (5, "local")

    async def main() -> None:
        target = redis.asyncio.Redis(unix_socket_path=path, credential_provider=Tokens())
        breaker = AsyncCircuitBreaker("tokens", redis=target)
        assert await breaker.call(asyncio.sleep, 0, result=5) == 5
        assert (await breaker.snapshot()).source == "local"

    asyncio.run(main())
