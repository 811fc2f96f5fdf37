"""What a client may decide alone for a while: the view, its lease, the gathered successes, classification.

Knows neither Redis nor a loop; the sync and the asyncio shell share it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import enum
import itertools
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from ._protocol import Reply, Request, State

EventKind: TypeAlias = Literal[
    "state_change", "success", "failure", "ignored", "rejected", "redis_error", "redis_restored"
]
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError, KeyboardInterrupt, GeneratorExit)
NEVER = float("-inf")


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


class Counter:
    """The successes gathered under one generation. tick() counts one, atomically and without a lock."""

    __slots__ = ("_looks", "_taken", "tick")

    def __init__(self) -> None:
        self.tick = itertools.count(1).__next__
        self._looks = 0
        self._taken = 0

    def take(self) -> int:
        """The successes since the last take; one caller at a time. Looking ticks too, and is subtracted."""
        self._looks += 1
        total = self.tick() - self._looks
        new, self._taken = total - self._taken, total
        return new


@dataclasses.dataclass(slots=True)
class Seen:
    """One reply, never changed but swapped whole. Times are seconds of the monotonic clock.

    closed_until, open_until: how long it admits or rejects without asking, which is all of the fast path.
    """

    state: State
    generation: int
    failure_count: int
    sent: float
    arrived: float
    retry_at: float
    closed_until: float
    open_until: float
    counter: Counter

    def verdict(self, now: float) -> Verdict:
        """What it says however old it is."""
        if self.state == "closed":
            return Verdict.ADMIT
        return Verdict.REJECT if self.state == "open" and now < self.retry_at else Verdict.ASK


def nothing_seen() -> Seen:
    """Before the first reply: too old for anything."""
    return Seen("closed", 0, 0, NEVER, NEVER, NEVER, NEVER, NEVER, Counter())


class View:
    """The state as last heard, good for `lease` seconds, and the successes gathered under its generation."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self.seen = nothing_seen()
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In a child: the gathered successes are the parent's to report, and its lock may be held."""
        self._lock = threading.Lock()
        self.seen.counter.take()

    def decide(self, seen: Seen, now: float) -> Verdict:
        """What to do with a call that arrives now."""
        if self.lease <= 0:
            return Verdict.ASK
        verdict, age = seen.verdict(now), now - seen.sent
        if verdict is Verdict.ASK or age < self.lease:
            return verdict
        return Verdict.REFRESH if age < 2 * self.lease else Verdict.WAIT

    def adopt(self, reply: Reply, sent: float, now: float) -> None:
        """Take a reply as the view, unless a newer one came in between."""
        with self._lock:
            seen, state, generation = self.seen, reply["state"], reply["generation"]
            # a lower generation is news only from a request that began after the last reply was here
            if sent < (seen.arrived if generation < seen.generation else seen.sent) and generation <= seen.generation:
                return
            retry_at = now + (reply.get("retry_after_ms") or 0) / 1000
            fresh_until = sent + self.lease if self.lease > 0 else NEVER
            self.seen = Seen(
                state,
                generation,
                reply["failure_count"],
                sent,
                now,
                retry_at,
                fresh_until if state == "closed" else NEVER,
                min(fresh_until, retry_at) if state == "open" else NEVER,
                # outcomes of an earlier generation count for nothing: they stay behind in its counter
                seen.counter if generation == seen.generation else Counter(),
            )

    def drop(self) -> None:
        """Trust the view no longer: the next call asks. What was gathered stays, its generation may live on."""
        with self._lock:
            self.seen = dataclasses.replace(
                self.seen, sent=NEVER, arrived=NEVER, retry_at=NEVER, closed_until=NEVER, open_until=NEVER
            )

    def gather(self, generation: int) -> bool:
        """Count one success locally; False where it has to be reported at once."""
        if self.lease <= 0:
            return False
        seen = self.seen
        if generation == seen.generation:
            seen.counter.tick()
        return True

    def take(self, generation: int | None = None) -> Request:
        """What was gathered, as a request; it is out of the view from here on.

        generation: take nothing unless the view is of this one.
        """
        with self._lock:
            seen = self.seen
            if generation is not None and generation != seen.generation:
                return {"generation": generation}
            gathered = seen.counter.take()
        return {"generation": seen.generation, "successes": gathered} if gathered else {"generation": seen.generation}


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
