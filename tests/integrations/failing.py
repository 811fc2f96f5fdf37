"""A service that fails at first."""

from __future__ import annotations


class Service:
    """Fails a number of times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("down")
        return "fine"
