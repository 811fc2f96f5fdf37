"""The rules: when the circuit opens, which calls may probe it, and when it closes.

lua/rules.lua has the same rules for a breaker in Redis: the same functions in the same order. Durations and times are
in milliseconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from typing import Any, TypeAlias

from ._protocol import EXACT, LONGEST_OPEN_MS, Forced, Request, State
from ._window import Sums, Window, bucket_ms, move_back, sums

Policy: TypeAlias = dict[str, Any]  # all fields, in the scripts' units
MOST_FAILURES = 2**32 - 1  # a u32 in the contract
_NONE: dict[Any, int] = {}  # never changed in place
_local_generations = itertools.count(2)  # FixedEngine has -1


@dataclasses.dataclass(slots=True)
class Document:
    """The state of one breaker. lua/model.lua explains the stored fields, lua/document.lua those from `now` on.

    is_local: whether one process keeps it, while Redis is down. probes and reporters are never changed in place.
    From `now` on, the fields are those of one request.
    """

    generation: int
    state: State = "closed"
    failure_count: int = 0
    failure_number: int = 0
    success_count: int = 0
    last_failure_time: int | None = None
    opened_at: int | None = None
    changed_at_ms: int | None = None
    reason: str | None = None
    error: str | None = None
    operator: str | None = None
    note: str | None = None
    trips: int = 0
    closed_at_ms: int | None = None
    window: Window | None = None
    reporters: dict[str, int] = dataclasses.field(default_factory=lambda: _NONE)
    run_since_ms: int | None = None
    open_until_ms: int = 0
    open_ms: int = 0
    held_generation: int | None = None
    probe_seq: int = 0
    probe_ms: int = 0
    probes: dict[int, int] = dataclasses.field(default_factory=lambda: _NONE)
    probe_failures: int = 0
    forced: Forced | None = None
    forced_until_ms: int | None = None
    is_local: bool = False
    now: int = 0
    is_new: bool = True
    outlived: bool = False
    change: dict[str, Any] | None = None
    entry: dict[str, Any] | None = None
    hint: bool = False
    reported_error: str | None = None

    def copy(self) -> Document:
        """A copy for another request."""
        return Document(*_stored(self))  # a third of the time of dataclasses.replace()

    def entry_of(self, to: State, reason: str, generation: int) -> dict[str, Any]:
        """The history entry of a change to another state, or of an action that changes none."""
        entry = {"from": self.state, "to": to, "reason": reason, "generation": generation}
        return {**entry, "failure_count": self.failure_count, "success_count": self.success_count}

    def turn_back(self, by_ms: int) -> None:
        """Move every time back, as the clock was. A window has a rule of its own."""
        for field in _TIMES:
            if (at := getattr(self, field)) is not None:
                setattr(self, field, at - (by_ms if field.endswith("_ms") else by_ms // 1000))
        self.probes = {slot: end - by_ms for slot, end in self.probes.items()}
        self.reporters = {instance: at - by_ms for instance, at in self.reporters.items()}


_names = [field.name for field in dataclasses.fields(Document)]
_TIMES = [name for name in _names if name.endswith(("_time", "_at", "_at_ms", "_since_ms", "_until_ms"))]
_stored = operator.attrgetter(*_names[: _names.index("now")])


def open_time_ms(policy: Policy, trips: int) -> int:
    """The open period after this many trips in a row, without jitter."""
    open_ms: float = policy["reset_timeout_ms"]
    most = max(policy["max_reset_timeout_ms"], open_ms) if policy["max_reset_timeout_ms"] else LONGEST_OPEN_MS
    for _ in range(trips - 1 if policy["backoff_multiplier"] > 1 else 0):
        open_ms = min(open_ms * policy["backoff_multiplier"], most)
        if open_ms == most:
            break
    return math.floor(open_ms)


def recent_trips(document: Document, policy: Policy) -> int:
    """Trips in a row.

    Back-off resets once the circuit has stayed closed for as long as its next open period would last.
    """
    if document.state != "closed":
        return document.trips
    if document.closed_at_ms is None:
        return 0
    healthy = document.now - document.closed_at_ms >= open_time_ms(policy, document.trips + 1)
    return 0 if healthy else document.trips


def next_generation(document: Document) -> int:
    # a local generation is below zero, so that Redis rejects it
    return -next(_local_generations) if document.is_local else max(document.generation + 1, document.now * 1000)


def transition(document: Document, state: State, reason: str) -> None:
    generation = next_generation(document)
    document.change = document.entry_of(state, reason, generation)
    if document.window is not None:
        document.change.update(sums(document.window)._asdict())
    document.state, document.generation = state, generation
    document.reason, document.changed_at_ms = reason, document.now
    document.failure_number, document.success_count = 0, 0
    document.window, document.reporters = None, _NONE
    document.run_since_ms, document.closed_at_ms = None, None
    document.probes, document.probe_seq, document.probe_ms, document.probe_failures = _NONE, 0, 0, 0
    document.held_generation = None
    end_action(document)


def end_action(document: Document) -> None:
    """End a forced state, and forget who acted last."""
    document.forced, document.forced_until_ms, document.operator, document.note = None, None, None, None


def open_for(document: Document, duration_ms: int, reason: str) -> None:
    transition(document, "open", reason)
    document.opened_at = document.now // 1000
    document.open_ms, document.open_until_ms = duration_ms, document.now + duration_ms
    document.error = document.reported_error
    if document.change is not None and document.error is not None:
        document.change["error"] = document.error


def close(document: Document, reason: str) -> None:
    transition(document, "closed", reason)
    document.failure_count, document.opened_at, document.error = 0, None, None
    if reason == "probe_succeeded":
        document.closed_at_ms = document.now
    else:
        document.trips = 0


def trip(document: Document, policy: Policy, reason: str, hold_ms: int = 0) -> None:
    """Open the circuit for one more open period, or for hold_ms if that is longer.

    A hold of a closed circuit is not a trip: the circuit opens for hold_ms, and back-off does not grow.
    """
    trips, ended, open_ms = recent_trips(document, policy), document.generation, 0
    if reason != "held" or document.state != "closed":
        trips = min(trips + 1, 1000)
        # a hash, not a random number: it differs between breakers, and a test can compute it too
        share = next_generation(document) % 1000003 * 7919 % 1000003 / 1000003
        open_ms = min(math.floor(open_time_ms(policy, trips) * (1 + policy["jitter"] * share)), LONGEST_OPEN_MS)
    open_for(document, max(open_ms, hold_ms), reason)
    document.trips = trips
    if hold_ms > 0:
        document.held_generation = ended


def extend_hold(document: Document, request: Request, policy: Policy) -> bool:
    """Extend a hold to a later end, at most max_hold in all, without a transition. Returns whether it was extended.

    Also accepts a hold under the generation that the present hold ended, so that many instances make one transition.
    """
    ended = document.held_generation
    if ended is None or request.get("generation") not in (ended, document.generation):
        return False
    began_ms = document.open_until_ms - document.open_ms
    until_ms = min(document.now + request["hold_ms"], began_ms + policy["max_hold_ms"])
    if until_ms <= document.open_until_ms:
        return False
    document.open_until_ms, document.open_ms = until_ms, until_ms - began_ms
    return True


def free_slot(document: Document, policy: Policy) -> bool:
    return len(document.probes) < policy["half_open_max_calls"]  # type: ignore[no-any-return]


def acquire(document: Document, policy: Policy) -> tuple[bool, int | None]:
    """Admit or refuse a call while the circuit is not closed.

    Returns whether it is admitted, and the slot of its probe.
    """
    if document.state == "open":
        if document.now < document.open_until_ms:
            return False, None
        transition(document, "half_open", "timeout")
    if not free_slot(document, policy):
        return False, None
    document.probe_seq += 1
    document.probe_ms = max(document.probe_ms, policy["probe_timeout_ms"])
    document.probes = {**document.probes, document.probe_seq: document.now + policy["probe_timeout_ms"]}
    return True, document.probe_seq


def record_probe(document: Document, request: Request, policy: Policy) -> bool:
    """Count the outcome of a probe. Returns whether it counted."""
    slot = request["probe"]
    if slot not in document.probes:
        return False
    failures = request.get("failures", 0)
    slow = request.get("slow", 0) if policy["slow_call_rate_threshold"] > 0 else 0
    if request.get("pending", 0) == 0:  # a running call keeps its slot
        document.probes = {other: end for other, end in document.probes.items() if other != slot}
    if failures > 0:
        document.failure_count = min(document.failure_count + failures, MOST_FAILURES)
        document.last_failure_time = document.now // 1000
    hold_ms = min(request.get("hold_ms", 0), policy["max_hold_ms"])
    has_failed = request.get("counted", 0) > 0 and policy["slow_call_rate_threshold"] > 0  # as slow, while it ran
    if hold_ms > 0 or (failures + slow > 0 and not has_failed):
        fail_probe(document, policy, "probe_failed" if failures > 0 else "probe_slow", hold_ms)
    elif request.get("successes", 0) > 0 and not has_failed:
        document.success_count += 1
        if document.success_count >= policy["success_threshold"]:
            close(document, "probe_succeeded")
    return True


def fail_probe(document: Document, policy: Policy, reason: str, hold_ms: int) -> None:
    document.probe_failures += 1
    if hold_ms > 0:
        trip(document, policy, "held", hold_ms)
    elif document.probe_failures >= policy["probe_failure_threshold"]:
        trip(document, policy, reason)


def note_reporter(document: Document, policy: Policy, request: Request) -> None:
    """Note which host failed: all instances of a host count once.

    Keeps the newest `quorum` hosts: older ones cannot decide.
    """
    instance = request.get("instance", "")
    host = request.get("host", instance.rpartition(":")[0] or instance)
    document.reporters = reporters = {**document.reporters, host: document.now}
    names = sorted(reporters, key=lambda name: (reporters[name], name))
    for name in names[: max(len(names) - policy["quorum"], 0)]:
        del reporters[name]


def has_quorum(document: Document, policy: Policy, since_ms: int) -> bool:
    """Whether enough hosts have failed since since_ms for the fleet to trip."""
    quorum: int = policy["quorum"]
    return quorum == 1 or sum(at >= since_ms for at in document.reporters.values()) >= quorum


def reaches_half(document: Document, policy: Policy, before: int) -> bool:
    """Whether a run of at least two failures has reached half of its threshold.

    before: failure_count before the report.
    """
    after, threshold = document.failure_count, policy["failure_threshold"]
    return after >= 2 and before * 2 < threshold <= after * 2


def count_outcomes(document: Document, request: Request, quorum: int, bucket: int | None) -> None:
    """Count successes, then failures, in the run of failures and in the window.

    Successes end only the failures that their process knew of before they ended: those up to seen_failure, or all if
    they are reported as they end.
    """
    successes, failures, number = request.get("successes", 0), request.get("failures", 0), document.failure_number
    if successes > 0:
        seen = min(request.get("seen_failure", number), number)
        document.failure_count = min(document.failure_count, number - seen)
        if document.failure_count == 0:
            document.run_since_ms = None
    if failures > 0:
        if document.run_since_ms is None and quorum > 1:
            document.run_since_ms = document.now
        count, number = document.failure_count + failures, number + failures
        document.failure_count = count if count < MOST_FAILURES else MOST_FAILURES  # half the time of min()
        document.failure_number = number if number < EXACT else EXACT
        document.last_failure_time = document.now // 1000
    if document.window is None and bucket is not None:
        document.window = Window(bucket, document.now // bucket)
    if (window := document.window) is None:
        return
    counted = request.get("counted", 0)
    window.calls += successes + failures + request.get("pending", 0) - counted
    window.failures += failures
    window.slow += request.get("slow", 0)
    age_ms = request.get("age_ms", 0) if successes > 0 else 0
    if age_ms > document.now % window.bucket_ms:  # the successes ended before the newest bucket began
        move_back(window, successes - counted, age_ms, document.now)


def trip_reason(document: Document, policy: Policy, failures: int, hold_ms: int) -> str | None:
    """The reason why a closed circuit must open now, or None. failures, hold_ms: of the report.

    Without failures the run is not judged: a report of only successes may come without the policy that says how long
    a run may be.
    """
    run_since_ms = document.now if document.run_since_ms is None else document.run_since_ms
    if (
        failures > 0
        and document.failure_count >= policy["failure_threshold"]
        and has_quorum(document, policy, run_since_ms)
    ):
        return "failure_threshold"
    window, reason = document.window, "held" if hold_ms > 0 else None
    if window is not None and 0 < policy["failures_in_window"] <= window.failures:
        reason = "failures_in_window"
    elif window is not None and window.calls >= policy["minimum_calls"]:
        if 0 < policy["error_rate_threshold"] <= window.failures / window.calls:
            reason = "error_rate"
        elif 0 < policy["slow_call_rate_threshold"] <= window.slow / window.calls:
            reason = "slow_rate"
    if reason is None:
        return None
    window_ms = max(policy["window_ms"], 0 if window is None else window.bucket_ms * 10)
    return reason if has_quorum(document, policy, document.now - window_ms + 1) else None


def record_closed(document: Document, request: Request, policy: Policy) -> bool:
    """Count outcomes while the circuit is closed. Returns whether they counted."""
    successes, failures, slow = request.get("successes", 0), request.get("failures", 0), request.get("slow", 0)
    hold_ms = min(request.get("hold_ms", 0), policy["max_hold_ms"])
    if document.forced or successes + failures + slow + hold_ms == 0:
        return False
    before = document.failure_count
    count_outcomes(document, request, policy["quorum"], bucket_ms(policy))
    if policy["quorum"] > 1 and (failures + hold_ms > 0 or (slow > 0 and policy["slow_call_rate_threshold"] > 0)):
        note_reporter(document, policy, request)
    reason = trip_reason(document, policy, failures, hold_ms)
    if reason is not None:
        trip(document, policy, reason, hold_ms)
    elif failures > 0 and reaches_half(document, policy, before):
        document.hint = True
    return True


def record(document: Document, request: Request, policy: Policy) -> bool:
    """Count outcomes of calls that were admitted under the request's generation. Returns whether they counted."""
    if document.state == "open" and "hold_ms" in request and not document.is_new:
        return extend_hold(document, request, policy)
    if document.is_new or request.get("generation") != document.generation:
        return False
    document.reported_error = request.get("error")
    if document.state == "half_open" and request.get("probe") is not None:
        return record_probe(document, request, policy)
    if document.state == "closed" and request.get("probe") is None:
        return record_closed(document, request, policy)
    return False


def retry_after_ms(document: Document, policy: Policy) -> int | None:
    """Milliseconds after which a refused caller should try again; None while a slot is free.

    In half open, the time for which the probes have been running: most end long before their deadline.
    """
    if document.state == "open":
        return max(document.open_until_ms - document.now, 0)
    if free_slot(document, policy):
        return None
    left = min(document.probes.values()) - document.now
    return min(max(document.probe_ms - left, 100), left)


def enter(document: Document, reason: str) -> None:
    """Enter into the history an operator's action that is not a transition."""
    document.entry = document.entry_of(document.state, reason, document.generation)


def prolong(document: Document, duration_ms: int) -> bool:
    """Give a forced state a new end, which is no transition. Returns whether it changed anything."""
    until_ms = document.now + duration_ms
    if until_ms == document.forced_until_ms:
        return False
    document.forced_until_ms, document.changed_at_ms, document.reason = until_ms, document.now, "forced"
    if document.state == "open":
        document.open_until_ms, document.open_ms = until_ms, duration_ms
    enter(document, "forced")
    return True


def control(document: Document, action: str, duration_ms: int) -> bool:
    """Carry out an operator's action on the state. Returns whether it changed anything."""
    if action == "probe":
        return probe_now(document)
    if action == "clear_forced":
        return clear_forced(document)
    if action == f"force_{document.forced}":
        return prolong(document, duration_ms)
    if action == "reset":
        if is_blank(document):
            return False
        close(document, "reset")
        return True
    if action == "force_open":
        open_for(document, duration_ms, "forced")
    else:
        close(document, "forced")
    document.forced = "open" if action == "force_open" else "closed"
    document.forced_until_ms = document.now + duration_ms
    return True


def sign(document: Document, request: Request, override: str | None) -> None:
    """Note who carried out an operator's action, and why, in the document and its history entry.

    override: the fields of the policy override that the action set or ended, as JSON.
    """
    document.operator, document.note = request.get("operator"), request.get("note")
    entry = document.change or document.entry
    assert entry is not None  # every action that changes something makes one
    entry.update({field: request[field] for field in ("operator", "note") if field in request})
    if override is not None:
        entry["override"] = override


def probe_now(document: Document) -> bool:
    """Let the next caller of an open circuit probe. Returns whether it changed anything."""
    if document.forced or document.state != "open":
        return False
    if document.open_until_ms <= document.now and document.held_generation is None:
        return False
    document.open_until_ms = min(document.open_until_ms, document.now)
    document.held_generation = None  # a late hold must not undo the probe
    enter(document, "probe")
    return True


def clear_forced(document: Document) -> bool:
    """End a forced state. Returns whether there was one."""
    if document.forced is None:
        return False
    if document.forced == "open":
        document.open_until_ms = document.now  # the next acquire sends a probe
    end_action(document)
    enter(document, "clear_forced")
    return True


def is_blank(document: Document) -> bool:
    """Whether a reset would change nothing."""
    window = document.window
    counts = document.failure_count + document.trips
    if window is not None:
        counts += window.calls + window.failures + window.slow
    return (
        document.state == "closed"
        and counts == 0
        and not (document.forced or document.closed_at_ms or document.reporters)
    )


def enter_policy(document: Document, action: str) -> None:
    """Enter an action on the policy override, without a document: the generation is 0 where none is stored."""
    enter(document, action)
    if document.entry and document.is_new:
        document.entry["generation"] = 0


def health(document: Document, policy: Policy, sums: Sums) -> int:
    """A score from 0 (open) to 100, lowered by the failure rate, by half the slow rate and by the trips in a row.

    A run of failures counts as a failure rate: its share of failure_threshold.
    """
    failure_rate, slow_rate = (sums.failures / sums.calls, sums.slow / sums.calls) if sums.calls else (0.0, 0.0)
    if document.state == "closed":
        failure_rate = max(failure_rate, min(document.failure_count / policy["failure_threshold"], 1))
    allowed = {"closed": 1, "half_open": 0.5, "open": 0}[document.state]
    score = allowed * (1 - failure_rate) * (1 - slow_rate / 2) * 4 / (4 + recent_trips(document, policy))
    return math.floor(100 * score + 0.5)
