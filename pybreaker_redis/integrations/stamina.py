"""Retries by stamina around a breaker: give up while the circuit is open, or come back when it probes.

    @stamina.retry(on=unless_open(httpx.HTTPError))
    @breaker
    def charge(order): ...

Put the retries outside of the breaker, so that it counts every attempt.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .. import CircuitOpenError, PolicyError

__all__ = ["after_open", "unless_open"]


def unless_open(*errors: type[Exception]) -> Callable[[Exception], bool]:
    """For stamina's `on`: retries these errors, but not a call that a breaker rejected. Default: every Exception."""
    retried = errors or (Exception,)

    def on(error: Exception) -> bool:
        return not isinstance(error, CircuitOpenError) and isinstance(error, retried)

    return on


def after_open(
    *errors: type[Exception], jitter: float = 1.0, max: float = 300.0
) -> Callable[[Exception], bool | float]:
    """For stamina's `on`: retries these errors, and a rejection once a call may be admitted again. A rejection counts
    as an attempt, so give `attempts=None` and a `timeout`.

    errors: default: every Exception. jitter: longest random delay in seconds, so that callers do not all come back at
    once. max: longest wait after a rejection, in seconds.

    Raises PolicyError for a jitter or max below zero.
    """
    if not jitter >= 0 or not max >= 0:
        raise PolicyError(f"jitter and max must be zero or more seconds, not {jitter!r} and {max!r}")
    retried = errors or (Exception,)

    def on(error: Exception) -> bool | float:
        if isinstance(error, CircuitOpenError):
            return min(error.retry_after + random.uniform(0, jitter), max)
        return isinstance(error, retried)

    return on
