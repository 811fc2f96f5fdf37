"""A circuit breaker that lives in Redis and is shared by every process that guards the same service."""

from ._async import AsyncCircuitBreaker, AsyncPermit
from ._errors import CircuitBreakerError, CircuitOpenError, PermitError, PolicyError, RedisUnavailableError
from ._policy import Policy
from ._protocol import HistoryEntry, Snapshot
from ._sync import CircuitBreaker, Permit
from ._view import Event

__all__ = [
    "AsyncCircuitBreaker",
    "AsyncPermit",
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitOpenError",
    "Event",
    "HistoryEntry",
    "Permit",
    "PermitError",
    "Policy",
    "PolicyError",
    "RedisUnavailableError",
    "Snapshot",
]
