"""wire.sync for asyncio, with separate connections for each event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from time import monotonic, thread_time
from typing import Any, TypeVar

import redis

from .._line import Line
from .._protocol import NotSent, Reply, Request, decode, history_fields
from . import commands as build
from . import sync
from .commands import PING, Command, packed
from .connections import BaseConnections, BasePipe, Nodes
from .options import (
    ASYNCIO,
    BLOCKING,
    PROOF_AFTER,
    REDIS_ERRORS,
    Address,
    can_read,
    connecting,
    connection,
    counterpart,
    error_of_route,
)
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
        for node in list(self._nodes.values()):
            await node.close()

    async def _one(self, command: Command) -> Any:
        (reply,) = await self.exchange((command,))
        if isinstance(reply, BaseException):
            raise reply
        return reply

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; that of a failed command, or of one whose server is lost, is the error."""
        return await carry_out(self._exchange(commands), self._send)

    async def _send(self, leg: Leg) -> list[Any]:
        return await self._nodes[leg.address].send(leg.commands)

    @property
    def _nodes(self) -> Nodes[AsyncConnections]:  # type: ignore[override]
        return self._here().nodes

    def _here(self) -> OnLoop:
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            forget_ended(self._by_loop)
            found = self._by_loop[loop] = OnLoop(Nodes(AsyncConnections, self._pool_of, self._timeout))
        return found


class OnLoop:
    """What an AsyncServer has on one event loop: connections, and the task or timer of its next exchange.

    ends: whether the loop is being closed: a task that begins now would be left pending.
    """

    def __init__(self, nodes: Nodes[AsyncConnections]) -> None:
        self.ends, self.nodes = False, nodes
        self.task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.subscription = AsyncSubscription()
        self._end = self._close_with_the_loop()
        with contextlib.suppress(StopIteration):  # once started, it is known to the loop, which closes it
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


class AsyncPipe(BasePipe):
    """One of the connections. task: opens it."""

    task: asyncio.Task[None]

    async def open(self, connection: Any) -> None:
        self._connection = connection
        await connection.connect()  # only connect() asks a Sentinel for the master

    def give_up(self) -> None:
        self.task.cancel()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    async def works(self, patience: float) -> bool:
        """Whether it is open. If it was idle for long, the server must answer a PING in time; an error is an answer."""
        with contextlib.suppress(*REDIS_ERRORS):
            if not self._connection.is_connected or await can_read(self._connection)():
                return False
            if monotonic() - self.used_at > PROOF_AFTER:
                async with _Deadline(patience):
                    await self.exchange((PING,))
            return True
        return False

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, and read their replies."""
        await self._connection.send_packed_command([packed(commands)], check_health=False)
        replies = [await self._read() for _ in commands]
        self.used_at = monotonic()
        return replies

    async def _read(self) -> Any:
        try:  # the caller disconnects: redis-py's own attempt would fail on a closed event loop
            return await self._connection.read_response(disconnect_on_error=False)
        except redis.ResponseError as error:
            return error


class AsyncConnections(BaseConnections[AsyncPipe]):
    """Connections for one event loop. Each one is opened by a task of its own."""

    _pipe_class = AsyncPipe

    def __init__(self, pool: Any, timeout: float) -> None:
        super().__init__(pool, timeout)
        self._tasks: set[asyncio.Task[None]] = set()  # those that open connections: a loop has only weak references

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; that of a failed command is its error. Raises NotSent if cancelled before sending."""
        pipe, sent = None, False
        try:
            pipe = await self._take(self._timeout)
            pipe = await self._proven(pipe)
            async with _Deadline(self._timeout):
                sent = True
                replies = await pipe.exchange(commands)
        except BaseException as error:
            is_collected = isinstance(error, GeneratorExit)  # its loop is gone, and so are the sockets
            if pipe is not None and not is_collected:
                await self._drop(pipe, *(self._lose(error) if sent and isinstance(error, REDIS_ERRORS) else ()))
            if sent or not (is_collected or isinstance(error, asyncio.CancelledError) or _is_closed()):
                raise
            raise NotSent from error
        if (astray := error_of_route(replies)) is not None:
            await self._drop(*self._lose(astray))  # after a failover, idle connections lead to the old master
        if not self._keep(pipe):
            await self._drop(pipe)
        return replies

    def connection(self, **options: Any) -> Any:
        return connection(self._pool, ASYNCIO, None, **options)  # each caller has deadlines of its own

    async def close(self) -> None:
        """Close the idle connections now, and each of the others after its exchange. Give up those that are opening."""
        opening = self._opening()
        for pipe in opening:
            self._give_up(pipe)
        if opening:
            await asyncio.wait({pipe.task for pipe in opening})
        await self._drop(*opening, *self._end_era())

    async def _drop(self, *pipes: AsyncPipe) -> None:
        """Close connections; others may take their places."""
        if _is_closed():  # so are their sockets
            return
        for pipe in pipes:
            await pipe.close()
            self._pipes.pop(pipe, None)
        self._serve()

    async def _take(self, timeout: float) -> AsyncPipe:
        """A connection for this caller alone. Raises redis.RedisError if it gets none in time."""
        if not self._waiting and self._idle:
            return self._idle.pop()
        turn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._serve()
        try:
            # to open a connection takes several turns of the loop
            async with _Deadline(timeout, _TURNS if self._opening() else 2, self._busy()):
                await turn
        except redis.TimeoutError:
            if turn.cancelled():  # else it was handed something just then
                await self._leave(turn)
                raise self._gave_up(timeout) from None
        except asyncio.CancelledError:
            await self._leave(turn)
            raise
        found: AsyncPipe | BaseException = turn.result()
        if isinstance(found, BaseException):
            raise found
        return found

    def _busy(self) -> Callable[[], bool]:
        """A function that tells whether a long wait in line is not the server's fault. That is so if this thread has
        computed for a tenth of the time since, and a connection is in use: its exchange has a deadline of its own."""
        began, computed = monotonic(), thread_time()

        def is_busy() -> bool:
            in_use = len(self._pipes) > len(self._opening()) + len(self._idle)
            return in_use and thread_time() - computed > (monotonic() - began) / 10

        return is_busy

    async def _leave(self, turn: asyncio.Future[Any]) -> None:
        """Take a caller out of the line. A connection that it was handed just then goes to the next caller."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(turn)
        if not turn.cancelled() and isinstance(found := turn.result(), AsyncPipe) and not self._keep(found):
            await self._drop(found)

    def _hand(self, turn: asyncio.Future[Any], found: AsyncPipe | BaseException) -> bool:
        if turn.done():
            return False
        turn.set_result(found)
        return True

    async def _proven(self, pipe: AsyncPipe) -> AsyncPipe:
        """This connection, if it still leads to the server, or else another one."""
        deadline = monotonic() + self._timeout
        if await pipe.works(self._patience):
            return pipe
        await self._drop(pipe, *self._take_idle())  # the others were idle for longer
        return await self._take(deadline - monotonic())

    def _begin(self, pipe: AsyncPipe) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled():  # perhaps before it began
                self._pipes.pop(pipe, None)

        pipe.task = in_background(self._open(pipe))
        self._tasks.add(pipe.task)
        pipe.task.add_done_callback(ended)

    async def _open(self, pipe: AsyncPipe) -> None:
        try:
            with connecting():
                await pipe.open(self.connection())
        except GeneratorExit:  # collected while it ran: its loop is gone, and so are the sockets
            raise
        except BaseException as error:
            if not isinstance(error, Exception):  # cancelled
                await self._drop(pipe)
                raise
            await self._drop(pipe, *(self._lose(error) if pipe.opens else ()))
            return
        if not self._opened(pipe):
            await self._drop(pipe)


def forget_ended(by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any]) -> None:
    """Drop the entries of closed loops, which would never be collected: their open connections refer to the loop."""
    for reference in by_loop.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            by_loop.pop(loop, None)


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
