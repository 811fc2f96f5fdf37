"""What both breakers decide, written once and without I/O: generators that yield steps to their shell."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import logging
import os
import secrets
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from . import _protocol
from ._errors import CircuitOpenError, PermitError, PolicyError
from ._fallback import AloneEngine, FallbackEngine, LocalEngine, OnRedisFailure, document_for
from ._policy import Policy, override_request
from ._protocol import COUNTS, HistoryEntry, Reply, Request, Snapshot, State, seconds
from ._scripts import NotSent
from ._steps import Refresh, Steps, Tell
from ._view import Classifier, Event, EventKind, Flight, Outcome, Verdict, View
from ._watch import BaseWatch

W = TypeVar("W", bound=BaseWatch)
Exceptions: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
_Probing: TypeAlias = "tuple[BreakerCore, Flight, _Probing | None]"
logger = logging.getLogger("pybreaker_redis")
_probing: contextvars.ContextVar[_Probing | None] = contextvars.ContextVar("pybreaker_redis_probing", default=None)
_breakers: weakref.WeakSet[BreakerCore] = weakref.WeakSet()
# what a report of nothing but successes never asks for, whatever state it finds
_FOR_OTHERS = {
    "failure_threshold",
    "success_threshold",
    "half_open_max_calls",
    "probe_timeout_ms",
    "slow_call_duration_ms",
    "max_reset_timeout_ms",
    "jitter",
    "enforce",
}


class Instrument:
    """A listener that also looks at its breakers, so that they stay on the fast path: it is told of those successes
    only that went another way, and reads their number from the breaker. It keeps the breakers it was given to.

    rejections: whether it has to be told of every one; else those of a fresh view stay on the fast path too.
    """

    rejections = True

    def attach(self, breaker: BreakerCore) -> None:
        """A breaker was made with this as a listener."""

    def script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        """Redis answered a script call, or did not."""

    def __call__(self, event: Event) -> object:
        """Like every listener."""


class BasePermit:
    """The right to one call."""

    __slots__ = ("_breaker", "_flight", "_settled")

    def __init__(self, breaker: Any, flight: Flight) -> None:
        self._breaker = breaker
        self._flight = flight
        self._settled = False

    @property
    def generation(self) -> int:
        """Under which the call was admitted; 0 where its outcome counts for nothing (shadow mode)."""
        return self._flight.generation

    @property
    def probe(self) -> int | None:
        """The slot of a probe."""
        return self._flight.probe

    @property
    def settled(self) -> bool:
        """Whether an outcome was reported."""
        return self._settled

    def _settle(self, outcome: Outcome, exception: BaseException | None) -> Steps[None]:
        if self._settled:
            raise PermitError(f"this permit of breaker {self._breaker.name!r} was settled before")
        self._settled = True
        report: Steps[None] = self._breaker._report(outcome, self._flight, exception)
        return report


class BreakerCore:
    """Options, view and decisions of one breaker; the shells add the I/O. See CircuitBreaker for the arguments."""

    def __init__(
        self,
        name: str,
        *,
        redis: Any,
        policy: Policy | None,
        lease: float,
        failures: Exceptions,
        ignore: Exceptions,
        is_failure: Callable[[Any], bool] | None,
        listeners: Iterable[Callable[[Event], Any]],
        on_redis_failure: OnRedisFailure,
        prefix: str,
        encoding: Literal["json", "msgpack"],
        redis_timeout: float,
    ) -> None:
        _check_options(lease, on_redis_failure, encoding, redis_timeout, is_failure)
        self.name = name
        self.policy = policy or Policy()
        self.keys = _protocol.keys_of(name, prefix)
        self.corrupt_documents = 0
        self._classifier = Classifier(_types("failures", failures), _types("ignore", ignore), is_failure)
        self._listeners = tuple(listeners)
        self._encoding = encoding
        self._warned: str | None = None
        self._lease = float(lease)
        self._view = View(self._lease, self.policy)
        self._override: dict[str, Any] | None = None  # what an operator set for the fleet, as last heard
        self._redis: Any = None  # the shell's engine
        self._isolation: LocalEngine | None = None  # where this instance fails alone, below the quorum
        self._engine: AloneEngine | FallbackEngine = (
            AloneEngine()
            if redis is None
            else FallbackEngine(
                on_redis_failure, redis_timeout, self._last_known, self._redis_down, self._redis_up, self._script_ran
            )
        )
        self._instruments = tuple(one for one in self._listeners if isinstance(one, Instrument))
        # a success that nobody wants to hear of or to judge is only counted: the fast path
        self._quiet = len(self._instruments) == len(self._listeners) and is_failure is None
        self._silent = self._quiet and not any(one.rejections for one in self._instruments)  # the same for rejections
        self._start_process()
        self._watch: BaseWatch | None = None
        self._watch_lease: float | None = None  # while a subscription keeps the view fresh
        self._rejoin: BaseWatch | None = None
        self._prefix = prefix
        _breakers.add(self)
        for instrument in self._instruments:
            instrument.attach(self)

    def _start_process(self) -> None:
        self.instance = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._reported, self._counting = 0, threading.RLock()  # successes, for instruments
        self._blocks: dict[tuple[int, types.CodeType], list[tuple[object, BasePermit]]] = {}  # innermost last
        self._blocks_lock = threading.RLock()
        given = self.policy.to_request()
        # what a report of nothing but successes needs: to a healthy breaker most of it would only be work
        self._brief: Request = {} if self._encoding == "json" else {"encoding": self._encoding}
        self._common: Request = {**self._brief, "instance": self.instance, **({"policy": given} if given else {})}
        if given.keys() - _FOR_OTHERS:
            self._brief = self._common

    def _after_fork(self) -> None:
        self._start_process()
        self._view.after_fork()
        self._engine.after_fork()
        if self._watch is not None:
            self._watch.after_fork()
            self._watched(None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    # Decisions

    def _admit(self) -> Steps[Flight]:
        """An admitted call; raises CircuitOpenError."""
        view = self._view
        while True:
            seen, now = view.seen, monotonic()
            verdict = view.decide(seen, now)
            if verdict is Verdict.REFRESH or verdict is Verdict.WAIT:
                yield Refresh(wait=verdict is Verdict.WAIT)
                seen, began, now = view.seen, now, monotonic()
                # measured from when this call began: with a lease shorter than a round trip it would never end
                if began - seen.sent >= 2 * view.lease_at(now):
                    continue
                verdict = seen.verdict(now)
            if verdict is Verdict.ADMIT:
                if view.held_back(seen.ramp_until - now):
                    yield from self._reject("closed", seen.ramp_until - now)
                return view.take_off(seen.generation, None, now)
            if verdict is Verdict.REJECT:
                return (yield from self._reject("open", max(seen.retry_at - now, 0.0)))
            return (yield from self._ask())

    def _ask(self) -> Steps[Flight]:
        if self._in_probe():
            return Flight(0, None, monotonic())  # the probe's own outcome decides
        reply = yield from self._run("acquire", (yield from self._gathered()), self._common)
        if not reply["admitted"] or reply.get("shadow"):
            return (yield from self._reject(reply["state"], seconds(reply.get("retry_after_ms")) or 0.0))
        ramp_left = seconds(reply.get("ramp_left_ms")) or 0.0
        if self._view.held_back(ramp_left):
            yield from self._reject("closed", ramp_left)
        return self._view.take_off(reply["generation"], reply.get("probe"), monotonic())

    def _reject(self, state: State, retry_after: float) -> Steps[Flight]:
        """Raises CircuitOpenError; in shadow mode it is told, and the call goes ahead, counting for nothing."""
        enforced = self._view.policy.enforce
        if self._listeners:
            yield self._event("rejected", retry_after=retry_after, enforced=enforced)
        if enforced:
            raise CircuitOpenError(self.name, state, retry_after)
        return Flight(0, None, monotonic())

    def _gathered(self, generation: int | None = None) -> Steps[Request]:
        """What was gathered since the last report, and the calls that became slow while they run.

        generation: for a report of this one, else of the view's. A probe's slowness is reported by itself.
        """
        request: Request = self._view.take(generation) if self._view.lease > 0 else {}
        current = self._view.seen.generation
        # under an earlier generation nothing counts: what is overdue waits for a report that does
        if self._view.policy.slow_call_duration is None or generation not in (None, current):
            return request
        for flight in self._view.overdue():
            if flight.probe is not None:
                slow = {"generation": flight.generation, "probe": flight.probe, "slow": 1, "pending": 1}
                yield from self._run("record", slow, self._common)
            elif flight.generation == request.setdefault("generation", current):
                request["slow"] = request["pending"] = request.get("pending", 0) + 1
        return request

    def _renew(self) -> Steps[None]:
        """Flush what was gathered, and take the reply as the view."""
        request = yield from self._gathered()
        yield from self._run("record", request, self._common if "slow" in request else self._brief)

    def _report(self, outcome: Outcome, flight: Flight, exception: BaseException | None = None) -> Steps[None]:
        """Count an outcome: locally where the view allows it, else by a script."""
        slow, pending = self._view.land(flight)
        generation, probe = flight.generation, flight.probe
        if self._listeners:
            yield self._event(outcome.value, generation=generation, exception=exception, slow=slow)
        if generation == 0 or (outcome is Outcome.IGNORED and probe is None):
            return
        if outcome is Outcome.SUCCESS and probe is None and not slow and self._view.gather(generation):
            return
        request = yield from self._gathered(generation)
        request["generation"] = generation
        if probe is not None:
            request["probe"] = probe
        if outcome is Outcome.SUCCESS:
            request["successes"] = request.get("successes", 0) + 1
        elif outcome is Outcome.FAILURE:
            request["failures"] = 1
        if outcome is not Outcome.IGNORED and pending:
            request["counted"] = 1
        elif outcome is not Outcome.IGNORED and slow:
            request["slow"] = request.get("slow", 0) + 1
        plain = outcome is Outcome.SUCCESS and probe is None and "slow" not in request
        yield from self._run("record", request, self._brief if plain else self._common)

    def _report_result(self, result: Any, flight: Flight) -> Steps[None]:
        """Judge a result and count it; an exception of the predicate is raised, and counts as nothing."""
        if self._quiet:
            return self._report(Outcome.SUCCESS, flight)
        return self._judge(result, flight)

    def _judge(self, result: Any, flight: Flight) -> Steps[None]:
        try:
            outcome = self._classifier.of_result(result)
        except BaseException as exception:
            yield from self._report(Outcome.IGNORED, flight, exception)
            raise
        yield from self._report(outcome, flight)

    def _report_exception(self, exception: BaseException, flight: Flight) -> Steps[None]:
        return self._report(self._outcome_of(exception), flight, exception)

    def _outcome_of(self, exception: BaseException) -> Outcome:
        """That this breaker rejected a call made inside of this one says nothing of the service."""
        if isinstance(exception, CircuitOpenError) and exception.name == self.name:
            return Outcome.IGNORED
        return self._classifier.of_exception(exception)

    # Probes that call the breaker again

    def _begin(self, flight: Flight) -> None:
        """To be called where the guarded code runs: its own calls of this breaker are part of a probe."""
        if flight.probe is not None:
            _probing.set((self, flight, _probing.get()))

    def _in_probe(self) -> bool:
        probing = _probing.get()
        while probing is not None:
            breaker, flight, probing = probing
            if breaker is self and not flight.over:
                return True
        return False

    # Blocks

    def _running(self) -> object:
        """The thread or task that runs now."""
        raise NotImplementedError

    def _enter_block(self, frame: types.FrameType, permit: BasePermit) -> None:
        self._begin(permit._flight)
        with self._blocks_lock:
            self._blocks.setdefault(_place(frame), []).append((self._running(), permit))

    def _leave_block(self, frame: types.FrameType, exception: BaseException | None) -> Steps[None]:
        with self._blocks_lock:
            permit = self._permit_of(_place(frame))
        return self._settle_block(permit, exception)

    def _settle_block(self, permit: BasePermit, exception: BaseException | None) -> Steps[None]:
        outcome = Outcome.SUCCESS if exception is None else self._outcome_of(exception)
        try:
            report = permit._settle(outcome, exception)
        except PermitError:  # it was settled inside, or by another thread just now
            return
        yield from report

    def _permit_of(self, place: tuple[int, types.CodeType]) -> BasePermit:
        """A block is known by its frame, since a generator may change threads and others run in between.

        An ExitStack, or another object that enters and leaves for its user, does so from frames of its own: then
        it is the block that this thread or task entered last, else the last one of all, of a stack if there is one.
        """
        if place not in self._blocks:
            running, places = self._running(), list(reversed(self._blocks))
            if not places:
                raise PermitError(f"a block of breaker {self.name!r} is left that was not entered")
            places = [one for one in places if self._blocks[one][-1][0] == running] or places
            place = next((one for one in places if one[1].co_filename == contextlib.__file__), places[0])
        entered = self._blocks[place]
        _, permit = entered.pop()
        if not entered:
            del self._blocks[place]
        return permit

    # Requests and what becomes of their replies

    def _run(self, name: str, request: Request, common: Request) -> Steps[Reply]:
        """One script call, its reply adopted as the view and its transition told.

        common: what goes with every request, or what goes with a report of nothing but successes.
        """
        sent = monotonic()
        if self._instruments and (successes := request.get("successes")):
            with self._counting:
                self._reported += successes
        if self._rejoin is not None:
            watch, self._rejoin = self._rejoin, None
            watch._join()
        if self._override:
            common = self._common  # it may have any rule
        try:
            if self._view.policy.quorum > 1:
                reply = yield from self._run_below_quorum(name, request, common)
            else:
                self._isolation = None
                reply = yield from self._engine.run(name, {**common, **request})
        except NotSent:
            self._unsent(request)
            raise
        return (yield from self._heed(reply, sent))

    def _unsent(self, request: Request) -> None:
        """The request was given up before it was sent: its successes are gathered still."""
        if self._instruments:
            with self._counting:
                self._reported -= request.get("successes", 0)
        self._view.give_back(request)

    def _obey(self, reply: Reply) -> None:
        """The policy in force is the one that the operator set last."""
        if reply["source"] != "local" and reply.get("override") != self._override:
            self._override = reply.get("override")
            self._view.policy = self.policy.with_override(self._override)
            self._set_lease()
            if self._isolation is not None:
                self._isolation.obey(self._override)

    def _heed(self, reply: Reply, sent: float) -> Steps[Reply]:
        self._obey(reply)
        self._view.adopt(reply, sent, monotonic())
        self._warn(reply)
        if change := reply.get("transition"):
            logger.info("circuit breaker %r: %s -> %s (%s)", self.name, change["from"], change["to"], change["reason"])
            yield from self._tell_change(change, reply["source"])
        return reply

    # Below the quorum: an instance whose own calls fail opens for itself alone

    def _run_below_quorum(self, name: str, request: Request, common: Request) -> Steps[Reply]:
        """A script call of an instance that keeps a state of its own too, by the same rules with a quorum of one.

        While the fleet is closed, its own state decides; else the fleet's does, and its own is forgotten.
        """
        alone, own = {**self._common, **request}, self._isolation
        if name == "acquire" and own is not None and own.state != "closed":
            fleet = yield from self._engine.run("record", {**self._brief, "generation": 0})
            if self._own_beside(fleet) is own:
                mine = own.run("acquire", alone)
                yield from self._tell_isolation(mine)
                return {**self._isolated(mine, fleet), "admitted": mine["admitted"]}
        reply = yield from self._engine.run(name, {**common, **request})
        own = self._own_beside(reply)
        if own is None:
            return reply
        if request.get("generation", 0) < 0:
            mine = own.run("record", alone)  # the outcome of its own probe
        elif name == "acquire" or reply["applied"]:
            mine = own.run("record", {**alone, "generation": own.generation})
        else:
            mine = own.run("record", {**self._common, "generation": 0})
        yield from self._tell_isolation(mine)
        return reply if mine["state"] == "closed" else self._isolated(mine, reply)

    def _own_beside(self, fleet: Reply) -> LocalEngine | None:
        """The state that this instance keeps beside the fleet's; None while that one alone decides.

        It is of one generation of the fleet: what happened to all in between, a reset too, happened to it.
        """
        self._obey(fleet)
        if self._view.policy.quorum == 1 or fleet["source"] != "redis" or _decides(fleet):
            self._isolation = None
        elif self._isolation is None or self._isolation.fleet_generation < fleet["generation"]:
            self._isolation = self._local_engine("closed", 0, 0.0)
            self._isolation.fleet_generation = fleet["generation"]
        return self._isolation

    def _isolated(self, mine: Reply, fleet: Reply) -> Reply:
        """The reply of this instance's own state, with what the fleet's said of everything else."""
        told = {key: fleet.get(key) for key in ("transition", "override", "warning")}
        return {**mine, **told, "admitted": False, "isolated": True, "source": "isolated"}

    def _tell_isolation(self, mine: Reply) -> Steps[None]:
        if change := mine.get("transition"):
            logger.warning(
                "circuit breaker %r: alone in this instance %s (%s)", self.name, change["to"], change["reason"]
            )
            yield from self._tell_change(change, "isolated")

    def _warn(self, reply: Reply) -> None:
        warning = reply.get("warning")
        if warning:
            self.corrupt_documents += 1
        if warning and warning != self._warned:  # what stays odd is told once, not with every call
            key = self.keys.policy if warning == "corrupt_policy" else self.keys.state
            logger.warning("circuit breaker %r: %s under key %s", self.name, warning, key)
        self._warned = warning

    def _tell_change(self, change: dict[str, Any], source: str, instance: str | None = None) -> Steps[None]:
        yield self._event(
            "state_change",
            instance=self.instance if instance is None else instance,
            old=change["from"],
            new=change["to"],
            reason=change["reason"],
            generation=change["generation"],
            counts={key: change[key] for key in COUNTS if key in change},
            source=source,
        )

    def _event(self, kind: EventKind, **fields: Any) -> Tell:
        return Tell(Event(kind, self.name, **{"instance": self.instance, **fields}))

    def _listener_failed(self, listener: object) -> None:
        logger.exception("circuit breaker %r: listener %r failed", self.name, listener)

    # What instruments read, without I/O

    def _script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        for instrument in self._instruments:
            try:
                instrument.script_ran(name, seconds, error)
            except Exception:
                self._listener_failed(instrument)

    def _successes(self) -> int:
        """Those reported and those gathered; not what a transition left behind, or what a report takes just now."""
        return self._reported + self._view.gathered()

    def _own_snapshot(self) -> Snapshot | None:
        """By the engine of this process, where that decides; None where Redis does."""
        reply = self._engine.own("snapshot", self._common)
        return None if reply is None else _protocol.snapshot_from(self.name, reply, self.policy)

    # Redis down

    def _last_known(self) -> LocalEngine:
        seen = self._view.seen
        open_for = max(seen.retry_at - monotonic(), 0.0) if seen.state == "open" else 0.0
        return self._local_engine(seen.state, seen.failure_count, open_for, seen.generation)

    def _local_engine(self, state: State, failure_count: int, open_for: float, generation: int = 0) -> LocalEngine:
        document = document_for(state, generation, failure_count, open_for)
        return LocalEngine(document=document, override=self._override, alone=True)

    def _redis_down(self, error: BaseException) -> Steps[None]:
        logger.warning("circuit breaker %r: Redis does not answer, this process goes on alone: %s", self.name, error)
        yield self._event("redis_error", exception=error, source="local")

    def _redis_up(self) -> Steps[None]:
        self._view.drop()
        logger.warning("circuit breaker %r: Redis answers again", self.name)
        yield self._event("redis_restored", source="redis")

    # Watching

    def _watch_with(self, kind: Callable[[BreakerCore, float], W], lease: float) -> W:
        if self._redis is None:
            raise PolicyError("a breaker without Redis has nobody to watch")
        if isinstance(lease, bool) or not isinstance(lease, (int, float)) or not 0 < lease <= 3600:
            raise PolicyError(f"the lease of a watch must be above 0 and at most 3600 seconds, not {lease!r}")
        if self._watch is not None:
            self._watch._leave()
        watch = self._watch = kind(self, float(lease))
        return watch

    def _watched(self, lease: float | None) -> None:
        """The subscription stands (lease: while it does) or is lost (None). Either way the next call asks."""
        self._watch_lease = lease
        self._set_lease()
        self._view.drop()

    def _set_lease(self) -> None:
        """A watched view may be old; but counts that a rate is made of must not be late by more than a bucket."""
        policy, lease = self._view.policy, self._watch_lease
        if lease is None or self._lease <= 0:
            self._view.lease = self._lease
            return
        if policy.error_rate_threshold or policy.slow_call_rate_threshold:
            lease = min(lease, policy.window / 10)
        self._view.lease = max(lease, self._lease)

    def _heard(self, message: dict[str, Any]) -> Steps[None]:
        """A message on the breaker's channel: what another instance did is the view from here on."""
        if message.get("instance") == self.instance:
            return
        try:
            change = {**message, "generation": int(message["generation"])} if "policy" not in message else None
            reply = _protocol.reply_from_message(change, self._view.policy) if change else None
        except (KeyError, TypeError, ValueError, OverflowError):
            self._view.drop()  # it may mean something to a later version: better ask
            return
        isolated = self._isolation is not None and self._isolation.state != "closed"
        if change is None or reply is None or self._engine.alone or (isolated and reply["state"] == "closed"):
            self._view.drop()
            return
        if reply["generation"] > self._view.seen.generation:
            now = monotonic()
            self._isolation = None
            self._view.adopt({**reply, "override": self._override}, now, now)
        yield from self._tell_change(change, "watch", change.get("instance") or "")

    # Looking and steering

    def _state(self) -> Steps[State]:
        seen = self._view.seen
        if self._view.decide(seen, monotonic()) in (Verdict.ADMIT, Verdict.REJECT):
            return seen.state
        snapshot, own = (yield from self._snapshot()), self._isolation
        return own.state if own is not None and snapshot.isolated else snapshot.state

    def _snapshot(self) -> Steps[Snapshot]:
        reply = yield from self._engine.run("snapshot", self._common)
        self._warn(reply)
        own = self._isolation
        isolated = own is not None and own.state != "closed" and own.fleet_generation >= reply["generation"]
        return _protocol.snapshot_from(self.name, reply, self.policy, isolated and not _decides(reply))

    def _command(
        self, action: str, duration: float | None = None, policy: Mapping[str, Any] | None = None
    ) -> Steps[None]:
        request = {**self._common, **_protocol.control_request(action, duration)}
        if policy is not None:
            request["override"] = override_request(policy)
        sent = monotonic()
        reply = yield from self._engine.command("control", request)
        if reply.get("transition"):
            self._isolation = None
            yield from self._heed(reply, sent)
        else:  # the state may not even be stored, then no outcome is of it: the next call asks
            self._obey(reply)
            self._warn(reply)
            self._view.drop()

    def _history(self, count: int) -> Steps[list[HistoryEntry]]:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PolicyError(f"count must be an integer of at least 1, not {count!r}")
        entries = yield from self._engine.history(count)
        return [entry for fields in entries if (entry := _protocol.sound_history_entry(fields))]

    def _flush(self) -> Steps[None]:
        gathered = self._view.take()
        if "successes" in gathered:
            yield from self._run("record", gathered, self._brief)


def _decides(fleet: Reply) -> bool:
    """Whether what the fleet's state says goes for an instance that fails alone too."""
    return fleet["state"] != "closed" or fleet.get("forced") is not None


def _place(frame: types.FrameType) -> tuple[int, types.CodeType]:
    """Which frame it is among those that live; the frame itself would keep what it belongs to alive."""
    return id(frame), frame.f_code


def _types(what: str, given: Any) -> tuple[type[BaseException], ...]:
    """The exception types of an option: one, or any iterable of them."""
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, type) else (given,)
    for one in found:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise PolicyError(f"{what} must be exception types, not {one!r}")
    return found


def _check_options(
    lease: object, on_redis_failure: object, encoding: object, redis_timeout: object, is_failure: object = None
) -> None:
    if is_failure is not None and (not callable(is_failure) or inspect.iscoroutinefunction(is_failure)):
        raise PolicyError(f"is_failure must be a plain function of the result, or None, not {is_failure!r}")
    for what, value, least in (("lease", lease, 0.0), ("redis_timeout", redis_timeout, 0.001)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 3600:
            raise PolicyError(f"{what} must be from {least:g} to 3600 seconds, not {value!r}")
    if on_redis_failure not in get_args(OnRedisFailure):
        raise PolicyError(f"on_redis_failure must be 'local', 'open' or 'closed', not {on_redis_failure!r}")
    if encoding not in ("json", "msgpack"):
        raise PolicyError(f"encoding must be 'json' or 'msgpack', not {encoding!r}")


def _after_fork_in_child() -> None:
    for breaker in _breakers:
        breaker._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
