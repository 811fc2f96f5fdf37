"""circuitbreaker's interface over this engine: `from pybreaker_redis.compat.circuitbreaker import circuit`.

    configure("redis://localhost:6379")

    @circuit(failure_threshold=10, expected_exception=ConnectionError)
    def search(query): ...

Breakers are in memory, unless configure() has named a Redis before their first call. Then each is shared by every
process that has a breaker of the same name.

Differences from circuitbreaker 2.1, on purpose:

- While half open, one call runs at a time, in the whole fleet. Other calls are rejected, or get the fallback.
- A result of a call that began before the last change of the state does not count. While the circuit is open, call()
  and `with` blocks still run, as in circuitbreaker, but do not count: their success does not close it.
- Nested guards of one breaker count a failure once.
- A value out of range is a PolicyError, which is a ValueError. A decorated function does not go through call(),
  call_async() and the like, so overriding those changes nothing; overriding `opened` does.
- A call that is cancelled or interrupted (CancelledError, KeyboardInterrupt, an iteration that is abandoned) counts as
  nothing; in circuitbreaker it counts as a success. A group of exceptions counts as the worst exception that it holds.
- If a predicate in `expected_exception` raises, that is logged, the call counts as failed, and its own exception is
  raised.
- The wrapper of a generator function passes on the values and exceptions sent into it, and its result.
- open_remaining of a closed circuit counts from when the breaker was made.
- With Redis, a decorated function without a name shares its breaker under its module and qualified name. A breaker that
  is called without a name or a decorator is a PolicyError.
- With Redis, state, failure_count and open_remaining are what this process last read, and last_failure is its own.
  reset() raises RedisUnavailableError if Redis does not answer. While Redis is down, the process goes on by the same
  rules.
- `with breaker:` in a coroutine function may block its event loop for as long as Redis takes to answer. The decorator,
  call_async() and call_async_generator() do not.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from time import monotonic
from types import TracebackType
from typing import Any, ClassVar, TypeVar, overload

from .. import CircuitBreakerError as BaseError
from .. import CircuitOpenError, Policy, PolicyError
from .._config import check_options
from ..wire.options import BLOCKING, client_of
from ._shells import Shells

__all__ = (
    "STATE_CLOSED",
    "STATE_HALF_OPEN",
    "STATE_OPEN",
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitBreakerMonitor",
    "circuit",
    "configure",
)

F = TypeVar("F", bound=Callable[..., Any])
STATE_CLOSED = "closed"
STATE_OPEN = "open"
STATE_HALF_OPEN = "half_open"
_options: dict[str, Any] = {}  # of all breakers that have not been used yet
_blocks: contextvars.ContextVar[tuple[_Call, ...]] = contextvars.ContextVar("pybreaker_redis_blocks", default=())


def configure(redis: Any = None, *, lease: float = 0.1) -> None:
    """Name the Redis through which breakers are shared from now on. Those that have been used stay where they are.

    redis: a redis.Redis, a redis.RedisCluster, or a URL; None: breakers are in memory, as at the start. lease: seconds
    for which calls may rely on a reply; 0: each call asks before and reports after. Raises PolicyError.
    """
    check_options(lease, "local", 1.0)
    if redis is not None:
        client_of(redis, BLOCKING)
    _options.clear()
    _options.update(redis=redis, lease=lease)


class CircuitBreakerError(BaseError):
    """A decorated function was not called, since the circuit is open.

    The cause (`__cause__`) is the CircuitOpenError that says when to try again.
    """

    def __init__(self, circuit_breaker: CircuitBreaker, *args: Any) -> None:
        super().__init__(*args)
        self._circuit_breaker = circuit_breaker

    def __str__(self) -> str:
        breaker = self._circuit_breaker
        return (
            f'Circuit "{breaker.name}" OPEN until {breaker.open_until} ({breaker.failure_count} failures,'
            f" {round(breaker.open_remaining)} sec remaining) (last_failure: {breaker.last_failure!r})"
        )


class CircuitBreaker:
    """Guards the functions that it decorates.

    failure_threshold: failures in a row that open the circuit. recovery_timeout: seconds until a call may try again.
    expected_exception: what counts as a failure: a type, several types, or a function of type and exception. name: for
    the monitor, and in Redis for the key; None: that of the first decorated function. fallback_function: a
    function of the same kind as the decorated one, called with the arguments of a rejected call.

    A subclass may set the defaults. Raises ValueError for an expected_exception that is none of these, and
    PolicyError for a value out of range.
    """

    FAILURE_THRESHOLD: ClassVar[int] = 5
    RECOVERY_TIMEOUT: ClassVar[float] = 30
    EXPECTED_EXCEPTION: ClassVar[Any] = Exception
    FALLBACK_FUNCTION: ClassVar[Callable[..., Any] | None] = None

    def __init__(
        self,
        failure_threshold: int | None = None,
        recovery_timeout: float | None = None,
        expected_exception: Any = None,
        name: str | None = None,
        fallback_function: Callable[..., Any] | None = None,
    ) -> None:
        self._failure_threshold = failure_threshold or self.FAILURE_THRESHOLD
        self._recovery_timeout = recovery_timeout or self.RECOVERY_TIMEOUT
        # read from the class, where a function is not bound as a method
        expected = expected_exception or vars(type(self)).get("EXPECTED_EXCEPTION", CircuitBreaker.EXPECTED_EXCEPTION)
        self.is_failure = _predicate(expected)
        self._fallback_function = fallback_function or self.FALLBACK_FUNCTION
        self._name = name
        self._key = name
        self._last_failure: BaseException | None = None
        self._began = monotonic()
        self._policy = _policy(self._failure_threshold, self._recovery_timeout)

    @property
    def _shells(self) -> Shells:
        """The breakers of ours, made when they are first used: configure() may come after the decorators."""
        # no lock, which a forked child could inherit locked: if several threads make them, the first stay
        made: Shells = self.__dict__.get("_made") or self.__dict__.setdefault("_made", self._make())
        return made

    def _make(self) -> Shells:
        if self._key is None and _options.get("redis") is not None:
            raise PolicyError("a CircuitBreaker that is not used as a decorator needs a name, for its key in Redis")
        return Shells(self._key or str(self), policy=self._policy, failures=self._is_failure, **_options)

    def _is_failure(self, error: BaseException) -> bool:
        found = bool(self.is_failure(type(error), error))
        if found:
            self._last_failure = error
        return found

    # Decorating

    def __call__(self, wrapped: F) -> F:
        """Decorate a function. See decorate()."""
        return self.decorate(wrapped)

    def decorate(self, function: F) -> F:
        """Guard a function, a generator function, a coroutine function, or an async generator function."""
        if self._name is None:
            self._name = getattr(function, "__qualname__", None) or getattr(function, "__name__", repr(function))
            self._key = f"{getattr(function, '__module__', None)}.{self._name}"
        CircuitBreakerMonitor.register(self)
        if isasyncgenfunction(function):
            guarded = self._around_async_generator(function)
        elif iscoroutinefunction(function):
            guarded = self._around_coroutine(function)
        elif isgeneratorfunction(function):
            guarded = self._around_generator(function)
        else:
            guarded = self._around(function)
        return functools.wraps(function)(guarded)  # type: ignore[return-value]

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                with _Call(self, may_reject=True):
                    return function(*args, **kwargs)
            except _Rejected as rejected:
                instead = self._instead(rejected)
            return instead(*args, **kwargs)

        return guarded

    def _around_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                with _Call(self, may_reject=True):
                    return (yield from function(*args, **kwargs))
            except _Rejected as rejected:
                instead = self._instead(rejected)
            return (yield from instead(*args, **kwargs))

        return guarded

    def _around_coroutine(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                async with _Call(self, may_reject=True):
                    return await function(*args, **kwargs)
            except _Rejected as rejected:
                instead = self._instead(rejected)
            return await instead(*args, **kwargs)

        return guarded

    def _around_async_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def guarded(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            try:
                async with _Call(self, may_reject=True), contextlib.aclosing(function(*args, **kwargs)) as items:
                    async for item in items:
                        yield item
                    return
            except _Rejected as rejected:
                instead = self._instead(rejected)
            async for item in instead(*args, **kwargs):
                yield item

        return guarded

    def _instead(self, rejected: _Rejected) -> Callable[..., Any]:
        """The fallback of a rejected call. Raises CircuitBreakerError without one."""
        if self.fallback_function is None:
            raise CircuitBreakerError(self) from rejected.__cause__
        return self.fallback_function

    # Guarding without a decorator: an open circuit rejects nothing

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call func(*args, **kwargs), and count its outcome."""
        with _Call(self):
            return func(*args, **kwargs)

    def call_generator(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Iterate over func(*args, **kwargs), and count its outcome."""
        with _Call(self):
            yield from func(*args, **kwargs)

    async def call_async(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Await func(*args, **kwargs), and count its outcome."""
        async with _Call(self):
            return await func(*args, **kwargs)

    async def call_async_generator(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Iterate over func(*args, **kwargs), and count its outcome."""
        async with _Call(self):
            async for item in func(*args, **kwargs):
                yield item

    def __enter__(self) -> None:
        call = _Call(self)
        call.__enter__()
        _blocks.set((*_blocks.get(), call))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        blocks = _blocks.get()
        call = next((one for one in reversed(blocks) if one.breaker is self), None)
        if call is not None:  # else the block began in another context, as in a generator that is passed around
            _blocks.set(tuple(one for one in blocks if one is not call))
            call.__exit__(kind, error, traceback)

    # State

    def reset(self) -> None:
        """Close the circuit for the whole fleet, and forget all counts. Raises RedisUnavailableError."""
        self._shells.sync.reset()
        self._shells.drop()
        self._last_failure = None

    @property
    def state(self) -> str:
        """STATE_CLOSED, STATE_OPEN, or STATE_HALF_OPEN once its time is over."""
        return self._shells.latest().state

    @property
    def closed(self) -> bool:
        """Whether the circuit is closed."""
        return self.state == STATE_CLOSED

    @property
    def opened(self) -> bool:
        """Whether the circuit is open, and its time is not over."""
        return self.state == STATE_OPEN

    @property
    def open_until(self) -> datetime:
        """About when a call may try again."""
        return datetime.now(UTC) + timedelta(seconds=self.open_remaining)

    @property
    def open_remaining(self) -> int:
        """Seconds until a call may try again; below zero once that time is over."""
        seen = self._shells.seen()
        end = self._began + self._recovery_timeout if seen.state == STATE_CLOSED else seen.retry_at
        left = end - monotonic()
        return math.ceil(left) if left > 0 else math.floor(left)

    @property
    def failure_count(self) -> int:
        """Failures in a row."""
        return self._shells.failure_count()

    @property
    def last_failure(self) -> BaseException | None:
        """The exception of the last call of this process, if it was a failure."""
        return self._last_failure

    @property
    def name(self) -> str | None:
        """The name in the monitor."""
        return self._name

    @property
    def fallback_function(self) -> Callable[..., Any] | None:
        """What is called instead of a rejected call."""
        return self._fallback_function

    def __str__(self) -> str:
        return self.name or "unnamed_CircuitBreaker"


def _policy(failure_threshold: Any, recovery_timeout: Any) -> Policy:
    try:
        return Policy(failure_threshold=failure_threshold, reset_timeout=recovery_timeout)
    except PolicyError as error:
        raise PolicyError(str(error).replace("reset_timeout", "recovery_timeout")) from None


def _predicate(expected: Any) -> Callable[[Any, Any], object]:
    """What counts as a failure, as a function of the type and the exception. Raises ValueError."""
    if isinstance(expected, (str, bytes)):
        raise ValueError(f"expected_exception cannot be a string, as {expected!r} is: is it the name=?")
    if isinstance(expected, type) and issubclass(expected, Exception):
        return _one_of((expected,))
    if isinstance(expected, Iterable) and not isinstance(expected, type):
        return _one_of(tuple(expected))
    if not callable(expected) or isinstance(expected, type):
        raise ValueError(
            f"expected_exception does not look like a predicate, nor like exception types: {expected!r}; pass an"
            " Exception type, several of them, or a function of the type and the exception"
        )
    return expected  # type: ignore[no-any-return]


def _one_of(types: tuple[Any, ...]) -> Callable[[Any, Any], bool]:
    for one in types:
        if not isinstance(one, type):
            raise ValueError(f"expected_exception must have exception types, not {one!r}")
    return lambda kind, _: issubclass(kind, types)


_OPENED = CircuitBreaker.opened


class _Rejected(BaseException):
    """The circuit is open. Never seen by a caller."""


class _Call:
    """The block of one guarded call, blocking and asyncio.

    may_reject: whether an open circuit rejects the call; otherwise the call runs, and does not count.
    """

    __slots__ = ("_may_reject", "_permit", "breaker")

    def __init__(self, breaker: CircuitBreaker, may_reject: bool = False) -> None:
        self.breaker, self._may_reject = breaker, may_reject
        self._permit: Any = None

    def __enter__(self) -> None:
        try:
            permit = self.breaker._shells.sync.acquire()
        except CircuitOpenError as error:
            self._rejected(error)
        else:
            if self._is_refused():
                permit.release()
                raise _Rejected
            self._permit = permit.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._permit is not None:
            self.breaker._last_failure = None  # set if the permit finds that the exception is a failure
            self._permit.__exit__(kind, error, traceback)

    async def __aenter__(self) -> None:
        try:
            permit = await self.breaker._shells.asyncio.acquire()
        except CircuitOpenError as error:
            self._rejected(error)
        else:
            if self._is_refused():
                await permit.release()
                raise _Rejected
            self._permit = await permit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._permit is not None:
            self.breaker._last_failure = None
            await self._permit.__aexit__(kind, error, traceback)

    def _is_refused(self) -> bool:
        """Whether a subclass says that the circuit is open."""
        return self._may_reject and type(self.breaker).opened is not _OPENED and bool(self.breaker.opened)

    def _rejected(self, error: CircuitOpenError) -> None:
        if self._may_reject:
            raise _Rejected from error


class CircuitBreakerMonitor:
    """All breakers that decorate a function, by name."""

    circuit_breakers: ClassVar[dict[str | None, CircuitBreaker]] = {}

    @classmethod
    def register(cls, circuit_breaker: CircuitBreaker) -> None:
        """Add a breaker, in place of another one of its name."""
        cls.circuit_breakers[circuit_breaker.name] = circuit_breaker

    @classmethod
    def all_closed(cls) -> bool:
        """Whether no circuit is open."""
        return not any(True for _ in cls.get_open())

    @classmethod
    def get_circuits(cls) -> Iterable[CircuitBreaker]:
        """All breakers."""
        return cls.circuit_breakers.values()

    @classmethod
    def get(cls, name: str) -> CircuitBreaker | None:
        """The breaker of a name."""
        return cls.circuit_breakers.get(name)

    @classmethod
    def get_open(cls) -> Iterable[CircuitBreaker]:
        """The breakers whose circuit is open."""
        return (breaker for breaker in cls.get_circuits() if breaker.opened)

    @classmethod
    def get_closed(cls) -> Iterable[CircuitBreaker]:
        """The breakers whose circuit is closed."""
        return (breaker for breaker in cls.get_circuits() if breaker.closed)


@overload
def circuit(failure_threshold: F, /) -> F: ...
@overload
def circuit(
    failure_threshold: int | None = None,
    recovery_timeout: float | None = None,
    expected_exception: Any = None,
    name: str | None = None,
    fallback_function: Callable[..., Any] | None = None,
    cls: type[CircuitBreaker] = CircuitBreaker,
) -> CircuitBreaker: ...
def circuit(
    failure_threshold: Any = None,
    recovery_timeout: float | None = None,
    expected_exception: Any = None,
    name: str | None = None,
    fallback_function: Callable[..., Any] | None = None,
    cls: type[CircuitBreaker] = CircuitBreaker,
) -> Any:
    """Decorate a function: `@circuit`, or `@circuit(failure_threshold=...)`, which returns the breaker.

    The arguments of CircuitBreaker. cls: a subclass.
    """
    if callable(failure_threshold):
        return cls().decorate(failure_threshold)
    return cls(
        failure_threshold=failure_threshold,
        recovery_timeout=recovery_timeout,
        expected_exception=expected_exception,
        name=name,
        fallback_function=fallback_function,
    )
