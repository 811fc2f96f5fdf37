"""Blocking connections: one pipeline of commands each way, with a deadline, never repeated."""

from __future__ import annotations

import collections
import contextlib
import os
import weakref
from collections.abc import Sequence
from time import monotonic
from typing import Any

import redis
from redis.exceptions import NoScriptError

from .._protocol import Keys, Reply, Request, decode, history_fields
from . import commands as build
from .commands import Command, packed
from .options import (
    BLOCKING,
    INTACT,
    REDIS_ERRORS,
    Address,
    address_of,
    client_of,
    connecting,
    connection,
    is_cluster,
    node_pool,
    pool_of,
)
from .route import SLOTS, Batch, Routes

_PER_COMMAND = 0.001  # seconds that a pipeline may take longer for each of its commands
# What all breakers of the process share, by client and deadline: a process needs as many connections as it has threads
# that talk to Redis at once, however many breakers it has.
_shared: weakref.WeakKeyDictionary[Any, dict[float, Connections | Cluster]] = weakref.WeakKeyDictionary()


class Server:
    """A Redis, as the breakers of this process reach it.

    client: a redis-py client (Redis, RedisCluster, Sentinel master) or a URL. It is left as it was: commands go over
    connections of our own and are never repeated, since a repeat after a time-out would count a report twice.
    timeout: seconds to wait for a connection, and for a reply. Raises PolicyError for another kind of client.
    """

    def __init__(self, client: Any, timeout: float) -> None:
        self.client = client = client_of(client, BLOCKING)
        by_timeout = _shared.setdefault(client, {})
        if timeout not in by_timeout:
            made = Cluster(client, timeout) if is_cluster(client) else Connections(pool_of(client, BLOCKING, timeout), timeout)
            by_timeout.setdefault(timeout, made)
        self._line = by_timeout[timeout]

    def run(self, name: str, keys: Keys, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        return decode(self._one(build.run(name, keys, request)))

    def history(self, keys: Keys, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first. Raises redis.RedisError or OSError."""
        return history_fields(self._one(build.history(keys, count)))

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; an error of one command is its reply. In a cluster a lost node is such an error.

        Raises redis.RedisError or OSError when the server is lost.
        """
        return self._line.exchange(commands)

    def masters(self) -> list[Connections]:
        """The connections to each node that serves keys."""
        return self._line.masters()

    @property
    def address(self) -> str:
        """A text that is the same for clients of the same server."""
        return address_of(self.client)

    def subscriber(self) -> Any:
        """A connection for a subscription, not yet open. Any node of a cluster serves: all get every message."""
        return self._line.subscriber()

    def close(self) -> None:
        """Close the connections; the next call opens others."""
        self._line.close()

    def _one(self, command: Command) -> Any:
        (reply,) = self._line.exchange((command,))
        if isinstance(reply, BaseException):
            raise reply
        return reply


class Connections:
    """A stack of idle connections to where a pool connects to: a server, a socket, a Sentinel's master, a node."""

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self._idle: collections.deque[Any] = collections.deque()

    def exchange(self, commands: Sequence[Command], asking: bool = False) -> list[Any]:
        """The replies, in order; an error of one command is its reply. A script that is missing is loaded."""
        replies = self._exchange(commands, asking)
        missing = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            first, *others = missing
            again = [commands[first].loading(), *(commands[place] for place in others)]
            for place, reply in zip(missing, self._exchange(again, asking), strict=True):
                replies[place] = reply
        return replies

    def _exchange(self, commands: Sequence[Command], asking: bool) -> list[Any]:
        connection = self._take()
        deadline = monotonic() + self._timeout + _PER_COMMAND * len(commands)
        replies: list[Any] = []
        try:
            connection.send_packed_command(packed(commands, asking), check_health=False)
            for _ in commands:
                if asking:
                    connection.read_response()
                replies.append(_read(connection))
                if len(replies) < len(commands) and monotonic() > deadline:
                    raise redis.TimeoutError(f"{len(commands)} replies take longer than {self._timeout:g} s")
        except BaseException:
            self._lose(connection)
            raise
        if all(not isinstance(reply, Exception) or isinstance(reply, INTACT) for reply in replies):
            self._idle.append(connection)
        else:
            self._lose(connection)
        return replies

    def masters(self) -> list[Connections]:
        return [self]

    def subscriber(self) -> Any:
        return connection(self._pool, BLOCKING, self._timeout, protocol=2)

    def close(self) -> None:
        with contextlib.suppress(IndexError):  # several threads may pop at once
            while True:
                self._idle.pop().disconnect()

    def _lose(self, connection: Any) -> None:
        connection.disconnect()
        self.close()  # after a fail-over the idle ones lead to the old master

    def _take(self) -> Any:
        with contextlib.suppress(IndexError):  # several threads may pop at once
            while True:
                idle = self._idle.pop()
                with contextlib.suppress(*REDIS_ERRORS):
                    if not idle.can_read():  # readable before a command means that the server has closed it
                        return idle
                idle.disconnect()
        new = connection(self._pool, BLOCKING, self._timeout)
        with connecting():
            new.connect()  # sending alone would not ask a Sentinel for the master
        return new


class Cluster:
    """The nodes of a cluster, each with its connections."""

    def __init__(self, client: redis.RedisCluster, timeout: float) -> None:
        self._routes, self._pool_of, self._timeout = Routes(client), node_pool(client), timeout
        self._nodes: dict[Address, Connections] = {}

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        batch = Batch(self._routes, commands)
        while legs := batch.legs():
            for leg in legs:
                try:
                    replies = self._node(leg.address).exchange([commands[place] for place in leg.places], leg.asking)
                except REDIS_ERRORS as error:
                    batch.failed(leg, error)
                except BaseException:
                    self._routes.lost(leg.address)
                    raise
                else:
                    batch.arrived(leg, replies)
        if batch.news is not None:
            with contextlib.suppress(*REDIS_ERRORS):
                self._routes.learn(batch.news, self._node(batch.news).exchange((SLOTS,))[0])
        return batch.replies

    def masters(self) -> list[Connections]:
        for address in self._routes.nodes():
            with contextlib.suppress(*REDIS_ERRORS):
                self._routes.learn(address, self._node(address).exchange((SLOTS,))[0])
                break
        return [self._node(address) for address in self._routes.masters()]

    def subscriber(self) -> Any:
        return self._node(self._routes.address(b"")).subscriber()

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def _node(self, address: Address) -> Connections:
        if address not in self._nodes:
            self._nodes.setdefault(address, Connections(self._pool_of(address), self._timeout))
        return self._nodes[address]


def _read(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _after_fork_in_child() -> None:
    for by_timeout in list(_shared.values()):
        for line in by_timeout.values():
            line.close()  # the sockets are the parent's; closing them here leaves it alone


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
