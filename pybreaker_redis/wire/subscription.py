"""One subscription for any number of breakers: a message is a hint to read a breaker's state at once."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

from redis.exceptions import ConnectionError, ResponseError

from .._protocol import state_pattern

PING_EVERY = 1.0  # seconds; a connection that is silent for twice as long is lost
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
logger = logging.getLogger("pybreaker_redis")
_lock = threading.RLock()
_subscriptions: dict[tuple[object, ...], Subscription | AsyncSubscription] = {}
_tasks: set[asyncio.Task[None]] = set()


class Watcher(Protocol):
    """A breaker, as far as a subscription is concerned."""

    keys: Any
    _redis: Any
    _prefix: str
    _rejoin: BaseWatch | None

    def _hinted(self) -> None: ...


class Audience:
    """The breakers of one subscription. A message is only a hint to read a breaker's keys again. No I/O."""

    def __init__(self, prefix: str) -> None:
        self.pattern = state_pattern(prefix)
        self.connected = False
        self._ended = False
        self._members: weakref.WeakKeyDictionary[Watcher, bytes] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def __bool__(self) -> bool:
        return bool(self._members)

    def join(self, breaker: Watcher) -> bool:
        """Add a breaker. Returns False if the subscription has ended."""
        with self._lock:
            if not self._ended:
                self._members[breaker] = breaker.keys.state.encode()
                if self.connected:
                    breaker._hinted()
            return not self._ended

    def leave(self, breaker: Watcher) -> None:
        """Remove a breaker."""
        with self._lock:
            self._members.pop(breaker, None)

    def has_ended(self) -> bool:
        """Whether no breaker is left. From then on none can join."""
        with self._lock:
            self._ended = self._ended or not self._members
            return self._ended

    def end(self) -> None:
        """End the subscription, for all breakers."""
        with self._lock:
            self._ended, self.connected = True, False

    def up(self) -> None:
        """The subscription stands: read every breaker, since messages may have been missed."""
        self.connected = True
        self._hint()

    def down(self, error: BaseException) -> None:
        """The subscription is lost."""
        if self.connected and self._members:
            logger.warning("circuit breakers %r: the subscription is lost: %r", self.pattern, error)
        self.connected = False

    def receive(self, reply: list[Any]) -> None:
        """Hint the breakers that a message concerns. Its content is not read: anyone can publish."""
        if reply[0] in (b"pmessage", "pmessage"):
            self._hint(reply[2].encode() if isinstance(reply[2], str) else reply[2])

    def _hint(self, channel: bytes | None = None) -> None:
        with self._lock:
            concerned = [breaker for breaker, key in list(self._members.items()) if channel in (None, key)]
        for breaker in concerned:
            breaker._hinted()


class Subscription:
    """A thread that holds the subscription of an audience until no breaker is left in it."""

    def __init__(self, connect: Callable[[], Any], prefix: str) -> None:
        self.audience = Audience(prefix)
        self._connect = connect

    def start(self) -> None:
        """Begin, once a breaker has joined."""
        threading.Thread(target=self._run, name="pybreaker_redis-watch", daemon=True).start()

    def _run(self) -> None:
        pauses = _pauses()
        while not self.audience.has_ended():
            try:
                for _ in self._listen():
                    pauses = _pauses()
            except Exception as error:
                self.audience.down(error)
                time.sleep(next(pauses))

    def _listen(self) -> Iterator[None]:
        """Yields when the subscription stands; ends when no breaker is left."""
        connection = self._connect()
        try:
            connection.connect()  # only connect() asks a Sentinel for the master
            connection.send_command("PSUBSCRIBE", self.audience.pattern)
            connection.read_response()
            self.audience.up()
            yield
            pinged = False
            while self.audience:
                if connection.can_read(PING_EVERY):
                    self.audience.receive(_reply(connection.read_response))
                    pinged = False
                elif pinged:
                    raise ConnectionError("no answer to a PING on the subscription")
                else:
                    connection.send_command("PING")
                    pinged = True
        finally:
            connection.disconnect()


class AsyncSubscription:
    """The same as a task of one event loop."""

    def __init__(self, connect: Callable[[], Any], prefix: str) -> None:
        self.audience = Audience(prefix)
        self._connect = connect

    def start(self) -> None:
        """Begin, once a breaker has joined."""
        task = asyncio.get_running_loop().create_task(self._run(), name="pybreaker_redis-watch")
        _tasks.add(task)  # the loop keeps only a weak reference
        task.add_done_callback(_tasks.discard)

    async def _run(self) -> None:
        pauses = _pauses()
        try:
            while not self.audience.has_ended():
                try:
                    async for _ in self._listen():
                        pauses = _pauses()
                except Exception as error:
                    self.audience.down(error)
                    await asyncio.sleep(next(pauses))
        finally:
            self.audience.end()

    async def _listen(self) -> AsyncIterator[None]:
        connection = self._connect()
        reader: asyncio.Future[Any] | None = None
        try:
            async with asyncio.timeout(2 * PING_EVERY):
                await connection.connect()
                await connection.send_command("PSUBSCRIBE", self.audience.pattern)
                await connection.read_response()
            self.audience.up()
            yield
            pinged = False
            while self.audience:
                reader = reader or asyncio.ensure_future(connection.read_response())
                await asyncio.wait({reader}, timeout=PING_EVERY)
                if reader.done():
                    reply, reader, pinged = _reply(reader.result), None, False
                    self.audience.receive(reply)
                elif pinged:
                    raise ConnectionError("no answer to a PING on the subscription")
                else:
                    await connection.send_command("PING")
                    pinged = True
        finally:
            if reader is not None:
                reader.cancel()
                await asyncio.wait({reader})
            await connection.disconnect(nowait=True)


class BaseWatch:
    """A breaker's membership in a subscription."""

    def __init__(self, breaker: Any) -> None:
        self._breaker: Watcher = breaker
        self._audience: Audience | None = None
        self._join()

    @property
    def active(self) -> bool:
        """Whether the subscription stands now."""
        return self._audience is not None and self._audience.connected

    def _key(self) -> tuple[object, ...]:
        return self._breaker._redis.address, self._breaker._prefix

    def _subscription(self) -> tuple[Callable[[], Any], str]:
        return self._breaker._redis.subscriber, self._breaker._prefix

    def _open(self) -> Subscription | AsyncSubscription:
        raise NotImplementedError

    def _join(self) -> None:
        key = self._key()
        with _lock:
            for ended in [key for key, held in _subscriptions.items() if held.audience.has_ended()]:
                del _subscriptions[ended]
            shared = _subscriptions.get(key)
            if shared is None or not shared.audience.join(self._breaker):
                shared = _subscriptions[key] = self._open()
                shared.audience.join(self._breaker)
                shared.start()
        self._audience = shared.audience

    def _leave(self) -> None:
        if self._breaker._rejoin is self:
            self._breaker._rejoin = None
        audience, self._audience = self._audience, None
        if audience is not None:
            audience.leave(self._breaker)

    def after_fork(self) -> None:
        """In a child: the parent's thread holds the subscription; the next script call joins a new one."""
        if self._audience is not None:
            self._audience = None
            self._breaker._rejoin = self


def _reply(read: Callable[[], Any]) -> Any:
    """The reply. An error reply to a PING is a sign of life, too: the disk may be full, or an ACL may forbid PING."""
    try:
        return read()
    except ResponseError as refused:
        return ["refused", refused]


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.75, 1.25)
        pause = min(pause * 2, LONGEST_PAUSE)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    _subscriptions.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
