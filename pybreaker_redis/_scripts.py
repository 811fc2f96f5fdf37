"""Finds the Lua, composes, loads and calls it; knows no rule of the breaker."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hashlib
import importlib.resources
import itertools
import pathlib
import random
import weakref
from collections.abc import AsyncIterator
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from . import _protocol
from ._errors import PolicyError
from ._protocol import Keys, Reply, Request

SCRIPTS = ("acquire", "record", "control", "snapshot")
_TURNS = 32
_MOST_CONNECTIONS = 128  # of one breaker on one event loop
REDIS_ERRORS = (redis.RedisError, OSError)


def _folder() -> Any:
    packaged = importlib.resources.files(__package__) / "lua"
    return packaged if packaged.is_dir() else pathlib.Path(__file__).parent.parent / "lua"


@functools.cache
def compose(name: str) -> str:
    """What Redis runs for the script called name: breaker.lua followed by it."""
    folder = _folder()
    return "".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("breaker", name))


@functools.cache
def sha1(name: str) -> str:
    """The SHA-1 by which EVALSHA calls the script called name."""
    return hashlib.sha1(compose(name).encode(), usedforsecurity=False).hexdigest()


class _Words:
    """The commands of one breaker."""

    def __init__(self, keys: Keys) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def evalsha(self, name: str, body: bytes) -> tuple[bytes, ...]:
        return (b"EVALSHA", sha1(name).encode(), b"3", *self._keys, body)

    def eval(self, name: str, body: bytes) -> tuple[bytes, ...]:
        """Loads and runs in one step, so that a SCRIPT FLUSH cannot come between."""
        return (b"EVAL", compose(name).encode(), b"3", *self._keys, body)

    def history(self, count: int) -> tuple[bytes, ...]:
        return (b"XREVRANGE", self._keys[1], b"+", b"-", b"COUNT", b"%d" % count)


def _packed(words: tuple[bytes, ...]) -> list[bytes]:
    """The words in the bytes of the protocol; redis-py's own packer takes a third of a round trip on asyncio."""
    return [b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])]


class RedisEngine:
    """Runs the scripts for one breaker over blocking connections, each in one round trip with a deadline.

    client: a redis-py client, or a URL. It is left as it was: the calls go over connections of their own and
    are never repeated, since redis-py's own repeat after a time-out would count a report twice.
    timeout: seconds to wait for a connection, and for a reply. Raises PolicyError for another kind of client.
    """

    def __init__(self, client: Any, keys: Keys, timeout: float) -> None:
        client = self._client = _client(client, redis.Redis, redis.RedisCluster, "redis.Redis")
        self._timeout = timeout
        self._words = _Words(keys)
        self._link = (_Cluster if isinstance(client, redis.RedisCluster) else _Connections)(client, timeout)

    def run(self, name: str, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        body = _protocol.encode(request)
        try:
            return _protocol.decode(self._link.execute(*self._words.evalsha(name, body)))
        except NoScriptError:
            return _protocol.decode(self._link.execute(*self._words.eval(name, body)))

    def history(self, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first."""
        return _protocol.history_fields(self._link.execute(*self._words.history(count)))

    @property
    def address(self) -> str:
        """The same for clients that lead to the same server."""
        return _address(self._client)

    def subscriber(self) -> Any:
        """A connection for a subscription, not yet open; to any node of a cluster, which all get every message."""
        pool = self._client if isinstance(self._client, redis.Redis) else _any_node(self._client)
        kwargs = _connection_kwargs(pool.connection_pool.connection_kwargs, self._timeout) | {"protocol": 2}
        return pool.connection_pool.connection_class(**kwargs, retry=Retry(NoBackoff(), 0))

    def close(self) -> None:
        """Close the connections; the next call opens others. In a forked child this leaves the parent's alone."""
        self._link.close()


class _Connections:
    """A stack of idle connections to where a client's pool connects to (a server, a socket, a Sentinel's master)."""

    def __init__(self, client: redis.Redis, timeout: float) -> None:
        self._pool, self._timeout = client.connection_pool, timeout
        self._idle: collections.deque[Any] = collections.deque()

    def execute(self, *words: bytes) -> Any:
        connection = self._take()
        try:
            connection.send_packed_command(_packed(words), check_health=False)
            reply = connection.read_response()
        except NoScriptError:
            self._idle.append(connection)
            raise
        except BaseException:
            connection.disconnect()
            self.close()  # after a failover the idle ones lead to the old master
            raise
        self._idle.append(connection)
        return reply

    def close(self) -> None:
        with contextlib.suppress(IndexError):  # threads pop beside each other
            while True:
                self._idle.pop().disconnect()

    def _take(self) -> Any:
        with contextlib.suppress(IndexError):  # threads pop beside each other
            while True:
                connection = self._idle.pop()
                with contextlib.suppress(*REDIS_ERRORS):
                    if not connection.can_read():  # readable before a command: the server has closed it
                        return connection
                connection.disconnect()
        kwargs = _connection_kwargs(self._pool.connection_kwargs, self._timeout)
        return self._pool.connection_class(**kwargs, retry=Retry(NoBackoff(), 0))


class _Cluster:
    """A cluster client of our own, made at the first call; it follows the slots."""

    def __init__(self, client: redis.RedisCluster, timeout: float) -> None:
        self._given, self._timeout = client, timeout
        self._client: redis.RedisCluster | None = None

    def execute(self, *words: bytes) -> Any:
        if self._client is None:
            nodes = [redis.cluster.ClusterNode(node.host, node.port) for node in self._given.get_nodes()]
            kwargs = _cluster_kwargs(self._given.nodes_manager.connection_kwargs, self._timeout)
            self._client = redis.RedisCluster(startup_nodes=nodes, **kwargs)
        return self._client.execute_command(*words)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


class AsyncRedisEngine:
    """RedisEngine for asyncio, with connections of their own for every event loop."""

    def __init__(self, client: Any, keys: Keys, timeout: float) -> None:
        client = self._client = _client(client, redis.asyncio.Redis, redis.asyncio.RedisCluster, "redis.asyncio.Redis")
        self._words = _Words(keys)
        make = _AsyncCluster if isinstance(client, redis.asyncio.RedisCluster) else _AsyncConnections
        self._make_link = functools.partial(make, client, timeout)
        self.forget()

    def forget(self) -> None:
        """In a forked child: the parent's connections are not ours."""
        self._links: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()

    async def run(self, name: str, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        body = _protocol.encode(request)
        try:
            return _protocol.decode(await self._link().execute(*self._words.evalsha(name, body)))
        except NoScriptError:
            return _protocol.decode(await self._link().execute(*self._words.eval(name, body)))

    async def history(self, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first."""
        return _protocol.history_fields(await self._link().execute(*self._words.history(count)))

    @property
    def address(self) -> str:
        """The same for clients that lead to the same server."""
        return _address(self._client)

    def subscriber(self) -> Any:
        """A connection for a subscription, not yet open; to any node of a cluster, which all get every message."""
        if isinstance(self._client, redis.asyncio.Redis):
            pool = self._client.connection_pool
            kind, given = pool.connection_class, pool.connection_kwargs
        else:
            node = random.choice(self._client.get_nodes())
            kind, given = node.connection_class, {**node.connection_kwargs, "host": node.host, "port": node.port}
        kwargs = _connection_kwargs(given, None) | {"protocol": 2}
        return kind(**kwargs, retry=redis.asyncio.retry.Retry(NoBackoff(), 0))

    async def close(self) -> None:
        """Close this loop's connections; the next call opens others."""
        await self._link().close()

    def _link(self) -> Any:
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is None:
            link = self._links[loop] = self._make_link()
        return link


class _AsyncConnections:
    def __init__(self, client: redis.asyncio.Redis, timeout: float) -> None:
        self._pool, self._timeout = client.connection_pool, timeout
        self._idle: collections.deque[Any] = collections.deque()
        self._slots = asyncio.Semaphore(_MOST_CONNECTIONS)
        self._failures = 0

    async def execute(self, *words: bytes) -> Any:
        failures = self._failures
        async with self._slots:
            if failures != self._failures:  # or a crowd would wait for a dead server in turns
                raise redis.ConnectionError("another call lost the server while this one waited for a connection")
            return await self._exchange(words)

    async def _exchange(self, words: tuple[bytes, ...]) -> Any:
        async with _deadline(self._timeout):
            connection = await self._take()
            try:
                await connection.send_packed_command(_packed(words), check_health=False)
                reply = await connection.read_response()
            except NoScriptError:
                self._idle.append(connection)
                raise
            except BaseException:
                self._failures += 1
                await connection.disconnect(nowait=True)
                await self.close()
                raise
        self._idle.append(connection)
        return reply

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    async def _take(self) -> Any:
        while self._idle:
            connection = self._idle.pop()
            with contextlib.suppress(*REDIS_ERRORS):
                if connection.is_connected and not await _can_read(connection)():
                    return connection
            await connection.disconnect(nowait=True)
        # the deadline is around the whole exchange
        kwargs = _connection_kwargs(self._pool.connection_kwargs, None)
        return self._pool.connection_class(**kwargs, retry=redis.asyncio.retry.Retry(NoBackoff(), 0))


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """TimeoutError after seconds and _TURNS turns of the loop: a busy loop is not taken for a dead server."""
    loop = asyncio.get_running_loop()
    turns = itertools.count(1)

    def turn() -> None:
        if next(turns) < _TURNS:
            timer[0] = loop.call_later(seconds / _TURNS, turn)
        else:
            timeout.reschedule(loop.time())

    timer = [loop.call_later(seconds / _TURNS, turn)]
    async with asyncio.timeout(None) as timeout:
        try:
            yield
        finally:
            timer[0].cancel()


def _can_read(connection: Any) -> Any:
    return connection.can_read if hasattr(connection, "can_read") else connection.can_read_destructive


class _AsyncCluster:
    def __init__(self, client: redis.asyncio.RedisCluster, timeout: float) -> None:
        self._given, self._timeout = client, timeout
        self._client: redis.asyncio.RedisCluster | None = None

    async def execute(self, *words: bytes) -> Any:
        if self._client is None:
            nodes = [redis.asyncio.cluster.ClusterNode(node.host, node.port) for node in self._given.get_nodes()]
            kwargs = _cluster_kwargs(self._given.connection_kwargs, self._timeout)
            self._client = redis.asyncio.RedisCluster(startup_nodes=nodes, **kwargs)
        async with _deadline(self._timeout):
            return await self._client.execute_command(*words)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


def _client(given: Any, kind: Any, cluster: Any, wanted: str) -> Any:
    if isinstance(given, (kind, cluster)):
        return given
    if not isinstance(given, str):
        raise PolicyError(f"redis must be a {wanted} (or cluster) client, a URL or None, not {given!r}")
    try:
        return kind.from_url(given)
    except ValueError as error:
        raise PolicyError(f"redis is no URL of a server: {error}") from error


def _address(client: Any) -> str:
    if isinstance(client, (redis.Redis, redis.asyncio.Redis)):
        return f"{client.connection_pool.connection_class} {sorted(client.connection_pool.connection_kwargs.items())!r}"
    return repr(sorted((node.host, node.port) for node in client.get_nodes()))


def _any_node(cluster: redis.RedisCluster) -> redis.Redis:
    return cluster.get_redis_connection(random.choice(cluster.get_nodes()))


def _connection_kwargs(given: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """The client's connection options with our deadline, bytes in replies, and nothing that repeats or watches."""
    dropped = ("retry", "decode_responses", "health_check_interval", "event_dispatcher")
    kwargs = {
        key: value
        for key, value in given.items()
        if not key.startswith(("retry_on", "maint", "orig_", "oss_cluster", "himport")) and key not in dropped
    }
    for key in ("socket_timeout", "socket_connect_timeout"):
        kwargs[key] = timeout and min(kwargs.get(key) or timeout, timeout)
    return kwargs


def _cluster_kwargs(given: dict[str, Any], timeout: float) -> dict[str, Any]:
    kwargs = _connection_kwargs(given, timeout)
    for key in ("host", "port", "cache", "redis_connect_func", "connection_pool"):
        kwargs.pop(key, None)
    return kwargs
