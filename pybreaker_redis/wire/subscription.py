"""One subscription for all breakers of a link: a message is a hint to read a breaker's state at once."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from redis.exceptions import ConnectionError, ResponseError

from .._core import BreakerCore
from .._protocol import state_pattern
from .exits import starts
from .options import CHUNK, NO_REPLY, socket_of

PING_EVERY = 1.0  # seconds of silence before a PING; after as many without an answer the connection is lost
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
T = TypeVar("T")
logger = logging.getLogger("pybreaker_redis")


class BaseSubscription:
    """One subscription and its breakers; decides what to send and takes what was received. The subclasses add the I/O.

    connected: whether the server has confirmed it. A message is only a hint to read a breaker's keys again.
    """

    def __init__(self) -> None:
        self.connected = False
        self._running = False  # a thread or task holds the subscription, or tries to
        self._warned = True  # of its loss; a subscription that never was connected cannot be lost
        self._members: weakref.WeakValueDictionary[bytes, BreakerCore] = weakref.WeakValueDictionary()  # by state key
        self._namesakes: weakref.WeakSet[BreakerCore] = weakref.WeakSet()  # breakers whose key another member has, too
        self._patterns: set[str] = set()  # of their channels
        self._lock = threading.RLock()
        self.opened()

    def _start(self, connect: Callable[[], Any]) -> None:
        """Listen in the background. connect: returns a connection, not yet open."""
        raise NotImplementedError

    def is_needed(self) -> bool:
        """Whether it has a breaker."""
        return bool(self._members or self._namesakes)

    def __contains__(self, breaker: BreakerCore) -> bool:
        return self._members.get(breaker._key) is breaker or breaker in self._namesakes

    def join(self, breaker: BreakerCore) -> None:
        """Add a breaker, and start the subscription if it does not run."""
        if breaker in self and self._running:  # the usual case, without the lock
            return
        with self._lock:
            is_new = breaker not in self
            if is_new:
                if self._members.setdefault(breaker._key, breaker) is not breaker:
                    self._namesakes.add(breaker)
                self._patterns.add(state_pattern(breaker._prefix))
            starts, self._running = not self._running, True
        if is_new and self.connected:
            breaker._hinted()
        if starts:
            self._start(breaker._redis.subscriber)

    def leave(self, breaker: BreakerCore) -> None:
        """Remove a breaker."""
        with self._lock:
            self._namesakes.discard(breaker)
            if self._members.get(breaker._key) is breaker:
                del self._members[breaker._key]

    def stop(self, only_if_empty: bool = False) -> bool:
        """End the subscription; the next join() starts another. Returns False if it is still needed, and goes on."""
        with self._lock:
            if only_if_empty and self.is_needed():
                return False
            self._running = self.connected = False
            return True

    def opened(self) -> None:
        """A new connection is open."""
        self._subscribed: set[str] = set()
        self._unconfirmed = 0
        self._pinged = False

    def lost(self, error: BaseException) -> bool:
        """Note that the connection is lost, or could not be opened. Returns whether the subscription was connected."""
        stood, self.connected = self.connected, False
        if stood:
            self._warned = False
        elif not self._warned and self.is_needed():  # the first attempt to open it again has failed
            self._warned = True
            logger.warning("circuit breakers: the subscription is lost: %s", str(error) or repr(error))
        return stood

    def to_send(self, silent: bool) -> tuple[str, ...]:
        """The command to send now, or (). silent: whether nothing came for PING_EVERY. Raises ConnectionError if the
        last PING was not answered."""
        if missing := self._patterns - self._subscribed:
            self._subscribed |= missing
            self._unconfirmed += len(missing)
            return ("PSUBSCRIBE", *missing)
        if silent and self._pinged:
            raise ConnectionError("no answer to a PING on the subscription")
        self._pinged = silent
        return ("PING",) if silent else ()

    def receive(self, reply: Any) -> None:
        """Take a reply or a message. The content of a message is not read: anyone can publish."""
        self._pinged = False
        if isinstance(reply, Exception):
            if self._unconfirmed:
                raise reply
            return  # a refused PING shows that the server is alive: its disk may be full, or an ACL may forbid PING
        kind, *rest = reply
        if kind == b"pmessage":
            channel = rest[1]
            first = self._members.get(channel)
            self._hint([one for one in self._others() if one._key == channel] + ([first] if first else []))
        elif kind == b"psubscribe":
            self._unconfirmed -= 1
            self.connected = True
            references = self._members.valuerefs()
            self._hint([one for reference in references if (one := reference()) is not None] + self._others())

    def _others(self) -> list[BreakerCore]:
        with self._lock:
            return list(self._namesakes)

    def _hint(self, concerned: list[BreakerCore]) -> None:
        for breaker in concerned:  # messages concern them, or may have been missed
            breaker._hinted()


class Subscription(BaseSubscription):
    """The subscription of a link, kept by a thread until it has no breaker any more."""

    def _start(self, connect: Callable[[], Any]) -> None:
        thread = threading.Thread(target=self._run, args=(connect,), name="pybreaker_redis-watch", daemon=True)
        if not starts(thread):  # the next call tries again
            self.stop()

    def _run(self, connect: Callable[[], Any]) -> None:
        pauses = _pauses()
        while not self.stop(only_if_empty=True):
            try:
                self._listen(connect())
            except Exception as error:
                pauses = _pauses() if self.lost(error) else pauses
                time.sleep(next(pauses))

    def _listen(self, connection: Any) -> None:
        # closes it in the middle of a handshake that does not end
        giving_up = threading.Timer(2 * PING_EVERY, connection.disconnect)
        try:
            giving_up.start()
            connection.connect()  # only connect() asks a Sentinel for the master
            giving_up.cancel()
            sock, reader = socket_of(connection)
            sock.settimeout(PING_EVERY)
            self.opened()
            silent = False
            while self.is_needed():
                if command := self.to_send(silent):
                    connection.send_command(*command)
                try:
                    received = sock.recv(CHUNK)
                except TimeoutError:
                    silent = True
                    continue
                if not received:
                    raise ConnectionError("the server has closed the subscription")
                silent = False
                reader.feed(received)
                while (reply := reader.gets()) is not NO_REPLY:
                    self.receive(reply)
        finally:
            giving_up.cancel()
            connection.disconnect()


class AsyncSubscription(BaseSubscription):
    """The subscription of one event loop, kept by a task."""

    def _start(self, connect: Callable[[], Any]) -> None:
        # keep a reference: the loop has only a weak one
        self._task = in_background(self._run(connect), "pybreaker_redis-watch")

    async def _run(self, connect: Callable[[], Any]) -> None:
        pauses = _pauses()
        try:
            while not self.stop(only_if_empty=True):
                try:
                    await self._listen(connect())
                except Exception as error:
                    pauses = _pauses() if self.lost(error) else pauses
                    await asyncio.sleep(next(pauses))
        except BaseException:  # cancelled
            self.stop()
            raise

    async def _listen(self, connection: Any) -> None:
        reader: asyncio.Future[Any] | None = None
        try:
            async with asyncio.timeout(2 * PING_EVERY):
                await connection.connect()
            self.opened()
            silent = False
            while self.is_needed():
                if command := self.to_send(silent):
                    await connection.send_command(*command)
                reader = reader or asyncio.ensure_future(connection.read_response())
                await asyncio.wait({reader}, timeout=PING_EVERY)
                silent = not reader.done()
                if not silent:
                    error = reader.exception()
                    self.receive(error if isinstance(error, ResponseError) else reader.result())
                    reader = None
        except GeneratorExit:  # collected while it ran: its loop is gone, and so are the sockets
            raise
        except BaseException:
            await self._close(connection, reader)
            raise
        await self._close(connection, reader)

    async def _close(self, connection: Any, reader: asyncio.Future[Any] | None) -> None:
        if reader is not None:
            reader.cancel()
            await asyncio.wait({reader})
        await connection.disconnect(nowait=True)


def in_background(work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
    """A task that outlives the call that begins it. Its context is empty, so that it keeps nothing of that call."""
    return asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.75, 1.25)
        pause = min(pause * 2, LONGEST_PAUSE)
