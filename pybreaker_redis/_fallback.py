"""What a dead Redis means, in one layer: a local engine takes over, and Redis is tried again beside the calls."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Literal, TypeAlias

from ._errors import RedisUnavailableError
from ._memory import LocalEngine as LocalEngine
from ._memory import MemoryEngine
from ._memory import document_for as document_for
from ._protocol import Reply, Request, State
from ._scripts import REDIS_ERRORS
from ._steps import Ask, Beside, ReadHistory, Steps

OnRedisFailure: TypeAlias = Literal["local", "open", "closed"]
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0


def patience(redis_timeout: float) -> float:
    """Seconds; longer than any one exchange with Redis, its connecting included."""
    return LONGEST_PAUSE + 10 * redis_timeout


class FixedEngine:
    """Admits every call, or none, and counts nothing."""

    source = "local"

    def __init__(self, state: State, retry_after_ms: int) -> None:
        self._state, self._retry_after_ms = state, retry_after_ms

    def run(self, name: str, request: Request) -> Reply:
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
        """Nothing is kept."""


class AloneEngine:
    """For redis=None: the state machine of this process, and no other."""

    alone = True

    def __init__(self) -> None:
        self._memory = MemoryEngine(alone=True)
        self.after_fork = self._memory.after_fork

    def run(self, name: str, request: Request) -> Steps[Reply]:
        """The reply of the script called name."""
        return self._memory.run(name, request)
        yield

    command = run

    def own(self, name: str, request: Request) -> Reply | None:
        """The reply of the engine in this process, None where Redis decides."""
        return self._memory.run(name, request)

    def history(self, count: int) -> Steps[list[dict[str, Any]]]:
        """The newest transitions, newest first."""
        return self._memory.history(count)
        yield


class FallbackEngine:
    """Redis while it answers, else a local engine that starts from what was last known.

    mode: what to do without Redis. last_known: makes the local engine. on_down, on_up: told once for each outage.
    on_script: told of each script call, with the seconds that it took and the error it ended with.
    """

    def __init__(
        self,
        mode: OnRedisFailure,
        redis_timeout: float,
        last_known: Callable[[], LocalEngine],
        on_down: Callable[[BaseException], Steps[None]],
        on_up: Callable[[], Steps[None]],
        on_script: Callable[[str, float, BaseException | None], None],
    ) -> None:
        self._mode = mode
        self._patience = patience(redis_timeout)
        self._last_known = last_known
        self._on_down, self._on_up, self._on_script = on_down, on_up, on_script
        self._local: LocalEngine | FixedEngine | None = None
        self._retry_at = 0.0
        self._trying = False  # or the last try was given up
        self._pause = FIRST_PAUSE
        self._lock = threading.RLock()

    def after_fork(self) -> None:
        """Locks of the parent may be held by a thread that does not exist here, nor does one that tries again."""
        self._lock = threading.RLock()
        self._retry_at, self._trying = 0.0, False
        if self._local is not None:
            self._local.after_fork()

    @property
    def alone(self) -> bool:
        """Whether Redis is down and this process decides for itself."""
        return self._local is not None

    def run(self, name: str, request: Request) -> Steps[Reply]:
        """The reply of Redis or of the local engine; raises nothing of redis-py."""
        local = self._local
        if local is None:
            try:
                reply = yield from self._ask(name, _reportable(request))
            except REDIS_ERRORS as error:
                local = yield from self._go_down(error)
            else:
                reply["source"] = "redis"
                return reply
        elif self._claim_retry():
            given_up, self._trying = self._trying, True
            if not given_up:
                yield Beside(self._try_again(request))  # no call waits for a server that is known to be down
            else:  # but loops may always end before a try beside their calls does
                yield from self._try_again(request)
                if self._local is None:
                    return (yield from self.run(name, request))
        return local.run(name, request)

    def own(self, name: str, request: Request) -> Reply | None:
        """The reply of the engine in this process, None where Redis decides."""
        local = self._local
        return None if local is None else local.run(name, request)

    def command(self, name: str, request: Request) -> Steps[Reply]:
        """An operator's action: by Redis or not at all. Raises RedisUnavailableError."""
        try:
            reply = yield from self._ask(name, request)
            reply["source"] = "redis"
            return reply
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"{request['action']} was not carried out: {error}") from error

    def history(self, count: int) -> Steps[list[dict[str, Any]]]:
        """The newest transitions from Redis, newest first. Raises RedisUnavailableError."""
        try:
            entries: list[dict[str, Any]] = yield ReadHistory(count)
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"the history could not be read: {error}") from error
        return entries

    def _ask(self, name: str, request: Request) -> Steps[Reply]:
        began = monotonic()
        try:
            reply: Reply = yield Ask(name, request)
        except REDIS_ERRORS as error:
            self._on_script(name, monotonic() - began, error)
            raise
        self._on_script(name, monotonic() - began, None)
        return reply

    def _go_down(self, error: BaseException) -> Steps[LocalEngine | FixedEngine]:
        with self._lock:
            if self._local is not None:  # another caller found out first
                return self._local
            self._local = local = self._make_local()
            self._pause = FIRST_PAUSE
            self._retry_at = monotonic() + self._next_pause()
        yield from self._on_down(error)
        return local

    def _make_local(self) -> LocalEngine | FixedEngine:
        if self._mode == "local":
            return self._last_known()
        return FixedEngine(self._mode, round(LONGEST_PAUSE * 1000))

    def _claim_retry(self) -> bool:
        """Whether this caller is the one to try; if it dies over that, another may after some time."""
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
        """An empty report under no generation needs room: a server that answers but takes no writes is not back yet."""
        common: Request = {key: request[key] for key in ("instance", "policy", "encoding") if key in request}
        try:
            yield from self._ask("record", {**common, "generation": 0})
        except REDIS_ERRORS:
            self._trying, self._retry_at = False, monotonic() + self._next_pause()
        except BaseException:
            self._retry_at = 0.0  # it was cancelled
            raise
        else:
            self._trying, self._local = False, None
            yield from self._on_up()


def _reportable(request: Request) -> Request:
    """The request without what happened under a local generation, which Redis does not know."""
    if request.get("generation", 0) >= 0:
        return request
    kept = {
        k: v for k, v in request.items() if k not in ("successes", "failures", "slow", "pending", "counted", "probe")
    }
    return {**kept, "generation": 0}
