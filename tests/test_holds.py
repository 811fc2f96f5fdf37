"""Holds as a user sees them: the service itself said when to come back, and the circuit opens for that time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from conftest import stopped, wait_until
from test_policies import (
    LONG,
    MANY,
    PATIENT,
    QUICK,
    STRICT,
    Boom,
    Make,
    changes,
    fail,
    fine,
    make,
    make_any,
    rejects,
    shell,
    succeeds,
)

from pybreaker_redis import CircuitBreaker, CircuitBreakerManager, Classification, Config, Event, Policy, PolicyError
from pybreaker_redis.embedded import EmbeddedServer

__all__ = ["make", "make_any", "shell"]  # fixtures
LEASES = pytest.mark.parametrize("lease", [0, LONG])


class TooManyError(Exception):
    """429, with Retry-After."""

    def __init__(self, retry_after: Any) -> None:
        super().__init__("429 Too Many Requests")
        self.retry_after = retry_after


def wait_of(ended: Any) -> Any:
    """What an exception or a result says of when to come back."""
    return getattr(ended, "retry_after", None)


def too_many(retry_after: Any = 7) -> Callable[[], Any]:
    """A call that is told to come back later."""

    def call() -> None:
        raise TooManyError(retry_after)

    return call


def is_held(breaker: Any, longest: float = 7) -> bool:
    """Whether it rejects calls, for this long at most, by a hold that is its only transition."""
    error = rejects(breaker)
    assert longest - 5 < error.retry_after <= longest
    return [entry.reason for entry in breaker.history()] == ["held"] and error.state == "open"


@LEASES
def test_a_permit_that_says_when_to_come_back(make_any: Make, lease: float) -> None:
    """One failure with retry_after opens the circuit for that time, whatever the threshold."""
    breaker = make_any(lease=lease, **PATIENT)
    breaker.acquire().failure(TooManyError(7), retry_after=7)
    assert is_held(breaker)
    assert breaker.snapshot().trips == 0


@LEASES
@pytest.mark.parametrize("way", ["call", "decorated", "block", "permit"])
def test_an_exception_that_says_when_to_come_back(make_any: Make, way: str, lease: float) -> None:
    """The option retry_after is asked about the exception of every kind of guard."""
    breaker = make_any(retry_after=wait_of, lease=lease, **PATIENT)
    if way == "permit":
        breaker.acquire().failure(TooManyError(7))
    else:
        guard = {"call": breaker.call, "block": breaker.block, "decorated": lambda func: breaker.decorated(func)()}[way]
        with pytest.raises(TooManyError):
            guard(too_many())
    assert is_held(breaker)
    assert breaker.counts.failures == 1


@LEASES
def test_a_result_that_says_when_to_come_back(make_any: Make, lease: float) -> None:
    """A response need not be an exception."""
    breaker = make_any(retry_after=wait_of, lease=lease, **PATIENT)
    assert breaker.call(fine) == "fine"
    response = TooManyError(7)
    assert breaker.call(lambda: response) is response
    assert is_held(breaker)
    assert (breaker.counts.successes, breaker.counts.failures) == (1, 1)


@LEASES
@pytest.mark.parametrize("retry_after", [None, 0, -1, math.nan, -math.inf, "0"])
def test_no_hold(make_any: Make, retry_after: Any, lease: float) -> None:
    """Zero or less, or NaN, is no hold: the failure counts as one."""
    breaker = make_any(policy=Policy(failure_threshold=2), retry_after=wait_of, lease=lease, **PATIENT)
    breaker.acquire().failure(retry_after=retry_after)
    with pytest.raises(TooManyError):
        breaker.call(too_many(retry_after))
    assert breaker.history()[0].reason == "failure_threshold"


@pytest.mark.parametrize(("retry_after", "lasts"), [("7", 7), (1e300, 20), (math.inf, 20), (20.001, 20), (1e-9, 20)])
def test_how_long_a_hold_is(make_any: Make, retry_after: Any, lasts: float) -> None:
    """A header's text is a number, too. What is longer than max_hold is cut, and the shortest hold is a millisecond."""
    breaker = make_any(policy=Policy(max_hold=20), **STRICT)
    breaker.acquire().failure(retry_after=retry_after)
    assert 0 <= breaker.snapshot().retry_after <= lasts
    assert [entry.reason for entry in breaker.history()] == ["held"]


def test_what_is_no_number(make_any: Make) -> None:
    """A permit refuses what is no number, and can still be settled."""
    breaker = make_any(policy=Policy(failure_threshold=1), **STRICT)
    permit = breaker.acquire()
    with pytest.raises(PolicyError, match="'Wed, 21 Oct 2015 07:28:00 GMT'"):
        permit.failure(retry_after="Wed, 21 Oct 2015 07:28:00 GMT")
    permit.success()
    assert breaker.state == "closed"


@pytest.mark.parametrize("wrong", ["soon", [7], ZeroDivisionError()])
def test_a_function_that_fails(make_any: Make, wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A function that raises, or returns what is no number, is logged once; the call counts as it would without."""

    def function(ended: Any) -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    breaker = make_any(policy=Policy(failure_threshold=2), retry_after=function, **STRICT)
    assert breaker.call(fine) == "fine"
    fail(breaker, 2)
    assert rejects(breaker).state == "open"
    assert breaker.history()[0].reason == "failure_threshold"
    assert len([one for one in caplog.records if "retry_after= of 'discovery' failed" in one.getMessage()]) == 1


@pytest.mark.parametrize("wrong", [7, "7"])
def test_an_option_of_a_wrong_kind(shell: Make, wrong: Any) -> None:
    """retry_after= is a plain function."""
    with pytest.raises(PolicyError, match="retry_after must be a plain function"):
        shell(None, retry_after=wrong)


def test_ignored_exceptions_hold_nothing(make_any: Make) -> None:
    """What counts as nothing says nothing; an exception outside failures may."""
    breaker = make_any(retry_after=wait_of, ignore=TooManyError, failures=Boom, **STRICT)
    with pytest.raises(TooManyError):
        breaker.call(too_many())
    assert breaker.snapshot().state == "closed"
    answers = make_any(retry_after=wait_of, failures=Boom, **STRICT)
    with pytest.raises(TooManyError):
        answers.call(too_many())
    assert is_held(answers)


def test_a_group_holds_as_long_as_its_longest(make_any: Make) -> None:
    """Of a group of exceptions the longest wait counts."""
    breaker = make_any(retry_after=wait_of, **STRICT)

    def group() -> None:
        raise ExceptionGroup("several", [Boom(), TooManyError(3), ExceptionGroup("more", [TooManyError(7)])])

    with pytest.raises(ExceptionGroup):
        breaker.call(group)
    assert is_held(breaker)


@LEASES
def test_one_hold_of_eight_instances(make: Make, lease: float) -> None:
    """However many instances report it, a hold is one transition with one event, and lasts as long as the longest."""
    events: list[Event] = []
    breakers = [make(lease=lease, listeners=[events.append], **PATIENT) for _ in range(8)]
    permits = [breaker.acquire() for breaker in breakers]
    for wait, permit in enumerate(permits, 20):
        permit.failure(retry_after=wait)
    assert [entry.reason for entry in breakers[0].history()] == ["held"]
    assert len(changes(events, "redis")) == 1
    assert 20 < breakers[0].snapshot().retry_after <= 27
    assert all(rejects(breaker).state == "open" for breaker in breakers)


@LEASES
def test_a_forced_state_stays(make: Make, lease: float) -> None:
    """Calls that were admitted before an operator forced a state, or under it, leave it alone."""
    breaker = make(lease=lease, **PATIENT)
    before = breaker.acquire()
    breaker.force_closed(600)
    before.failure(retry_after=7)
    breaker.acquire().failure(retry_after=7)
    seen = breaker.snapshot()
    assert (seen.state, seen.forced) == ("closed", "closed")
    assert [entry.reason for entry in breaker.history()] == ["forced"]


@pytest.mark.parametrize("lease", [0, 0.005])
def test_below_the_quorum(make: Make, lease: float) -> None:
    """A hold that one host reports holds only the process itself; with another host's it holds the fleet."""
    policy = Policy(quorum=2)
    held, other = (make(policy=policy, lease=lease, host=host, **PATIENT) for host in ("held", "other"))
    for wait in (7, 20):  # the second extends the first
        permit = held.acquire() if wait == 7 else None
        if permit:
            more = held.acquire()
            permit.failure(retry_after=wait)
        else:
            more.failure(retry_after=wait)
        assert wait - 5 < rejects(held).retry_after <= wait
    assert other.call(fine) == "fine"
    assert held.snapshot().isolated
    assert other.snapshot().state == "closed"
    other.acquire().failure(retry_after=7)
    assert is_held(other)


def test_a_held_probe_opens_again(make_any: Make) -> None:
    """In half open, a held call is a failed probe, which opens for the longer of the two times."""
    breaker = make_any(policy=Policy(reset_timeout=3, probe_failure_threshold=9), retry_after=wait_of, **STRICT)
    breaker.force_open(0.001)
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    with pytest.raises(TooManyError):
        breaker.call(too_many())
    seen = breaker.snapshot()
    assert (seen.state, seen.trips, seen.failure_count, seen.retry_after > 3) == ("open", 1, 1, True)
    assert breaker.history()[0].reason == "held"


def test_after_a_hold(make_any: Make) -> None:
    """A hold that is over ends with a probe, as any open period does."""
    breaker = make_any(**STRICT)
    breaker.acquire().failure(retry_after=0.001)
    wait_until(lambda: succeeds(breaker))
    assert [entry.reason for entry in breaker.history()] == ["probe_succeeded", "timeout", "held"]


def test_a_held_call_that_was_slow(make_any: Make) -> None:
    """It counts as a slow call, whether or not that was reported while it ran."""
    policy = Policy(failure_threshold=MANY, slow_call_duration=QUICK, slow_call_rate_threshold=1, max_hold=0.001)
    breaker = make_any(policy=policy, **STRICT)
    permits = [breaker.acquire() for _ in range(2)]
    time.sleep(1.1 * QUICK)
    breaker.acquire().success()  # reports both as slow
    assert breaker.snapshot().slow == 2
    breaker.set_policy(max_hold=0)
    for permit in permits:
        permit.failure(retry_after=7)
    late = breaker.acquire()
    time.sleep(1.1 * QUICK)
    late.failure(retry_after=7)
    seen = breaker.snapshot()
    assert (seen.calls, seen.failures, seen.slow, seen.state) == (4, 0, 3, "closed")


def test_nested_guards_hold_once(make: Make) -> None:
    """The outer guard counts no failure of a call that the inner guard has held."""
    inner, outer = make(retry_after=wait_of, **STRICT), make(policy=Policy(failure_threshold=1), **STRICT)
    permit = outer.acquire()
    with pytest.raises(TooManyError) as caught:
        inner.call(too_many())
    assert outer._innermost.has_counted(caught.value, permit.started)
    permit.release()
    assert is_held(outer)


def test_a_hold_in_shadow_mode(make_any: Make) -> None:
    """The circuit opens, and admits every call."""
    breaker = make_any(policy=Policy(enforce=False), **STRICT)
    breaker.acquire().failure(retry_after=7)
    assert breaker.call(fine) == "fine"
    assert (breaker.snapshot().state, breaker.history()[0].reason) == ("open", "held")


def test_a_hold_in_an_outage(shell: Make, own_server: EmbeddedServer) -> None:
    """While Redis is down, the process holds by itself; a hold that it knew goes on."""
    breaker = shell(own_server.url, lease=0, redis_timeout=0.05)
    breaker.call(fine)
    with stopped(own_server):
        breaker.acquire().failure(retry_after=7)
        assert 2 < rejects(breaker).retry_after <= 7
        assert breaker.snapshot().source == "local"


def test_managers_hold(client: redis.Redis) -> None:
    """The option is the manager's, for every service, or a service's own."""
    own = {"own": Classification(retry_after=lambda ended: 20)}
    manager = CircuitBreakerManager(Config(watch=False), retry_after=wait_of, classify=own)
    for service, longest in (("other", 7), ("own", 20)):
        with pytest.raises(TooManyError):
            manager.call(service, too_many())
        assert is_held(manager.get_or_create(service), longest)


def test_without_the_option_nothing_is_asked() -> None:
    """A breaker without the option counts successes as before; with it, each result is looked at."""
    assert CircuitBreaker("discovery")._only_counts
    assert not CircuitBreaker("discovery", retry_after=wait_of)._only_counts


def test_an_ignored_error_in_a_group(make_any: Make) -> None:
    """retry_after= is not asked about it there either; about the others it is."""
    breaker = make_any(failures=Boom, ignore=TooManyError, retry_after=wait_of, **PATIENT)

    def group(*errors: Exception) -> Callable[[], Any]:
        def call() -> None:
            raise ExceptionGroup("several", errors)

        return call

    with pytest.raises(ExceptionGroup):
        breaker.call(group(TooManyError(7), Boom()))
    assert breaker.snapshot().state == "closed"
    held = Boom()
    held.retry_after = 7  # type: ignore[attr-defined]
    with pytest.raises(ExceptionGroup):
        breaker.call(group(TooManyError(70), held))
    assert is_held(breaker)
