"""The breaker for threads: the decisions of _core over blocking connections."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Generator, Iterable
from time import monotonic
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

from ._core import BasePermit, BreakerCore, Exceptions
from ._errors import CircuitOpenError, PolicyError
from ._fallback import OnRedisFailure, patience
from ._policy import Policy
from ._protocol import HistoryEntry, Snapshot, State
from ._scripts import RedisEngine
from ._steps import Ask, ReadHistory, Refresh, Step, Steps, Tell
from ._view import Event, Flight, Outcome, Verdict
from ._watch import BaseWatch

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
_SUSPENDED = frozenset({types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType})
_USE_ASYNC = "is a coroutine function: the sync breaker cannot await it, use AsyncCircuitBreaker"


class Guarded(Protocol[P, R_co]):
    """A decorated function: same signature, and its breaker as `.breaker`."""

    breaker: CircuitBreaker

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Permit(BasePermit):
    """The right to one call, to be settled once: success(), failure(exc) or release()."""

    __slots__ = ()

    def success(self) -> None:
        """The call succeeded. Raises PermitError when the permit was settled before."""
        self._breaker._drive(self._settle(Outcome.SUCCESS, None))

    def failure(self, exception: BaseException | None = None) -> None:
        """The call failed. Raises PermitError when the permit was settled before."""
        self._breaker._drive(self._settle(Outcome.FAILURE, exception))

    def release(self) -> None:
        """The call counts as nothing; a probe's slot is given back. Raises PermitError like the others."""
        self._breaker._drive(self._settle(Outcome.IGNORED, None))

    ignore = release


class Watch(BaseWatch):
    """A breaker's share in a subscription."""

    def close(self) -> None:
        """Leave the subscription; the breaker's own lease holds again."""
        self._leave()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CircuitBreaker(BreakerCore):
    """One circuit breaker, shared through Redis by every process that uses the same name.

    name: of the guarded service. redis: a redis-py client (Redis, RedisCluster, Sentinel master), a URL, or
    None for this process alone. policy: when it trips and recovers. lease: seconds for which a reply of
    Redis is good without asking again; 0 asks before and reports after every call. failures: exception
    types that count as failures. ignore: those that count as nothing. is_failure: a predicate on results.
    listeners: callables that take one Event. on_redis_failure: "local" protects this process by the same
    rules, "open" rejects, "closed" admits. redis_timeout: seconds for connecting to Redis, and for each reply.
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
        failures: Exceptions = Exception,
        ignore: Exceptions = (),
        is_failure: Callable[[Any], bool] | None = None,
        listeners: Iterable[Callable[[Event], object]] = (),
        on_redis_failure: OnRedisFailure = "local",
        prefix: str = "circuit_breaker",
        encoding: Literal["json", "msgpack"] = "json",
        redis_timeout: float = 0.25,
    ) -> None:
        super().__init__(
            name,
            redis=redis,
            policy=policy,
            lease=lease,
            failures=failures,
            ignore=ignore,
            is_failure=is_failure,
            listeners=listeners,
            on_redis_failure=on_redis_failure,
            prefix=prefix,
            encoding=encoding,
            redis_timeout=redis_timeout,
        )
        for listener in self._listeners:
            if inspect.iscoroutinefunction(listener):
                raise PolicyError(f"listener {listener!r} {_USE_ASYNC}")
        self._redis = None if redis is None else RedisEngine(redis, self.keys, redis_timeout)
        self._patience = patience(redis_timeout)

    def _start_process(self) -> None:
        super()._start_process()
        self._refreshing = threading.RLock()

    def _after_fork(self) -> None:
        super()._after_fork()
        if self._redis is not None:
            self._redis.close()

    # Calls

    def call(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """func(*args, **kwargs), guarded. Raises CircuitOpenError when rejected, else what func raises.

        A generator that func returns is guarded over its whole iteration; a coroutine is a TypeError.
        """
        return self._guard(func)(*args, **kwargs)

    def __call__(self, func: Callable[P, R]) -> Guarded[P, R]:
        """Decorate func. Raises TypeError for a coroutine function."""
        if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(f"{func!r} {_USE_ASYNC}")
        if not callable(func):  # as a classmethod is that is decorated before it is bound
            raise TypeError(f"{func!r} cannot be called")
        if inspect.isgeneratorfunction(func):

            def guarded(*args: P.args, **kwargs: P.kwargs) -> Any:
                return (yield from self._iterate(func(*args, **kwargs)))

        else:
            guarded = self._guard(func)
        guarded = functools.wraps(func)(guarded)
        guarded.breaker = self  # type: ignore[attr-defined]
        return cast("Guarded[P, R]", guarded)

    def _guard(self, func: Callable[P, R]) -> Callable[P, R]:
        view, quiet = self._view, self._quiet

        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            seen, now = view.seen, monotonic()
            if now >= seen.closed_until:
                return self._slow_call(func, args, kwargs, now)
            try:
                result = func(*args, **kwargs)
            except BaseException as exception:
                self._drive(self._report_exception(exception, Flight(seen.generation, None, now)))
                raise
            if quiet and type(result) not in _SUSPENDED:
                seen.counter.tick()
                return result
            return self._settle_result(func, result, Flight(seen.generation, None, now))

        return guarded

    def _slow_call(self, func: Callable[..., R], args: Any, kwargs: Any, now: float) -> R:
        seen = self._view.seen
        if self._silent and now < seen.open_until:
            raise CircuitOpenError(self.name, "open", seen.retry_at - now)
        if now < seen.timed_until:
            flight = self._view.take_off(seen.generation, None, now)
        else:
            flight = self._drive(self._admit())
            self._begin(flight)
        try:
            result = func(*args, **kwargs)
        except BaseException as exception:
            self._drive(self._report_exception(exception, flight))
            raise
        if self._quiet and type(result) not in _SUSPENDED and self._view.lands_well(flight):
            return result
        return self._settle_result(func, result, flight)

    def _settle_result(self, func: Any, result: R, flight: Flight) -> R:
        if type(result) not in _SUSPENDED:
            self._drive(self._report_result(result, flight))
            return result
        # nothing has run yet: a generator asks for its own permit when it starts
        self._drive(self._report(Outcome.IGNORED, flight))
        if isinstance(result, types.GeneratorType):
            return cast(R, self._iterate(result))
        if isinstance(result, types.CoroutineType):
            result.close()
        raise TypeError(f"{func!r} {_USE_ASYNC}")

    def _iterate(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        flight = self._drive(self._admit())
        try:
            result = yield from generator
        except BaseException as exception:
            self._drive(self._report_exception(exception, flight))
            raise
        self._drive(self._report_result(result, flight))
        return result

    def acquire(self) -> Permit:
        """A permit for one call, to be settled once. Raises CircuitOpenError when rejected."""
        return Permit(self, self._drive(self._admit()))

    def __enter__(self) -> Permit:
        permit = self.acquire()
        self._enter_block(sys._getframe(1), permit)
        return permit

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self._drive(self._leave_block(sys._getframe(1), exception))

    def _running(self) -> int:
        return threading.get_ident()

    # The shell

    def _drive(self, steps: Steps[T], tell: Callable[[Event], None] | None = None) -> T:
        """Carry out what the decision code asks for, and give what it returns. tell: instead of the listeners."""
        tell = tell or self._tell
        try:
            step = next(steps)
            while True:
                try:
                    result = self._perform(step, tell)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            return cast(T, end.value)

    def _perform(self, step: Step, tell: Callable[[Event], None]) -> Any:
        if isinstance(step, Ask):
            return self._redis.run(step.name, step.request)
        if isinstance(step, Refresh):
            return self._refresh(step.wait)
        if isinstance(step, Tell):
            return tell(step.event)
        if isinstance(step, ReadHistory):
            return self._redis.history(step.entries)
        with contextlib.suppress(RuntimeError):  # no thread can start: at the interpreter's end, or at a limit
            threading.Thread(target=self._drive, args=(step.steps,), name="pybreaker_redis-retry", daemon=True).start()
        return None

    def _refresh(self, wait: bool) -> None:
        """Single flight: one thread asks; the others wait for it, or go on."""
        lock, began, later = self._refreshing, monotonic(), list[Event]()
        if not lock.acquire(timeout=self._patience if wait else 0):
            if not wait:
                return
            # longer than any refresh: an exception of a signal handler can hit its thread before it comes to `try`
            if self._refreshing is lock:
                self._refreshing = threading.RLock()
            return self._refresh(wait)
        try:
            # from when this thread came: a reply that is older than the lease was still worth the wait
            if self._view.decide(self._view.seen, began) in (Verdict.REFRESH, Verdict.WAIT):
                self._drive(self._renew(), later.append)
        finally:
            lock.release()
        for event in later:  # nobody waits for a listener, which may call this breaker itself
            self._tell(event)

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                self._listener_failed(listener)

    # Looking and steering

    @property
    def state(self) -> State:
        """The state: from the view while it is fresh, else from Redis."""
        return self._drive(self._state())

    def snapshot(self) -> Snapshot:
        """Everything that Redis knows of this breaker now; of the local engine while Redis is down."""
        return self._drive(self._snapshot())

    def force_open(self, duration: float | None = None) -> None:
        """Reject every call of the fleet for duration seconds (default and most: 30 days), then probe.

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._drive(self._command("force_open", duration))

    def force_closed(self, duration: float | None = None) -> None:
        """Admit every call of the fleet and count nothing for duration seconds (default and most: 30 days).

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._drive(self._command("force_closed", duration))

    def clear_override(self) -> None:
        """End a forced state: forced open goes on with a probe, forced closed as closed.

        Raises RedisUnavailableError.
        """
        self._drive(self._command("clear_forced"))

    def reset(self) -> None:
        """Close, with all counts and overrides gone; outcomes of calls that run now will not count.

        Raises RedisUnavailableError.
        """
        self._drive(self._command("reset"))

    def watch(self, lease: float = 30.0) -> Watch:
        """Subscribe to what other instances do, so that the view may be `lease` seconds old and still be right.

        Every breaker of this process that watches the same server shares one subscription, held by one thread. While
        it stands, a trip is in the view as soon as it is published, listeners are told of every transition (source
        "watch"), and commands are sent once per lease (per tenth of the window where a rate can trip). When it is
        lost the breaker's own short lease holds, at once, until it stands again. To be ended by close(), or by a
        with block. Raises PolicyError for a breaker without Redis, or a lease out of range.
        """
        return self._watch_with(Watch, lease)

    def set_policy(self, *, duration: float | None = None, **fields: Any) -> None:
        """Overrule fields of the policy (see Policy) for the whole fleet, on top of those set before.

        Every instance obeys from its next script call on. duration: seconds after which all of them end; None: they
        hold until clear_policy(). Raises PolicyError; RedisUnavailableError.
        """
        self._drive(self._command("set_policy", duration, fields))

    def clear_policy(self) -> None:
        """End what set_policy() set: every instance goes by its own policy again. Raises RedisUnavailableError."""
        self._drive(self._command("clear_policy"))

    def history(self, count: int = 100) -> list[HistoryEntry]:
        """The last transitions, newest first. Raises RedisUnavailableError; PolicyError for count < 1."""
        return self._drive(self._history(count))

    def flush(self) -> None:
        """Report the successes gathered so far now."""
        self._drive(self._flush())

    def close(self) -> None:
        """Flush, and close the connections; a later call opens new ones."""
        self.flush()
        if self._redis is not None:
            self._redis.close()
