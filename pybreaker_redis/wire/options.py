"""What this package needs of redis-py's internals, in one place. Tried with redis-py 6.0 and 8.1. No I/O."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import hiredis
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.retry
import redis.sentinel
from redis import exceptions
from redis.backoff import NoBackoff

from .._errors import PolicyError
from .._process import own_lock
from .url import ClusterUrl, client_from_url

Address: TypeAlias = tuple[str, int]
Kind: TypeAlias = ModuleType  # with the classes of blocking or of asyncio clients, which have the same names
BLOCKING: Kind = redis
ASYNCIO: Kind = redis.asyncio
MOST_CONNECTIONS = 100  # to one server, of a client that names no limit; redis-py 7 and later name the same
_UNLIMITED = 2**31  # what earlier ones name
PROOF_AFTER = 1.0  # seconds after which an idle connection must prove that it still leads to the server
SHORTEST_PATIENCE = 0.02
CHUNK = 65536  # bytes to read from a socket at once
NO_REPLY = object()  # from a reader that has no whole reply yet
REDIS_ERRORS = (redis.RedisError, OSError)
ERROR_REPLY = redis.ResponseError  # the server has answered
NO_RIGHT = exceptions.NoPermissionError  # an ACL refuses the command or the key
# options of connections for which blocking and asyncio ones have classes and functions of their own
_OF_ONE_KIND = {"redis_connect_func", "parser_class", "encoder_class", "connection_pool"}
# errors of a connection that leads to the wrong server, or to one that is not ready; Redis 6 hides the codes within the
# message of a script's error
_ASTRAY = (redis.ConnectionError, redis.ReadOnlyError, exceptions.ClusterDownError)
_ASTRAY_TEXTS = re.compile(r"\b(READONLY|MASTERDOWN|CLUSTERDOWN|LOADING|NOAUTH)\b")
_by_url: weakref.WeakValueDictionary[tuple[Kind, str], Any] = weakref.WeakValueDictionary()


def client_of(given: Any, kind: Kind) -> Any:
    """The given client, or the one that this process shares for a URL. Raises PolicyError for anything else."""
    if isinstance(given, str):
        key = kind, given
        found = _by_url.get(key)
        if found is None:
            found = client_from_url(given, kind)
            with own_lock():  # another thread may have made one meanwhile
                found = _by_url.setdefault(key, found)
        return found
    remedy = _remedy(given, kind)
    if not remedy and isinstance(given, (kind.Redis, kind.RedisCluster, ClusterUrl)):
        return given
    article, shown = ("the class", given) if isinstance(given, type) else ("a", type(given))
    what = f"{article} {shown.__module__}.{shown.__qualname__}"
    expected = f"redis must be a {kind.__name__}.Redis (or cluster) client or a URL"
    raise PolicyError(f"{expected}, not {what}{remedy and f': {remedy}'}")


# what is easily taken for a client, and what to pass instead
_REMEDIES: tuple[tuple[tuple[type, ...], str], ...] = (
    (
        (
            redis.client.Pipeline,
            redis.client.PubSub,
            redis.cluster.ClusterPipeline,
            redis.asyncio.client.Pipeline,
            redis.asyncio.client.PubSub,
            redis.asyncio.cluster.ClusterPipeline,
        ),
        "pass the client that made it",
    ),
    ((redis.Sentinel, redis.asyncio.Sentinel), "pass its master_for(service)"),
    ((redis.ConnectionPool, redis.asyncio.ConnectionPool), "pass a client with this connection_pool"),
)


def _remedy(given: Any, kind: Kind) -> str:
    """What to do instead of passing this; empty for a client of this kind, and for anything unknown."""
    for types, text in _REMEDIES:
        if isinstance(given, types):
            return text
    if _is_fake(given):
        return "in tests, pass None or the URL of a pybreaker_redis.embedded.EmbeddedServer"
    other = _other(kind)
    if isinstance(given, (other.Redis, other.RedisCluster)):
        return f"use {'AsyncCircuitBreaker' if kind is BLOCKING else 'CircuitBreaker'} for this client"
    return ""


def _is_fake(given: Any) -> bool:
    """Whether this is a mock, or a client that connects to no server, such as one of fakeredis."""
    connection_class = getattr(getattr(given, "connection_pool", None), "connection_class", None)
    if isinstance(given, (redis.Redis, redis.asyncio.Redis)) and connection_class is None:
        return True
    classes = (*type(given).__mro__, *getattr(connection_class, "__mro__", ()))
    return any(one.__module__.partition(".")[0] in ("fakeredis", "unittest", "mock") for one in classes)


def error_of_route(replies: list[Any]) -> Exception | None:
    """The first error that shows a connection to be worse than before. A refusal is no fault of the connection."""
    for reply in replies:
        if isinstance(reply, Exception) and (isinstance(reply, _ASTRAY) or _ASTRAY_TEXTS.search(str(reply))):
            return reply
    return None


def is_cluster(client: Any) -> bool:
    """Whether this is a client of a cluster."""
    return isinstance(client, (redis.RedisCluster, redis.asyncio.RedisCluster, ClusterUrl))


def connection(pool: Any, kind: Kind, timeout: float | None, **options: Any) -> Any:
    """A connection with a pool's options, not yet open, which never repeats a command.

    timeout: seconds to connect and for each reply; None if the caller has its own deadline.
    """
    kwargs = connection_options(pool.connection_kwargs, timeout) | options | {"retry": kind.retry.Retry(NoBackoff(), 0)}
    make = getattr(type(pool), "make_connection", None)
    if make is None or make.__module__.startswith("redis."):
        return pool.connection_class(**kwargs)
    own = copy.copy(pool)  # a pool class of the user's makes its connections itself
    own.connection_kwargs = kwargs
    own.reset()  # the user's pool counts its own connections only
    return own.make_connection()


def limit_of(pool: Any) -> int:
    """How many connections to a pool's target may be open at once: as many as the pool itself allows."""
    limit: int = getattr(pool, "max_connections", _UNLIMITED)
    return MOST_CONNECTIONS if limit >= _UNLIMITED else limit


def patience_after(connecting_took: float, timeout: float) -> float:
    """How long the answer that proves a connection may take: as long as opening another one would. All in seconds."""
    return min(max(connecting_took, SHORTEST_PATIENCE), timeout / 2)


def none_free(limit: int, timeout: float) -> redis.RedisError:
    """The error of a caller that got no connection. It says nothing about the server: that answers the others."""
    return redis.RedisError(f"all {limit} connections that max_connections allows were in use for {timeout:g} s")


def connects_late(timeout: float) -> redis.TimeoutError:
    """The error of a caller that waits no longer for a new connection. It says nothing about those that are open."""
    return redis.TimeoutError(f"connecting takes longer than {timeout:g} s, and goes on in the background")


def connection_options(given: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """A client's connection options, with our deadline and bytes replies, but no retries, checks or event hooks."""
    kwargs = _plain(given)
    for key in ("socket_timeout", "socket_connect_timeout"):
        kwargs[key] = timeout and min(kwargs.get(key) or timeout, timeout)
    return kwargs


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """A client's connection options without retries, checks and event hooks, for bytes replies."""
    dropped = ("retry", "decode_responses", "health_check_interval", "event_dispatcher")
    prefixes = ("retry_on", "maint", "orig_", "oss_cluster", "himport")
    return {key: value for key, value in given.items() if not key.startswith(prefixes) and key not in dropped}


def pool_of(client: Any, kind: Kind, timeout: float) -> Any:
    """The client's pool; for a Sentinel's master, one that asks the Sentinels within our deadline."""
    pool = client.connection_pool
    manager = getattr(pool, "sentinel_manager", None)
    if manager is None:
        return pool
    own = copy.copy(manager)
    # the Sentinels and the master share the deadline: a hanging Sentinel must leave time for the others
    share = timeout / (len(manager.sentinels) + 1)
    own.sentinels = [_impatient(sentinel, kind, share) for sentinel in manager.sentinels]
    kwargs = connection_options(without("connection_pool", pool.connection_kwargs), timeout)
    kwargs["max_connections"] = pool.max_connections
    connect = {"connection_class": pool.connection_class, "is_master": pool.is_master}
    return type(pool)(pool.service_name, own, **kwargs, **connect)


def client_like(given: Any, kind: Kind) -> Any:
    """A client of this kind for the server of a client of either kind, or of a URL.

    Raises PolicyError for anything else, and for a class of connections that is not redis-py's.
    """
    other = _other(kind)
    if isinstance(given, other.RedisCluster):
        return ClusterUrl(known_nodes(given)(), _cluster_options(given, kind))
    if isinstance(given, other.Redis) and not _is_fake(given):
        return kind.Redis(connection_pool=counterpart(given.connection_pool, kind))
    return client_of(given, kind)


def _other(kind: Kind) -> Kind:
    return ASYNCIO if kind is BLOCKING else BLOCKING


def _cluster_options(client: Any, kind: Kind) -> dict[str, Any]:
    """The options of a cluster client's connections that redis.Redis of the other kind takes."""
    given = (client if kind is BLOCKING else client.nodes_manager).connection_kwargs
    known = inspect.signature(kind.Redis).parameters.keys() - _OF_ONE_KIND
    options = {key: value for key, value in _plain(given).items() if key in known and value is not None}
    tls = issubclass(given.get("connection_class", object), (redis.SSLConnection, redis.asyncio.SSLConnection))
    return {**options, "ssl": True} if tls else options


def counterpart(pool: Any, kind: Kind) -> Any:
    """The pool of this kind for the server of a pool of the other kind.

    Raises PolicyError for a class of connections that is not redis-py's.
    """
    other, given = _other(kind), pool.connection_class
    modules = {other.connection.__name__: kind.connection, other.sentinel.__name__: kind.sentinel}
    if given.__module__ not in modules:
        name = f"{given.__module__}.{given.__qualname__}"
        raise PolicyError(f"pass a URL instead of this client: {name} has no counterpart for {kind.__name__}.Redis")
    kwargs = {key: value for key, value in _plain(pool.connection_kwargs).items() if key not in _OF_ONE_KIND}
    kwargs["connection_class"] = getattr(modules[given.__module__], given.__name__)
    kwargs["retry"] = kind.retry.Retry(NoBackoff(), 0)
    manager = getattr(pool, "sentinel_manager", None)
    if manager is None:
        return kind.ConnectionPool(**kwargs)
    sentinel = kind.sentinel.Sentinel([], min_other_sentinels=manager.min_other_sentinels)
    sentinel.sentinels = [client_like(one, kind) for one in manager.sentinels]
    return kind.sentinel.SentinelConnectionPool(pool.service_name, sentinel, is_master=pool.is_master, **kwargs)


def _impatient(client: Any, kind: Kind, timeout: float) -> Any:
    """A copy of a Sentinel's client that tries once, within the timeout in seconds.

    Errors name it by its address: the text by which redis-py 6.1 to 7 shows a client contains the password.
    """
    pool = client.connection_pool
    kwargs = {**connection_options(pool.connection_kwargs, timeout), "connection_class": pool.connection_class}
    address = f"{kwargs.get('host')}:{kwargs.get('port')}"
    named = type(type(client).__name__, (type(client),), {"__repr__": lambda self: address})
    return named(connection_pool=type(pool)(**kwargs, retry=kind.retry.Retry(NoBackoff(), 0)))


def pools_of(client: Any, kind: Kind, timeout: float) -> tuple[Callable[[Any], Any], bool]:
    """A function from a node's address to its pool, for connection(), and whether this is a client of a cluster.

    The function keeps no reference to the client.
    """
    if not is_cluster(client):
        pool = pool_of(client, kind, timeout)
        return lambda address: pool, False
    if isinstance(client, ClusterUrl):
        given = client.options
        return lambda address: kind.Redis(host=address[0], port=address[1], **given).connection_pool, True
    if kind is ASYNCIO:
        options = without("redis_connect_func", client.connection_kwargs)  # it may send READONLY, for replicas
        return lambda address: redis.asyncio.cluster.ClusterNode(*address, **options), True
    manager = client.nodes_manager

    def node_pool(address: Address) -> Any:
        options = without("redis_connect_func", manager.connection_kwargs)
        return manager.create_redis_node(*address, **options).connection_pool

    return node_pool, True


def without(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options except one."""
    return {key: value for key, value in options.items() if key != name}


def known_nodes(client: Any) -> Callable[[], list[Address]]:
    """The nodes of a cluster that its client knows now. The function keeps no reference to the client."""
    if isinstance(client, ClusterUrl):
        nodes = client.nodes
        return lambda: nodes
    manager = client.nodes_manager
    return lambda: [
        (node.host, int(node.port))
        for known in (manager.nodes_cache, manager.startup_nodes)
        for node in list(known.values())
    ]


def remap_of(client: Any) -> Callable[[Address], Address]:
    """The address under which the client's side reaches a node that a cluster names."""
    if isinstance(client, ClusterUrl):
        return lambda address: address
    manager = client.nodes_manager
    return lambda address: manager.remap_host_port(*address)


def address_of(client: Any) -> str:
    """A text that is the same for all clients of the same server: blocking or asyncio, made from a URL or not."""
    if is_cluster(client):
        return repr(sorted(known_nodes(client)()))
    pool = client.connection_pool
    given = {"host": "localhost", "port": 6379, "db": 0, **pool.connection_kwargs}
    sentinels = getattr(pool, "sentinel_manager", None)
    master = sentinels and (pool.service_name, sorted(map(address_of, sentinels.sentinels)))
    return repr([master, *(given.get(key) for key in ("path", "host", "port", "db"))])


def socket_of(connection: Any) -> tuple[Any, Any]:
    """The socket of an open blocking connection, and a reader for its replies; errors are replies, too."""
    reader = hiredis.Reader(
        protocolError=exceptions.InvalidResponse,
        replyError=connection._parser.parse_error,
        notEnoughData=NO_REPLY,
    )
    return connection._sock, reader


class Endpoint(NamedTuple):
    """Where a connection leads. path: of a unix socket; None for TCP."""

    host: str
    port: int
    path: str | None
    database: int
    username: str | None
    tls: bool
    ca_certs: str | None


def endpoint(connection: Any) -> Endpoint:
    """Where an open connection leads, for another program such as redis-cli."""
    return Endpoint(
        host=str(getattr(connection, "host", "localhost")),
        port=int(getattr(connection, "port", 6379)),
        path=getattr(connection, "path", None),
        database=int(connection.db or 0),
        username=connection.username,
        tls=isinstance(connection, redis.SSLConnection),
        ca_certs=getattr(connection, "ca_certs", None),
    )


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """Turn any error of connecting into one of REDIS_ERRORS: a credential provider may raise anything."""
    try:
        yield
    except REDIS_ERRORS:
        raise
    except Exception as error:
        raise redis.ConnectionError(f"connecting failed: {error!r}") from error


def can_read(connection: Any) -> Any:
    """The method of an asyncio connection that tells whether something can be read; redis-py renamed it."""
    return connection.can_read if hasattr(connection, "can_read") else connection.can_read_destructive


# the error codes of a server that serves no breaker now; Redis 6 hides them within the message of a script's error
_SERVER_TEXTS = re.compile(
    r"^(NOAUTH|WRONGPASS|LOADING|BUSY|MASTERDOWN|CLUSTERDOWN)\b|\b(OOM command|READONLY|MISCONF|NOREPLICAS)\b"
)
# refusals of a command, by an ACL or because it was renamed, in the words of Redis 6.2 to 8 and Valkey; not of a key
_REFUSALS = re.compile(
    r"permissions to run the |can't run this command|^unknown command|Unknown (Redis )?command called from"
)
_SERVER_ERRORS = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.InvalidResponse,  # another program listens there
    redis.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterError,
    OSError,
)


def concerns_server(error: BaseException) -> bool:
    """Whether an error is an outage of the server, which no breaker can use now, rather than of one breaker.

    The refusal of a command concerns all breakers of the client, that of a key only one.
    """
    lost = isinstance(error, _SERVER_ERRORS) or _SERVER_TEXTS.search(str(error)) is not None
    return lost or refuses_command(error)


def refuses_command(error: BaseException) -> bool:
    """Whether a server that works refuses a command to every breaker of the client."""
    return _REFUSALS.search(str(error)) is not None


_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (redis.AuthenticationError, "permission"),
    (exceptions.NoPermissionError, "permission"),
    (redis.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (redis.ReadOnlyError, "read_only"),
    (exceptions.OutOfMemoryError, "out_of_memory"),
    (exceptions.ClusterError, "cluster"),
    (exceptions.AskError, "cluster"),
    (redis.BusyLoadingError, "loading"),
    (redis.ConnectionError, "connection"),
    (redis.ResponseError, "response"),
    (OSError, "connection"),
)


def error_kind(error: BaseException) -> str:
    """A short word for an error of Redis, for metrics; never its text."""
    return next((kind for errors, kind in _KINDS if isinstance(error, errors)), "other")
