"""The breaker for asyncio: the decisions of _core over awaited connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import types
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from time import monotonic
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

from ._core import BasePermit, BreakerCore, Exceptions
from ._errors import CircuitOpenError
from ._fallback import OnRedisFailure
from ._policy import Policy
from ._protocol import HistoryEntry, Snapshot, State
from ._scripts import AsyncRedisEngine, forget_ended, leave_to_parent
from ._steps import Ask, ReadHistory, Refresh, Step, Steps, Tell
from ._view import Event, Flight, Outcome
from ._watch import AsyncSubscription, BaseWatch

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
_Teller = Callable[[Event], Awaitable[None]]
_USE_SYNC = "is no coroutine function: the asyncio breaker awaits what it guards, use CircuitBreaker"


class AsyncGuarded(Protocol[P, R_co]):
    """A decorated function: same signature, and its breaker as `.breaker`."""

    breaker: AsyncCircuitBreaker

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class AsyncPermit(BasePermit):
    """The right to one call, to be settled once: await success(), failure(exc) or release()."""

    __slots__ = ()

    async def success(self) -> None:
        """The call succeeded. Raises PermitError when the permit was settled before."""
        await self._breaker._drive(self._settle(Outcome.SUCCESS, None))

    async def failure(self, exception: BaseException | None = None) -> None:
        """The call failed. Raises PermitError when the permit was settled before."""
        await self._breaker._drive(self._settle(Outcome.FAILURE, exception))

    async def release(self) -> None:
        """The call counts as nothing; a probe's slot is given back. Raises PermitError like the others."""
        await self._breaker._drive(self._settle(Outcome.IGNORED, None))

    ignore = release


class AsyncWatch(BaseWatch):
    """A breaker's share in a subscription, in the loop that made it."""

    def _key(self) -> tuple[object, ...]:
        return *super()._key(), asyncio.get_running_loop()

    def _open(self) -> AsyncSubscription:
        breaker: Any = self._breaker
        return AsyncSubscription(breaker._redis.subscriber, breaker._prefix)

    async def close(self) -> None:
        """Leave the subscription; the breaker's own lease holds again."""
        self._leave()

    async def __aenter__(self) -> AsyncWatch:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncCircuitBreaker(BreakerCore):
    """CircuitBreaker for asyncio: the same arguments and methods, awaitable, and the same shared state.

    redis: a redis.asyncio client (Redis, RedisCluster, Sentinel master), a URL, or None for this process alone.
    listeners: callables that take one Event; what they return is awaited where it can be.

    It may be made outside of a running loop and be used in several, one after the other or at once.
    Cancellation of a call is neither success nor failure, and gives a probe's slot back.
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
        self._redis = None if redis is None else AsyncRedisEngine(redis, self.keys, redis_timeout)

    def _start_process(self) -> None:
        super()._start_process()
        self._beside: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[asyncio.Task[Any]]]
        self._beside = weakref.WeakKeyDictionary()
        self._refreshing: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[asyncio.Task[None], asyncio.Event]
        ] = weakref.WeakKeyDictionary()

    def _after_fork(self) -> None:
        leave_to_parent(self._beside)
        super()._after_fork()
        if self._redis is not None:
            self._redis.forget()

    # Calls

    async def call(self, func: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """await func(*args, **kwargs), guarded. Raises CircuitOpenError when rejected, else what func raises.

        TypeError when func gives nothing to await.
        """
        return await self._guard(func)(*args, **kwargs)

    def __call__(self, func: Callable[P, R]) -> AsyncGuarded[P, R]:
        """Decorate a coroutine function, or an async generator function, which is guarded over its whole iteration.

        Raises TypeError for another function.
        """
        guarded: Any
        if inspect.isasyncgenfunction(inspect.unwrap(func)):

            def guarded(*args: P.args, **kwargs: P.kwargs) -> Any:
                return self._iterate(cast("AsyncGenerator[Any, Any]", func(*args, **kwargs)))

        elif inspect.iscoroutinefunction(func):
            guarded = self._guard(func)
        else:
            raise TypeError(f"{func!r} {_USE_SYNC}")
        guarded = functools.wraps(func)(guarded)
        guarded.breaker = self
        return cast("AsyncGuarded[P, R]", guarded)

    def _guard(self, func: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        view, quiet = self._view, self._quiet

        async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            seen, now = view.seen, monotonic()
            if now >= seen.closed_until:
                return await self._slow_call(func, args, kwargs, now)
            try:
                result = await func(*args, **kwargs)
            except BaseException as exception:
                await self._drive(self._report_exception(exception, Flight(seen.generation, None, now)))
                raise
            if quiet:
                seen.counter.tick()
            else:
                await self._drive(self._report_result(result, Flight(seen.generation, None, now)))
            return result

        return guarded

    async def _slow_call(self, func: Callable[..., Awaitable[R]], args: Any, kwargs: Any, now: float) -> R:
        seen = self._view.seen
        if self._silent and now < seen.open_until:
            raise CircuitOpenError(self.name, "open", seen.retry_at - now)
        if now < seen.timed_until:
            flight = self._view.take_off(seen.generation, None, now)
        else:
            flight = await self._drive(self._admit(), self._give_back)
            self._begin(flight)
        try:
            result = await func(*args, **kwargs)
        except BaseException as exception:
            await self._drive(self._report_exception(exception, flight))
            raise
        if not (self._quiet and self._view.lands_well(flight)):
            await self._drive(self._report_result(result, flight))
        return result

    async def _iterate(self, generator: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
        flight = await self._drive(self._admit(), self._give_back)
        try:
            async with contextlib.aclosing(generator):
                item = await anext(generator)
                while True:
                    try:
                        sent = yield item
                    except GeneratorExit:
                        raise
                    except BaseException as exception:
                        item = await generator.athrow(exception)
                    else:
                        item = await generator.asend(sent)
        except StopAsyncIteration:
            await self._drive(self._report(Outcome.SUCCESS, flight))
        except BaseException as exception:
            await self._drive(self._report_exception(exception, flight))
            raise

    async def acquire(self) -> AsyncPermit:
        """A permit for one call, to be settled once. Raises CircuitOpenError when rejected."""
        return AsyncPermit(self, await self._drive(self._admit(), self._give_back))

    def __aenter__(self) -> Coroutine[Any, Any, AsyncPermit]:
        return self._enter(sys._getframe(1))

    async def _enter(self, frame: types.FrameType) -> AsyncPermit:
        permit = await self.acquire()
        self._enter_block(frame, permit)
        return permit

    def __aexit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: types.TracebackType | None
    ) -> Coroutine[Any, Any, None]:
        return self._drive(self._leave_block(sys._getframe(1), exception))

    def _running(self) -> object:
        task = asyncio.current_task()
        return task and weakref.ref(task)  # a task would keep its loop alive

    # The shell

    async def _drive(self, steps: Steps[T], if_lost: Callable[[T], Steps[None]] | None = None) -> T:
        """Carry out what the decision code asks for, and give what it returns.

        What talks to Redis goes on to its end beside a caller that is cancelled meanwhile, then if_lost(result) too.
        """
        try:
            step = next(steps)
            while isinstance(step, Refresh):
                await self._refresh(step.wait)
                step = steps.send(None)
        except StopIteration as end:
            return cast(T, end.value)
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._spawn(self._finish(steps, step, waiter, if_lost))
        try:
            return await waiter
        except asyncio.CancelledError:
            # the cancellation may also come between the result and our waking up
            if if_lost is not None and not waiter.cancelled() and waiter.exception() is None:
                self._spawn(self._carry_out(if_lost(waiter.result())))
            raise

    async def _finish(
        self, steps: Steps[T], step: Step, waiter: asyncio.Future[T], if_lost: Callable[[T], Steps[None]] | None
    ) -> None:
        try:
            result = await self._carry_out(steps, step)
        except BaseException as error:
            if not waiter.done():
                waiter.set_exception(error)
            return
        if not waiter.done():
            waiter.set_result(result)
        elif if_lost is not None:
            await self._carry_out(if_lost(result))

    async def _carry_out(self, steps: Steps[T], step: Step | None = None, tell: _Teller | None = None) -> T:
        tell = tell or self._tell
        try:
            step = step or next(steps)
            while True:
                try:
                    result = await self._perform(step, tell)
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            return cast(T, end.value)

    async def _perform(self, step: Step, tell: _Teller) -> Any:
        if isinstance(step, Ask):
            return await self._redis.run(step.name, step.request)
        if isinstance(step, Refresh):
            return await self._refresh(step.wait)
        if isinstance(step, Tell):
            return await tell(step.event)
        if isinstance(step, ReadHistory):
            return await self._redis.history(step.entries)
        return self._spawn(self._carry_out(step.steps))

    async def _refresh(self, wait: bool) -> None:
        """Single flight: one task asks, beside all calls; the callers wait for it, or go on."""
        loop = asyncio.get_running_loop()
        running = self._refreshing.get(loop)
        if running is None:
            ended, task = asyncio.Event(), self._spawn(self._carry_out(self._renew(), tell=self._tell_beside))
            running = self._refreshing[loop] = task, ended
            task.add_done_callback(functools.partial(self._refreshed, ended, loop))
        task, ended = running
        if wait:
            await ended.wait()
            await task  # raises what went wrong, instead of asking for ever

    def _refreshed(self, ended: asyncio.Event, loop: asyncio.AbstractEventLoop, _: object) -> None:
        ended.set()
        self._refreshing.pop(loop, None)  # it would hold the loop

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        loop = asyncio.get_running_loop()
        beside = self._beside.get(loop)
        if beside is None:
            forget_ended(self._beside)
            forget_ended(self._refreshing)
            beside = self._beside[loop] = set()
        task = loop.create_task(coroutine)
        beside.add(task)  # the loop itself keeps a weak reference only
        task.add_done_callback(beside.discard)
        return task

    def _give_back(self, flight: Flight) -> Steps[None]:
        """The caller was cancelled while it asked: the slot that it may have got is not used."""
        return self._report(Outcome.IGNORED, flight)

    async def _tell_beside(self, event: Event) -> None:
        """Nobody who waits for a refresh waits for a listener, which may call this breaker itself."""
        self._spawn(self._tell(event))

    async def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                told = listener(event)
                if inspect.isawaitable(told):
                    await told
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                self._listener_failed(listener)  # something of its own was cancelled
            except Exception:
                self._listener_failed(listener)

    # Looking and steering

    @property
    def state(self) -> Coroutine[Any, Any, State]:
        """The state: from the view while it is fresh, else from Redis."""
        return self._drive(self._state())

    async def snapshot(self) -> Snapshot:
        """Everything that Redis knows of this breaker now; of the local engine while Redis is down."""
        return await self._drive(self._snapshot())

    async def force_open(self, duration: float | None = None) -> None:
        """Reject every call of the fleet for duration seconds (default and most: 30 days), then probe.

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        await self._drive(self._command("force_open", duration))

    async def force_closed(self, duration: float | None = None) -> None:
        """Admit every call of the fleet and count nothing for duration seconds (default and most: 30 days).

        Raises RedisUnavailableError; PolicyError for a duration out of range.
        """
        await self._drive(self._command("force_closed", duration))

    async def clear_override(self) -> None:
        """End a forced state: forced open goes on with a probe, forced closed as closed.

        Raises RedisUnavailableError.
        """
        await self._drive(self._command("clear_forced"))

    async def reset(self) -> None:
        """Close, with all counts and overrides gone; outcomes of calls that run now will not count.

        Raises RedisUnavailableError.
        """
        await self._drive(self._command("reset"))

    async def watch(self, lease: float = 30.0) -> AsyncWatch:
        """Subscribe to what other instances do, so that the view may be `lease` seconds old and still be right.

        Every breaker of this loop that watches the same server shares one subscription, held by one task. While it
        stands, a trip is in the view as soon as it is published, listeners are told of every transition (source
        "watch"), and commands are sent once per lease (per tenth of the window where a rate can trip). When it is
        lost the breaker's own short lease holds, at once, until it stands again. To be ended by close(), or by an
        async with block. Raises PolicyError for a breaker without Redis, or a lease out of range.
        """
        return self._watch_with(AsyncWatch, lease)

    async def set_policy(self, *, duration: float | None = None, **fields: Any) -> None:
        """Overrule fields of the policy (see Policy) for the whole fleet, on top of those set before.

        Every instance obeys from its next script call on. duration: seconds after which all of them end; None: they
        hold until clear_policy(). Raises PolicyError; RedisUnavailableError.
        """
        await self._drive(self._command("set_policy", duration, fields))

    async def clear_policy(self) -> None:
        """End what set_policy() set: every instance goes by its own policy again. Raises RedisUnavailableError."""
        await self._drive(self._command("clear_policy"))

    async def history(self, count: int = 100) -> list[HistoryEntry]:
        """The last transitions, newest first. Raises RedisUnavailableError; PolicyError for count < 1."""
        return await self._drive(self._history(count))

    async def flush(self) -> None:
        """Report the successes gathered so far now."""
        await self._drive(self._flush())

    async def close(self) -> None:
        """Flush, and close this loop's connections; a later call opens new ones."""
        await self.flush()
        if self._redis is not None:
            await self._redis.close()
