"""What a dead Redis means, in one layer: a local engine takes over, and Redis is tried again beside the calls."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import redis

from ._errors import RedisUnavailableError
from ._memory import Document, MemoryEngine, clock_ms
from ._protocol import Reply, Request, State
from ._scripts import RedisEngine

OnRedisFailure: TypeAlias = Literal["local", "open", "closed"]
REDIS_ERRORS = (redis.RedisError, OSError)
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
_local_generations = itertools.count(1)


class LocalEngine(MemoryEngine):
    """Protects one process while Redis is down; its own generations are below zero, so Redis never takes them."""

    source = "local"

    def next_generation(self, current: int, now: int) -> int:
        return -next(_local_generations)


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


class FallbackEngine:
    """Redis while it answers, else a local engine that starts from what was last known.

    redis_engine: asked first. mode: what to do without it. last_known: the document to start from.
    on_down, on_up: told once for each outage.
    """

    def __init__(
        self,
        redis_engine: RedisEngine,
        mode: OnRedisFailure,
        last_known: Callable[[], Document],
        on_down: Callable[[BaseException], None],
        on_up: Callable[[], None],
    ) -> None:
        self._redis = redis_engine
        self._mode = mode
        self._last_known = last_known
        self._on_down, self._on_up = on_down, on_up
        self._local: LocalEngine | FixedEngine | None = None
        self._retry_at = 0.0
        self._pause = FIRST_PAUSE
        self._lock = threading.Lock()
        self._trying = threading.Lock()

    def after_fork(self) -> None:
        """Locks of the parent may be held by a thread that does not exist here."""
        self._lock, self._trying = threading.Lock(), threading.Lock()
        if isinstance(self._local, LocalEngine):
            self._local.after_fork()

    def run(self, name: str, request: Request) -> Reply:
        """The reply of Redis or of the local engine; raises nothing of redis-py."""
        local = self._local
        if local is None:
            try:
                return self._redis.run(name, self._reportable(request))
            except REDIS_ERRORS as error:
                local = self._go_down(error)
        elif time.monotonic() >= self._retry_at and self._trying.acquire(blocking=False):
            # beside the calls: no call waits for a server that is known to be down
            threading.Thread(target=self._try_again, name="pybreaker_redis-retry", daemon=True).start()
        return local.run(name, request)

    def command(self, name: str, request: Request) -> Reply:
        """An operator's action: by Redis or not at all. Raises RedisUnavailableError."""
        try:
            return self._redis.run(name, request)
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"{request['action']} was not carried out: {error}") from error

    def history(self, count: int) -> list[dict[str, Any]]:
        """The newest transitions from Redis. Raises RedisUnavailableError."""
        try:
            return self._redis.history(count)
        except REDIS_ERRORS as error:
            raise RedisUnavailableError(f"the history could not be read: {error}") from error

    @staticmethod
    def _reportable(request: Request) -> Request:
        """The request without what happened under a local generation, which Redis does not know."""
        if request.get("generation", 0) >= 0:
            return request
        return {k: v for k, v in request.items() if k not in ("generation", "successes", "failures", "probe")} | (
            {"generation": 0} if "generation" in request else {}
        )

    def _go_down(self, error: BaseException) -> LocalEngine | FixedEngine:
        with self._lock:
            if self._local is not None:
                return self._local
            if self._mode == "local":
                self._local = local = LocalEngine(document=self._last_known())
            else:
                self._local = local = FixedEngine(self._mode, round(LONGEST_PAUSE * 1000))  # type: ignore[assignment]
            self._pause = FIRST_PAUSE
            self._retry_at = time.monotonic() + self._next_pause()
        self._on_down(error)
        return local

    def _next_pause(self) -> float:
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
        return pause * random.uniform(0.75, 1.25)

    def _try_again(self) -> None:
        trying = self._trying
        try:
            self._redis.run("snapshot", {})
        except REDIS_ERRORS:
            self._retry_at = time.monotonic() + self._next_pause()
        else:
            self._local = None
            self._on_up()
        finally:
            trying.release()


def document_for(state: State, generation: int, failure_count: int, open_for: float) -> Document:
    """A local engine's start from a view; open_for: seconds that the circuit stays open."""
    now = clock_ms()
    return Document(
        generation=generation,
        state=state,
        failure_count=failure_count,
        opened_at=None if state == "closed" else now // 1000,
        open_until_ms=now + max(round(open_for * 1000), 0),
        fresh=False,
    )
