"""The values behind each metrics exporter: counted from events, or read from breakers and Redis in one exchange."""

from __future__ import annotations

import collections
import dataclasses
import threading
import weakref
from collections.abc import Callable
from os import getpid
from time import monotonic
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from .._clock import NEVER
from .._core import BreakerCore
from .._events import Counts, Event, Instrument, Notices
from .._process import renew, renew_at_forks
from .._protocol import Snapshot, State, decode, snapshot_from
from .._view import View
from ..wire import commands
from ..wire.options import BLOCKING, client_of, error_kind
from ..wire.sync import Server

CallOutcome: TypeAlias = Literal["success", "slow", "failure", "ignored", "rejected"]
OUTCOMES: tuple[CallOutcome, ...] = get_args(CallOutcome)
STATES: tuple[State, ...] = get_args(State)
_COUNTS = tuple(field.name for field in dataclasses.fields(Counts))
DURATION_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Transition(NamedTuple):
    """The labels by which transitions are counted."""

    breaker: str
    old: str
    new: str
    reason: str
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class BreakerReading:
    """One breaker at one moment. health, probes_in_flight: None if neither Redis nor a local engine can tell them.

    view_age: seconds; None before the first reply, and for a breaker in memory. calls: of this process, by outcome.
    shadow_rejected: calls of this process that ran although an enforcing breaker would have rejected them.
    """

    name: str
    state: State
    health: int | None
    probes_in_flight: int | None
    fallback: bool
    view_age: float | None
    calls: dict[CallOutcome, int]
    shadow_rejected: int


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Everything that a scrape exports, except the script durations."""

    breakers: list[BreakerReading]
    transitions: dict[Transition, int]
    redis_errors: dict[str, int]


class Meter(Instrument):
    """Counts the transitions and Redis errors of its breakers; reads everything else on demand.

    redis: a client or URL to read the state of the fleet; None reads what this process knows. timeout: seconds.
    """

    def __init__(self, redis: Any = None, timeout: float = 0.25) -> None:
        self._client = None if redis is None else client_of(redis, BLOCKING)
        self._server = None if redis is None else Server.of(self._client, timeout)
        self._breakers: weakref.WeakKeyDictionary[BreakerCore, None] = weakref.WeakKeyDictionary()
        self._start_process()
        self._pid = getpid()
        renew_at_forks(self)

    def _after_fork(self) -> None:
        """In a child: start from zero, since the parent exports its own counts, and replace the locks it may hold."""
        self._start_process()
        if self._server is not None:
            renew(self._server)

    def _start_process(self) -> None:
        self._counting, self._reading = threading.RLock(), threading.RLock()
        self._transitions: collections.Counter[Transition] = collections.Counter()
        self._errors: collections.Counter[str] = collections.Counter()
        self._ended: dict[str, Counts] = {}  # by name: the counts of breakers that are gone

    def _attach(self, breaker: BreakerCore) -> None:
        with self._counting:
            self._breakers[breaker] = None
        weakref.finalize(breaker, self._detach, breaker.name, breaker._notices, breaker._view).atexit = False

    def _detach(self, name: str, notices: Notices, view: View) -> None:
        with self._counting:
            self._ended[name] = _sum([notices.counts(view.successes()), self._ended.get(name, NO_CALLS)])

    def __call__(self, event: Event) -> None:
        if event.kind == "state_change" and event.source != "watch":
            change = map(str, (event.old, event.new, event.reason, event.source))
            with self._counting:
                self._transitions[Transition(event.breaker, *change)] += 1

    def _script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        if error is not None:
            self._count_error(error)

    def _count_error(self, error: BaseException) -> None:
        with self._counting:
            self._errors[error_kind(error)] += 1

    def _read_all(self) -> Reading:
        """Read everything now, in one exchange of at most about one timeout. Raises no error of Redis."""
        return self._read(self._snapshots)

    def _read_here(self) -> Reading:
        """Read what this process knows, without asking Redis."""
        return self._read(lambda breakers: [None] * len(breakers))

    def _read(self, snapshots_of: Callable[[list[BreakerCore]], list[Snapshot | None]]) -> Reading:
        if getpid() != self._pid:
            renew(self)
        with self._reading:
            with self._counting:
                breakers, ended = list(self._breakers), dict(self._ended)
            named: dict[str, list[BreakerCore]] = {}
            for breaker in breakers:
                named.setdefault(breaker.name, []).append(breaker)
            snapshots = snapshots_of([same[0] for same in named.values()])
            readings = [
                _read_one(name, same, snapshot, ended.get(name, NO_CALLS))
                for (name, same), snapshot in zip(named.items(), snapshots, strict=True)
            ]
            with self._counting:
                return Reading(readings, dict(self._transitions), dict(self._errors))

    def _snapshots(self, breakers: list[BreakerCore]) -> list[Snapshot | None]:
        """The state of each breaker: from its local engine if that decides, else from Redis; None if Redis is down."""
        found = [_local_snapshot(breaker) for breaker in breakers]
        asked = [place for place, snapshot in enumerate(found) if snapshot is None]
        if self._server is None or not asked:
            return found
        requests = [commands.run("snapshot", breakers[place]._key, breakers[place]._with_policy) for place in asked]
        replies = self._server.exchange(requests)
        for lost in {reply for reply in replies if isinstance(reply, Exception)}:  # one for each lost node
            self._count_error(lost)
        for place, reply in zip(asked, replies, strict=True):
            if isinstance(reply, bytes):
                content = {**decode(reply), "source": "redis"}
                found[place] = snapshot_from(breakers[place].name, content, breakers[place].policy)
        return found


def _local_snapshot(breaker: BreakerCore) -> Snapshot | None:
    """The state from the breaker's local engine; None while Redis decides."""
    engine = breaker._memory if breaker._line is None else breaker._line.local
    if engine is None:
        return None
    return snapshot_from(breaker.name, engine.run("snapshot", breaker._with_policy), breaker.policy)


def _sum(counts: list[Counts]) -> Counts:
    return Counts(**{field: sum(getattr(one, field) for one in counts) for field in _COUNTS})


NO_CALLS = _sum([])


def _read_one(name: str, breakers: list[BreakerCore], snapshot: Snapshot | None, ended: Counts) -> BreakerReading:
    now, ages = monotonic(), [breaker._view.seen.sent for breaker in breakers if breaker._redis is not None]
    counts = _sum([ended, *(breaker.counts for breaker in breakers)])
    return BreakerReading(
        name,
        state=snapshot.state if snapshot else breakers[0]._view.state,
        health=snapshot.health if snapshot else None,
        probes_in_flight=snapshot.probes_in_flight if snapshot else None,
        fallback=any(breaker._line is not None and breaker._line.local is not None for breaker in breakers),
        view_age=max((now - sent for sent in ages if sent != NEVER), default=None),
        calls={
            "success": counts.successes - counts.slow_successes,
            "slow": counts.slow_successes,
            "failure": counts.failures,
            "ignored": counts.ignored,
            "rejected": counts.rejected,
        },
        shadow_rejected=counts.shadow_rejected,
    )
