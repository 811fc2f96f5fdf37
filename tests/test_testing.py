"""The kit for the tests of code that uses breakers: fake clock, states, fixtures."""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import redis

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerManager,
    CircuitOpenError,
    Config,
    Event,
    Policy,
    PolicyError,
    RedisUnavailableError,
)
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.testing import Breakers, FakeClock, SettableState, aset_state, set_state
from pytest_pybreaker_redis import breaker_redis, breakers

pytest_plugins = ["pytester"]
__all__ = ["breaker_redis", "breakers"]  # the fixtures, where the plugin is not installed

ROOT = pathlib.Path(__file__).resolve().parent.parent
POLICY = Policy(failure_threshold=3, reset_timeout=30)


class Boom(Exception):
    """A failure of the guarded service."""


def boom() -> None:
    """A call that fails."""
    raise Boom


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(Boom):
            breaker.call(boom)


def rejection(breaker: CircuitBreaker) -> CircuitOpenError:
    with pytest.raises(CircuitOpenError) as caught:
        breaker.call(int)
    return caught.value


# The clock ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lease", [0.1, 0, 3600])
def test_an_open_circuit_follows_the_clock(lease: float) -> None:
    """It stays open for the very length of reset_timeout, however long the test takes."""
    clock = FakeClock()
    breaker = CircuitBreaker("payments", policy=POLICY, clock=clock, lease=lease)
    fail(breaker, 3)
    assert rejection(breaker).retry_after == 30.0
    clock.advance(29.999)
    assert breaker.state == "open"
    assert rejection(breaker).retry_after == pytest.approx(0.001)
    clock.advance(0.001)
    assert breaker.state == "half_open"
    breaker.call(int)
    assert breaker.state == "closed"


def test_the_clock_stands_still() -> None:
    """All that happens at one time counts in its order: a success ends a run of failures, however quickly it comes."""
    breaker = CircuitBreaker("payments", policy=POLICY, clock=FakeClock())
    for _ in range(10):
        fail(breaker, 2)
        breaker.call(int)
    assert breaker.state == "closed"
    assert breaker.counts.successes == 10
    fail(breaker, 3)
    assert breaker.state == "open"


def test_nested_guards_count_once_on_a_clock_that_stands_still() -> None:
    """A failure within two guards of one breaker is one failure."""
    breaker = CircuitBreaker("payments", policy=POLICY, clock=FakeClock())
    fail(breaker)
    with pytest.raises(Boom):
        breaker.call(breaker.call, boom)
    assert breaker.snapshot().failure_count == 2


def test_calls_last_as_long_as_the_clock_advances() -> None:
    """Slow calls need no sleeping."""
    clock = FakeClock()
    policy = Policy(slow_call_duration=2.0, slow_call_rate_threshold=0.5, minimum_calls=4)
    breaker = CircuitBreaker("payments", policy=policy, clock=clock)
    for _ in range(3):
        breaker.call(clock.advance, 1.999)
    assert breaker.snapshot().slow == 0
    for _ in range(3):
        breaker.call(clock.advance, 2.0)
    assert breaker.state == "open"
    assert breaker.history()[0].reason == "slow_rate"


def test_windows_ramps_forced_states_and_overrides_follow_the_clock() -> None:
    """Whatever the policy or an operator gives a length ends after that length."""
    clock = FakeClock()
    policy = Policy(failure_threshold=100, error_rate_threshold=0.5, minimum_calls=4, window=10)
    breaker = CircuitBreaker("payments", policy=policy, clock=clock)
    fail(breaker, 3)
    clock.advance(11)
    fail(breaker)
    assert (breaker.state, breaker.snapshot().calls) == ("closed", 1)

    breaker.force_closed(60)
    clock.advance(59)
    assert breaker.snapshot().forced == "closed"
    clock.advance(1)
    assert breaker.snapshot().forced is None

    breaker.set_policy(failure_threshold=1, duration=60)
    clock.advance(60)
    fail(breaker)
    assert breaker.state == "closed"
    breaker.set_policy(failure_threshold=1, duration=60)
    clock.advance(59.9)
    fail(breaker)
    assert breaker.state == "open"

    ramped = CircuitBreaker("ramp", policy=Policy(failure_threshold=1, reset_timeout=5, ramp_up=50), clock=clock)
    fail(ramped)
    clock.advance(5)
    ramped.call(int)
    rejected: list[float] = []
    for _ in range(200):
        try:
            ramped.call(int)
        except CircuitOpenError as error:
            rejected.append(error.retry_after)
    assert set(rejected) == {50.0}
    clock.advance(50)
    for _ in range(200):
        ramped.call(int)


def test_a_clock_on_asyncio() -> None:
    """An AsyncCircuitBreaker takes one, too."""

    async def main() -> None:
        clock = FakeClock(1_700_000_000)
        breaker = AsyncCircuitBreaker("payments", policy=POLICY, clock=clock)
        await aset_state(breaker, "open")
        assert (await breaker.snapshot()).opened_at == 1_700_000_000
        with pytest.raises(CircuitOpenError) as caught:
            await breaker.call(asyncio.sleep, 0)
        assert caught.value.retry_after == 30.0
        clock.advance(30)
        await breaker.call(asyncio.sleep, 0)
        assert breaker.state == "closed"

    asyncio.run(main())


def test_managers_take_a_clock() -> None:
    """All breakers of a manager follow it."""
    clock = FakeClock()
    manager = CircuitBreakerManager(Config(services={"payments": POLICY}), clock=clock)
    set_state(manager.get_or_create("payments"), "open")
    assert manager.get_state("payments") == "open"
    clock.advance(30)
    assert manager.call("payments", int) == 0
    assert manager.get_state("payments") == "closed"
    passing = CircuitBreakerManager(Config(enabled=False), clock=clock)
    assert passing.call("payments", int) == 0


def test_no_clock_beside_redis(client: redis.Redis) -> None:
    """The server has a clock of its own, which no test can move."""
    for make in (CircuitBreaker, AsyncCircuitBreaker):
        with pytest.raises(PolicyError, match="in memory"):
            make("payments", redis="redis://localhost", clock=FakeClock())
    with pytest.raises(PolicyError, match="in memory"):
        CircuitBreakerManager.with_redis(redis=client, clock=FakeClock())
    with pytest.raises(PolicyError, match="in memory"):
        AsyncCircuitBreakerManager.with_redis(clock=FakeClock())
    with pytest.raises(PolicyError, match="FakeClock"):
        CircuitBreaker("payments", clock=12.0)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="zero or more"):
        FakeClock().advance(-1)


# States ------------------------------------------------------------------------------------------

EXPECTED: dict[SettableState, tuple[str, str | None]] = {
    "closed": ("closed", None),
    "open": ("open", None),
    "half_open": ("half_open", None),
    "forced_open": ("open", "open"),
    "forced_closed": ("closed", "closed"),
}


@pytest.mark.parametrize("before", EXPECTED)
@pytest.mark.parametrize("state", EXPECTED)
def test_a_breaker_is_put_into_a_state(make_breaker: Callable[..., CircuitBreaker], before: Any, state: Any) -> None:
    """From any state, on either engine."""
    breaker = make_breaker(policy=POLICY)
    set_state(breaker, before)
    set_state(breaker, state)
    assert (breaker.state, breaker.snapshot().forced) == EXPECTED[state]
    if EXPECTED[state][0] == "open":
        assert rejection(breaker).state == "open"
    else:
        assert breaker.call(int) == 0
        assert breaker.state == "closed"


def test_the_same_on_asyncio(server: EmbeddedServer) -> None:
    """aset_state does for AsyncCircuitBreaker what set_state does."""

    async def main() -> None:
        for options in ({}, {"redis": server.url}):
            breaker = AsyncCircuitBreaker("states", policy=POLICY, **options)
            for state, expected in EXPECTED.items():
                await aset_state(breaker, state)
                assert (breaker.state, (await breaker.snapshot()).forced) == expected
            await breaker.close()

    asyncio.run(main())


def test_what_a_state_cannot_be(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A wrong word, a duration where the policy has one, and a policy that needs more than failures are refused."""
    breaker = make_breaker(policy=POLICY)
    with pytest.raises(PolicyError, match="half_open"):
        set_state(breaker, "ajar")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="duration"):
        set_state(breaker, "open", duration=5)
    with pytest.raises(PolicyError, match=r"is not a CircuitBreaker: .* aset_state"):
        set_state(AsyncCircuitBreaker("payments"), "open")  # type: ignore[arg-type]
    set_state(breaker, "forced_open", duration=5)
    assert 0 < rejection(breaker).retry_after <= 5
    wary = CircuitBreaker("wary", policy=Policy(failure_threshold=10**6, minimum_calls=10**6))
    with pytest.raises(CircuitBreakerError, match="forced_open"):
        set_state(wary, "open")


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (CircuitBreakerManager, "use set_state(manager.get_or_create(NAME), ...)"),
        (AsyncCircuitBreakerManager, "use await aset_state(manager.get_or_create(NAME), ...)"),
    ],
)
def test_a_manager_has_no_state(make: Callable[[], Any], remedy: str) -> None:
    """Either function says how to reach a breaker of the manager."""
    with pytest.raises(PolicyError, match=re.escape(remedy)):
        set_state(make(), "open")
    with pytest.raises(PolicyError, match=re.escape(remedy)):
        asyncio.run(aset_state(make(), "open"))


# Fixtures ----------------------------------------------------------------------------------------


def test_the_fixture_for_memory(breakers: Breakers) -> None:
    """It makes breakers of every kind, on one clock."""
    breaker, manager = breakers("payments", policy=POLICY), breakers.manager(Config(defaults=POLICY))
    set_state(breaker, "open")
    set_state(manager.get_or_create("mail"), "open")
    breakers.clock.advance(30)
    assert (breaker.state, manager.get_or_create("mail").state) == ("half_open", "half_open")
    assert breakers("payments").state == "closed"


def test_the_fixture_for_memory_on_asyncio(breakers: Breakers) -> None:
    """Breakers and managers for asyncio follow the same clock."""

    async def main() -> None:
        breaker = breakers.async_breaker("payments", policy=POLICY)
        mail = breakers.async_manager(Config(defaults=POLICY)).get_or_create("mail")
        await aset_state(breaker, "open")
        await aset_state(mail, "open")
        breakers.clock.advance(30)
        assert (breaker.state, mail.state) == ("half_open", "half_open")
        assert breakers.async_manager().get_or_create("mail").state == "closed"

    asyncio.run(main())


PROJECT = """
from pybreaker_redis import CircuitBreaker
from pybreaker_redis.testing import set_state

def test_one(breaker_redis, breakers):
    breaker = CircuitBreaker("payments", redis=breaker_redis.url, redis_timeout=20)
    set_state(breaker, "open")
    assert CircuitBreaker("payments", redis=breaker_redis.url).snapshot().state == "open"
    set_state(breakers("payments"), "open")

def test_two(breaker_redis, breakers):
    breaker = CircuitBreaker("payments", redis=breaker_redis.url, redis_timeout=20)
    assert breaker.call(int) == 0
    assert not breaker.history()
    assert breakers("payments").call(int) == 0
"""


def test_a_state_that_redis_does_not_confirm(own_server: EmbeddedServer) -> None:
    """If Redis stops to answer amid the failures, the state is this process's own: that is an error."""

    def stop(event: Event) -> None:
        os.kill(own_server.pid, signal.SIGSTOP)

    breaker = CircuitBreaker("payments", redis=own_server.url, policy=Policy(failure_threshold=2), on_call=[stop])
    try:
        with pytest.raises(RedisUnavailableError, match="raise redis_timeout="):
            set_state(breaker, "open")
    finally:
        os.kill(own_server.pid, signal.SIGCONT)


def test_the_fixtures_are_isolated(pytester: pytest.Pytester) -> None:
    """What one test leaves on the server or in memory, the next does not see."""
    pytester.makepyfile(PROJECT)
    result = pytester.runpytest_subprocess("-p", "pytest_pybreaker_redis", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2)


def test_the_tests_of_the_page_pass(pytester: pytest.Pytester) -> None:
    """docs/how-to/testing.md shows tests, with the fixtures of the plugin: all of them pass."""
    page = (ROOT / "docs" / "how-to" / "testing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    pytester.makepyfile("\n".join(blocks))
    result = pytester.runpytest_subprocess("-p", "pytest_pybreaker_redis", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=page.count("\ndef test_"))


def test_the_plugin_loads_nothing_by_itself() -> None:
    """pytest loads it in every run, before a conftest.py patches for gevent and before coverage starts."""
    code = "import sys, pytest_pybreaker_redis; assert not {'redis', 'pybreaker_redis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": str(ROOT)})
