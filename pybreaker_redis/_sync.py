"""The breaker for threads: carries out the decisions of _core over blocking connections."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from os import getpid
from time import monotonic
from typing import Any, ParamSpec, Self, TypeVar, cast, overload

from ._classify import FAILURE, IGNORED, SUCCESS
from ._core import BreakerCore, Fallback
from ._errors import CircuitOpenError, RedisUnavailableError
from ._events import Event
from ._permit import ADMITTED, ENTERED, SETTLED, BasePermit
from ._process import renew
from ._protocol import Ask, HistoryEntry, Reply, Snapshot, Steps, check_history_count, history_entries
from ._view import Seen, Verdict
from ._watch import BaseWatch
from .wire.options import BLOCKING, REDIS_ERRORS
from .wire.server import carry_out
from .wire.sync import Server

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
# results that run later, and get a permit of their own then
_SUSPENDED: frozenset[Any] = frozenset(
    {types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, contextlib._GeneratorContextManager}
)
_new = object.__new__
_USE_ASYNC = "is a coroutine function, which CircuitBreaker cannot await: use AsyncCircuitBreaker"


class Permit(BasePermit):
    """The right to one call, and the `with` block of that call.

    A `with breaker.acquire() as permit:` block counts as a success or, if it raises, as the breaker's options classify
    the exception. Call permit.failure(error) or permit.release() inside to overrule that. For callbacks, use no block,
    and call success(), failure(error) or release() once; a second call raises PermitError.
    """

    __slots__ = ()

    def success(self) -> None:
        """Count the call as a success. Raises PermitError if the permit is settled."""
        self._breaker._drive(self._settle(SUCCESS, None))

    def failure(self, error: BaseException | None = None, retry_after: float | str | None = None) -> None:
        """Count the call as a failure. error: the exception, for on_call and the breaker's retry_after.

        retry_after: seconds after which the service said to come back; the circuit holds for that long. Raises
        PermitError if the permit is settled, and PolicyError if retry_after is not a number.
        """
        self._breaker._drive(self._settle(FAILURE, error, retry_after))

    def release(self) -> None:
        """Do not count the call, and free the slot of a probe. Raises PermitError if the permit is settled."""
        self._breaker._drive(self._settle(IGNORED, None))

    def __enter__(self) -> Self:
        if self._stage == ADMITTED and self._tick is not None:
            self._stage = ENTERED
            return self
        self._enter()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        stage, self._stage = self._stage, SETTLED  # first: another thread may settle it at the same time
        if (
            error is None
            and stage != SETTLED
            and (tick := self._tick) is not None
            and self.started >= self._breaker._innermost.failed_at
        ):
            tick()
            return
        self._end()
        if stage != SETTLED:
            self._breaker._drive(self._breaker._report_end(self, error))


class Watch(BaseWatch):
    """A breaker's membership in the subscription of its process; also a `with` block."""

    __slots__ = ()

    def close(self) -> None:
        """Leave the subscription."""
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CircuitBreaker(BreakerCore):
    """A circuit breaker, shared through Redis by every process that uses the same name.

    name: the guarded service. Breakers of one name share one state.
    redis: a redis-py client (Redis, RedisCluster, Sentinel master), a URL, or None to keep the state in this process.
    policy: when the breaker trips and how it recovers. None: Policy().
    lease: seconds for which calls may rely on a reply from Redis. 0: each call asks before and reports after.
    failures: the exceptions that count as failures: one type, several types, or a function of the exception. Any other
        exception counts as success: the service did answer. If the function raises, that is logged once, and the call
        counts as failed.
    ignore: the exceptions that count as neither success nor failure: types, or a function, as for failures.
    is_failure: a function of the result. A call counts as a failure if it returns true.
    retry_after: a function of the exception or the result of a call. If the service said when to come back (429 or
        503 with Retry-After), it returns the seconds until then. The circuit then opens for that time, for the whole
        fleet: a hold. Otherwise it returns None. It is not called for ignored exceptions. If it raises, that is logged
        once, and there is no hold.
    listeners: callables that receive an Event for each transition and each outage of Redis.
    on_call: callables that receive an Event for every call: success, failure, ignored or rejected.
    fallback: a function of the CircuitOpenError. A rejected call returns its result; for a generator function, that is
        an iterable. It is not called for errors of the guarded function, nor for blocks.
    on_redis_failure: what to do while Redis is down. "local" applies the same rules in this process, "open" rejects
        every call, "closed" admits every call.
    prefix: the first part of every key in Redis.
    redis_timeout: seconds to wait for a connection to Redis, and for each reply.
    host: the name of this host, which counts once in the quorum and which the history shows. None: the machine's host
        name.
    clock: for tests in memory, a pybreaker_redis.testing.FakeClock. A clock disables the lease: each call is
        decided on the current state.
    record_errors: whether Redis, history and CircuitOpenError show the message of the failure that opened the circuit.
        False: its type only.
    listed: whether `pybreaker-redis fleet` shows this breaker and its policy: the process writes them to Redis once a
        minute, with a refresh.

    Construction needs no server and writes nothing. Raises PolicyError for an invalid option.
    """

    __slots__ = ("__dict__",)  # empty, until somebody sets an attribute or a test replaces a method
    _permit_type: type[Permit] = Permit
    _kind, _server_of = BLOCKING, Server.of
    _redis: Server

    # Calls

    def call(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call func(*args, **kwargs), guarded. Raises CircuitOpenError if rejected, else the exceptions of func.

        If func returns a generator, its whole iteration is guarded. Raises TypeError if func returns a coroutine.
        """
        seen, now = self._view.seen, monotonic()
        if not seen.sent <= now < seen.closed_until:
            return self._call_with_permit(func, args, kwargs, now, self._fallback)  # type: ignore[no-any-return]
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self._drive(self._report_error(error, seen.generation, now))
            raise
        if self._only_counts and type(result) not in _SUSPENDED and now >= self._innermost.failed_at:
            seen.tick()
            return result
        return self._judge(func, result, seen, now, self._fallback)

    @overload
    def __call__(self, func: F, /) -> F: ...
    @overload
    def __call__(
        self, *, fallback: Callable[[CircuitOpenError], T]
    ) -> Callable[[Callable[P, R]], Callable[P, R | T]]: ...

    def __call__(self, func: Any = None, *, fallback: Any = None) -> Any:
        """Decorate func. Generator functions, and functions made by contextlib, keep their kind.

        The decorated function has the breaker as `.breaker`. fallback: see CircuitBreaker; for this function only.
        Raises TypeError for a coroutine function, and PolicyError for a fallback that is not a function.
        """
        return self._decorator(func, fallback)

    def _guarded(self, func: Any, fallback: Fallback | None) -> Any:
        if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(f"{func!r} {_USE_ASYNC}")
        if not callable(func):
            raise TypeError(f"{func!r} is not callable: decorate a function")
        if not inspect.isgeneratorfunction(func):
            return self._guard(func, fallback)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            return (yield from self._iterate(func(*args, **kwargs), fallback))

        return guarded

    def _guard(self, func: Callable[P, R], fallback: Fallback | None) -> Callable[P, R]:
        """call() bound to one function, which saves attribute look-ups."""
        view, only_counts, innermost = self._view, self._only_counts, self._innermost

        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            seen, now = view.seen, monotonic()
            if not seen.sent <= now < seen.closed_until:
                return self._call_with_permit(func, args, kwargs, now, fallback)  # type: ignore[no-any-return]
            try:
                result = func(*args, **kwargs)
            except BaseException as error:
                self._drive(self._report_error(error, seen.generation, now))
                raise
            if only_counts and type(result) not in _SUSPENDED and now >= innermost.failed_at:
                seen.tick()
                return result
            return self._judge(func, result, seen, now, fallback)

        return guarded

    def _call_with_permit(self, func: Any, args: Any, kwargs: Any, now: float, fallback: Fallback | None) -> Any:
        """A call that the fast path cannot serve: it asks Redis, is rejected, or is timed."""
        if getpid() != self._pid:
            renew(self)
        seen = self._view.seen
        try:
            if seen.sent <= now < seen.open_until and not self._notices.on_call:
                self._notices.count("rejected")
                raise CircuitOpenError(self._name, "open", seen.retry_at - now, seen.reason, seen.error)
            watched = seen.sent <= now < seen.watched_until
            permit = self._admitted(seen.generation) if watched else self._admit(now)
        except CircuitOpenError as rejected:
            if fallback is None:
                raise
            return fallback(rejected)
        permit._begin()
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self._drive(self._report_end(permit, error))
            raise
        finally:
            permit._end()
        return self._settle_result(func, result, permit, fallback)

    def _judge(self, func: Any, result: R, seen: Seen, now: float, fallback: Fallback | None) -> R:
        """Count a result of the fast path that is_failure or on_call must see, or that must still be iterated."""
        if not self._every_result_succeeds or type(result) in _SUSPENDED or self._innermost.has_failed(now):
            return self._settle_result(func, result, self._permit(self, seen.generation, now), fallback)
        seen.tick()
        self._notices.call_ended(SUCCESS, seen.generation)
        self._deliver()
        return result

    def _settle_result(self, func: Any, result: R, permit: BasePermit, fallback: Fallback | None) -> R:
        if type(result) not in _SUSPENDED:
            self._drive(self._report_result(permit, result))
            return result
        # nothing has run yet: a generator asks for its own permit when it starts
        self._drive(self._take_back(permit))
        if isinstance(result, types.GeneratorType):
            return cast(R, self._iterate(result, fallback))
        if isinstance(result, contextlib._GeneratorContextManager):
            return cast(R, self._around(result))
        if isinstance(result, types.CoroutineType):
            result.close()
        raise TypeError(f"{func!r} {_USE_ASYNC}")

    def _iterate(self, generator: Generator[Any, Any, Any], fallback: Fallback | None) -> Generator[Any, Any, Any]:
        try:
            permit = self._admit(monotonic())
        except CircuitOpenError as rejected:
            if fallback is None:
                raise
            return (yield from fallback(rejected))
        try:
            result = yield from (generator if permit.probe is None else permit._around(generator))
        except BaseException as error:
            self._drive(self._report_end(permit, error))
            raise
        self._drive(self._report_result(permit, result))
        return result

    @contextlib.contextmanager
    def _around(self, manager: Any) -> Iterator[Any]:
        with self.acquire(), manager._recreate_cm() as value:
            yield value

    def acquire(self) -> Permit:
        """A permit for one call, which is also its `with` block. Raises CircuitOpenError if the call is rejected."""
        seen, now = self._view.seen, monotonic()
        if seen.sent <= now < seen.closed_until:
            # calling the class would take half as long again
            permit: Permit = _new(self._permit)  # type: ignore[assignment]
            permit._breaker = self
            permit._stage = ADMITTED
            permit._tick = seen.tick if self._only_counts else None
            permit.generation = seen.generation
            permit.started = now
            permit.probe = permit._pending_since = None
            return permit
        return cast(Permit, self._admit(now))

    # Carrying out the decisions

    def _admit(self, began: float) -> BasePermit:
        try:
            answer = self._consult(began)
            while answer is Verdict.WAIT:
                self._redis.refresh()
                answer = self._consult(began, refreshed=True)
            return answer if isinstance(answer, BasePermit) else carry_out(self._ask(), self._run_script)
        finally:
            self._deliver()

    def _drive(self, steps: Steps[T] | None) -> T:
        """Carry out the steps, deliver their events, and return their result: None without steps."""
        try:
            return None if steps is None else carry_out(steps, self._run_script)  # type: ignore[return-value]
        finally:
            self._deliver()

    def _run_script(self, ask: Ask) -> Reply:
        name, request = ask
        if "failures" in request and self._redis.link.is_reporting(self._line):
            self._redis.wait_for_reports()
            if (outage := self._redis.link.outage(self._line)) is not None:  # the server was lost
                raise outage.error
        return self._redis.run(name, self._key, request)

    def _deliver(self, events: Iterable[Event] | None = None) -> None:
        notices = self._notices
        if events is not None or notices.waiting:
            for listener, event in notices.deliveries(events):
                notices.call(listener, event)

    _deliver_events = _deliver

    # State and operator actions

    def snapshot(self) -> Snapshot:
        """Read the whole state from Redis; while Redis is down, from this process's local engine."""
        return self._drive(self._snapshot())

    def force_open(
        self, duration: float | None = None, *, operator: str | None = None, note: str | None = None
    ) -> None:
        """Reject every call of the fleet, then probe. duration: seconds; default and maximum: 30 days.

        operator: who acts, at most 100 characters. note: why, at most 200 characters.

        The snapshot shows operator and note of the last action until the next transition, and the history keeps all.
        Longer texts are cut, non-ASCII characters escaped.

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._drive(self._command("force_open", operator, note, duration))

    def force_closed(
        self, duration: float | None = None, *, operator: str | None = None, note: str | None = None
    ) -> None:
        """Admit every call of the fleet, and count nothing. duration: seconds; default and maximum: 30 days.

        operator, note: as for force_open.

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        self._drive(self._command("force_closed", operator, note, duration))

    def clear_forced(self, *, operator: str | None = None, note: str | None = None) -> None:
        """End a forced state. After force_open the next call probes; after force_closed the circuit stays closed.

        operator, note: as for force_open. Raises RedisUnavailableError.
        """
        self._drive(self._command("clear_forced", operator, note))

    def probe(self, *, operator: str | None = None, note: str | None = None) -> None:
        """Let the next call probe now, whatever is left of an open period or a hold.

        Unlike a reset, this admits one call, not the full load. In any state other than open it does nothing.
        operator, note: as for force_open. Raises ForcedStateError while a state is forced; RedisUnavailableError.
        """
        self._drive(self._command("probe", operator, note))

    def reset(self, *, operator: str | None = None, note: str | None = None) -> None:
        """Close the circuit; drop all counts, any forced state and the policy override. The history stays.

        Calls that are running will not count. If the circuit is closed and there is nothing to drop, it does nothing,
        and running calls do count.

        operator, note: as for force_open. Raises RedisUnavailableError.
        """
        self._drive(self._command("reset", operator, note))

    def watch(self) -> Watch:
        """Subscribe to the messages about this breaker, so that its view follows within milliseconds.

        All breakers of this process that watch the same server share one subscription, held by one thread. A message
        is a hint to read the state at once; its content is not read. Listeners receive the transitions of other
        instances (source "watch"), once for each generation that this process reads. Without a subscription, and while
        it is lost, a view is as old as its lease allows. End it with close(), or use it as a `with` block. Raises
        PolicyError for a breaker without Redis.
        """
        return self._watch_with(Watch)

    def set_policy(
        self,
        *,
        duration: float | None = None,
        operator: str | None = None,
        note: str | None = None,
        **fields: Any,
    ) -> None:
        """Set a policy override for the whole fleet: fields of Policy, added to those set before.

        Every process obeys within two leases, or within milliseconds if it watches. duration: seconds until the whole
        policy override ends; None: until clear_policy(). Changes nothing if the fields have these values already, and
        the end stays the same. operator, note: as for force_open; kept with the policy override and in the history.
        Raises PolicyError; RedisUnavailableError.
        """
        self._drive(self._command("set_policy", operator, note, duration, fields))

    def clear_policy(self, *, operator: str | None = None, note: str | None = None) -> None:
        """End the policy override: every process follows its own policy again.

        operator, note: as for force_open; kept in the history. Raises RedisUnavailableError.
        """
        self._drive(self._command("clear_policy", operator, note))

    def history(self, count: int = 100) -> list[HistoryEntry]:
        """Up to `count` transitions and operators' actions, newest first.

        Raises RedisUnavailableError; PolicyError for count < 1.
        """
        check_history_count(count)
        self._check_process()
        if self._memory is not None:
            return history_entries(self._memory.history(count))
        try:
            return history_entries(self._redis.history(self._key, count))
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"the history could not be read: {error}") from error

    def flush(self) -> None:
        """Report the gathered successes to Redis now."""
        self._drive(self._flush())
        if self._line is not None and self._redis.link.is_reporting(self._line):
            self._redis.wait_for_reports()

    def close(self) -> None:
        """Report the gathered successes, and close the connections; a later call opens new ones."""
        self.flush()
        self._view.drop()  # a later call asks Redis, and so lets the link know of the breaker again
        if self._line is not None:
            self._redis.link.leave(self._line)
            self._redis.close()
