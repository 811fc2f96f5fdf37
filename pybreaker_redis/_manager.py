"""One breaker for each service, all from one configuration, with one client and one subscription."""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from time import monotonic
from typing import Any, Generic, ParamSpec, Self, TypeAlias, TypedDict, TypeVar, Unpack

from ._async import AsyncCircuitBreaker, AsyncWatch
from ._classify import Classification, Exceptions, RetryAfter
from ._clock import Clock, age
from ._config import Config, check_clock
from ._core import BreakerCore
from ._errors import ConfigError, PolicyError
from ._events import Listener, Notices
from ._extras import MissingExtraError
from ._policy import Policy
from ._protocol import State, Steps
from ._sync import CircuitBreaker, Watch
from ._view import Verdict
from ._watch import BaseWatch
from .wire.options import ASYNCIO, BLOCKING, Kind, client_of
from .wire.url import client_from_url

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B", bound=BreakerCore)
FORGET_EVERY = 60.0  # seconds
_PASSING = Policy(failure_threshold=10**9, enforce=False)


Source: TypeAlias = Config | Mapping[str, Any] | str | os.PathLike[str]


class ManagerOptions(TypedDict, total=False):
    """The keywords of a manager, except redis; with_redis() takes the same. See CircuitBreakerManager."""

    failures: Exceptions
    ignore: Exceptions
    is_failure: Callable[[Any], object] | None
    retry_after: RetryAfter | None
    classify: Mapping[str, Classification] | None
    listeners: Iterable[Listener]
    on_call: Iterable[Listener]
    clock: Clock | None


def _names_the_manager(construct: Callable[P, None]) -> Callable[P, None]:
    """Name the manager in the error of an unknown keyword, and not the class that defines its constructor."""
    known = list(inspect.signature(construct).parameters)[1:]

    @functools.wraps(construct)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        for name in options:
            if name not in known:
                raise TypeError(f"{type(args[0]).__name__} takes {', '.join(known)}, and no {name!r}")
        construct(*args, **options)

    return checked


class ManagerCore(Generic[B]):
    """The configuration and breakers of a manager; the shells add the I/O."""

    _breaker_type: Callable[..., B]
    _watch_type: type[BaseWatch]
    _kind: Kind

    @_names_the_manager
    def __init__(
        self,
        config: Source | None = None,
        *,
        redis: Any = None,
        failures: Exceptions = Exception,
        ignore: Exceptions = (),
        is_failure: Callable[[Any], object] | None = None,
        retry_after: RetryAfter | None = None,
        classify: Mapping[str, Classification] | None = None,
        listeners: Iterable[Listener] = (),
        on_call: Iterable[Listener] = (),
        clock: Clock | None = None,
    ) -> None:
        check_clock(clock, redis)
        self.config = _config_from(config)
        self._client: Any = None if redis is None else client_of(redis, self._kind)
        notices = Notices("", listeners, on_call)  # checked now, not when the first breaker is made
        self._hooks: dict[str, Any] = {
            "failures": failures,
            "ignore": ignore,
            "is_failure": is_failure,
            "retry_after": retry_after,
            "listeners": notices.listeners,
            "on_call": notices.on_call,
            "clock": clock,
        }
        self._classify = dict(classify or {})
        for service, own in self._classify.items():
            if not isinstance(own, Classification):
                raise PolicyError(f"the classification of {service!r} must be a Classification, not {own!r}")
        self._breakers: dict[str, B] = {}
        self._forgotten: weakref.WeakValueDictionary[str, B] = weakref.WeakValueDictionary()
        self._forgot_at = monotonic()

    @classmethod
    def with_redis(cls, config: Source | None = None, *, redis: Any = None, **options: Unpack[ManagerOptions]) -> Self:
        """Create a manager that shares its breakers through Redis.

        redis: a redis-py client (redis.asyncio for the asyncio manager), or a URL. None: the configuration's redis_url
        with its redis_options. options: as for the constructor. Raises ConfigError; PolicyError.
        """
        given = _config_from(config)
        if redis is None:
            redis = client_from_url(given.redis_url, cls._kind, **given.redis_options)
        return cls(given, redis=redis, **options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {sorted(self._breakers)}>"

    def get_or_create(self, service: str) -> B:
        """The breaker of a service, the same for all callers. The first call creates it, without I/O.

        Raises PolicyError if the name of the service cannot be part of a key.
        """
        breaker = self._breakers.get(service)
        if breaker is None:
            self._forget_idle()
            # no lock, which a forked child could inherit locked: if several threads create a breaker, the first stays
            breaker = self._breakers.setdefault(service, self._forgotten.get(service) or self._make(service))
        breaker._asked_for_at = monotonic()
        if breaker._watch is None and self._client is not None and self.config.enabled and self.config.watch:
            breaker._watch = self._watch_type(breaker)
            breaker._view.drop()  # so that the next call joins the subscription
        return breaker

    def _forget_idle(self) -> None:
        """Drop breakers that nobody asked for lately. A caller that still holds one gets the same one again."""
        idle_after, now = self.config.idle_after, monotonic()
        if idle_after is None or 0 <= now - self._forgot_at < min(idle_after, FORGET_EVERY):
            return
        self._forgot_at = now
        for service, breaker in list(self._breakers.items()):
            # in memory, nobody else knows that it is open
            if now - breaker._asked_for_at >= idle_after and breaker.state == "closed":
                self._breakers.pop(service, None)
                self._forgotten[service] = breaker

    def _make(self, service: str) -> B:
        config = self.config
        shared = self._client if config.enabled else None
        return type(self)._breaker_type(
            service,
            redis=shared,
            policy=config.policy_of(service) if config.enabled else _PASSING,
            lease=config.lease,
            on_redis_failure=config.on_redis_failure,
            redis_timeout=config.redis_timeout,
            prefix=config.prefix,
            host=config.host,
            record_errors=config.record_errors,
            listed=config.listed,
            **{**self._hooks, **self._own_classification(service)},
        )

    def _own_classification(self, service: str) -> dict[str, Any]:
        given = vars(self._classify.get(service, Classification()))
        return {option: value for option, value in given.items() if value is not None}

    def _all(self) -> Iterator[tuple[str, B]]:
        """The breakers of every service that is configured or was used."""
        for service in sorted({*self.config.services, *self._breakers}):
            # to look at all breakers keeps none of them from being forgotten
            yield service, self._breakers.get(service) or self.get_or_create(service)

    def _unsubscribe(self) -> list[B]:
        # a forgotten breaker may be in use by whoever holds it
        forgotten = [breaker for reference in self._forgotten.valuerefs() if (breaker := reference()) is not None]
        breakers = list(dict.fromkeys([*forgotten, *self._breakers.values()]))
        for breaker in breakers:
            breaker._check_process()
            if breaker._watch is not None:
                breaker._watch._leave()
        return breakers


class CircuitBreakerManager(ManagerCore[CircuitBreaker]):
    """The circuit breakers of this process, one for each service that it calls.

    config: a Config, the path of a file, a dict, or None for the defaults. REDIS_URL and CIRCUIT_BREAKER_ENABLED in the
        environment override a file or a dict, but neither a Config nor the defaults.
    redis: a redis-py client or a URL, to share the breakers with every other process, or None to keep them in memory.
        with_redis(config) takes the URL from the configuration.
    failures, ignore, is_failure, retry_after, listeners, on_call: as for CircuitBreaker, for every breaker.
    classify: a Classification by service, for services that need different rules.
    clock: for tests in memory, as for CircuitBreaker.

    Construction needs no server. While Redis is down, one warning is logged, and each breaker applies the same rules in
    this process. Raises ConfigError; PolicyError.
    """

    _breaker_type, _watch_type, _kind = CircuitBreaker, Watch, BLOCKING

    def call(self, service: str, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call func(*args, **kwargs), guarded by the breaker of the service.

        Raises CircuitOpenError if rejected, else the exceptions of func.
        """
        if not self.config.enabled:
            return func(*args, **kwargs)
        return self.get_or_create(service).call(func, *args, **kwargs)

    def get_state(self, service: str) -> State:
        """The state of a service: from its breaker's view while that is fresh, else from Redis."""
        breaker = self.get_or_create(service)
        return breaker._drive(_fresh_state(breaker))

    def get_all_states(self) -> dict[str, State]:
        """The state of every service that is configured or was used. While Redis is down: the last known state."""
        return {service: breaker._drive(_fresh_state(breaker)) for service, breaker in self._all()}

    def close(self) -> None:
        """Report the gathered successes, and close subscription and connections; a later call opens new ones."""
        breakers = self._unsubscribe()
        if breakers and (server := breakers[0]._redis) is not None:
            server.report([breaker._line for breaker in breakers])  # in one exchange
        for breaker in breakers:
            breaker.close()

    def __enter__(self) -> CircuitBreakerManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncCircuitBreakerManager(ManagerCore[AsyncCircuitBreaker]):
    """CircuitBreakerManager for asyncio: takes the same arguments; all methods but get_or_create() are awaited.

    One manager may serve several event loops, and may be created before any of them runs.
    """

    _breaker_type, _watch_type, _kind = AsyncCircuitBreaker, AsyncWatch, ASYNCIO

    async def call(self, service: str, func: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Await func(*args, **kwargs), guarded by the breaker of the service.

        Raises CircuitOpenError if rejected, else the exceptions of func.
        """
        if not self.config.enabled:
            return await func(*args, **kwargs)
        return await self.get_or_create(service).call(func, *args, **kwargs)

    async def get_state(self, service: str) -> State:
        """The state of a service: from its breaker's view while that is fresh, else from Redis."""
        breaker = self.get_or_create(service)
        return await breaker._drive(_fresh_state(breaker))

    async def get_all_states(self) -> dict[str, State]:
        """The state of every service that is configured or was used. While Redis is down: the last known state."""
        return {service: await breaker._drive(_fresh_state(breaker)) for service, breaker in self._all()}

    async def close(self) -> None:
        """Report the gathered successes, and close this loop's subscription and connections."""
        breakers = self._unsubscribe()
        if breakers and (server := breakers[0]._redis) is not None:
            await server.report([breaker._line for breaker in breakers])
        for breaker in breakers:
            await breaker.close()

    async def __aenter__(self) -> AsyncCircuitBreakerManager:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _config_from(source: Source | None) -> Config:
    if source is None:
        return Config()
    if isinstance(source, Config):
        return source
    if not isinstance(source, (Mapping, str, os.PathLike)):
        raise ConfigError(f"the configuration must be a path, a dict or a Config, not {source!r}")
    if isinstance(source, str) and "://" in source:
        raise ConfigError("the configuration is a URL: pass it as redis=")
    try:
        from .config import load
    except MissingExtraError as error:
        raise ConfigError(f"{error}; or pass a pybreaker_redis.Config, which needs nothing else") from error
    return load(source)


def _fresh_state(breaker: BreakerCore) -> Steps[State]:
    """The state: from the view while that is fresh, else from Redis."""
    seen, now = breaker._view.seen, monotonic()
    if age(seen.sent, now) < breaker._view.lease and seen.verdict(now) is not Verdict.ASK:
        return seen.state
    snapshot = yield from breaker._snapshot()
    return breaker._isolation.state if snapshot.isolated else snapshot.state
