"""Outages of Redis: a local engine takes over, and Redis is retried in the background."""

from __future__ import annotations

import random
import threading
from time import monotonic
from typing import Literal, Protocol, TypeAlias

from ._errors import RedisUnavailableError
from ._events import Notices
from ._memory import LocalEngine, MemoryEngine
from ._protocol import Ask, Reply, Request, State, Steps
from .wire.options import REDIS_ERRORS

OnRedisFailure: TypeAlias = Literal["local", "open", "closed"]
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
_OUTCOMES = ("successes", "failures", "slow", "pending", "counted", "probe")


def patience(redis_timeout: float) -> float:
    """Seconds after which any exchange with Redis has ended, connecting included."""
    return LONGEST_PAUSE + 10 * redis_timeout


class FixedEngine:
    """Admits every call, or none, and counts nothing."""

    source = "local"

    def __init__(self, state: State, retry_after_ms: int) -> None:
        self._state, self._retry_after_ms = state, retry_after_ms

    def run(self, name: str, request: Request) -> Reply:
        """The same reply to every script call."""
        return {
            "admitted": self._state == "closed",
            "applied": False,
            "state": self._state,
            "generation": -1,
            "failure_count": 0,
            "success_count": 0,
            "retry_after_ms": self._retry_after_ms if self._state == "open" else None,
            "source": self.source,
        }

    def after_fork(self) -> None:
        """Nothing to do: it keeps no state."""


class InMemory:
    """The engine for redis=None: the state machine runs in this process."""

    is_down = False

    def __init__(self) -> None:
        self._memory = MemoryEngine(quorum_of_one=True)
        self.after_fork = self._memory.after_fork
        self.history = self._memory.history
        self.local = self._memory.run

    def run(self, name: str, request: Request) -> Steps[Reply]:
        """The reply of the script called name."""
        return self._memory.run(name, request)
        yield

    command = run


class Owner(Protocol):
    """A breaker, as far as its Fallback uses it."""

    _notices: Notices

    def _last_known(self) -> LocalEngine: ...
    def _redis_down(self, error: BaseException) -> None: ...
    def _redis_up(self) -> None: ...
    def _in_background(self, steps: Steps[None]) -> None: ...


class Fallback:
    """Asks Redis while it answers, else a local engine, which starts from the last known state.

    mode: the breaker's on_redis_failure. The owner is notified once of each outage.
    """

    def __init__(self, owner: Owner, mode: OnRedisFailure, redis_timeout: float) -> None:
        self._owner = owner
        self._mode = mode
        self._patience = patience(redis_timeout)
        self._local: LocalEngine | FixedEngine | None = None
        self._retry_at = 0.0
        self._trying = False  # stays true when a retry was abandoned
        self._pause = FIRST_PAUSE
        self._lock = threading.RLock()

    def after_fork(self) -> None:
        """In a child: replace the lock, which a thread of the parent may hold. The next call retries Redis."""
        self._lock = threading.RLock()
        self._retry_at, self._trying = 0.0, False
        if self._local is not None:
            self._local.after_fork()

    @property
    def is_down(self) -> bool:
        """Whether Redis is down and this process decides for itself."""
        return self._local is not None

    def run(self, name: str, request: Request) -> Steps[Reply]:
        """The reply of Redis or of the local engine. Raises no error of redis-py."""
        local = self._local
        if local is None:
            try:
                reply = yield from self._ask(name, _without_local_outcomes(request))
            except REDIS_ERRORS as error:
                local = self._go_down(error)
            else:
                reply["source"] = "redis"
                return reply
        elif self._claim_retry():
            abandoned, self._trying = self._trying, True
            if not abandoned:
                self._owner._in_background(self._try_again(request))  # no call waits for a server known to be down
            else:  # short event loops may always end before a retry in the background does
                yield from self._try_again(request)
                if self._local is None:
                    return (yield from self.run(name, request))
        return local.run(name, request)

    def local(self, name: str, request: Request) -> Reply | None:
        """The reply of the local engine, as a plain call; None while Redis decides."""
        local = self._local
        return None if local is None else local.run(name, request)

    def command(self, name: str, request: Request) -> Steps[Reply]:
        """Carry out an operator's action in Redis, or not at all. Raises RedisUnavailableError."""
        try:
            reply = yield from self._ask(name, request)
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"{request['action']} was not carried out: {error}") from error
        reply["source"] = "redis"
        return reply

    def _ask(self, name: str, request: Request) -> Steps[Reply]:
        began = monotonic()
        try:
            reply: Reply = yield Ask(name, request)
        except REDIS_ERRORS as error:
            self._owner._notices.script_ran(name, monotonic() - began, error)
            raise
        self._owner._notices.script_ran(name, monotonic() - began, None)
        return reply

    def _go_down(self, error: BaseException) -> LocalEngine | FixedEngine:
        with self._lock:
            if self._local is not None:  # another caller noticed first
                return self._local
            self._local = local = self._make_local()
            self._pause = FIRST_PAUSE
            self._retry_at = monotonic() + self._next_pause()
        self._owner._redis_down(error)
        return local

    def _make_local(self) -> LocalEngine | FixedEngine:
        if self._mode == "local":
            return self._owner._last_known()
        return FixedEngine(self._mode, round(LONGEST_PAUSE * 1000))

    def _claim_retry(self) -> bool:
        """Whether this caller is to retry Redis. If it never finishes, another caller may claim the retry later."""
        now = monotonic()
        if now < self._retry_at:
            return False
        with self._lock:
            due = now >= self._retry_at
            if due:
                self._retry_at = now + self._patience
            return due

    def _next_pause(self) -> float:
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
        return pause * random.uniform(0.75, 1.25)

    def _try_again(self, request: Request) -> Steps[None]:
        """Retry Redis: it must accept a write, not merely answer."""
        common: Request = {key: request[key] for key in ("instance", "policy") if key in request}
        try:
            yield from self._ask("record", {**common, "generation": 0})
        except REDIS_ERRORS:
            self._trying, self._retry_at = False, monotonic() + self._next_pause()
        except BaseException:
            self._retry_at = 0.0  # cancelled: leave the retry to the next caller
            raise
        else:
            self._trying, self._local = False, None
            self._owner._redis_up()


def _without_local_outcomes(request: Request) -> Request:
    """Drop the outcomes of a local generation, which Redis does not know."""
    if request.get("generation", 0) >= 0:
        return request
    return {**{key: value for key, value in request.items() if key not in _OUTCOMES}, "generation": 0}
