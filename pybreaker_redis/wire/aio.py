"""wire.sync for asyncio, with separate connections for each event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, MutableMapping, Sequence
from time import monotonic
from typing import Any, TypeVar

import redis

from .._protocol import Keys, NotSent, Reply, Request, decode, history_fields
from . import commands as build
from . import exits, sync
from .commands import Command, packed
from .link import Link, Member
from .options import (
    ASYNCIO,
    REDIS_ERRORS,
    Address,
    address_of,
    blocking,
    can_read,
    connecting,
    connection,
    intact,
    pools_of,
)
from .route import Leg, Routes, exchange

T = TypeVar("T")

_TURNS = 32
_MOST_CONNECTIONS = 128  # of one client on one event loop
_shared: weakref.WeakKeyDictionary[Any, dict[float, AsyncServer]] = weakref.WeakKeyDictionary()
# In a child: the parent's connections. Collecting them would unregister them from the epoll set that both share.
_parents: list[Any] = []


def async_server_of(client: Any, timeout: float) -> AsyncServer:
    """The AsyncServer of a client; all breakers of the process share it.

    timeout: seconds for one exchange, connecting included.
    """
    by_timeout = _shared.setdefault(client, {})
    return by_timeout.get(timeout) or by_timeout.setdefault(timeout, AsyncServer(client, timeout))


class AsyncServer:
    """wire.sync.Server for asyncio, with separate connections for each event loop."""

    def __init__(self, client: Any, timeout: float) -> None:
        self.address = address_of(client)
        self._pool_of, clustered = pools_of(client, ASYNCIO, timeout)
        self._routes = Routes(client) if clustered else None
        self._timeout = timeout
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, OnLoop] = weakref.WeakKeyDictionary()
        self.link = Link(timeout, self._routes.home if self._routes else None)
        exits.servers.add(self)

    def after_fork(self) -> None:
        """In a child: leave the parent's connections alone, and start without any."""
        leave_to_parent(self._by_loop)
        self._by_loop = weakref.WeakKeyDictionary()
        self.link.after_fork()

    def soon(self, member: Member, hinted: bool = False, urgent: bool = False) -> None:
        """Refresh a breaker in the background. hinted: even if its view is fresh. urgent: it has a report to send."""
        link = self.link
        link.use(member, hinted)
        if hinted or urgent or not link.is_busy():
            link.wanted = True
            self._start()

    async def refresh(self) -> None:
        """Wait for an exchange of the link: the one that is under way, or a new one."""
        here = self._here()
        if here.task is None or here.task.done():
            self.link.wanted = True
        task = self._start()
        done, _ = await asyncio.wait({task}, timeout=self.link.timeout)
        if done and not task.cancelled():
            task.result()

    async def wait_for_reports(self, member: Member) -> None:
        """Wait for the reports of a breaker that are under way. Raises the error if the server was lost."""
        if (task := self._here().task) is not None:
            await asyncio.wait({task}, timeout=self.link.timeout)
        if (error := self.link.error(member)) is not None:
            raise error

    async def report(self, members: list[Member]) -> None:
        """Report all that these breakers have gathered. Raises no error of Redis."""
        await carry_out(self.link.report(members), self.exchange)
        self._deliver()

    def end(self) -> None:
        """Report what is gathered, over blocking connections, since no event loop runs any more. Raises nothing."""
        ends = monotonic() + self._timeout
        node = lambda address: sync.Connections(blocking(self._pool_of(address)), self._timeout)  # noqa: E731
        sync.end(self.link, self._routes, node, ends)

    def _start(self) -> asyncio.Task[None]:
        here = self._here()
        if here.timer is not None:
            here.timer.cancel()
            here.timer = None
        if here.task is None or here.task.done():
            here.task = asyncio.get_running_loop().create_task(self._refresh(here))
        return here.task

    async def _refresh(self, here: OnLoop) -> None:
        while True:
            await carry_out(self.link.exchange(), self.exchange)
            self._deliver()
            if not self.link.wanted:
                break
        pause = self.link.pause()
        if pause is not None:
            here.timer = asyncio.get_running_loop().call_later(pause, self._start)

    def _deliver(self) -> None:
        while self.link.undelivered:
            member, events = self.link.undelivered.popleft()
            member.deliver(events)

    async def run(self, name: str, keys: Keys, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        return decode(await self._one(build.run(name, keys, request)))

    async def history(self, keys: Keys, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first. Raises redis.RedisError or OSError."""
        return history_fields(await self._one(build.history(keys, count)))

    def subscriber(self) -> Any:
        """A connection for a subscription, not yet open. Any node of a cluster serves: all get every message."""
        return self._node(None if self._routes is None else self._routes.any_node()).connection(protocol=2)

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
        return await carry_out(exchange(self._routes, commands), self._send)

    async def _send(self, leg: Leg) -> list[Any]:
        return await self._node(leg.address).send(leg.commands, leg.asking)

    def _node(self, address: Address | None) -> AsyncConnections:
        nodes = self._here().nodes
        return nodes.get(address) or nodes.setdefault(address, AsyncConnections(self._pool_of(address), self._timeout))

    def _here(self) -> OnLoop:
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            forget_ended(self._by_loop)
        return self._by_loop.setdefault(loop, OnLoop())


class OnLoop:
    """What an AsyncServer has on one event loop: connections, and the task or timer of its next exchange."""

    def __init__(self) -> None:
        self.nodes: dict[Address | None, AsyncConnections] = {}
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


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
        self._idle: collections.deque[Any] = collections.deque()
        self._slots = asyncio.Semaphore(_MOST_CONNECTIONS)
        self._losses = 0

    async def send(self, commands: Sequence[Command], asking: bool = False) -> list[Any]:
        """The replies, in order; that of a failed command is its error. Raises NotSent if cancelled before sending."""
        losses, sent = self._losses, asyncio.Event()
        try:
            async with self._slots:
                if losses != self._losses:  # else each waiting call would time out on the dead server in turn
                    raise redis.ConnectionError("another call lost the server while this one waited for a connection")
                return await self._send(packed(commands, asking), len(commands), asking, sent)
        except BaseException as error:
            ended = isinstance(error, (asyncio.CancelledError, GeneratorExit)) or _is_closed()
            if sent.is_set() or not ended:
                raise
            raise NotSent from error

    async def _send(self, data: bytes, count: int, asking: bool, sent: asyncio.Event) -> list[Any]:
        async with _deadline(self._timeout):
            connection = await self._take()
            try:
                if not connection.is_connected:
                    with connecting():
                        await connection.connect()  # only connect() asks a Sentinel for the master
                sent.set()
                await connection.send_packed_command([data], check_health=False)
                replies = []
                for _ in range(count):
                    if asking:
                        await _read(connection)
                    replies.append(await _read(connection))
            except BaseException:
                await self._lose(connection)
                raise
        if intact(replies):
            self._idle.append(connection)
        else:
            await self._lose(connection)
        return replies

    def connection(self, **options: Any) -> Any:
        return connection(self._pool, ASYNCIO, None, **options)  # the deadline covers the whole exchange

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    async def _lose(self, connection: Any) -> None:
        self._losses += 1
        if not _is_closed():  # else its sockets are closed already
            await connection.disconnect(nowait=True)
            await self.close()

    async def _take(self) -> Any:
        while self._idle:
            idle = self._idle.pop()
            with contextlib.suppress(*REDIS_ERRORS):
                if idle.is_connected and not await can_read(idle)():
                    return idle
            await idle.disconnect(nowait=True)
        return self.connection()


def forget_ended(by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any]) -> None:
    """Drop the entries of closed loops: their open connections refer to the loop, so it would never be collected."""
    for reference in by_loop.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            by_loop.pop(loop, None)


async def _read(connection: Any) -> Any:
    try:  # the caller disconnects: redis-py would fail at it where the event loop is closed already
        return await connection.read_response(disconnect_on_error=False)
    except redis.ResponseError as error:
        return error


def _is_closed() -> bool:
    try:
        return asyncio.get_running_loop().is_closed()
    except RuntimeError:
        return True


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """Raise redis.TimeoutError after these seconds and _TURNS turns of the loop: the loop may merely be busy."""
    loop = asyncio.get_running_loop()
    turns = itertools.count(1)

    def turn() -> None:
        if next(turns) < _TURNS:
            timer[0] = loop.call_later(seconds / _TURNS, turn)
        else:
            timeout.reschedule(loop.time())

    timer = [loop.call_later(seconds / _TURNS, turn)]
    try:
        async with asyncio.timeout(None) as timeout:
            yield
    except TimeoutError as error:
        raise redis.TimeoutError(f"no reply within {seconds:g} s") from error
    finally:
        timer[0].cancel()


def leave_to_parent(held: MutableMapping[Any, Any]) -> None:
    """In a child: keep these objects of the parent alive, and unused. See _parents."""
    _parents.append(list(held.items()))


def _after_fork_in_child() -> None:
    for by_timeout in list(_shared.values()):
        for server in by_timeout.values():
            server.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
