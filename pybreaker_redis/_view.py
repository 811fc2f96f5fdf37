"""What a client may decide alone for a while: the view, its lease, the gathered successes, classification.

Knows neither Redis nor a loop; the sync and the asyncio shell share it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import enum
import itertools
import random
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Literal, TypeAlias

from ._policy import Policy
from ._protocol import Reply, Request, State

EventKind: TypeAlias = Literal[
    "state_change", "success", "failure", "ignored", "rejected", "redis_error", "redis_restored"
]
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError, KeyboardInterrupt, GeneratorExit)
NEVER, FOREVER = float("-inf"), float("inf")
FIRST_SHARE = 0.1  # of the calls, right after a recovery with a ramp


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What a listener is told. Fields that do not concern the kind are None.

    kind: what happened. breaker: its name. old, new, reason, generation, counts: of a state_change, told to
    exactly one client of the fleet (and to those that watch, with source "watch"). retry_after: seconds, of a
    rejection. enforced: False for a rejection in shadow mode, where the call was admitted all the same.
    exception: of a failure, an ignored call or a redis_error. slow: of a success or failure, whether it took
    slow_call_duration; None where that is not measured. instance: whose doing it was. source: "redis", "memory",
    "local" (Redis is down), "isolated" (this instance fails alone, below the quorum) or "watch".
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
    slow: bool | None = None
    enforced: bool | None = None


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

    def look(self) -> int:
        """The successes since the last take; one caller at a time. Looking ticks too, and is subtracted."""
        self._looks += 1
        return self.tick() - self._looks - self._taken

    def take(self) -> int:
        """The same, and they are taken."""
        new = self.look()
        self._taken += new
        return new

    def give_back(self, successes: int) -> None:
        """They were taken, but not reported; one caller at a time."""
        self._taken -= successes


class Flight:
    """One admitted call: the generation and probe slot it runs under, and when it began.

    generation: 0 counts for nothing. pending: when it was reported as slow while it ran. over: it has ended.
    """

    __slots__ = ("generation", "over", "pending", "probe", "started")

    def __init__(self, generation: int, probe: int | None, started: float) -> None:
        self.generation = generation
        self.probe = probe
        self.started = started
        self.pending: float | None = None
        self.over = False


@dataclasses.dataclass(slots=True)
class Seen:
    """One reply, swapped whole; only the ends of its trust move. Times are seconds of the monotonic clock.

    closed_until, open_until: how long it admits or rejects without asking, which is all of the fast path;
    timed_until: the same as closed_until where slow calls are measured. ramp_until: when a recovery is complete.
    """

    state: State
    generation: int
    failure_count: int
    sent: float
    arrived: float
    retry_at: float
    ramp_until: float
    closed_until: float
    timed_until: float
    open_until: float
    counter: Counter

    def verdict(self, now: float) -> Verdict:
        """What it says however old it is."""
        if self.state == "closed":
            return Verdict.ADMIT
        return Verdict.REJECT if self.state == "open" and now < self.retry_at else Verdict.ASK


def unseen(
    state: State = "closed",
    generation: int = 0,
    failure_count: int = 0,
    counter: Counter | None = None,
    retry_at: float = NEVER,
) -> Seen:
    """Too old for anything: before the first reply, or one that is trusted no longer."""
    return Seen(
        state,
        generation,
        failure_count,
        sent=NEVER,
        arrived=NEVER,
        retry_at=retry_at,
        ramp_until=NEVER,
        closed_until=NEVER,
        timed_until=NEVER,
        open_until=NEVER,
        counter=counter or Counter(),
    )


class View:
    """The state as last heard, good for `lease` seconds, and what was gathered under its generation.

    policy: in force, with what an operator set for the fleet.
    """

    def __init__(self, lease: float, policy: Policy | None = None) -> None:
        self.lease = self.short_lease = lease
        self.trusted_until = FOREVER  # until when a lease may be long; a subscription moves it on while it stands
        self.policy = policy or Policy()
        self.seen = unseen()
        self._flights: dict[Flight, None] = {}  # those that may still become slow, oldest first
        # every lock is re-entrant: a signal handler or a finalizer may call the breaker amid the work of its own thread
        self._lock = threading.RLock()
        self._not_before = NEVER  # a reply to a request that was sent earlier is trusted no longer

    def after_fork(self) -> None:
        """In a child: what was gathered and what flies is the parent's to report, and its lock may be held."""
        self._lock = threading.RLock()
        self._flights = {}
        self.seen.counter.take()

    def decide(self, seen: Seen, now: float) -> Verdict:
        """What to do with a call that arrives now."""
        if self.lease <= 0:
            return Verdict.ASK
        verdict, age, lease = seen.verdict(now), now - seen.sent, self.lease_at(now)
        if verdict is Verdict.ASK or age < lease:
            return verdict
        return Verdict.REFRESH if age < 2 * lease else Verdict.WAIT

    def lease_at(self, now: float) -> float:
        """The lease that holds now."""
        return self.lease if now < self.trusted_until else self.short_lease

    def trust(self, until: float) -> None:
        """A subscription stands: a long lease holds until then. One that has died in any way says so no more."""
        self.trusted_until, seen = until, self.seen
        fresh_until = self._fresh_until(seen.sent)
        if seen.closed_until > NEVER:
            seen.closed_until = fresh_until
        if seen.timed_until > NEVER:
            seen.timed_until = fresh_until
        if seen.open_until > NEVER:
            seen.open_until = min(fresh_until, seen.retry_at)

    def _fresh_until(self, sent: float) -> float:
        return max(min(sent + self.lease, self.trusted_until), sent + self.short_lease)

    def held_back(self, ramp_left: float) -> bool:
        """Whether the ramp after a recovery rejects this call; ramp_left: seconds to its end."""
        ramp_up = self.policy.ramp_up
        if ramp_left <= 0 or ramp_up <= 0 or not self.policy.enforce:
            return False
        return random.random() >= FIRST_SHARE + (1 - FIRST_SHARE) * (1 - ramp_left / ramp_up)

    def adopt(self, reply: Reply, sent: float, now: float) -> None:
        """Take a reply as the view, unless a newer one came in between."""
        seen, generation = self.seen, reply["generation"]
        if self.lease <= 0 and generation == seen.generation and reply["failure_count"] == seen.failure_count:
            return  # nobody goes by the view, and it would be the same
        with self._lock:
            seen = self.seen
            # a lower generation is news only from a request that began after the last reply was here
            since = seen.arrived if generation < seen.generation else seen.sent
            if sent < since and generation <= seen.generation and not reply.get("isolated"):
                return
            if sent < self._not_before:
                return
            self.seen = self._seen_from(reply, sent, now)

    def _seen_from(self, reply: Reply, sent: float, now: float) -> Seen:
        state, generation = reply["state"], reply["generation"]
        retry_at = now + (reply.get("retry_after_ms") or 0) / 1000
        ramp_until = now + (reply.get("ramp_left_ms") or 0) / 1000
        fresh_until = self._fresh_until(sent) if self.lease > 0 else NEVER
        closed_until = fresh_until if state == "closed" and ramp_until <= now else NEVER
        timed = self.policy.slow_call_duration is not None
        return Seen(
            state,
            generation,
            reply["failure_count"],
            sent,
            now,
            retry_at,
            ramp_until,
            NEVER if timed else closed_until,
            closed_until if timed else NEVER,
            min(fresh_until, retry_at) if state == "open" and self.policy.enforce else NEVER,
            # outcomes of an earlier generation count for nothing: they stay behind in its counter
            self.seen.counter if generation == self.seen.generation else Counter(),
        )

    def drop(self) -> None:
        """Trust the view no longer: the next call asks. What was gathered stays, its generation may live on."""
        with self._lock:
            seen, self._not_before = self.seen, monotonic()
            self.seen = unseen(seen.state, seen.generation, seen.failure_count, seen.counter, seen.retry_at)

    def gather(self, generation: int) -> bool:
        """Count one success locally; False where it has to be reported at once."""
        if self.lease <= 0:
            return False
        seen = self.seen
        if generation == seen.generation:
            seen.counter.tick()
        return True

    def gathered(self) -> int:
        """The successes that wait to be taken."""
        with self._lock:
            return self.seen.counter.look()

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

    def give_back(self, request: Request) -> None:
        """This request was never sent: what was taken for it is still to be reported, if its generation lives."""
        with self._lock:
            if request.get("generation") == self.seen.generation:
                self.seen.counter.give_back(request.get("successes", 0))

    # Flights, where slow calls are measured

    def take_off(self, generation: int, probe: int | None, now: float) -> Flight:
        """A call begins."""
        flight = Flight(generation, probe, now)
        if self.policy.slow_call_duration is not None:
            self._flights[flight] = None
        return flight

    def land(self, flight: Flight) -> tuple[bool | None, bool]:
        """A call ended: whether it was slow (None: not measured), and whether that was reported while it ran."""
        flight.over = True
        registered = self._flights.pop(flight, flight) is None  # else overdue() has it
        now, limit = monotonic(), self.policy.slow_call_duration
        # what was reported longer ago has left the window: it is a call of now again
        pending = flight.pending is not None and not registered and now - flight.pending < 0.9 * self.policy.window
        return None if limit is None else pending or now - flight.started >= limit, pending

    def lands_well(self, flight: Flight) -> bool:
        """A quick success is counted and done with; False, and nothing done, for any other."""
        limit = self.policy.slow_call_duration
        if limit is None or flight.probe is not None or self.lease <= 0 or monotonic() - flight.started >= limit:
            return False
        return self._flights.pop(flight, flight) is None and self.gather(flight.generation)

    def overdue(self) -> list[Flight]:
        """The calls in flight that became slow since the last look; each is given to one caller, once."""
        found: list[Flight] = []
        limit = self.policy.slow_call_duration
        while limit is not None and self._flights:
            try:
                flight = next(iter(self._flights))
            except (StopIteration, RuntimeError):  # another thread took one just now
                continue
            if flight.started > monotonic() - limit:
                break
            flight.pending = monotonic()
            if self._flights.pop(flight, flight) is None:
                found.append(flight)
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Classifier:
    """Which outcomes count, and as what."""

    failures: tuple[type[BaseException], ...]
    ignore: tuple[type[BaseException], ...]
    is_failure: Callable[[Any], bool] | None

    def of_exception(self, exception: BaseException) -> Outcome:
        """A cancelled or ignored call counts as nothing; an exception outside `failures` is an answer."""
        if isinstance(exception, (*CANCELLED, *self.ignore)):
            return Outcome.IGNORED
        if isinstance(exception, self.failures):
            return Outcome.FAILURE
        if isinstance(exception, BaseExceptionGroup):  # of a TaskGroup: the worst of what it holds
            found = {self.of_exception(one) for one in exception.exceptions}
            return next(one for one in (Outcome.FAILURE, Outcome.SUCCESS, Outcome.IGNORED) if one in found)
        return Outcome.SUCCESS if isinstance(exception, Exception) else Outcome.IGNORED

    def of_result(self, result: Any) -> Outcome:
        """A result that the predicate calls a failure is one; an exception in the predicate is the caller's."""
        if self.is_failure is not None and self.is_failure(result):
            return Outcome.FAILURE
        return Outcome.SUCCESS
