"""AsyncCircuitBreaker as its user sees it, on both engines; each test starts loops of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
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
from conftest import nonzero, stopped, stored_calls, wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event, PermitError, Policy, _async
from pybreaker_redis import PolicyError as Refused
from pybreaker_redis._permit import _probes
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import SCRIPTS, compose

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
    await half_open_now(breaker)
    return breaker


async def half_open_now(breaker: AsyncCircuitBreaker) -> None:
    """Return when the time of the open circuit is over."""
    async with asyncio.timeout(60):
        while breaker.state != "half_open":
            await asyncio.sleep(0.001)


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


WAYS = ["call", "decorator", "acquire", "block", "generator"]


async def one_call(breaker: AsyncCircuitBreaker, way: str, func: Callable[[], Awaitable[Any]]) -> None:
    """One call of the function, guarded in one of the ways."""
    if way == "call":
        await breaker.call(func)
    elif way == "decorator":
        decorated: Any = breaker(func)
        await decorated()
    elif way == "block":
        async with breaker.acquire():
            await func()
    elif way == "acquire":
        permit = await breaker.acquire()
        try:
            await func()
        except BaseException as error:
            await (permit.failure(error) if isinstance(error, Boom) else permit.release())
            raise
        await permit.success()
    else:

        @breaker
        async def stream() -> AsyncIterator[Any]:
            yield await func()

        async for _ in stream():
            pass


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
        assert (await breaker.snapshot()).state == "open"
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
        assert (await breaker.snapshot()).state == "closed"

    asyncio.run(main())


def test_recovers(make: Make) -> None:
    """A probe that succeeds closes the circuit."""

    async def main() -> None:
        breaker = await half_open(make)
        assert await breaker.call(fine) == "fine"
        assert (await breaker.snapshot()).state == "closed"

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
    """A permit's block counts as a call, and its failure() and release() overrule the block's end."""

    async def main() -> None:
        breaker = make(**STRICT)
        with pytest.raises(Boom):
            async with breaker.acquire():
                await boom()
        assert await failures(breaker) == 1
        async with breaker.acquire() as permit:
            await permit.failure(Boom())
        assert await failures(breaker) == 2
        with contextlib.suppress(Boom):
            async with breaker.acquire() as permit:
                await permit.release()
                await boom()
        assert await failures(breaker) == 2
        async with await breaker.acquire() as permit:
            assert not permit.settled
        assert permit.settled
        assert await failures(breaker) == 0

    asyncio.run(main())


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("end", ["success", "failure", "release", "block"])
def test_a_settled_permit_has_no_block(make: Make, end: str, lease: float) -> None:
    """A permit whose call has ended can neither be entered nor settled, and counts once."""

    async def main() -> None:
        breaker = make(lease=lease, **PATIENT)
        permit = await breaker.acquire()
        if end == "block":
            async with permit:
                pass
        else:
            await getattr(permit, end)()
        before = breaker.counts
        with pytest.raises(PermitError, match="already settled"):
            async with permit:
                pytest.fail("it ran")
        with pytest.raises(PermitError, match="already settled"):
            await permit.failure()
        assert breaker.counts == before
        assert sum(nonzero(before).values()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("probing", [False, True])
def test_a_block_within_itself(make: Make, probing: bool) -> None:
    """A permit that is entered is not entered again, and its own block goes on."""

    async def main() -> None:
        breaker = await half_open(make) if probing else make(**STRICT)
        async with breaker.acquire() as permit:
            with pytest.raises(PermitError, match="already entered"):
                async with permit:
                    pytest.fail("it ran")
            assert not permit.settled
        assert permit.settled
        assert (await breaker.snapshot()).state == "closed"

    asyncio.run(main())


def test_nested_blocks(make: Make) -> None:
    """Nested blocks of one breaker end with their own permits."""

    async def main() -> None:
        breaker = make(**STRICT)
        with contextlib.suppress(Boom):
            async with breaker.acquire() as outer:
                async with breaker.acquire() as inner:
                    pass
                assert (inner.settled, outer.settled) == (True, False)
                await boom()
        assert outer.settled
        assert await failures(breaker) == 1

    asyncio.run(main())


def test_block_rejects(make: Make) -> None:
    """A rejected block does not run, and a later one counts as ever."""

    async def main() -> None:
        breaker = make(policy=ONE, **STRICT)
        await (await breaker.acquire()).failure()
        with pytest.raises(CircuitOpenError):
            async with breaker.acquire():
                pytest.fail("it ran")
        with pytest.raises(CircuitOpenError):
            await breaker.acquire()
        await breaker.reset()
        with pytest.raises(Boom):
            async with breaker.acquire():
                await boom()
        assert (await breaker.snapshot()).state == "open"

    asyncio.run(main())


@pytest.mark.parametrize("name", ["success", "failure", "release", "settled", "probe", "generation", "started"])
def test_an_acquire_that_was_not_awaited(make: Make, name: str) -> None:
    """Using acquire() as if it were the permit says that it has to be awaited, and counts nothing."""
    breaker = make(**STRICT)
    with pytest.raises(PermitError, match=r"'discovery' was not awaited: `permit = await breaker.acquire\(\)`"):
        getattr(breaker.acquire(), name)
    assert "'discovery': await it" in repr(breaker.acquire())
    assert nonzero(breaker.counts) == {}


@pytest.mark.parametrize("first", ["await", "block"])
@pytest.mark.parametrize("second", ["await", "block"])
def test_an_acquire_is_for_one_call(make: Make, first: str, second: str) -> None:
    """What acquire() returns asks when it is awaited or entered, not before, and once."""

    async def main() -> None:
        breaker = await half_open(make)
        asking = breaker.acquire()
        assert await probes(breaker) == 0
        async with await asking if first == "await" else asking as permit:
            assert await probes(breaker) == 1
            with pytest.raises(PermitError, match="is for one call"):
                await (asking if second == "await" else asking.__aenter__())
            assert not permit.settled
        assert permit.settled
        assert (await breaker.snapshot()).state == "closed"

    asyncio.run(main())


@pytest.mark.parametrize("end", ["success", "failure", "release"])
def test_second_settle(make: Make, end: str) -> None:
    """A permit is settled once, however it was."""

    async def main() -> None:
        permit = await make(**STRICT).acquire()
        await getattr(permit, end)()
        assert permit.settled
        for again in ("success", "failure", "release"):
            with pytest.raises(PermitError, match="already settled"):
                await getattr(permit, again)()

    asyncio.run(main())


def test_blocks_of_many_tasks(make: Make) -> None:
    """Blocks of tasks that overlap in one loop keep their own permits."""

    async def main() -> None:
        breaker = make(policy=Policy(failure_threshold=100), lease=60, **PATIENT)

        async def work(number: int) -> None:
            async with breaker.acquire() as permit:
                await asyncio.sleep(0.001 * (number % 3))
                if number % 2:
                    await permit.failure()
                else:
                    await permit.release()

        await asyncio.gather(*(work(number) for number in range(40)))
        assert await failures(breaker) == 20

    asyncio.run(main())


def test_exit_stack(make: Make) -> None:
    """An AsyncExitStack enters and leaves a permit like an async with statement."""

    async def main() -> None:
        breaker = make(**STRICT)
        with contextlib.suppress(Boom):
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(breaker.acquire())
                await boom()
        assert await failures(breaker) == 1

    asyncio.run(main())


@pytest.mark.parametrize("error", [None, Boom()])
def test_exit_of_a_permit_that_was_never_entered(make: Make, error: Boom | None) -> None:
    """The exit of a permit settles it, entered or not: as a probe, and while the circuit is closed."""

    async def main() -> None:
        breaker = await half_open(make)
        with contextlib.suppress(Boom):
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_exit(permit := await breaker.acquire())
                if error is not None:
                    raise error
        seen = await breaker.snapshot()
        assert (permit.settled, seen.state) == (True, "open" if error else "closed")
        breaker = make("fast", lease=3600, **PATIENT)
        for _ in range(2):
            permit = await breaker.acquire()
            await permit.__aexit__(None, error, None)
        assert nonzero(breaker.counts) == ({"failures": 2} if error else {"successes": 2})

    asyncio.run(main())


def test_delegated_block(make: Make) -> None:
    """A class that enters a permit in its own __aenter__ and leaves it in its own __aexit__ guards its block."""

    async def main() -> None:
        breaker = make(**STRICT)

        class Session:
            async def __aenter__(self) -> None:
                self._permit = await breaker.acquire().__aenter__()

            async def __aexit__(self, *exception: Any) -> None:
                await self._permit.__aexit__(*exception)

        with pytest.raises(Boom):
            async with Session():
                await boom()
        assert await failures(breaker) == 1

    asyncio.run(main())


async def collected(permits: list[Any]) -> None:
    """Drop them, and whatever the loop still has of them."""
    permits.clear()
    await asyncio.sleep(0)
    gc.collect()


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("probing", [False, True])
def test_a_lost_permit_warns(make: Make, probing: bool, lease: float) -> None:
    """A permit that nobody settled says so when it is collected."""

    async def main() -> None:
        breaker = await half_open(make, lease=lease) if probing else make(lease=lease, **PATIENT)
        permits = [await breaker.acquire()]
        with pytest.warns(ResourceWarning, match="a permit of circuit breaker 'discovery' was lost: end its call with"):
            await collected(permits)

    asyncio.run(main())


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_guard_loses_a_permit(make: Make, monkeypatch: pytest.MonkeyPatch, way: str, lease: float) -> None:
    """Successes, failures, cancellations, rejections, probes and shadow mode all settle what they acquire."""
    lost: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lost.append)  # a warning that is an error cannot leave __del__
    options: dict[str, Any] = {"ignore": Answer, "lease": lease, **PATIENT}
    shadow = Policy(failure_threshold=1, enforce=False)

    async def hang() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        breakers = [make("closed", **options), await half_open(make, **options)]
        for name, policy in {"shadow": shadow, "enforced": ONE, "slow": Policy(slow_call_duration=60)}.items():
            breakers.append(make(name, policy=policy, **options))
        breakers.append(make("judged", is_failure=lambda _: 1 / 0 > 1, **options))
        outcomes: list[Any] = [fine, boom, *map(raising, (Answer(), SystemError()))]
        for breaker in breakers:
            for func in outcomes * 2:
                with contextlib.suppress(Boom, Answer, SystemError, ZeroDivisionError, CircuitOpenError):
                    await one_call(breaker, way, func)
            for pause in (0, 0, 0.001):  # cancelled before it asks, while it asks, and while it runs
                task = asyncio.create_task(one_call(breaker, way, hang))
                await asyncio.sleep(pause)
                task.cancel()
                await asyncio.wait([task])
            tasks = _async._tasks[os.getpid()]
            while others := tasks.get(asyncio.get_running_loop()):  # a request that was under way gives back
                await asyncio.wait({*others})
            await breaker.close()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a permit", ResourceWarning)
        asyncio.run(main())
        gc.collect()
    assert [one for one in lost if "permit" in str(one.exc_value)] == []


@pytest.mark.parametrize("way", WAYS)
def test_probes_leave_no_marks(way: str) -> None:
    """8,000 probes in one task leave nothing behind in its context."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("marks", policy=Policy(failure_threshold=1, success_threshold=10**6))
        await breaker.force_open(0.001)
        await half_open_now(breaker)
        for _ in range(8000):
            await one_call(breaker, way, nothing)
            assert len(_probes.get()) == 0
        assert (await breaker.snapshot()).state == "half_open"
        assert breaker.counts.successes == 8000

    asyncio.run(main())


async def nothing() -> None:
    """A call that waits for nothing."""


@pytest.mark.parametrize("way", WAYS)
def test_breakers_that_ran_a_probe_are_freed(make: Make, way: str) -> None:
    """200 breakers that each ran a probe in one task are freed once they are dropped."""

    async def main() -> None:
        breakers = [make(f"dropped-{number}", **STRICT) for number in range(200)]
        for breaker in breakers:
            await breaker.force_open(0.001)
        for breaker in breakers:
            await half_open_now(breaker)
            await one_call(breaker, way, nothing)
            assert breaker.state == "closed"
        dropped = [weakref.ref(breaker) for breaker in breakers]
        del breakers, breaker
        await asyncio.sleep(0)  # the loop lets go of the tasks that ended
        gc.collect()
        assert [one for one in dropped if one() is not None] == []

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
        assert (await breaker.snapshot()).state == "open"

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
            async with breaker.acquire():
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

        async def acquire() -> None:
            await (await breaker.acquire()).success()

        async def block() -> None:
            async with breaker.acquire():
                started.set()

        ask: dict[str, Callable[[], Any]] = {
            "call": lambda: breaker.call(forever, started),
            "acquire": acquire,
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
        assert (await breaker.snapshot()).state == "closed"

    asyncio.run(main())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shadow", [False, True])
def test_cancelled_while_a_listener_runs(make: Make, way: str, shadow: bool) -> None:
    """A caller that is cancelled while a listener keeps it waiting leaves no slot taken and no permit behind."""

    async def main() -> None:
        reached, release = asyncio.Event(), asyncio.Event()

        async def listener(event: Event) -> None:
            if (event.kind, event.new) == (("rejected", None) if shadow else ("state_change", "half_open")):
                reached.set()
                await release.wait()

        policy = Policy(failure_threshold=1, reset_timeout=3600 if shadow else 0.001, enforce=not shadow)
        breaker = make(policy=policy, listeners=[listener], on_call=[listener], **STRICT)
        await (await breaker.acquire()).failure()

        async def given_up() -> bool:
            return breaker.counts.ignored == 1

        if not shadow:
            await half_open_now(breaker)
        task = asyncio.create_task(one_call(breaker, way, fine))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        await true(given_up)
        if not shadow:
            await slot_is_free(breaker)

    asyncio.run(main())
    gc.collect()


def test_a_cancelled_caller_takes_no_event_with_it(make: Make) -> None:
    """A caller is cancelled while a listener keeps it waiting: all listeners of all events are still called."""

    async def main() -> None:
        reached, release = asyncio.Event(), asyncio.Event()
        received: list[tuple[str, str]] = []

        async def slow(event: Event) -> None:
            if event.kind == "failure":
                reached.set()
                await release.wait()
            received.append(("slow", event.kind))

        def plain(event: Event) -> None:
            received.append(("plain", event.kind))

        async def all_received() -> bool:
            return len(received) == 4

        breaker = make(policy=ONE, listeners=[slow, plain], on_call=[slow, plain], **STRICT)
        task = asyncio.create_task(breaker.call(boom))
        await reached.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Boom):
            await task
        release.set()
        await true(all_received)
        assert received == [(who, kind) for kind in ("failure", "state_change") for who in ("slow", "plain")]

    asyncio.run(main())


def test_events_of_a_call_are_not_delivered_by_another(server: EmbeddedServer) -> None:
    """One task ends its call while the failure of another one is on its way to Redis, and delivers only its own."""

    async def main() -> None:
        delivered: list[tuple[str, asyncio.Task[Any] | None]] = []

        def listener(event: Event) -> None:
            delivered.append((event.kind, asyncio.current_task()))

        async def fail_at_once() -> None:
            raise Boom

        async def succeed_at_once() -> None: ...

        breaker = AsyncCircuitBreaker("whose", redis=server.url, lease=3600, on_call=[listener], **PATIENT)
        await breaker.call(succeed_at_once)
        delivered.clear()
        tasks = [asyncio.create_task(breaker.call(work)) for work in (fail_at_once, succeed_at_once)]
        await asyncio.wait(tasks)
        by = dict(delivered)
        assert (len(delivered), by["success"]) == (2, tasks[1])
        assert by["failure"] is not tasks[1]
        with pytest.raises(Boom):
            await tasks[0]
        await breaker.close()

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
        assert (await breaker.snapshot()).state == "closed"

    asyncio.run(main())


@pytest.mark.parametrize("lease", [0, 60])
def test_generator_counts(make: Make, lease: float) -> None:
    """A decorated generator is one call: a success, a failure, or ignored when it is abandoned."""

    async def main() -> None:
        breaker = make(lease=lease, **PATIENT)
        guarded = breaker(numbers)
        assert len([item async for item in guarded()]) == 3
        with contextlib.suppress(Boom):
            assert not [item async for item in guarded(Boom())]
        abandoned = guarded()
        await anext(abandoned)
        await abandoned.aclose()
        guarded()  # never started
        assert nonzero(breaker.counts) == {"successes": 1, "failures": 1, "ignored": 1}

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
    """1,000 tasks that find a stale view send one command among them; another reports their successes."""
    for name in SCRIPTS:
        client.script_load(compose(name))

    def asked() -> int:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    async def main() -> None:
        breaker = on(server)(lease=3600, **PATIENT)
        before = asked()
        assert await asyncio.gather(*(breaker.call(fine) for _ in range(1000))) == ["fine"] * 1000
        assert asked() - before <= 2  # the first success of a generation is reported as it ends
        await breaker.flush()
        async with asyncio.timeout(20):
            while asked() - before < 2:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert asked() - before <= 3

    asyncio.run(main())


def test_one_probe_among_tasks(make: Make) -> None:
    """Of 100 tasks at a half-open breaker one runs."""

    async def main() -> None:
        breaker = await half_open(make)

        async def ask() -> Any:
            return await breaker.acquire()

        found = await asyncio.gather(*(ask() for _ in range(100)), return_exceptions=True)
        [permit] = [one for one in found if not isinstance(one, CircuitOpenError)]
        await permit.success()

    asyncio.run(main())


def test_a_busy_loop_is_no_outage(server: EmbeddedServer, client: redis.Redis) -> None:
    """A loop that is blocked for longer than redis_timeout does not take Redis for dead."""
    events: list[str] = []
    note = [lambda event: events.append(event.kind)]

    async def main() -> None:
        breaker = on(server)(lease=0, redis_timeout=0.25, listeners=note, on_call=note)
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


@pytest.mark.parametrize("lease", [0, 60])
@pytest.mark.parametrize("way", WAYS)
def test_counts_of_tasks(make: Make, way: str, lease: float) -> None:
    """Every call of many tasks is counted once, cancelled ones as ignored."""

    async def main() -> None:
        breaker = make(policy=Policy(failure_threshold=1000), lease=lease, **PATIENT)

        async def hang() -> None:
            hanging.append(True)
            await asyncio.Event().wait()

        hanging: list[bool] = []
        calls = [asyncio.create_task(one_call(breaker, way, func)) for func in [fine, boom] * 20]
        hung = [asyncio.create_task(one_call(breaker, way, hang)) for _ in range(5)]
        await asyncio.wait(calls)

        async def all_hang() -> bool:
            return len(hanging) == 5

        await true(all_hang)
        for task in hung:
            task.cancel()
        await asyncio.wait(hung)
        assert nonzero(breaker.counts) == {"successes": 20, "failures": 20, "ignored": 5}
        await breaker.force_open()
        with pytest.raises(CircuitOpenError):
            await one_call(breaker, way, fine)
        assert nonzero(breaker.counts) == {"successes": 20, "failures": 20, "ignored": 5, "rejected": 1}

    asyncio.run(main())


@pytest.mark.parametrize("lease", [0, 60])
def test_calls_within_a_probe_are_counted(make: Make, lease: float) -> None:
    """A call that is part of a probe is counted in this process, and the probe's own outcome decides."""

    async def main() -> None:
        breaker = await half_open(make, lease=lease)
        before = breaker.counts
        async with breaker.acquire() as probe:
            assert probe.probe is not None
            await breaker.call(fine)
            with pytest.raises(Boom):
                await breaker.call(boom)
            async with breaker.acquire() as inner:
                assert (inner.probe, inner.generation) == (None, None)
            assert (await breaker.snapshot()).state == "half_open"
        assert (await breaker.snapshot()).state == "closed"
        assert breaker.counts == dataclasses.replace(
            before, successes=before.successes + 3, failures=before.failures + 1
        )

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("lease", [0, 60])
def test_counts_in_a_forked_child(make: Make, lease: float) -> None:
    """A child counts its own calls from zero, and leaves the parent's counts as they were."""
    breaker = make(lease=lease, policy=Policy(failure_threshold=10), **PATIENT)

    async def use() -> None:
        await breaker.call(fine)
        with pytest.raises(Boom):
            await breaker.call(boom)
        await breaker.close()

    asyncio.run(use())
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            first = breaker.counts
            asyncio.run(breaker.call(fine))
            code = 0 if (nonzero(first), nonzero(breaker.counts)) == ({}, {"successes": 1}) else 2
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert nonzero(breaker.counts) == {"successes": 1, "failures": 1}


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
    assert asyncio.run(breaker.snapshot()).state == "open"


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
        async with breaker.acquire():
            assert await probes(breaker) == 1
        assert (await breaker.snapshot()).state == "closed"
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
    """Plain listeners and coroutine functions receive each event; the latter are awaited before the call returns."""
    received: list[tuple[str, Event]] = []
    changes: list[str] = []
    calls: list[str] = []

    def plain(event: Event) -> None:
        received.append(("plain", event))

    async def awaited(event: Event) -> None:
        await asyncio.sleep(0.005)
        received.append(("awaited", event))

    async def main() -> AsyncCircuitBreaker:
        breaker = make(
            listeners=[awaited, plain, lambda event: changes.append(event.kind)],
            on_call=[awaited, plain, lambda event: calls.append(event.kind)],
            policy=ONE,
            ignore=Answer,
            **STRICT,
        )
        await breaker.call(fine)
        assert [who for who, _ in received] == ["awaited", "plain"]
        for kind, function in ((Answer, raising(Answer())), (Boom, boom), (CircuitOpenError, fine)):
            with pytest.raises(kind):
                await breaker.call(function)
        return breaker

    breaker = asyncio.run(main())
    events = [event for who, event in received if who == "awaited"]
    assert events == [event for who, event in received if who == "plain"]
    assert (changes, calls) == (["state_change"], ["success", "ignored", "failure", "rejected"])
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
    received: list[Event] = []

    def plain(event: Event) -> None:
        raise Boom

    async def main() -> None:
        both = [plain, boom, received.append]
        breaker = make(listeners=both, on_call=both, **STRICT)
        assert await breaker.call(fine) == "fine"
        await breaker.force_open()

    asyncio.run(main())
    assert [event.kind for event in received] == ["success", "state_change"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 4


def test_listener_that_calls(make: Make) -> None:
    """A listener may await the breaker that notifies it."""
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
        assert ((await breaker.snapshot()).state, (await breaker.snapshot()).forced) == ("open", "open")
        with pytest.raises(CircuitOpenError):
            await breaker.call(fine)
        await breaker.clear_forced()
        await breaker.call(fine)
        await breaker.force_closed()
        with pytest.raises(Boom):
            await breaker.call(boom)
        await breaker.reset()
        assert ((await breaker.snapshot()).state, (await breaker.snapshot()).forced) == ("closed", None)
        entries = await breaker.history()
        assert [entry.reason for entry in entries] == [
            "reset",
            "forced",
            "probe_succeeded",
            "timeout",
            "clear_forced",
            "forced",
        ]
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
        assert (await breaker.snapshot()).forced is None
        assert await breaker.history() == []

    asyncio.run(main())


def test_flush(make: Make, client: redis.Redis) -> None:
    """Successes are gathered under a lease, and counted by flush() and close()."""

    async def main() -> None:
        rate = Policy(error_rate_threshold=1, minimum_calls=10**6, window=3600)
        breaker = make(lease=600, policy=rate, **PATIENT)
        for end in (breaker.flush, breaker.close):
            while stored_calls(breaker, client) == breaker.counts.successes:
                await breaker.call(fine)
            await end()
            assert stored_calls(breaker, client) == breaker.counts.successes

    asyncio.run(main())


def test_a_success_after_a_failure_is_reported_at_once(make: Make) -> None:
    """A success that ends a run of failures waits for no lease and for no flush()."""

    async def main() -> None:
        breaker = await failed_once(make, lease=600)
        await breaker.call(fine)
        if (await breaker.snapshot()).source == "memory":  # no other process has to know
            await breaker.flush()
        async with asyncio.timeout(20):
            while await failures(breaker):
                await asyncio.sleep(0.001)

    asyncio.run(main())


def test_shared_with_the_sync_breaker(server: EmbeddedServer, client: redis.Redis) -> None:
    """Both breakers share the state of one name."""
    CircuitBreaker("shared", redis=client, policy=ONE, **STRICT).acquire().failure()
    assert asyncio.run(on(server)("shared", **STRICT).snapshot()).state == "open"


@pytest.mark.parametrize("wrong", [1, object(), redis.Redis()])
def test_wrong_clients(wrong: Any) -> None:
    """What is no asyncio client is refused, a sync client too."""
    with pytest.raises(Refused, match="redis must be"):
        AsyncCircuitBreaker("wrong", redis=wrong)


def test_client(server: EmbeddedServer, client: redis.Redis) -> None:
    """A redis.asyncio client serves, is left as it was, and may be used by others too."""

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
    policy = Policy(failure_threshold=10**6)
    breaker = AsyncCircuitBreaker("crowd", redis=server.url, lease=0, policy=policy, **PATIENT)
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

    assert asyncio.run(main()) <= 100


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")  # of lost tasks
def test_a_loop_that_is_closed_while_a_call_asks_for_a_probe(own_server: EmbeddedServer) -> None:
    """Its call never ends. Calls of later loops are rejected for a while only, then one of them probes."""
    policy = Policy(failure_threshold=1, reset_timeout=0.001, probe_timeout=0.1)
    breaker = AsyncCircuitBreaker("closed-loop", redis=own_server.url, policy=policy)

    def run(call: Awaitable[Any]) -> Any:
        loop = asyncio.new_event_loop()  # closed without an end of its tasks, unlike that of asyncio.run()
        try:
            return loop.run_until_complete(call)
        finally:
            loop.close()

    async def asks() -> None:
        await breaker.snapshot()  # it has a connection
        with stopped(own_server), contextlib.suppress(TimeoutError):
            await asyncio.wait_for(breaker.call(fine), 0.02)

    with pytest.raises(Boom):
        run(breaker.call(boom))
    run(asks())

    def is_admitted() -> bool:
        with contextlib.suppress(CircuitOpenError):
            return bool(run(breaker.call(fine)))
        return False

    wait_until(is_admitted)
    assert breaker.state == "closed"
    gc.collect()


def test_a_listener_whose_own_future_was_cancelled(server: EmbeddedServer) -> None:
    """It failed like any other listener: the outcome counts, and the caller is not cancelled."""

    async def main() -> None:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        gone.cancel()

        async def listener(event: Event) -> None:
            if event.kind == "success":
                await gone

        breaker = AsyncCircuitBreaker("listener", redis=server.url, policy=PROBING, on_call=[listener], **PATIENT)
        with pytest.raises(Boom):
            await breaker.call(fail_once)
        await asyncio.sleep(0.01)
        await breaker.call(asyncio.sleep, 0)
        assert (await breaker.snapshot()).state == "closed"
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


def test_calls_leave_nothing_in_their_loop(server: EmbeddedServer) -> None:
    """A loop ends an asynchronous generator that is collected by a task: there is one for all exchanges."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("leaves", redis=server.url, **STRICT)
        for _ in range(50):
            await breaker.call(fine)
        assert len(asyncio.get_running_loop()._asyncgens) == 1  # type: ignore[attr-defined]

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
