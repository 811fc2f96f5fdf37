"""A circuit breaker that lives in Redis and is shared by every process that guards the same service."""

from ._async import AsyncCircuitBreaker, AsyncPermit, AsyncWatch
from ._classify import Classification
from ._clock import Clock
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
from ._events import Counts, Event, EventKind, Listener
from ._manager import AsyncCircuitBreakerManager, CircuitBreakerManager
from ._policy import Policy
from ._protocol import HistoryEntry, Snapshot, State
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
    "Clock",
    "Config",
    "ConfigError",
    "Counts",
    "Event",
    "EventKind",
    "ForcedStateError",
    "HistoryEntry",
    "Listener",
    "Permit",
    "PermitError",
    "Policy",
    "PolicyError",
    "RedisUnavailableError",
    "Snapshot",
    "State",
    "Watch",
]
