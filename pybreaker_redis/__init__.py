"""A circuit breaker that lives in Redis and is shared by every process that guards the same service."""

from ._async import AsyncCircuitBreaker, AsyncPermit, AsyncWatch
from ._errors import CircuitBreakerError, CircuitOpenError, ConfigError, PermitError, PolicyError, RedisUnavailableError
from ._manager import AsyncCircuitBreakerManager, CircuitBreakerManager, Config
from ._policy import Policy
from ._protocol import HistoryEntry, Snapshot
from ._sync import CircuitBreaker, Permit, Watch
from ._view import Event

__all__ = [
    "AsyncCircuitBreaker",
    "AsyncCircuitBreakerManager",
    "AsyncPermit",
    "AsyncWatch",
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitBreakerManager",
    "CircuitOpenError",
    "Config",
    "ConfigError",
    "Event",
    "HistoryEntry",
    "Permit",
    "PermitError",
    "Policy",
    "PolicyError",
    "RedisUnavailableError",
    "Snapshot",
    "Watch",
]
