"""The engine that answers the scripts' requests in memory, for redis=None and while Redis is down.

It is also the model that tests compare the Lua with.
"""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from . import _rules
from ._policy import DEFAULT_REQUEST
from ._protocol import LONGEST_OPEN_MS, POLICY_ACTIONS, Forced, Reply, Request, State, override_text
from ._rules import Document
from ._view import View
from ._window import Sums, bucket_ms, sums, window_at

HISTORY_ENTRIES = 1000
_UNSET: tuple[Any, Any] = object(), object()
_FAILURE = {"failures": 1}
_OUTCOMES = {"successes", "failures", "slow", "hold_ms", "probe"}
_WALL_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def clock_ms() -> int:
    """Unix milliseconds. They go back only when a test turns the clock back."""
    return (time.monotonic_ns() + _WALL_OFFSET_NS) // 1_000_000


@functools.lru_cache(maxsize=1000)
def _whole_policy(fields: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """These fields and the defaults of all others; the same for all engines."""
    return {**DEFAULT_REQUEST, **dict(fields)}


class MemoryEngine:
    """Answers the requests of the scripts, for one breaker in one process.

    now_ms: the clock. document: the state to start from; default closed. override: the policy override, which ends at
    override_until_ms if that is given.
    quorum_of_one: ignore the policy's quorum, since no other process reports to this engine.
    publish: called with each message that a script would publish.
    lock: of the breaker; default: one of its own.
    """

    source = "memory"
    is_local = False
    __slots__ = (
        *("_now_ms", "_publish", "_quorum_of_one", "_document", "_override", "_override_until_ms", "_override_by"),
        *("_dropped", "_latest_ms", "_made_of", "_policy", "_unjudged", "_lock", "_history"),
    )

    def __init__(
        self,
        now_ms: Callable[[], int] = clock_ms,
        document: Document | None = None,
        override: dict[str, Any] | None = None,
        override_until_ms: int | None = None,
        quorum_of_one: bool = False,
        publish: Callable[[dict[str, Any]], None] | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        self._now_ms = now_ms
        self._publish = publish
        self._quorum_of_one = quorum_of_one
        self._document = document
        self._override = override
        self._override_until_ms = override_until_ms
        self._override_by: dict[str, Any] = {}  # its operator and note, as in the reply of the snapshot
        self._dropped: dict[str, Any] | None = None  # the policy override that the present request has ended
        self._latest_ms = 0  # what the clock said last
        self._made_of = _UNSET  # the inputs of _policy, which is never changed in place
        self._policy: dict[str, Any] = {}
        self._unjudged = 0  # a run that stays below this many failures changes nothing else; 0: judge each failure
        self._lock = lock or threading.RLock()
        self._history: collections.deque[dict[str, Any]] | None = None  # until the first transition

    def after_fork(self, lock: threading.RLock) -> None:
        """In a child: replace the lock, which a thread of the parent may hold."""
        self._lock = lock

    def replace(self, **fields: Any) -> None:
        """Go on from a document with these fields, under a new generation: calls that are running will not count."""
        with self._lock:
            generation = 0 if self._document is None else self._document.generation
            document = Document(generation, now=self._now_ms(), **fields)
            document.generation = _rules.next_generation(document)
            self._document = document

    def run(self, name: str, request: Request) -> Reply:
        """The reply of the script called name."""
        with self._lock:
            now = self._now_ms()
            if now < self._latest_ms:
                self._turn_back(self._latest_ms - now)
            self._latest_ms = now
            if self._override_until_ms is not None and self._override_until_ms <= now:
                self.obey(None)
            drops = request.get("action") in ("reset", "clear_policy")  # a reset replaces everything but the history
            self._dropped = self._override if drops else None
            if drops:
                self.obey(None)
            policy = self._policy_of(request.get("policy"))
            document = self._load(policy, now)
            reply = _SCRIPTS[name](self, document, request, policy)
            self._announce(document, request)
            return self._reply(document, policy, reply)

    def count_failure(self, generation: int, given: dict[str, Any] | None, view: View) -> bool:
        """Count a failure that can only lengthen a run, in place: without a copy, a verdict and a reply.

        Returns False, with nothing done, if it might do more: then run() decides. generation: under which the call was
        admitted. given: the caller's fields of the policy. view: shares this engine's lock, and has gathered the
        successes that ended the run before.
        """
        if not self._unjudged:
            return False
        with self._lock:
            document, now, made_of = self._document, self._now_ms(), self._made_of
            if document is None or made_of[0] is not given or made_of[1] is not self._override:
                return False
            if document.generation != generation or document.state != "closed" or document.forced is not None:
                return False
            if document.window is not None or document.closed_at_ms is not None or now < self._latest_ms:
                return False
            if document.failure_count + 1 >= self._unjudged:
                return False
            self._latest_ms = document.now = now
            successes = view.seen.counter.take_unseen() if view.seen.generation == generation else 0
            _rules.count_outcomes(document, {"failures": 1, "successes": successes} if successes else _FAILURE, 1, None)
            return True

    def _policy_of(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """The policy in force: the policy override, then the caller's fields, then the defaults."""
        made_of = given, self._override
        if made_of[0] is not self._made_of[0] or made_of[1] is not self._made_of[1]:
            fields = {**(given or {}), **(self._override or {}), **({"quorum": 1} if self._quorum_of_one else {})}
            policy = _whole_policy(tuple(fields.items()))
            runs_only = policy["quorum"] == 1 and bucket_ms(policy) is None and not (self._override or self._publish)
            self._made_of, self._policy = made_of, policy
            self._unjudged = policy["failure_threshold"] if runs_only else 0
        return self._policy

    def history(self, count: int) -> list[dict[str, Any]]:
        """The newest entries, newest first, with the fields of the history stream."""
        with self._lock:
            return list(self._history or ())[::-1][:count]

    def obey(self, override: dict[str, Any] | None) -> None:
        """Apply a policy override that was set elsewhere."""
        with self._lock:
            self._override, self._override_until_ms, self._override_by = override, None, {}

    def _set_override(self, request: Request, now: int) -> str | None:
        """Add fields to the policy override. Returns them with their end, or None if neither would change."""
        before, duration_ms = self._override, request.get("duration_ms")
        override = {**(before or {}), **request["override"]}
        until_ms = None if duration_ms is None else now + duration_ms
        if (override, until_ms) == (before, self._override_until_ms):
            return None
        self._override, self._override_until_ms = override, until_ms
        self._override_by = {f"override_{field}": request.get(field) for field in ("operator", "note")}
        return override_text(request["override"], until_ms)

    def _turn_back(self, by_ms: int) -> None:
        """Follow a clock that was turned back: what is left of each time stays."""
        if self._document is not None:
            self._document.turn_back(by_ms)
        if self._override_until_ms is not None:
            self._override_until_ms -= by_ms

    def _load(self, policy: dict[str, Any], now: int) -> Document:
        """A copy of the document as of now. It replaces the document where a script would write it."""
        if self._document is None:
            return Document(generation=now * 1000, now=now, is_local=self.is_local)
        document = self._document.copy()
        document.now, document.is_new = now, False
        if document.probes:
            document.probes = {slot: end for slot, end in document.probes.items() if end > now}
        if document.window is not None:
            document.window = window_at(document.window, bucket_ms(policy), now, "window_ms" in (self._override or {}))
        closed_at_ms = document.closed_at_ms
        ramped = closed_at_ms is not None and now >= closed_at_ms + policy["ramp_up_ms"]
        if ramped and _rules.recent_trips(document, policy) == 0:
            document.trips, document.closed_at_ms, document.outlived = 0, None, True
        if document.forced_until_ms is not None and document.forced_until_ms <= now:
            document.forced, document.forced_until_ms = None, None
        return document

    # Scripts

    def _acquire(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        counted = _rules.record(document, request, policy)
        admitted, probe = (True, None) if document.state == "closed" else _rules.acquire(document, policy)
        if counted or (admitted and (document.is_new or probe is not None)):
            self._document = document
        shadow = not admitted and not policy["enforce"]
        return {"admitted": admitted or shadow, "probe": probe, "shadow": shadow or None}

    def _record(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        applied = _rules.record(document, request, policy)
        if applied or document.is_new or (document.outlived and not request.keys() & _OUTCOMES):
            self._document = document
        return {"applied": applied}

    def _control(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        action = request["action"]
        fields = override_text(self._dropped) if self._dropped is not None else None
        if action == "set_policy":
            fields = self._set_override(request, document.now)
        changed = action not in POLICY_ACTIONS and _rules.control(
            document, action, request.get("duration_ms") or LONGEST_OPEN_MS
        )
        if fields is not None and not changed:
            _rules.enter_policy(document, action)
        if fields is not None or changed:
            _rules.sign(document, request, fields)
        if changed:
            self._document = document
        return {"changed": changed or fields is not None}

    def _snapshot(self, document: Document, request: Request, policy: dict[str, Any]) -> Reply:
        counts = sums(document.window) if document.window else Sums(0, 0, 0)
        return {
            "exists": not document.is_new,
            "last_failure_time": document.last_failure_time,
            "opened_at": document.opened_at,
            "reason": document.reason,
            "changed_at_ms": document.changed_at_ms,
            "operator": document.operator,
            "note": document.note,
            **self._override_by,
            "forced_until_ms": document.forced_until_ms,
            "trips": _rules.recent_trips(document, policy),
            "health": _rules.health(document, policy, counts),
            "calls": counts.calls,
            "failures": counts.failures,
            "slow": counts.slow,
            "reporters": dict(document.reporters) or None,
            "policy": policy,
            "probes_in_flight": len(document.probes),
            "now_ms": document.now,
        }

    # Reply

    def _announce(self, document: Document, request: Request) -> None:
        """Add a transition or an operator's action to the history, and publish what a script would."""
        change = document.change or document.entry
        message: dict[str, Any] | None = None
        if change is not None:
            instance = request.get("instance", "")
            self._history = self._history or collections.deque(maxlen=HISTORY_ENTRIES)
            self._history.append({**change, "time_ms": document.now, "instance": instance})
            open_ms = document.open_until_ms - document.now if document.state == "open" else None
            message = {**change, "retry_after_ms": open_ms}
        elif document.hint:
            message = {"failure_count": document.failure_count}
        if self._publish is not None and message is not None:
            message |= {"instance": request.get("instance"), "time_ms": document.now}
            self._publish({field: value for field, value in message.items() if value is not None})

    def _reply(self, document: Document, policy: dict[str, Any], reply: Reply) -> Reply:
        reply["state"], reply["success_count"] = document.state, document.success_count
        reply["generation"] = 0 if "exists" in reply and document.is_new else document.generation
        reply["failure_count"], reply["failure_number"] = document.failure_count, document.failure_number
        reply["source"] = self.source
        if document.state != "closed":
            reply["retry_after_ms"] = _rules.retry_after_ms(document, policy)
            reply["reason"], reply["error"] = document.reason, document.error
        if document.closed_at_ms is not None:
            ramp_left_ms = document.closed_at_ms + policy["ramp_up_ms"] - document.now
            if ramp_left_ms > 0:
                reply["ramp_left_ms"] = ramp_left_ms
        if document.forced is not None and document.forced_until_ms is not None:
            reply["forced"], reply["forced_left_ms"] = document.forced, document.forced_until_ms - document.now
        if self._override is not None:
            reply["override"] = self._override
        if document.window is not None and document.window.shorter_since is not None:
            reply["window_ms"] = document.window.bucket_ms * 10
        if self._override_until_ms is not None:
            reply["override_left_ms"] = self._override_until_ms - document.now
        if document.change is not None:
            reply["transition"] = document.change
        return reply


_SCRIPTS: dict[str, Callable[[MemoryEngine, Document, Request, dict[str, Any]], Reply]] = {
    "acquire": MemoryEngine._acquire,
    "record": MemoryEngine._record,
    "control": MemoryEngine._control,
    "snapshot": MemoryEngine._snapshot,
}


class LocalEngine(MemoryEngine):
    """Protects one process while Redis is down. Its own generations are below zero, so that Redis rejects them."""

    source = "local"
    is_local = True
    fleet_generation = 0  # the fleet's generation while this instance is isolated

    @property
    def state(self) -> State:
        """The state after the last request."""
        return self._document.state if self._document else "closed"

    @property
    def generation(self) -> int:
        """The generation after the last request."""
        return self._document.generation if self._document else 0


class FixedEngine:
    """Admits every call or rejects every call while Redis is down, and counts nothing."""

    source = "local"

    def __init__(self, state: State, retry_after_ms: int) -> None:
        self._state, self._retry_after_ms = state, retry_after_ms

    def run(self, name: str, request: Request) -> Reply:
        """The same reply to every script call."""
        return {
            "admitted": self._state == "closed",
            "applied": False,
            "state": self._state,
            "generation": -1,
            "failure_count": 0,
            "failure_number": 0,
            "success_count": 0,
            "retry_after_ms": self._retry_after_ms if self._state == "open" else None,
            "source": self.source,
        }


def document_for(
    state: State,
    generation: int = 0,
    failure_count: int = 0,
    open_for: float = 0.0,
    forced: Forced | None = None,
    forced_for: float = 0.0,
    reason: str | None = None,
    error: str | None = None,
) -> Document:
    """The document of a view, for a local engine to start from.

    open_for: seconds that the circuit stays open. forced_for: seconds until the forced state ends. reason, error: of
    the transition that led to it.
    """
    now = clock_ms()
    document = Document(
        generation=generation,
        state=state,
        failure_count=failure_count,
        failure_number=failure_count if state == "closed" else 0,
        opened_at=None if state == "closed" else now // 1000,
        open_until_ms=now + round(open_for * 1000),
        forced=forced,
        forced_until_ms=None if forced is None else now + round(forced_for * 1000),
        reason=reason,
        error=error,
        is_local=True,
        is_new=False,
    )
    if state != "closed" or not generation:
        # Redis must not accept the slots of a local half-open state
        document.generation = _rules.next_generation(document)
    return document
