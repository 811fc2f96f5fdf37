"""Blocking connections: each exchange is one pipeline, with a deadline, and is never repeated. One thread refreshes."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import select
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from time import monotonic
from typing import Any, TypeVar

import redis
from redis.exceptions import NoScriptError

from .._protocol import Keys, Reply, Request, decode, history_fields
from . import commands as build
from .commands import Command, packed
from .link import Link, Member
from .options import (
    BLOCKING,
    NO_REPLY,
    Address,
    address_of,
    connecting,
    connection,
    intact,
    pools_of,
    socket_of,
)
from .route import Leg, Routes, exchange

T = TypeVar("T")
logger = logging.getLogger("pybreaker_redis")
_CHUNK = 65536  # bytes
_PER_COMMAND = 0.001  # seconds that a pipeline may take longer for each of its commands
_shared: weakref.WeakKeyDictionary[Any, dict[float, Server]] = weakref.WeakKeyDictionary()


def server_of(client: Any, timeout: float) -> Server:
    """The Server of a client; all breakers of the process share it.

    timeout: seconds to wait for a connection, and for a reply.
    """
    by_timeout = _shared.setdefault(client, {})
    return by_timeout.get(timeout) or by_timeout.setdefault(timeout, Server(client, timeout))


class Server:
    """This process's access to one Redis: a server, a Sentinel's master, or a cluster.

    Commands go over connections of our own, which leaves the client as it was. They are never repeated, since that
    could count a report twice. A process needs one connection for each thread that talks to Redis at the same time,
    however many breakers it has. No reference to the client is kept: it is the weak key of _shared.
    address: a text that is the same for clients of the same server.
    """

    def __init__(self, client: Any, timeout: float) -> None:
        self.address = address_of(client)
        self._pool_of, clustered = pools_of(client, BLOCKING, timeout)
        self._routes = Routes(client) if clustered else None
        self._timeout = timeout
        self._nodes: dict[Address | None, Connections] = {}
        self.link = Link(timeout, self._routes.home if self._routes else None)
        self._start_process()

    def _start_process(self) -> None:
        self._refreshing = threading.RLock()
        self._refreshes = 0
        self._worker = Worker("pybreaker_redis-link", weakref.WeakMethod(self._refresh), self.link.pause)
        # events have a thread of their own: a slow listener must not delay a refresh
        deliver = functools.partial(_deliver_all, self.link.undelivered)
        self._messenger = Worker("pybreaker_redis-listeners", lambda: deliver, lambda: None)

    def after_fork(self) -> None:
        """In a child: close its copies of the sockets, and start without threads."""
        self.close()
        self.link.after_fork()
        self._start_process()

    def soon(self, member: Member, hinted: bool = False, urgent: bool = False) -> None:
        """Refresh a breaker in the background. hinted: even if its view is fresh. urgent: it has a report to send."""
        link = self.link
        link.use(member, hinted)
        if hinted or urgent or not link.is_busy():
            link.wanted = True
            self._worker.wake()

    def refresh(self) -> None:
        """Wait for an exchange of the link: of this thread, or of another thread that has begun one."""
        self._refresh(wanted=True)

    def wait_for_reports(self, member: Member) -> None:
        """Wait for the reports of a breaker that are under way. Raises the error if the server was lost."""
        lock = self._refreshing
        if lock.acquire(timeout=self.link.timeout):
            lock.release()
        if (error := self.link.error(member)) is not None:
            raise error

    def _refresh(self, wanted: bool = False) -> None:
        lock, before = self._refreshing, self._refreshes
        if not lock.acquire(timeout=self.link.timeout):
            # without an exchange: a signal handler raised in the lock's thread between the lock and `try`
            if not self.link.is_busy() and self._refreshing is lock:
                self._refreshing = threading.RLock()
            return
        try:
            if before == self._refreshes:
                self.link.wanted |= wanted
                carry_out(self.link.exchange(), self.exchange)
                self._refreshes += 1
        finally:
            lock.release()
            if self.link.undelivered:
                self._messenger.wake()

    def run(self, name: str, keys: Keys, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        return decode(self._one(build.run(name, keys, request)))

    def history(self, keys: Keys, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first. Raises redis.RedisError or OSError."""
        return history_fields(self._one(build.history(keys, count)))

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; that of a failed command, or of one whose cluster node is lost, is the error.

        Raises redis.RedisError or OSError when the server is lost.
        """
        return carry_out(exchange(self._routes, commands), self._send)

    def masters(self) -> list[Connections]:
        """The connections to each node that serves keys."""
        if self._routes is None:
            return [self._node(None)]
        carry_out(self._routes.learn_masters(), self._send)
        return [self._node(address) for address in self._routes.masters()]

    def subscriber(self) -> Any:
        """A connection for a subscription, not yet open. Any node of a cluster serves: all get every message."""
        return self._node(None if self._routes is None else self._routes.any_node()).connection(protocol=2)

    def close(self) -> None:
        """Close the connections; the next call opens others."""
        for node in list(self._nodes.values()):
            node.close()

    def _one(self, command: Command) -> Any:
        if self._routes is None:  # the usual case, without the steps that pipelines and clusters need
            (reply,) = self._node(None).send((command,))
        if self._routes is not None or isinstance(reply, NoScriptError):
            (reply,) = self.exchange((command,))
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def _send(self, leg: Leg) -> list[Any]:
        return self._node(leg.address).send(leg.commands, leg.asking)

    def _node(self, address: Address | None) -> Connections:
        found = self._nodes.get(address)
        return found or self._nodes.setdefault(address, Connections(self._pool_of(address), self._timeout))


def carry_out(steps: Generator[Any, Any, T], perform: Callable[[Any], Any]) -> T:
    """Perform each step that the generator yields: send it the result, or throw it the error. Returns its result."""
    try:
        step = next(steps)
        while True:
            try:
                result = perform(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class Worker:
    """A daemon thread that works when it is woken, and at each pause. Starts on demand; ends when there is no pause.

    name: of the thread. work: a reference to what it does, which may be a weak one. pause: returns seconds, or None to
    work only when it is woken.
    """

    def __init__(
        self, name: str, work: Callable[[], Callable[[], None] | None], pause: Callable[[], float | None]
    ) -> None:
        self._name, self._work, self._pause = name, work, pause
        self._awake = threading.Event()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Let the thread work soon. Where no thread can run, the caller works."""
        self._awake.set()
        with self._lock:  # or a thread that is just ending would miss it
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            with contextlib.suppress(RuntimeError):  # the interpreter exits, or a limit is reached
                thread.start()
                self._thread = thread
                return
        self._work_once()

    def _run(self) -> None:
        while True:
            pause = self._pause()
            if pause is None:
                with self._lock:
                    if not self._awake.is_set():
                        self._thread = None
                        return
            self._awake.wait(pause)
            self._awake.clear()
            try:
                self._work_once()
            except Exception:
                logger.exception("refreshing the circuit breakers failed")

    def _work_once(self) -> None:
        if (work := self._work()) is not None:
            work()


def _deliver_all(undelivered: collections.deque[tuple[Any, list[Any]]]) -> None:
    """Deliver the events of exchanges, in order."""
    while True:
        try:
            member, events = undelivered.popleft()
        except IndexError:  # where no thread can run, several callers may deliver
            return
        try:
            member.deliver(events)
        except BaseException:  # such as a listener's SystemExit
            logger.exception("a listener ended its thread")


class Connections:
    """A stack of idle connections to the target of a pool: a server, a socket, a Sentinel's master or a node."""

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self._idle: collections.deque[Pipe] = collections.deque()

    def send(self, commands: Sequence[Command], asking: bool = False) -> list[Any]:
        """The replies, in order; that of a failed command is its error."""
        pipe = self._take()
        try:
            replies = pipe.exchange(packed(commands, asking), len(commands) * (2 if asking else 1), self._timeout)
        except BaseException:
            self._lose(pipe)
            raise
        if asking:
            replies = replies[1::2]
        if intact(replies):
            self._idle.append(pipe)
        else:
            self._lose(pipe)
        return replies

    def connection(self, **options: Any) -> Any:
        return connection(self._pool, BLOCKING, self._timeout, **options)

    def close(self) -> None:
        with contextlib.suppress(IndexError):  # several threads may pop at once
            while True:
                self._idle.pop().close()

    def _lose(self, pipe: Pipe) -> None:
        pipe.close()
        self.close()  # after a failover, idle connections lead to the old master

    def _take(self) -> Pipe:
        with contextlib.suppress(IndexError):  # several threads may pop at once
            while True:
                idle = self._idle.pop()
                if not idle.readable(0):
                    return idle
                idle.close()
        new = self.connection()
        with connecting():
            new.connect()  # only connect() asks a Sentinel for the master
        return Pipe(new)


class Pipe:
    """An open connection. Reads and writes its socket directly: redis-py's layers take a third of a script's time."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.close = connection.disconnect
        self._socket, self._reader = socket_of(connection)
        # before a command, something to read means that the server has closed the connection
        self.readable = connection.can_read
        if hasattr(select, "poll"):  # not on Windows; a fifth of the time
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            self.readable = poll.poll

    def exchange(self, data: bytes, count: int, timeout: float) -> list[Any]:
        """Send commands, and read so many replies."""
        deadline = monotonic() + timeout + _PER_COMMAND * count
        self._socket.sendall(data)
        replies: list[Any] = []
        while len(replies) < count:
            received = self._socket.recv(_CHUNK)
            if not received:
                raise redis.ConnectionError("the server has closed the connection")
            self._reader.feed(received)
            while (reply := self._reader.gets()) is not NO_REPLY:
                replies.append(reply)
            if len(replies) < count and monotonic() > deadline:
                raise redis.TimeoutError(f"{count} replies took longer than {timeout:g} s")
        if len(replies) > count:
            raise redis.ConnectionError(f"{len(replies)} replies to {count} commands")
        return replies


def _after_fork_in_child() -> None:
    for by_timeout in list(_shared.values()):
        for server in by_timeout.values():
            server.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
