"""A breaker's watch: its membership in the subscription of its link."""

from __future__ import annotations

import weakref
from typing import Any


class BaseWatch:
    """A breaker's membership in the subscription of its link; on asyncio, of each event loop that calls it."""

    __slots__ = ("_breaker", "_joined")

    def __init__(self, breaker: Any) -> None:
        self._breaker = breaker
        self._joined: tuple[weakref.ref[Any], ...] = ()  # subscriptions

    @property
    def active(self) -> bool:
        """Whether the subscription is connected now."""
        self._breaker._check_process()
        return any(joined.connected for joined in self._subscriptions())

    def _subscriptions(self) -> list[Any]:
        return [joined for one in self._joined if (joined := one()) is not None]

    def _join(self) -> None:
        """Join the subscription, unless the breaker has joined it already. The first breaker to join starts it."""
        if self._breaker._watch is self:
            subscription = self._breaker._redis.subscription()
            if subscription not in (joined := self._subscriptions()):
                self._joined = (*map(weakref.ref, joined), weakref.ref(subscription))
            subscription.join(self._breaker)

    def _leave(self) -> None:
        self._breaker._check_process()
        if self._breaker._watch is self:
            self._breaker._watch = None
        for subscription in self._subscriptions():
            subscription.leave(self._breaker)
        self._joined = ()

    def _after_fork(self) -> None:
        """In a child: the parent has the subscription; the next call joins one of this process."""
        self._joined = ()
