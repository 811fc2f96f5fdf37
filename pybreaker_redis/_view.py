"""What a client may decide alone for a while: the view, its lease, the gathered successes, classification.

Knows neither Redis nor a loop; the sync and the asyncio shell share it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import enum
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from ._protocol import Reply, Request, State, seconds

EventKind: TypeAlias = Literal[
    "state_change", "success", "failure", "ignored", "rejected", "redis_error", "redis_restored"
]
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError, KeyboardInterrupt, GeneratorExit)


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What a listener is told. Fields that do not concern the kind are None.

    kind: what happened. breaker: its name. old, new, reason, generation, counts: of a state_change, told to
    exactly one client of the fleet. retry_after: seconds, of a rejection. exception: of a failure, an ignored
    call or a redis_error. instance: who tells. source: "redis", "memory" or "local" (Redis is down).
    """

    kind: EventKind
    breaker: str
    instance: str
    old: State | None = None
    new: State | None = None
    reason: str | None = None
    generation: int | None = None
    counts: dict[str, int] | None = None
    retry_after: float | None = None
    exception: BaseException | None = None
    source: str | None = None


class Verdict(enum.Enum):
    """What the view says of the next call."""

    ADMIT = 1  # go ahead
    REJECT = 2  # the circuit is open
    REFRESH = 3  # one caller asks, the others go on by the old view
    WAIT = 4  # too old for anybody: one caller asks, the others wait for it
    ASK = 5  # every caller asks


class Outcome(enum.Enum):
    """What a call that ended means for the breaker."""

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORED = "ignored"


@dataclasses.dataclass(slots=True)
class _Seen:
    """The last reply. Times are in seconds of the monotonic clock."""

    state: State
    generation: int
    failure_count: int
    sent: float
    retry_at: float


class View:
    """The state as last heard, good for `lease` seconds, and the successes gathered under its generation."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self.seen: _Seen | None = None
        self.closed_until = float("-inf")  # the whole of the fast path: closed and fresh
        self.generation = 0
        self._gathered = 0
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In a child: the gathered successes are the parent's to report, and its locks may be held."""
        self._lock = threading.Lock()
        self._gathered = 0

    def decide(self, now: float) -> Verdict:
        """What to do with a call that arrives now."""
        seen = self.seen
        if self.lease <= 0:
            return Verdict.ASK
        if seen is None:
            return Verdict.WAIT
        if seen.state == "half_open" or (seen.state == "open" and now >= seen.retry_at):
            return Verdict.ASK
        age = now - seen.sent
        if age < self.lease:
            return self.by_old_view(seen)
        return Verdict.REFRESH if age < 2 * self.lease else Verdict.WAIT

    def by_old_view(self, seen: _Seen) -> Verdict:
        """What the view says however old it is."""
        return Verdict.ADMIT if seen.state == "closed" else Verdict.REJECT

    def adopt(self, reply: Reply, sent: float, now: float) -> None:
        """Take a reply as the view, unless a newer one came in between."""
        with self._lock:
            seen, generation = self.seen, reply["generation"]
            if seen is not None and generation <= seen.generation and sent < seen.sent:
                return
            if generation != self.generation:
                self._gathered = 0  # outcomes of an earlier generation count for nothing
            self.generation = generation
            retry_at = now + (seconds(reply.get("retry_after_ms")) or 0.0)
            self.seen = _Seen(reply["state"], generation, reply["failure_count"], sent, retry_at)
            self.closed_until = sent + self.lease if reply["state"] == "closed" and self.lease > 0 else float("-inf")

    def drop(self) -> None:
        """Forget the view: the next call asks."""
        with self._lock:
            self.seen, self.closed_until = None, float("-inf")

    def gather(self, generation: int) -> bool:
        """Count one success locally; False where it has to be reported at once."""
        if self.lease <= 0:
            return False
        with self._lock:
            if generation == self.generation:
                self._gathered += 1
        return True

    def take(self) -> Request:
        """The gathered successes for a request; they are out of the view from here on."""
        with self._lock:
            gathered, self._gathered = self._gathered, 0
            return {"generation": self.generation, "successes": gathered} if gathered else {}


@dataclasses.dataclass(frozen=True, slots=True)
class Classifier:
    """Which outcomes count, and as what."""

    failures: type[BaseException] | tuple[type[BaseException], ...]
    ignore: tuple[type[BaseException], ...]
    is_failure: Callable[[Any], bool] | None

    def of_exception(self, exception: BaseException) -> Outcome:
        """A cancelled or ignored call counts as nothing; an exception outside `failures` is an answer."""
        if isinstance(exception, (*CANCELLED, *self.ignore)):
            return Outcome.IGNORED
        if isinstance(exception, self.failures):
            return Outcome.FAILURE
        return Outcome.SUCCESS if isinstance(exception, Exception) else Outcome.IGNORED

    def of_result(self, result: Any) -> Outcome:
        """A result that the predicate calls a failure is one; an exception in the predicate is the caller's."""
        if self.is_failure is not None and self.is_failure(result):
            return Outcome.FAILURE
        return Outcome.SUCCESS
