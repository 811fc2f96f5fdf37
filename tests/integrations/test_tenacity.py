"""Retries by tenacity around a breaker."""

from __future__ import annotations

import asyncio

import pytest

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy, PolicyError
from pybreaker_redis.testing import FakeClock, set_state

tenacity = pytest.importorskip("tenacity")

from pybreaker_redis.integrations.tenacity import retry_unless_open, wait_until_probe  # noqa: E402

from .failing import Service  # noqa: E402

POLICY = Policy(failure_threshold=3, reset_timeout=30)


def test_a_rejection_is_not_retried() -> None:
    """The service's errors are retried until the circuit opens; then the caller gets the rejection at once."""
    breaker = CircuitBreaker("payments", policy=POLICY)
    service, slept = Service(failures=100), list[float]()
    retried = tenacity.retry(
        retry=retry_unless_open(), stop=tenacity.stop_after_attempt(10), sleep=slept.append, reraise=True
    )(breaker(service))
    with pytest.raises(CircuitOpenError):
        retried()
    assert service.calls == 3
    assert len(slept) == 3
    slept.clear()
    with pytest.raises(CircuitOpenError):
        retried()
    assert (service.calls, slept) == (3, [])


def test_the_other_strategy_decides_the_rest() -> None:
    """An error that it does not name, and a result that it does."""
    breaker = CircuitBreaker("payments", policy=POLICY)
    service = Service(failures=100)
    only = retry_unless_open(tenacity.retry_if_exception_type(ValueError))
    with pytest.raises(OSError, match="down"):
        tenacity.Retrying(retry=only, reraise=True)(breaker(service))
    assert service.calls == 1
    results = iter([None, None, "fine"])
    by_result = tenacity.Retrying(retry=retry_unless_open(tenacity.retry_if_result(lambda result: result is None)))
    assert by_result(breaker(lambda: next(results))) == "fine"
    both = retry_unless_open() & tenacity.retry_if_not_exception_message(message="down")
    with pytest.raises(OSError, match="down"):
        tenacity.Retrying(retry=both, reraise=True)(breaker(Service(failures=1)))


def test_a_caller_waits_until_the_probe() -> None:
    """After a rejection it sleeps for retry_after and a jitter, then becomes the probe."""
    clock = FakeClock()
    breaker = CircuitBreaker("payments", policy=POLICY, clock=clock)
    service, slept = Service(failures=3), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.advance(seconds)

    retried = tenacity.Retrying(wait=wait_until_probe(tenacity.wait_fixed(0.5), jitter=2.0), sleep=sleep)
    assert retried(breaker(service)) == "fine"
    assert slept[:3] == [0.5, 0.5, 0.5]
    assert len(slept) == 4
    assert 29.4 <= slept[3] <= 31.5
    assert service.calls == 4


def test_the_wait_is_bounded() -> None:
    """max holds for rejections, whatever their retry_after."""
    breaker = CircuitBreaker("payments", clock=FakeClock())
    set_state(breaker, "forced_open")
    slept = list[float]()
    retried = tenacity.Retrying(
        wait=wait_until_probe(max=5), stop=tenacity.stop_after_attempt(3), sleep=slept.append, reraise=True
    )
    with pytest.raises(CircuitOpenError):
        retried(breaker(int))
    assert slept == [5, 5]
    for options in ({"jitter": -1.0}, {"max": -1.0}):
        with pytest.raises(PolicyError):
            wait_until_probe(**options)


def test_on_asyncio() -> None:
    """Both work with coroutines."""

    async def main() -> None:
        clock = FakeClock()
        breaker = AsyncCircuitBreaker("payments", policy=POLICY, clock=clock)
        service, slept = Service(failures=100), list[float]()

        async def call() -> str:
            return service()

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            clock.advance(seconds)

        with pytest.raises(CircuitOpenError):
            await tenacity.retry(retry=retry_unless_open(), sleep=sleep, reraise=True)(breaker(call))()
        assert service.calls == 3
        service.failures = 0
        slept.clear()
        assert await tenacity.retry(wait=wait_until_probe(jitter=0), sleep=sleep)(breaker(call))() == "fine"
        assert slept == [30.0]

    asyncio.run(main())
