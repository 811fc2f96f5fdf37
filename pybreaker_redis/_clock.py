"""Times on the monotonic clock. A test may freeze that clock far in the future or the past, and release it again.

Each deadline is therefore kept as a beginning and a length. A deadline whose beginning is in the future is due.
"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

NEVER = float("-inf")


class Clock(Protocol):
    """A clock for a breaker in memory, in place of the machine's. See pybreaker_redis.testing.FakeClock."""

    def monotonic(self) -> float: ...
    def now_ms(self) -> int: ...


def machine() -> float:
    """The machine's clock. Looks up monotonic at each call, since a test may patch it in this module."""
    return monotonic()


def age(since: float, now: float) -> float:
    """Seconds since a time; infinite if that time is in the future, because the clock was turned back meanwhile.

    If another thread may set the time, read it before the clock: age(self.used_at, monotonic()), in this order.
    """
    return now - since if since <= now else float("inf")
