"""The state machine in Python: for redis=None, for when Redis is down, and as the model the Lua is tested by.

It mirrors lua/breaker.lua (and control.lua, snapshot.lua): the same names in the same order, milliseconds inside.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from ._policy import default_request
from ._protocol import LONGEST_MS, LONGEST_OVERRIDE, Reply, Request, State

LONGEST_OVERRIDE_MS = int(LONGEST_OVERRIDE * 1000)
HISTORY_ENTRIES = 1000
_FORCED: dict[str, Literal["open", "closed"]] = {"force_open": "open", "force_closed": "closed"}
_DEFAULTS = default_request()
_WALL_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def clock_ms() -> int:
    """Unix milliseconds that never go back in this process."""
    return (time.monotonic_ns() + _WALL_OFFSET_NS) // 1_000_000


@dataclasses.dataclass(slots=True)
class Window:
    """The counts of ten buckets together, and (calls, failures, slow) of the nine before the newest, latest first."""

    bucket_ms: int
    newest: int
    calls: int = 0
    failures: int = 0
    slow: int = 0
    past: tuple[tuple[int, int, int], ...] = ()


class Sums(NamedTuple):
    """The counts of a window."""

    calls: int
    failures: int
    slow: int


@dataclasses.dataclass(slots=True)
class Document:
    """The state document; its fields are explained at the head of lua/breaker.lua."""

    generation: int
    state: State = "closed"
    failure_count: int = 0
    success_count: int = 0
    last_failure_time: int | None = None
    opened_at: int | None = None
    trips: int = 0
    closed_at_ms: int | None = None
    window: Window | None = None
    reporters: dict[str, int] = dataclasses.field(default_factory=dict)
    run_since_ms: int | None = None
    open_until_ms: int = 0
    probe_seq: int = 0
    probes: dict[int, int] = dataclasses.field(default_factory=dict)
    forced: Literal["open", "closed"] | None = None
    forced_until_ms: int | None = None
    now: int = 0
    fresh: bool = True
    outlived: bool = False
    change: dict[str, Any] | None = None


class MemoryEngine:
    """Answers the same requests as the scripts, for one breaker in one process.

    now_ms: the clock. document: where to start, else closed. override: the policy fields that an operator set.
    alone: nobody else reports to it, so that no quorum is waited for.
    """

    source = "memory"

    def __init__(
        self,
        now_ms: Callable[[], int] = clock_ms,
        document: Document | None = None,
        override: dict[str, Any] | None = None,
        alone: bool = False,
    ) -> None:
        self._now_ms = now_ms
        self._alone = alone
        self._document = document
        self._override = override
        self._override_until_ms: int | None = None
        self._lock = threading.RLock()
        self._history: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY_ENTRIES)

    def after_fork(self) -> None:
        """Forget a lock that another thread of the parent may have held."""
        self._lock = threading.RLock()

    def run(self, name: str, request: Request) -> Reply:
        """The reply of the script called name."""
        with self._lock:
            now = self._now_ms()
            if self._override_until_ms is not None and self._override_until_ms <= now:
                self._override = self._override_until_ms = None
            policy = {**_DEFAULTS, **request.get("policy", {}), **(self._override or {})}
            if self._alone:
                policy["quorum"] = 1
            document = self._load(policy, now)
            reply: Reply = getattr(self, f"_{name}")(document, request, policy)
            return self._reply(document, request, policy, reply)

    def history(self, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first, as the stream keeps them."""
        with self._lock:
            return list(self._history)[::-1][:count]

    def obey(self, override: dict[str, Any] | None) -> None:
        """Take over what an operator set elsewhere."""
        with self._lock:
            self._override, self._override_until_ms = override, None

    def next_generation(self, document: Document) -> int:
        """The generation after the document's."""
        return max(document.generation + 1, document.now)

    def _load(self, policy: dict[str, Any], now: int) -> Document:
        """A copy, which takes the document's place where a script would write it."""
        if self._document is None:
            return Document(generation=now, now=now)
        document = dataclasses.replace(self._document, now=now, fresh=False, outlived=False, change=None)
        document.reporters = dict(document.reporters)
        document.probes = {slot: end for slot, end in document.probes.items() if end > now}
        if document.window is not None:
            document.window = self.window_at(document.window, self.bucket_ms(policy), now)
        ramp_until_ms = None if document.closed_at_ms is None else document.closed_at_ms + policy["ramp_up_ms"]
        if ramp_until_ms is not None and now >= ramp_until_ms and self.recent_trips(document, policy) == 0:
            document.trips, document.closed_at_ms, document.outlived = 0, None, True
        if document.forced_until_ms is not None and document.forced_until_ms <= now:
            document.forced, document.forced_until_ms = None, None
        return document

    # Scripts

    def _acquire(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        counted = self.record(document, request, policy)
        admitted, probe = (True, None) if document.state == "closed" else self.acquire(document, policy)
        if counted or (admitted and (document.fresh or probe is not None)):
            self._document = document
        shadow = not admitted and not policy["enforce"]
        return {"admitted": admitted or shadow, "probe": probe, "shadow": shadow or None}

    def _record(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        applied = self.record(document, request, policy)
        empty = not request.keys() & {"successes", "failures", "slow", "probe"}
        if applied or document.fresh or (empty and document.outlived):
            self._document = document
        return {"applied": applied}

    def _control(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        action, duration_ms = request["action"], request.get("duration_ms")
        if action == "set_policy":
            self._override = {**(self._override or {}), **request["override"]}
            self._override_until_ms = None if duration_ms is None else document.now + duration_ms
            return {"changed": True}
        if action == "clear_policy":
            changed = self._override is not None
            self._override = self._override_until_ms = None
            return {"changed": changed}
        changed = self.control(document, action, duration_ms or LONGEST_OVERRIDE_MS)
        if changed:
            self._document = document
        return {"changed": changed}

    def _snapshot(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        sums = self.sums(document.window) if document.window else Sums(0, 0, 0)
        return {
            "exists": not document.fresh,
            "last_failure_time": document.last_failure_time,
            "opened_at": document.opened_at,
            "forced_until_ms": document.forced_until_ms,
            "trips": self.recent_trips(document, policy),
            "health": self.health(document, policy, sums),
            "calls": sums.calls,
            "failures": sums.failures,
            "slow": sums.slow,
            "reporters": dict(document.reporters) or None,
            "policy": policy,
            "probes_in_flight": len(document.probes),
            "now_ms": document.now,
        }

    # Window

    def bucket_ms(self, policy: dict[str, Any]) -> int | None:
        if policy["error_rate_threshold"] > 0 or policy["slow_call_rate_threshold"] > 0:
            return int(policy["window_ms"] // 10)
        return None

    def rebucketed(self, window: Window, bucket_ms: int, newest: int) -> Window:
        buckets = [[0, 0, 0] for _ in range(10)]  # by age
        left = [window.calls, window.failures, window.slow]

        def put(number: int, counts: Iterable[int]) -> None:
            age = newest - min(number * window.bucket_ms // bucket_ms, newest)
            if age < 10:
                buckets[age] = [there + more for there, more in zip(buckets[age], counts, strict=True)]

        for age, counts in enumerate(window.past, 1):
            put(window.newest - age, counts)
            left = [total - count for total, count in zip(left, counts, strict=True)]
        put(window.newest, left)

        other = Window(bucket_ms, newest, past=tuple((calls, failures, slow) for calls, failures, slow in buckets[1:]))
        other.calls, other.failures, other.slow = (sum(counts) for counts in zip(*buckets, strict=True))
        return other

    def advanced(self, window: Window, newest: int) -> Window:
        return self.rebucketed(window, window.bucket_ms, newest)

    def window_at(self, window: Window, bucket_ms: int | None, now: int) -> Window:
        newest = now // window.bucket_ms
        passed = newest - window.newest
        if abs(passed) >= 10:
            window = Window(window.bucket_ms, newest)
        elif passed > 0:
            window = self.advanced(window, newest)
        else:
            window = dataclasses.replace(window)
        if bucket_ms is None or bucket_ms == window.bucket_ms:
            return window
        return self.rebucketed(window, bucket_ms, now // bucket_ms)

    def sums(self, window: Window) -> Sums:
        return Sums(window.calls, min(window.failures, window.calls), min(window.slow, window.calls))

    # Rules

    def open_time_ms(self, policy: dict[str, Any], trips: int) -> int:
        open_ms: float = policy["reset_timeout_ms"]
        most = max(policy["max_reset_timeout_ms"], open_ms) if policy["max_reset_timeout_ms"] else LONGEST_MS
        for _ in range(trips - 1 if policy["backoff_multiplier"] > 1 else 0):
            open_ms = min(open_ms * policy["backoff_multiplier"], most)
            if open_ms == most:
                break
        return math.floor(open_ms)

    def recent_trips(self, document: Document, policy: dict[str, Any]) -> int:
        if document.state != "closed":
            return document.trips
        if document.closed_at_ms is None:
            return 0
        healthy = document.now - document.closed_at_ms >= self.open_time_ms(policy, document.trips + 1)
        return 0 if healthy else document.trips

    def transition(self, document: Document, state: State, reason: str) -> None:
        document.change = {
            "from": document.state,
            "to": state,
            "reason": reason,
            "failure_count": document.failure_count,
            "success_count": document.success_count,
        }
        if document.window is not None:
            document.change.update(self.sums(document.window)._asdict())
        document.state = state
        document.generation = self.next_generation(document)
        document.change["generation"] = document.generation
        document.success_count = 0
        document.window, document.reporters = None, {}
        document.run_since_ms, document.closed_at_ms = None, None
        document.probes, document.probe_seq = {}, 0
        document.forced, document.forced_until_ms = None, None

    def open_for(self, document: Document, duration_ms: int, reason: str) -> None:
        self.transition(document, "open", reason)
        document.opened_at = document.now // 1000
        document.open_until_ms = document.now + duration_ms

    def trip(self, document: Document, policy: dict[str, Any], reason: str) -> None:
        trips = min(self.recent_trips(document, policy) + 1, 1000)
        open_ms = self.open_time_ms(policy, trips)
        share = self.next_generation(document) % 1000003 * 7919 % 1000003 / 1000003
        self.open_for(document, min(math.floor(open_ms * (1 + policy["jitter"] * share)), LONGEST_MS), reason)
        document.trips = trips

    def close(self, document: Document, reason: str) -> None:
        self.transition(document, "closed", reason)
        document.failure_count, document.opened_at = 0, None
        if reason == "probe_succeeded":
            document.closed_at_ms = document.now
        else:
            document.trips = 0

    def free_slot(self, document: Document, policy: dict[str, Any]) -> bool:
        return len(document.probes) < policy["half_open_max_calls"]  # type: ignore[no-any-return]

    def acquire(self, document: Document, policy: dict[str, Any]) -> tuple[bool, int | None]:
        if document.state == "open":
            if document.now < document.open_until_ms:
                return False, None
            self.transition(document, "half_open", "timeout")
        if not self.free_slot(document, policy):
            return False, None
        document.probe_seq += 1
        document.probes[document.probe_seq] = document.now + policy["probe_timeout_ms"]
        return True, document.probe_seq

    def count_failures(self, document: Document, failures: int) -> None:
        document.failure_count = min(document.failure_count + failures, 2**32 - 1)
        document.last_failure_time = document.now // 1000

    def note_reporter(self, document: Document, policy: dict[str, Any], instance: str) -> None:
        reporters = document.reporters
        reporters[instance] = document.now
        names = sorted(reporters, key=lambda name: (reporters[name], name))
        for name in names[: max(len(names) - policy["quorum"], 0)]:
            del reporters[name]

    def reporters_since(self, document: Document, since_ms: int) -> int:
        return sum(at >= since_ms for at in document.reporters.values())

    def record_probe(self, document: Document, request: Request, policy: dict[str, Any]) -> bool:
        slot = request["probe"]
        if slot not in document.probes:
            return False
        failures = request.get("failures", 0)
        slow = request.get("slow", 0) if policy["slow_call_rate_threshold"] > 0 else 0
        if request.get("pending", 0) == 0:  # a transition clears it in any case
            del document.probes[slot]
        if failures > 0:
            self.count_failures(document, failures)
        if failures + slow > 0:
            self.trip(document, policy, "probe_failed" if failures > 0 else "probe_slow")
        elif request.get("successes", 0) > 0:
            document.success_count += 1
            if document.success_count >= policy["success_threshold"]:
                self.close(document, "probe_succeeded")
        return True

    def trip_reason(self, document: Document, policy: dict[str, Any]) -> str | None:
        quorum: int = policy["quorum"]

        def quorate(since_ms: int) -> bool:
            return quorum == 1 or self.reporters_since(document, since_ms) >= quorum

        run_since_ms = document.now if document.run_since_ms is None else document.run_since_ms
        if document.failure_count >= policy["failure_threshold"] and quorate(run_since_ms):
            return "failure_threshold"
        if document.window is None:
            return None
        window = document.window
        if window.calls < policy["minimum_calls"] or not quorate(document.now - policy["window_ms"] + 1):
            return None
        if 0 < policy["error_rate_threshold"] <= window.failures / window.calls:
            return "error_rate"
        if 0 < policy["slow_call_rate_threshold"] <= window.slow / window.calls:
            return "slow_rate"
        return None

    def record_closed(self, document: Document, request: Request, policy: dict[str, Any]) -> bool:
        successes, failures, slow = (request.get(key, 0) for key in ("successes", "failures", "slow"))
        bucket_ms = self.bucket_ms(policy)
        if document.forced or successes + failures + slow == 0:
            return False
        if successes > 0:
            document.failure_count, document.run_since_ms = 0, None
        if failures > 0:
            if document.run_since_ms is None and policy["quorum"] > 1:
                document.run_since_ms = document.now
            self.count_failures(document, failures)
        if policy["quorum"] > 1 and (failures > 0 or (slow > 0 and policy["slow_call_rate_threshold"] > 0)):
            self.note_reporter(document, policy, request.get("instance", ""))
        if document.window is None and bucket_ms is not None:
            document.window = Window(bucket_ms, document.now // bucket_ms)
        if document.window is not None:
            document.window.calls += successes + failures + request.get("pending", 0) - request.get("counted", 0)
            document.window.failures += failures
            document.window.slow += slow
        reason = self.trip_reason(document, policy)
        if reason is not None:
            self.trip(document, policy, reason)
        return True

    def record(self, document: Document, request: Request, policy: dict[str, Any]) -> bool:
        if document.fresh or request.get("generation") != document.generation:
            return False
        if document.state == "half_open" and request.get("probe") is not None:
            return self.record_probe(document, request, policy)
        if document.state == "closed" and request.get("probe") is None:
            return self.record_closed(document, request, policy)
        return False

    def retry_after_ms(self, document: Document, policy: dict[str, Any]) -> int | None:
        if document.state == "open":
            return max(document.open_until_ms - document.now, 0)
        if self.free_slot(document, policy):
            return None
        return min(document.probes.values()) - document.now

    def control(self, document: Document, action: str, duration_ms: int) -> bool:
        if action == "reset":
            self.close(document, "reset")
        elif action == "force_open":
            self.open_for(document, duration_ms, "forced")
        elif action == "force_closed":
            self.close(document, "forced")
        elif document.forced is None:
            return False
        elif document.forced == "open":
            document.open_until_ms = document.now
        document.forced = _FORCED.get(action)
        document.forced_until_ms = document.now + duration_ms if document.forced else None
        return True

    def health(self, document: Document, policy: dict[str, Any], sums: Sums) -> int:
        failure_rate, slow_rate = (sums.failures / sums.calls, sums.slow / sums.calls) if sums.calls else (0.0, 0.0)
        if document.state == "closed":
            failure_rate = max(failure_rate, min(document.failure_count / policy["failure_threshold"], 1))
        allowed = {"closed": 1, "half_open": 0.5, "open": 0}[document.state]
        score = allowed * (1 - failure_rate) * (1 - slow_rate / 2) * 4 / (4 + self.recent_trips(document, policy))
        return math.floor(100 * score + 0.5)

    # Reply

    def _reply(self, document: Document, request: Request, policy: dict[str, Any], reply: Reply) -> Reply:
        if document.change is not None:
            instance = request.get("instance", "")
            self._history.append({**document.change, "time_ms": document.now, "instance": instance})
        generation = 0 if "exists" in reply and document.fresh else document.generation
        ramp_left_ms = 0
        if document.closed_at_ms is not None:
            ramp_left_ms = document.closed_at_ms + policy["ramp_up_ms"] - document.now
        return {
            **reply,
            "state": document.state,
            "generation": generation,
            "failure_count": document.failure_count,
            "success_count": document.success_count,
            "retry_after_ms": self.retry_after_ms(document, policy),
            "ramp_left_ms": ramp_left_ms if ramp_left_ms > 0 else None,
            "forced": document.forced,
            "override": self._override,
            "transition": document.change,
            "source": self.source,
        }


_local_generations = itertools.count(2)  # FixedEngine has -1


class LocalEngine(MemoryEngine):
    """Protects one process while Redis is down; its own generations are below zero, so Redis never takes them."""

    source = "local"
    fleet_generation = 0  # beside which it is kept, where an instance fails alone

    @property
    def state(self) -> State:
        """As of the last request."""
        return self._document.state if self._document else "closed"

    @property
    def generation(self) -> int:
        """As of the last request."""
        return self._document.generation if self._document else 0

    def next_generation(self, document: Document) -> int:
        return -next(_local_generations)


def document_for(state: State, generation: int, failure_count: int, open_for: float) -> Document:
    """A local engine's start from a view; open_for: seconds that the circuit stays open."""
    now = clock_ms()
    return Document(
        # the slots of a local half_open are none of Redis'
        generation=generation if state == "closed" and generation else -next(_local_generations),
        state=state,
        failure_count=failure_count,
        opened_at=None if state == "closed" else now // 1000,
        open_until_ms=now + max(round(open_for * 1000), 0),
        fresh=False,
    )
