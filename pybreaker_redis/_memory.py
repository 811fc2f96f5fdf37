"""The state machine in Python: for redis=None, for when Redis is down, and as the model the Lua is tested by.

It mirrors lua/breaker.lua: the same names in the same order, milliseconds inside.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from ._policy import Policy, request_field, request_value
from ._protocol import LONGEST_OVERRIDE, Reply, Request, State

LONGEST_OVERRIDE_MS = int(LONGEST_OVERRIDE * 1000)
HISTORY_ENTRIES = 1000
_DEFAULTS = {
    request_field(f.name): request_value(f.name, f.default)  # type: ignore[arg-type]
    for f in dataclasses.fields(Policy)
}
_WALL_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def clock_ms() -> int:
    """Unix milliseconds that never go back in this process."""
    return (time.monotonic_ns() + _WALL_OFFSET_NS) // 1_000_000


@dataclasses.dataclass(slots=True)
class Document:
    """The state document; its fields are explained at the head of lua/breaker.lua."""

    generation: int
    state: State = "closed"
    failure_count: int = 0
    success_count: int = 0
    last_failure_time: int | None = None
    opened_at: int | None = None
    open_until_ms: int = 0
    trips: int = 0
    probe_seq: int = 0
    probes: dict[int, int] = dataclasses.field(default_factory=dict)
    forced: Literal["open", "closed"] | None = None
    forced_until_ms: int | None = None
    fresh: bool = True
    change: dict[str, Any] | None = None


class MemoryEngine:
    """Answers the same requests as the scripts, for one breaker in one process.

    now_ms: the clock. document: where to start, else closed.
    """

    source = "memory"

    def __init__(self, now_ms: Callable[[], int] = clock_ms, document: Document | None = None) -> None:
        self._now_ms = now_ms
        self._document = document
        self._lock = threading.Lock()
        self._history: collections.deque[dict[str, Any]] = collections.deque(maxlen=HISTORY_ENTRIES)

    def after_fork(self) -> None:
        """Forget a lock that another thread of the parent may have held."""
        self._lock = threading.Lock()

    def run(self, name: str, request: Request) -> Reply:
        """The reply of the script called name."""
        with self._lock:
            now = self._now_ms()
            policy = {**_DEFAULTS, **request.get("policy", {})}
            document = self._load(now)
            reply: Reply = getattr(self, f"_{name}")(document, request, policy, now)
            return self._reply(document, request, policy, now, reply)

    def history(self, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first, as the stream keeps them."""
        with self._lock:
            return list(self._history)[::-1][:count]

    def next_generation(self, current: int, now: int) -> int:
        """The generation after current."""
        return max(current + 1, now)

    def _load(self, now: int) -> Document:
        document = self._document
        if document is None:
            return Document(generation=now)
        document.fresh, document.change = False, None
        document.probes = {slot: end for slot, end in document.probes.items() if end > now}
        if document.forced_until_ms is not None and document.forced_until_ms <= now:
            document.forced, document.forced_until_ms = None, None
        return document

    # Scripts

    def _acquire(self, document: Document, request: Request, policy: dict[str, int], now: int) -> Reply:
        self.record(document, request, policy, now)
        admitted, probe = self.acquire(document, policy, now)
        if admitted:
            self._document = document
        return {"admitted": admitted, "probe": probe}

    def _record(self, document: Document, request: Request, policy: dict[str, int], now: int) -> Reply:
        self._document = document
        return {"applied": self.record(document, request, policy, now)}

    def _control(self, document: Document, request: Request, policy: dict[str, int], now: int) -> Reply:
        changed = self.control(document, request["action"], request.get("duration_ms"), now)
        if changed:
            self._document = document
        return {"changed": changed}

    def _snapshot(self, document: Document, request: Request, policy: dict[str, int], now: int) -> Reply:
        return {
            "exists": not document.fresh,
            "last_failure_time": document.last_failure_time,
            "opened_at": document.opened_at,
            "forced_until_ms": document.forced_until_ms,
            "trips": document.trips,
            "probes_in_flight": len(document.probes),
            "now_ms": now,
        }

    # Rules

    def transition(self, document: Document, state: State, reason: str, now: int) -> None:
        generation = self.next_generation(document.generation, now)
        document.change = {
            "from": document.state,
            "to": state,
            "reason": reason,
            "failure_count": document.failure_count,
            "success_count": document.success_count,
            "generation": generation,
        }
        document.state, document.generation = state, generation
        document.success_count = 0
        document.probes, document.probe_seq = {}, 0
        document.forced, document.forced_until_ms = None, None

    def open_for(self, document: Document, duration_ms: int, reason: str, now: int) -> None:
        self.transition(document, "open", reason, now)
        document.opened_at = now // 1000
        document.open_until_ms = now + duration_ms

    def trip(self, document: Document, policy: dict[str, int], reason: str, now: int) -> None:
        self.open_for(document, policy["reset_timeout_ms"], reason, now)
        document.trips += 1

    def close(self, document: Document, reason: str, now: int) -> None:
        self.transition(document, "closed", reason, now)
        document.failure_count, document.trips, document.opened_at = 0, 0, None

    def free_slot(self, document: Document, policy: dict[str, int]) -> bool:
        return len(document.probes) < policy["half_open_max_calls"]

    def acquire(self, document: Document, policy: dict[str, int], now: int) -> tuple[bool, int | None]:
        if document.state == "closed":
            return True, None
        if document.state == "open":
            if now < document.open_until_ms:
                return False, None
            self.transition(document, "half_open", "timeout", now)
        if not self.free_slot(document, policy):
            return False, None
        document.probe_seq += 1
        document.probes[document.probe_seq] = now + policy["probe_timeout_ms"]
        return True, document.probe_seq

    def count_failures(self, document: Document, failures: int, now: int) -> None:
        document.failure_count = min(document.failure_count + failures, 2**32 - 1)
        document.last_failure_time = now // 1000

    def record_closed(
        self, document: Document, policy: dict[str, int], successes: int, failures: int, now: int
    ) -> bool:
        if document.forced:
            return False
        if successes > 0:
            document.failure_count = 0
        if failures > 0:
            self.count_failures(document, failures, now)
            if document.failure_count >= policy["failure_threshold"]:
                self.trip(document, policy, "failure_threshold", now)
        return successes + failures > 0

    def record_probe(
        self, document: Document, policy: dict[str, int], probe: int, successes: int, failures: int, now: int
    ) -> bool:
        if document.probes.pop(probe, None) is None:
            return False
        if failures > 0:
            self.count_failures(document, failures, now)
            self.trip(document, policy, "probe_failed", now)
        elif successes > 0:
            document.success_count += 1
            if document.success_count >= policy["success_threshold"]:
                self.close(document, "probe_succeeded", now)
        return True

    def record(self, document: Document, request: Request, policy: dict[str, int], now: int) -> bool:
        if document.fresh or request.get("generation") != document.generation:
            return False
        successes, failures = request.get("successes", 0), request.get("failures", 0)
        probe = request.get("probe")
        if document.state == "closed" and probe is None:
            return self.record_closed(document, policy, successes, failures, now)
        if document.state == "half_open" and probe is not None:
            return self.record_probe(document, policy, probe, successes, failures, now)
        return False

    def control(self, document: Document, action: str, duration_ms: int | None, now: int) -> bool:
        duration_ms = duration_ms or LONGEST_OVERRIDE_MS
        if action == "reset":
            self.close(document, "reset", now)
        elif action == "force_open":
            self.open_for(document, duration_ms, "forced", now)
            document.forced = "open"
        elif action == "force_closed":
            self.close(document, "forced", now)
            document.forced = "closed"
        elif document.forced is None:
            return False
        else:
            document.open_until_ms = now
            document.forced = None
        document.forced_until_ms = now + duration_ms if document.forced else None
        return True

    def retry_after_ms(self, document: Document, policy: dict[str, int], now: int) -> int | None:
        if document.state == "open":
            return max(document.open_until_ms - now, 0)
        if document.state != "half_open" or self.free_slot(document, policy):
            return None
        return min(document.probes.values()) - now

    # Reply

    def _reply(self, document: Document, request: Request, policy: dict[str, int], now: int, reply: Reply) -> Reply:
        if document.change is not None:
            self._history.append({**document.change, "time_ms": now, "instance": request.get("instance", "")})
        generation = 0 if "exists" in reply and document.fresh else document.generation
        document.fresh = False
        return {
            **reply,
            "state": document.state,
            "generation": generation,
            "failure_count": document.failure_count,
            "success_count": document.success_count,
            "retry_after_ms": self.retry_after_ms(document, policy, now),
            "forced": document.forced,
            "transition": document.change,
            "source": self.source,
        }
