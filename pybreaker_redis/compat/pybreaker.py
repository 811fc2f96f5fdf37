"""pybreaker's interface over this engine: `import pybreaker_redis.compat.pybreaker as pybreaker`.

    storage = pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, redis.Redis(), namespace="discovery")
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=60, state_storage=storage)

The storage says how a breaker runs: CircuitMemoryStorage in this process, CircuitRedisStorage(..., lease=0.1) shared
through Redis. With lease=0, there is one exchange before each call and one after it.

Differences from pybreaker 1.4, on purpose:

Calls:

- No lock is held while your function runs: the threads of one breaker run at the same time. Listeners are called one
  at a time. While half open, one trial call runs at a time in the whole fleet, and other calls are rejected.
- A result of a call that began before the last change of the state does not count. If such a call fails after failures
  have opened the circuit, it raises CircuitBreakerError like the call that opened it.
- Nested guards of one breaker count a failure once, not once for each guard.
- A call that is cancelled or interrupted (CancelledError, KeyboardInterrupt, GeneratorExit) does not count. A group
  of exceptions counts as the worst exception that it holds.
- If a function in `exclude` raises, that is logged, and the call counts as failed. Such a function may run twice for
  one exception. If before_call raises, the call counts as failed.
- A generator asks again when its iteration starts, and is rejected then if the circuit has opened meanwhile. An
  exception that is thrown into it counts by what the generator makes of it.
- Coroutine functions are guarded on asyncio, by call_async, call and the decorator. pybreaker's call_async needs
  Tornado; this one returns a coroutine, which Tornado's coroutines can yield, so HAS_TORNADO_SUPPORT is gone.
- A generator that a coroutine function returns is not guarded. It is a TypeError to decorate an async generator
  function, or to call() an object or a partial that returns a coroutine.
- The function is a positional argument of call() and call_async(). The decorator refuses options that it does not know.

State:

- Redis decides, on its own clock: the end of an open period is fixed when the circuit opens. A later change of
  reset_timeout counts from the next time.
- Limits out of range and unknown states are a PolicyError, which is a ValueError. fail_max and success_threshold are at
  least 1; a reset_timeout of 0 is a millisecond.
- open(), half_open() and close() raise RedisUnavailableError if Redis does not answer.
- While half open, fail_counter keeps the earlier failures, until the circuit closes.
- opened_at has whole seconds and the time zone UTC, in memory, too, and is None once the circuit has closed.
- The methods of state classes are no hooks, nor are open(), half_open() and close(), which a trip does not call. Only
  the two storages of this module can hold a state.

Redis:

- The state of a breaker is one key, `circuit_breaker:NAMESPACE:state`, which expires an hour after its last use, not
  three that stay. Without this key the circuit is closed, whatever fallback_circuit_state says.
- CircuitRedisStorage without a namespace uses the name of the breaker. Without either, pybreaker shares one key among
  all breakers of a Redis, so that one dead service stops the calls to every other; here that is a PolicyError.
- With a lease, a call relies on what this process has read up to two leases before.
- Construction asks Redis nothing, unless adopt=True or another state than "closed" is given. The first look at Redis
  is no change of state for the listeners.
- The breaker has connections of its own to the client's server, with a deadline. It does not call the client's methods,
  such as get, and refuses fakeredis.
- fallback_circuit_state is "closed", which admits calls while Redis is down, or "open".
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import UTC, datetime
from functools import wraps
from inspect import CO_COROUTINE, iscoroutinefunction, isgeneratorfunction
from os import getpid
from types import GeneratorType
from typing import Any, ClassVar, NoReturn, ParamSpec, TypeAlias, TypeVar, overload

from .. import CircuitBreaker as Guard
from .. import CircuitBreakerError as BaseError
from .. import CircuitOpenError, Policy, PolicyError
from .._classify import FAILURE, SUCCESS
from .._clock import NEVER
from .._protocol import State, keys_of
from ..wire.options import BLOCKING, REDIS_ERRORS, client_of
from ._shells import Shells

__all__ = (
    "STATE_CLOSED",
    "STATE_HALF_OPEN",
    "STATE_OPEN",
    "CircuitBreaker",
    "CircuitBreakerError",
    "CircuitBreakerListener",
    "CircuitMemoryStorage",
    "CircuitRedisStorage",
)

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Exclusion: TypeAlias = type[BaseException] | Callable[[Any], bool]

STATE_OPEN = "open"
STATE_CLOSED = "closed"
STATE_HALF_OPEN = "half-open"
_OURS: dict[str, State] = {STATE_CLOSED: "closed", STATE_OPEN: "open", STATE_HALF_OPEN: "half_open"}
_THEIRS: dict[State, str] = {ours: theirs for theirs, ours in _OURS.items()}
_FIELDS = {"fail_max": "failure_threshold", "reset_timeout": "reset_timeout", "success_threshold": "success_threshold"}
_SHORTEST = 0.001  # seconds of an open period
_STILL_OPEN = "Timeout not elapsed yet, circuit breaker still open"
_TRIPPED = "Failures threshold reached, circuit breaker opened"
_TRIAL_FAILED = "Trial call failed, circuit breaker opened"
logger = logging.getLogger("pybreaker_redis")


class CircuitBreakerError(BaseError):
    """The call was rejected, or its failure opened the circuit.

    The cause (`__cause__`) is a CircuitOpenError, which says when to try again, or the exception of the function.
    """

    breaker: CircuitBreaker | None = None


class CircuitBreakerListener:
    """Learns of a breaker's calls and states. Subclass it, and override what you need."""

    def before_call(self, cb: CircuitBreaker, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A call was admitted, and runs next."""

    def failure(self, cb: CircuitBreaker, exc: BaseException) -> None:
        """A call has failed."""

    def success(self, cb: CircuitBreaker) -> None:
        """A call has succeeded."""

    def state_change(
        self, cb: CircuitBreaker, old_state: CircuitBreakerState | None, new_state: CircuitBreakerState
    ) -> None:
        """The state has changed, here or in another process; that is noticed with the next call."""


# States ------------------------------------------------------------------------------------------


class CircuitBreakerState:
    """A state, as listeners see it. cb: the breaker. notify: whether to notify its listeners."""

    _is: ClassVar[str]

    def __init__(self, cb: CircuitBreaker, prev_state: CircuitBreakerState | None = None, notify: bool = False) -> None:
        self._breaker = cb
        if notify:
            for listener in cb.listeners:
                listener.state_change(cb, prev_state, self)

    @property
    def name(self) -> str:
        """One of STATE_CLOSED, STATE_OPEN and STATE_HALF_OPEN."""
        return self._is


class CircuitClosedState(CircuitBreakerState):
    """Calls run."""

    _is = STATE_CLOSED


class CircuitOpenState(CircuitBreakerState):
    """Calls are rejected."""

    _is = STATE_OPEN


class CircuitHalfOpenState(CircuitBreakerState):
    """Trial calls run."""

    _is = STATE_HALF_OPEN


# Storages ----------------------------------------------------------------------------------------


class CircuitBreakerStorage:
    """Where the state of breakers is.

    Its properties are those of pybreaker's storages, for tests and repairs. Setting one is no transition, and may lose
    what is counted at the same time: breakers count by other means.
    """

    _reads_at_start = True  # whether a new breaker looks at the state

    def __init__(self, name: str) -> None:
        self._name = name
        self._opened_at: datetime | None = None  # as it was set: with fractions of a second

    @property
    def name(self) -> str:
        """The kind of storage."""
        return self._name

    @property
    def state(self) -> str:
        """STATE_CLOSED, STATE_OPEN or STATE_HALF_OPEN."""
        return _THEIRS[self._reader().snapshot().state]

    @state.setter
    def state(self, state: str) -> None:
        self._change(state=_ours(state))

    @property
    def counter(self) -> int:
        """Failures in a row."""
        return self._reader().snapshot().failure_count

    def increment_counter(self) -> None:
        """Add a failure."""
        self._change(failure_count=self.counter + 1)

    def reset_counter(self) -> None:
        """Forget the failures."""
        self._change(failure_count=0)

    @property
    def success_counter(self) -> int:
        """Successes in a row while half open."""
        return self._reader().snapshot().success_count

    def increment_success_counter(self) -> None:
        """Add a success."""
        self._change(success_count=self.success_counter + 1)

    def reset_success_counter(self) -> None:
        """Forget the successes."""
        self._change(success_count=0)

    @property
    def opened_at(self) -> datetime | None:
        """When the circuit opened."""
        stored = self._reader().snapshot().opened_at
        if self._opened_at is not None and _seconds(self._opened_at) == stored:
            return self._opened_at
        return datetime.fromtimestamp(stored, UTC) if stored else None

    @opened_at.setter
    def opened_at(self, now: datetime) -> None:
        self._opened_at = now
        self._change(opened_at=_seconds(now))

    def _change(self, **fields: Any) -> None:
        """Store the fields that other programs may write, some of them changed."""
        now = self._reader().snapshot()
        kept = {name: getattr(now, name) for name in ("state", "failure_count", "success_count", "opened_at")}
        self._store({**kept, **fields})

    def _shells(self, name: str | None, policy: Policy, **options: Any) -> Shells:
        """A breaker of ours with the state that is here. name: of the compatible breaker."""
        raise PolicyError(
            f"state_storage must be a CircuitMemoryStorage or a CircuitRedisStorage, not {self!r}: in those, one step"
            " both counts and decides"
        )

    def _reader(self) -> Guard:
        """A breaker that reads what is here."""
        raise NotImplementedError

    def _store(self, fields: dict[str, Any]) -> None:
        """Store the contract fields."""
        raise NotImplementedError


class CircuitMemoryStorage(CircuitBreakerStorage):
    """Keeps the state in this process. state: to begin with; an open circuit then admits a trial call at once."""

    def __init__(self, state: str) -> None:
        super().__init__("memory")
        self._memory = Guard("memory")
        self._reset_timeout: float | None = None  # of the first breaker
        if _ours(state) != "closed":
            self.state = state

    def _shells(self, name: str | None, policy: Policy, **options: Any) -> Shells:
        if self._reset_timeout is None:
            self._reset_timeout = policy.reset_timeout
            self._change()  # what was stored before: only now is it known how long a circuit is open
        return Shells(name or "unnamed", memory=self._memory, policy=policy, **options)

    def _reader(self) -> Guard:
        return self._memory

    def _store(self, fields: dict[str, Any]) -> None:
        open_ms = round((self._reset_timeout or 0.0) * 1000)
        until_ms = (fields["opened_at"] or 0) * 1000 + open_ms
        ends = {"open_ms": open_ms, "open_until_ms": until_ms} if fields["state"] == "open" else {}
        assert self._memory._memory is not None
        self._memory._memory.replace(failure_number=fields["failure_count"], **ends, **fields)
        self._memory._view.drop()


class CircuitRedisStorage(CircuitBreakerStorage):
    """Shares the state through Redis.

    state: the first state, if nothing is stored yet. redis_object: a redis.Redis or redis.RedisCluster; its options
    stay as they are.
    namespace: names the key; None: the name of the breaker does. fallback_circuit_state: while Redis is down,
    STATE_CLOSED admits every call, and STATE_OPEN rejects every call. cluster_mode: has no effect, as clusters need no
    mode of their own.
    lease: seconds for which calls may rely on a reply from Redis. 0: each call asks before and reports after.
    adopt: take over a circuit that pybreaker left open under this namespace within the last hour, unless one of ours is
    stored already. That reads Redis when the breaker is made.

    Raises PolicyError for a value out of range, and for a redis_object that is not a client.
    """

    BASE_NAMESPACE = "pybreaker"

    def __init__(
        self,
        state: str,
        redis_object: Any,
        namespace: str | None = None,
        fallback_circuit_state: str = STATE_CLOSED,
        cluster_mode: bool = False,
        *,
        lease: float = 0.1,
        adopt: bool = False,
    ) -> None:
        super().__init__("redis")
        if fallback_circuit_state not in (STATE_CLOSED, STATE_OPEN):
            raise PolicyError(
                f"fallback_circuit_state must be {STATE_CLOSED!r} or {STATE_OPEN!r}, not {fallback_circuit_state!r}"
            )
        self._redis = client_of(redis_object, BLOCKING)
        self._namespace, self._adopt = namespace, adopt
        self._initial = _ours(state)
        self._reads_at_start = adopt or self._initial != "closed"
        self._options: dict[str, Any] = {"lease": lease, "on_redis_failure": fallback_circuit_state}
        self._key = namespace
        self._begun: set[str] = set()
        self._made: weakref.WeakSet[Shells] = weakref.WeakSet()

    def _shells(self, name: str | None, policy: Policy, **options: Any) -> Shells:
        self._key = self._namespace or name
        shells = Shells(self._checked_key(), self._redis, policy=policy, **self._options, **options)
        self._made.add(shells)
        self._begin(max(policy.ttl, policy.reset_timeout))
        return shells

    def _checked_key(self) -> str:
        if not self._key:
            raise PolicyError(
                "give the CircuitRedisStorage a namespace, or the CircuitBreaker a name. Without both, the breakers of"
                " all services would share one key, and one dead service would stop the calls to every other."
            )
        return self._key

    def _reader(self) -> Guard:
        self._begin(Policy().ttl)
        for shells in list(self._made):
            shells.sync.flush()
        return Guard(self._checked_key(), redis=self._redis, **{**self._options, "lease": 0})

    def _store(self, fields: dict[str, Any], keep: float = Policy().ttl, only_new: bool = False) -> None:
        text = json.dumps({"last_failure_time": None, **fields})
        self._redis.set(keys_of(self._checked_key()).state, text, px=round(keep * 1000), nx=only_new)
        for shells in list(self._made):
            shells.drop()

    def _begin(self, keep: float) -> None:
        """Store the state to begin with, unless one is stored. keep: seconds for which a state is worth keeping."""
        key = self._checked_key()
        if key in self._begun:
            return
        self._begun.add(key)
        try:
            if (fields := self._first_state()) is None:
                return
            age = time.time() - fields["opened_at"] if fields["opened_at"] else 0.0
            if age < keep:
                self._store(fields, keep - max(age, 0.0), only_new=True)
        except (*REDIS_ERRORS, ValueError) as error:
            logger.warning("circuit breaker %r: its first state was not stored: %s", key, error)

    def _first_state(self) -> dict[str, Any] | None:
        """The state to begin with; None for a closed circuit, of which nothing need be stored."""
        fields = self._left_by_pybreaker() if self._adopt else None
        if fields is None and self._initial != "closed":
            fields = {"state": self._initial, "failure_count": 0, "success_count": 0, "opened_at": 0}
        return fields

    def _left_by_pybreaker(self) -> dict[str, Any] | None:
        """The state under pybreaker's own keys; None if it is closed, or not there."""

        def stored(name: str) -> str:
            value = self._redis.get(":".join(filter(None, (self._namespace, self.BASE_NAMESPACE, name)))) or b""
            return value.decode() if isinstance(value, bytes) else value

        state = stored("state")
        if state not in (STATE_OPEN, STATE_HALF_OPEN):
            return None
        return {
            "state": _ours(state),
            "failure_count": int(stored("fail_counter") or 0),
            "success_count": int(stored("success_counter") or 0),
            "opened_at": int(stored("opened_at") or 0),
        }


def _seconds(at: datetime) -> int:
    return int(at.replace(tzinfo=at.tzinfo or UTC).timestamp())


def _ours(state: object) -> State:
    if state not in _OURS:
        raise PolicyError(f"a state must be one of {', '.join(_OURS)}, not {state!r}")
    return _OURS[str(state)]


# The breaker -------------------------------------------------------------------------------------


class CircuitBreaker:
    """Guards the calls to a service.

    fail_max: failures in a row that open the circuit. reset_timeout: seconds until a trial call. success_threshold:
    trial calls that must succeed to close it. exclude: exceptions that are no failures, as types or as functions of the
    exception. listeners: see CircuitBreakerListener. state_storage: where the state is; None: in memory. name: for
    logs; for a CircuitRedisStorage without a namespace also the key. throw_new_error_on_trip: whether the call that
    opens the circuit raises CircuitBreakerError rather than its own exception.

    Raises PolicyError for a value out of range.
    """

    def __init__(
        self,
        fail_max: int = 5,
        reset_timeout: float = 60,
        success_threshold: int = 1,
        exclude: Iterable[Exclusion] | None = None,
        listeners: Iterable[CircuitBreakerListener] | None = None,
        state_storage: CircuitBreakerStorage | None = None,
        name: str | None = None,
        throw_new_error_on_trip: bool = True,
    ) -> None:
        if state_storage is None:
            state_storage = CircuitMemoryStorage(STATE_CLOSED)
        elif not isinstance(state_storage, CircuitBreakerStorage):
            raise PolicyError(f"state_storage must be a storage of this module, not {state_storage!r}")
        self._state_storage = state_storage
        self._excluded_exceptions = tuple(exclude or ())
        self._listeners = tuple(listeners or ())
        self._name = name
        self._throw_new_error_on_trip = throw_new_error_on_trip
        self._locks: dict[int, threading.RLock] = {}  # by process: a thread of the parent may hold the parent's
        self._state: CircuitBreakerState | None = None  # as the listeners know it; None: before the first look
        self._limits = {"fail_max": fail_max, "reset_timeout": reset_timeout, "success_threshold": success_threshold}
        self._shells = state_storage._shells(
            name, _policy(self._limits), failures=self.is_system_error, fallback=self._refuse
        )
        self._guard = self._shells.sync
        if state_storage._reads_at_start:
            self._state = self._create_new_state(self.current_state)

    def _limit(self, **changed: Any) -> None:
        with self._lock():
            limits = {**self._limits, **changed}
            self._shells.follow(_policy(limits))
            self._limits = limits

    # What is set and read

    @property
    def name(self) -> str | None:
        """The name, for logs. A new one moves no key."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @property
    def fail_max(self) -> int:
        """Failures in a row that open the circuit. A new value counts from the next failure, in this process."""
        return int(self._limits["fail_max"])

    @fail_max.setter
    def fail_max(self, number: int) -> None:
        self._limit(fail_max=number)

    @property
    def reset_timeout(self) -> float:
        """Seconds until a trial call. A new value counts from the next time that this process opens the circuit."""
        return self._limits["reset_timeout"]

    @reset_timeout.setter
    def reset_timeout(self, timeout: float) -> None:
        self._limit(reset_timeout=timeout)

    @property
    def success_threshold(self) -> int:
        """Trial calls that must succeed to close the circuit."""
        return int(self._limits["success_threshold"])

    @success_threshold.setter
    def success_threshold(self, threshold: int) -> None:
        self._limit(success_threshold=threshold)

    @property
    def fail_counter(self) -> int:
        """Failures in a row. Asks Redis."""
        return self._guard.snapshot().failure_count

    @property
    def success_counter(self) -> int:
        """Trial calls that have succeeded. Asks Redis."""
        return self._guard.snapshot().success_count

    @property
    def current_state(self) -> str:
        """STATE_CLOSED, STATE_OPEN (until the next call, even if its time is over) or STATE_HALF_OPEN. Asks Redis."""
        return _THEIRS[self._guard.snapshot().state]

    @property
    def state(self) -> CircuitBreakerState:
        """The state as an object. Asks Redis, and notifies the listeners of a change."""
        name = self.current_state  # not with the lock: Redis may hang
        with self._lock():
            return self._notice(name)

    @state.setter
    def state(self, state: str) -> None:
        with self._lock():
            self._state = self._create_new_state(state, self._state, notify=True)

    def _create_new_state(
        self, new_state: str, prev_state: CircuitBreakerState | None = None, notify: bool = False
    ) -> CircuitBreakerState:
        by_name = {"closed": CircuitClosedState, "open": CircuitOpenState, "half_open": CircuitHalfOpenState}
        return by_name[_ours(new_state)](self, prev_state=prev_state, notify=notify)

    def _notice(self, name: str | None = None) -> CircuitBreakerState:
        """Notify the listeners if the state is no longer the one that they know. The caller holds the lock.

        name: of the state, if the caller has just read it; else that of the state that this process read last.
        """
        name = name or _THEIRS[self._shells.seen().state]
        if self._state is None:
            self._state = self._create_new_state(name)
        elif self._state.name != name:
            self.state = name
        return self._state

    def _lock(self) -> threading.RLock:
        return self._locks.get(pid := getpid()) or self._locks.setdefault(pid, threading.RLock())

    # Failures and listeners

    @property
    def excluded_exceptions(self) -> tuple[Exclusion, ...]:
        """The exceptions that are no failures."""
        return self._excluded_exceptions

    def add_excluded_exception(self, exception: Exclusion) -> None:
        """Add an exception that is no failure."""
        self.add_excluded_exceptions(exception)

    def add_excluded_exceptions(self, *exceptions: Exclusion) -> None:
        """Add exceptions that are no failures."""
        with self._lock():
            self._excluded_exceptions += exceptions

    def remove_excluded_exception(self, exception: Exclusion) -> None:
        """Let an exception be a failure again. Raises ValueError if it is not excluded."""
        with self._lock():
            self._excluded_exceptions = _without(exception, self._excluded_exceptions)

    def is_system_error(self, exception: BaseException) -> bool:
        """Whether an exception is a failure."""
        return not any(
            isinstance(exception, one) if isinstance(one, type) else one(exception) for one in self._excluded_exceptions
        )

    @property
    def listeners(self) -> tuple[CircuitBreakerListener, ...]:
        """The listeners."""
        return self._listeners

    def add_listener(self, listener: CircuitBreakerListener) -> None:
        """Add a listener."""
        self.add_listeners(listener)

    def add_listeners(self, *listeners: CircuitBreakerListener) -> None:
        """Add listeners."""
        with self._lock():
            if not self._listeners:  # without listeners, no call has looked at the state
                self._state = None
                if self._shells.seen().began > NEVER:
                    self._notice()
            self._listeners += listeners

    def remove_listener(self, listener: CircuitBreakerListener) -> None:
        """Remove a listener. Raises ValueError if it is none."""
        with self._lock():
            self._listeners = _without(listener, self._listeners)

    # Calls

    def call(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call func(*args, **kwargs), guarded. Returns its result; for a coroutine function, an awaitable.

        Raises CircuitBreakerError if the call is rejected, or opens the circuit; else the exceptions of func.
        """
        if (code := getattr(func, "__code__", None)) is not None and code.co_flags & CO_COROUTINE:
            return self.call_async(func, *args, **kwargs)  # type: ignore[return-value]
        try:
            result = self._guard.call(self._announced(func) if self._listeners else func, *args, **kwargs)
        except BaseException as error:
            self._failed(error)
            raise
        if self._listeners or type(result) is GeneratorType:
            return self._finish(result)
        return result

    async def call_async(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Await func(*args, **kwargs), guarded. Raises what call() raises."""
        try:
            announced = self._announced(func) if self._listeners else func
            result = await self._shells.asyncio.call(announced, *args, **kwargs)
        except BaseException as error:
            self._failed(error)
            raise
        if self._listeners:
            self._succeeded()
        return result

    def _guarded(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """call() bound to one function, which saves most of its time while nobody listens."""
        if isgeneratorfunction(func):  # it asks when it is called, and again when its iteration starts
            return lambda *args, **kwargs: self.call(func, *args, **kwargs)
        bound = self._guard(func)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._listeners:
                return self.call(func, *args, **kwargs)
            try:
                result = bound(*args, **kwargs)
            except BaseException as error:
                self._failed(error)
                raise
            return self._finish(result) if type(result) is GeneratorType else result

        return guarded

    def _finish(self, result: R) -> R:
        """What call() returns for a result that listeners must hear of, or that must still be iterated."""
        if type(result) is GeneratorType:
            return self._iterate(result)  # type: ignore[arg-type, return-value]
        self._succeeded()
        return result

    def _iterate(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """An iteration that the guard counts when it has ended."""
        try:
            result = yield from generator
        except BaseException as error:
            if isinstance(error, CircuitOpenError) and error.name == self._guard.name:
                self._refuse(error)
            self._failed(error)
            raise
        self._succeeded()
        return result

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """A `with` block that is guarded like a call."""
        yield from self.call(_block)

    @overload
    def __call__(self, func: F, /) -> F: ...
    @overload
    def __call__(self, **options: bool) -> Callable[[F], F]: ...

    def __call__(self, *functions: Any, **options: bool) -> Any:
        """Decorate a function or a coroutine function.

        With the option __pybreaker_call_async=True, the result of a plain function is awaited.
        """
        is_async = options.pop("__pybreaker_call_async", False)
        if options:
            raise TypeError(f"the only option is __pybreaker_call_async, not {', '.join(options)}")

        def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
            if is_async or iscoroutinefunction(func):

                async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                    return await self.call_async(func, *args, **kwargs)

                return wraps(func)(guarded_async)

            return wraps(func)(self._guarded(func))

        return decorate(*functions) if functions else decorate

    def _announced(self, func: Callable[P, R]) -> Callable[P, R]:
        """The function, which tells the listeners when the call was admitted."""

        def announced(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._lock():
                self._notice()
                for listener in self._listeners:
                    listener.before_call(self, func, *args, **kwargs)
            return func(*args, **kwargs)

        return announced

    def _succeeded(self) -> None:
        """Tell the listeners that a call has succeeded."""
        with self._lock():
            self._notice()
            for listener in self._listeners:
                listener.success(self)

    def _failed(self, error: BaseException) -> None:
        """Tell the listeners how a call ended. Raises CircuitBreakerError if its failure left the circuit open."""
        if isinstance(error, CircuitBreakerError) and error.breaker is self:
            return
        seen = self._shells.seen()
        tripped = seen.state != "closed" and seen.reason != "forced"
        outcome = self._guard._classifier.of_exception(error) if tripped or self._listeners else None
        if outcome == SUCCESS:
            self._succeeded()
        if outcome != FAILURE:
            return
        with self._lock():
            for listener in self._listeners:
                listener.failure(self, error)
            self._notice()
        if tripped and self._throw_new_error_on_trip:
            raise self._error(_TRIAL_FAILED if seen.reason == "probe_failed" else _TRIPPED) from error

    def _refuse(self, rejected: CircuitOpenError) -> NoReturn:
        """Answer a call that the guard rejects."""
        with self._lock():
            self._notice()
        raise self._error(_STILL_OPEN) from rejected

    def _error(self, text: str) -> CircuitBreakerError:
        error = CircuitBreakerError(text)
        error.breaker = self
        return error

    # Operator actions

    def open(self) -> bool:
        """Open the circuit for the whole fleet, for reset_timeout; then a trial call may run.

        Returns whether a call that opens the circuit raises a new error. Raises RedisUnavailableError.
        """
        with self._changing_to(STATE_OPEN):
            self._guard.force_open(max(self.reset_timeout, _SHORTEST))
        return self._throw_new_error_on_trip

    def half_open(self) -> None:
        """Let the next call be a trial call. Raises RedisUnavailableError."""
        with self._changing_to(STATE_HALF_OPEN):
            self._guard.force_open()
            self._guard.clear_forced()
            with contextlib.suppress(CircuitOpenError):  # another process has begun its trial call
                self._guard.acquire().release()

    def close(self) -> None:
        """Close the circuit for the whole fleet, and forget all counts. Raises RedisUnavailableError."""
        with self._changing_to(STATE_CLOSED):
            self._guard.reset()

    @contextlib.contextmanager
    def _changing_to(self, state: str) -> Iterator[None]:
        """Notify the listeners of the change that the block makes."""
        if self._state is None:
            self._state = self._create_new_state(self.current_state)
        yield
        self._shells.drop()
        self.state = state


def _policy(limits: dict[str, Any]) -> Policy:
    given = {_FIELDS[name]: value for name, value in limits.items()}
    if given["reset_timeout"] == 0:
        given["reset_timeout"] = _SHORTEST
    try:
        return Policy(**given)
    except PolicyError as error:
        raise PolicyError(str(error).replace("failure_threshold", "fail_max")) from None


def _without(one: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    rest = list(given)
    rest.remove(one)
    return tuple(rest)


def _block() -> Generator[None, None, None]:
    yield
