"""The view: what a process may decide without asking Redis, for one lease, and the successes gathered meanwhile.

Knows neither Redis nor an event loop; the sync and the asyncio shell share it.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
import random
import threading
from collections.abc import Callable
from time import monotonic

from ._policy import Policy
from ._protocol import Reply, Request, State

NEVER, FOREVER = float("-inf"), float("inf")
MOST_COUNTERS = 64
FIRST_SHARE = 0.1  # of the calls, right after a recovery with a ramp


class Verdict(enum.Enum):
    """What the view says about the next call."""

    ADMIT = 1  # go ahead
    REJECT = 2  # the circuit is open
    REFRESH = 3  # one caller asks Redis, the others use the old view
    WAIT = 4  # too old to use: one caller asks Redis, the others wait for the reply
    ASK = 5  # every caller asks Redis


class Counter:
    """The successes of one generation. tick() counts one, atomically and without a lock.

    Reading ticks too; `_reads` subtracts that. One thread reads at a time.
    """

    __slots__ = ("_reads", "_taken", "tick")

    def __init__(self) -> None:
        self.tick = itertools.count(1).__next__
        self._reads = 0
        self._taken = 0

    def total(self) -> int:
        """All successes ever counted."""
        self._reads = reads = self._reads + 1  # kept: a signal handler may read again after the tick
        return self.tick() - reads

    def take(self) -> int:
        """The successes since the last take."""
        total = self.total()
        # not below zero: a signal handler may have taken them meanwhile. No call from here on: it would let one in
        new = total - self._taken if total > self._taken else 0
        self._taken += new
        return new

    def give_back(self, successes: int) -> None:
        """Return successes that were taken but not reported."""
        self._taken -= successes


@dataclasses.dataclass(slots=True)
class Seen:
    """One reply. A later one replaces it; until then only _renew() and trust() change it. Times: the monotonic clock.

    closed_until, open_until: until when calls are admitted or rejected without asking Redis; the fast path reads only
    these. timed_until: replaces closed_until if calls are timed. ramp_until: the end of the ramp after a recovery.
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
    tick: Callable[[], int]  # the counter's

    def verdict(self, now: float) -> Verdict:
        """The verdict of this reply, whatever its age."""
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
    """A Seen that is too old to use: before the first reply, or after drop()."""
    counter = counter or Counter()
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
        counter=counter,
        tick=counter.tick,
    )


class View:
    """The last reply, good for `lease` seconds, and the successes gathered under its generation.

    policy: the policy in force, with any policy override.
    """

    def __init__(self, lease: float, policy: Policy | None = None) -> None:
        self.lease = self.short_lease = lease
        self.trusted_until = FOREVER  # end of the long lease; a subscription that stands keeps moving it
        self.policy = policy or Policy()
        self.seen = unseen()
        # counters of earlier generations, which running calls may still tick, and the sum of even older ones
        self._earlier: collections.deque[Counter] = collections.deque()
        self._earlier_successes = 0
        # re-entrant, like every lock here: a signal handler or finalizer may call the breaker while its thread holds it
        self._lock = threading.RLock()
        self._not_before = NEVER  # replies to requests sent earlier are not adopted

    def after_fork(self) -> None:
        """In a child: drop the gathered successes, which the parent reports, and the lock, which it may hold."""
        self._lock = threading.RLock()
        self.seen.counter.take()
        self._earlier_successes -= self.successes()

    @property
    def state(self) -> State:
        """The state as last read. An open circuit counts as half open once its open period is over."""
        seen = self.seen
        return "half_open" if seen.state == "open" and monotonic() >= seen.retry_at else seen.state

    def decide(self, seen: Seen, now: float) -> Verdict:
        """What to do with a call that arrives now."""
        if self.lease <= 0:
            return Verdict.ASK
        verdict, age, lease = seen.verdict(now), now - seen.sent, self.lease_at(now)
        if verdict is Verdict.ASK or age < lease:
            return verdict
        return Verdict.REFRESH if age < 2 * lease else Verdict.WAIT

    def decide_again(self, seen: Seen, began: float, now: float) -> Verdict:
        """The same after a refresh, for a call that arrived at `began`."""
        # measured from the call's arrival: else a lease shorter than a round trip would make it refresh for ever
        return Verdict.WAIT if began - seen.sent >= 2 * self.lease_at(now) else seen.verdict(now)

    def lease_at(self, now: float) -> float:
        """The lease that holds now."""
        return self.lease if now < self.trusted_until else self.short_lease

    def trust(self, until: float) -> None:
        """Let a long lease hold until then. A subscription that stands calls this again and again."""
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
        """Whether the ramp after a recovery rejects this call. ramp_left: seconds to its end."""
        ramp_up = self.policy.ramp_up
        if ramp_left <= 0 or ramp_up <= 0 or not self.policy.enforce:
            return False
        return random.random() >= FIRST_SHARE + (1 - FIRST_SHARE) * (1 - ramp_left / ramp_up)

    def adopt(self, reply: Reply, sent: float, now: float) -> None:
        """Make a reply the view, unless a newer one came in between."""
        seen, generation = self.seen, reply["generation"]
        if self.lease <= 0 and generation == seen.generation and reply["failure_count"] == seen.failure_count:
            return  # no call uses the view, and nothing has changed
        with self._lock:
            seen = self.seen
            # adopt a lower generation only if its request was sent after the last reply arrived
            since = seen.arrived if generation < seen.generation else seen.sent
            if sent < since and generation <= seen.generation and not reply.get("isolated"):
                return
            if sent < self._not_before:
                return
            timed = self.policy.slow_call_duration is not None
            if (
                generation == seen.generation
                and now < seen.closed_until
                and not timed
                and not reply.get("ramp_left_ms")
            ):
                self._renew(seen, reply, sent, now)
            else:
                self.seen = self._seen_from(reply, sent, now)

    def _renew(self, seen: Seen, reply: Reply, sent: float, now: float) -> None:
        """Extend the reply of a circuit that is still closed: a new Seen would slow down failing calls."""
        seen.sent, seen.arrived, seen.failure_count = sent, now, reply["failure_count"]
        seen.closed_until = self._fresh_until(sent)

    def _seen_from(self, reply: Reply, sent: float, now: float) -> Seen:
        state, generation = reply["state"], reply["generation"]
        retry_at = now + (reply.get("retry_after_ms") or 0) / 1000
        ramp_until = now + (reply.get("ramp_left_ms") or 0) / 1000
        fresh_until = self._fresh_until(sent) if self.lease > 0 else NEVER
        closed_until = fresh_until if state == "closed" and ramp_until <= now else NEVER
        timed = self.policy.slow_call_duration is not None
        # outcomes of an earlier generation count for nothing: they stay in its counter
        counter = self.seen.counter if generation == self.seen.generation else self._next_counter()
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
            counter,
            counter.tick,
        )

    def _next_counter(self) -> Counter:
        self._earlier.append(self.seen.counter)
        if len(self._earlier) > MOST_COUNTERS:
            self._earlier_successes += self._earlier.popleft().total()
        return Counter()

    def drop(self) -> None:
        """Stop using the view: the next call asks Redis. Gathered successes stay, for their generation may go on."""
        with self._lock:
            seen, self._not_before = self.seen, monotonic()
            self.seen = unseen(seen.state, seen.generation, seen.failure_count, seen.counter, seen.retry_at)

    def gather(self, generation: int) -> bool:
        """Count one success locally; False where there is no lease, or the generation has ended."""
        seen = self.seen
        if self.lease <= 0 or generation != seen.generation:
            return False
        seen.tick()
        return True

    def successes(self) -> int:
        """All successes that were counted here."""
        with self._lock:
            # read at once, without a call: a transition in a signal handler moves the current counter to the others
            even_earlier, counters = self._earlier_successes, {*self._earlier, self.seen.counter}
            return even_earlier + sum(counter.total() for counter in counters)

    def take(self, generation: int | None = None) -> Request:
        """Take the gathered successes out of the view, as a request. Empty if there is no lease.

        generation: take nothing if the view has another one.
        """
        if self.lease <= 0:
            return {}
        with self._lock:
            seen = self.seen
            if generation is not None and generation != seen.generation:
                return {"generation": generation}
            gathered = seen.counter.take()
        return {"generation": seen.generation, "successes": gathered} if gathered else {"generation": seen.generation}

    def give_back(self, request: Request) -> None:
        """Return the successes of a request that was never sent, unless their generation has ended."""
        with self._lock:
            if request.get("generation") == self.seen.generation:
                self.seen.counter.give_back(request.get("successes", 0))
