"""The one tree of errors that this package raises."""

from __future__ import annotations


class CircuitBreakerError(Exception):
    """Base of every error that this package raises."""


class PolicyError(CircuitBreakerError, ValueError):
    """A name, policy or option that makes no sense; nothing was changed."""


class ConfigError(CircuitBreakerError, ValueError):
    """A configuration that cannot be read or makes no sense; the message names its file, the field and the reason."""


class PermitError(CircuitBreakerError, RuntimeError):
    """A permit was settled or entered a second time, or acquire() of an asyncio breaker was not awaited."""


class RedisUnavailableError(CircuitBreakerError):
    """An operator's action could not reach Redis; it was not carried out locally instead."""


class CircuitOpenError(CircuitBreakerError):
    """The call was rejected; the protected function did not run.

    Attributes: name; state ("open", "half_open", or "closed" where a ramp holds the call back); retry_after,
    seconds until a call may be admitted: while open until the next probe, in half_open until the nearest probe's
    slot is free again at the latest, thus up to probe_timeout.
    """

    def __init__(self, name: str, state: str, retry_after: float) -> None:
        super().__init__(name, state, retry_after)
        self.name = name
        self.state = state
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"circuit breaker {self.name!r} is {self.state}; retry after {self.retry_after:.3f} s"
