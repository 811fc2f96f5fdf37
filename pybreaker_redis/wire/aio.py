"""wire.sync for asyncio, with connections of their own for every event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import os
import weakref
from collections.abc import AsyncIterator, MutableMapping, Sequence
from typing import Any

import redis
import redis.asyncio
from redis.exceptions import NoScriptError

from .._protocol import Keys, NotSent, Reply, Request, decode, history_fields
from . import commands as build
from .commands import Command, packed
from .options import (
    ASYNCIO,
    INTACT,
    REDIS_ERRORS,
    Address,
    address_of,
    can_read,
    client_of,
    connecting,
    connection,
    is_cluster,
    node_pool,
    pool_of,
)
from .route import SLOTS, Batch, Routes

_TURNS = 32
_MOST_CONNECTIONS = 128  # of one client on one event loop
# What all breakers of the process share, by client, deadline and loop.
_shared: weakref.WeakKeyDictionary[Any, dict[float, _ByLoop]] = weakref.WeakKeyDictionary()
# In a child: the parent's connections. Collecting them would unregister them from the epoll set that both share.
_parents: list[Any] = []


class AsyncServer:
    """wire.sync.Server for asyncio: the same arguments and methods, awaitable."""

    def __init__(self, client: Any, timeout: float) -> None:
        self.client = client_of(client, ASYNCIO)
        self._timeout = timeout

    async def run(self, name: str, keys: Keys, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        return decode(await self._one(build.run(name, keys, request)))

    async def history(self, keys: Keys, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first. Raises redis.RedisError or OSError."""
        return history_fields(await self._one(build.history(keys, count)))

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; an error of one command is its reply. In a cluster a lost node is such an error.

        Raises redis.RedisError or OSError when the server is lost.
        """
        return await self._line().exchange(commands)

    @property
    def address(self) -> str:
        """A text that is the same for clients of the same server."""
        return address_of(self.client)

    def subscriber(self) -> Any:
        """A connection for a subscription, not yet open. Any node of a cluster serves: all get every message."""
        return self._line().subscriber()

    async def close(self) -> None:
        """Close this loop's connections; the next call opens others."""
        await self._line().close()

    async def _one(self, command: Command) -> Any:
        (reply,) = await self._line().exchange((command,))
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def _line(self) -> AsyncConnections | AsyncCluster:
        client, timeout, loop = self.client, self._timeout, asyncio.get_running_loop()
        by_loop = _shared.setdefault(client, {}).setdefault(timeout, weakref.WeakKeyDictionary())
        line = by_loop.get(loop)
        if line is None:
            forget_ended(by_loop)
            if is_cluster(client):
                line = AsyncCluster(client, timeout)
            else:
                line = AsyncConnections(pool_of(client, ASYNCIO, timeout), timeout)
            by_loop[loop] = line
        return line


class AsyncConnections:
    """wire.sync.Connections for one event loop."""

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self._idle: collections.deque[Any] = collections.deque()
        self._slots = asyncio.Semaphore(_MOST_CONNECTIONS)
        self._losses = 0

    async def exchange(self, commands: Sequence[Command], asking: bool = False) -> list[Any]:
        """The replies, in order; an error of one command is its reply. A script that is missing is loaded."""
        replies = await self._exchange(commands, asking)
        missing = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            first, *others = missing
            again = [commands[first].loading(), *(commands[place] for place in others)]
            for place, reply in zip(missing, await self._exchange(again, asking), strict=True):
                replies[place] = reply
        return replies

    async def _exchange(self, commands: Sequence[Command], asking: bool) -> list[Any]:
        losses, sent = self._losses, asyncio.Event()
        try:
            async with self._slots:
                if losses != self._losses:  # else a crowd would wait for a dead server one after another
                    raise redis.ConnectionError("another call lost the server while this one waited for a connection")
                return await self._send(packed(commands, asking), len(commands), asking, sent)
        except BaseException as error:
            ended = isinstance(error, (asyncio.CancelledError, GeneratorExit)) or _is_closed()
            if sent.is_set() or not ended:
                raise
            raise NotSent from error

    async def _send(self, data: list[bytes], count: int, asking: bool, sent: asyncio.Event) -> list[Any]:
        async with _deadline(self._timeout):
            connection = await self._take()
            try:
                if not connection.is_connected:
                    with connecting():
                        await connection.connect()  # sending alone would not ask a Sentinel for the master
                sent.set()
                await connection.send_packed_command(data, check_health=False)
                replies = []
                for _ in range(count):
                    if asking:
                        await connection.read_response()
                    replies.append(await _read(connection))
            except BaseException:
                await self._lose(connection)
                raise
        if all(not isinstance(reply, Exception) or isinstance(reply, INTACT) for reply in replies):
            self._idle.append(connection)
        else:
            await self._lose(connection)
        return replies

    def subscriber(self) -> Any:
        return self._connection(protocol=2)

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    async def _lose(self, connection: Any) -> None:
        self._losses += 1
        await connection.disconnect(nowait=True)
        await self.close()

    async def _take(self) -> Any:
        while self._idle:
            idle = self._idle.pop()
            with contextlib.suppress(*REDIS_ERRORS):
                if idle.is_connected and not await can_read(idle)():
                    return idle
            await idle.disconnect(nowait=True)
        return self._connection()

    def _connection(self, **options: Any) -> Any:
        return connection(self._pool, ASYNCIO, None, **options)  # the deadline is around the whole exchange


class AsyncCluster:
    """wire.sync.Cluster for one event loop."""

    def __init__(self, client: redis.asyncio.RedisCluster, timeout: float) -> None:
        self._routes, self._pool_of, self._timeout = Routes(client), node_pool(client), timeout
        self._nodes: dict[Address, AsyncConnections] = {}

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        batch = Batch(self._routes, commands)
        while legs := batch.legs():
            for leg in legs:
                node = self._node(leg.address)
                try:
                    replies = await node.exchange([commands[place] for place in leg.places], leg.asking)
                except REDIS_ERRORS as error:
                    batch.failed(leg, error)
                except BaseException:
                    self._routes.lost(leg.address)
                    raise
                else:
                    batch.arrived(leg, replies)
        if batch.news is not None:
            with contextlib.suppress(*REDIS_ERRORS):
                self._routes.learn(batch.news, (await self._node(batch.news).exchange((SLOTS,)))[0])
        return batch.replies

    def subscriber(self) -> Any:
        return self._node(self._routes.address(b"")).subscriber()

    async def close(self) -> None:
        for node in list(self._nodes.values()):
            await node.close()

    def _node(self, address: Address) -> AsyncConnections:
        if address not in self._nodes:
            self._nodes[address] = AsyncConnections(self._pool_of(address), self._timeout)
        return self._nodes[address]


_ByLoop = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncConnections | AsyncCluster]


def forget_ended(by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any]) -> None:
    """Drop what belongs to closed loops: connections that a loop left open hold the loop, so it would never go."""
    for reference in by_loop.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            by_loop.pop(loop, None)


async def _read(connection: Any) -> Any:
    try:
        return await connection.read_response()
    except redis.ResponseError as error:
        return error


def _is_closed() -> bool:
    try:
        return asyncio.get_running_loop().is_closed()
    except RuntimeError:
        return True


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """redis.TimeoutError after seconds and _TURNS turns of the loop: a busy loop is not taken for a dead server."""
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
    """In a child: none of this is used, and none of it collected."""
    _parents.append(list(held.items()))


def _after_fork_in_child() -> None:
    for by_timeout in list(_shared.values()):
        for by_loop in by_timeout.values():
            leave_to_parent(by_loop)
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
