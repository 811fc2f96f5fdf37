"""Both breakers as a user sees them: live policy, slow calls, ramp, quorum, and what a process knows by itself."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from conftest import nonzero, stopped, wait_until

from pybreaker_redis import (
    AsyncCircuitBreaker,
    CircuitBreaker,
    CircuitOpenError,
    Event,
    ForcedStateError,
    Policy,
    PolicyError,
    RedisUnavailableError,
)
from pybreaker_redis._slow import SlowCalls
from pybreaker_redis._view import View
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.testing import FakeClock

Make = Callable[..., Any]
PATIENT: dict[str, Any] = {"redis_timeout": 20.0}
STRICT: dict[str, Any] = {"lease": 0, **PATIENT}
LONG = 3600.0
QUICK = 0.05  # what takes this long is slow, and quick calls on a busy machine do not
MANY = 10**9


class Boom(Exception):
    """A failure of the guarded service."""


class Skipped(Exception):
    """An exception that counts as nothing."""


def fine() -> str:
    """A call that succeeds."""
    return "fine"


def boom() -> None:
    """A call that fails."""
    raise Boom


def skip() -> None:
    """A call that counts as nothing."""
    raise Skipped


def doze() -> None:
    """A slow success."""
    time.sleep(1.1 * QUICK)


def doze_and_fail() -> None:
    """A slow failure."""
    doze()
    raise Boom


class Driven:
    """Something of the asyncio shell that looks like its like of the other: its loop runs as long as a call lasts."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner, self._runner = inner, runner

    def call(self, func: Callable[[], Any]) -> Any:
        return self._runner.run(self._inner.call(_awaited(func)))

    def decorated(self, func: Callable[[], Any]) -> Callable[[], Any]:
        guarded = self._inner(_awaited(func))
        return lambda: self._runner.run(guarded())

    def block(self, func: Callable[[], Any]) -> None:
        async def enter() -> None:
            async with self._inner.acquire():
                func()

        self._runner.run(enter())

    def acquire(self) -> Driven:
        async def acquire() -> Any:
            return await self._inner.acquire()

        return Driven(self._runner.run(acquire()), self._runner)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if inspect.iscoroutine(found):
            return self._runner.run(found)
        if inspect.iscoroutinefunction(found):
            return lambda *args, **kwargs: self._runner.run(found(*args, **kwargs))
        return found


class Plain(CircuitBreaker):
    """The breaker with the two ways that Driven has to name."""

    def decorated(self, func: Callable[[], Any]) -> Callable[[], Any]:
        return self(func)

    def block(self, func: Callable[[], Any]) -> None:
        with self.acquire():
            func()


def _awaited(func: Callable[[], Any]) -> Callable[[], Any]:
    async def awaited() -> Any:
        return func()

    return awaited


@pytest.fixture(params=["sync", "async"])
def shell(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes breakers of either shell for a URL or None; they look alike."""
    if request.param == "sync":
        yield lambda url, **options: Plain("discovery", redis=url, **options)
        return
    with asyncio.Runner() as runner:
        yield lambda url, **options: Driven(AsyncCircuitBreaker("discovery", redis=url, **options), runner)


@pytest.fixture
def make(shell: Make, server: EmbeddedServer, client: redis.Redis) -> Make:
    """Makes breakers of either shell that share a server."""
    return lambda **options: shell(server.url, **options)


@pytest.fixture(params=["redis", "memory"])
def make_any(request: pytest.FixtureRequest, shell: Make, server: EmbeddedServer, client: redis.Redis) -> Make:
    """Makes breakers of either shell on either engine."""
    return lambda **options: shell(server.url if request.param == "redis" else None, **options)


def fail(breaker: Any, times: int = 1) -> None:
    """So many calls that fail."""
    for _ in range(times):
        with pytest.raises(Boom):
            breaker.call(boom)


def rejects(breaker: Any) -> CircuitOpenError:
    """The error by which it rejects a call."""
    with pytest.raises(CircuitOpenError) as caught:
        breaker.call(fine)
    return caught.value


def succeeds(breaker: Any) -> bool:
    """Whether a call that would succeed is admitted."""
    with contextlib.suppress(CircuitOpenError):
        return bool(breaker.call(fine) == "fine")
    return False


def changes(events: list[Event], source: str) -> list[tuple[Any, ...]]:
    """The state changes that were notified with this source."""
    return [(one.old, one.new, one.reason) for one in events if (one.kind, one.source) == ("state_change", source)]


# Live policy


@pytest.mark.parametrize("lease", [0, 0.001])
def test_a_threshold_reaches_all(make: Make, lease: float) -> None:
    """What one instance sets, another obeys in its next call, and no longer once it is cleared."""
    operator, breaker = make(**STRICT), make(policy=Policy(failure_threshold=100), lease=lease, **PATIENT)
    fail(breaker)
    operator.set_policy(failure_threshold=3, reset_timeout=LONG)
    fail(breaker)
    assert breaker.state == "closed"
    fail(breaker)
    assert 3590 < rejects(breaker).retry_after <= 3600
    operator.clear_policy()
    operator.reset()
    wait_until(lambda: succeeds(breaker))
    fail(breaker, 10)
    assert breaker.snapshot().state == "closed"


def test_enforcement_is_switched_live(make: Make) -> None:
    """Set by another instance, enforce=False lets calls through an open circuit, and clearing it stops them."""
    operator, breaker = make(**STRICT), make(policy=Policy(failure_threshold=1, reset_timeout=LONG), **STRICT)
    fail(breaker)
    rejects(breaker)
    operator.set_policy(enforce=False)
    assert breaker.call(fine) == "fine"
    assert breaker.snapshot().state == "open"
    operator.clear_policy()
    rejects(breaker)


def test_slow_calls_are_measured_from_a_live_policy_on(make: Make) -> None:
    """A slow_call_duration that another instance sets is measured by the next calls, and may trip them."""
    operator, breaker = make(**STRICT), make(**STRICT)
    breaker.call(doze)
    assert breaker.snapshot().slow == 0
    operator.set_policy(slow_call_duration=QUICK, slow_call_rate_threshold=1, minimum_calls=2)
    breaker.call(fine)  # reads it
    breaker.call(doze)
    assert (breaker.snapshot().slow, breaker.state) == (1, "closed")
    operator.set_policy(slow_call_rate_threshold=0.3)
    breaker.call(doze)
    assert (breaker.state, breaker.history()[0].reason) == ("open", "slow_rate")


def test_a_failing_call_reads_a_live_policy_in_its_reply(make: Make) -> None:
    """Under a long lease the reply to a failure brings slow_call_duration, and the next call is measured."""
    operator, breaker = make(**STRICT), make(policy=Policy(failure_threshold=MANY), lease=LONG, **PATIENT)
    breaker.call(fine)
    operator.set_policy(slow_call_duration=QUICK)
    fail(breaker)
    breaker.call(doze)
    assert breaker.counts.slow_successes == 1


def test_ramp_is_set_live(make: Make) -> None:
    """A ramp_up that another instance sets holds back calls after a recovery before."""
    operator = make(**STRICT)
    breaker = make(policy=Policy(failure_threshold=1, reset_timeout=0.001), **STRICT)
    fail(breaker)
    wait_until(lambda: succeeds(breaker))
    operator.set_policy(ramp_up=LONG, reset_timeout=LONG)
    assert 0 < sum(succeeds(breaker) for _ in range(200)) < 100
    operator.clear_policy()
    breaker.call(fine) if succeeds(breaker) else None
    assert all(succeeds(breaker) for _ in range(20))


def test_snapshot_of_a_policy(make_any: Make) -> None:
    """A snapshot shows the policy in force and where each field comes from."""
    breaker = make_any(policy=Policy(failure_threshold=7, window=5, jitter=0.5), **STRICT)
    breaker.set_policy(window=30, slow_call_duration=0.25, enforce=False)
    breaker.set_policy(quorum=1, max_reset_timeout=None)
    seen = breaker.snapshot()
    assert seen.policy.window == 30.0
    assert (seen.policy.failure_threshold, seen.policy.slow_call_duration, seen.policy.enforce) == (7, 0.25, False)
    assert (seen.policy.jitter, seen.policy.max_reset_timeout, seen.policy.ttl) == (0.5, None, 3600.0)
    by_source: dict[str, set[str]] = {}
    for field, source in seen.policy_sources.items():
        by_source.setdefault(source, set()).add(field)
    assert by_source["override"] == {"window", "slow_call_duration", "enforce", "quorum", "max_reset_timeout"}
    assert by_source["client"] == {"failure_threshold", "jitter"}
    breaker.clear_policy()
    cleared = breaker.snapshot()
    assert cleared.policy == breaker.policy
    assert set(cleared.policy_sources.values()) == {"client", "default"}


def test_a_policy_with_an_end(make_any: Make) -> None:
    """With a duration the policy ends by itself, for the instances that had read it too."""
    breaker = make_any(policy=Policy(failure_threshold=100), **STRICT)
    breaker.set_policy(duration=0.2, failure_threshold=50)
    assert breaker.snapshot().policy.failure_threshold == 50
    breaker.call(fine)
    wait_until(lambda: breaker.snapshot().policy_sources["failure_threshold"] == "client")
    breaker.call(fine)
    fail(breaker, 60)
    assert breaker.snapshot().state == "closed"


@pytest.mark.parametrize("lease", [0, LONG])
def test_a_policy_for_a_breaker_that_nobody_used(make_any: Make, lease: float) -> None:
    """The very first failure after set_policy counts by it."""
    breaker = make_any(lease=lease, **PATIENT)
    breaker.set_policy(failure_threshold=1)
    fail(breaker)
    assert breaker.snapshot().state == "open"


@pytest.mark.parametrize("lease", [0, LONG])
def test_a_failure_after_a_cleared_nothing(make_any: Make, lease: float) -> None:
    """A failure is not lost after clear_policy or clear_forced on a breaker that nobody used."""
    breaker = make_any(policy=Policy(failure_threshold=2), lease=lease, **PATIENT)
    breaker.clear_policy()
    fail(breaker)
    breaker.clear_forced()
    fail(breaker)
    assert breaker.snapshot().state == "open"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"color": 1},
        {"failure_threshold": 0},
        {"failure_threshold": 2.5},
        {"failure_threshold": True},
        {"failure_threshold": None},
        {"reset_timeout": 0},
        {"reset_timeout": "3"},
        {"error_rate_threshold": 1.1},
        {"error_rate_threshold": 0},
        {"slow_call_rate_threshold": -0.1},
        {"backoff_multiplier": 0.5},
        {"jitter": float("nan")},
        {"window": float("inf")},
        {"quorum": 101},
        {"ttl": 0.5},
        {"ramp_up": -1},
        {"enforce": 1},
        {"enforce": None},
        {"window": 10, "jitter": 2},
    ],
)
def test_policies_that_make_no_sense(make_any: Make, fields: dict[str, Any]) -> None:
    """They are refused with the name of the field, and nothing changes."""
    breaker = make_any(**STRICT)
    breaker.set_policy(window=20)
    with pytest.raises(PolicyError, match=list(fields)[-1] if fields else "at least one policy field"):
        breaker.set_policy(**fields)
    assert breaker.snapshot().policy == Policy(window=20)
    if fields and "color" not in fields:
        with pytest.raises(PolicyError, match=list(fields)[-1]):
            Policy(**fields)


@pytest.mark.parametrize(
    ("refused", "bounds"),
    [
        (lambda: Policy(failure_threshold=0), "from 1 to 1000000000,"),
        (lambda: Policy(reset_timeout=0), "from 0.001 to 2592000,"),
        (lambda: Policy(error_rate_threshold=2), "from 0.000000001 to 1 or None,"),
        (lambda: CircuitBreaker("discovery", redis_timeout=0), "from 0.001 to 3600 seconds,"),
        (lambda: CircuitBreaker("discovery").force_open(0), "from 0.001 to 2592000 seconds,"),
    ],
)
def test_bounds_are_plain_numbers(refused: Callable[[], object], bounds: str) -> None:
    """A message gives the bounds of a value without exponents."""
    with pytest.raises(PolicyError, match=re.escape(bounds)):
        refused()


@pytest.mark.parametrize("duration", [0, -1, 0.0001, 31 * 86400, "5", True, float("nan")])
def test_durations_that_make_no_sense(make_any: Make, duration: Any) -> None:
    """A duration out of range is refused, and nothing changes."""
    breaker = make_any(**STRICT)
    with pytest.raises(PolicyError, match="duration"):
        breaker.set_policy(duration=duration, window=20)
    assert breaker.snapshot().policy == Policy()


def test_a_slow_rate_needs_a_duration() -> None:
    """A policy that says how many may be slow, but not what is, makes no sense."""
    with pytest.raises(PolicyError, match="needs slow_call_duration"):
        Policy(slow_call_rate_threshold=0.5)


def test_policies_need_redis(shell: Make, own_server: EmbeddedServer) -> None:
    """Without Redis an operator's policy is refused: it is not set for this instance only."""
    breaker = shell(own_server.url, lease=0)
    with stopped(own_server):
        with pytest.raises(RedisUnavailableError, match="set_policy was not carried out"):
            breaker.set_policy(window=20)
        with pytest.raises(RedisUnavailableError, match="clear_policy was not carried out"):
            breaker.clear_policy()


def test_a_policy_holds_in_an_outage(shell: Make, own_server: EmbeddedServer) -> None:
    """What an operator had set holds for the local engine too while Redis is down."""
    breaker = shell(own_server.url, policy=Policy(failure_threshold=MANY), lease=0, redis_timeout=0.5)
    breaker.set_policy(failure_threshold=2, reset_timeout=LONG)
    breaker.call(fine)
    with stopped(own_server):
        fail(breaker, 2)
        assert rejects(breaker).retry_after > 3000
        assert breaker.snapshot().source == "local"


# Failures in the window, and probes that fail


@pytest.mark.parametrize("lease", [0, LONG])
def test_failures_in_the_window(make_any: Make, lease: float) -> None:
    """The n-th failure within the window trips the circuit, whatever succeeded in between."""
    breaker = make_any(policy=Policy(failures_in_window=3, reset_timeout=LONG), lease=lease, **PATIENT)
    for _ in range(3):
        assert breaker.state == "closed"
        for _ in range(20):
            breaker.call(fine)
        fail(breaker)
    assert rejects(breaker).state == "open"
    entry = breaker.history()[0]
    assert (entry.reason, entry.failures, entry.calls, entry.failure_count) == ("failures_in_window", 3, 63, 1)


def test_failures_in_the_window_of_a_live_policy(make_any: Make) -> None:
    """The rule can be set and cleared while the breaker runs."""
    breaker = make_any(policy=Policy(reset_timeout=LONG), **STRICT)
    breaker.set_policy(failures_in_window=1)
    breaker.set_policy(failures_in_window=None)
    fail(breaker, 2)
    breaker.set_policy(failures_in_window=2)
    for state in ("closed", "open"):
        fail(breaker)
        assert breaker.snapshot().state == state


def test_one_sick_host_behind_a_balancer(make_any: Make) -> None:
    """With probe_failure_threshold=2 one failed probe does not open the circuit again; two do."""
    policy = Policy(probe_failure_threshold=2, half_open_max_calls=2, reset_timeout=LONG, success_threshold=2)
    breaker = make_any(policy=policy, **STRICT)
    for failures, state in ((1, "closed"), (2, "open")):
        breaker.force_open(0.001)
        wait_until(lambda: breaker.snapshot().retry_after == 0)
        fail(breaker, failures)
        for _ in range(2 if state == "closed" else 0):
            breaker.call(fine)
        assert breaker.snapshot().state == state
    assert breaker.history()[0].reason == "probe_failed"


# What changes nothing


@pytest.mark.parametrize("state", ["open", "closed"])
@pytest.mark.parametrize("lease", [0, LONG])
def test_forced_twice(make_any: Make, state: str, lease: float) -> None:
    """Another end of the same forced state is an entry in the history, but no transition and no event."""
    events: list[Event] = []
    breaker = make_any(lease=lease, listeners=[events.append], **PATIENT)
    for duration in (60, 600):
        getattr(breaker, f"force_{state}")(duration)
    assert changes(events, breaker.snapshot().source) == [("closed", state, "forced")]
    entries = breaker.history()
    assert [(entry.old, entry.new) for entry in entries] == [(state, state), ("closed", state)]
    assert entries[0].generation == entries[1].generation
    assert breaker.snapshot().forced_until - time.time() > 300


@pytest.mark.parametrize("lease", [0, LONG])
def test_a_reset_of_nothing(make_any: Make, lease: float) -> None:
    """A reset of a closed circuit without counts is no transition; of one with counts, it drops them."""
    events: list[Event] = []
    breaker = make_any(lease=lease, listeners=[events.append], **PATIENT)
    breaker.reset()
    breaker.call(fine)
    breaker.reset()
    assert (events, breaker.history()) == ([], [])
    fail(breaker)
    breaker.reset()
    assert breaker.snapshot().failure_count == 0
    assert [entry.reason for entry in breaker.history()] == ["reset"]


# One call now


@pytest.mark.parametrize("lease", [0, LONG])
def test_probe_now(make_any: Make, lease: float) -> None:
    """After a repair an operator lets one call through: its success closes the circuit, its failure changes nothing."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=LONG), lease=lease, **PATIENT)
    fail(breaker)
    assert rejects(breaker).retry_after > 3000
    breaker.probe()
    assert breaker.state == "half_open"
    fail(breaker)
    assert rejects(breaker).retry_after > 3000
    breaker.probe()
    permit = breaker.acquire()
    assert rejects(breaker).state == "half_open"
    permit.success()
    assert breaker.call(fine) == "fine"
    assert breaker.history()[0].reason == "probe_succeeded"


@pytest.mark.parametrize("lease", [0, 0.001])
def test_probe_now_for_all(make: Make, lease: float) -> None:
    """Every process learns that it may probe, not only the operator's."""
    breaker, operator = (make(policy=Policy(failure_threshold=1, reset_timeout=LONG), lease=lease) for _ in range(2))
    fail(breaker)
    assert rejects(breaker).retry_after > 3000
    operator.probe()
    wait_until(lambda: succeeds(breaker))


@pytest.mark.parametrize("forced", ["open", "closed"])
def test_no_probe_while_forced(make_any: Make, forced: str) -> None:
    """It is refused, with what to do; elsewhere it changes nothing."""
    breaker = make_any(**STRICT)
    breaker.probe()
    assert (breaker.snapshot().state, breaker.history()) == ("closed", [])
    getattr(breaker, f"force_{forced}")(600)
    with pytest.raises(ForcedStateError, match=rf"forced {forced}.*clear_forced"):
        breaker.probe()
    assert breaker.snapshot().forced == forced


# What a recovery leaves behind


def recovered_a_minute_ago(make: Make, client: redis.Redis, **fields: Any) -> Any:
    """A breaker that recovered from its second trip in a row a minute ago."""
    quick = make(policy=Policy(failure_threshold=1, reset_timeout=0.01), **STRICT)
    fail(quick)
    wait_until(lambda: quick.snapshot().retry_after == 0)
    fail(quick)
    wait_until(lambda: succeeds(quick))
    document = json.loads(client.get(quick.keys.state))
    client.set(quick.keys.state, json.dumps({**document, "closed_at_ms": document["closed_at_ms"] - 60_000}))
    return make(policy=Policy(failure_threshold=1, **fields), lease=0.001, **PATIENT)


@pytest.mark.parametrize(
    ("fields", "trips"),
    [
        ({"reset_timeout": 50}, 0),
        ({"reset_timeout": LONG}, 2),
        ({"reset_timeout": 1, "backoff_multiplier": 1000}, 2),
        ({"reset_timeout": 1, "backoff_multiplier": 1000, "max_reset_timeout": 50}, 0),
    ],
)
def test_successes_end_no_back_off_early(make: Make, client: redis.Redis, fields: dict[str, Any], trips: int) -> None:
    """Reports of successes end a run of trips by this breaker's policy, and by no other."""
    breaker = recovered_a_minute_ago(make, client, **fields)
    for _ in range(3):
        breaker.call(fine)
        breaker.flush()
        time.sleep(0.003)  # for more than two leases: the view is renewed
    assert breaker.snapshot().trips == trips


def test_successes_end_no_ramp_early(make: Make, client: redis.Redis) -> None:
    """Reports of successes do not end a ramp either."""
    breaker = recovered_a_minute_ago(make, client, ramp_up=LONG)
    for _ in range(30):
        succeeds(breaker)
        breaker.flush()
        time.sleep(0.003)
    assert 20 < sum(succeeds(breaker) for _ in range(600)) < 150


# Shadow mode


@pytest.mark.parametrize("lease", [0, LONG])
def test_shadow_mode(make_any: Make, lease: float) -> None:
    """In shadow mode it trips, notifies and remembers, but every call runs, and is counted once by its outcome."""
    events: list[Event] = []
    policy = Policy(failure_threshold=2, reset_timeout=LONG, enforce=False)
    breaker = make_any(policy=policy, lease=lease, listeners=[events.append], on_call=[events.append], **PATIENT)
    fail(breaker, 5)
    assert [breaker.call(fine) for _ in range(3)] == ["fine"] * 3
    seen = breaker.snapshot()
    assert (seen.state, seen.failure_count, seen.trips) == ("open", 2, 1)
    rejected = [event for event in events if event.kind == "rejected"]
    assert [event.enforced for event in rejected] == [False] * 6
    assert all(3000 < event.retry_after <= 3600 for event in rejected if event.retry_after is not None)
    assert [(entry.old, entry.new, entry.reason) for entry in breaker.history()] == [
        ("closed", "open", "failure_threshold")
    ]
    assert len([event for event in events if event.kind == "state_change"]) == 1
    assert nonzero(breaker.counts) == {"failures": 5, "successes": 3, "shadow_rejected": 6}


def the_probe(breaker: Any) -> Any:
    """A probe's permit, or None where the next call is not one."""
    permit = breaker.acquire()
    if permit.probe is not None:
        return permit
    permit.release()
    return None


@pytest.mark.parametrize("lease", [0, 0.001])
def test_shadow_mode_recovers(make_any: Make, lease: float) -> None:
    """In shadow mode probes close the circuit as ever, with other calls running at the same time."""
    policy = Policy(failure_threshold=1, reset_timeout=0.01, enforce=False)
    breaker = make_any(policy=policy, lease=lease, **PATIENT)
    fail(breaker)
    probe = wait_until(lambda: the_probe(breaker))
    assert breaker.call(fine) == "fine"
    other = breaker.acquire()
    assert (other.probe, other.generation) == (None, None)
    other.failure()
    assert breaker.snapshot().state == "half_open"
    probe.success()
    assert breaker.snapshot().state == "closed"


def test_an_enforced_rejection_says_so(make_any: Make) -> None:
    """A rejection outside of shadow mode is notified as enforced."""
    events: list[Event] = []
    policy = Policy(failure_threshold=1, reset_timeout=LONG)
    breaker = make_any(policy=policy, on_call=[events.append], **STRICT)
    fail(breaker)
    rejects(breaker)
    assert [event.enforced for event in events if event.kind == "rejected"] == [True]


# Slow calls

SLOW = Policy(
    failure_threshold=MANY, slow_call_duration=QUICK, slow_call_rate_threshold=0.5, minimum_calls=4, reset_timeout=LONG
)


def way_of(name: str) -> Callable[[Any, Callable[[], Any]], Any]:
    """One of the ways to guard a call."""

    def by_permit(breaker: Any, func: Callable[[], Any]) -> None:
        permit = breaker.acquire()
        try:
            func()
        except Boom as error:
            permit.failure(error)
            raise
        except Skipped:
            permit.release()
            raise
        permit.success()

    ways: dict[str, Any] = {
        "call": lambda breaker, func: breaker.call(func),
        "decorator": lambda breaker, func: breaker.decorated(func)(),
        "block": lambda breaker, func: breaker.block(func),
        "permit": by_permit,
    }
    return ways[name]


@pytest.mark.parametrize("lease", [0, LONG])
@pytest.mark.parametrize("way", ["call", "decorator", "block", "permit"])
def test_slow_calls_are_measured(make_any: Make, way: str, lease: float) -> None:
    """Slow successes and slow failures trip it however a call is guarded; quick ones are only calls."""
    events: list[Event] = []
    guard = way_of(way)
    breaker = make_any(policy=SLOW, lease=lease, on_call=[events.append], **PATIENT)
    guard(breaker, fine)
    guard(breaker, fine)
    guard(breaker, doze)
    assert breaker.snapshot().slow == 1
    with pytest.raises(Boom):
        guard(breaker, doze_and_fail)
    entry = breaker.history()[0]
    assert (entry.reason, entry.calls, entry.failures, entry.slow) == ("slow_rate", 4, 1, 2)
    assert [event.slow for event in events if event.kind in ("success", "failure")] == [False, False, True, True]
    assert nonzero(breaker.counts) == {"successes": 3, "slow_successes": 1, "failures": 1}
    with pytest.raises(CircuitOpenError):
        guard(breaker, fine)


def test_without_on_call_slow_calls_are_measured_too(make_any: Make) -> None:
    """The fast path measures as well."""
    breaker = make_any(policy=SLOW, lease=LONG, **PATIENT)
    for _ in range(3):
        breaker.call(fine)
    for _ in range(3):
        breaker.call(doze)
    breaker.flush()
    seen = breaker.snapshot()
    assert (seen.state, breaker.history()[0].slow) == ("open", 3)
    assert (breaker.counts.successes, breaker.counts.slow_successes) == (6, 3)


def test_slowness_is_not_measured_unless_wanted(make_any: Make) -> None:
    """Without slow_call_duration events do not say whether a call was slow."""
    events: list[Event] = []
    breaker = make_any(on_call=[events.append], **STRICT)
    breaker.call(doze)
    assert breaker.counts.slow_successes == 0
    assert [event.slow for event in events] == [None]


@pytest.mark.parametrize("way", ["call", "permit"])
def test_slow_probe_opens_again(make_any: Make, way: str) -> None:
    """A slow success of a probe is no recovery."""
    breaker = make_any(policy=SLOW, **STRICT)
    breaker.force_open(0.001)
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    way_of(way)(breaker, doze)
    assert [entry.reason for entry in breaker.history()] == ["probe_slow", "timeout", "forced"]
    assert breaker.snapshot().state == "open"


@pytest.mark.parametrize("lease", [0, 0.001])
def test_a_running_call_is_slow(make_any: Make, lease: float) -> None:
    """Calls that hang past slow_call_duration are counted by other calls while they hang, and trip the circuit."""
    policy = Policy(slow_call_duration=QUICK, slow_call_rate_threshold=1e-9, minimum_calls=1, reset_timeout=LONG)
    breaker = make_any(policy=policy, lease=lease, **PATIENT)
    hung = [breaker.acquire() for _ in range(3)]
    wait_until(lambda: not succeeds(breaker))
    entry = breaker.history()[0]
    assert (entry.reason, 1 <= entry.slow <= 3) == ("slow_rate", True)
    for permit in hung:
        permit.success()
    assert len(breaker.history()) == 1


@pytest.mark.parametrize("lease", [0, 0.001])
def test_a_running_call_counts_once(make_any: Make, lease: float) -> None:
    """After its end a call that was seen as slow before is still one call and one slow call."""
    policy = Policy(failure_threshold=MANY, slow_call_duration=QUICK, slow_call_rate_threshold=1)
    breaker = make_any(policy=policy, lease=lease, **PATIENT)
    hung = [breaker.acquire() for _ in range(4)]
    others = [0]

    def seen_as_slow() -> bool:
        others[0] += 1
        breaker.call(fine)
        return bool(breaker.snapshot().slow == 4)

    wait_until(seen_as_slow)
    hung[0].success()
    hung[1].failure()
    hung[2].release()
    hung[3].success()
    breaker.flush()
    seen = breaker.snapshot()
    assert (seen.calls, seen.failures, seen.slow) == (4 + others[0], 1, 4)


def test_a_hung_probe_opens_again(make_any: Make) -> None:
    """A probe that hangs past slow_call_duration reopens the circuit when the next call asks, not at its timeout."""
    breaker = make_any(policy=SLOW, **STRICT)
    breaker.force_open(0.001)
    probe = wait_until(lambda: breaker.snapshot().retry_after == 0 and breaker.acquire())
    assert probe.probe == 1
    wait_until(lambda: not succeeds(breaker) and breaker.snapshot().state == "open")
    assert [entry.reason for entry in breaker.history()] == ["probe_slow", "timeout", "forced"]
    probe.success()
    assert breaker.snapshot().state == "open"


def test_a_hanging_thread_is_seen(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A call that hangs in a thread trips the others before it returns."""
    policy = Policy(slow_call_duration=QUICK, slow_call_rate_threshold=0.01, minimum_calls=1, reset_timeout=LONG)
    breaker = make_breaker(policy=policy, **STRICT)
    started, release = threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        release.wait(60)

    thread = threading.Thread(target=breaker.call, args=(hang,))
    thread.start()
    try:
        assert started.wait(20)
        wait_until(lambda: not succeeds(breaker))
        assert thread.is_alive()
    finally:
        release.set()
        thread.join()
    assert breaker.history()[0].reason == "slow_rate"


def test_a_hanging_task_is_seen(server: EmbeddedServer, client: redis.Redis) -> None:
    """A call that hangs in a task trips the others before it returns; cancelled after that, it changes nothing."""
    policy = Policy(slow_call_duration=QUICK, slow_call_rate_threshold=0.001, minimum_calls=1, reset_timeout=LONG)

    async def fine() -> None:
        """A call that succeeds."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("discovery", redis=server.url, policy=policy, **STRICT)
        hung = asyncio.create_task(breaker.call(asyncio.Event().wait))
        async with asyncio.timeout(60):
            with contextlib.suppress(CircuitOpenError):
                while True:
                    await breaker.call(fine)
        assert not hung.done()
        hung.cancel()
        await asyncio.wait([hung])
        assert (await breaker.history())[0].reason == "slow_rate"
        assert (await breaker.snapshot()).state == "open"
        await breaker.close()

    asyncio.run(main())


@dataclasses.dataclass(eq=False)
class Call:
    """What slow calls need of a permit."""

    started: float
    _pending_since: float | None = None
    probe: int | None = None


@pytest.mark.parametrize(("window", "probe", "pending"), [(3600.0, None, True), (0.02, None, False), (0.02, 1, True)])
def test_a_call_that_hung_for_a_window_counts_anew(window: float, probe: int | None, pending: bool) -> None:
    """What was reported as pending has left the window by then: its end is a slow call of now, not the end of one.

    A probe counts once, however long it hung.
    """
    policy = Policy(slow_call_duration=0.001, slow_call_rate_threshold=1.0, window=window)
    slow_calls, call = SlowCalls(View(0.1, policy)), Call(time.monotonic() - 1, None, probe)
    slow_calls.began(call)
    assert slow_calls.overdue() == [call]
    assert call._pending_since is not None
    call._pending_since -= 0.02
    assert slow_calls.ended(call) == (True, pending)


# Ramp


def ramping(make: Make, ramp_up: float, **options: Any) -> Any:
    """A breaker that has just recovered."""
    policy = Policy(failure_threshold=1, reset_timeout=0.01, ramp_up=ramp_up)
    breaker = make(policy=policy, **options)
    fail(breaker)
    wait_until(lambda: succeeds(breaker))
    return breaker


@pytest.mark.parametrize("lease", [0, 0.005, LONG])
def test_ramp_holds_back(make_any: Make, lease: float) -> None:
    """Right after a recovery about a tenth of the calls is admitted, for as long as the ramp lasts."""
    breaker = ramping(make_any, LONG, lease=lease, **PATIENT)
    admitted = [succeeds(breaker) for _ in range(600)]
    assert 20 < sum(admitted) < 130
    time.sleep(0.02)  # for more than two leases
    admitted = [succeeds(breaker) for _ in range(600)]
    assert 20 < sum(admitted) < 130


@pytest.mark.parametrize("lease", [0, 0.005])
def test_ramp_rejections(make_any: Make, lease: float) -> None:
    """The rejection of a call that is held back says that the circuit is closed, and when all calls are admitted."""
    events: list[Event] = []
    breaker = ramping(make_any, LONG, lease=lease, on_call=[events.append], **PATIENT)
    errors = []
    while len(errors) < 20:
        try:
            breaker.call(fine)
        except CircuitOpenError as error:
            errors.append(error)
    assert {error.state for error in errors} == {"closed"}
    assert all(3500 < error.retry_after <= 3600 for error in errors)
    rejected = [event for event in events if event.kind == "rejected" and (event.retry_after or 0) > 100]
    assert len(rejected) == 20
    assert breaker.state == "closed"


def test_ramp_grows(make: Make) -> None:
    """The share of admitted calls grows to all of them."""
    breaker = ramping(make, 1.0, lease=0.01, **PATIENT)
    began, seen = time.monotonic(), list[tuple[float, bool]]()
    while (at := time.monotonic() - began) < 1.2:
        seen.append((at, succeeds(breaker)))
        time.sleep(0.0005)
    early, late = ([admitted for at, admitted in seen if 0 <= at - start < 0.5] for start in (0, 0.5))
    assert sum(early) / len(early) < 0.5 < sum(late) / len(late)
    wait_until(lambda: all(succeeds(breaker) for _ in range(20)))


def test_ramp_of_all_instances(make: Make) -> None:
    """An instance that took no part in the recovery holds back too."""
    ramping(make, LONG, **STRICT)
    other = make(policy=Policy(ramp_up=LONG), lease=0.005, **PATIENT)
    assert 20 < sum(succeeds(other) for _ in range(600)) < 130


def test_no_ramp_in_shadow_mode(make_any: Make) -> None:
    """In shadow mode a ramp holds back nobody."""
    policy = Policy(failure_threshold=1, reset_timeout=0.01, ramp_up=LONG, enforce=False)
    breaker = make_any(policy=policy, **STRICT)
    fail(breaker)
    wait_until(lambda: breaker.call(fine) and breaker.snapshot().state == "closed")
    assert all(succeeds(breaker) for _ in range(50))


# Quorum

TWO = Policy(failure_threshold=3, quorum=2, reset_timeout=LONG)
SHORT = Policy(failure_threshold=3, quorum=2, reset_timeout=0.02)
LEASES = pytest.mark.parametrize("lease", [0, 0.005])


@LEASES
def test_an_instance_that_fails_alone(make: Make, lease: float) -> None:
    """It opens for itself, the fleet stays closed, and events and snapshots keep the two apart."""
    events: list[Event] = []
    sick = make(policy=TWO, lease=lease, host="sick", listeners=[events.append], **PATIENT)
    healthy = make(policy=TWO, lease=lease, **PATIENT)
    fail(sick, 3)
    for _ in range(3):
        error = rejects(sick)
        assert (error.state, sick.state) == ("open", "open")
        assert 3500 < error.retry_after <= 3600
        assert healthy.call(fine) == "fine"
        assert (healthy.state, healthy.snapshot().isolated) == ("closed", False)
        time.sleep(0.006)  # the view of before is too old by now
    seen = sick.snapshot()
    assert (seen.state, seen.isolated, list(seen.reporters)) == ("closed", True, ["sick"])
    assert changes(events, "isolated") == [("closed", "open", "failure_threshold")]
    assert changes(events, "redis") == []
    assert sick.history() == []


@LEASES
def test_an_isolated_instance_recovers_alone(make: Make, lease: float) -> None:
    """It has a probe of its own, one at a time, whose success ends the isolation."""
    events: list[Event] = []
    sick = make(policy=SHORT, lease=lease, listeners=[events.append], **PATIENT)
    fail(sick, 3)
    probe = wait_until(lambda: acquired(sick))
    assert rejects(sick).state == "half_open"
    assert sick.snapshot().isolated
    probe.success()
    assert sick.call(fine) == "fine"
    assert (sick.state, sick.snapshot().isolated) == ("closed", False)
    assert changes(events, "isolated") == [
        ("closed", "open", "failure_threshold"),
        ("open", "half_open", "timeout"),
        ("half_open", "closed", "probe_succeeded"),
    ]
    assert sick.history() == []
    fail(sick, 2)
    assert sick.state == "closed"
    fail(sick)
    assert sick.snapshot().isolated


def acquired(breaker: Any) -> Any:
    """A permit, or None where it is rejected."""
    with contextlib.suppress(CircuitOpenError):
        return breaker.acquire()


@LEASES
def test_an_isolated_probe_that_fails(make: Make, lease: float) -> None:
    """Its failure opens this instance again, for longer where there is a back-off."""
    events: list[Event] = []
    policy = Policy(failure_threshold=1, quorum=2, reset_timeout=0.02, backoff_multiplier=1000)
    sick = make(policy=policy, lease=lease, listeners=[events.append], **PATIENT)
    fail(sick)
    wait_until(lambda: acquired(sick)).failure()
    assert 15 < rejects(sick).retry_after <= 20
    assert changes(events, "isolated")[-1] == ("half_open", "open", "probe_failed")
    assert sick.snapshot().state == "closed"


@LEASES
def test_a_fleet_that_opens_ends_the_isolation(make: Make, lease: float) -> None:
    """When the quorum is reached the fleet's state counts for everybody, and so does its recovery."""
    sick, other = (make(policy=TWO, lease=lease, host=host, **PATIENT) for host in ("sick", "other"))
    fail(sick, 3)
    assert sick.snapshot().isolated
    fail(other, 1)  # the quorum, and the threshold in the fleet's run of failures
    assert other.snapshot().state == "open"
    wait_until(lambda: not succeeds(sick) and not sick.snapshot().isolated)
    assert sick.state == "open"
    other.reset()
    wait_until(lambda: succeeds(sick))


@LEASES
@pytest.mark.parametrize("action", ["force_closed", "reset"])
@pytest.mark.parametrize("by", ["itself", "another"])
def test_an_operator_ends_the_isolation(make: Make, lease: float, action: str, by: str) -> None:
    """Forced closed or reset, by whomever, an isolated instance admits calls again."""
    sick, other = (make(policy=TWO, lease=lease, **PATIENT) for _ in range(2))
    fail(sick, 3)
    rejects(sick)
    getattr(sick if by == "itself" else other, action)()
    wait_until(lambda: succeeds(sick))
    assert not sick.snapshot().isolated
    fail(sick, 2)
    assert sick.call(fine) == "fine"


@LEASES
def test_an_isolated_instance_forced_open(make: Make, lease: float) -> None:
    """Forced open by another, it is open like all, and closes with all."""
    sick, other = (make(policy=SHORT, lease=lease, **PATIENT) for _ in range(2))
    fail(sick, 3)
    other.force_open(LONG)
    wait_until(lambda: not succeeds(sick) and rejects(sick).retry_after > 3000)
    assert (sick.state, sick.snapshot().isolated) == ("open", False)
    other.reset()
    wait_until(lambda: succeeds(sick))


@LEASES
@pytest.mark.parametrize("fields", [{"enforce": False}, {"quorum": 1}])
def test_policies_reach_an_isolated_instance(make: Make, lease: float, fields: dict[str, Any]) -> None:
    """A policy that another instance sets reaches one that is isolated, before its own open time is over."""
    sick, operator = (make(policy=TWO, lease=lease, **PATIENT) for _ in range(2))
    fail(sick, 3)
    rejects(sick)
    operator.set_policy(**fields)
    wait_until(lambda: succeeds(sick))


@LEASES
def test_isolation_by_a_live_policy(make: Make, lease: float) -> None:
    """A threshold that another instance sets is the one by which an instance isolates itself."""
    sick, operator = (make(policy=Policy(failure_threshold=100, quorum=2), lease=lease, **PATIENT) for _ in range(2))
    fail(sick, 2)
    operator.set_policy(failure_threshold=4, reset_timeout=LONG)
    fail(sick)
    assert not sick.snapshot().isolated
    fail(sick)
    assert sick.snapshot().isolated
    assert rejects(sick).retry_after > 3000


def test_isolation_in_shadow_mode(make: Make) -> None:
    """In shadow mode an instance that fails alone is notified as isolated, and admits every call."""
    events: list[Event] = []
    policy = Policy(failure_threshold=2, quorum=2, reset_timeout=LONG, enforce=False)
    sick = make(policy=policy, listeners=[events.append], on_call=[events.append], **STRICT)
    fail(sick, 5)
    assert sick.call(fine) == "fine"
    assert sick.snapshot().isolated
    assert changes(events, "isolated") == [("closed", "open", "failure_threshold")]
    assert {event.enforced for event in events if event.kind == "rejected"} == {False}


def test_isolation_by_a_rate(make: Make) -> None:
    """An instance isolates itself by its own error rate, which the fleet's successes do not hide."""
    policy = Policy(failure_threshold=MANY, error_rate_threshold=0.5, minimum_calls=4, quorum=2, reset_timeout=LONG)
    sick, healthy = (make(policy=policy, **STRICT) for _ in range(2))
    for _ in range(2):
        for _ in range(10):
            healthy.call(fine)
        fail(sick)
        sick.call(fine)
    seen = sick.snapshot()
    assert (seen.isolated, seen.calls, seen.failures) == (True, 24, 2)
    rejects(sick)


def test_an_outage_while_isolated(shell: Make, own_server: EmbeddedServer) -> None:
    """An isolated instance goes on rejecting while Redis hangs, and is served by the fleet's state after that."""
    sick = shell(own_server.url, policy=TWO, lease=0, redis_timeout=0.3)
    fail(sick, 3)
    with stopped(own_server):
        assert rejects(sick).retry_after > 3000
        assert rejects(sick).state == "open"
        assert sick.snapshot().source == "local"
    wait_until(lambda: succeeds(sick))
    assert sick.snapshot().source == "redis"


@LEASES
def test_two_breakers_of_a_host_are_one_voice(make: Make, lease: float) -> None:
    """Breakers of one name in one process, or in processes of one host, do not reach a quorum; another host does."""
    for _ in range(4):
        fail(make(policy=TWO, lease=lease, **PATIENT), 3)
    seen = make(policy=TWO, **STRICT).snapshot()
    assert (seen.state, list(seen.reporters)) == ("closed", [socket.gethostname()])
    fail(make(policy=TWO, lease=lease, host="another", **PATIENT))
    assert make(policy=TWO, **STRICT).snapshot().state == "open"


def test_an_instance_names_its_process(make: Make) -> None:
    """It begins with host and process id, and differs between breakers: each knows its own transitions."""
    one, other = make(**STRICT), make(**STRICT)
    assert one.instance.startswith(f"{socket.gethostname()}:{os.getpid()}-")
    assert one.instance != other.instance
    named = make(host="h" * 200, policy=Policy(failure_threshold=1), **STRICT)
    fail(named)
    assert named.history()[0].instance == named.instance
    assert named.instance.startswith("h" * 150)


def test_no_quorum_for_one(shell: Make) -> None:
    """Without Redis there is nobody to wait for: the quorum is one, and it is simply open."""
    breaker = shell(None, policy=TWO, lease=0)
    fail(breaker, 3)
    seen = breaker.snapshot()
    assert (seen.state, seen.isolated, breaker.state) == ("open", False, "open")
    assert breaker.history()[0].reason == "failure_threshold"


@LEASES
def test_two_windows(make: Make, lease: float, caplog: pytest.LogCaptureFixture) -> None:
    """A client with a window of a minute trips at the twentieth call, whatever window another client asks for.

    The client with the shorter window warns once, and names the breaker and both windows.
    """
    policy = Policy(failure_threshold=MANY, error_rate_threshold=0.5, minimum_calls=20, reset_timeout=LONG)
    minute = make(policy=policy, lease=lease, **PATIENT)
    second = make(policy=dataclasses.replace(policy, window=1), lease=lease, **PATIENT)
    for _ in range(9):
        fail(minute)
        fail(second)
        time.sleep(0.15)  # more than a second in all
    fail(minute)
    assert minute.snapshot().state == "closed"
    fail(second)
    assert minute.snapshot().state == "open"
    warnings = [
        one.getMessage() for one in caplog.records if one.name == "pybreaker_redis" and one.levelname == "WARNING"
    ]
    assert len(warnings) == 1
    assert all(part in warnings[0] for part in ("'discovery'", "60 s", "1 s"))


# What a process knows by itself


@pytest.mark.parametrize("lease", [0, LONG])
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("way", ["call", "decorator", "block", "permit"])
def test_counts_of_every_way(make_any: Make, way: str, observed: bool, lease: float) -> None:
    """However a call is guarded, it is counted once, by its outcome; on_call receives as many events."""
    calls: list[Event] = []
    changes: list[Event] = []
    options = {"on_call": [calls.append], "listeners": [changes.append]} if observed else {}
    policy = Policy(failure_threshold=MANY, slow_call_duration=QUICK)
    guard, breaker = way_of(way), make_any(policy=policy, ignore=Skipped, lease=lease, **options, **PATIENT)
    assert nonzero(breaker.counts) == {}
    for func in (fine, fine, doze, boom, boom, boom, skip, fine):
        with contextlib.suppress(Boom, Skipped):
            guard(breaker, func)
    assert nonzero(breaker.counts) == {"successes": 4, "slow_successes": 1, "failures": 3, "ignored": 1}
    breaker.force_open()
    for _ in range(2):
        with pytest.raises(CircuitOpenError):
            guard(breaker, fine)
    counts = breaker.counts
    assert nonzero(counts) == {"successes": 4, "slow_successes": 1, "failures": 3, "ignored": 1, "rejected": 2}
    if observed:
        kinds = [event.kind for event in calls]
        found = [kinds.count(kind) for kind in ("success", "failure", "ignored", "rejected")]
        assert found == [4, 3, 1, 2]
        assert len([event for event in calls if event.kind == "success" and event.slow]) == 1
        assert [event.kind for event in changes] == ["state_change"]


@pytest.mark.parametrize("lease", [0, 0.001, LONG])
def test_counts_only_grow(make_any: Make, lease: float) -> None:
    """Over trips, probes, recoveries, forced states, resets and reports the counts never fall, and miss no call."""
    breaker = make_any(policy=Policy(failure_threshold=2, reset_timeout=0.01), lease=lease, **PATIENT)
    calls, before = 0, breaker.counts

    def call(func: Callable[[], Any]) -> bool:
        nonlocal calls, before
        calls += 1
        try:
            breaker.call(func)
        except CircuitOpenError:
            admitted = False
        except Boom:
            admitted = True
        else:
            admitted = True
        now = breaker.counts
        assert all(new >= old for new, old in zip(dataclasses.astuple(now), dataclasses.astuple(before), strict=True))
        assert now.successes + now.failures + now.ignored + now.rejected == calls
        before = now
        return admitted

    forced_open = functools.partial(breaker.force_open, 0.02)
    for steer in (breaker.flush, breaker.reset, breaker.force_closed, breaker.clear_forced, forced_open):
        for func in (fine, boom, fine, boom, boom):
            call(func)
        wait_until(lambda: call(fine))  # a probe, where it tripped
        call(boom)
        steer()
        call(fine)
    assert min(before.successes, before.failures) > 0


def test_counts_in_an_outage(shell: Make, own_server: EmbeddedServer) -> None:
    """What happens while Redis hangs is counted too."""
    breaker = shell(own_server.url, policy=Policy(failure_threshold=2), lease=0, redis_timeout=0.3)
    breaker.call(fine)
    with stopped(own_server):
        breaker.call(fine)
        fail(breaker, 2)
        rejects(breaker)
    assert nonzero(breaker.counts) == {"successes": 2, "failures": 2, "rejected": 1}


@pytest.mark.parametrize("lease", [0, LONG])
def test_state_never_asks(make_any: Make, client: redis.Redis, lease: float) -> None:
    """`state` and `counts` send no command, whatever the state, and however old the view."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=0.01), lease=lease, listed=False, **PATIENT)

    def known() -> str:
        client.config_resetstat()
        found = breaker.state
        assert min(dataclasses.astuple(breaker.counts)) >= 0
        assert set(client.info("commandstats")) <= {"cmdstat_config|resetstat", "cmdstat_info"}
        assert isinstance(found, str)
        return found

    def asked() -> int:
        return int(client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))

    assert known() == "closed"
    breaker.call(fine)
    if isinstance(breaker, CircuitBreaker) and breaker._line is not None and lease > 0:
        wait_until(lambda: asked() == 2)  # a thread reports the first success
    assert known() == "closed"
    fail(breaker)
    assert known() in ("open", "half_open")
    assert wait_until(lambda: known() == "half_open")
    breaker.call(fine)
    assert known() == "closed"


@pytest.mark.parametrize("lease", [0, LONG])
def test_state_is_open_for_as_long_as_calls_are_rejected(make_any: Make, lease: float) -> None:
    """An open circuit is "open" while it rejects, and "half_open" as soon as the time is over."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=LONG), lease=lease, **PATIENT)
    fail(breaker)
    assert breaker.state == "open"
    assert rejects(breaker).state == "open"
    breaker.reset()
    assert breaker.call(fine) == "fine"
    breaker.force_open(0.05)
    wait_until(lambda: breaker.state != "open")
    assert breaker.state == "half_open"
    assert breaker.snapshot().retry_after == 0
    assert breaker.call(fine) == "fine"
    assert breaker.state == "closed"


def test_state_after_the_time_of_an_open_circuit() -> None:
    """A reply that said open is half open from the end of its time on, not a moment later."""
    now = time.monotonic()
    clock = [now]
    view = View(LONG, now=lambda: clock[0])
    counts = {"failure_count": 1, "failure_number": 1, "source": "redis"}
    reply = {"state": "open", "generation": 1, "retry_after_ms": 1000, **counts}
    view.adopt(reply, now)
    assert view.state == "open"
    clock[0] = now + 0.999
    assert view.state == "open"
    clock[0] = now + 1.0
    assert view.state == "half_open"
    view.drop()
    assert view.state == "half_open"


def test_state_of_another_process_is_unknown(make: Make) -> None:
    """A new breaker says closed until it has asked, and then what it read."""
    fail(make(policy=Policy(failure_threshold=1, reset_timeout=LONG), **STRICT))
    other = make(**STRICT)
    assert other.state == "closed"
    assert other.snapshot().state == "open"
    rejects(other)
    assert other.state == "open"


def test_late_successes_trip_nothing(client: redis.Redis) -> None:
    """Successes from before failures of others end none of them, and do not trip by a threshold that nobody gave."""
    policy = Policy(failure_threshold=10)
    breaker = CircuitBreaker("discovery", redis=client, policy=policy, lease=600, redis_timeout=20)
    other = CircuitBreaker("discovery", redis=client, policy=policy, lease=0, redis_timeout=21)
    breaker.call(int)
    breaker.flush()
    wait_until(lambda: time.monotonic() - breaker._view._ended_at > 0.1)  # no longer reported as they end
    breaker.call(int)
    fail(other, 9)
    breaker.flush()
    assert (other.snapshot().state, other.snapshot().failure_count) == ("closed", 9)
    fail(other)
    assert other.snapshot().state == "open"


# History


def test_history_of_every_rule(make_any: Make) -> None:
    """Each entry tells when, whence, whither, why, the counts that caused it, generation and instance."""
    policy = Policy(
        failure_threshold=MANY, error_rate_threshold=0.5, minimum_calls=4, reset_timeout=0.001, success_threshold=2
    )
    breaker = make_any(policy=policy, **STRICT)
    for _ in range(2):
        breaker.call(fine)
        fail(breaker)
    for _ in range(2):
        wait_until(lambda: succeeds(breaker))
    breaker.force_open(LONG)
    breaker.reset()
    entries = breaker.history()[::-1]
    assert [(one.old, one.new, one.reason) for one in entries] == [
        ("closed", "open", "error_rate"),
        ("open", "half_open", "timeout"),
        ("half_open", "closed", "probe_succeeded"),
        ("closed", "open", "forced"),
        ("open", "closed", "reset"),
    ]
    trip, _, closed, *_ = entries
    assert (trip.calls, trip.failures, trip.slow, trip.failure_count) == (4, 2, 0, 1)
    assert (closed.success_count, closed.calls) == (2, None)
    assert {one.instance for one in entries} == {breaker.instance}
    assert [one.generation for one in entries] == sorted({one.generation for one in entries})
    times = [one.time for one in entries]
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 60
    assert breaker.history(2) == entries[::-1][:2]


def test_garbage_under_the_policy_key_is_logged_once(
    make: Make, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage is logged once, not with every call; after it was mended, new garbage is logged again."""
    breaker = make(**STRICT)
    for _ in range(2):
        client.set(breaker.keys.policy, "garbage")
        for _ in range(5):
            assert breaker.call(fine) == "fine"
        breaker.clear_policy()
        breaker.call(fine)
    logged = [record.getMessage() for record in caplog.records if "corrupt_policy" in record.getMessage()]
    assert len(logged) == 2
    assert all(breaker.keys.policy in message for message in logged)


def test_fields_that_do_not_fit_each_other(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """What would do nothing is refused, with what to do; what is in force already counts."""
    with pytest.raises(PolicyError, match="max_reset_timeout must be at least reset_timeout"):
        Policy(reset_timeout=60, max_reset_timeout=30)
    Policy(reset_timeout=60, max_reset_timeout=60)
    breaker = make_breaker()
    with pytest.raises(PolicyError, match="set both"):
        breaker.set_policy(slow_call_rate_threshold=0.5)
    breaker.set_policy(slow_call_rate_threshold=0.5, slow_call_duration=1.0)
    breaker.set_policy(slow_call_rate_threshold=0.6)
    breaker.clear_policy()


def test_an_override_whose_longest_open_time_is_too_short(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """The operator does not know each client's reset_timeout: the circuit opens for that, not for less."""
    breaker = make_breaker(policy=Policy(failure_threshold=1, reset_timeout=60))
    breaker.set_policy(max_reset_timeout=10)
    breaker.acquire().failure()
    assert 55 < breaker.snapshot().retry_after <= 60


def test_a_slow_call_that_is_cancelled_reports_with_calls_that_became_slow() -> None:
    """Two calls are slow while they run, a third is released after it was slow: each is one call, and slow."""
    clock = FakeClock()
    policy = Policy(slow_call_duration=1, slow_call_rate_threshold=1.0, minimum_calls=100, failure_threshold=MANY)
    breaker = CircuitBreaker("a", policy=policy, clock=clock)
    permits = [breaker.acquire() for _ in range(3)]
    clock.advance(2)
    permits[0].release()
    seen = breaker.snapshot()
    assert (seen.calls, seen.slow) == (3, 3)
    for permit in permits[1:]:
        permit.success()
    seen = breaker.snapshot()
    assert (seen.calls, seen.slow) == (3, 3)
