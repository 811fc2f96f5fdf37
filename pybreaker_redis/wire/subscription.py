"""One subscription for any number of breakers: transitions of other instances reach their views at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
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
TRUSTED_FOR = 3 * PING_EVERY  # seconds after the last sign of life of the server, the thread or the task
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
    _view: Any
    _watch_lease: float | None
    _rejoin: BaseWatch | None

    def _subscribed(self, lease: float | None) -> None: ...
    def _receive(self, message: dict[str, Any]) -> None: ...
    def _deliver(self) -> Any: ...


class Audience:
    """The breakers of one subscription, each with its lease while the subscription stands. No I/O."""

    def __init__(self, prefix: str) -> None:
        self.pattern = state_pattern(prefix)
        self._connected = False
        self._ended = False
        self._leases: weakref.WeakKeyDictionary[Watcher, float] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def __bool__(self) -> bool:
        return bool(self._leases)

    def join(self, breaker: Watcher, lease: float) -> bool:
        """Add a breaker. Returns False if the subscription has ended."""
        with self._lock:
            if not self._ended:
                self._leases[breaker] = lease
                if self._connected:
                    breaker._subscribed(lease)
                    breaker._view.trust(time.monotonic() + TRUSTED_FOR)
            return not self._ended

    def leave(self, breaker: Watcher) -> None:
        """Remove a breaker."""
        with self._lock:
            if self._leases.pop(breaker, None) is not None:
                breaker._subscribed(None)

    def has_ended(self) -> bool:
        """Whether no breaker is left. From then on none can join."""
        with self._lock:
            self._ended = self._ended or not self._leases
            return self._ended

    def end(self) -> None:
        """End the subscription, for all breakers."""
        with self._lock:
            self._ended = True
        self._switch(False)

    def up(self) -> None:
        """The subscription stands: drop every view, since it may have missed messages, and lengthen the leases."""
        self._switch(True)

    def down(self, error: BaseException) -> None:
        """The subscription is lost: shorten the leases at once."""
        if self._connected and self._leases:
            logger.warning(
                "circuit breakers %r: the subscription is lost, so the short leases hold: %r", self.pattern, error
            )
        self._switch(False)

    def stands(self) -> None:
        """Let long leases hold for TRUSTED_FOR: the server gave a sign of life, or is about to be asked for one."""
        until = time.monotonic() + TRUSTED_FOR
        with self._lock:
            for breaker in list(self._leases):
                breaker._view.trust(until)

    def _switch(self, connected: bool) -> None:
        with self._lock:
            self._connected = connected
            for breaker, lease in list(self._leases.items()):
                breaker._subscribed(lease if connected else None)

    def receive(self, reply: list[Any]) -> Iterator[Watcher]:
        """Yield the breakers that a message concerns, after handing it to them. Ignores malformed messages."""
        if reply[0] not in (b"pmessage", "pmessage"):
            return
        channel, data = (part.decode(errors="replace") if isinstance(part, bytes) else part for part in reply[2:])
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(data)
            if isinstance(message, dict):
                with self._lock:
                    concerned = [breaker for breaker in self._leases if breaker.keys.state == channel]
                for breaker in concerned:
                    breaker._receive(message)
                    yield breaker


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
            except BaseException as error:  # even a listener's SystemExit: leases must not stay long
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
                self.audience.stands()
                if connection.can_read(PING_EVERY):
                    for breaker in self.audience.receive(_reply(connection.read_response)):
                        breaker._deliver()
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
                self.audience.stands()
                reader = reader or asyncio.ensure_future(connection.read_response())
                await asyncio.wait({reader}, timeout=PING_EVERY)
                if reader.done():
                    reply, reader, pinged = _reply(reader.result), None, False
                    for breaker in self.audience.receive(reply):
                        await breaker._deliver()
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

    def __init__(self, breaker: Any, lease: float) -> None:
        self._breaker: Watcher = breaker
        self._lease = lease
        self._audience: Audience | None = None
        self._join()

    @property
    def active(self) -> bool:
        """Whether the subscription stands now, so that the long lease holds."""
        breaker = self._breaker
        stands = breaker._watch_lease is not None and time.monotonic() < breaker._view.trusted_until
        return self._audience is not None and stands

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
            if shared is None or not shared.audience.join(self._breaker, self._lease):
                shared = _subscriptions[key] = self._open()
                shared.audience.join(self._breaker, self._lease)
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
