"""What happens in the demo, and when."""

from __future__ import annotations

GUARDS = {"none": "no breaker", "private": "a private breaker per process", "shared": "one shared breaker"}
_DEATH = (("healthy", 0.5), ("dead", 3.0), ("repaired", 1.0))
_WHOLE = (("healthy", 1.0), ("failing", 1.5), ("dead", 3.0), ("repaired", 1.5))
PHASES = {"none": _DEATH, "private": _DEATH, "shared": _WHOLE}  # of the service, with their seconds
FAILS_EVERY = 4  # while failing: every fourth call of each worker
PAUSE = 0.02  # seconds between two calls of a worker, on average
TICK = 0.1  # seconds between two reports of a worker
RESET_TIMEOUT = 0.5


def failure_threshold(workers: int) -> int:
    """More than the workers: in the failing phase, a worker has a success between any two failures of its own."""
    return workers + 1
