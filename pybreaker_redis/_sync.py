"""The breaker for threads: a thin shell around the view and an engine."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import secrets
import threading
import types
import weakref
from collections.abc import Callable, Generator, Iterable
from time import monotonic
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, get_args

from . import _protocol
from ._errors import CircuitOpenError, PermitError, PolicyError
from ._fallback import FallbackEngine, OnRedisFailure, document_for
from ._memory import Document, MemoryEngine
from ._policy import Policy
from ._protocol import HistoryEntry, Reply, Request, Snapshot, State, seconds
from ._scripts import RedisEngine
from ._view import Classifier, Event, EventKind, Outcome, Verdict, View

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Listener = Callable[[Event], object]
logger = logging.getLogger("pybreaker_redis")
_breakers: weakref.WeakSet[CircuitBreaker] = weakref.WeakSet()
_USE_ASYNC = "is a coroutine function: the sync breaker cannot await it, use AsyncCircuitBreaker"


class Guarded(Protocol[P, R_co]):
    """A decorated function: same signature, and its breaker as `.breaker`."""

    breaker: CircuitBreaker

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Permit:
    """The right to one call, to be settled once: success(), failure(exc) or release()."""

    __slots__ = ("_breaker", "_settled", "generation", "probe")

    def __init__(self, breaker: CircuitBreaker, generation: int, probe: int | None) -> None:
        self._breaker = breaker
        self._settled = False
        self.generation = generation
        self.probe = probe

    @property
    def settled(self) -> bool:
        """Whether an outcome was reported."""
        return self._settled

    def success(self) -> None:
        """The call succeeded. Raises PermitError when the permit was settled before."""
        self._settle(Outcome.SUCCESS)

    def failure(self, exception: BaseException | None = None) -> None:
        """The call failed. Raises PermitError when the permit was settled before."""
        self._settle(Outcome.FAILURE, exception)

    def release(self) -> None:
        """The call counts as nothing; a probe's slot is given back. Raises PermitError like the others."""
        self._settle(Outcome.IGNORED)

    ignore = release

    def _settle(self, outcome: Outcome, exception: BaseException | None = None) -> None:
        if self._settled:
            raise PermitError(f"this permit of breaker {self._breaker.name!r} was settled before")
        self._settled = True
        self._breaker._report(outcome, self.generation, self.probe, exception)


class CircuitBreaker:
    """One circuit breaker, shared through Redis by every process that uses the same name.

    name: of the guarded service. redis: a redis-py client (Redis, RedisCluster, Sentinel master), a URL, or
    None for this process alone. policy: when it trips and recovers. lease: seconds for which a reply of
    Redis is good without asking again; 0 asks before and reports after every call. failures: exception
    types that count as failures. ignore: those that count as nothing. is_failure: a predicate on results.
    listeners: callables that take one Event. on_redis_failure: "local" protects this process by the same
    rules, "open" rejects, "closed" admits. redis_timeout: seconds that a call waits for Redis at the most.
    encoding: of the stored document, "json" or "msgpack".

    Constructing one needs no server and writes nothing. Raises PolicyError for an option that makes no sense.
    """

    def __init__(
        self,
        name: str,
        *,
        redis: Any = None,
        policy: Policy | None = None,
        lease: float = 0.1,
        failures: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
        is_failure: Callable[[Any], bool] | None = None,
        listeners: Iterable[Listener] = (),
        on_redis_failure: OnRedisFailure = "local",
        prefix: str = "circuit_breaker",
        encoding: Literal["json", "msgpack"] = "json",
        redis_timeout: float = 0.25,
    ) -> None:
        _check_options(lease, on_redis_failure, encoding, redis_timeout)
        self.name = name
        self.policy = policy or Policy()
        self.keys = _protocol.keys_of(name, prefix)
        self.corrupt_documents = 0
        self._classifier = Classifier(failures, ignore if isinstance(ignore, tuple) else (ignore,), is_failure)
        self._listeners = tuple(listeners)
        self._encoding = encoding
        self._view = View(float(lease))
        self._engine: MemoryEngine | FallbackEngine = MemoryEngine()
        if redis is not None:
            engine = RedisEngine(redis, self.keys, redis_timeout)
            self._engine = FallbackEngine(engine, on_redis_failure, self._last_known, self._redis_down, self._redis_up)
        self._blocks = threading.local()
        self._start_process()
        _breakers.add(self)

    def _start_process(self) -> None:
        self.instance = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._refreshing = threading.Lock()
        common: Request = {"instance": self.instance}
        if given := self.policy.to_request():
            common["policy"] = given
        if self._encoding != "json":
            common["encoding"] = self._encoding
        self._common = common

    def _after_fork(self) -> None:
        self._start_process()
        self._view.after_fork()
        self._engine.after_fork()

    # Calls

    def call(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """func(*args, **kwargs), guarded. Raises CircuitOpenError when rejected, else what func raises.

        A generator that func returns is guarded over its whole iteration; a coroutine is a TypeError.
        """
        view = self._view
        if monotonic() < view.closed_until:
            generation, probe = view.generation, None
        else:
            generation, probe = self._admit()
        try:
            result = func(*args, **kwargs)
        except BaseException as exception:
            self._report(self._classifier.of_exception(exception), generation, probe, exception)
            raise
        if type(result) in _SUSPENDED:
            return cast(R, self._suspended(result, func, generation, probe))
        outcome = Outcome.SUCCESS if self._classifier.is_failure is None else self._of_result(result, generation, probe)
        if outcome is Outcome.SUCCESS and probe is None and not self._listeners and view.gather(generation):
            return result
        self._report(outcome, generation, probe)
        return result

    def __call__(self, func: Callable[P, R]) -> Guarded[P, R]:
        """Decorate func. Raises TypeError for a coroutine function."""
        if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(f"{func!r} {_USE_ASYNC}")
        if inspect.isgeneratorfunction(func):

            @functools.wraps(func)
            def guarded(*args: P.args, **kwargs: P.kwargs) -> Any:
                return (yield from self._iterate(lambda: func(*args, **kwargs), None))
        else:

            @functools.wraps(func)
            def guarded(*args: P.args, **kwargs: P.kwargs) -> Any:
                return self.call(func, *args, **kwargs)

        guarded.breaker = self  # type: ignore[attr-defined]
        return cast("Guarded[P, R]", guarded)

    def acquire(self) -> Permit:
        """A permit for one call, to be settled once. Raises CircuitOpenError when rejected."""
        view = self._view
        if monotonic() < view.closed_until:
            return Permit(self, view.generation, None)
        return Permit(self, *self._admit())

    def __enter__(self) -> Permit:
        permit = self.acquire()
        self._blocks.__dict__.setdefault("permits", []).append(permit)
        return permit

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        permit: Permit = self._blocks.permits.pop()
        if permit.settled:
            return
        outcome = Outcome.SUCCESS if exception is None else self._classifier.of_exception(exception)
        permit._settle(outcome, exception)

    def _iterate(self, make: Callable[[], Any], permit: Permit | None) -> Generator[Any, Any, Any]:
        permit = permit or self.acquire()
        try:
            result = yield from make()
        except BaseException as exception:
            permit._settle(self._classifier.of_exception(exception), exception)
            raise
        permit._settle(self._of_result(result, permit.generation, permit.probe))
        return result

    def _suspended(self, result: Any, func: Any, generation: int, probe: int | None) -> Any:
        if type(result) is types.GeneratorType:
            return self._iterate(lambda: result, Permit(self, generation, probe))
        self._report(Outcome.IGNORED, generation, probe)
        if type(result) is types.CoroutineType:
            result.close()
        raise TypeError(f"{func!r} {_USE_ASYNC}")

    def _of_result(self, result: Any, generation: int, probe: int | None) -> Outcome:
        try:
            return self._classifier.of_result(result)
        except BaseException as exception:
            self._report(Outcome.IGNORED, generation, probe, exception)
            raise

    # Decisions

    def _admit(self) -> tuple[int, int | None]:
        """Generation and probe slot of an admitted call; raises CircuitOpenError."""
        while True:
            seen, now = self._view.seen, monotonic()
            verdict = self._view.decide(now)
            if verdict is Verdict.REFRESH:
                refreshed = self._refresh(blocking=False)
                if refreshed is not None:
                    return refreshed
                verdict = self._view.by_old_view(seen) if seen else Verdict.WAIT
            if verdict is Verdict.ADMIT and seen is not None and seen.state == "closed":
                return seen.generation, None
            if verdict is Verdict.REJECT and seen is not None and seen.state == "open":
                raise self._rejection("open", max(seen.retry_at - now, 0.0))
            if verdict is Verdict.ASK:
                return self._ask()
            if verdict is Verdict.WAIT and (refreshed := self._refresh(blocking=True)) is not None:
                return refreshed

    def _refresh(self, *, blocking: bool) -> tuple[int, int | None] | None:
        """Ask for all; None where another caller asks, or (blocking) has asked meanwhile."""
        lock = self._refreshing
        if not lock.acquire(blocking=blocking):
            return None
        try:
            if self._view.decide(monotonic()) in (Verdict.ADMIT, Verdict.REJECT):
                return None
            return self._ask()
        finally:
            lock.release()

    def _ask(self) -> tuple[int, int | None]:
        reply = self._run("acquire", self._view.take())
        if reply["admitted"]:
            return reply["generation"], reply.get("probe")
        raise self._rejection(reply["state"], seconds(reply.get("retry_after_ms")) or 0.0)

    def _rejection(self, state: str, retry_after: float) -> CircuitOpenError:
        error = CircuitOpenError(self.name, state, retry_after)
        if self._listeners:
            self._emit("rejected", retry_after=retry_after)
        return error

    def _report(
        self, outcome: Outcome, generation: int, probe: int | None, exception: BaseException | None = None
    ) -> None:
        """Count an outcome: locally where the view allows it, else by a script."""
        if self._listeners:
            kind: EventKind = outcome.value
            self._emit(kind, generation=generation, exception=exception)
        if outcome is Outcome.SUCCESS and probe is None and self._view.gather(generation):
            return
        if outcome is Outcome.IGNORED and probe is None:
            return
        request: Request = {"generation": generation}
        gathered = self._view.take()
        if gathered.get("generation") == generation:
            request = gathered
        if probe is not None:
            request["probe"] = probe
        if outcome is Outcome.SUCCESS:
            request["successes"] = request.get("successes", 0) + 1
        elif outcome is Outcome.FAILURE:
            request["failures"] = 1
        self._run("record", request)

    def _run(self, name: str, request: Request) -> Reply:
        """One script call, its reply adopted as the view and its transition told."""
        sent = monotonic()
        reply = self._engine.run(name, {**self._common, **request})
        self._view.adopt(reply, sent, monotonic())
        return self._heed(reply)

    def _heed(self, reply: Reply) -> Reply:
        if warning := reply.get("warning"):
            self.corrupt_documents += 1
            logger.warning("circuit breaker %r: %s under key %s", self.name, warning, self.keys.state)
        if change := reply.get("transition"):
            self._tell(change, reply["source"])
        return reply

    def _tell(self, change: dict[str, Any], source: str) -> None:
        logger.info("circuit breaker %r: %s -> %s (%s)", self.name, change["from"], change["to"], change["reason"])
        if self._listeners:
            counts = {key: change[key] for key in ("failure_count", "success_count")}
            self._emit(
                "state_change",
                old=change["from"],
                new=change["to"],
                reason=change["reason"],
                generation=change["generation"],
                counts=counts,
                source=source,
            )

    def _emit(self, kind: EventKind, **fields: Any) -> None:
        event = Event(kind, self.name, self.instance, **fields)
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("circuit breaker %r: listener %r failed", self.name, listener)

    # Redis down

    def _last_known(self) -> Document:
        seen = self._view.seen
        if seen is None:
            return document_for("closed", -1, 0, 0.0)
        return document_for(seen.state, seen.generation, seen.failure_count, seen.retry_at - monotonic())

    def _redis_down(self, error: BaseException) -> None:
        logger.warning("circuit breaker %r: Redis does not answer, this process goes on alone: %s", self.name, error)
        self._emit("redis_error", exception=error, source="local")

    def _redis_up(self) -> None:
        self._view.drop()
        logger.warning("circuit breaker %r: Redis answers again", self.name)
        self._emit("redis_restored", source="redis")

    # Looking and steering

    @property
    def state(self) -> State:
        """The state: from the view while it is fresh, else from Redis."""
        seen, now = self._view.seen, monotonic()
        if seen is not None and self._view.decide(now) in (Verdict.ADMIT, Verdict.REJECT):
            return seen.state
        return self.snapshot().state

    def snapshot(self) -> Snapshot:
        """Everything that Redis knows of this breaker now; of the local engine while Redis is down."""
        reply = self._heed(self._engine.run("snapshot", self._common))
        return _protocol.snapshot_from(self.name, reply)

    def force_open(self, duration: float | None = None) -> None:
        """Reject every call of the fleet for duration seconds (default and most: 30 days), then probe.

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._command("force_open", duration)

    def force_closed(self, duration: float | None = None) -> None:
        """Admit every call of the fleet and count nothing for duration seconds (default and most: 30 days).

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._command("force_closed", duration)

    def clear_override(self) -> None:
        """End a forced state: forced open goes on with a probe, forced closed as closed.

        Raises RedisUnavailableError.
        """
        self._command("clear_override")

    def reset(self) -> None:
        """Close, with all counts and overrides gone; outcomes of calls that run now will not count.

        Raises RedisUnavailableError.
        """
        self._command("reset")

    def _command(self, action: str, duration: float | None = None) -> None:
        request = {**self._common, **_protocol.control_request(action, duration)}
        engine, sent = self._engine, monotonic()
        run = engine.command if isinstance(engine, FallbackEngine) else engine.run
        reply = run("control", request)
        self._view.adopt(reply, sent, monotonic())
        self._heed(reply)

    def history(self, count: int = 100) -> list[HistoryEntry]:
        """The last transitions, newest first. Raises RedisUnavailableError; PolicyError for count < 1."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PolicyError(f"count must be an integer of at least 1, not {count!r}")
        return [_protocol.history_entry(fields) for fields in self._engine.history(count)]

    def flush(self) -> None:
        """Report the successes gathered so far now."""
        if gathered := self._view.take():
            self._run("record", gathered)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


_SUSPENDED = frozenset({types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType})


def _check_options(lease: object, on_redis_failure: object, encoding: object, redis_timeout: object) -> None:
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
