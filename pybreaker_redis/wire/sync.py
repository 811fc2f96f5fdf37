"""Blocking connections: each exchange is one pipeline, with a deadline, and is never repeated. One thread refreshes."""

from __future__ import annotations

import collections
import contextlib
import functools
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

from .._clock import NEVER, age
from .._line import Line
from .._protocol import Reply, Request, decode, history_fields
from . import commands as build
from .commands import PING, Command, packed
from .options import (
    BLOCKING,
    NO_REPLY,
    PROOF_AFTER,
    REDIS_ERRORS,
    Address,
    ConnectsLate,
    connecting,
    connection,
    intact,
    limit_of,
    lost_meanwhile,
    none_free,
    patience_after,
    socket_of,
)
from .outage import longest_exchange
from .route import Leg
from .server import BaseServer, carry_out
from .subscription import Subscription

logger = logging.getLogger("pybreaker_redis")
_CHUNK = 65536  # bytes
_PER_COMMAND = 0.001  # seconds by which each command of a pipeline extends the deadline


class Server(BaseServer):
    """Blocking access. It needs one connection for each thread that talks to Redis at the same time."""

    _kind = BLOCKING

    def _start_process(self) -> None:
        # Threads of a parent hold some of its connections and locks. A child's copies of its idle sockets are closed.
        self._nodes: dict[Address | None, Connections] = {}
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
                self._end_over(self._node, ends)
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
            if before == self._refreshes:
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
        """The replies, in order; that of a failed command, or of one whose cluster node is lost, is the error.

        Raises redis.RedisError or OSError when the server is lost.
        """
        return carry_out(self._exchange(commands), self._send)

    def masters(self) -> list[Connections]:
        """The connections to each node that serves keys."""
        if self._routes is None:
            return [self._node(None)]
        carry_out(self._routes.learn_masters(), self._send)
        return [self._node(address) for address in self._routes.masters()]

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
        """Start the thread. Returns False if none can start: the interpreter exits, or a limit is reached."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            self._thread.start()
        except BaseException as error:  # perhaps a signal handler's, as the thread runs already: it will end
            self._thread = None
            if isinstance(error, RuntimeError):
                return False
            raise
        return True

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


class Connections:
    """The connections to the target of a pool: a server, a socket, a Sentinel's master or a node.

    There are never more than the pool allows. A caller waits for its turn while all of them are in use, or while a late
    attempt to open one goes on.
    """

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._limit = pool, limit_of(pool)
        self._timeout = min(timeout, pool.connection_kwargs.get("socket_timeout") or timeout)
        self._patience = self._timeout / 2  # seconds for the answer to a PING: later, as long as connecting took
        self._longest = longest_exchange(timeout)  # seconds after which a late attempt is given up
        self._idle: collections.deque[Pipe] = collections.deque()
        # in use or idle; weak, since a signal handler's exception may let a thread lose one at any point
        self._pipes: weakref.WeakSet[Pipe] = weakref.WeakSet()
        self._adding = threading.RLock()
        self._waiting: collections.deque[queue.SimpleQueue[Pipe]] = collections.deque()
        self._opening: collections.deque[Attempt] = collections.deque()  # slow: their callers take another, too
        self._late: Attempt | None = None  # the one attempt whose caller has given up waiting
        self._losses = self._closes = 0

    def send(self, commands: Sequence[Command], asking: bool = False, left: float | None = None) -> list[Any]:
        """The replies, in order; that of a failed command is its error. left: seconds, if fewer than usual."""
        losses, closes = self._losses, self._closes
        timeout = self._timeout if left is None else left
        pipe = self._take(timeout)
        if losses != self._losses:
            self._drop(pipe)
            raise lost_meanwhile()
        try:
            if monotonic() - pipe.used_at > PROOF_AFTER or pipe.readable(0):
                pipe = self._prepare(pipe, timeout)
            if left is not None:
                pipe.settimeout(left)
            replies = pipe.exchange(packed(commands, asking), len(commands) * (2 if asking else 1), timeout)
        except BaseException as error:
            if isinstance(error, REDIS_ERRORS) and not isinstance(error, ConnectsLate):
                self._lose()
            self._drop(pipe)
            raise
        if asking:
            replies = replies[1::2]
        if not intact(replies):
            self._lose()  # after a failover, idle connections lead to the old master
        if losses == self._losses and closes == self._closes:
            self._idle.append(pipe)
            if self._waiting or self._opening:
                self._hand_over()
        else:
            self._drop(pipe)
        return replies

    def connection(self, **options: Any) -> Any:
        return connection(self._pool, BLOCKING, self._timeout, **options)

    def close(self) -> None:
        """Close the idle connections now, and each of the others after its exchange. Give up a late attempt."""
        self._closes += 1
        self._close_idle()
        with self._adding:
            self._give_up_late()

    def after_fork(self) -> None:
        """In a child: close its copy of a late attempt's socket. A thread of the parent may hold the locks."""
        if self._late is not None:
            self._late.give_up()

    def _lose(self) -> None:
        """Close the connections, since the server is lost. A late attempt goes on: it may find the server again."""
        self._losses += 1
        self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):  # several threads may pop at once
            while True:
                self._drop(self._idle.pop())

    def _prepare(self, pipe: Pipe, timeout: float) -> Pipe:
        """This connection, if it is open and a PING proves that it still leads to the server, or else another one."""
        if pipe.is_open() and not pipe.readable(0):
            patience = min(self._patience, timeout / 2)
            if pipe.proves(patience):
                return pipe
            self._close_idle()  # the others were idle for longer
            timeout -= patience
        pipe.close()
        return self._open(pipe, timeout)

    def _open(self, pipe: Pipe, timeout: float) -> Pipe:
        """Open a connection. Returns it or, if that takes long, one that becomes free before.

        Raises redis.TimeoutError if both take longer: the attempt goes on in the background.
        """
        attempt, goes_on = Attempt(self.connection(), self._closes), False
        try:
            attempt.begin(self._adding, self._came_late)
            attempt.wait(timeout / 2)
            if not attempt.has_ended:
                self._opening.append(attempt)
                self._hand_over()
                attempt.wait(timeout / 2)
            goes_on = True
        finally:
            with self._adding:
                with contextlib.suppress(ValueError):  # it ended soon, or was offered another one
                    self._opening.remove(attempt)
                if not attempt.has_ended:
                    self._leave(attempt, goes_on)
        if attempt.offered is not None:
            if attempt.has_ended and attempt.place is None:  # both at once
                attempt.give_up()
            self._drop(pipe)
            return attempt.offered
        if attempt.place is not None:
            raise ConnectsLate(timeout)
        if attempt.error is not None:
            raise attempt.error
        self._use(attempt, pipe)
        return pipe

    def _use(self, attempt: Attempt, pipe: Pipe) -> None:
        self._patience = patience_after(attempt.took, self._timeout)
        pipe.open(attempt.connection, self._timeout)

    # Late attempts

    def _leave(self, attempt: Attempt, goes_on: bool) -> None:
        """Let an attempt go on without its caller, unless another one does already. It keeps a place meanwhile.

        goes_on: False if an exception has interrupted the caller: then the attempt may never have begun.
        """
        attempt.place = Pipe()
        self._pipes.add(attempt.place)
        if goes_on and self._late is None and attempt.closes == self._closes:
            self._late = attempt
        else:
            attempt.give_up()

    def _give_up_late(self) -> None:
        if self._late is not None:
            self._late.give_up()
            self._late = None

    def _came_late(self, attempt: Attempt, place: Pipe) -> None:
        """An attempt has ended after its caller had left it. The next caller takes its connection."""
        with self._adding:
            is_wanted = self._late is attempt
            if is_wanted:
                self._late = None
            if is_wanted and attempt.error is None:
                self._use(attempt, place)
                self._idle.append(place)
                self._hand_over()
                return
        if is_wanted:
            self._lose()
        attempt.give_up()
        self._drop(place)

    # Turns

    def _take(self, timeout: float) -> Pipe:
        """A connection for this caller alone; a new one is not open yet. Raises redis.RedisError if all are in use."""
        if timeout <= 0:
            raise redis.TimeoutError("no time is left")
        if not self._waiting and (pipe := self._free()) is not None:
            return pipe
        turn: queue.SimpleQueue[Pipe] = queue.SimpleQueue()
        self._waiting.append(turn)
        try:
            self._hand_over()
            return turn.get(timeout=timeout)
        except queue.Empty:
            try:
                self._waiting.remove(turn)
            except ValueError:  # another thread has taken it from the line, and hands it a connection now
                with contextlib.suppress(queue.Empty):
                    return turn.get(timeout=timeout)
            error = none_free(self._limit, timeout) if self._late is None else ConnectsLate(timeout)
            raise error from None
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)

    def _hand_over(self) -> None:
        """Give free connections to the callers that have waited longest.

        Call this after adding a caller or a connection, so that no caller waits while a connection is free.
        """
        while self._waiting and (pipe := self._free()) is not None:
            try:
                self._waiting.popleft().put(pipe)
            except IndexError:  # the last one has given up
                if pipe.is_open():
                    self._idle.append(pipe)
                else:  # no caller could use it as it is
                    self._pipes.discard(pipe)
        with self._adding, contextlib.suppress(IndexError):  # another thread may take the last one
            while self._opening and self._idle:
                pipe = self._idle.pop()
                self._opening.popleft().offer(pipe)

    def _free(self) -> Pipe | None:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        with self._adding:
            if self._late is not None:
                if age(self._late.began, monotonic()) < self._longest:
                    return None
                self._give_up_late()
            pipe = Pipe()
            self._pipes.add(pipe)
            if len(self._pipes) <= self._limit:
                return pipe
            self._pipes.discard(pipe)
            return None

    def _drop(self, pipe: Pipe) -> None:
        """Close a connection; another one may take its place."""
        pipe.close()
        self._pipes.discard(pipe)
        if self._waiting:
            self._hand_over()


class Attempt:
    """The opening of a connection, in a thread of its own. It has no deadline: it may have to wait for a name server,
    for a credential provider, and for each of several addresses and replies.

    connection: not yet open; only connect() asks a Sentinel for the master. closes: the calls of close() so far.
    place: among the connections, if its caller has left it. offered: another connection that has become free meanwhile.
    Once it has ended: error: why it failed. took: seconds.
    """

    def __init__(self, connection: Any, closes: int) -> None:
        self.connection, self.closes, self.began = connection, closes, monotonic()
        self.place: Pipe | None = None
        self.offered: Pipe | None = None
        self.error: BaseException | None = None
        self.has_ended = False
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()

    def begin(self, lock: threading.RLock, came_late: Callable[[Attempt, Pipe], None]) -> None:
        """Begin it. If no thread can start, the caller waits for the end of it.

        lock: held while it ends. came_late: called in the thread if the caller has left it.
        """
        target = functools.partial(self._run, lock, came_late)
        try:
            threading.Thread(target=target, name="pybreaker_redis-connect", daemon=True).start()
        except RuntimeError:  # the interpreter exits, or a limit is reached
            target()

    def _run(self, lock: threading.RLock, came_late: Callable[[Attempt, Pipe], None]) -> None:
        try:
            with connecting():
                self.connection.connect()
        except BaseException as error:
            self.error = error
        self.took = monotonic() - self.began
        with lock:
            self.has_ended = True
        self._ends.put(None)
        if self.place is not None:
            came_late(self, self.place)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended or is not needed any more, or for so many seconds."""
        with contextlib.suppress(queue.Empty):
            self._ends.get(timeout=seconds)

    def offer(self, pipe: Pipe) -> None:
        """Let its caller take another connection."""
        self.offered = pipe
        self._ends.put(None)

    def give_up(self) -> None:
        """Close its connection. What it waits for may go on for a while: then its thread does so, too."""
        with contextlib.suppress(Exception):
            self.connection.disconnect()


class Pipe:
    """One of the connections, once it is open.

    Reads and writes its socket directly, since redis-py's layers take a third of the time of a script call.
    used_at: when it was last used.
    """

    def __init__(self) -> None:
        self._connection: Any = None
        self.used_at = NEVER

    def open(self, connection: Any, timeout: float) -> None:
        """Take over an open connection. timeout: seconds for each read."""
        self._connection, self.used_at = connection, monotonic()
        self._socket, self._reader = socket_of(connection)
        self.settimeout = self._socket.settimeout
        self.settimeout(timeout)
        # before a command, something to read means that the server has closed the connection
        self.readable = connection.can_read
        if hasattr(select, "poll"):  # not on Windows; a fifth of the time
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            self.readable = poll.poll

    def is_open(self) -> bool:
        return self._connection is not None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()

    def proves(self, seconds: float) -> bool:
        """Whether the server answers on this connection within these seconds. An error is an answer, too."""
        usual = self._socket.gettimeout()
        try:
            self._socket.settimeout(seconds)
            self.exchange(PING, 1, seconds)
            self._socket.settimeout(usual)
        except REDIS_ERRORS:
            return False
        return True

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
        self.used_at = monotonic()
        return replies
