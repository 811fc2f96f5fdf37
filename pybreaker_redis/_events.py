"""Events for listeners, and call counts for metrics."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from typing import Any, Literal, NamedTuple, TypeAlias

from ._classify import Outcome
from ._errors import PolicyError
from ._protocol import COUNTS, State
from ._view import Counter

EventKind: TypeAlias = Literal[
    "state_change", "redis_error", "redis_restored", "success", "failure", "ignored", "rejected"
]
"""The kind of an Event."""
Listener: TypeAlias = Callable[["Event"], object]
"""A function of an Event, for `listeners` or `on_call`. On asyncio, it may be a coroutine function."""
CALL_KINDS = frozenset({"success", "failure", "ignored", "rejected"})
logger = logging.getLogger("pybreaker_redis")
_new = tuple.__new__


class Event(NamedTuple):
    """Something that happened to a breaker. Fields that do not apply to the kind are None.

    kind: `listeners` receive "state_change", "redis_error" and "redis_restored"; `on_call` receives "success",
    "failure", "ignored" and "rejected".
    breaker: the name of the breaker. instance: the process that caused the event, as "host:pid-" and eight random hex
    digits.
    old: the state before a state_change. new: the state after a state_change. reason: why the state changed, as in
    HistoryEntry. generation: the generation that a state_change begins. counts: the counts just before a state_change:
    failure_count, success_count and, with a window, calls, failures and slow. error: type and message of the failure
    that opened the circuit, if one did.
    retry_after: seconds after which a rejected caller should try again. enforced: whether a rejection took effect;
    False in shadow mode, where the call ran anyway.
    exception: the exception of a failure, an ignored call or a redis_error.
    slow: whether a success or failure took slow_call_duration or longer; None if the policy does not measure it.
    source: "redis", "memory" (redis=None), "local" (Redis is down), "isolated" (below the quorum, for this instance
    only) or "watch".

    Each transition notifies the one process that caused it. A watching process is notified of each new generation that
    it reads, with source "watch". Reason and counts then come from the history; they are None and empty if its entry is
    gone.
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
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The calls of one breaker in this process, by outcome; they only grow.

    successes: all successes, including slow ones. slow_successes: successes that took slow_call_duration or longer.
    failures: those of the guarded functions. ignored: calls that did not count. rejected: calls that did not run.
    Successes, failures, ignored and rejected add up to all calls. shadow_rejected: calls that shadow mode would have
    rejected; they ran, and count by their outcome, too.
    """

    successes: int
    slow_successes: int
    failures: int
    ignored: int
    rejected: int
    shadow_rejected: int


class Instrument:
    """A listener that also learns of its breakers and their script calls, such as a metrics collector.

    Guarded calls do not reach it: read them from `breaker.counts`.
    """

    def _attach(self, breaker: Any) -> None:
        """Called for each breaker that is created with this listener."""

    def _script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        """Called after each script call, with its duration and its error, or None if Redis replied."""

    def _used(self) -> None:
        """Called by each call whose breaker's view is older than the lease: once per lease while calls are made."""

    def __call__(self, event: Event) -> object:
        """Called with each transition and outage, like any listener."""


def _checked(option: str, given: Any) -> tuple[Listener, ...]:
    found: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) and not callable(given) else (None,)
    if not all(callable(one) for one in found):
        raise PolicyError(f"{option} must be a list of callables, as in {option}=[print], not {given!r}")
    return found


class Notices:
    """Queues a breaker's events and counts its calls. The shells deliver the events, outside every lock."""

    __slots__ = (
        *("name", "listeners", "on_call", "instruments", "instance", "waiting"),
        *("_notified", "_lock", "_counters"),
    )

    def __init__(self, name: str, listeners: Iterable[Listener], on_call: Iterable[Listener]) -> None:
        self.name = name
        self.listeners, self.on_call = _checked("listeners", listeners), _checked("on_call", on_call)
        self.instruments = tuple(one for one in self.listeners if isinstance(one, Instrument))
        for one in self.on_call:
            if isinstance(one, Instrument):
                raise PolicyError(f"{type(one).__name__} belongs in listeners=: it reads the calls from breaker.counts")

    def start_process(self, instance: str, lock: threading.RLock) -> None:
        """Start empty, also in a forked child: the parent delivers its own events and counts its own calls.

        lock: of the breaker.
        """
        self.instance = instance
        # by thread; no queue is ever replaced, since a signal handler may use it at any time
        self.waiting: dict[int, collections.deque[Event]] = {}
        self._notified: tuple[int, ...] = ()  # the latest generations
        self._lock = lock
        self._counters: dict[str, Counter] = {}

    def call_ended(
        self, outcome: Outcome, generation: int | None, error: BaseException | None = None, slow: bool | None = None
    ) -> None:
        """Notify on_call of the end of a call."""
        if self.on_call:
            # by position, without the class's own constructor: a third of the time
            who = self.instance
            fields = outcome, self.name, who, None, None, None, generation, None, None, error, None, slow, None, None
            self._put(_new(Event, fields))

    def count(self, outcome: str, slow: bool | None = False) -> None:
        """Count a call that the view does not count."""
        kind = "slow" if slow and outcome == "success" else outcome
        counter = self._counters.get(kind) or self._counters.setdefault(kind, Counter())
        counter.tick()

    def rejected(self, retry_after: float, enforced: bool) -> None:
        """Count a rejection, and notify on_call. enforced: False in shadow mode."""
        self.count("rejected" if enforced else "shadow_rejected")
        if self.on_call:
            self._put(Event("rejected", self.name, self.instance, retry_after=retry_after, enforced=enforced))

    def changed(self, change: dict[str, Any], source: str, instance: str | None = None) -> None:
        """Notify the listeners of a transition, once for each generation of the fleet."""
        if source in ("redis", "watch"):
            if change["generation"] in self._notified:
                return
            self._notified = (*self._notified[-31:], change["generation"])
        self._put(
            Event(
                "state_change",
                self.name,
                self.instance if instance is None else instance,
                old=change["from"],
                new=change["to"],
                reason=change["reason"],
                generation=change["generation"],
                counts={key: change[key] for key in COUNTS if key in change},
                source=source,
                error=change.get("error"),
            )
        )

    def redis_down(self, error: BaseException) -> None:
        """Notify the listeners that an outage of Redis began."""
        self._put(Event("redis_error", self.name, self.instance, exception=error, source="local"))

    def redis_up(self) -> None:
        """Notify the listeners that an outage of Redis is over."""
        self._put(Event("redis_restored", self.name, self.instance, source="redis"))

    def script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        """Notify the instruments of a script call."""
        for instrument in self.instruments:
            try:
                instrument._script_ran(name, seconds, error)
            except Exception:
                self.failed(instrument)

    def used(self) -> None:
        """Notify the instruments that calls are made."""
        for instrument in self.instruments:
            try:
                instrument._used()
            except Exception:
                self.failed(instrument)

    def _put(self, event: Event) -> None:
        if (queue := self.waiting.get(get_ident())) is None:
            queue = self.waiting.setdefault(get_ident(), collections.deque())
        queue.append(event)

    def take(self) -> list[Event]:
        """Take all events that this thread has to deliver."""
        queue, taken = self.waiting.get(get_ident()), []
        with contextlib.suppress(IndexError):  # a signal handler delivered the last one
            while queue:
                taken.append(queue.popleft())
        return taken

    def deliveries(self, events: Iterable[Event] | None) -> Iterator[tuple[Listener, Event]]:
        """The listeners to call, each with its event. events: None: all that this thread has to deliver."""
        queue = self.waiting.get(get_ident()) if events is None else collections.deque(events)
        try:
            while queue:
                event = queue.popleft()
                for listener in self.on_call if event.kind in CALL_KINDS else self.listeners:
                    yield listener, event
        except IndexError:  # a signal handler delivered the last one
            pass

    def call(self, listener: Listener, event: Event) -> Any:
        """Call a listener. Returns its result, or None if it raises, which is logged."""
        try:
            return listener(event)
        except Exception:
            self.failed(listener)

    def failed(self, listener: object) -> None:
        """Log a listener's exception, which must not reach the caller."""
        logger.exception("circuit breaker %r: listener %r failed", self.name, listener)

    def counts(self, gathered: int) -> Counts:
        """All calls so far. gathered: the successes that the view has counted."""
        with self._lock:
            found = collections.Counter({kind: counter.total() for kind, counter in list(self._counters.items())})
        return Counts(
            successes=gathered + found["success"] + found["slow"],
            slow_successes=found["slow"],
            failures=found["failure"],
            ignored=found["ignored"],
            rejected=found["rejected"],
            shadow_rejected=found["shadow_rejected"],
        )
