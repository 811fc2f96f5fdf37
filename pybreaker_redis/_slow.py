"""Calls that become slow while they run: a hanging service is noticed before its calls return."""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from ._view import View


class Call(Protocol):
    """What is needed of a permit. pending_since: when the call was reported as slow while it ran."""

    started: float
    pending_since: float | None


class SlowCalls:
    """The running calls that may still become slow, oldest first. Empty where the policy measures no duration."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._running: dict[Call, None] = {}

    def after_fork(self) -> None:
        """In a child: the parent's calls are the parent's to report."""
        self._running = {}

    def began(self, call: Call) -> None:
        """A call begins."""
        if self._view.policy.slow_call_duration is not None:
            self._running[call] = None

    def ended(self, call: Call) -> tuple[bool | None, bool]:
        """Whether the call was slow (None: not measured), and whether that was reported while it ran."""
        waiting = self._running.pop(call, call) is None  # else overdue() has it
        now, limit = monotonic(), self._view.policy.slow_call_duration
        # a call that was reported longer ago has left the window, and counts as a new one
        recent = call.pending_since is not None and now - call.pending_since < 0.9 * self._view.policy.window
        pending = recent and not waiting
        return None if limit is None else pending or now - call.started >= limit, pending

    def ended_quickly(self, call: Call) -> bool:
        """Whether the call was not slow; False leaves it to ended()."""
        limit = self._view.policy.slow_call_duration
        if limit is None:
            return True
        return monotonic() - call.started < limit and self._running.pop(call, call) is None

    def overdue(self) -> list[Call]:
        """The running calls that became slow since the last look; each is given to one caller, once."""
        found: list[Call] = []
        limit = self._view.policy.slow_call_duration
        while limit is not None and self._running:
            try:
                call = next(iter(self._running))
            except (StopIteration, RuntimeError):  # another thread removed one just now
                continue
            if call.started > monotonic() - limit:
                break
            call.pending_since = monotonic()
            if self._running.pop(call, call) is None:
                found.append(call)
        return found
