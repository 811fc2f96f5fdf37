"""Calls that become slow while they run: a hanging service is noticed before its calls return."""

from __future__ import annotations

import contextlib

from ._clock import age
from ._permit import BasePermit
from ._view import View

_NONE: dict[BasePermit, None] = {}  # of most breakers


class SlowCalls:
    """The running calls that may still become slow, oldest first. Empty unless the policy measures durations."""

    __slots__ = ("_running", "_view")

    def __init__(self, view: View) -> None:
        self._view = view
        self._running = _NONE

    def after_fork(self) -> None:
        """In a child: start empty, since the parent reports its own calls."""
        self._running = _NONE

    def began(self, permit: BasePermit) -> None:
        """Track the call of a permit if the policy measures durations."""
        if self._view.policy.slow_call_duration is not None:
            if self._running is _NONE:
                with self._view.lock:
                    self._running = {} if self._running is _NONE else self._running
            self._running[permit] = None

    def ended(self, permit: BasePermit) -> tuple[bool | None, bool]:
        """Whether the call was slow (None: not measured), and whether that was reported while it ran."""
        limit = self._view.policy.slow_call_duration
        if limit is None and not self._running and permit._pending_since is None:
            return None, False
        now = self._view.now()
        slow = None if limit is None else now - permit.started >= limit
        if self._running.pop(permit, permit) is None or permit._pending_since is None:
            return slow, False
        # overdue() has taken it. A call that was reported longer ago has left the window, and counts as a new one.
        window = float("inf") if permit.probe is not None else 0.9 * self._view.policy.window
        pending = now - permit._pending_since < window
        return slow if slow is None else pending or slow, pending

    def first_overdue(self) -> BasePermit | None:
        """The oldest running call, if it has become slow since overdue() was called."""
        limit = self._view.policy.slow_call_duration
        while limit is not None and self._running:
            with contextlib.suppress(StopIteration, RuntimeError):  # another thread removed one just now
                oldest = next(iter(self._running))
                return oldest if age(oldest.started, self._view.now()) >= limit else None
        return None

    def overdue(self) -> list[BasePermit]:
        """Take the running calls that have become slow. Each is returned once, to one caller."""
        found: list[BasePermit] = []
        while (permit := self.first_overdue()) is not None:
            permit._pending_since = self._view.now()
            if self._running.pop(permit, permit) is None:
                found.append(permit)
        return found
