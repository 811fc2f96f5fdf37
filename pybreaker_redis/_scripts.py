"""Finds the Lua, composes, loads and calls it; knows no rule of the breaker."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import pathlib
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import NoScriptError
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from . import _protocol
from ._protocol import Keys, Reply, Request

SCRIPTS = ("acquire", "record", "control", "snapshot")


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


class RedisEngine:
    """Calls the scripts for one breaker, each in one round trip with a deadline and no automatic repeat.

    client: a redis-py client, or a URL; it is left as it was, the calls go over connections of their own.
    timeout: seconds to wait for a connection or a reply.
    """

    source = "redis"

    def __init__(self, client: Any, keys: Keys, timeout: float) -> None:
        self._given = client
        self._timeout = timeout
        self._keys = keys
        self._client: Any = None

    def run(self, name: str, request: Request) -> Reply:
        """The reply of the script called name. Raises redis.RedisError or OSError."""
        arguments = (3, *self._keys, _protocol.encode(request))
        client = self._connect()
        try:
            raw = client.execute_command("EVALSHA", sha1(name), *arguments)
        except NoScriptError:
            # EVAL loads and runs in one step, so that a SCRIPT FLUSH cannot come between
            raw = client.execute_command("EVAL", compose(name), *arguments)
        reply = _protocol.decode(raw)
        reply["source"] = self.source
        return reply

    def history(self, count: int) -> list[dict[str, Any]]:
        """The newest transitions, newest first."""
        entries = self._connect().xrevrange(self._keys.history, count=count)
        return [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in entries]

    def after_fork(self) -> None:
        """Nothing: redis-py's pools notice a fork themselves."""

    def _connect(self) -> Any:
        if self._client is None:
            self._client = private_client(self._given, self._timeout)
        return self._client


def private_client(client: Any, timeout: float) -> Any:
    """A client to the same server with pools of its own: a short deadline, no retries, bytes in replies.

    redis-py repeats a command after a time-out by itself, which would count a report twice.
    """
    if isinstance(client, str):
        client = redis.Redis.from_url(client)
    if isinstance(client, RedisCluster):
        return _private_cluster(client, timeout)
    pool = client.connection_pool
    kwargs = _private_kwargs(pool.connection_kwargs, timeout)
    if isinstance(pool, SentinelConnectionPool):
        own: redis.ConnectionPool = SentinelConnectionPool(
            pool.service_name, pool.sentinel_manager, is_master=pool.is_master, **kwargs
        )
        own.connection_class = pool.connection_class
    else:
        own = redis.ConnectionPool(connection_class=pool.connection_class, max_connections=2**16, **kwargs)
    return redis.Redis(connection_pool=own)


def _private_kwargs(given: dict[str, Any], timeout: float) -> dict[str, Any]:
    dropped = ("retry", "connection_pool", "decode_responses", "health_check_interval", "event_dispatcher")
    kwargs = {
        key: value
        for key, value in given.items()
        if not key.startswith(("retry_on", "maint", "orig_", "oss_cluster", "himport")) and key not in dropped
    }
    for key in ("socket_timeout", "socket_connect_timeout"):
        kwargs[key] = min(kwargs.get(key) or timeout, timeout)
    kwargs["retry"] = Retry(NoBackoff(), 0)
    return kwargs


def _private_cluster(client: RedisCluster, timeout: float) -> RedisCluster:
    kwargs = _private_kwargs(client.nodes_manager.connection_kwargs, timeout)
    for key in ("host", "port", "cache", "redis_connect_func"):
        kwargs.pop(key, None)
    nodes = [ClusterNode(node.host, node.port) for node in client.get_nodes()]
    return RedisCluster(startup_nodes=nodes, **kwargs)
