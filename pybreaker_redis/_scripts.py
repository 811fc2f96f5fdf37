"""Loads and calls the Lua; knows no rule of the breaker."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import itertools
import os
import weakref
from collections.abc import AsyncIterator, Iterator, MutableMapping
from typing import Any, TypeAlias

import redis
import redis.asyncio
import redis.asyncio.retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, NoScriptError
from redis.retry import Retry

from . import _protocol
from ._clients import async_client_from_url, client_from_url
from ._errors import PolicyError
from ._protocol import Keys, Reply, Request
from .wire.scripts import SCRIPTS as SCRIPTS
from .wire.scripts import compose as compose
from .wire.scripts import sha1 as sha1

_TURNS = 32
_MOST_CONNECTIONS = 128  # of one client on one event loop
_MOST_REDIRECTIONS = 5
REDIS_ERRORS = (redis.RedisError, OSError)
_INTACT = (NoScriptError, AskError, MovedError)  # errors that leave a connection as good as it was
_ASKING = b"*1\r\n$6\r\nASKING\r\n"
_Address: TypeAlias = tuple[str, int]
# Connections by the client that was given and the deadline: a process needs as many as it has threads that ask at once,
# however many breakers it has. Of a cluster by their node, on asyncio by the loop too.
_shared: weakref.WeakKeyDictionary[Any, dict[float, Any]] = weakref.WeakKeyDictionary()
# In a forked child: what is freed closes its transport, and takes it out of the epoll that the parent's loop shares.
_parents: list[Any] = []
_by_url: weakref.WeakValueDictionary[tuple[Any, str], Any] = weakref.WeakValueDictionary()


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


def _packed(words: tuple[bytes, ...], asking: bool) -> list[bytes]:
    """The words in the bytes of the protocol; redis-py's own packer takes a third of a round trip on asyncio."""
    parts = [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return [(_ASKING if asking else b"") + b"*%d\r\n" % len(words) + b"".join(parts)]


class RedisEngine:
    """Runs the scripts for one breaker over blocking connections, each in one round trip with a deadline.

    client: a redis-py client, or a URL. It is left as it was: the calls go over connections of their own and
    are never repeated, since redis-py's own repeat after a time-out would count a report twice.
    timeout: seconds to wait for a connection, and for a reply. Raises PolicyError for another kind of client.
    """

    def __init__(self, client: Any, keys: Keys, timeout: float) -> None:
        client = self._client = _client(client, redis.Redis, redis.RedisCluster, "redis.Redis")
        self._words = _Words(keys)
        links: dict[_Address | None, _Connections] = _shared.setdefault(client, {}).setdefault(timeout, {})
        if isinstance(client, redis.RedisCluster):
            self._link: _Connections | _Cluster = _Cluster(client, timeout, links)
        else:
            if None not in links:
                links.setdefault(None, _Connections(_own_pool(client.connection_pool, timeout), timeout))
            self._link = links[None]

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
        return self._link.subscriber()

    def close(self) -> None:
        """Close the connections; the next call opens others. In a forked child this leaves the parent's alone."""
        self._link.close()


class _Connections:
    """A stack of idle connections to where a client's pool connects to (a server, a socket, a Sentinel's master)."""

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self._idle: collections.deque[Any] = collections.deque()

    def execute(self, *words: bytes, asking: bool = False) -> Any:
        connection = self._take()
        try:
            connection.send_packed_command(_packed(words, asking), check_health=False)
            if asking:
                connection.read_response()
            reply = connection.read_response()
        except _INTACT:
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
        connection = self._connection()
        with _connecting():
            connection.connect()  # sending alone would not ask a Sentinel for the master
        return connection

    def subscriber(self) -> Any:
        return self._connection(protocol=2)

    def _connection(self, **options: Any) -> Any:
        kwargs = _connection_kwargs(self._pool.connection_kwargs, self._timeout) | options
        return self._pool.connection_class(**kwargs, retry=Retry(NoBackoff(), 0))


class _Nodes:
    """Which node of a cluster to ask for the slot of one breaker: any of them tells which one serves it."""

    ALL = (b"CLUSTER", b"SLOTS")

    def __init__(self, client: Any) -> None:
        self._manager = client.nodes_manager
        self._learned: list[_Address] = []
        self._turn = itertools.count()
        self._serving: _Address | None = None

    def address(self) -> _Address:
        """The node that is known to serve the slot, else the next one of all."""
        if self._serving is not None:
            return self._serving
        manager = self._manager
        nodes = [*list(manager.nodes_cache.values()), *list(manager.startup_nodes.values())]
        known = list(dict.fromkeys([*self._learned, *((node.host, int(node.port)) for node in nodes)]))
        return known[next(self._turn) % len(known)]

    def redirected(self, asked: _Address, error: AskError) -> _Address:
        """Where the node that was asked sends us."""
        return self._remap(asked, error.host, error.port)

    def serves(self, address: _Address) -> bool:
        """This one served the slot; whether that is news, and so a reason to ask it for all nodes."""
        news, self._serving = address != self._serving, address
        return news

    def lost(self) -> None:
        """The node that was asked does not serve: the next one may know which one does."""
        self._serving = None

    def learn(self, asked: _Address, slots: Any) -> None:
        """All nodes, as one of them lists them; the client that was given may know but one."""
        nodes = [node for _, _, *nodes in slots for node in nodes]
        self._learned = [self._remap(asked, (host or b"").decode(), port) for host, port, *_ in nodes]

    def _remap(self, asked: _Address, host: str, port: int) -> _Address:
        host, port = self._manager.remap_host_port(host or asked[0], int(port))  # without a host: on the same one
        return host, port


class _Cluster:
    """Connections to the node that serves the slot of one breaker.

    Only what was redirected, and thus executed by nobody, is repeated. redis-py's own cluster client repeats a
    report whose reply was lost, and waits for one dead node after the other.
    """

    def __init__(self, client: redis.RedisCluster, timeout: float, links: dict[_Address | None, _Connections]) -> None:
        self._manager, self._timeout, self._links = client.nodes_manager, timeout, links
        self._kwargs = _without("redis_connect_func", self._manager.connection_kwargs)  # it may ask for replicas
        self._nodes = _Nodes(client)

    def execute(self, *words: bytes) -> Any:
        address, asking = self._nodes.address(), False
        for _ in range(_MOST_REDIRECTIONS):
            try:
                reply = self._link(address).execute(*words, asking=asking)
            except AskError as error:  # or its subclass, MovedError
                address, asking = self._nodes.redirected(address, error), not isinstance(error, MovedError)
                continue
            except NoScriptError:
                raise
            except BaseException:
                self._nodes.lost()
                raise
            if not asking and self._nodes.serves(address):
                self._learn(address)
            return reply
        raise redis.RedisError(f"sent from node to node {_MOST_REDIRECTIONS} times, at last to {address}")

    def subscriber(self) -> Any:
        return self._link(self._nodes.address()).subscriber()

    def close(self) -> None:
        for link in list(self._links.values()):
            link.close()

    def _learn(self, address: _Address) -> None:
        with contextlib.suppress(*REDIS_ERRORS):  # an ACL may refuse it
            self._nodes.learn(address, self._link(address).execute(*_Nodes.ALL))

    def _link(self, address: _Address) -> _Connections:
        if address not in self._links:
            pool = self._manager.create_redis_node(*address, **self._kwargs).connection_pool
            self._links[address] = _Connections(pool, self._timeout)
        return self._links[address]


class AsyncRedisEngine:
    """RedisEngine for asyncio, with connections of their own for every event loop."""

    def __init__(self, client: Any, keys: Keys, timeout: float) -> None:
        client = self._client = _client(client, redis.asyncio.Redis, redis.asyncio.RedisCluster, "redis.asyncio.Redis")
        self._words = _Words(keys)
        self._timeout = timeout
        self._links: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _AsyncConnections | _AsyncCluster]
        self._links = weakref.WeakKeyDictionary()

    def forget(self) -> None:
        """In a forked child: the parent's connections are not ours."""
        leave_to_parent(self._links)
        self._links = weakref.WeakKeyDictionary()

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
        return self._link().subscriber()

    async def close(self) -> None:
        """Close this loop's connections; the next call opens others."""
        await self._link().close()

    def _link(self) -> _AsyncConnections | _AsyncCluster:
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is None:
            link = self._links[loop] = self._make_link(loop)
        return link

    def _make_link(self, loop: asyncio.AbstractEventLoop) -> _AsyncConnections | _AsyncCluster:
        client, timeout = self._client, self._timeout
        by_loop = _shared.setdefault(client, {}).setdefault(timeout, weakref.WeakKeyDictionary())
        forget_ended(self._links)
        forget_ended(by_loop)
        links: dict[_Address | None, _AsyncConnections] = by_loop.setdefault(loop, {})
        if isinstance(client, redis.asyncio.RedisCluster):
            return _AsyncCluster(client, timeout, links)
        if None not in links:
            links[None] = _AsyncConnections(_own_pool(client.connection_pool, timeout), timeout)
        return links[None]


class NotSent(asyncio.CancelledError):
    """A call was cancelled before its command went out, so that nobody has executed it."""


class _AsyncConnections:
    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self._idle: collections.deque[Any] = collections.deque()
        self._loop, self._slots = asyncio.get_running_loop(), asyncio.Semaphore(_MOST_CONNECTIONS)
        self._failures = 0

    async def execute(self, *words: bytes, asking: bool = False) -> Any:
        failures, sent = self._failures, asyncio.Event()
        try:
            async with self._slots:
                if failures != self._failures:  # or a crowd would wait for a dead server in turns
                    raise redis.ConnectionError("another call lost the server while this one waited for a connection")
                return await self._exchange(words, asking, sent)
        except BaseException as error:
            ended = isinstance(error, (asyncio.CancelledError, GeneratorExit)) or self._loop.is_closed()
            if sent.is_set() or not ended:
                raise
            raise NotSent from error

    async def _exchange(self, words: tuple[bytes, ...], asking: bool, sent: asyncio.Event) -> Any:
        async with _deadline(self._timeout):
            connection = await self._take()
            try:
                if not connection.is_connected:
                    with _connecting():
                        await connection.connect()  # sending alone would not ask a Sentinel for the master
                sent.set()
                await connection.send_packed_command(_packed(words, asking), check_health=False)
                if asking:
                    await connection.read_response()
                reply = await connection.read_response()
            except _INTACT:
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
        return self._connection()

    def subscriber(self) -> Any:
        return self._connection(protocol=2)

    def _connection(self, **options: Any) -> Any:
        # the deadline is around the whole exchange
        kwargs = _connection_kwargs(self._pool.connection_kwargs, None) | options
        return self._pool.connection_class(**kwargs, retry=redis.asyncio.retry.Retry(NoBackoff(), 0))


class _AsyncCluster:
    """_Cluster for asyncio."""

    def __init__(
        self, client: redis.asyncio.RedisCluster, timeout: float, links: dict[_Address | None, _AsyncConnections]
    ) -> None:
        self._kwargs = _without("redis_connect_func", client.connection_kwargs)
        self._timeout, self._links = timeout, links
        self._nodes = _Nodes(client)

    async def execute(self, *words: bytes) -> Any:
        address, asking = self._nodes.address(), False
        for _ in range(_MOST_REDIRECTIONS):
            try:
                reply = await self._link(address).execute(*words, asking=asking)
            except AskError as error:  # or its subclass, MovedError
                address, asking = self._nodes.redirected(address, error), not isinstance(error, MovedError)
                continue
            except NoScriptError:
                raise
            except BaseException:
                self._nodes.lost()
                raise
            if not asking and self._nodes.serves(address):
                await self._learn(address)
            return reply
        raise redis.RedisError(f"sent from node to node {_MOST_REDIRECTIONS} times, at last to {address}")

    def subscriber(self) -> Any:
        return self._link(self._nodes.address()).subscriber()

    async def close(self) -> None:
        for link in list(self._links.values()):
            await link.close()

    async def _learn(self, address: _Address) -> None:
        with contextlib.suppress(*REDIS_ERRORS):  # an ACL may refuse it
            self._nodes.learn(address, await self._link(address).execute(*_Nodes.ALL))

    def _link(self, address: _Address) -> _AsyncConnections:
        if address not in self._links:
            node = redis.asyncio.cluster.ClusterNode(*address, **self._kwargs)
            self._links[address] = _AsyncConnections(node, self._timeout)
        return self._links[address]


@contextlib.contextmanager
def _connecting() -> Iterator[None]:
    """Whatever keeps us from connecting is an outage: a credential provider, or a name that is none, raises its own."""
    try:
        yield
    except REDIS_ERRORS:
        raise
    except Exception as error:
        raise redis.ConnectionError(f"connecting failed: {error!r}") from error


def forget_ended(by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any]) -> None:
    """What a loop that was closed leaves open holds the loop, and so would never go by itself."""
    for reference in by_loop.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            by_loop.pop(loop, None)


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


def _can_read(connection: Any) -> Any:
    return connection.can_read if hasattr(connection, "can_read") else connection.can_read_destructive


def _client(given: Any, kind: Any, cluster: Any, wanted: str) -> Any:
    if isinstance(given, (kind, cluster)):
        return given
    if not isinstance(given, str):
        raise PolicyError(f"redis must be a {wanted} (or cluster) client, a URL or None, not {given!r}")
    found = _by_url.get((kind, given))
    if found is None:
        found = _by_url[kind, given] = (client_from_url if kind is redis.Redis else async_client_from_url)(given)
    return found


def _own_pool(pool: Any, timeout: float) -> Any:
    """A pool to connect like: the client's, or for a Sentinel's one that asks the sentinels within our deadline."""
    manager = getattr(pool, "sentinel_manager", None)
    if manager is None:
        return pool
    own = copy.copy(manager)
    # all of them and the master too: one that hangs must not use up the time of the next one
    share = timeout / (len(manager.sentinels) + 1)
    own.sentinels = [_impatient(sentinel, share) for sentinel in manager.sentinels]
    kwargs = _connection_kwargs(_without("connection_pool", pool.connection_kwargs), timeout)
    connect = {"connection_class": pool.connection_class, "is_master": pool.is_master}
    return type(pool)(pool.service_name, own, **kwargs, **connect)


def _without(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def _impatient(client: Any, timeout: float) -> Any:
    """A client like this one that tries once, for so many seconds."""
    pool = client.connection_pool
    retry = redis.asyncio.retry.Retry if isinstance(client, redis.asyncio.Redis) else Retry
    kwargs = {**_connection_kwargs(pool.connection_kwargs, timeout), "connection_class": pool.connection_class}
    return type(client)(connection_pool=type(pool)(**kwargs, retry=retry(NoBackoff(), 0)))


def _address(client: Any) -> str:
    if isinstance(client, (redis.Redis, redis.asyncio.Redis)):
        return f"{client.connection_pool.connection_class} {sorted(client.connection_pool.connection_kwargs.items())!r}"
    return repr(sorted((node.host, node.port) for node in client.get_nodes()))


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


def leave_to_parent(held: MutableMapping[Any, Any]) -> None:
    """In a forked child: nothing of this is used, or freed."""
    _parents.append(list(held.items()))


def _after_fork_in_child() -> None:
    for by_timeout in list(_shared.values()):
        for links in by_timeout.values():
            leave_to_parent(links)
    _shared.clear()  # a breaker for threads sees to the connections that it holds


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
