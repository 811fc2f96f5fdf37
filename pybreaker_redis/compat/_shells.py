"""One breaker in both shells: blocking for functions, and asyncio for coroutine functions."""

from __future__ import annotations

from typing import Any

from .. import AsyncCircuitBreaker, CircuitBreaker, Policy
from .._core import BreakerCore
from .._view import Seen
from ..wire.options import ASYNCIO, client_like


class Shells:
    """A CircuitBreaker, and an AsyncCircuitBreaker of the same state, which is made when it is first used.

    memory: a breaker in memory whose state they share. options: of both. Raises PolicyError.
    """

    def __init__(self, name: str, redis: Any = None, *, memory: CircuitBreaker | None = None, **options: Any) -> None:
        self._name, self._redis, self._options = name, redis, options
        self.sync = CircuitBreaker(name, redis=redis, **options)
        if memory is not None:
            self.sync._share_memory(memory)
        self._asyncio: AsyncCircuitBreaker | None = None

    @property
    def asyncio(self) -> AsyncCircuitBreaker:
        """The shell for coroutine functions. Raises PolicyError if there is no asyncio client like the given one."""
        if self._asyncio is None:
            client = None if self._redis is None else client_like(self._redis, ASYNCIO)
            breaker = AsyncCircuitBreaker(self._name, redis=client, **self._options)
            if client is None:
                breaker._share_memory(self.sync)
            self._asyncio = breaker
        return self._asyncio

    def follow(self, policy: Policy) -> None:
        """Follow another policy from now on."""
        self._options["policy"] = policy
        self.sync._follow(policy)
        if self._asyncio is not None:
            self._asyncio._follow(policy)

    def latest(self) -> BreakerCore:
        """The shell that has read the state last."""
        sync, other = self.sync, self._asyncio
        return sync if other is None or sync._view.seen.sent >= other._view.seen.sent else other

    def seen(self) -> Seen:
        """The state as this process last read it."""
        return (self.sync if self._asyncio is None else self.latest())._view.seen

    def failure_count(self) -> int:
        """Failures in a row, as this process last read them."""
        in_memory = self._redis is None  # there, the view does not follow them
        return self.sync.snapshot().failure_count if in_memory else self.seen().failure_count

    def drop(self) -> None:
        """Let the next call of either shell read the state."""
        self.sync._view.drop()
        if self._asyncio is not None:
            self._asyncio._view.drop()
