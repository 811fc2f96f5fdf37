"""wire.sync for asyncio, with separate connections for each event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from time import monotonic, thread_time
from typing import Any, TypeVar

import redis

from .._clock import NEVER
from .._line import Line
from .._protocol import NotSent, Reply, Request, decode, history_fields
from . import commands as build
from . import sync
from .commands import PING, Command, packed
from .options import (
    ASYNCIO,
    BLOCKING,
    PROOF_AFTER,
    REDIS_ERRORS,
    Address,
    ConnectsLate,
    can_read,
    connecting,
    connection,
    counterpart,
    intact,
    limit_of,
    lost_meanwhile,
    none_free,
    patience_after,
)
from .outage import longest_exchange
from .route import Leg
from .server import BaseServer
from .subscription import AsyncSubscription, in_background

T = TypeVar("T")

_TURNS = 32
# In a child: the parent's connections. Collecting them would unregister them from the epoll set that both share.
_parents: list[Any] = []


class AsyncServer(BaseServer):
    """Access from asyncio, with separate connections for each event loop."""

    _kind = ASYNCIO

    def _start_process(self) -> None:
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, OnLoop] = weakref.WeakKeyDictionary()

    def _after_fork(self) -> None:
        _parents.append(list(self._by_loop.items()))
        super()._after_fork()

    async def refresh(self) -> None:
        """Wait for an exchange of the link: the one that is under way, or else a new one."""
        here = self._here()
        task = here.task
        if task is None or task.done():
            self.link.wanted = True
            task = self._start_at_once(here)
        done, _ = await asyncio.wait({task}, timeout=self.link.timeout)
        if done and not task.cancelled():
            task.result()

    async def wait_for_reports(self) -> None:
        """Wait for the reports that are under way. Raises no error of Redis."""
        if (task := self._here().task) is not None:
            await asyncio.wait({task}, timeout=self.link.timeout)

    async def report(self, lines: list[Line]) -> None:
        """Report all that these breakers have gathered. Raises no error of Redis."""
        await carry_out(self.link.report(lines), self.exchange)
        self.link.deliver()

    def _at_exit(self) -> None:
        """Report what is gathered over blocking connections: no event loop runs any more. Raises nothing."""
        ends = monotonic() + self._timeout

        def node(address: Address | None) -> sync.Connections:
            return sync.Connections(counterpart(self._pool_of(address), BLOCKING), self._timeout)

        self._end_over(node, ends)

    def _start(self) -> None:
        """Begin an exchange in the background, now or soon."""
        here = self._here()
        if not here.ends and (here.task is None or here.task.done()):
            rest = self.link.rest()
            if rest > 0:
                here.wake_after(rest, self._start)
            else:
                self._start_at_once(here)

    def _start_at_once(self, here: OnLoop) -> asyncio.Task[None]:
        here.wake_after(None, self._start)
        here.task = in_background(self._refresh(here))
        return here.task

    async def _refresh(self, here: OnLoop) -> None:
        await carry_out(self.link.exchange(), self.exchange)
        self.link.deliver()
        # from a timer: then this task has ended
        here.wake_after(0.0 if self.link.wanted else self.link.pause(), self._start)

    async def run(self, name: str, key: bytes, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        return decode(await self._one(build.run(name, key, request)))

    async def history(self, key: bytes, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first. Raises redis.RedisError or OSError."""
        return history_fields(await self._one(build.history(key, count)))

    def subscription(self) -> AsyncSubscription:
        """The subscription that all breakers of the running loop share."""
        return self._here().subscription

    async def close(self) -> None:
        """Close this loop's connections; the next call opens others."""
        for node in list(self._here().nodes.values()):
            await node.close()

    async def _one(self, command: Command) -> Any:
        (reply,) = await self.exchange((command,))
        if isinstance(reply, BaseException):
            raise reply
        return reply

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; that of a failed command, or of one whose cluster node is lost, is the error.

        Raises redis.RedisError or OSError when the server is lost.
        """
        return await carry_out(self._exchange(commands), self._send)

    async def _send(self, leg: Leg) -> list[Any]:
        return await self._node(leg.address).send(leg.commands, leg.asking)

    def _node(self, address: Address | None) -> AsyncConnections:
        nodes = self._here().nodes
        return nodes.get(address) or nodes.setdefault(address, AsyncConnections(self._pool_of(address), self._timeout))

    def _here(self) -> OnLoop:
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            forget_ended(self._by_loop)
            found = self._by_loop[loop] = OnLoop()
        return found


class OnLoop:
    """What an AsyncServer has on one event loop: connections, and the task or timer of its next exchange.

    ends: whether the loop is being closed. A task in the background would be left pending.
    """

    def __init__(self) -> None:
        self.ends = False
        self.nodes: dict[Address | None, AsyncConnections] = {}
        self.task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.subscription = AsyncSubscription()
        self._end = self._close_with_the_loop()
        with contextlib.suppress(StopIteration):  # started, it is known to the loop
            self._end.asend(None).send(None)

    async def _close_with_the_loop(self) -> AsyncGenerator[None, None]:
        """Close the connections when the loop ends, since a loop then closes its asynchronous generators. (A task would
        hold up programs that wait for all tasks.)"""
        try:
            yield
        finally:
            self.ends = True
            self.wake_after(None, lambda: None)
            if self.task is not None:  # it began after asyncio.run() had cancelled all tasks
                self.task.cancel()
                await asyncio.wait({self.task})
            for node in list(self.nodes.values()):
                await node.close()

    def wake_after(self, seconds: float | None, call: Callable[[], object]) -> None:
        """Make a call after so many seconds, instead of the call that was planned before. None: make no call."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds is not None:
            # in an empty context, as a task of in_background() is
            self._timer = asyncio.get_running_loop().call_later(seconds, call, context=contextvars.Context())


async def carry_out(steps: Generator[Any, Any, T], perform: Callable[[Any], Awaitable[Any]], first: Any = None) -> T:
    """Perform each step that the generator yields: send it the result, or throw it the error. Returns its result.

    first: a step that was already taken from the generator.
    """
    try:
        step = first or next(steps)
        while True:
            try:
                result = await perform(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class AsyncConnections:
    """wire.sync.Connections for one event loop."""

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self._limit, self._patience = limit_of(pool), timeout / 2
        self._idle: collections.deque[tuple[Any, float]] = collections.deque()  # with the time of the last use
        self._slots = asyncio.Semaphore(self._limit)
        # the one attempt to open a connection whose caller has given up waiting; no other one begins meanwhile
        self._late: asyncio.Task[Exception | None] | None = None
        self._opening: collections.deque[asyncio.Future[Any]] = collections.deque()  # of callers that open one
        self._longest = longest_exchange(timeout)  # seconds after which an attempt is given up
        self._losses = self._closes = 0

    async def send(self, commands: Sequence[Command], asking: bool = False) -> list[Any]:
        """The replies, in order; that of a failed command is its error. Raises NotSent if cancelled before sending."""
        losses, sent = self._losses, asyncio.Event()
        try:
            await self._take_slot()
            try:
                late = self._late
                if late is not None and not self._idle and not await _first_of(late, seconds=self._timeout):
                    raise ConnectsLate(self._timeout)
                if losses != self._losses:
                    raise lost_meanwhile()
                return await self._send(packed(commands, asking), len(commands), asking, sent)
            finally:
                self._slots.release()
        except BaseException as error:
            ended = isinstance(error, (asyncio.CancelledError, GeneratorExit)) or _is_closed()
            if sent.is_set() or not ended:
                raise
            raise NotSent from error

    async def _take_slot(self) -> None:
        """Wait for this call's turn. Raises redis.RedisError if all connections stay in use."""
        if not self._slots.locked():
            await self._slots.acquire()
            return
        try:
            async with _Deadline(self._timeout, 2, _busy()):
                await self._slots.acquire()
        except redis.TimeoutError:
            raise none_free(self._limit, self._timeout) from None

    async def _send(self, data: bytes, count: int, asking: bool, sent: asyncio.Event) -> list[Any]:
        losses, closes = self._losses, self._closes
        connection, used_at = self._idle.pop() if self._idle else (None, NEVER)
        try:
            connection = await self._prepare(connection, used_at)
            async with _Deadline(self._timeout):
                sent.set()
                await connection.send_packed_command([data], check_health=False)
                replies = []
                for _ in range(count):
                    if asking:
                        await _read(connection)
                    replies.append(await _read(connection))
        except GeneratorExit:  # collected while it ran: its loop is gone, and so are the sockets
            raise
        except BaseException as error:
            if isinstance(error, REDIS_ERRORS) and not isinstance(error, ConnectsLate):
                await self._lose()
            await _drop(connection)
            raise
        if not intact(replies):
            await self._lose()  # after a failover, idle connections lead to the old master
        if losses == self._losses and closes == self._closes:
            self._put_back(connection)
        else:
            await _drop(connection)
        return replies

    def _put_back(self, connection: Any) -> None:
        while self._opening:
            if not (offer := self._opening.popleft()).done():
                offer.set_result(connection)
                return
        self._idle.append((connection, monotonic()))

    def connection(self, **options: Any) -> Any:
        return connection(self._pool, ASYNCIO, None, **options)  # each caller has deadlines of its own

    async def close(self) -> None:
        """Close the idle connections now, and each of the others after its exchange. Give up a late attempt."""
        self._closes += 1
        await self._close_idle()
        late, self._late = self._late, None
        if late is not None and not late.done():
            late.cancel()
            await asyncio.wait({late})

    async def _lose(self) -> None:
        """Close the connections, since the server is lost. A late attempt goes on: it may find the server again."""
        self._losses += 1
        await self._close_idle()

    async def _close_idle(self) -> None:
        while self._idle:
            await _drop(self._idle.pop()[0])

    async def _prepare(self, connection: Any, used_at: float) -> Any:
        """This connection, if it is open, or else a new one. One that was idle for long must prove by a PING that it is
        usable."""
        timeout = self._timeout
        with contextlib.suppress(*REDIS_ERRORS):
            if connection is not None and connection.is_connected and not await can_read(connection)():
                if monotonic() - used_at <= PROOF_AFTER or await self._proves(connection):
                    return connection
                await self._close_idle()  # the others were idle for longer
                timeout -= self._patience
        await _drop(connection)
        return await self._open(timeout)

    # Attempts to open a connection. Each is a task: it has no deadline, and may outlive its caller

    async def _open(self, timeout: float) -> Any:
        """A new connection or, if that takes long, one that becomes free before.

        Raises redis.TimeoutError if both take longer: the attempt goes on in the background.
        """
        connection, closes = self.connection(), self._closes
        attempt = in_background(self._connect(connection))
        offer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            if not await _first_of(attempt, seconds=timeout / 2):
                self._opening.append(offer)
                if self._idle:
                    self._put_back(self._idle.pop()[0])
                if not await _first_of(attempt, offer, seconds=timeout / 2):
                    raise ConnectsLate(timeout)
        except BaseException:
            if not offer.cancel():
                self._put_back(offer.result())
            await self._leave(attempt, connection, closes)
            raise
        if not offer.cancel():
            await self._leave(attempt, connection, closes)
            return offer.result()
        if (error := attempt.result()) is not None:
            raise error
        return connection

    async def _leave(self, attempt: asyncio.Task[Exception | None], connection: Any, closes: int) -> None:
        """Let an attempt go on without its caller, unless another one does already."""
        if attempt.done():
            await _drop(connection)
        elif closes != self._closes or self._late is not None:
            attempt.cancel()
        else:
            self._late = attempt
            attempt.add_done_callback(self._late_ended)

    def _late_ended(self, attempt: asyncio.Task[Any]) -> None:
        if self._late is attempt:
            self._late = None

    async def _connect(self, connection: Any) -> Exception | None:
        """Open a connection. Returns why it failed. If its caller has left, the next one takes it."""
        began = monotonic()
        try:
            with connecting():
                async with asyncio.timeout(self._longest):
                    await connection.connect()  # only connect() asks a Sentinel for the master
        except GeneratorExit:  # collected while it ran: its loop is gone, and so are the sockets
            raise
        except BaseException as error:
            await _drop(connection)
            if not isinstance(error, Exception):
                raise
            if self._late is asyncio.current_task():
                await self._lose()
            return error
        self._patience = patience_after(monotonic() - began, self._timeout)
        if self._late is asyncio.current_task():
            self._put_back(connection)
        return None

    async def _proves(self, connection: Any) -> bool:
        """Whether the server answers a PING on this connection in time. An error is an answer, too."""
        with contextlib.suppress(*REDIS_ERRORS):
            async with _Deadline(self._patience):
                await connection.send_packed_command([PING], check_health=False)
                await _read(connection)
                return True
        return False


def forget_ended(by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any]) -> None:
    """Drop the entries of closed loops, which would never be collected: their open connections refer to the loop."""
    for reference in by_loop.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            by_loop.pop(loop, None)


async def _read(connection: Any) -> Any:
    try:  # the caller disconnects: redis-py would fail to if the event loop is closed already
        return await connection.read_response(disconnect_on_error=False)
    except redis.ResponseError as error:
        return error


async def _first_of(*awaited: asyncio.Future[Any], seconds: float) -> bool:
    """Wait until one of these has ended. seconds: at most. Returns whether one has."""
    with contextlib.suppress(redis.TimeoutError):
        async with _Deadline(seconds):
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    return any(one.done() for one in awaited)


async def _drop(connection: Any) -> None:
    if connection is not None and not _is_closed():  # else its socket is closed already
        await connection.disconnect(nowait=True)


def _is_closed() -> bool:
    try:
        return asyncio.get_running_loop().is_closed()
    except RuntimeError:
        return True


class _Deadline:
    """Raises redis.TimeoutError after so many seconds and so many turns of the loop, since the loop may merely be busy.

    busy: called at the end of each later turn. While it returns True, the deadline is put off. This is no generator:
    a loop that ends closes those of running tasks, too.
    """

    def __init__(self, seconds: float, least_turns: int = _TURNS, busy: Callable[[], bool] = lambda: False) -> None:
        self._seconds, self._busy = seconds, busy
        self._turns, self._pause = least_turns, seconds / least_turns

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = await asyncio.timeout(None).__aenter__()
        self._timer = self._loop.call_later(self._pause, self._turn)

    def _turn(self) -> None:
        self._turns -= 1
        if self._turns > 0 or self._busy():
            self._timer = self._loop.call_later(self._pause, self._turn)
        else:
            self._timeout.reschedule(self._loop.time())

    async def __aexit__(self, *raised: Any) -> None:
        self._timer.cancel()
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError as error:
            raise redis.TimeoutError(f"no reply within {self._seconds:g} s") from error


def _busy() -> Callable[[], bool]:
    """A function that tells whether this thread has computed for a tenth of the time since. Then a long wait in line is
    not the server's fault."""
    began, computed = monotonic(), thread_time()
    return lambda: thread_time() - computed > (monotonic() - began) / 10
