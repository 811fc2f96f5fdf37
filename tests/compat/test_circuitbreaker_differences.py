"""What differs from circuitbreaker on purpose, as the module's docstring lists it, and what only this module has."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import stopped, wait_until

from pybreaker_redis import CircuitBreaker as Native
from pybreaker_redis import CircuitBreakerError as AnyError
from pybreaker_redis import CircuitOpenError, PolicyError, RedisUnavailableError
from pybreaker_redis.compat.circuitbreaker import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerMonitor,
    circuit,
    configure,
)
from pybreaker_redis.embedded import EmbeddedServer

anywhere = pytest.mark.usefixtures("place")


class Boom(Exception):
    """A failure."""


def work(error: type[BaseException] | None = None) -> str:
    """A call that raises the error, if there is one."""
    if error is not None:
        raise error
    return "done"


@pytest.fixture(autouse=True)
def unconfigured() -> Iterator[None]:
    """Each test begins in memory, with an empty monitor."""
    configure()
    CircuitBreakerMonitor.circuit_breakers = {}
    yield
    configure()


@pytest.fixture(params=["memory", "redis", "strict"])
def place(request: pytest.FixtureRequest, client: redis.Redis) -> None:
    """The test runs in memory and on Redis."""
    if request.param != "memory":
        configure(client, lease=0.1 if request.param == "redis" else 0.0)


@pytest.fixture
def on_redis(client: redis.Redis) -> redis.Redis:
    """For a test that is about Redis: strict."""
    configure(client, lease=0)
    return client


def fail(guarded: Callable[..., Any], times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(Boom):
            guarded(Boom)


def make_half_open(breaker: CircuitBreaker) -> None:
    breaker._shells.sync.force_open()
    breaker._shells.sync.clear_forced()


@anywhere
def test_one_trial_call_at_a_time() -> None:
    """While half open, a second call gets the fallback until the first has ended."""
    breaker = CircuitBreaker(name="x", fallback_function=lambda *_: "instead")
    begun, go_on = threading.Event(), threading.Event()
    guarded = breaker(lambda act: act())
    make_half_open(breaker)
    thread = threading.Thread(target=guarded, args=(lambda: (begun.set(), go_on.wait(20)),))
    thread.start()
    assert begun.wait(20)
    assert guarded(int) == "instead"
    go_on.set()
    thread.join(20)
    assert guarded(int) == 0
    assert breaker.closed


@anywhere
def test_while_open_call_and_blocks_run_uncounted() -> None:
    """They reject nothing, and neither close the circuit nor keep it open."""
    breaker = CircuitBreaker(1, name="x")
    fail(breaker(work))
    assert breaker.call(work) == "done"
    with breaker:
        pass
    with pytest.raises(Boom):
        breaker.call(work, Boom)
    assert list(breaker.call_generator(iter, [1, 2])) == [1, 2]
    assert breaker.opened
    assert breaker.failure_count == 1


@anywhere
def test_a_late_success_does_not_count() -> None:
    """A call that began before the circuit opened leaves it open."""
    breaker = CircuitBreaker(1, name="x")
    guarded = breaker(work)

    @breaker
    def slow() -> str:
        thread = threading.Thread(target=fail, args=(guarded,))
        thread.start()
        thread.join(20)
        return "late"

    assert slow() == "late"
    assert breaker.opened


@anywhere
def test_nested_guards_count_once() -> None:
    """A failure that passes two functions of one breaker counts once."""
    breaker = CircuitBreaker(name="x")
    inner = breaker(work)
    outer = breaker(lambda error: inner(error))
    fail(outer)
    assert breaker.failure_count == 1


@anywhere
@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
def test_cancelled_calls_count_as_nothing(error: type[BaseException]) -> None:
    """They do not end a run of failures."""
    breaker = CircuitBreaker(name="x")
    guarded = breaker(work)
    fail(guarded)
    with pytest.raises(error):
        guarded(error)
    assert breaker.failure_count == 1


@anywhere
def test_a_group_counts_as_its_worst() -> None:
    """One failure in a group makes it a failure, which last_failure names."""
    breaker = CircuitBreaker(name="x", expected_exception=Boom)

    @breaker
    def grouped(*errors: Exception) -> None:
        raise ExceptionGroup("several", errors)

    for errors, count in (((KeyError(), Boom()), 1), ((KeyError(),), 0)):
        with pytest.raises(ExceptionGroup):
            grouped(*errors)
        assert wait_until(lambda count=count: breaker.failure_count == count)
        assert (breaker.last_failure is None) == (count == 0)


@anywhere
def test_a_predicate_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the call counts as failed and raises its own exception."""
    breaker = CircuitBreaker(name="x", expected_exception=lambda kind, error: error.code == 404)
    fail(breaker(work))
    assert breaker.failure_count == 1
    assert "failed for Boom" in caplog.text


@anywhere
def test_generators_keep_their_kind() -> None:
    """What is sent into one, and what it returns, passes the guard; one that is abandoned counts as nothing."""
    breaker = CircuitBreaker(name="x")
    guarded = breaker(work)

    @breaker
    def talk() -> Iterator[Any]:
        heard = yield "say"
        return heard

    fail(guarded)
    talking = talk()
    assert next(talking) == "say"
    talking.close()
    assert breaker.failure_count == 1
    talking = talk()
    next(talking)
    with pytest.raises(StopIteration) as ended:
        talking.send("hello")  # type: ignore[attr-defined]
    assert ended.value.value == "hello"
    assert wait_until(lambda: breaker.failure_count == 0)


@anywhere
def test_an_abandoned_async_generator_is_closed() -> None:
    """The guarded generator runs its own clean-up."""
    closed = []

    @circuit
    async def items() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.append(True)

    async def story() -> None:
        async with contextlib.aclosing(items()) as iterated:  # type: ignore[type-var]
            await anext(iterated)

    asyncio.run(story())
    assert closed == [True]


def test_open_remaining_of_a_closed_circuit() -> None:
    """It counts from when the breaker was made."""
    breaker = CircuitBreaker(name="x", recovery_timeout=60)
    assert breaker.open_remaining == 60


@anywhere
def test_why_a_call_was_rejected() -> None:
    """The error's cause says when to ask again, and it is one of this package's errors."""
    breaker = CircuitBreaker(1, name="x")
    guarded = breaker(work)
    fail(guarded)
    with pytest.raises(
        CircuitBreakerError, match=r'Circuit "x" OPEN until .*\(1 failures, 30 sec remaining\)'
    ) as caught:
        guarded()
    assert isinstance(caught.value, AnyError)
    assert isinstance(caught.value.__cause__, CircuitOpenError)
    assert caught.value.__cause__.retry_after > 20


def test_wrong_values() -> None:
    """They get a clear error."""
    for act in (
        lambda: CircuitBreaker(-1),
        lambda: CircuitBreaker(5, -1),
        lambda: configure("http://localhost"),
        lambda: configure(lease=-1),
        lambda: CircuitBreaker(expected_exception=[Boom, 3]),
    ):
        with pytest.raises(ValueError):
            act()
    with pytest.raises(PolicyError, match="recovery_timeout must be"):
        CircuitBreaker(5, -1)


@anywhere
def test_what_a_subclass_may_override() -> None:
    """`opened` decides for decorated functions; call() is not used by them."""

    class Own(CircuitBreaker):
        opened = True

        def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    guarded = Own(name="x", fallback_function=lambda *_: "instead")(work)
    assert guarded() == "instead"
    Own.opened = False
    assert guarded() == "done"


def test_blocks_in_threads_and_tasks() -> None:
    """Each block of one breaker counts for itself, in whatever order they end."""
    breaker = CircuitBreaker(name="x")

    async def block(turns: int, error: type[Exception] | None) -> None:
        with contextlib.suppress(Boom), breaker:
            for _ in range(turns):
                await asyncio.sleep(0)
            work(error)

    async def story() -> None:
        await asyncio.gather(*(block(turns, Boom) for turns in (5, 1, 3)))

    asyncio.run(story())
    assert breaker.failure_count == 3
    with breaker, breaker:
        pass
    assert wait_until(lambda: breaker.failure_count == 0)


def test_a_block_that_ends_in_another_context() -> None:
    """It counts as nothing, and later blocks are not disturbed."""
    breaker = CircuitBreaker(name="x")
    with pytest.warns(ResourceWarning, match="was lost"):
        contextvars.copy_context().run(breaker.__enter__)
    breaker.__exit__(Boom, Boom(), None)
    assert breaker.failure_count == 0
    with pytest.raises(Boom), breaker:
        work(Boom)
    assert breaker.failure_count == 1


# Redis -------------------------------------------------------------------------------------------


def test_processes_share_a_breaker(on_redis: redis.Redis) -> None:
    """A breaker of the same name, here or elsewhere, has the same state; so has a native one."""
    one, other = (CircuitBreaker(2, name="shared")(work) for _ in range(2))
    fail(one)
    fail(other)
    for guarded in (one, other):
        with pytest.raises(CircuitBreakerError):
            guarded()
    assert Native("shared", redis=on_redis).snapshot().state == "open"


def test_configure_after_the_decorators(client: redis.Redis) -> None:
    """What is called first after configure() is shared; what was called before stays where it is."""
    configure()
    early, late = CircuitBreaker(1, name="early")(work), CircuitBreaker(1, name="late")(work)
    early()
    configure(client)
    fail(early)
    fail(late)
    assert [Native(name, redis=client).snapshot().state for name in ("early", "late")] == ["closed", "open"]


def test_the_key_of_a_function_without_a_name(on_redis: redis.Redis) -> None:
    """It has the module in it, so that functions of one name in two modules do not share a breaker."""

    @circuit
    def lookup() -> str:
        return "found"

    lookup()
    [breaker] = CircuitBreakerMonitor.get_circuits()
    assert breaker.name == lookup.__qualname__
    assert on_redis.keys("*") == [f"circuit_breaker:{__name__}.{lookup.__qualname__}:state".encode()]


def test_no_key_without_a_name(on_redis: redis.Redis) -> None:
    """A breaker without a name and without a function cannot be shared."""
    with pytest.raises(PolicyError, match="name"):
        CircuitBreaker().call(work)


def test_while_redis_is_down(own_server: EmbeddedServer) -> None:
    """The process goes on by the same rules; reset() raises."""
    configure(redis.Redis.from_url(own_server.url), lease=0)
    breaker = CircuitBreaker(2, name="x")
    guarded = breaker(work)
    guarded()
    own_server.stop()
    fail(guarded, 2)
    with pytest.raises(CircuitBreakerError):
        guarded()
    with pytest.raises(RedisUnavailableError):
        breaker.reset()


def test_a_hanging_redis_does_not_hold_up_the_event_loop(own_server: EmbeddedServer) -> None:
    """While a decorated coroutine function waits for Redis, the loop goes on."""
    configure(own_server.url, lease=0)

    @circuit
    async def guarded() -> str:
        return "done"

    async def story() -> int:
        await guarded()
        turns = 0
        with stopped(own_server):
            waiting = asyncio.ensure_future(guarded())
            while not waiting.done():
                turns += 1
                await asyncio.sleep(0.001)
        assert await waiting == "done"
        return turns

    assert asyncio.run(story()) > 5


def test_an_operator_closes_an_open_circuit(on_redis: redis.Redis) -> None:
    """A process that rejects learns of it before the recovery time is over, though each call looks at `opened`."""
    configure(on_redis, lease=0.05)
    breaker = CircuitBreaker(1, 3600, name="x", fallback_function=lambda: "instead")
    guarded = breaker(work)
    with pytest.raises(Boom):
        breaker(lambda: work(Boom))()
    assert guarded() == "instead"
    Native("x", redis=on_redis).reset()
    assert wait_until(lambda: guarded() == "done")
