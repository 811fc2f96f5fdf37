"""What an operator set for a time is kept until its end, and ends then, whether Redis answers or not."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from conftest import stopped, wait_until
from timed_calls import LASTING, Boom, admits, boom, elsewhere, fine

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError
from pybreaker_redis._view import View
from pybreaker_redis.embedded import EmbeddedServer

Make = Callable[..., Any]
LENGTH = 2.0  # seconds for which something is set
MUCH_LATER = 10.0  # seconds after its end by which even a slow machine has noticed


class OnLoop:
    """An AsyncCircuitBreaker, used from outside of its loop, which runs as long as a call lasts."""

    def __init__(self, core: AsyncCircuitBreaker, runner: asyncio.Runner) -> None:
        self.core, self._runner = core, runner

    def call(self, func: Callable[[], Any]) -> Any:
        async def awaited() -> Any:
            return func()

        return self._run(self.core.call, awaited)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.core, name)
        return functools.partial(self._run, found) if callable(found) else found

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        async def awaited() -> Any:
            result = method(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return self._runner.run(awaited())


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest, own_server: EmbeddedServer) -> Iterator[Make]:
    """Makes breakers of a server that the test may hurt; the asyncio one looks like the other."""
    options: dict[str, Any] = {"redis": own_server.url, "policy": LASTING, "redis_timeout": 2.0}
    if request.param == "sync":
        yield lambda **given: CircuitBreaker("discovery", **options, **given)
        return
    with asyncio.Runner() as runner:
        yield lambda **given: OnLoop(AsyncCircuitBreaker("discovery", **options, **given), runner)


def fail(breaker: Any) -> None:
    """One failed call."""
    with pytest.raises(Boom):
        breaker.call(boom)


def view_of(breaker: Any) -> View:
    """The view of a breaker of either sort."""
    view: View = getattr(breaker, "core", breaker)._view
    return view


def back(breaker: Any) -> bool:
    """Whether Redis is the source again."""
    return bool(breaker.snapshot().source == "redis")


def check_ends(began: float, length: float, holds: Callable[[], bool], pause: float = 0.01) -> None:
    """What began no earlier than then holds for this length, and no more soon after."""
    while holds():
        assert time.monotonic() < began + length + MUCH_LATER, "it does not end"
        time.sleep(pause)
    assert time.monotonic() >= began + length - 0.001, "it ended too early"  # ends are kept in whole milliseconds


# Redis dies


@pytest.mark.parametrize("lease", [0.1, 0])
@pytest.mark.parametrize("mode", ["local", "open"])
def test_shadow_mode_ends_without_redis(make: Make, own_server: EmbeddedServer, mode: str, lease: float) -> None:
    """Shadow mode with an end admits calls until then, and none after it."""
    breaker = make(on_redis_failure=mode, lease=lease)
    fail(breaker)
    assert not admits(breaker)
    began = time.monotonic()
    breaker.set_policy(enforce=False, duration=LENGTH)
    assert admits(breaker)
    own_server.stop()
    check_ends(began, LENGTH, lambda: admits(breaker))


def test_a_policy_override_ends_without_redis(make: Make, own_server: EmbeddedServer) -> None:
    """A threshold with an end is that of the local engine until then, and is shown until then."""
    breaker = make()
    began = time.monotonic()
    breaker.set_policy(failure_threshold=10**6, duration=LENGTH)
    assert admits(breaker)
    own_server.stop()

    def tolerates() -> bool:
        admitted = [admits(breaker, boom), admits(breaker)]
        return admitted == [True, True]

    check_ends(began, LENGTH, tolerates)
    seen = breaker.snapshot()
    assert (seen.source, seen.state, seen.policy) == ("local", "open", LASTING)
    assert "override" not in seen.policy_sources.values()


@pytest.mark.parametrize("lease", [0.1, 0])
def test_forced_closed_ends_without_redis(make: Make, own_server: EmbeddedServer, lease: float) -> None:
    """A circuit that is forced closed counts no failure until the end, also without Redis; after it, it does."""
    breaker = make(lease=lease)
    began = time.monotonic()
    breaker.force_closed(LENGTH)
    own_server.stop()

    def tolerates() -> bool:
        admitted = [admits(breaker, boom), admits(breaker)]
        return admitted == [True, True]

    check_ends(began, LENGTH, tolerates)
    assert breaker.state == "open"


def test_forced_closed_by_another_process_is_kept(make: Make, own_server: EmbeddedServer) -> None:
    """A process that has only read that the circuit is forced closed keeps to it, and shows it, without Redis."""
    breaker = make()
    admits(breaker)
    operator = elsewhere(own_server)
    operator.force_closed(60)
    until = operator.snapshot().forced_until
    assert until is not None
    wait_until(lambda: admits(breaker) and view_of(breaker).seen.forced == "closed")
    own_server.stop()
    for _ in range(20):
        fail(breaker)
    seen = breaker.snapshot()
    assert (seen.source, seen.state, seen.forced) == ("local", "closed", "closed")
    assert abs(seen.forced_until - until) < 5  # by two clocks of one machine


def test_forced_open_ends_without_redis(make: Make, own_server: EmbeddedServer) -> None:
    """A circuit that is forced open rejects until the end, says until when, and probes after it."""
    breaker = make()
    began = time.monotonic()
    breaker.force_open(LENGTH)
    own_server.stop()
    assert not admits(breaker)
    seen = breaker.snapshot()
    assert (seen.source, seen.state, seen.forced) == ("local", "open", "open")
    assert 0 < seen.retry_after <= LENGTH
    check_ends(began, LENGTH, lambda: not admits(breaker))
    assert breaker.state == "closed"  # the probe succeeded
    assert breaker.snapshot().forced is None


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_forced_states_yield_to_a_fixed_mode(make: Make, own_server: EmbeddedServer, mode: str) -> None:
    """With on_redis_failure="open" every call is rejected while Redis is down, with "closed" every call admitted."""
    breaker = make(on_redis_failure=mode)
    breaker.force_open(60) if mode == "closed" else breaker.force_closed(60)
    assert admits(breaker) is (mode == "open")
    own_server.stop()
    wait_until(lambda: admits(breaker) is (mode == "closed"))
    assert [admits(breaker) for _ in range(20)] == [mode == "closed"] * 20


def test_a_breaker_that_nobody_called_meanwhile(make: Make, own_server: EmbeddedServer) -> None:
    """The first call after the end obeys it, although nothing ran in between, and nothing told this process."""
    breaker = make()
    fail(breaker)
    breaker.set_policy(enforce=False, duration=LENGTH)
    assert admits(breaker)
    own_server.stop()
    time.sleep(LENGTH + 0.1)
    assert not admits(breaker)
    assert breaker.snapshot().policy_sources["enforce"] == "default"


def test_the_snapshot_obeys_the_end(make: Make, own_server: EmbeddedServer) -> None:
    """A snapshot in an outage shows what holds at that moment, also without any call."""
    breaker = make()
    breaker.force_closed(LENGTH)
    began = time.monotonic()
    breaker.set_policy(quorum=3, duration=LENGTH)
    own_server.stop()
    check_ends(began - 1, LENGTH, lambda: breaker.snapshot().forced == "closed")
    wait_until(lambda: breaker.snapshot().policy_sources["quorum"] == "default")
    assert breaker.snapshot().source == "local"


def test_cleared_before_redis_dies(make: Make, own_server: EmbeddedServer) -> None:
    """A forced state that this process has cleared is not taken up again when Redis dies before the next call."""
    breaker = make()
    breaker.force_open(3600)
    breaker.clear_forced()
    own_server.stop()
    assert admits(breaker)
    assert breaker.snapshot().forced is None


# Redis comes back


def test_nothing_is_revived_when_redis_comes_back(make: Make, own_server: EmbeddedServer) -> None:
    """What ended while Redis was away has ended: no call after its return obeys it again."""
    breaker = make()
    fail(breaker)
    breaker.set_policy(enforce=False, duration=LENGTH)
    assert admits(breaker)
    with stopped(own_server):
        wait_until(lambda: not admits(breaker))
    wait_until(lambda: back(breaker))
    for _ in range(30):
        assert not admits(breaker)
        time.sleep(0.01)
    assert breaker.snapshot().policy == LASTING


def test_what_has_not_ended_holds_when_redis_comes_back(make: Make, own_server: EmbeddedServer) -> None:
    """A policy override and a forced state outlast an outage that is shorter."""
    breaker = make()
    breaker.force_closed(3600)
    breaker.set_policy(minimum_calls=7, duration=3600)
    admits(breaker)
    with stopped(own_server):
        for _ in range(10):
            fail(breaker)
    wait_until(lambda: back(breaker))
    for _ in range(10):
        fail(breaker)
    seen = breaker.snapshot()
    assert (seen.forced, seen.policy.minimum_calls) == ("closed", 7)


# Another process changes it


@pytest.mark.parametrize(("first", "second"), [(LENGTH, 3600), (3600, LENGTH)])
def test_the_same_policy_with_another_end(make: Make, own_server: EmbeddedServer, first: float, second: float) -> None:
    """Another process sets the same policy override again with another end: that end holds, also without Redis."""
    breaker, operator = make(), elsewhere(own_server)
    fail(breaker)
    operator.set_policy(enforce=False, duration=first)
    wait_until(lambda: admits(breaker))
    began = time.monotonic()
    operator.set_policy(enforce=False, duration=second)
    for _ in range(20):  # several leases
        assert admits(breaker)
        time.sleep(0.02)
    own_server.stop()
    if second == LENGTH:
        check_ends(began, LENGTH, lambda: admits(breaker))
        return
    while time.monotonic() < began + LENGTH + 0.5:
        assert admits(breaker)
        time.sleep(0.02)


def test_the_same_policy_again_after_it_was_cleared(make: Make, own_server: EmbeddedServer) -> None:
    """A policy override is set, cleared and set again with the same text: it is in force again."""
    breaker, operator = make(), elsewhere(own_server)
    admits(breaker)
    operator.set_policy(failure_threshold=77)
    wait_until(lambda: admits(breaker) and view_of(breaker).policy.failure_threshold == 77)
    operator.clear_policy()
    breaker.set_policy(minimum_calls=9)  # its reply, not a refresh, says that the other one is gone
    operator.clear_policy()
    operator.set_policy(failure_threshold=77)
    wait_until(lambda: admits(breaker) and view_of(breaker).policy.failure_threshold == 77, timeout=5)


def test_a_late_reply_revives_nothing(own_server: EmbeddedServer) -> None:
    """A reply that was sent before a policy override was cleared, and arrives after that was read, changes nothing."""
    breaker, operator = (
        CircuitBreaker("discovery", redis=own_server.url, policy=LASTING, redis_timeout=2.0),
        elsewhere(own_server),
    )
    breaker.set_policy(enforce=False)
    breaker.call(fine)
    sent = time.monotonic()
    late = breaker._redis.run("record", breaker._key, dict(breaker._with_policy))
    operator.clear_policy()
    wait_until(lambda: breaker.call(fine) and breaker._override is None)
    breaker._adopt_fleet({}, {**late, "source": "redis"}, sent)
    assert breaker._view.policy.enforce


# With Redis, watched


@pytest.fixture
def noise(own_server: EmbeddedServer) -> Iterator[None]:
    """Messages about the breaker, all the time."""
    ended = threading.Event()

    def publish() -> None:
        with redis.Redis.from_url(own_server.url) as client:
            while not ended.wait(0.02):
                client.publish("circuit_breaker:discovery:state", "{}")

    thread = threading.Thread(target=publish)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("lease", [0.1, 600.0])
def test_shadow_mode_ends_while_watched(own_server: EmbeddedServer, lease: float) -> None:
    """A watching process obeys the end, whatever messages come, and whatever its lease."""
    breaker = CircuitBreaker("discovery", redis=own_server.url, policy=LASTING, lease=lease, redis_timeout=2.0)
    with breaker.watch():
        fail(breaker)
        began = time.monotonic()
        elsewhere(own_server).set_policy(enforce=False, duration=LENGTH)
        wait_until(lambda: admits(breaker))
        check_ends(began, LENGTH, lambda: admits(breaker))


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("lease", [0.1, 600.0])
def test_forced_states_end_while_watched(own_server: EmbeddedServer, lease: float) -> None:
    """The same for forced states: failures count, and a probe may run, from the end on."""
    breaker = CircuitBreaker("discovery", redis=own_server.url, policy=LASTING, lease=lease, redis_timeout=2.0)
    operator = elsewhere(own_server)
    with breaker.watch() as watch:
        wait_until(lambda: watch.active)
        admits(breaker)
        began = time.monotonic()
        operator.force_open(LENGTH)
        wait_until(lambda: not admits(breaker))
        check_ends(began, LENGTH, lambda: not admits(breaker))
        began = time.monotonic()
        operator.force_closed(LENGTH)
        wait_until(lambda: breaker._view.seen.forced == "closed")
        check_ends(began, LENGTH, lambda: admits(breaker, boom) and admits(breaker))


@pytest.mark.usefixtures("noise")
def test_shadow_mode_ends_while_watched_on_asyncio(own_server: EmbeddedServer) -> None:
    """The same on asyncio."""

    async def admitted(breaker: AsyncCircuitBreaker) -> bool:
        try:
            await breaker.call(asyncio.sleep, 0)
        except CircuitOpenError:
            return False
        return True

    async def main() -> None:
        breaker = AsyncCircuitBreaker("discovery", redis=own_server.url, policy=LASTING, redis_timeout=2.0)
        async with await breaker.watch():
            await breaker.force_open(3600)
            began = time.monotonic()
            await asyncio.to_thread(elsewhere(own_server).set_policy, enforce=False, duration=LENGTH)
            while not await admitted(breaker):
                await asyncio.sleep(0.01)
            while await admitted(breaker):
                assert time.monotonic() < began + LENGTH + MUCH_LATER
                await asyncio.sleep(0.01)
            assert time.monotonic() >= began + LENGTH

    asyncio.run(asyncio.wait_for(main(), 60))


# In memory


def test_ends_in_memory() -> None:
    """Without Redis at all, what was set for a time is kept until its end, and ends then."""
    breaker = CircuitBreaker("discovery", policy=LASTING)
    began = time.monotonic()
    breaker.force_closed(LENGTH)
    breaker.set_policy(quorum=1, enforce=False, duration=2 * LENGTH)
    assert breaker.snapshot().forced == "closed"
    check_ends(began, LENGTH, lambda: admits(breaker, boom) and breaker.state == "closed")
    check_ends(began, 2 * LENGTH, lambda: admits(breaker))
    assert breaker.snapshot().policy == LASTING
