"""Clocks that a test freezes, moves or turns back: no decision outlasts its own length because of them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import time_machine
from conftest import stopped, wait_until
from freezegun import freeze_time
from timed_calls import LASTING, Boom, admits, boom, elsewhere, fine

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis.embedded import EmbeddedServer

DATES = ["2068-02-29", "2012-01-14", "1950-06-01"]  # freezegun makes a monotonic clock of each date
QUICK = Policy(failure_threshold=1, reset_timeout=0.2)

frozen = pytest.mark.parametrize("date", DATES)


@pytest.fixture(params=["redis", "memory"])
def make(request: pytest.FixtureRequest, own_server: EmbeddedServer) -> Callable[..., CircuitBreaker]:
    """Makes breakers on Redis or in memory."""
    url = own_server.url if request.param == "redis" else None
    return functools.partial(CircuitBreaker, "discovery", redis=url)


@pytest.fixture
def on_redis(own_server: EmbeddedServer) -> Callable[..., CircuitBreaker]:
    """Makes breakers on Redis."""
    return functools.partial(CircuitBreaker, "discovery", redis=own_server.url)


# Used after a freeze


@frozen
@pytest.mark.parametrize("lease", [0.1, 0])
def test_tripped_in_a_freeze(make: Callable[..., CircuitBreaker], date: str, lease: float) -> None:
    """A breaker that tripped while the clock was frozen probes soon after, and closes."""
    breaker = make(policy=QUICK, lease=lease)
    with freeze_time(date):
        admits(breaker, boom)
        assert not admits(breaker)
    wait_until(lambda: admits(breaker))
    assert breaker.state == "closed"


@frozen
def test_tripped_before_and_asked_in_a_freeze(make: Callable[..., CircuitBreaker], date: str) -> None:
    """A circuit that opened before the clock was frozen, and was asked meanwhile, closes soon after."""
    breaker = make(policy=QUICK)
    admits(breaker, boom)
    with freeze_time(date):
        admits(breaker, boom)
        admits(breaker)
    wait_until(lambda: admits(breaker) and breaker.state == "closed")


@frozen
def test_the_state_after_a_freeze(on_redis: Callable[..., CircuitBreaker], date: str) -> None:
    """An open circuit that was read in the future is not shown as open for decades."""
    breaker = on_redis(policy=QUICK)
    with freeze_time(date):
        admits(breaker, boom)
        assert breaker.state == "open"
    assert breaker.state == "half_open"


@frozen
def test_a_view_from_the_future_is_stale(
    on_redis: Callable[..., CircuitBreaker], own_server: EmbeddedServer, date: str
) -> None:
    """A process that was last called in a freeze learns of a trip that came meanwhile."""
    breaker = on_redis(policy=LASTING)
    with freeze_time(date):
        for _ in range(5):
            admits(breaker)
            breaker.flush()
    admits(elsewhere(own_server), boom)
    wait_until(lambda: not admits(breaker))


@frozen
def test_a_view_is_refreshed_after_a_freeze(
    on_redis: Callable[..., CircuitBreaker], own_server: EmbeddedServer, date: str
) -> None:
    """Refreshes go on: the operator's acts are read, one after the other, and so is a dropped view."""
    breaker, operator = on_redis(policy=LASTING), elsewhere(own_server)
    with freeze_time(date):
        admits(breaker)
        breaker.clear_policy()  # drops the view, for replies to earlier requests
        admits(breaker)
    for _ in range(3):
        operator.force_open()
        wait_until(lambda: not admits(breaker))
        operator.reset()
        wait_until(lambda: admits(breaker))


@frozen
def test_windows_are_reported_after_a_freeze(
    on_redis: Callable[..., CircuitBreaker], own_server: EmbeddedServer, date: str
) -> None:
    """Successes reach a window in Redis, although the last report came from the future."""
    policy = Policy(error_rate_threshold=0.5, minimum_calls=10**6, window=3)
    breaker = on_redis(policy=policy)
    with freeze_time(date) as clock:
        for _ in range(5):
            admits(breaker)
            clock.tick(1)
    before = breaker._view._reported_at
    wait_until(lambda: admits(breaker) and breaker._view._reported_at != before)
    wait_until(lambda: admits(breaker) and elsewhere(own_server, policy).snapshot().calls > 0)


@frozen
def test_an_alert_process_reports_after_a_freeze(on_redis: Callable[..., CircuitBreaker], date: str) -> None:
    """While failures are near the threshold, a process reports its successes as they end, also after a freeze."""
    breaker = on_redis(policy=Policy(failure_threshold=4))
    for _ in range(3):
        with freeze_time(date):
            admits(breaker, boom)
            admits(breaker)
        admits(breaker, boom)
        wait_until(lambda: admits(breaker) and breaker.snapshot().failure_count == 0, timeout=5)


@pytest.mark.long
def test_nothing_runs_on_after_a_freeze(on_redis: Callable[..., CircuitBreaker]) -> None:
    """A breaker that was last called in the future is not refreshed any more: its thread can end."""
    breaker = on_redis()
    with freeze_time(DATES[0]):
        admits(breaker)
    link = breaker._redis.link
    wait_until(lambda: link.pause() is None)
    wait_until(lambda: breaker._redis._worker._thread is None)
    admits(breaker)
    assert link.pause() is not None


@frozen
def test_the_ttl_is_renewed_after_a_freeze(
    on_redis: Callable[..., CircuitBreaker], own_server: EmbeddedServer, date: str
) -> None:
    """A document that is only read is kept, although its last renewal came from the future."""
    breaker = on_redis(policy=Policy(ttl=1.0))
    with freeze_time(date):
        admits(breaker)
        breaker.flush()
    generation, end = breaker.snapshot().generation, time.monotonic() + 2.5
    with redis.Redis.from_url(own_server.url) as client:
        while time.monotonic() < end:
            admits(breaker)
            assert client.pttl(breaker.keys.state) > 0
            time.sleep(0.02)
    assert breaker.snapshot().generation == generation


@frozen
def test_an_outage_that_began_in_a_freeze(
    on_redis: Callable[..., CircuitBreaker], own_server: EmbeddedServer, date: str
) -> None:
    """A retry that would come in the future comes now."""
    breaker = on_redis(policy=QUICK)
    admits(breaker)
    with stopped(own_server), freeze_time(date):
        admits(breaker, boom)
        assert breaker._line.local is not None
        assert not admits(breaker)
    wait_until(lambda: admits(breaker) and breaker._line.local is None)


@frozen
def test_what_an_operator_set_in_a_freeze(
    make: Callable[..., CircuitBreaker], own_server: EmbeddedServer, date: str
) -> None:
    """Forced states and policy overrides end after no more than their length, with Redis, without it, and in memory."""
    breaker = make(policy=LASTING)
    with freeze_time(date):
        breaker.force_open(1.0)
        breaker.set_policy(enforce=False, duration=2.0)
        assert admits(breaker)  # in shadow mode
    own_server.stop()
    wait_until(lambda: not breaker._view.policy.enforce or admits(breaker))
    wait_until(lambda: breaker._view.policy.enforce or not admits(breaker) or None)
    wait_until(lambda: breaker.snapshot().forced is None and breaker.snapshot().policy == LASTING)
    wait_until(lambda: admits(breaker) and breaker.state == "closed")


@frozen
def test_slow_calls_after_a_freeze(make: Callable[..., CircuitBreaker], date: str) -> None:
    """A call that began in the future and never ended hides no other call that becomes slow."""
    policy = Policy(slow_call_duration=0.05, slow_call_rate_threshold=0.1, minimum_calls=4, reset_timeout=3600)
    breaker = make(policy=policy)
    with freeze_time(date):
        kept = [breaker.acquire()]
    kept += [breaker.acquire() for _ in range(3)]
    time.sleep(0.1)
    wait_until(lambda: not admits(breaker))
    for permit in kept:
        permit.release()


# Used within a freeze


@frozen
@pytest.mark.parametrize("lease", [0.1, 0])
def test_used_before_and_in_a_freeze(make: Callable[..., CircuitBreaker], date: str, lease: float) -> None:
    """A breaker of before counts, trips, probes and closes while the clock is frozen and moved."""
    kinds: list[str] = []
    breaker = make(policy=Policy(failure_threshold=2), lease=lease, listeners=[lambda event: kinds.append(event.kind)])
    for _ in range(10):
        assert admits(breaker)
    with freeze_time(date) as clock:
        for _ in range(10):
            assert admits(breaker)
            clock.tick(1)
        admits(breaker, boom)
        admits(breaker, boom)
        assert not admits(breaker)
    for _ in range(10):
        admits(breaker)
    assert "redis_error" not in kinds


@frozen
def test_gathered_before_a_freeze(on_redis: Callable[..., CircuitBreaker], date: str) -> None:
    """Successes that were gathered before the clock leapt are reported, and no server refuses their age."""
    kinds: list[str] = []
    policy = Policy(error_rate_threshold=0.5, window=60)
    breaker = on_redis(policy=policy, listeners=[lambda event: kinds.append(event.kind)])
    for _ in range(10):
        admits(breaker)
    with freeze_time(date):
        breaker.flush()
        admits(breaker, boom)
        assert breaker.snapshot().source == "redis"
    assert "redis_error" not in kinds


@frozen
def test_time_that_a_test_moves(date: str) -> None:
    """In memory, a test moves a circuit through its open period, and back: a deadline keeps what was left of it."""
    breaker = CircuitBreaker("discovery", policy=Policy(failure_threshold=1, reset_timeout=30))
    with freeze_time(date) as clock:
        admits(breaker, boom)
        clock.tick(29.5)
        assert not admits(breaker)
        assert breaker.state == "open"
        clock.move_to("1940-01-01")
        assert not admits(breaker)
        clock.tick(0.6)
        assert breaker.state == "half_open"
        assert admits(breaker)
        assert breaker.state == "closed"


def test_a_document_keeps_its_times_when_the_clock_goes_back() -> None:
    """In memory, the times that a snapshot shows stay near the clock."""
    breaker = CircuitBreaker("discovery", policy=LASTING)
    with freeze_time("2068-01-01"):
        admits(breaker, boom)
        breaker.force_open(600)
    seen = breaker.snapshot()
    assert abs(seen.opened_at - time.time()) < 60
    assert abs(seen.forced_until - time.time() - 600) < 60
    assert 0 < seen.retry_after <= 600


def test_time_machine(make: Callable[..., CircuitBreaker]) -> None:
    """A wall clock that is moved, years ahead or back, changes nothing."""
    breaker = make(policy=LASTING)
    admits(breaker)
    for year in (2068, 1975):
        with time_machine.travel(datetime.datetime(year, 1, 1, tzinfo=datetime.UTC)):
            assert admits(breaker)
    admits(breaker, boom)
    with time_machine.travel(datetime.datetime(2068, 1, 1, tzinfo=datetime.UTC)):
        assert not admits(breaker)
    assert not admits(breaker)


# The clock changes while a call waits


@frozen
def test_unfrozen_while_a_call_waits(
    on_redis: Callable[..., CircuitBreaker], own_server: EmbeddedServer, date: str
) -> None:
    """A call that waits for Redis from a freeze until after it ends, and its thread stands still no longer."""
    breaker = on_redis(policy=LASTING, redis_timeout=2.0)
    admits(breaker)
    time.sleep(0.3)  # a call must wait for a view that is older than two leases

    def call(depth: int) -> bool:
        # the module threading sees the true clock, and so does what it calls, up to five frames from it
        return call(depth - 1) if depth else admits(breaker)

    with stopped(own_server), freeze_time(date):
        thread = threading.Thread(target=call, args=(10,))
        thread.start()
        for _ in range(200):  # wait_until() would not end: its clock stands still
            if breaker._redis.link.is_busy():
                break
            time.sleep(0.005)
    thread.join(20)
    assert not thread.is_alive()
    assert admits(breaker)


@contextlib.contextmanager
def frozen_now_and_then(date: str) -> Iterator[None]:
    """Another thread freezes the clock and lets it go, all the time."""
    ended = threading.Event()

    def freeze() -> None:
        while not ended.is_set():
            with freeze_time(date):
                time.sleep(0.005)
            time.sleep(0.005)

    thread = threading.Thread(target=freeze)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@frozen
def test_frozen_at_any_moment(make: Callable[..., CircuitBreaker], date: str) -> None:
    """Freezes begin and end between any two steps of many calls: no call hangs, and all is well after them."""
    breaker = make(policy=Policy(failure_threshold=3, reset_timeout=0.1))
    for _ in range(3):
        with frozen_now_and_then(date):
            for turn in range(300):
                admits(breaker, boom if turn % 10 < 4 else fine)
        wait_until(lambda: admits(breaker) and breaker.state == "closed")


# On asyncio


@frozen
def test_on_asyncio(own_server: EmbeddedServer, date: str) -> None:
    """An AsyncCircuitBreaker learns, trips and recovers after a freeze, too."""

    async def admitted(breaker: AsyncCircuitBreaker, func: Callable[[], Any] = fine) -> bool:
        async def awaited() -> Any:
            return func()

        try:
            await breaker.call(awaited)
        except CircuitOpenError:
            return False
        except Boom:
            pass
        return True

    async def main() -> None:
        breaker = AsyncCircuitBreaker("discovery", redis=own_server.url, policy=QUICK)
        await admitted(breaker)
        with freeze_time(date, real_asyncio=True):
            await admitted(breaker, boom)
            assert not await admitted(breaker)
        while not await admitted(breaker):
            await asyncio.sleep(0.01)
        assert breaker.state == "closed"
        with freeze_time(date, real_asyncio=True):
            await admitted(breaker)
        await asyncio.to_thread(elsewhere(own_server).force_open)
        assert not await admitted(breaker)

    asyncio.run(asyncio.wait_for(main(), 60))
