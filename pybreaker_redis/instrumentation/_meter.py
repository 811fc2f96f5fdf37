"""What every metrics back end exports: counted from events, read from the breakers, asked of Redis in one pipeline."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import weakref
from time import monotonic
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import redis
from redis.exceptions import MovedError, NoScriptError

from .._core import BreakerCore, Instrument
from .._fallback import FallbackEngine
from .._protocol import Keys, Reply, Snapshot, State, decode, encode, snapshot_from
from .._scripts import REDIS_ERRORS, _client, _Connections, _own_pool, _Words
from .._view import NEVER, Event

CallOutcome: TypeAlias = Literal["success", "slow", "failure", "ignored", "rejected"]
_Address: TypeAlias = tuple[str, int]
OUTCOMES: tuple[CallOutcome, ...] = get_args(CallOutcome)
STATES: tuple[State, ...] = get_args(State)
DURATION_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_meters: weakref.WeakSet[Meter] = weakref.WeakSet()


class Transition(NamedTuple):
    """What is told apart of transitions."""

    breaker: str
    old: str
    new: str
    reason: str
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class BreakerReading:
    """One breaker at one moment. health, probes_in_flight: None while Redis cannot be asked and no local engine runs.

    view_age: seconds, None before the first reply and for a breaker in memory.
    """

    name: str
    state: State
    health: int | None
    probes_in_flight: int | None
    fallback: bool
    view_age: float | None
    calls: dict[CallOutcome, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Everything that a scrape exports, but for the script durations."""

    breakers: list[BreakerReading]
    transitions: dict[Transition, int]
    redis_errors: dict[str, int]


class Meter(Instrument):
    """Counts what its breakers tell, and reads the rest when it is asked.

    redis: a client or URL for the state of the fleet (see SnapshotPipeline), None for what this process knows.
    timeout: seconds.
    """

    def __init__(self, redis: Any = None, timeout: float = 0.25) -> None:
        self._pipeline = None if redis is None else SnapshotPipeline(redis, timeout)
        self._breakers: list[BreakerCore] = []
        self._start_process()
        _meters.add(self)

    def _after_fork(self) -> None:
        """In a child: counts are the parent's to export, locks may be held, connections are the parent's."""
        self._start_process()
        if self._pipeline is not None:
            self._pipeline.forget()

    def _start_process(self) -> None:
        self._counting, self._reading = threading.Lock(), threading.Lock()
        self._calls: collections.Counter[tuple[str, str]] = collections.Counter()
        self._slow: collections.Counter[str] = collections.Counter()
        self._transitions: collections.Counter[Transition] = collections.Counter()
        self._errors: collections.Counter[str] = collections.Counter()
        self._most_successes: dict[str, int] = {}

    def attach(self, breaker: BreakerCore) -> None:
        with self._counting:
            self._breakers.append(breaker)

    def __call__(self, event: Event) -> None:
        with self._counting:
            if event.kind in ("failure", "ignored", "rejected"):
                self._calls[event.breaker, event.kind] += 1
            elif event.kind == "success" and event.slow:
                self._slow[event.breaker] += 1
            elif event.kind == "state_change" and event.source != "watch":
                told = (event.old, event.new, event.reason, event.source)
                self._transitions[Transition(event.breaker, *map(str, told))] += 1

    def script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        if error is not None:
            self._count_error(error)

    def _count_error(self, error: BaseException) -> None:
        with self._counting:
            self._errors[error_kind(error)] += 1

    def read(self) -> Reading:
        """Everything now, in one pipeline; raises nothing of redis-py, and takes about one timeout at the most."""
        with self._reading:
            with self._counting:
                breakers = list(self._breakers)
            named: dict[str, list[BreakerCore]] = {}
            for breaker in breakers:
                named.setdefault(breaker.name, []).append(breaker)
            snapshots = self._snapshots([same[0] for same in named.values()])
            successes = {name: self._successes(name, same) for name, same in named.items()}
            with self._counting:
                readings = [
                    self._read_one(name, same, snapshot, successes[name])
                    for (name, same), snapshot in zip(named.items(), snapshots, strict=True)
                ]
                return Reading(readings, dict(self._transitions), dict(self._errors))

    def _snapshots(self, breakers: list[BreakerCore]) -> list[Snapshot | None]:
        own = [breaker._own_snapshot() for breaker in breakers]
        asked = [b for b, snapshot in zip(breakers, own, strict=True) if snapshot is None]
        if self._pipeline is None or not asked:
            return own
        replies, errors = self._pipeline.read([(breaker.keys, encode(breaker._common)) for breaker in asked])
        for error in errors:
            self._count_error(error)
        found = {
            breaker.name: snapshot_from(breaker.name, {**reply, "source": "redis"}, breaker.policy)
            for breaker, reply in zip(asked, replies, strict=True)
            if reply is not None
        }
        return [snapshot or found.get(b.name) for b, snapshot in zip(breakers, own, strict=True)]

    def _successes(self, name: str, breakers: list[BreakerCore]) -> int:
        # never less than before: what a transition left behind uncounted was counted here while it was gathered
        now = sum(breaker._successes() for breaker in breakers) - self._slow[name]
        most = self._most_successes[name] = max(now, self._most_successes.get(name, 0))
        return most

    def _read_one(
        self, name: str, breakers: list[BreakerCore], snapshot: Snapshot | None, successes: int
    ) -> BreakerReading:
        now, ages = monotonic(), [breaker._view.seen.sent for breaker in breakers if breaker._redis is not None]
        counted = {"success": successes, "slow": self._slow[name]}
        return BreakerReading(
            name,
            state=snapshot.state if snapshot else breakers[0]._view.seen.state,
            health=snapshot.health if snapshot else None,
            probes_in_flight=snapshot.probes_in_flight if snapshot else None,
            fallback=any(isinstance(b._engine, FallbackEngine) and b._engine.alone for b in breakers),
            view_age=max((now - sent for sent in ages if sent != NEVER), default=None),
            calls={outcome: counted.get(outcome, self._calls[name, outcome]) for outcome in OUTCOMES},
        )


class SnapshotPipeline:
    """Asks for any number of breakers in one pipeline; on a cluster one for each of its nodes that has any.

    client: a redis-py client (Redis, RedisCluster, Sentinel master) or a URL; it is left as it was.
    timeout: seconds to connect, and to wait for the next reply.
    """

    def __init__(self, client: Any, timeout: float) -> None:
        self._client = _client(client, redis.Redis, redis.RedisCluster, "redis.Redis")
        self._timeout = timeout
        self.forget()

    def forget(self) -> None:
        """Connect anew next time. In a forked child this leaves the parent's connections alone."""
        self._lines: dict[_Address | None, _Line] = {}
        self._moved: dict[int, _Address] = {}  # slots that are elsewhere than the client thinks
        self._lost: set[_Address] = set()  # nodes that do not answer: another one knows who serves their slots now

    def read(self, asked: list[tuple[Keys, bytes]]) -> tuple[list[Reply | None], list[BaseException]]:
        """The reply of snapshot.lua to each request, None where there was none, and what went wrong."""
        replies: list[Reply | None] = [None] * len(asked)
        errors: list[BaseException] = []
        places: dict[_Address | None, list[int]] = {}
        for place, (keys, _) in enumerate(asked):
            places.setdefault(self._address(keys), []).append(place)
        for address, there in places.items():
            try:
                raw = self._line(address).snapshots([asked[place] for place in there])
            except REDIS_ERRORS as error:
                errors.append(error)
                if address is not None:
                    self._lost.add(address)
                continue
            for place, reply in zip(there, raw, strict=True):
                if isinstance(reply, bytes):
                    replies[place] = decode(reply)
                    continue
                errors.append(reply)
                if isinstance(reply, MovedError) and address is not None:
                    self._moved[reply.slot_id] = reply.host or address[0], int(reply.port)
                    self._lost.discard(self._moved[reply.slot_id])
        return replies, errors

    def _address(self, keys: Keys) -> _Address | None:
        if isinstance(self._client, redis.Redis):
            return None
        node = self._client.get_node_from_key(keys.state)
        found = self._moved.get(self._client.keyslot(keys.state), (node.host, int(node.port)))
        if found in self._lost:
            others = {(node.host, int(node.port)) for node in self._client.get_nodes()} - self._lost
            if others:
                return min(others)
            self._lost.clear()
        return found

    def _line(self, address: _Address | None) -> _Line:
        if address not in self._lines:
            if address is None:
                pool = _own_pool(self._client.connection_pool, self._timeout)
            else:
                manager = self._client.nodes_manager
                kwargs = {k: v for k, v in manager.connection_kwargs.items() if k != "redis_connect_func"}
                pool = manager.create_redis_node(*address, **kwargs).connection_pool
            self._lines[address] = _Line(pool, self._timeout)
        return self._lines[address]


class _Line(_Connections):
    """Connections to where a pool connects to, of which a scrape takes one."""

    def snapshots(self, asked: list[tuple[Keys, bytes]]) -> list[Any]:
        """The replies in the order of the requests; a server's error is a reply."""
        commands = [_Words(keys).evalsha("snapshot", body) for keys, body in asked]
        connection = self._take()
        try:
            replies = self._exchange(connection, commands)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                (keys, body), *_ = asked
                replies = self._exchange(connection, [_Words(keys).eval("snapshot", body), *commands[1:]])  # loads it
        except BaseException:
            connection.disconnect()
            raise
        self._idle.append(connection)
        return replies

    def _exchange(self, connection: Any, commands: list[tuple[bytes, ...]]) -> list[Any]:
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        deadline = monotonic() + self._timeout + 0.001 * len(commands)
        replies: list[Any] = []
        while len(replies) < len(commands):
            if monotonic() > deadline:
                raise redis.TimeoutError("the replies to a pipeline of snapshots take too long")
            try:
                replies.append(connection.read_response())
            except redis.ResponseError as error:
                replies.append(error)
        return replies


_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (redis.AuthenticationError, "permission"),
    (redis.exceptions.NoPermissionError, "permission"),
    (redis.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (redis.ReadOnlyError, "read_only"),
    (redis.exceptions.OutOfMemoryError, "out_of_memory"),
    (redis.exceptions.ClusterError, "cluster"),
    (redis.exceptions.AskError, "cluster"),
    (redis.BusyLoadingError, "loading"),
    (redis.ConnectionError, "connection"),
    (redis.ResponseError, "response"),
    (OSError, "connection"),
)


def error_kind(error: BaseException) -> str:
    """One of few words for an error of Redis; never its text."""
    return next((kind for errors, kind in _KINDS if isinstance(error, errors)), "other")


def _after_fork_in_child() -> None:
    for meter in _meters:
        meter._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
