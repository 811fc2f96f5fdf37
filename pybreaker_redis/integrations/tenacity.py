"""Retries by tenacity around a breaker: give up while the circuit is open, or wait until it probes.

    @tenacity.retry(retry=retry_unless_open(), stop=stop_after_attempt(3), wait=wait_random_exponential())
    @breaker
    def charge(order): ...

Put the retries outside of the breaker, so that it counts every attempt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from .. import CircuitOpenError, PolicyError
from .._extras import needs_extra

with needs_extra(__name__, "tenacity"):
    from tenacity import RetryCallState, retry_if_exception_type, wait_none
    from tenacity.retry import retry_base
    from tenacity.wait import wait_base

__all__ = ["retry_unless_open", "wait_until_probe"]

_Retry: TypeAlias = Callable[[RetryCallState], bool]
_Wait: TypeAlias = Callable[[RetryCallState], float]


class retry_unless_open(retry_base):
    """Retries as another strategy says, but never a call that a breaker rejected.

    retry: the other strategy, not a coroutine function; default: retry every Exception.
    """

    def __init__(self, retry: _Retry = retry_if_exception_type()) -> None:  # noqa: B008, it is immutable
        self.retry = retry

    def __call__(self, retry_state: RetryCallState) -> bool:
        """Whether to try again."""
        return _rejection(retry_state) is None and self.retry(retry_state)


class wait_until_probe(wait_base):
    """Waits after a rejection until a call may be admitted, plus a random time; otherwise as another strategy says.

    Use it with a `retry` that retries rejections, as the default of tenacity does, and with a `stop` by time:
    a rejection counts as an attempt.
    wait: the other strategy; default: no wait. jitter: longest random delay in seconds, so that callers
    do not all come back at once. max: longest wait after a rejection, in seconds.

    Raises PolicyError for a jitter or max below zero.
    """

    def __init__(self, wait: _Wait = wait_none(), *, jitter: float = 1.0, max: float = 300.0) -> None:  # noqa: B008
        if not jitter >= 0 or not max >= 0:
            raise PolicyError(f"jitter and max must be zero or more seconds, not {jitter!r} and {max!r}")
        self.wait, self.jitter, self.max = wait, jitter, max

    def __call__(self, retry_state: RetryCallState) -> float:
        """Seconds to wait before the next attempt."""
        rejected = _rejection(retry_state)
        if rejected is None:
            return self.wait(retry_state)
        return min(rejected.retry_after + random.uniform(0, self.jitter), self.max)


def _rejection(retry_state: RetryCallState) -> CircuitOpenError | None:
    if retry_state.outcome is None or not retry_state.outcome.failed:
        return None
    error = retry_state.outcome.exception()
    return error if isinstance(error, CircuitOpenError) else None
