"""A circuit breaker that lives in Redis and is shared by every process that guards the same service."""

from ._async import AsyncCircuitBreaker, AsyncPermit, AsyncWatch
from ._classify import Classification
from ._config import Config
from ._errors import (
    CircuitBreakerError,
    CircuitOpenError,
    ConfigError,
    ForcedStateError,
    PermitError,
    PolicyError,
    RedisUnavailableError,
)
from ._events import Counts, Event
from ._manager import AsyncCircuitBreakerManager, CircuitBreakerManager
from ._policy import Policy
from ._protocol import HistoryEntry, Snapshot
from ._sync import CircuitBreaker, Permit, Watch

__all__ = [
    "AsyncCircuitBreaker",
    "AsyncCircuitBreakerManager",
    "AsyncPermit",
    "AsyncWatch",
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitBreakerManager",
    "CircuitOpenError",
    "Classification",
    "Config",
    "ConfigError",
    "Counts",
    "Event",
    "ForcedStateError",
    "HistoryEntry",
    "Permit",
    "PermitError",
    "Policy",
    "PolicyError",
    "RedisUnavailableError",
    "Snapshot",
    "Watch",
]
