"""The breaker for asyncio: carries out the decisions of _core over asyncio connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
)
from os import getpid
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, Protocol, Self, TypeVar, cast, overload

from ._classify import FAILURE, IGNORED, SUCCESS
from ._core import BreakerCore, Fallback
from ._errors import CircuitOpenError, PermitError, RedisUnavailableError
from ._events import Event, Listener, Notices
from ._permit import SETTLED, BasePermit
from ._process import renew
from ._protocol import Ask, HistoryEntry, Reply, Snapshot, Steps, check_history_count, history_entries
from ._view import Seen, Verdict
from ._watch import BaseWatch
from .wire.aio import AsyncServer, carry_out, forget_ended
from .wire.options import ASYNCIO, REDIS_ERRORS

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
S = TypeVar("S")
T_co = TypeVar("T_co", covariant=True)
M = TypeVar("M", bound=contextlib.AbstractAsyncContextManager[Any])
# By process and loop: a loop keeps only weak references. A child keeps its parent's tasks, and never touches them.
_tasks: dict[int, weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[asyncio.Task[Any]]]] = {}
_USE_SYNC = "cannot be awaited, so AsyncCircuitBreaker cannot guard it: use CircuitBreaker"


class _WithFallback(Protocol[T_co]):
    """The decorator that AsyncCircuitBreaker makes of a fallback whose result, once awaited, is a T_co."""

    @overload
    def __call__(self, func: Callable[P, Awaitable[R]], /) -> Callable[P, Coroutine[Any, Any, R | T_co]]: ...
    @overload
    def __call__(
        self: _WithFallback[Iterable[S] | AsyncIterable[S]], func: Callable[P, AsyncIterator[R]], /
    ) -> Callable[P, AsyncGenerator[R | S, Any]]: ...
    @overload
    def __call__(self, func: Callable[P, M], /) -> Callable[P, M]: ...


class AsyncPermit(BasePermit):
    """The right to one call, and the `async with` block of that call. Like Permit, with methods to be awaited."""

    __slots__ = ()

    async def success(self) -> None:
        """See Permit.success."""
        await self._breaker._drive(self._settle(SUCCESS, None))

    async def failure(self, error: BaseException | None = None, retry_after: float | str | None = None) -> None:
        """See Permit.failure."""
        await self._breaker._drive(self._settle(FAILURE, error, retry_after))

    async def release(self) -> None:
        """See Permit.release."""
        await self._breaker._drive(self._settle(IGNORED, None))

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        stage, self._stage = self._stage, SETTLED  # first: another thread may settle it at the same time
        if (
            error is None
            and stage != SETTLED
            and self._tick is not None
            and self.started >= self._breaker._innermost.failed_at
        ):
            self._tick()
            return
        self._end()
        if stage != SETTLED:
            await self._breaker._drive(self._breaker._report_end(self, error))


class Acquiring:
    """The result of acquire(): await it for the permit, or use it as an `async with` block."""

    __slots__ = ("_breaker", "_permit", "_used")

    def __init__(self, breaker: AsyncCircuitBreaker) -> None:
        self._breaker = breaker
        self._used = False

    def __repr__(self) -> str:
        return f"<acquire() of circuit breaker {self._breaker.name!r}: await it, or use it as an `async with` block>"

    def __await__(self) -> Generator[Any, Any, AsyncPermit]:
        if self._used:  # two tasks that share one would settle each other's call
            raise PermitError(f"acquire() of circuit breaker {self._breaker.name!r} is for one call: call it again")
        self._used = True
        return self._breaker._acquire().__await__()

    async def __aenter__(self) -> AsyncPermit:
        self._permit = await self
        return await self._permit.__aenter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._permit.__aexit__(kind, error, traceback)

    if not TYPE_CHECKING:  # hidden from type checkers, which report a missing await themselves

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):
                raise AttributeError(name)
            raise PermitError(
                f"acquire() of circuit breaker {self._breaker.name!r} was not awaited:"
                " `permit = await breaker.acquire()`, or `async with breaker.acquire() as permit:`"
            )


class AsyncWatch(BaseWatch):
    """A breaker's membership in a subscription of each event loop that calls it; also an `async with` block."""

    __slots__ = ()

    async def close(self) -> None:
        """Leave the subscription."""
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncCircuitBreaker(BreakerCore):
    """CircuitBreaker for asyncio: takes the same arguments, with a redis.asyncio client; its methods are awaited.

    Listeners may be coroutine functions. One breaker may serve several event loops, even at the same time, and may be
    created before any of them runs. A cancelled call counts as neither success nor failure, and frees its probe's slot.
    """

    __slots__ = ("__dict__",)  # as for CircuitBreaker
    _permit_type: type[AsyncPermit] = AsyncPermit
    _kind, _server_of = ASYNCIO, AsyncServer.of
    _redis: AsyncServer

    # Calls

    async def call(self, func: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Await func(*args, **kwargs), guarded. Raises CircuitOpenError if rejected, else the exceptions of func.

        Raises TypeError if the result of func cannot be awaited.
        """
        seen, now = self._view.seen, monotonic()
        if not seen.sent <= now < seen.closed_until:
            return await self._call_with_permit(func, args, kwargs, now, self._fallback)  # type: ignore[no-any-return]
        try:
            result = await func(*args, **kwargs)
        except BaseException as error:
            await self._drive(self._report_error(error, seen.generation, now))
            raise
        if self._only_counts and now >= self._innermost.failed_at:
            seen.tick()
        elif (rest := self._judge(result, seen, now)) is not None:
            await rest
        return result

    @overload
    def __call__(self, func: F, /) -> F: ...
    @overload
    def __call__(self, *, fallback: Callable[[CircuitOpenError], Awaitable[T]]) -> _WithFallback[T]: ...
    @overload
    def __call__(self, *, fallback: Callable[[CircuitOpenError], T]) -> _WithFallback[T]: ...

    def __call__(self, func: Any = None, *, fallback: Any = None) -> Any:
        """Decorate func: a coroutine function, an async generator function, a function made by contextlib, or any
        other callable whose result can be awaited. It keeps its kind.

        The decorated function has the breaker as `.breaker`. fallback: see CircuitBreaker; for this function only.
        Raises TypeError for a function that is none of these, and PolicyError for a fallback that is not a function.
        """
        return self._decorator(func, fallback)

    def _guarded(self, func: Any, fallback: Fallback | None) -> Any:
        if not callable(func) or inspect.isgeneratorfunction(func):
            raise TypeError(f"{func!r} {_USE_SYNC}")
        if inspect.isasyncgenfunction(func):
            return self._guard_generator(func, fallback)
        if inspect.iscoroutinefunction(func):
            return self._guard(func, fallback)
        plain = inspect.isroutine(func) or inspect.isclass(func)
        if plain and inspect.unwrap(func) is func:  # otherwise, only the result shows what func is
            raise TypeError(f"{func!r} {_USE_SYNC}")

        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = func(*args, **kwargs)
            if inspect.isasyncgen(result):
                return self._guard_generator(lambda: result, fallback)()
            if isinstance(result, contextlib._AsyncGeneratorContextManager):
                return self._around(result)
            if inspect.isawaitable(result):
                return self._await(result, fallback)
            raise TypeError(f"{func!r} {_USE_SYNC}")

        return guarded

    async def _await(self, awaitable: Awaitable[T], fallback: Fallback | None) -> T:
        """Guard an awaitable that exists already. If the call is rejected, a coroutine is closed."""

        async def work() -> T:
            return await awaitable

        try:
            return await self._guard(work, fallback)()
        finally:
            if isinstance(awaitable, Coroutine):
                awaitable.close()

    def _guard(self, func: Callable[P, Awaitable[R]], fallback: Fallback | None) -> Callable[P, Coroutine[Any, Any, R]]:
        """call() bound to one function, which saves attribute look-ups."""
        view, only_counts, innermost = self._view, self._only_counts, self._innermost

        async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            seen, now = view.seen, monotonic()
            if not seen.sent <= now < seen.closed_until:
                return await self._call_with_permit(func, args, kwargs, now, fallback)  # type: ignore[no-any-return]
            try:
                result = await func(*args, **kwargs)
            except BaseException as error:
                await self._drive(self._report_error(error, seen.generation, now))
                raise
            if only_counts and now >= innermost.failed_at:
                seen.tick()
            elif (rest := self._judge(result, seen, now)) is not None:
                await rest
            return result

        return guarded

    async def _call_with_permit(self, func: Any, args: Any, kwargs: Any, now: float, fallback: Fallback | None) -> Any:
        """A call that the fast path cannot serve: it asks Redis, is rejected, or is timed."""
        if getpid() != self._pid:
            renew(self)
        seen = self._view.seen
        try:
            if seen.sent <= now < seen.open_until and not self._notices.on_call:
                self._notices.count("rejected")
                raise CircuitOpenError(self._name, "open", seen.retry_at - now, seen.reason, seen.error)
            watched = seen.sent <= now < seen.watched_until
            permit = self._admitted(seen.generation) if watched else await self._admit(now)
        except CircuitOpenError as rejected:
            if fallback is None:
                raise
            instead = fallback(rejected)
            return await instead if inspect.isawaitable(instead) else instead
        permit._begin()
        try:
            result = await func(*args, **kwargs)
        except BaseException as error:
            await self._drive(self._report_end(permit, error))
            raise
        finally:
            permit._end()
        await self._drive(self._report_result(permit, result))
        return result

    def _judge(self, result: Any, seen: Seen, now: float) -> Awaitable[None] | None:
        """Count a call that the view admitted, where the fast path does not apply. Returns what has to be awaited."""
        if not self._every_result_succeeds or self._innermost.has_failed(now):
            return self._drive(self._report_result(self._permit(self, seen.generation, now), result))
        seen.tick()
        self._notices.call_ended(SUCCESS, seen.generation)
        return self._start_delivery()

    def _guard_generator(self, func: Callable[..., AsyncGenerator[Any, Any]], fallback: Fallback | None) -> Any:
        async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            generator = func(*args, **kwargs)  # first: wrong arguments are no call
            try:
                permit = await self._admit(monotonic())
            except CircuitOpenError as rejected:
                if fallback is None:
                    raise
                instead = fallback(rejected)
                instead = await instead if inspect.isawaitable(instead) else instead
                if hasattr(instead, "__aiter__"):
                    async for item in instead:
                        yield item
                else:
                    for item in instead:
                        yield item
                return
            step = functools.partial(anext, generator)
            try:
                async with contextlib.aclosing(generator):
                    while True:
                        permit._begin()  # part of a probe while it runs, but not while it is suspended
                        try:
                            item = await step()
                        finally:
                            permit._end()
                        try:
                            sent = yield item
                        except GeneratorExit:
                            raise
                        except BaseException as error:
                            step = functools.partial(generator.athrow, error)
                        else:
                            step = functools.partial(generator.asend, sent)
            except StopAsyncIteration:
                await self._drive(self._report_end(permit, None))
            except BaseException as error:
                await self._drive(self._report_end(permit, error))
                raise

        return guarded

    @contextlib.asynccontextmanager
    async def _around(self, manager: Any) -> AsyncIterator[Any]:
        async with self.acquire(), manager._recreate_cm() as value:
            yield value

    def acquire(self) -> Acquiring:
        """A permit for one call: await it, or use it as the `async with` block of that call.

        Either raises CircuitOpenError if the call is rejected.
        """
        return Acquiring(self)

    async def _acquire(self) -> AsyncPermit:
        seen, now = self._view.seen, monotonic()
        if seen.sent <= now < seen.closed_until:
            tick = seen.tick if self._only_counts else None
            return cast(AsyncPermit, self._permit(self, seen.generation, now, None, tick))
        return cast(AsyncPermit, await self._admit(now))

    # Carrying out the decisions

    async def _admit(self, began: float) -> BasePermit:
        try:
            answer = self._consult(began)
            while answer is Verdict.WAIT:
                await self._redis.refresh()
                answer = self._consult(began, refreshed=True)
        except BaseException:
            await self._deliver()
            raise
        if isinstance(answer, BasePermit):
            return await self._deliver_then(answer)
        return await self._drive(self._ask())

    async def _drive(self, steps: Steps[T] | None) -> T:
        """Carry out the steps, deliver their events, and return their result: None without steps.

        An exchange with Redis completes even if the caller is cancelled. A permit that it brings is then given back.
        """
        if steps is None:
            await self._deliver()
            return cast(T, None)
        try:
            ask = next(steps)
        except StopIteration as end:
            return await self._deliver_then(cast(T, end.value))
        except BaseException:
            await self._deliver()
            raise
        task = _spawn(self._run_to_end(steps, ask, self._notices.take()))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # this task was cancelled, perhaps after the result had come, but before this task woke up
            task.add_done_callback(self._give_back)
            raise

    async def _deliver_then(self, result: T) -> T:
        """Deliver the events, then return the result. If the caller is cancelled meanwhile, a permit is given back."""
        try:
            await self._deliver()
        except BaseException:
            if isinstance(result, BasePermit):
                _spawn(self._drive(self._report(result, IGNORED)))
            raise
        return result

    async def _run_to_end(self, steps: Steps[T], ask: Ask, pending: list[Event]) -> T:
        """Carry out the steps, and deliver their events. ask: already taken from the steps. pending: earlier events."""

        def run_script(ask: Ask) -> Awaitable[Reply]:
            pending.extend(self._notices.take())  # before another task of this thread takes them
            return self._run_script(ask)

        try:
            return await carry_out(steps, run_script, ask)
        finally:
            pending += self._notices.take()
            await self._deliver(pending)

    async def _run_script(self, ask: Ask) -> Reply:
        name, request = ask
        if "failures" in request and self._redis.link.is_reporting(self._line):
            await self._redis.wait_for_reports()
            if (outage := self._redis.link.outage(self._line)) is not None:  # the server was lost
                raise outage.error
        return await self._redis.run(name, self._key, request)

    def _give_back(self, task: asyncio.Task[Any]) -> None:
        """Free the slot of a probe whose caller was cancelled before it had the permit that this task has returned."""
        if not task.cancelled() and task.exception() is None and isinstance(permit := task.result(), BasePermit):
            _spawn(self._drive(self._report(permit, IGNORED)))

    async def _deliver(self, events: list[Event] | None = None) -> None:
        """Call the listeners of each event, one after the other, to the end even if the caller is cancelled."""
        if (rest := self._start_delivery(events)) is not None:
            await rest

    def _deliver_events(self, events: list[Event]) -> None:
        _spawn(self._deliver(events))

    def _start_delivery(self, events: list[Event] | None = None) -> Awaitable[None] | None:
        """Call the plain listeners. Returns what has to be awaited from the first awaitable listener on."""
        notices = self._notices
        if events is not None or notices.waiting:
            calls = notices.deliveries(events)
            for listener, event in calls:
                result = notices.call(listener, event)
                if result is not None and inspect.isawaitable(result):
                    rest = list(calls)  # all of them now: another task of this thread must not take what is left
                    return asyncio.shield(_spawn(_call_the_rest(notices, listener, result, iter(rest))))
        return None

    # State and operator actions

    async def snapshot(self) -> Snapshot:
        """See CircuitBreaker.snapshot."""
        return await self._drive(self._snapshot())

    async def force_open(
        self, duration: float | None = None, *, operator: str | None = None, note: str | None = None
    ) -> None:
        """See CircuitBreaker.force_open."""
        await self._drive(self._command("force_open", operator, note, duration))

    async def force_closed(
        self, duration: float | None = None, *, operator: str | None = None, note: str | None = None
    ) -> None:
        """See CircuitBreaker.force_closed."""
        await self._drive(self._command("force_closed", operator, note, duration))

    async def clear_forced(self, *, operator: str | None = None, note: str | None = None) -> None:
        """See CircuitBreaker.clear_forced."""
        await self._drive(self._command("clear_forced", operator, note))

    async def probe(self, *, operator: str | None = None, note: str | None = None) -> None:
        """See CircuitBreaker.probe."""
        await self._drive(self._command("probe", operator, note))

    async def reset(self, *, operator: str | None = None, note: str | None = None) -> None:
        """See CircuitBreaker.reset."""
        await self._drive(self._command("reset", operator, note))

    async def watch(self) -> AsyncWatch:
        """See CircuitBreaker.watch. All breakers of this event loop share one subscription, held by one task."""
        return self._watch_with(AsyncWatch)

    async def set_policy(
        self,
        *,
        duration: float | None = None,
        operator: str | None = None,
        note: str | None = None,
        **fields: Any,
    ) -> None:
        """See CircuitBreaker.set_policy."""
        await self._drive(self._command("set_policy", operator, note, duration, fields))

    async def clear_policy(self, *, operator: str | None = None, note: str | None = None) -> None:
        """See CircuitBreaker.clear_policy."""
        await self._drive(self._command("clear_policy", operator, note))

    async def history(self, count: int = 100) -> list[HistoryEntry]:
        """See CircuitBreaker.history."""
        check_history_count(count)
        self._check_process()
        if self._memory is not None:
            return history_entries(self._memory.history(count))
        try:
            return history_entries(await self._redis.history(self._key, count))
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"the history could not be read: {error}") from error

    async def flush(self) -> None:
        """See CircuitBreaker.flush."""
        await self._drive(self._flush())
        if self._line is not None and self._redis.link.is_reporting(self._line):
            await self._redis.wait_for_reports()

    async def close(self) -> None:
        """Report the gathered successes, and close this loop's connections; a later call opens new ones."""
        await self.flush()
        self._view.drop()
        if self._line is not None:
            self._redis.link.leave(self._line)
            await self._redis.close()


def _spawn(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    loop, here = asyncio.get_running_loop(), getpid()
    by_loop = _tasks.get(here) or _tasks.setdefault(here, weakref.WeakKeyDictionary())
    tasks = by_loop.get(loop)
    if tasks is None:
        forget_ended(by_loop)
        tasks = by_loop[loop] = set()
    task = loop.create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


async def _call_the_rest(
    notices: Notices, listener: Listener, result: Awaitable[Any], calls: Iterator[tuple[Listener, Event]]
) -> None:
    """Await the result of a listener, then call and await the listeners after it."""
    while True:
        try:
            if inspect.isawaitable(result):
                await result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            notices.failed(listener)  # the listener's own work was cancelled
        except Exception:
            notices.failed(listener)
        following = next(calls, None)
        if following is None:
            return
        listener, event = following
        result = notices.call(listener, event)
