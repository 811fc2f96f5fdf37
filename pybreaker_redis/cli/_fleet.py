"""Reads any number of breakers: SCAN for their names, one pipelined script call for each, node by node of a cluster."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import redis
from redis.exceptions import NoScriptError

from .. import _protocol
from .._policy import Policy
from .._protocol import Keys, Snapshot, keys_of
from .._scripts import compose, sha1
from .._sync import CircuitBreaker

SCAN_COUNT = 1000
CHUNK = 500  # script calls in one pipeline: bounds what either side keeps
TIMEOUT = 5.0


class Row(NamedTuple):
    """One breaker as it is now. stored: whether Redis has anything of it. read_at: on the monotonic clock."""

    snapshot: Snapshot
    stored: bool
    read_at: float

    @property
    def last_change(self) -> float | None:
        """Unix seconds: a generation is the time at which it began, in milliseconds."""
        if self.snapshot.generation:
            return self.snapshot.generation / 1000
        return float(self.snapshot.opened_at) if self.snapshot.opened_at else None

    @property
    def retry_after(self) -> float | None:
        """Seconds from now."""
        wait = self.snapshot.retry_after
        return None if wait is None else max(wait - (time.monotonic() - self.read_at), 0.0)


def urgency(row: Row) -> tuple[bool, float, str]:
    """To sort by: what is not closed first, then what changed last."""
    return row.snapshot.state == "closed", -(row.last_change or 0.0), row.snapshot.name


class Fleet:
    """All breakers under one prefix of one server or cluster.

    policy_of: by which health and rates of a breaker are reckoned, where nobody has overruled it for the fleet.
    warn: is told of a key that cannot be read.
    """

    def __init__(
        self, client: Any, prefix: str, policy_of: Callable[[str], Policy], warn: Callable[[str], object]
    ) -> None:
        self.client, self.prefix = client, prefix
        self._policy_of, self._warn = policy_of, warn

    @property
    def clustered(self) -> bool:
        """Whether it is spread over a cluster."""
        return isinstance(self.client, redis.RedisCluster)

    def breaker(self, name: str) -> CircuitBreaker:
        """One of them, to be steered: every request is sent at once."""
        policy = self._policy_of(name)
        return CircuitBreaker(
            name, redis=self.client, policy=policy, prefix=self.prefix, lease=0, redis_timeout=TIMEOUT
        )

    def pattern(self, name: str | None = None) -> str:
        """What SCAN and PSUBSCRIBE match by: one breaker, or all of them."""
        escaped = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in self.prefix)
        return f"{escaped}:*:state"

    def name_of(self, key: bytes) -> str:
        """The breaker whose state key, and channel, this is."""
        return key.decode(errors="backslashreplace")[len(self.prefix) + 1 : -len(":state")]

    def rows(self) -> Iterator[list[Row]]:
        """Every breaker once, in chunks; nothing but their names is kept."""
        seen: set[bytes] = set()
        for node in self.nodes():
            cursor = -1
            while cursor:
                cursor, found = node.scan(max(cursor, 0), match=self.pattern(), count=SCAN_COUNT)
                new = list(dict.fromkeys(key for key in found if key not in seen))  # SCAN may tell a key twice
                seen.update(new)
                for start in range(0, len(new), CHUNK):
                    yield [row for row in self._read(node, new[start : start + CHUNK]) if row.stored]

    def read(self, names: Iterable[str]) -> list[Row]:
        """These breakers, in their order."""
        keys = [keys_of(name, self.prefix).state.encode() for name in names]
        if not self.clustered:
            return [
                row
                for start in range(0, len(keys), CHUNK)
                for row in self._read(self.client, keys[start : start + CHUNK])
            ]
        return [row for key in keys for row in self._read(self.node_of(key), [key])]

    def nodes(self) -> list[Any]:
        """A client for each master."""
        self.client.time()  # a server that cannot save refuses PING
        if not self.clustered:
            return [self.client]
        return [self.client.get_redis_connection(node) for node in self.client.get_primaries()]

    def node_of(self, key: bytes) -> Any:
        """The client for the master that has a key."""
        if not self.clustered:
            return self.client
        self.client.time()
        return self.client.get_redis_connection(self.client.get_node_from_key(key))

    def _read(self, node: Any, keys: list[bytes]) -> Iterator[Row]:
        read_at = time.monotonic()
        replies = self._call(node, keys)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            node.script_load(compose("snapshot"))
            replies = self._call(node, keys)
        for key, reply in zip(keys, replies, strict=True):
            name = self.name_of(key)
            if isinstance(reply, Exception):
                self._warn(f"{key!r} cannot be read: {reply}")
                continue
            content = {**_protocol.decode(reply), "source": "redis"}
            yield Row(_protocol.snapshot_from(name, content, self._policy_of(name)), content["exists"], read_at)

    def _call(self, node: Any, keys: list[bytes]) -> list[Any]:
        pipeline = node.pipeline(transaction=False)
        for key in keys:
            body = _body(self._policy_of(self.name_of(key)))
            others = (b"{%b}:%b" % (key, kind) for kind in (b"history", b"policy"))
            pipeline.execute_command("EVALSHA", sha1("snapshot"), 3, key, *others, body)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies


@functools.lru_cache
def _body(policy: Policy) -> bytes:
    given = policy.to_request()
    return _protocol.encode({"policy": given} if given else {})


def redis_cli(fleet: Fleet, keys: Keys) -> list[str]:
    """The words that call redis-cli for the server of a breaker; no password, which it takes from REDISCLI_AUTH."""
    node = fleet.node_of(keys.state.encode())
    options = node.connection_pool.connection_kwargs
    words = ["redis-cli"]
    if "path" in options:
        words += ["-s", str(options["path"])]
    else:
        host, port = _address(node, options)
        words += ["-h", host, "-p", str(port)]
    if options.get("username"):
        words += ["--user", str(options["username"])]
    if options.get("db"):
        words += ["-n", str(options["db"])]
    if "ssl" in node.connection_pool.connection_class.__name__.lower():
        words += ["--tls", *(["--cacert", options["ssl_ca_certs"]] if options.get("ssl_ca_certs") else [])]
    return [*words, "-c"] if fleet.clustered else words


def _address(node: Any, options: dict[str, Any]) -> tuple[str, int]:
    manager = getattr(node.connection_pool, "get_master_address", None)  # of a Sentinel
    if manager is not None:
        host, port = manager()
        return str(host), int(port)
    return str(options.get("host", "localhost")), int(options.get("port", 6379))
