"""Helpers for tests of code that uses breakers: a clock that the test moves, and functions that set a breaker's state.

The pytest fixtures of this module's plugin, `breakers` and `breaker_redis`, are described in docs/how-to/testing.md.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, get_args

from . import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerManager,
    PolicyError,
    RedisUnavailableError,
)

__all__ = ["Breakers", "FakeClock", "SettableState", "aset_state", "set_state"]

SettableState: TypeAlias = Literal["closed", "open", "half_open", "forced_open", "forced_closed"]
"""The states that set_state() takes."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_MOST_FAILURES = 10_000  # reported to open a circuit


class FakeClock:
    """A clock that stands still until advance(). For `clock=` of breakers and managers in memory, which read it by
    monotonic() and now_ms().

    start: Unix seconds; default: now.

        breaker = CircuitBreaker("payments", policy=Policy(reset_timeout=30), clock=(clock := FakeClock()))
    """

    def __init__(self, start: float | None = None) -> None:
        self._start_ns = time.time_ns() if start is None else round(start * 1e9)
        self._passed_ns = 0
        self._look = itertools.count(1).__next__

    def advance(self, seconds: float) -> None:
        """Let these seconds pass. Within a guarded call, the call takes that long. Raises PolicyError below zero."""
        if not seconds >= 0:
            raise PolicyError(f"a clock advances by zero or more seconds, not by {seconds!r}")
        self._passed_ns += round(seconds * 1e9)

    def monotonic(self) -> float:
        """Seconds since the start. Each reading adds a nanosecond, so that no two readings are equal."""
        return (self._passed_ns + self._look()) / 1e9

    def now_ms(self) -> int:
        """Unix time in milliseconds, for the state machine."""
        return (self._start_ns + self._passed_ns) // 1_000_000

    def __repr__(self) -> str:
        return f"<FakeClock +{self._passed_ns / 1e9:g} s>"


def set_state(breaker: CircuitBreaker, state: SettableState, *, duration: float | None = None) -> None:
    """Put a breaker into a state, on Redis or in memory. Its counts are dropped; its history stays.

    closed: its initial state. open: tripped by failures, for as long as its policy says. half_open: the next call is a
    probe. forced_open, forced_closed: as by an operator, for `duration` seconds; default and maximum: 30 days.

    Raises PolicyError if the state takes no duration, and RedisUnavailableError if Redis does not answer. Raises
    CircuitBreakerError if the failures of this process do not open the circuit, for example because of a quorum.
    """
    _check(breaker, CircuitBreaker, state, duration)
    breaker.reset()
    if state == "open":
        for _ in range(_failures_to_open(breaker)):
            if breaker.state != "closed":
                break
            breaker.acquire().failure()
        _check_open(breaker)
    elif state == "half_open":
        breaker.force_open()
        breaker.clear_forced()
    elif state == "forced_open":
        breaker.force_open(duration)
    elif state == "forced_closed":
        breaker.force_closed(duration)


async def aset_state(breaker: AsyncCircuitBreaker, state: SettableState, *, duration: float | None = None) -> None:
    """set_state for an AsyncCircuitBreaker."""
    _check(breaker, AsyncCircuitBreaker, state, duration)
    await breaker.reset()
    if state == "open":
        for _ in range(_failures_to_open(breaker)):
            if breaker.state != "closed":
                break
            await (await breaker.acquire()).failure()
        _check_open(breaker)
    elif state == "half_open":
        await breaker.force_open()
        await breaker.clear_forced()
    elif state == "forced_open":
        await breaker.force_open(duration)
    elif state == "forced_closed":
        await breaker.force_closed(duration)


def _typed_as(made: Callable[_P, _T]) -> Callable[[Callable[..., _T]], Callable[Concatenate[Any, _P], _T]]:
    """A decorator that changes only how type checkers see a method: with the parameters of what it makes."""
    return lambda method: method


class Breakers:
    """Breakers in memory on one fake clock, `clock`. The fixture `breakers` makes a new one for each test."""

    def __init__(self) -> None:
        self.clock = FakeClock()

    @_typed_as(CircuitBreaker)
    def __call__(self, name: str, **options: Any) -> CircuitBreaker:
        """A new CircuitBreaker with these options, but neither redis nor clock."""
        return CircuitBreaker(name, clock=self.clock, **options)

    @_typed_as(AsyncCircuitBreaker)
    def async_breaker(self, name: str, **options: Any) -> AsyncCircuitBreaker:
        """A new AsyncCircuitBreaker with these options, but neither redis nor clock."""
        return AsyncCircuitBreaker(name, clock=self.clock, **options)

    @_typed_as(CircuitBreakerManager)
    def manager(self, config: Any = None, **options: Any) -> CircuitBreakerManager:
        """A new CircuitBreakerManager with these arguments, but no clock."""
        return CircuitBreakerManager(config, clock=self.clock, **options)

    @_typed_as(AsyncCircuitBreakerManager)
    def async_manager(self, config: Any = None, **options: Any) -> AsyncCircuitBreakerManager:
        """A new AsyncCircuitBreakerManager with these arguments, but no clock."""
        return AsyncCircuitBreakerManager(config, clock=self.clock, **options)


def _check(breaker: object, kind: type, state: object, duration: float | None) -> None:
    if isinstance(breaker, (CircuitBreakerManager, AsyncCircuitBreakerManager)):
        function = "set_state" if isinstance(breaker, CircuitBreakerManager) else "await aset_state"
        raise PolicyError(
            f"a manager has no state, but its breakers have: use {function}(manager.get_or_create(NAME), ...)"
        )
    if not isinstance(breaker, kind):
        raise PolicyError(
            f"{breaker!r} is not a {kind.__name__}: set_state() is for CircuitBreaker, aset_state() for asyncio"
        )
    if state not in get_args(SettableState):
        raise PolicyError(f"state must be one of {', '.join(get_args(SettableState))}, not {state!r}")
    if duration is not None and state not in ("forced_open", "forced_closed"):
        raise PolicyError(f"only forced states have a duration: the policy says how long a circuit stays {state}")


def _failures_to_open(breaker: CircuitBreaker | AsyncCircuitBreaker) -> int:
    return min(breaker.policy.failure_threshold, _MOST_FAILURES)


def _check_open(breaker: CircuitBreaker | AsyncCircuitBreaker) -> None:
    if breaker._memory is None and breaker._own_engine() is not None:
        raise RedisUnavailableError(f"Redis did not answer {breaker!r} in time: raise redis_timeout= on a slow machine")
    if breaker.state != "open":
        raise CircuitBreakerError(
            f"{breaker!r} is {breaker.state} after {_failures_to_open(breaker)} failures: its policy needs more than"
            " failures of this process; use 'forced_open'"
        )
