"""Retries by stamina around a breaker."""

from __future__ import annotations

import pytest

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy, PolicyError
from pybreaker_redis.testing import set_state

stamina = pytest.importorskip("stamina")

from pybreaker_redis.integrations.stamina import after_open, unless_open  # noqa: E402

from .failing import Service  # noqa: E402


def test_a_rejection_is_not_retried() -> None:
    """The service's errors are retried until the circuit opens; then the caller gets the rejection at once."""
    breaker = CircuitBreaker("payments", policy=Policy(failure_threshold=3, reset_timeout=30))
    service = Service(failures=100)
    with pytest.raises(CircuitOpenError):
        stamina.retry(on=unless_open(OSError), attempts=10, wait_initial=0, wait_max=0)(breaker(service))()
    assert service.calls == 3
    other = Service(failures=100)
    with pytest.raises(OSError, match="down"):
        stamina.retry(on=unless_open(ValueError), wait_initial=0)(other)()
    assert other.calls == 1


def test_a_caller_comes_back_for_the_probe() -> None:
    """After a rejection it waits for retry_after, then becomes the probe."""
    breaker = CircuitBreaker("payments", policy=Policy(failure_threshold=3, reset_timeout=0.3))
    service = Service(failures=3)
    on = after_open(OSError, jitter=0.05)
    assert stamina.retry(on=on, attempts=5, timeout=60, wait_initial=0, wait_max=0)(breaker(service))() == "fine"
    assert service.calls == 4  # three failures, one rejection, one probe
    assert breaker.state == "closed"


def test_what_the_hooks_say() -> None:
    """Seconds for a rejection, bounded and spread; else whether to retry."""
    breaker = CircuitBreaker("payments")
    set_state(breaker, "forced_open", duration=10)
    with pytest.raises(CircuitOpenError) as caught:
        breaker.call(int)
    said = [after_open(jitter=5)(caught.value) for _ in range(50)]
    assert all(9 <= seconds <= 15 for seconds in said)
    assert max(said) - min(said) > 1
    assert after_open(jitter=5, max=3)(caught.value) == 3
    assert after_open()(OSError()) is True
    assert after_open(ValueError)(OSError()) is False
    assert unless_open()(caught.value) is False
    assert unless_open()(OSError()) is True
    with pytest.raises(PolicyError):
        after_open(jitter=-1)
