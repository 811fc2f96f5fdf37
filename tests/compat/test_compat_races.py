"""Threads, processes and forks meet in the modules that take other libraries' place. See tests/races/README.md."""

from __future__ import annotations

import multiprocessing
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from conftest import wait_until_freed

from pybreaker_redis.compat import circuitbreaker, pybreaker
from pybreaker_redis.embedded import EmbeddedServer

MANY = 16


class Boom(Exception):
    """A failure."""


def boom() -> None:
    """A call that fails."""
    raise Boom


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest, client: redis.Redis) -> Any:
    """A storage of either kind."""
    if request.param == "memory":
        return pybreaker.CircuitMemoryStorage("closed")
    return pybreaker.CircuitRedisStorage("closed", client, "race")


@pytest.fixture
def unconfigured() -> Iterator[None]:
    """circuitbreaker's place in memory, before and after."""
    circuitbreaker.configure()
    yield
    circuitbreaker.configure()


def at_once(act: Callable[[int], Any]) -> list[Any]:
    """What the act gives in each of many threads, which begin together."""
    barrier = threading.Barrier(MANY, timeout=20)

    def run(number: int) -> Any:
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(MANY) as pool:
        return list(pool.map(run, range(MANY)))


def failed(call: Callable[[], Any]) -> str:
    """The name of what a call raises."""
    with pytest.raises((Boom, pybreaker.CircuitBreakerError, circuitbreaker.CircuitBreakerError)) as caught:
        call()
    return caught.type.__name__


def test_one_notice_of_a_trip(storage: Any) -> None:
    """Many threads fail at once, and each may notice the trip: the listeners hear of it once."""
    heard: list[tuple[str, str]] = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            heard.append((old_state.name, new_state.name))

    breaker = pybreaker.CircuitBreaker(fail_max=MANY, state_storage=storage, listeners=[Listener()])
    breaker.call(int)
    names = at_once(lambda _: failed(lambda: breaker.call(boom)))
    assert "CircuitBreakerError" in names
    assert heard == [("closed", "open")]
    assert breaker.fail_counter == MANY


def test_limits_change_while_calls_fail(storage: Any) -> None:
    """No failure is lost, whichever limits were in force when its call began."""
    breaker = pybreaker.CircuitBreaker(fail_max=1000, state_storage=storage)

    def act(number: int) -> None:
        for turn in range(5):
            if number == 0:
                breaker.fail_max = 1000 + turn
            failed(lambda: breaker.call(boom))

    at_once(act)
    assert breaker.fail_counter == 5 * MANY


def test_listeners_are_added_by_many_threads(storage: Any) -> None:
    """None is lost."""
    breaker = pybreaker.CircuitBreaker(state_storage=storage)
    at_once(lambda _: breaker.add_listener(pybreaker.CircuitBreakerListener()))
    assert len(breaker.listeners) == MANY


def test_many_processes_take_over_at_once(server: EmbeddedServer, client: redis.Redis) -> None:
    """All find the circuit open, and none undoes what another one has stored since."""
    client.mset({"race:pybreaker:state": "open", "race:pybreaker:opened_at": int(client.time()[0])})

    def act(number: int) -> str:
        own = redis.Redis.from_url(server.url)  # as a process has
        storage = pybreaker.CircuitRedisStorage("closed", own, "race", adopt=True)
        breaker = pybreaker.CircuitBreaker(state_storage=storage)
        state = breaker.current_state
        if number == 0:
            breaker.close()
        return state

    states = at_once(act)
    assert states[0] == "open"
    assert set(states) <= {"open", "closed"}
    storage = pybreaker.CircuitRedisStorage("closed", client, "race", adopt=True)
    assert pybreaker.CircuitBreaker(state_storage=storage).current_state == "closed"


@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize("place", ["memory", "redis"])
def test_first_calls_share_one_breaker(place: str, client: redis.Redis) -> None:
    """The breaker beneath a decorated function is made at the first call: many first calls make one."""
    if place == "redis":
        circuitbreaker.configure(client)
    breaker = circuitbreaker.CircuitBreaker(MANY, name="race")
    guarded = breaker(boom)
    at_once(lambda _: failed(guarded))
    assert breaker.opened
    assert breaker.failure_count == MANY


def test_a_fork_while_a_listener_runs(storage: Any) -> None:
    """The child does not wait for the lock that a thread of its parent holds."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(pybreaker.CircuitBreakerListener):
        def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
            if args:
                inside.set()
                go_on.wait(20)

    breaker = pybreaker.CircuitBreaker(state_storage=storage, listeners=[Slow()])
    thread = threading.Thread(target=breaker.call, args=(int, 1))
    thread.start()
    assert inside.wait(20)
    child = multiprocessing.get_context("fork").Process(target=breaker.call, args=(int,))
    child.start()
    child.join(20)
    code = child.exitcode
    child.kill()
    go_on.set()
    thread.join(20)
    assert code == 0


def test_a_fork_of_shared_state() -> None:
    """What a child counts is not lost when another object of the same state is first used in the child."""
    storage = pybreaker.CircuitMemoryStorage("closed")
    one, other = (pybreaker.CircuitBreaker(state_storage=storage) for _ in range(2))
    for breaker in (one, other):
        breaker.call(int)

    def child() -> None:
        failed(lambda: one.call(boom))
        one.call(int)
        assert (other.call(int), storage.state, one.fail_counter, other.fail_counter) == (0, "closed", 0, 0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0


def test_breakers_that_nobody_holds_are_freed(storage: Any) -> None:
    """Neither the engine beneath nor the link keeps them, beyond an exchange that is under way."""
    breaker = pybreaker.CircuitBreaker(state_storage=storage, listeners=[pybreaker.CircuitBreakerListener()])
    breaker.call(int)
    gone = weakref.ref(breaker)
    del breaker
    wait_until_freed(gone, timeout=5)  # less than the time after which the link forgets an idle breaker
