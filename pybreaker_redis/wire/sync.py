"""Blocking connections: each exchange is one pipeline, with a deadline, and is never repeated. One thread refreshes."""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import redis
from redis.exceptions import NoScriptError

from .._line import Line
from .._protocol import Reply, Request, decode, history_fields
from . import commands as build
from .commands import PING, Command, packed
from .connections import BaseConnections, BasePipe, Nodes
from .exits import starts
from .options import (
    BLOCKING,
    CHUNK,
    NO_REPLY,
    PROOF_AFTER,
    REDIS_ERRORS,
    connecting,
    connection,
    error_of_route,
    socket_of,
)
from .route import Leg
from .server import BaseServer, carry_out
from .subscription import Subscription

logger = logging.getLogger("pybreaker_redis")
_PER_COMMAND = 0.001  # seconds by which each command of a pipeline extends the deadline


class Server(BaseServer):
    """Blocking access. It needs one connection for each thread that talks to Redis at the same time."""

    _kind = BLOCKING
    _nodes: Nodes[Connections]

    def _start_process(self) -> None:
        # Threads of a parent hold some of its connections and locks. A child's copies of its idle sockets are closed.
        self._nodes = Nodes(Connections, self._pool_of, self._timeout)
        self._subscription = Subscription()
        self._refreshing = threading.RLock()
        self._refreshes = 0
        self._worker = Worker(
            "pybreaker_redis-link", weakref.WeakMethod(self._refresh), self.link.pause, self.link.rest
        )
        # events have a thread of their own: a slow listener must not delay a refresh
        deliver = self.link.deliver
        self._messenger = Worker("pybreaker_redis-listeners", lambda: deliver, lambda: None)

    def _after_fork(self) -> None:
        for node in list(self._nodes.values()):
            node.after_fork()
        super()._after_fork()

    def _start(self) -> None:
        self._worker.wake()

    def refresh(self) -> None:
        """Wait for an exchange of the link: make one, or wait for the one that another thread is making."""
        self._refresh(wanted=True)

    def wait_for_reports(self) -> None:
        """Wait for the reports that are under way. Raises no error of Redis."""
        lock = self._refreshing
        if lock.acquire(timeout=self.link.timeout):
            lock.release()

    def report(self, lines: list[Line]) -> None:
        """Report all that these breakers have gathered. Raises no error of Redis."""
        carry_out(self.link.report(lines), self.exchange)
        if self.link.undelivered:
            self._messenger.wake()

    def _at_exit(self) -> None:
        """Report what is gathered, once an exchange that is under way has ended. Raises nothing."""
        ends = monotonic() + self._timeout
        lock = self._refreshing
        if lock.acquire(timeout=self._timeout):
            try:
                self._end_over(self._nodes.__getitem__, ends)
            finally:
                lock.release()
        self.close()

    def _refresh(self, wanted: bool = False) -> None:
        lock, before = self._refreshing, self._refreshes
        if not lock.acquire(timeout=self.link.timeout):
            # held, but no exchange: a signal handler raised in that thread between taking the lock and `try`
            if not self.link.is_busy() and self._refreshing is lock:
                self._refreshing = threading.RLock()
            return
        try:
            if before == self._refreshes or self.link.wanted:
                self.link.wanted |= wanted
                carry_out(self.link.exchange(), self.exchange)
                self._refreshes += 1
        finally:
            lock.release()
            if self.link.undelivered:
                self._messenger.wake()

    def run(self, name: str, key: bytes, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        return decode(self._one(build.run(name, key, request)))

    def history(self, key: bytes, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first. Raises redis.RedisError or OSError."""
        return history_fields(self._one(build.history(key, count)))

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; that of a failed command, or of one whose server is lost, is the error."""
        return carry_out(self._exchange(commands), self._send)

    def masters(self) -> list[Connections]:
        """The connections to each node that serves keys."""
        if self._routes is None:
            return [self._nodes[None]]
        carry_out(self._routes.learn_masters(), self._send)
        return [self._nodes[address] for address in self._routes.masters()]

    @property
    def clustered(self) -> bool:
        """Whether the keys are spread over the nodes of a cluster."""
        return self._routes is not None

    def subscription(self) -> Subscription:
        """The subscription that all breakers of the link share."""
        return self._subscription

    def close(self) -> None:
        """Close the connections; the next call opens others."""
        for node in list(self._nodes.values()):
            node.close()

    def _one(self, command: Command) -> Any:
        if self._routes is None:  # the usual case, without the steps that pipelines and clusters need
            (reply,) = self._nodes[None].send((command,))
        if self._routes is not None or isinstance(reply, NoScriptError):
            (reply,) = self.exchange((command,))
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def _send(self, leg: Leg) -> list[Any]:
        return self._nodes[leg.address].send(leg.commands)


class Worker:
    """A daemon thread that works when it is woken, and after each pause. It starts on demand, and ends if pause()
    returns None while it is not woken.

    name: of the thread. work: a reference to the function to run, perhaps a weak one. pause: returns
    the seconds until it works unwoken, or None. rest: returns the seconds that it must wait even if it is woken.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Callable[[], None] | None],
        pause: Callable[[], float | None],
        rest: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._name, self._work, self._pause, self._rest = name, work, pause, rest
        # not a threading.Event: the lock within is plain, so a signal handler amid set() could wait for its own thread
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def is_awake(self) -> bool:
        """Whether work is to be done that has not begun."""
        return not self._wakes.empty()

    def wake(self) -> None:
        """Let the thread work soon. If no thread can start, the caller does the work."""
        if not self.is_awake():
            self._wakes.put(None)
        with self._lock:  # a thread that is just ending would otherwise miss this
            if self._thread is not None or self._start():
                return
        if (work := self._work()) is not None:
            work()

    def _start(self) -> bool:
        """Start the thread. Returns False if none can start."""
        self._thread, started = threading.Thread(target=self._run, name=self._name, daemon=True), False
        try:
            started = starts(self._thread)
        finally:
            if not started:  # or a signal handler has raised after the start: the thread will end
                self._thread = None
        return started

    def _run(self) -> None:
        try:
            self._work_on()
        finally:
            if self._thread is threading.current_thread():
                self._thread = None

    def _work_on(self) -> None:
        work = self._work()  # a strong reference while the thread runs: a freed breaker may leave a report
        while work is not None:
            pause = self._pause()
            with self._lock:
                if self._thread is not threading.current_thread():
                    return
                if pause is None and not self.is_awake():
                    self._thread = None
                    return
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=pause)
            if (rest := self._rest()) > 0:
                time.sleep(rest)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._wakes.get_nowait()
            try:
                work()
            except Exception:
                logger.exception("the work of the thread %s failed", self._name)


class Pipe(BasePipe):
    """Reads and writes its socket directly, since redis-py's layers take a third of the time of a script call."""

    def open(self, connection: Any, timeout: float) -> None:
        """Open it. timeout: seconds for each read."""
        self._connection = connection
        connection.connect()  # only connect() asks a Sentinel for the master
        self._socket, self._reader = socket_of(connection)
        self.settimeout = self._socket.settimeout
        self.settimeout(timeout)
        # before a command, something to read means that the server has closed the connection
        sock = self._socket
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            self.readable: Callable[[float], Any] = poll.poll
        else:  # on Windows; redis-py's own check may read, and raise
            self.readable = lambda seconds: select.select([sock], [], [], seconds)[0]

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.disconnect()

    give_up = close

    def proves(self, seconds: float) -> bool:
        """Whether the server answers on this connection within these seconds. An error is an answer, too."""
        usual = self._socket.gettimeout()
        try:
            self._socket.settimeout(seconds)
            self.exchange((PING,), seconds)
            self._socket.settimeout(usual)
        except REDIS_ERRORS:
            return False
        return True

    def exchange(self, commands: Sequence[Command], timeout: float) -> list[Any]:
        """Send commands, and read their replies."""
        began, count, reader = monotonic(), len(commands), self._reader
        self._socket.sendall(packed(commands))
        replies: list[Any] = []
        while True:
            received = self._socket.recv(CHUNK)
            if not received:
                raise redis.ConnectionError("the server has closed the connection")
            reader.feed(received)
            while (reply := reader.gets()) is not NO_REPLY:
                replies.append(reply)
            self.used_at = monotonic()
            if len(replies) == count:
                return replies
            if len(replies) > count:
                raise redis.ConnectionError(f"{len(replies)} replies to {count} commands")
            if self.used_at - began > timeout + _PER_COMMAND * count:
                raise redis.TimeoutError(f"{count} replies took longer than {timeout:g} s")


class Connections(BaseConnections[Pipe]):
    """Blocking connections. Each one is opened in a thread of its own."""

    _pipe_class = Pipe

    def send(self, commands: Sequence[Command], left: float | None = None) -> list[Any]:
        """The replies, in order; that of a failed command is its error. left: seconds, if fewer than usual."""
        timeout = self._timeout if left is None else left
        pipe, sent = self._take(timeout), False
        try:
            if monotonic() - pipe.used_at > PROOF_AFTER or pipe.readable(0):
                pipe = self._proven(pipe, timeout)
            if left is not None:
                pipe.settimeout(left)
            sent = True
            replies = pipe.exchange(commands, timeout)
        except BaseException as error:
            self._drop(pipe, *(self._lose(error) if sent and isinstance(error, REDIS_ERRORS) else ()))
            raise
        if (astray := error_of_route(replies)) is not None:
            self._drop(*self._lose(astray))  # after a failover, idle connections lead to the old master
        if not self._keep(pipe):
            self._drop(pipe)
        return replies

    def connection(self, **options: Any) -> Any:
        return connection(self._pool, BLOCKING, self._timeout, **options)

    def close(self) -> None:
        """Close the idle connections now, and each of the others after its exchange. Give up those that are opening."""
        for pipe in self._opening():
            self._give_up(pipe)
        self._drop(*self._end_era())

    def after_fork(self) -> None:
        """In a child: close its copies of sockets that are opening. A thread of the parent may hold the locks."""
        for pipe in self._opening():
            pipe.close()

    def _drop(self, *pipes: Pipe) -> None:
        """Close connections; others may take their places."""
        for pipe in pipes:
            pipe.close()
            self._pipes.pop(pipe, None)
        self._serve()

    def _take(self, timeout: float) -> Pipe:
        """A connection for this caller alone. Raises redis.RedisError if it gets none in time."""
        if timeout <= 0:
            raise redis.TimeoutError("no time is left")
        if not self._waiting:
            try:
                return self._idle.pop()
            except IndexError:
                pass
        turn: queue.SimpleQueue[Pipe | BaseException] = queue.SimpleQueue()
        self._waiting.append(turn)
        try:
            self._serve()
            found = turn.get(timeout=timeout)
        except queue.Empty:
            self._leave(turn)
            if turn.empty():
                raise self._gave_up(timeout) from None
            found = turn.get_nowait()  # handed over just then
        except BaseException:  # a signal handler's
            self._leave(turn)
            if not turn.empty() and isinstance(found := turn.get_nowait(), Pipe) and not self._keep(found):
                self._drop(found)
            raise
        if isinstance(found, BaseException):
            raise found
        return found

    def _leave(self, turn: queue.SimpleQueue[Pipe | BaseException]) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(turn)

    def _hand(self, turn: queue.SimpleQueue[Pipe | BaseException], found: Pipe | BaseException) -> bool:
        turn.put(found)
        return True

    def _proven(self, pipe: Pipe, timeout: float) -> Pipe:
        """This connection, if a PING proves that it still leads to the server, or else another one."""
        deadline, works = monotonic() + timeout, False
        try:
            works = not pipe.readable(0) and pipe.proves(min(self._patience, timeout / 2))
        finally:
            if not works:
                self._drop(pipe)
        if works:
            return pipe
        self._drop(*self._take_idle())  # they were idle for longer
        return self._take(deadline - monotonic())

    def _begin(self, pipe: Pipe) -> None:
        if not starts(threading.Thread(target=self._open, args=(pipe,), name="pybreaker_redis-connect", daemon=True)):
            self._open(pipe)

    def _open(self, pipe: Pipe) -> None:
        try:
            with connecting():
                pipe.open(self.connection(), self._timeout)
        except BaseException as error:
            self._drop(pipe, *(self._lose(error) if pipe.opens else ()))
            return
        if not self._opened(pipe):
            self._drop(pipe)
