"""The breaker for threads: the decisions of _core over blocking connections."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Generator
from time import monotonic
from typing import Any, ParamSpec, Protocol, Self, TypeVar, cast, overload

from ._classify import FAILURE, IGNORED, SUCCESS
from ._core import BreakerCore
from ._errors import CircuitOpenError, RedisUnavailableError
from ._fallback import InMemory, patience
from ._permit import ADMITTED, ENTERED, SETTLED, BasePermit, warns_if_lost
from ._protocol import HistoryEntry, Snapshot, Steps, check_history_count, history_entries
from ._view import Seen, Verdict
from .wire.options import BLOCKING, REDIS_ERRORS
from .wire.subscription import BaseWatch, Subscription
from .wire.sync import server_of

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
_SUSPENDED = frozenset({types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType})
_new = object.__new__
_USE_ASYNC = "is a coroutine function: the sync breaker cannot await it, use AsyncCircuitBreaker"


class Guarded(Protocol[P, R_co]):
    """A decorated function: same signature, and its breaker as `.breaker`."""

    breaker: CircuitBreaker

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Permit(BasePermit):
    """The right to one call, and the `with` block of that call.

    with breaker.acquire() as permit: counts the end of the block: an exception by the breaker's classification, else a
    success. permit.failure(error) or permit.release() inside overrule that. In two steps, for callbacks: call
    success(), failure(error) or release() once; a second one raises PermitError.
    """

    __slots__ = ()

    def success(self) -> None:
        """The call succeeded. Raises PermitError if the permit is settled."""
        self._breaker._drive(self._settle(SUCCESS, None))

    def failure(self, error: BaseException | None = None) -> None:
        """The call failed. Raises PermitError if the permit is settled."""
        self._breaker._drive(self._settle(FAILURE, error))

    def release(self) -> None:
        """The call counts as nothing; a probe gives its slot back. Raises PermitError if the permit is settled."""
        self._breaker._drive(self._settle(IGNORED, None))

    def __enter__(self) -> Self:
        if self._stage == ADMITTED and self._tick is not None:
            self._stage = ENTERED
            return self
        self._enter()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        stage, self._stage = self._stage, SETTLED  # before anything else: another thread may settle it now
        if error is None and stage == ENTERED and (tick := self._tick) is not None:
            tick()
            return
        self.end()
        if stage == ENTERED:
            self._breaker._drive(self._breaker._report_end(self, error))


class Watch(BaseWatch):
    """A breaker's share in a subscription; also a `with` block."""

    def _open(self) -> Subscription:
        return Subscription(*self._subscription())

    def close(self) -> None:
        """Leave the subscription; the breaker's own lease holds again."""
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CircuitBreaker(BreakerCore):
    """A circuit breaker, shared through Redis by every process that uses the same name.

    name: of the guarded service.
    redis: a redis-py client (Redis, RedisCluster, Sentinel master), a URL, or None for this process only.
    policy: when the breaker trips and how it recovers.
    lease: seconds for which a reply of Redis is used without asking again; 0 asks before and reports after every call.
    failures: exception types that count as failures. Any other exception counts as success: the service did answer.
    ignore: exception types that count as nothing.
    is_failure: a predicate on results; a true one counts as failure.
    listeners: callables that receive an Event for each transition and each outage of Redis.
    on_call: callables that receive an Event for every call: success, failure, ignored or rejected.
    on_redis_failure: without Redis, "local" protects this process by the same rules, "open" rejects, "closed" admits.
    prefix: of the keys in Redis.
    redis_timeout: seconds to connect to Redis, and for each reply.

    Constructing one needs no server and writes nothing. Raises PolicyError for an option that makes no sense.
    """

    _permit: type[Permit] = Permit
    _warning_permit = warns_if_lost(Permit)
    _kind, _server_of = BLOCKING, staticmethod(server_of)

    def _start_process(self) -> None:
        super()._start_process()
        self._refreshing = threading.RLock()

    # Calls

    def call(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """func(*args, **kwargs), guarded. Raises CircuitOpenError when rejected, else what func raises.

        A generator that func returns is guarded over its whole iteration; a coroutine is a TypeError.
        """
        seen, now = self._view.seen, monotonic()
        if now >= seen.closed_until:
            return self._slow_call(func, args, kwargs, now)
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self._drive(self._report_end(self._permit(self, seen.generation, now), error))
            raise
        if self._quiet and type(result) not in _SUSPENDED:
            seen.tick()
            return result
        return self._judge(func, result, seen, now)

    def __call__(self, func: Callable[P, R]) -> Guarded[P, R]:
        """Decorate func. Raises TypeError for a coroutine function."""
        if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(f"{func!r} {_USE_ASYNC}")
        if not callable(func):  # a classmethod, for example, is not until it is bound
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
        """call() for one function, without the attribute look-ups that it needs."""
        view, quiet = self._view, self._quiet

        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            seen, now = view.seen, monotonic()
            if now >= seen.closed_until:
                return self._slow_call(func, args, kwargs, now)
            try:
                result = func(*args, **kwargs)
            except BaseException as error:
                self._drive(self._report_end(self._permit(self, seen.generation, now), error))
                raise
            if quiet and type(result) not in _SUSPENDED:
                seen.tick()
                return result
            return self._judge(func, result, seen, now)

        return guarded

    def _slow_call(self, func: Callable[..., R], args: Any, kwargs: Any, now: float) -> R:
        """A call that the view does not simply admit, or whose duration is measured."""
        seen = self._view.seen
        if now < seen.open_until and not self._notices.on_call:
            self._notices.count("rejected")
            raise CircuitOpenError(self.name, "open", seen.retry_at - now)
        permit = self._admitted(seen.generation) if now < seen.timed_until else self._admit(now)
        permit.begin()
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self._drive(self._report_end(permit, error))
            raise
        finally:
            permit.end()
        return self._settle_result(func, result, permit)

    def _judge(self, func: Any, result: R, seen: Seen, now: float) -> R:
        """The result of a call that the view admitted, where the fast path does not apply."""
        if not self._plain or type(result) in _SUSPENDED:
            return self._settle_result(func, result, self._permit(self, seen.generation, now))
        seen.tick()
        self._notices.call_ended(SUCCESS, seen.generation)
        self._deliver()
        return result

    def _settle_result(self, func: Any, result: R, permit: BasePermit) -> R:
        if type(result) not in _SUSPENDED:
            if self._plain and self._finish(permit):
                self._deliver()
            else:
                self._drive(self._report_result(permit, result))
            return result
        # nothing has run yet: a generator asks for its own permit when it starts
        self._drive(self._report(permit, IGNORED))
        if isinstance(result, types.GeneratorType):
            return cast(R, self._iterate(result))
        if isinstance(result, types.CoroutineType):
            result.close()
        raise TypeError(f"{func!r} {_USE_ASYNC}")

    def _iterate(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        permit = self._admit(monotonic())
        try:
            result = yield from generator
        except BaseException as error:
            self._drive(self._report_end(permit, error))
            raise
        self._drive(self._report_result(permit, result))
        return result

    def acquire(self) -> Permit:
        """A permit for one call, which is also its `with` block. Raises CircuitOpenError when rejected."""
        seen, now = self._view.seen, monotonic()
        if now < seen.closed_until:
            permit = _new(self._permit)  # calling the class would take half as long again
            permit._breaker = self
            permit._stage = ADMITTED
            permit._tick = seen.tick if self._quiet else None
            permit.generation = seen.generation
            permit.started = now
            permit.probe = permit.pending_since = None
            return permit
        return cast(Permit, self._admit(now))

    # The shell

    def _admit(self, began: float) -> BasePermit:
        try:
            answer = self._consult(began)
            while not isinstance(answer, BasePermit):
                if answer is Verdict.ASK:
                    return self._drive(self._ask())
                self._refresh(wait=answer is Verdict.WAIT)
                answer = self._consult(began, refreshed=True)
            return answer
        finally:
            self._deliver()

    @overload
    def _drive(self, steps: Steps[T]) -> T: ...
    @overload
    def _drive(self, steps: None) -> None: ...
    @overload
    def _drive(self, steps: Steps[T] | None) -> T | None: ...

    def _drive(self, steps: Steps[T] | None) -> T | None:
        """Carry out what the decision code asks for, deliver its events, and give what it returns."""
        try:
            return None if steps is None else self._carry_out(steps)
        finally:
            self._deliver()

    def _carry_out(self, steps: Steps[T]) -> T:
        try:
            ask = next(steps)
            while True:
                try:
                    reply = self._redis.run(ask.name, self.keys, ask.request)
                except BaseException as error:
                    ask = steps.throw(error)
                else:
                    ask = steps.send(reply)
        except StopIteration as end:
            return cast(T, end.value)

    def _in_background(self, steps: Steps[None]) -> None:
        with contextlib.suppress(RuntimeError):  # no thread can start: at the interpreter's end, or at a limit
            threading.Thread(target=self._drive, args=(steps,), name="pybreaker_redis-retry", daemon=True).start()

    def _refresh(self, wait: bool) -> None:
        """Renew the view, one thread at a time. wait: return only when it was renewed, by whichever thread."""
        lock, began = self._refreshing, monotonic()
        if not lock.acquire(timeout=patience(self._redis_timeout) if wait else 0):
            if not wait:
                return
            # longer than any refresh: a signal handler's exception can hit its thread between the lock and `try`
            if self._refreshing is lock:
                self._refreshing = threading.RLock()
            return self._refresh(wait)
        try:
            # as of this thread's arrival: a reply that has outlived its lease by now was still worth the wait
            if self._view.decide(self._view.seen, began) in (Verdict.REFRESH, Verdict.WAIT):
                self._carry_out(self._renew())
        finally:
            lock.release()  # before the events are delivered: a listener may be slow, or call this breaker

    def _deliver(self) -> None:
        for event in self._notices.take():
            for listener in self._notices.receivers(event):
                try:
                    listener(event)
                except Exception:
                    self._notices.failed(listener)

    # Looking and steering

    def snapshot(self) -> Snapshot:
        """Everything that Redis knows about this breaker now; while Redis is down, what the local engine knows."""
        return self._drive(self._snapshot())

    def force_open(self, duration: float | None = None) -> None:
        """Reject every call of the fleet for so many seconds (default and most: 30 days), then probe.

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._drive(self._command("force_open", duration))

    def force_closed(self, duration: float | None = None) -> None:
        """Admit every call of the fleet, and count nothing, for so many seconds (default and most: 30 days).

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._drive(self._command("force_closed", duration))

    def clear_forced(self) -> None:
        """End a forced state: a circuit forced open probes next, one forced closed stays closed.

        Raises RedisUnavailableError.
        """
        self._drive(self._command("clear_forced"))

    def reset(self) -> None:
        """Close the circuit, and drop all counts and forced states. Calls that run now will not count.

        Raises RedisUnavailableError.
        """
        self._drive(self._command("reset"))

    def watch(self, lease: float = 30.0) -> Watch:
        """Subscribe to the transitions of other instances, so that the view may be `lease` seconds old.

        All breakers of this process that watch the same server share one subscription, held by one thread. While it
        stands, a trip is in the view as soon as it is published, listeners receive every transition (source "watch"),
        and a healthy breaker sends one command per lease (per tenth of the window where a rate can trip). When it is
        lost, the breaker's own short lease holds until it stands again. End it with close(), or use it as a `with`
        block. Raises PolicyError for a breaker without Redis, or a lease out of range.
        """
        return self._watch_with(Watch, lease)

    def set_policy(self, *, duration: float | None = None, **fields: Any) -> None:
        """Set a policy override for the whole fleet: fields of Policy, on top of those set before.

        Every instance obeys from its next script call on. duration: seconds after which the whole override ends;
        None: it holds until clear_policy(). Raises PolicyError; RedisUnavailableError.
        """
        self._drive(self._command("set_policy", duration, fields))

    def clear_policy(self) -> None:
        """End the policy override: every instance follows its own policy again. Raises RedisUnavailableError."""
        self._drive(self._command("clear_policy"))

    def history(self, count: int = 100) -> list[HistoryEntry]:
        """The last transitions, newest first. Raises RedisUnavailableError; PolicyError for count < 1."""
        check_history_count(count)
        if isinstance(self._engine, InMemory):
            return history_entries(self._engine.history(count))
        try:
            return history_entries(self._redis.history(self.keys, count))
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"the history could not be read: {error}") from error

    def flush(self) -> None:
        """Report the gathered successes now."""
        self._drive(self._flush())

    def close(self) -> None:
        """Report the gathered successes, and close the connections; a later call opens new ones."""
        self.flush()
        if self._redis is not None:
            self._redis.close()
