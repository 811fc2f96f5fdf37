"""What differs from pybreaker on purpose, as the module's docstring lists it, and what only this module has."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import fakeredis
import pybreaker
import pytest
import redis
import redis.asyncio
from conftest import stopped, wait_until
from fault_servers import sentinels

from pybreaker_redis import AsyncCircuitBreaker, CircuitOpenError, PolicyError, RedisUnavailableError
from pybreaker_redis import CircuitBreaker as Native
from pybreaker_redis import CircuitBreakerError as AnyError
from pybreaker_redis.compat.pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitMemoryStorage,
    CircuitRedisStorage,
)
from pybreaker_redis.embedded import EmbeddedServer

Make = Callable[..., CircuitBreaker]


class Boom(Exception):
    """A failure."""


def boom() -> None:
    """A call that fails."""
    raise Boom


async def aboom() -> None:
    """The same for asyncio."""
    raise Boom


async def afine() -> str:
    """A coroutine function that succeeds."""
    return "fine"


class Service:
    """An object with a coroutine method."""

    async def ask(self) -> str:
        return "asked"


class States(CircuitBreakerListener):
    """Notes the changes of state."""

    def __init__(self) -> None:
        self.seen: list[tuple[str | None, str]] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.seen.append((old_state and old_state.name, new_state.name))


@pytest.fixture(params=["memory", "redis", "strict"])
def make(request: pytest.FixtureRequest, client: redis.Redis) -> Make:
    """Makes breakers in memory and on Redis."""

    def made(**options: Any) -> CircuitBreaker:
        if request.param == "memory":
            return CircuitBreaker(**options)
        lease = 0.1 if request.param == "redis" else 0.0
        return CircuitBreaker(state_storage=CircuitRedisStorage(STATE_CLOSED, client, "test", lease=lease), **options)

    return made


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises((Boom, CircuitBreakerError)):
            breaker.call(boom)


# Calls -------------------------------------------------------------------------------------------


def test_no_lock_around_the_call(make: Make) -> None:
    """Two threads run their calls at the same time: each waits within its call for the other."""
    breaker = make(listeners=[CircuitBreakerListener()])
    both = threading.Barrier(2, timeout=20)
    threads = [threading.Thread(target=breaker.call, args=(both.wait,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not both.broken


def test_listeners_are_called_one_at_a_time(make: Make) -> None:
    """A listener that is slow to count loses nothing, as under pybreaker's lock."""

    class Slow(CircuitBreakerListener):
        count = 0

        def success(self, cb: CircuitBreaker) -> None:
            count = self.count
            time.sleep(0.0001)
            self.count = count + 1

    listener = Slow()
    breaker = make(listeners=[listener])
    threads = [threading.Thread(target=lambda: [breaker.call(int) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert listener.count == 200


def test_one_trial_call_at_a_time(make: Make) -> None:
    """While a trial call runs, other calls are rejected."""
    breaker = make()
    breaker.half_open()
    begun, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=breaker.call, args=(lambda: (begun.set(), go_on.wait(20)),))
    thread.start()
    assert begun.wait(20)
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.call(int)
    go_on.set()
    thread.join(20)
    assert isinstance(caught.value.__cause__, CircuitOpenError)
    assert caught.value.__cause__.retry_after > 0
    assert breaker.current_state == STATE_CLOSED


def test_a_late_result_does_not_count(make: Make) -> None:
    """A success that began before the circuit opened leaves it open; a failure raises what the trip raises."""
    breaker = make(fail_max=1)

    in_thread: list[Any] = []

    def outer(then: Callable[[], Any]) -> None:
        def nested() -> Any:  # in another thread, or the inner failure would be part of this call
            thread = threading.Thread(target=fail, args=(breaker,))
            thread.start()
            thread.join(20)
            return then()

        try:
            in_thread.append(breaker.call(nested))
        except Exception as error:
            in_thread.append(type(error))

    outer(int)
    assert breaker.current_state == STATE_OPEN
    breaker.close()
    outer(boom)
    assert in_thread == [0, CircuitBreakerError]
    assert breaker.fail_counter == 1


def test_nested_guards_count_once(make: Make) -> None:
    """A failure that passes two guards of one breaker counts once."""
    breaker = make()
    with pytest.raises(Boom):
        breaker.call(breaker.call, boom)
    assert breaker.fail_counter == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
def test_cancelled_calls_count_as_nothing(make: Make, error: type[BaseException]) -> None:
    """They neither add a failure nor end a run of failures; other exceptions outside Exception are failures."""
    breaker = make(fail_max=3)

    def interrupted(by: type[BaseException]) -> None:
        raise by

    fail(breaker)
    with pytest.raises(error):
        breaker.call(interrupted, error)
    assert breaker.fail_counter == 1
    with pytest.raises(SystemExit):
        breaker.call(interrupted, SystemExit)
    assert breaker.fail_counter == 2


def test_a_group_counts_as_its_worst(make: Make) -> None:
    """A group of excluded exceptions is a success; one failure in it makes it a failure."""
    breaker = make(exclude=[KeyError])

    def grouped(*errors: Exception) -> None:
        raise ExceptionGroup("several", errors)

    fail(breaker)
    with pytest.raises(ExceptionGroup):
        breaker.call(grouped, KeyError())
    assert breaker.fail_counter == 0
    with pytest.raises(ExceptionGroup):
        breaker.call(grouped, KeyError(), Boom())
    assert breaker.fail_counter == 1


def test_an_exclude_function_that_raises(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the call counts as failed and raises its own exception."""
    breaker = make(exclude=[lambda error: error.code == 404])
    fail(breaker)
    assert breaker.fail_counter == 1
    assert "failed for Boom" in caplog.text


def test_a_listener_that_raises(make: Make) -> None:
    """Its exception reaches the caller. In before_call it is a failure, and the function does not run."""

    class Broken(CircuitBreakerListener):
        def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
            raise Boom("in the listener")

    breaker = make(listeners=[Broken()])
    with pytest.raises(Boom, match="in the listener"):
        breaker.call(pytest.fail)
    assert breaker.fail_counter == 1


def test_a_generator_asks_when_it_starts(make: Make) -> None:
    """It is rejected if the circuit has opened since it was made."""
    breaker = make(fail_max=1)

    @breaker
    def items() -> Iterator[int]:
        yield 1

    late = items()
    fail(breaker)
    with pytest.raises(CircuitBreakerError, match="still open"):
        next(late)


def test_an_exception_thrown_into_a_generator(make: Make) -> None:
    """It counts by what the generator makes of it."""
    breaker = make()

    @contextlib.contextmanager
    @breaker
    def forgiving() -> Iterator[None]:
        with contextlib.suppress(Boom):
            yield

    with forgiving():
        boom()
    assert breaker.fail_counter == 0
    abandoned = breaker.call(lambda: (number for number in range(3)))
    next(abandoned)
    abandoned.close()
    assert breaker.fail_counter == 0


# Coroutine functions -----------------------------------------------------------------------------


def test_coroutine_functions_in_every_way(make: Make) -> None:
    """The decorator, call and call_async await them; failures trip, and open circuits reject."""
    breaker = make(fail_max=3, exclude=[KeyError], listeners=[states := States()])

    async def story() -> None:
        assert await breaker(afine)() == await breaker.call(afine) == await breaker.call_async(afine) == "fine"
        assert await breaker.call(Service().ask) == "asked"
        with pytest.raises(TypeError):
            breaker.call(functools.partial(afine))
        for guarded in (breaker(aboom), lambda: breaker.call(aboom)):
            with pytest.raises(Boom):
                await guarded()
        assert breaker.fail_counter == 2
        with pytest.raises(CircuitBreakerError, match="threshold reached") as caught:
            await breaker.call_async(aboom)
        assert isinstance(caught.value.__cause__, Boom)
        with pytest.raises(CircuitBreakerError, match="still open"):
            await breaker(afine)()
        breaker.half_open()
        assert await breaker(afine)() == "fine"
        assert breaker.current_state == STATE_CLOSED
        breaker.open()
        with pytest.raises(CircuitBreakerError):
            await breaker.call_async(afine)

    asyncio.run(story())
    names = [new for _, new in states.seen]
    assert names == [STATE_OPEN, STATE_HALF_OPEN, STATE_CLOSED, STATE_OPEN]


def test_functions_and_coroutine_functions_share_a_circuit(make: Make) -> None:
    """What one kind of call counts, the other kind knows."""
    breaker = make(fail_max=2)
    fail(breaker)

    async def story() -> None:
        with pytest.raises(CircuitBreakerError):
            await breaker.call_async(aboom)

    asyncio.run(story())
    with pytest.raises(CircuitBreakerError):
        wait_until(lambda: breaker.call(int))  # with a lease, the other kind learns of it as another process does


def test_limits_change_for_coroutine_functions(make: Make) -> None:
    """A new limit counts for both kinds of calls, whichever came first."""
    breaker = make(fail_max=9)

    async def story() -> None:
        assert await breaker.call_async(afine) == "fine"
        breaker.fail_max = 2
        await trip(breaker)

    asyncio.run(story())
    assert breaker.current_state == STATE_OPEN


def test_async_generator_functions() -> None:
    """They are refused when they are decorated, not unguarded."""

    async def items() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="AsyncCircuitBreaker"):
        CircuitBreaker()(items)


def test_a_generator_from_a_coroutine_function() -> None:
    """It is not guarded: the call has ended when it is returned."""
    breaker = CircuitBreaker()

    async def items() -> Iterator[int]:
        return (1 // number for number in (1, 0))

    iterated = asyncio.run(breaker.call_async(items))
    with pytest.raises(ZeroDivisionError):
        list(iterated)
    assert breaker.fail_counter == 0


def test_a_hanging_redis_does_not_hold_up_the_event_loop(own_server: EmbeddedServer) -> None:
    """While coroutine functions wait for Redis, the loop goes on."""

    async def story() -> int:
        client = redis.Redis.from_url(own_server.url)
        breaker = CircuitBreaker(state_storage=CircuitRedisStorage(STATE_CLOSED, client, "test", lease=0))
        await breaker.call_async(afine)
        turns = 0
        with stopped(own_server):
            waiting = asyncio.ensure_future(breaker.call_async(afine))
            while not waiting.done():
                turns += 1
                await asyncio.sleep(0.001)
        assert await waiting == "fine"
        return turns

    assert asyncio.run(story()) > 5


def test_a_cancelled_coroutine_frees_the_trial_call(make: Make) -> None:
    """A trial call that is cancelled counts as nothing, and the next may try."""
    breaker = make()
    breaker.half_open()

    async def story() -> None:
        task = asyncio.ensure_future(breaker.call_async(asyncio.sleep, 60))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    assert breaker.current_state == STATE_HALF_OPEN
    assert wait_until(lambda: breaker.call(lambda: True))
    assert breaker.current_state == STATE_CLOSED


def test_tornado_coroutines() -> None:
    """Tornado's coroutines can be guarded, and can yield the result."""
    gen = pytest.importorskip("tornado.gen")
    breaker = CircuitBreaker(fail_max=2)

    @breaker(__pybreaker_call_async=True)
    @gen.coroutine
    def work(error: type[Exception] | None = None) -> Any:
        yield gen.sleep(0)
        if error is not None:
            raise error
        return "done"

    @gen.coroutine
    def story() -> Any:
        with pytest.raises(Boom):
            yield work(Boom)
        result = yield work()
        return result

    async def main() -> Any:
        return await story()

    assert asyncio.run(main()) == "done"
    assert breaker.fail_counter == 0


# State -------------------------------------------------------------------------------------------


def test_the_end_of_an_open_period_is_fixed(make: Make) -> None:
    """A shorter reset_timeout does not shorten the present period."""
    breaker = make(fail_max=1, reset_timeout=60)
    fail(breaker)
    breaker.reset_timeout = 0
    assert breaker.reset_timeout == 0
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.call(int)
    assert isinstance(caught.value.__cause__, CircuitOpenError)
    assert caught.value.__cause__.retry_after > 30
    breaker.close()
    fail(breaker)
    assert wait_until(lambda: not_rejected(breaker))


def not_rejected(breaker: CircuitBreaker) -> bool:
    with contextlib.suppress(CircuitBreakerError):
        return bool(breaker.call(lambda: True))
    return False


def test_fail_counter_while_half_open(make: Make) -> None:
    """It keeps the failures until the circuit closes."""
    breaker = make(fail_max=2, success_threshold=2)
    fail(breaker, 2)
    breaker.half_open()
    breaker.call(int)
    assert (breaker.fail_counter, breaker.success_counter) == (2, 1)
    breaker.call(int)
    assert (breaker.fail_counter, breaker.success_counter) == (0, 0)


def test_opened_at(make: Make) -> None:
    """It has the time zone UTC and whole seconds, and is None once the circuit has closed."""
    breaker = make(fail_max=1)
    before = int(time.time())
    fail(breaker)
    opened_at = breaker._state_storage.opened_at
    assert opened_at is not None
    assert before <= opened_at.timestamp() <= time.time()
    assert str(opened_at.tzinfo) == "UTC"
    breaker.close()
    assert breaker._state_storage.opened_at is None


def test_state_in_another_process(client: redis.Redis) -> None:
    """Its change is noticed with the next call; the first look at Redis is none."""
    other = Native("test", redis=client)
    other.force_open()
    breaker = CircuitBreaker(
        state_storage=CircuitRedisStorage(STATE_CLOSED, client, "test"), listeners=[states := States()]
    )
    with pytest.raises(CircuitBreakerError):
        breaker.call(int)
    assert states.seen == []
    other.reset()
    assert wait_until(lambda: not_rejected(breaker))
    assert states.seen == [(STATE_OPEN, STATE_CLOSED)]


def test_a_native_breaker_shares_the_circuit(client: redis.Redis) -> None:
    """A breaker of this package has the namespace for its name."""
    breaker = CircuitBreaker(fail_max=2, state_storage=CircuitRedisStorage(STATE_CLOSED, client, "test"))
    fail(breaker, 2)
    assert Native("test", redis=client).snapshot().state == "open"
    assert client.keys("*state") == [b"circuit_breaker:test:state"]


def test_a_trip_calls_no_method() -> None:
    """A subclass learns of transitions by a listener, not by overriding open()."""

    class Own(CircuitBreaker):
        def open(self) -> bool:
            raise AssertionError

    breaker = Own(fail_max=1)
    fail(breaker)
    assert breaker.current_state == STATE_OPEN


def test_foreign_storages_and_wrong_values() -> None:
    """They get a clear error."""

    class Own(type(CircuitMemoryStorage(STATE_CLOSED)).__mro__[1]):  # type: ignore[misc]
        pass

    wrong: list[Callable[[], Any]] = [
        lambda: CircuitBreaker(state_storage=Own("own")),
        lambda: CircuitBreaker(state_storage="redis"),  # type: ignore[arg-type]
        lambda: CircuitBreaker(fail_max=0),
        lambda: CircuitBreaker(reset_timeout=-1),
        lambda: CircuitMemoryStorage("half_open"),
        lambda: setattr(CircuitBreaker(), "fail_max", None),
    ]
    for act in wrong:
        with pytest.raises(PolicyError):
            act()
    with pytest.raises(PolicyError, match="fail_max must be an integer"):
        CircuitBreaker(fail_max=0)
    with pytest.raises(TypeError, match="call_async"):
        CircuitBreaker()(other=True)


def test_a_wrong_setting_changes_nothing() -> None:
    """The limits from before stay in force."""
    breaker = CircuitBreaker(fail_max=2)
    with pytest.raises(PolicyError):
        breaker.fail_max = -1
    assert breaker.fail_max == 2
    fail(breaker, 2)
    assert breaker.current_state == STATE_OPEN


def test_one_tree_of_errors() -> None:
    """Code that catches the errors of this package catches these."""
    assert issubclass(CircuitBreakerError, AnyError)


# Redis -------------------------------------------------------------------------------------------


def test_the_name_is_the_key_without_a_namespace(client: redis.Redis) -> None:
    """Two breakers without a namespace have one circuit each."""
    one, other = (
        CircuitBreaker(fail_max=1, name=name, state_storage=CircuitRedisStorage(STATE_CLOSED, client))
        for name in ("one", "other")
    )
    fail(one)
    assert (one.current_state, other.current_state) == (STATE_OPEN, STATE_CLOSED)


def test_one_storage_without_a_namespace(client: redis.Redis) -> None:
    """Each breaker has its own key, and begins as the storage says."""
    storage = CircuitRedisStorage(STATE_OPEN, client)
    for name in ("one", "other"):
        breaker = CircuitBreaker(name=name, state_storage=storage)
        assert breaker.current_state == STATE_OPEN
        breaker.close()


def test_neither_namespace_nor_name(client: redis.Redis) -> None:
    """One key for everybody is refused, with the reason: in pybreaker, one dead service stops another's calls."""
    with pytest.raises(PolicyError, match="would share one key"):
        CircuitBreaker(state_storage=CircuitRedisStorage(STATE_CLOSED, client))
    with pytest.raises(PolicyError, match="would share one key"):
        _ = CircuitRedisStorage(STATE_CLOSED, client).state
    shared = [
        pybreaker.CircuitBreaker(fail_max=1, state_storage=pybreaker.CircuitRedisStorage(STATE_CLOSED, client))
        for _ in range(2)
    ]
    with pytest.raises(pybreaker.CircuitBreakerError):
        shared[0].call(boom)
    with pytest.raises(pybreaker.CircuitBreakerError):
        shared[1].call(int)


def test_construction_asks_nothing(own_server: EmbeddedServer) -> None:
    """A breaker is made while Redis is down."""
    client = redis.Redis.from_url(own_server.url)
    own_server.stop()
    breaker = CircuitBreaker(state_storage=CircuitRedisStorage(STATE_CLOSED, client, "test"))
    assert breaker.call(lambda: "fine") == "fine"


@pytest.mark.parametrize(("fallback", "admits"), [(STATE_CLOSED, True), (STATE_OPEN, False)])
def test_while_redis_is_down(own_server: EmbeddedServer, fallback: str, admits: bool) -> None:
    """The fallback state decides; an operator's act raises, and nothing is done."""
    client = redis.Redis.from_url(own_server.url)
    storage = CircuitRedisStorage(STATE_CLOSED, client, "test", fallback, lease=0)
    breaker = CircuitBreaker(fail_max=2, state_storage=storage)
    breaker.call(int)
    own_server.stop()
    fail(breaker, 3)
    assert not_rejected(breaker) == admits
    assert breaker.current_state == fallback
    for act in (breaker.open, breaker.half_open, breaker.close):
        with pytest.raises(RedisUnavailableError):
            act()


def test_no_other_fallback(client: redis.Redis) -> None:
    """Half-open is refused, since the server counts the trial calls."""
    with pytest.raises(PolicyError, match="fallback_circuit_state"):
        CircuitRedisStorage(STATE_CLOSED, client, "test", STATE_HALF_OPEN)


def test_a_second_breaker_of_a_storage_in_memory_finds_what_is_there() -> None:
    """A state that was stored once does not come back when another breaker is made."""
    storage = CircuitMemoryStorage(STATE_CLOSED)
    first = CircuitBreaker(fail_max=1, reset_timeout=60, state_storage=storage)
    for state in (STATE_OPEN, STATE_CLOSED):
        storage.state = state
    assert first.call(str) == ""
    with pytest.raises(CircuitBreakerError):
        first.call(boom)
    assert CircuitBreaker(state_storage=storage).current_state == STATE_OPEN
    assert first.current_state == STATE_OPEN


def test_a_call_that_runs_while_a_state_is_stored_does_not_count() -> None:
    """Each state that is stored in memory begins a generation of its own, also within one moment."""
    storage = CircuitMemoryStorage(STATE_CLOSED)
    breaker = CircuitBreaker(fail_max=1, reset_timeout=60, state_storage=storage)

    def stores() -> None:
        for _ in range(10):
            storage.state = STATE_CLOSED
        raise Boom

    with pytest.raises(Boom):
        breaker.call(stores)
    assert (breaker.current_state, breaker.fail_counter) == (STATE_CLOSED, 0)


def test_a_lost_state_is_closed(client: redis.Redis) -> None:
    """Whatever the fallback state is."""
    storage = CircuitRedisStorage(STATE_CLOSED, client, "test", STATE_OPEN)
    breaker = CircuitBreaker(fail_max=1, state_storage=storage)
    fail(breaker)
    client.flushall()
    assert breaker.current_state == STATE_CLOSED


def test_no_fake_clients() -> None:
    """The breaker has connections of its own, so that there must be a server."""
    with pytest.raises(PolicyError, match="EmbeddedServer"):
        CircuitRedisStorage(STATE_CLOSED, fakeredis.FakeStrictRedis(), "test")


def test_asyncio_clients_are_made_from_the_blocking_one(cluster_url: str, server: EmbeddedServer) -> None:
    """Coroutine functions reach the same server through a socket, TCP with a password, and a cluster."""
    host, _, port = cluster_url.rpartition("/")[2].partition(":")
    with EmbeddedServer(port=0, args=("--requirepass", "secret")) as guarded:
        for client in (
            redis.Redis.from_url(server.url, decode_responses=True, health_check_interval=1),
            redis.Redis(port=int(guarded.url.rpartition(":")[2]), password="secret", db=2),
            redis.RedisCluster(host=host, port=int(port)),
        ):
            client.flushall()
            storage = CircuitRedisStorage(STATE_CLOSED, client, "asyncio", cluster_mode=True)
            breaker = CircuitBreaker(fail_max=2, state_storage=storage)
            asyncio.run(trip(breaker))
            assert isinstance(breaker._shells.asyncio, AsyncCircuitBreaker)
            assert Native("asyncio", redis=client).snapshot().state == "open"
            client.close()


async def trip(breaker: CircuitBreaker) -> None:
    for _ in range(breaker.fail_max):
        with pytest.raises((Boom, CircuitBreakerError)):
            await breaker.call_async(aboom)


def test_a_master_under_sentinel() -> None:
    """Coroutine functions find the master that the sentinels name."""
    with sentinels() as formed:
        client = formed.client()
        breaker = CircuitBreaker(fail_max=2, state_storage=CircuitRedisStorage(STATE_CLOSED, client, "asyncio"))
        asyncio.run(trip(breaker))
        assert Native("asyncio", redis=client, redis_timeout=10).snapshot().state == "open"


def test_a_client_that_has_no_counterpart(client: redis.Redis) -> None:
    """Connections of one's own class serve functions; for coroutine functions, the error says what to pass."""

    class Own(redis.UnixDomainSocketConnection):
        pass

    pool = redis.ConnectionPool(connection_class=Own, **client.connection_pool.connection_kwargs)
    storage = CircuitRedisStorage(STATE_CLOSED, redis.Redis(connection_pool=pool), "test")
    breaker = CircuitBreaker(state_storage=storage)
    assert breaker.call(lambda: "fine") == "fine"
    with pytest.raises(PolicyError, match="URL"):
        asyncio.run(breaker.call_async(afine))


def test_initial_state_on_redis(client: redis.Redis) -> None:
    """It is stored only where nothing is."""
    opened = CircuitBreaker(state_storage=CircuitRedisStorage(STATE_OPEN, client, "test"))
    assert opened.current_state == STATE_OPEN
    assert opened.call(lambda: "a trial call") == "a trial call"
    again = CircuitBreaker(state_storage=CircuitRedisStorage(STATE_OPEN, client, "test"))
    assert again.current_state == STATE_CLOSED


# Taking over what pybreaker left -----------------------------------------------------------------


def theirs(client: redis.Redis, namespace: str | None = "test", **options: Any) -> pybreaker.CircuitBreaker:
    """A breaker of pybreaker."""
    storage = pybreaker.CircuitRedisStorage(STATE_CLOSED, client, namespace=namespace)
    return pybreaker.CircuitBreaker(**{"fail_max": 3, "state_storage": storage, **options})


def leave_open(breaker: pybreaker.CircuitBreaker) -> None:
    """Let pybreaker trip."""
    for _ in range(breaker.fail_max):
        with pytest.raises((Boom, pybreaker.CircuitBreakerError)):
            breaker.call(boom)
    assert breaker.current_state == STATE_OPEN


def adopted(client: redis.Redis, namespace: str | None = "test", **options: Any) -> CircuitBreaker:
    """A breaker that takes over."""
    storage = CircuitRedisStorage(STATE_CLOSED, client, namespace, adopt=True)
    return CircuitBreaker(**{"fail_max": 3, "state_storage": storage, **options})


@pytest.mark.parametrize("namespace", ["test", None])
def test_an_open_circuit_is_taken_over(client: redis.Redis, namespace: str | None) -> None:
    """It stays open for the rest of its time, with its counts; pybreaker's own keys stay as they are."""
    old = theirs(client, namespace, reset_timeout=60)
    leave_open(old)
    breaker = adopted(client, namespace, name="test", reset_timeout=60, listeners=[states := States()])
    assert (breaker.current_state, breaker.fail_counter) == (STATE_OPEN, 3)
    with pytest.raises(CircuitBreakerError) as caught:
        breaker.call(pytest.fail)
    assert isinstance(caught.value.__cause__, CircuitOpenError)
    assert 30 < caught.value.__cause__.retry_after <= 60
    assert states.seen == []
    assert old.current_state == STATE_OPEN


def test_its_trial_call(client: redis.Redis) -> None:
    """When its time is over, one trial call decides."""
    leave_open(theirs(client))
    breaker = adopted(client, reset_timeout=0.001)
    assert breaker.current_state == STATE_OPEN
    assert wait_until(lambda: not_rejected(breaker))
    assert breaker.current_state == STATE_CLOSED


def test_a_half_open_circuit_is_taken_over(client: redis.Redis) -> None:
    """With the trial calls that have succeeded."""
    old = theirs(client, success_threshold=3)
    leave_open(old)
    old.half_open()
    old.call(int)
    breaker = adopted(client, success_threshold=3)
    assert (breaker.current_state, breaker.success_counter) == (STATE_HALF_OPEN, 1)
    breaker.call(int)
    breaker.call(int)
    assert breaker.current_state == STATE_CLOSED


def test_taken_over_once(client: redis.Redis) -> None:
    """A later process finds what ours have stored, and not what pybreaker left."""
    leave_open(theirs(client))
    adopted(client).close()
    assert adopted(client).current_state == STATE_CLOSED


def test_what_is_not_taken_over(client: redis.Redis) -> None:
    """A closed circuit, one that opened longer ago than a state is kept, and anything without adopt=True."""
    old = theirs(client)
    assert adopted(client).current_state == STATE_CLOSED
    leave_open(old)
    client.set("test:pybreaker:opened_at", int(time.time()) - 3601)
    assert adopted(client).current_state == STATE_CLOSED
    client.set("test:pybreaker:opened_at", int(time.time()))
    assert client.keys("circuit_breaker:*") == []
    plain = CircuitBreaker(state_storage=CircuitRedisStorage(STATE_CLOSED, client, "test"))
    assert plain.current_state == STATE_CLOSED


def test_the_rest_of_its_life(client: redis.Redis) -> None:
    """A state that nobody uses expires an hour after pybreaker opened the circuit."""
    leave_open(theirs(client))
    client.set("test:pybreaker:opened_at", int(time.time()) - 3000)
    breaker = adopted(client)
    assert 500 < client.ttl("circuit_breaker:test:state") <= 601
    stored = json.loads(client.get("circuit_breaker:test:state") or "")
    assert (stored["state"], stored["failure_count"]) == ("open", 3)
    assert breaker.call(lambda: "a trial call") == "a trial call"


def test_nothing_to_take_over_from(
    client: redis.Redis, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Values that are no numbers, and a Redis that is down, are logged; the breaker begins closed."""
    leave_open(theirs(client))
    client.set("test:pybreaker:fail_counter", "many")
    with caplog.at_level(logging.WARNING):
        assert adopted(client).current_state == STATE_CLOSED
    assert "its first state was not stored" in caplog.text
    caplog.clear()
    down = redis.Redis.from_url(own_server.url)
    own_server.stop()
    assert adopted(down).call(lambda: "fine") == "fine"
    assert "its first state was not stored" in caplog.text
