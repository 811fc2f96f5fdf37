"""A redis-py client for a URL: one server, a socket, a Sentinel's master or a cluster. Connects nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import redis
import redis.retry
import redis.sentinel
from redis.backoff import NoBackoff
from redis.connection import URL_QUERY_ARGUMENT_PARSERS, parse_url

from .._errors import PolicyError

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}


class Target(NamedTuple):
    """Where a URL leads. kind: "server", "sentinel" or "cluster". options: of connections to the server or its master.

    service: the master's name. sentinel_options: of connections to the Sentinels themselves.
    """

    kind: str
    nodes: list[tuple[str, int]]
    options: dict[str, Any]
    service: str = ""
    sentinel_options: dict[str, Any] = {}  # noqa: RUF012 - never changed


class ClusterUrl:
    """A cluster by some of its nodes, and the options of its connections: all that wire.route needs of a client.

    redis-py's cluster clients are not used: the blocking one connects when it is made.
    """

    def __init__(self, nodes: list[tuple[str, int]], options: dict[str, Any]) -> None:
        self.nodes, self.options = nodes, options


def client_from_url(url: str, kind: ModuleType = redis, /, **options: Any) -> Any:
    """A client for a URL: of redis or, if that is the kind, of redis.asyncio. For a cluster, a ClusterUrl.

    options: those of redis.Redis that the URL does not give.

    redis://[[user]:password@]host[:6379][/db][?option=value]        one server; rediss:// for TLS
    unix://[[user]:password@]/path/to/socket[?db=0]                  one server
    redis+sentinel://[[user]:password@]host[:26379][,host...]/service[/db][?sentinel_password=...]
    redis+cluster://[[user]:password@]host[:6379][,host...]          and rediss+sentinel, rediss+cluster for TLS

    Nothing is connected before the first command. Raises PolicyError for another kind of URL.
    """
    target = parse(url, **options)
    if target.kind == "cluster":
        _checked(url, lambda: kind.Redis(**target.options))
        return ClusterUrl(target.nodes, target.options)
    if target.kind == "sentinel":
        own = {"retry": kind.retry.Retry(NoBackoff(), 0), **target.sentinel_options}
        make = kind.sentinel.Sentinel
        return _checked(
            url, lambda: make(target.nodes, sentinel_kwargs=own).master_for(target.service, **target.options)
        )
    return _checked(url, lambda: kind.Redis.from_url(url, **options))


def _checked(url: str, make: Callable[[], Any]) -> Any:
    """Make the client. Its options are checked here, since the first call would otherwise raise TypeError."""
    try:
        client = make()
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError, redis.RedisError) as error:
        raise PolicyError(f"redis must be the URL of a server, not {without_password(url)!r}: {error}") from error
    return client


def parse(url: str, /, **options: Any) -> Target:
    """Where a URL leads. Raises PolicyError, which never shows a password."""
    try:
        parts = urlsplit(url)
    except ValueError:  # its message may show a part of the password
        raise PolicyError(
            "redis must be the URL of a server: this one has a [ or ] out of place; in a password, write %5B and %5D"
        ) from None
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        shown = without_password(url)
        raise PolicyError(f"redis must be the URL of a server, not {shown!r}: it must begin with one of {known}")
    scheme, _, kind = parts.scheme.partition("+")
    try:
        if not kind:
            return Target("server", [], {**options, **parse_url(url)})
        return _parse_many(scheme, kind, parts, options)
    except ValueError as error:
        raise PolicyError(f"redis must be the URL of a server, not {without_password(url)!r}: {error}") from error


def _parse_many(scheme: str, kind: str, parts: Any, options: dict[str, Any]) -> Target:
    credentials, _, hosts = parts.netloc.rpartition("@")
    nodes = [_node(host, _DEFAULT_PORTS[kind]) for host in hosts.split(",")]
    service, _, database = parts.path.strip("/").partition("/")
    if kind == "cluster":
        service, database = "", service
        if database not in ("", "0"):
            raise ValueError(f"a cluster has database 0 only, not {database!r}")
    elif not service:
        raise ValueError("the path must name the Sentinels' service, as in redis+sentinel://host:26379/mymaster")
    if database and not database.isdigit():
        raise ValueError(f"the database must be a number, not {database!r}")
    query = parse_qsl(parts.query)
    own = urlencode([(key, value) for key, value in query if not key.startswith("sentinel_")])
    # redis-py's parser knows the types of the options, but takes one host only: it gets a made-up one
    one = urlunsplit((scheme, f"{credentials}@host" if credentials else "host", f"/{database}", own, ""))
    given = {key: value for key, value in parse_url(one).items() if key not in ("host", "port", "connection_class")}
    if kind == "cluster":
        given.pop("db", None)
    tls = {"ssl": True} if scheme == "rediss" else {}
    types: dict[str, Any] = {f"sentinel_{name}": parser for name, parser in URL_QUERY_ARGUMENT_PARSERS.items()}
    of_sentinels = {
        key.removeprefix("sentinel_"): types.get(key, str)(value) for key, value in query if key.startswith("sentinel_")
    }
    shared = {key: value for key, value in given.items() if key.startswith(("ssl_", "socket_"))}
    given = {**options, **tls, **given}
    return Target(kind, nodes, given, unquote(service), {**tls, **shared, **of_sentinels} if service else {})


def _node(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return parts.hostname, parts.port or default_port


def without_password(url: str) -> str:
    """The URL with its passwords hidden."""
    if "://" not in url:
        return re.sub(r".*@", "***@", url)
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    hidden = [(key, "***" if "password" in key else value) for key, value in parse_qsl(parts.query)]
    shown = f"{parts.scheme}://{user}{colon}{'***' if colon else ''}{at}{hosts}{parts.path}"
    return f"{shown}?{urlencode(hidden, safe='*/')}" if hidden else shown
