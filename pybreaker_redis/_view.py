"""The view: what a process last read, by which it decides for one lease, and the successes gathered meanwhile.

It does no I/O; the sync and the asyncio shell share it.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import random
import sysconfig
import threading
from collections.abc import Callable
from time import monotonic

from ._clock import NEVER, age, machine
from ._policy import LONGEST, Policy
from ._protocol import Forced, Reply, Request, State

MOST_COUNTERS = 64
FIRST_SHARE = 0.1  # of the calls, right after a recovery with a ramp
GROWTH = 1.0  # seconds for which quickly growing failures, or a high rate, keep a process alert
JUST_NOW = 0.05  # seconds after its end within which a success counts as reported as it ends
_NO_BASE = 0, NEVER
_STATES: dict[str, State] = {"closed": "closed", "open": "open", "half_open": "half_open"}  # one object of each text


HAS_GLOBAL_LOCK = not sysconfig.get_config_var("Py_GIL_DISABLED")


class Verdict(enum.Enum):
    """What the view says about the next call."""

    ADMIT = 1  # go ahead
    REJECT = 2  # the circuit is open, or half open without a free slot
    WAIT = 3  # the view is too old: read the state first
    ASK = 4  # ask for a permit


class Counter:
    """Counts from zero. tick() counts one, atomically; without a lock where Python has its global one.

    Reading ticks, too, and `_reads` subtracts those ticks. Only one thread may read at a time.
    """

    __slots__ = ("_reads", "tick")

    def __init__(self) -> None:
        tick = itertools.count(1).__next__
        self.tick = tick if HAS_GLOBAL_LOCK else _locked(tick)
        self._reads = 0

    def total(self) -> int:
        """All ticks ever."""
        self._reads = reads = self._reads + 1  # in a local, too: a signal handler may read again after the tick
        return self.tick() - reads


def _locked(tick: Callable[[], int]) -> Callable[[], int]:
    lock = threading.RLock()

    def locked() -> int:
        with lock:
            return tick()

    return locked


class Successes(Counter):
    """The successes of one generation, and the number of the failure after which they ended.

    read_number: the number of the latest failure that was read. proved: the number of the latest failure that was read
    before the newest success ended. grown_at: when look() first saw the present count. All are as of the last look().
    """

    __slots__ = ("_looked_at", "_read_at", "_taken", "grown_at", "proved", "read_number")

    def __init__(self) -> None:
        super().__init__()
        self._taken = 0
        self._looked_at = 0
        self.read_number = self.proved = 0
        self._read_at = 0
        self.grown_at = NEVER

    def look(self, now: float) -> int:
        """Note whether the count has grown. Returns the successes since the last take()."""
        total = self.total()
        if total > self._looked_at:
            self._looked_at, self.grown_at = total, now
        if total > self._read_at:
            self.proved = self.read_number
        return total - self._taken

    def read(self, number: int, now: float) -> None:
        """Note that the process has just read that the latest failure has this number."""
        self.look(now)
        if number > self.read_number:
            self.read_number, self._read_at = number, self._looked_at

    def take(self, now: float) -> int:
        """The successes since the last take(). Successes that end after its look() are left for the next take()."""
        self.look(now)
        # not below zero: a signal handler may have taken them. No call from here on: a call would let a handler run
        new = self._looked_at - self._taken if self._looked_at > self._taken else 0
        self._taken += new
        return new

    def take_unseen(self) -> int:
        """take() without look(), whose notes nobody needs while an engine of this process decides."""
        total = self.total()
        new = total - self._taken if total > self._taken else 0  # as in take()
        self._taken += new
        return new

    def give_back(self, successes: int) -> None:
        """Return successes that were taken but not reported."""
        self._taken -= successes


@dataclasses.dataclass(slots=True)
class Seen:
    """One reply. A later reply replaces it; until then only View extends it. All times are on the monotonic clock.

    sent, arrived: when the reply was asked for, and when it came. If a refresh finds that nothing has changed, they are
    the times of that refresh. began: when the reply first came.
    closed_until, open_until: until when calls are admitted or rejected without asking Redis. The fast path reads only
    these two and sent. watched_until: replaces closed_until if each call needs a permit, because it is timed or the
    process is alert.
    retry_at: until when an open or half-open circuit rejects. ramp_until: the end of the ramp after a recovery.
    forced_until: the end of the forced state. reason, error: why the circuit is not closed, for the rejected caller.
    A reply is good while sent <= now < closed_until; a Seen with the default times is too old to use. After the
    clock was turned back, sent may be in the future: then the reply is stale.
    """

    state: State = "closed"
    generation: int = 0
    failure_count: int = 0
    counter: Successes = dataclasses.field(default_factory=Successes)
    tick: Callable[[], int] = dataclasses.field(init=False)  # the counter's
    sent: float = NEVER
    arrived: float = NEVER
    began: float = NEVER
    retry_at: float = NEVER
    ramp_until: float = NEVER
    forced: Forced | None = None
    forced_until: float = NEVER
    closed_until: float = NEVER
    watched_until: float = NEVER
    open_until: float = NEVER
    reason: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.tick = self.counter.tick

    def verdict(self, now: float) -> Verdict:
        """The verdict of this reply, whatever its age."""
        if self.state == "closed":
            return Verdict.ADMIT
        return Verdict.REJECT if self.left(self.retry_at, now) > 0 else Verdict.ASK

    def left(self, end: float, now: float) -> float:
        """Seconds until an end that this reply named; 0 once it is over."""
        return max(end - now, 0.0) if self.began <= now else 0.0


class View:
    """The last reply, good for `lease` seconds, and the successes gathered under its generation.

    policy: the policy in force, with any policy override. now: the clock. The fast path always reads the machine's
    clock, so any other clock needs a lease of 0. lock: of the view and of the other parts of its breaker.
    """

    __slots__ = (
        *("lease", "now", "policy", "seen", "lock", "_earlier", "_earlier_successes", "_not_before", "_alerted_at"),
        *("_alert_for", "_base", "_began", "_reported_at", "_claimed_at", "_ended_at"),
    )

    def __init__(self, lease: float, policy: Policy | None = None, now: Callable[[], float] = machine) -> None:
        self.lease, self.now = lease, now
        self.policy = policy or Policy()
        self.seen = Seen()
        # counters of earlier generations, which running calls may still tick, and the sum of even older ones
        self._earlier: tuple[Successes, ...] = ()
        self._earlier_successes = 0
        # re-entrant, like every lock here: a signal handler or finalizer may call the breaker while its thread holds it
        self.lock = threading.RLock()
        self._not_before = NEVER  # replies to requests sent earlier are not adopted
        self._alerted_at, self._alert_for = NEVER, 0.0
        self._base = _NO_BASE  # a failure number and when it was read, to tell how fast failures grow
        self._began = NEVER  # when the first reply under the view's generation arrived
        self._reported_at = NEVER  # when successes of this generation were last taken for a report
        self._claimed_at = NEVER  # when a success was last chosen to be reported as it ends, once per lease
        self._ended_at = NEVER  # the end of the success that asked for a report

    def after_fork(self) -> None:
        """In a child: drop the gathered successes, which the parent reports, and the lock, which it may hold."""
        self.lock = threading.RLock()
        self.drop()  # the first call of a child asks Redis, and so makes the child known to its link
        self.seen.counter.take(monotonic())
        self._earlier_successes -= self.successes()

    @property
    def state(self) -> State:
        """The state as last read. An open circuit counts as half open once its open period is over."""
        seen = self.seen
        return "half_open" if seen.state == "open" and not seen.left(seen.retry_at, self.now()) else seen.state

    def held_back(self, ramp_left: float) -> bool:
        """Whether the ramp after a recovery rejects this call. ramp_left: seconds to its end."""
        ramp_up = self.policy.ramp_up
        if ramp_left <= 0 or ramp_up <= 0 or not self.policy.enforce:
            return False
        return random.random() >= FIRST_SHARE + (1 - FIRST_SHARE) * (1 - ramp_left / ramp_up)

    # Replies

    def adopt(self, reply: Reply, sent: float) -> bool:
        """Make a reply the view, unless a newer one came in between. Returns whether it did."""
        seen, generation = self.seen, reply["generation"]
        forced, failure_count = reply.get("forced"), reply["failure_count"]
        unchanged = generation == seen.generation and failure_count == seen.failure_count
        if self.lease <= 0 and unchanged and reply["state"] == "closed" and forced is None and seen.forced is None:
            return False  # no call uses the view
        with self.lock:
            seen, now = self.seen, self.now()
            same_probes = generation == seen.generation and reply["state"] == seen.state == "half_open"
            refuses = bool(reply.get("retry_after_ms"))
            # adopt a lower generation or a refusal only if its request was sent after the last reply arrived
            since = seen.arrived if generation < seen.generation or (same_probes and refuses) else seen.sent
            if sent < since <= now and generation <= seen.generation and not reply.get("isolated"):
                if not same_probes or refuses:
                    return False
                sent = seen.sent  # a late reply may describe a later moment: at worst the next call asks in vain
            if sent < self._not_before <= now:
                return False
            counter = seen.counter if generation == seen.generation else self._next_counter(now)
            if reply["source"] == "redis" and self.lease > 0:
                if counter is not seen.counter:  # the first success of a generation is reported as it ends
                    self._alerted_at, self._alert_for, self._claimed_at = now, self.lease, NEVER
                counter.read(reply["failure_number"], now)
                self._note_failures(reply, now)
            if counter is seen.counter and seen.began <= now < seen.closed_until and not reply.get("ramp_left_ms"):
                # a new Seen would slow down failing calls
                seen.sent, seen.arrived, seen.failure_count = sent, now, failure_count
                self._set_ends(seen, now)
            else:
                self.seen = self._seen_from(reply, counter, sent, now)
            self.seen.forced, self.seen.forced_until = forced, NEVER
            if forced is not None:
                self.seen.forced_until = now + reply["forced_left_ms"] / 1000
        return True

    def extend(self, seen: Seen, sent: float) -> bool:
        """Extend a reply by another lease, since what is stored has not changed. Returns False if it was replaced."""
        with self.lock:
            now = monotonic()
            if self.seen is not seen or sent < seen.sent or sent < self._not_before <= now:
                return False
            if seen.failure_count > 0 and self.lease > 0:
                self._stay_alert(now)
            seen.sent, seen.arrived = sent, now
            self._set_ends(seen, now)
        return True

    def _seen_from(self, reply: Reply, counter: Successes, sent: float, now: float) -> Seen:
        seen = Seen(_STATES[reply["state"]], reply["generation"], reply["failure_count"], counter)
        seen.sent, seen.arrived, seen.began = sent, now, now
        seen.reason, seen.error = reply.get("reason"), reply.get("error")
        seen.retry_at = now + reply["retry_after_ms"] / 1000 if reply.get("retry_after_ms") else now
        if reply["state"] == "half_open" and reply.get("retry_after_ms"):  # good for a lease, like any view
            seen.retry_at = max(seen.retry_at, sent + self.lease)
        seen.ramp_until = now + reply["ramp_left_ms"] / 1000 if reply.get("ramp_left_ms") else now
        if self.lease > 0:
            self._set_ends(seen, now)
        return seen

    def _set_ends(self, seen: Seen, now: float) -> None:
        fresh_until = seen.sent + self.lease
        if seen.state == "open":
            seen.open_until = min(fresh_until, seen.retry_at) if self.policy.enforce else NEVER
        elif seen.state == "closed" and seen.ramp_until <= now:
            alert_left = self._alert_for - age(self._alerted_at, now)
            next_report_in = self.lease - age(self._claimed_at, now)
            observed = self.policy.slow_call_duration is not None or (
                alert_left > 0 and next_report_in < min(alert_left, fresh_until - now)
            )
            seen.closed_until = NEVER if observed else fresh_until
            seen.watched_until = fresh_until if observed else NEVER

    def _next_counter(self, now: float) -> Successes:
        # before the first reply, calls are seldom admitted, and never tick by themselves
        if self.seen.generation != 0 or self.seen.counter.total() > 0:
            self._earlier = (*self._earlier, self.seen.counter)
        if len(self._earlier) > MOST_COUNTERS:
            oldest, *rest = self._earlier
            self._earlier, self._earlier_successes = tuple(rest), self._earlier_successes + oldest.total()
        self._began, self._reported_at, self._base = now, NEVER, _NO_BASE
        return Successes()

    def drop(self, since: float | None = None) -> None:
        """Stop using the view: the next call asks Redis. Keeps gathered successes, whose generation may go on.

        since: replies to requests sent before then are not adopted; default: now.
        """
        with self.lock:
            seen, now = self.seen, self.now()
            kept = Seen(seen.state, seen.generation, seen.failure_count, seen.counter)
            kept.reason, kept.error = seen.reason, seen.error
            kept.began, self._not_before = now, now if since is None else since
            kept.retry_at, kept.forced = now + seen.left(seen.retry_at, now), seen.forced
            kept.forced_until = now + seen.left(seen.forced_until, now)
            self.seen = kept

    def end(self) -> None:
        """Stop gathering: from now on each call asks Redis before and reports after it, as without a lease."""
        self.lease = 0.0
        self.drop()

    # Alert: while failures are near the threshold, successes are reported as they end

    def _note_failures(self, reply: Reply, now: float) -> None:
        policy, number = self.policy, reply["failure_number"]
        base, base_at = self._base
        if age(base_at, now) > GROWTH:
            self._base = number, now
        grown = number - base >= policy.failure_threshold and age(base_at, now) <= GROWTH
        failing = reply.get("failures", 0) / (reply.get("calls") or 1)
        slow = reply.get("slow", 0) / (reply.get("calls") or 1)
        high = (policy.error_rate_threshold and failing >= policy.error_rate_threshold / 2) or (
            policy.slow_call_rate_threshold and slow >= policy.slow_call_rate_threshold / 2
        )
        if grown or high:
            self._alerted_at, self._alert_for = now, GROWTH
        elif reply["failure_count"] > 0:
            self._stay_alert(now)

    def _stay_alert(self, now: float) -> None:
        self._alerted_at, self._alert_for = now, max(self._alert_for - age(self._alerted_at, now), self.lease)

    def hinted(self) -> None:
        """A run of failures has reached half of its threshold: the next success may be reported at once."""
        self._claimed_at = NEVER

    def claim_report(self) -> bool:
        """Whether the success that has just ended should be reported now: once per lease while alert."""
        alerted_at, claimed_at, now = self._alerted_at, self._claimed_at, monotonic()
        if age(alerted_at, now) >= self._alert_for or age(claimed_at, now) < self.lease:
            return False
        with self.lock:
            self._claimed_at = self._ended_at = now
            if (seen := self.seen).watched_until > NEVER:
                self._set_ends(seen, now)
        return True

    # Gathered successes

    def gather(self, generation: int) -> bool:
        """Count one success locally; False where there is no lease, or the generation has ended."""
        seen = self.seen
        if self.lease <= 0 or generation != seen.generation:
            return False
        seen.tick()
        return True

    def successes(self) -> int:
        """All successes that were counted here."""
        with self.lock:
            # read at once, without a call: a transition in a signal handler moves the current counter to the others
            even_earlier, counters = self._earlier_successes, {*self._earlier, self.seen.counter}
            return even_earlier + sum(counter.total() for counter in counters)

    def is_due(self, now: float, keeps_window: bool) -> bool:
        """Whether the gathered successes should be reported now.

        With a window, they are due whenever a tenth of its age has passed, so that a judged rate misses at most a tenth
        of the calls. Without one, they are due only if they end failures that this process has read.
        """
        with self.lock:
            seen, counter = self.seen, self.seen.counter
            if not counter.look(now) or seen.state != "closed":
                return False
            unreported_for = age(self._reported_at, now)
            if keeps_window and unreported_for >= min(age(self._began, now), self.policy.window) / 10:
                return True
            return (
                age(self._ended_at, now) < unreported_for or counter.proved > counter.read_number - seen.failure_count
            )

    def take(self, generation: int | None = None, shared: bool = True, as_it_ends: bool = False) -> Request:
        """Take the gathered successes out of the view, as a request. Empty if there is no lease.

        generation: take nothing if the view has another one. shared: whether Redis decides; then the link looks at the
        counter in every lease. as_it_ends: if a success has just ended, omit which failures it came after, so that it
        ends them all. Use it only for a report that the process's own failures wait for.
        """
        if self.lease <= 0:
            return {}
        with self.lock:
            seen, counter, now = self.seen, self.seen.counter, monotonic()
            if generation is not None and generation != seen.generation:
                return {"generation": generation}
            # if not shared, nothing has looked at the counter, and its calls ended while the view was fresh
            gathered = counter.take(now if shared or seen.sent == NEVER else min(now, seen.sent + self.lease))
            if not gathered:
                return {"generation": seen.generation}
            request: Request = {"generation": seen.generation, "successes": gathered}
            age_ms = round((now - counter.grown_at) * 1000)
            if age_ms > 0:
                request["age_ms"] = min(age_ms, round(LONGEST * 1000))
            self._reported_at = now
            if not as_it_ends or age(self._ended_at, now) > JUST_NOW:
                request["seen_failure"] = counter.proved
            return request

    def give_back(self, request: Request) -> None:
        """Return the successes of a request that was never sent, unless their generation has ended."""
        with self.lock:
            if request.get("generation") == self.seen.generation:
                self.seen.counter.give_back(request.get("successes", 0))
