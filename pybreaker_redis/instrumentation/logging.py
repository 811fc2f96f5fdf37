"""One log record for each transition and each outage of Redis, for programs to read."""

from __future__ import annotations

import logging
from typing import Any

from .._events import Event

__all__ = ["LoggingListener"]


class LoggingListener:
    """A listener that logs stable event names as messages, and the facts as fields of the record (`extra`).

    logger: by default the one called `pybreaker_redis.events`.

    - `circuit_breaker.state_change`: a warning when the circuit opens, else info; logged by the one process that caused
      the transition. Fields: breaker, old_state, new_state, reason, error, generation, source, instance,
      counts.
    - `circuit_breaker.redis_error`: a warning, once for each outage. Fields: breaker, instance, error_type.
    - `circuit_breaker.redis_restored`: info. Fields: breaker, instance.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("pybreaker_redis.events")

    def __call__(self, event: Event) -> None:
        fields: dict[str, Any] = {"breaker": event.breaker, "instance": event.instance}
        level = logging.INFO
        if event.kind == "state_change" and event.source != "watch":
            level = logging.WARNING if event.new == "open" else logging.INFO
            fields |= {"old_state": event.old, "new_state": event.new, "reason": event.reason}
            fields |= {
                "error": event.error,
                "generation": event.generation,
                "source": event.source,
                "counts": event.counts,
            }
        elif event.kind == "redis_error":
            level = logging.WARNING
            fields["error_type"] = type(event.exception).__name__
        elif event.kind != "redis_restored":
            return
        self._logger.log(level, f"circuit_breaker.{event.kind}", extra=fields)
