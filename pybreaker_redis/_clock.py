"""Times on the monotonic clock, which a test may freeze, far in the future or the past, and let go again.

Each deadline is therefore kept as a beginning and a length: one that began in the future is due.
"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

NEVER = float("-inf")


class Clock(Protocol):
    """The clock of a breaker in memory, if it is not the machine's: pybreaker_redis.testing.FakeClock."""

    def monotonic(self) -> float: ...
    def now_ms(self) -> int: ...


def machine() -> float:
    """The machine's clock, which a test may patch in this module at any time."""
    return monotonic()


def age(since: float, now: float) -> float:
    """Seconds since then; infinite if then is in the future, since the clock was turned back meanwhile.

    Read the clock after what other threads may set: age(self.used_at, monotonic()), in this order.
    """
    return now - since if since <= now else float("inf")
