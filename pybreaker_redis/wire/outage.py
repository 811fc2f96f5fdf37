"""An outage: why Redis cannot be used, and when to retry it. No I/O."""

from __future__ import annotations

import random
import threading
from time import monotonic

from .._clock import age

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # seconds between two retries


def longest_exchange(timeout: float) -> float:
    """Seconds after which any exchange has ended, connecting included. timeout: redis_timeout."""
    return LONGEST_PAUSE + 10 * timeout


class Outage:
    """Why a server, a node of a cluster or a single breaker cannot be used, and when to retry it.

    error: kept without its tracebacks: they would keep what the callers had in hand for as long as the outage.
    patience: seconds after which a retry that has not ended may be claimed again. abandoned: whether the last retry has
    not ended.
    """

    def __init__(self, error: BaseException, patience: float) -> None:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self.error, self.abandoned = error, False
        self._patience, self._pause = patience, FIRST_PAUSE
        self._lock = threading.RLock()
        self.failed_again()

    def is_due(self) -> bool:
        """Whether it is time for a retry."""
        return age(self._waits_since, monotonic()) >= self._waits_for

    def claim(self) -> bool:
        """Whether the caller should retry. If that retry never ends, another caller may claim it later."""
        with self._lock:
            due = self.is_due()
            if due:
                self.abandoned, self._waits_since, self._waits_for = True, monotonic(), self._patience
            return due

    def failed_again(self) -> None:
        """Wait for the next retry, longer each time."""
        with self._lock:
            self.abandoned = False
            self._waits_since, self._waits_for = monotonic(), self._pause * random.uniform(0.75, 1.25)
            self._pause = min(self._pause * 2, LONGEST_PAUSE)

    def give_up(self) -> None:
        """Note that a retry was cancelled: the next caller may claim it."""
        self._waits_for = 0.0
