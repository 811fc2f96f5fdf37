"""The errors of this package, in one tree."""

from __future__ import annotations


class CircuitBreakerError(Exception):
    """Base of every error that this package raises."""


class PolicyError(CircuitBreakerError, ValueError):
    """A name, policy field or option has an invalid value. Nothing was changed."""


class ConfigError(CircuitBreakerError, ValueError):
    """A configuration cannot be read, or has an invalid value. The message names the file, the field and the reason."""


class PermitError(CircuitBreakerError, RuntimeError):
    """A permit was entered or settled twice, or acquire() of an asyncio breaker was not awaited."""


class RedisUnavailableError(CircuitBreakerError):
    """An operator's action or history() could not reach Redis. Nothing was changed locally."""


class ForcedStateError(CircuitBreakerError):
    """probe() was called while a state is forced. Nothing was changed: call clear_forced() first."""


class CircuitOpenError(CircuitBreakerError):
    """The call was rejected, and the guarded function did not run.

    name: the name of the breaker. state: "open", "half_open", or "closed" during the ramp after a recovery.
    retry_after: seconds after which to try again. While open: until the next probe. While half open: the time for which
    the probes have been running, at least 0.1 s, at most until the next slot expires. During a ramp: until it ends.
    reason: why the state last changed, as in HistoryEntry; None while closed. error: type and message of the failure
    that opened the circuit, as in "ConnectionError: refused", or None.

    A class can inherit from it and from another library's error, so that handlers of either catch a rejection.
    """

    def __init__(
        self, name: str, state: str, retry_after: float, reason: str | None = None, error: str | None = None
    ) -> None:
        Exception.__init__(
            self, name, state, retry_after, reason, error
        )  # not super(): another base may want other arguments
        self.name = name
        self.state = state
        self.retry_after = retry_after
        self.reason = reason
        self.error = error

    def __str__(self) -> str:
        cause = ": ".join(filter(None, (self.reason, self.error)))
        why = f" ({cause})" if cause else ""
        return f"circuit breaker {self.name!r} is {self.state}{why}; retry after {self.retry_after:.3f} s"


# Pickles and tracebacks name the public module.
for _error in (CircuitBreakerError, *CircuitBreakerError.__subclasses__()):
    _error.__module__ = "pybreaker_redis"
