"""Finds and reads any number of breakers: SCAN for their keys, then a pipeline with one script call for each."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .. import _protocol
from .._policy import Policy
from .._protocol import Snapshot, keys_of, state_pattern
from .._sync import CircuitBreaker
from ..wire.commands import Command
from ..wire.options import Endpoint, connecting, endpoint, error_kind, is_cluster
from ..wire.scripts import sha1
from ..wire.sync import Connections, server_of

SCAN_COUNT = 1000
CHUNK = 500  # script calls in one pipeline: bounds what the client and the server buffer
TIMEOUT = 5.0


class Reading(NamedTuple):
    """One breaker at the time of reading.

    stored: whether Redis has a document for it. read_at: seconds of the monotonic clock.
    """

    snapshot: Snapshot
    stored: bool
    read_at: float

    @property
    def last_change(self) -> float | None:
        """Unix seconds of the last transition, or of the beginning of the document; None if it is not known."""
        seen = self.snapshot
        return seen.changed_at or seen.generation / 1e6 or seen.opened_at

    @property
    def retry_after(self) -> float | None:
        """Seconds from now until a rejected call may be admitted; None where calls are admitted."""
        wait = self.snapshot.retry_after
        return None if wait is None else max(wait - (time.monotonic() - self.read_at), 0.0)


def urgency(reading: Reading) -> tuple[bool, float, str]:
    """A sort key: open and half-open breakers first, then the latest change first."""
    return reading.snapshot.state == "closed", -(reading.last_change or 0.0), reading.snapshot.name


class Fleet:
    """All breakers under one prefix of one server or cluster.

    client: a redis-py client.
    policy_of: the policy by which health and rates are judged, except for fields under a policy override.
    warn: receives a line for each key that cannot be read.
    """

    def __init__(
        self, client: Any, prefix: str, policy_of: Callable[[str], Policy], warn: Callable[[str], object]
    ) -> None:
        self.client, self.server, self.prefix = client, server_of(client, TIMEOUT), prefix
        self._policy_of, self._warn = policy_of, warn

    @property
    def clustered(self) -> bool:
        """Whether the fleet's keys are spread over a cluster."""
        return is_cluster(self.client)

    def breaker(self, name: str) -> CircuitBreaker:
        """A breaker to steer; it has no lease, so every request goes to Redis at once."""
        policy = self._policy_of(name)
        return CircuitBreaker(
            name, redis=self.client, policy=policy, prefix=self.prefix, lease=0, redis_timeout=TIMEOUT
        )

    def pattern(self) -> str:
        """The pattern of all state keys, for SCAN, and of all channels, for PSUBSCRIBE."""
        return state_pattern(self.prefix)

    def name_of(self, key: bytes) -> str:
        """The name of the breaker with this state key, which is also its channel."""
        return key.decode(errors="backslashreplace")[len(self.prefix) + 1 : -len(":state")]

    def masters(self) -> list[Connections]:
        """The connections to each node that serves keys. Raises OSError when no node lists them."""
        found = self.server.masters()
        if not found:
            raise ConnectionError("no node of the cluster lists its slots; a user with ACL rules needs +cluster|slots")
        return found

    def read_all(self) -> Iterator[list[Reading]]:
        """Every breaker once, in chunks; only their keys stay in memory."""
        seen: set[bytes] = set()
        for node in self.masters():
            for found in self.scan(node):
                new = list(dict.fromkeys(key for key in found if key not in seen))  # SCAN may return a key twice
                seen.update(new)
                for start in range(0, len(new), CHUNK):
                    yield [reading for reading in self._read(new[start : start + CHUNK]) if reading.stored]

    def read(self, names: Iterable[str]) -> list[Reading]:
        """The breakers with these names, in this order; those that cannot be read are left out."""
        keys = [keys_of(name, self.prefix).state.encode() for name in names]
        chunks = (keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK))
        return [reading for chunk in chunks for reading in self._read(chunk)]

    def scan(self, node: Connections) -> Iterator[list[bytes]]:
        """The state keys on a node, page by page. A key may come twice."""
        cursor = b"0"
        while True:
            page = command("SCAN", cursor, "MATCH", self.pattern(), "COUNT", str(SCAN_COUNT))
            ((cursor, keys),) = send(node, page)
            yield keys
            if cursor == b"0":
                return

    @contextlib.contextmanager
    def subscribed(self, names: Sequence[str] = ()) -> Iterator[Callable[[float], tuple[bytes, bytes] | None]]:
        """Subscribe to the breakers with these names, or to all, for a `with` block.

        Gives a function that waits for a notification, so many seconds, and returns its channel and content, or None.
        """
        channels = [keys_of(name, self.prefix).state for name in names]
        words = ("SUBSCRIBE", *channels) if channels else ("PSUBSCRIBE", self.pattern())
        connection = _connected(self.server.subscriber())
        try:
            connection.send_command(*words)
            for _ in words[1:]:
                connection.read_response()

            def receive(wait: float) -> tuple[bytes, bytes] | None:
                if not connection.can_read(wait):
                    return None
                kind, *_, channel, content = connection.read_response()
                return (channel, content) if kind in (b"message", b"pmessage") else None

            yield receive
        finally:
            connection.disconnect()

    def _read(self, keys: list[bytes]) -> Iterator[Reading]:
        names = [self.name_of(key) for key in keys]
        read_at = time.monotonic()
        replies = self.server.exchange([self._snapshot(key, name) for key, name in zip(keys, names, strict=True)])
        for key, name, reply in zip(keys, names, replies, strict=True):
            if isinstance(reply, Exception):
                if error_kind(reply) in ("connection", "timeout"):  # the node is lost, with all its keys
                    raise reply
                self._warn(f"{key!r} cannot be read: {reply}")
                continue
            content = {**_protocol.decode(reply), "source": "redis"}
            yield Reading(_protocol.snapshot_from(name, content, self._policy_of(name)), content["exists"], read_at)

    def _snapshot(self, key: bytes, name: str) -> Command:
        # not by run(): a key that another program wrote may not be UTF-8
        keys = (key, *(b"{%b}:%b" % (key, kind) for kind in (b"history", b"policy")))
        words = (b"EVALSHA", sha1("snapshot").encode(), b"3", *keys, _request(self._policy_of(name)))
        return Command(key, words, "snapshot")


@functools.lru_cache
def _request(policy: Policy) -> bytes:
    given = policy.to_request()
    return _protocol.encode({"policy": given} if given else {})


def command(*words: str | bytes, key: str | bytes = b"") -> Command:
    """A command that calls no script. key: decides which node of a cluster gets it."""
    encoded = tuple(word.encode() if isinstance(word, str) else word for word in words)
    return Command(key.encode() if isinstance(key, str) else key, encoded)


def send(node: Connections, *commands: Command) -> list[Any]:
    """The replies of this very node. Raises the first error among them."""
    return checked(node.send(commands))


def checked(replies: list[Any]) -> list[Any]:
    """The replies. Raises the first error among them."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def place_of(node: Connections) -> Endpoint:
    """Where a node is. Connects, since a Sentinel names its master only then."""
    connection = _connected(node.connection())
    try:
        return endpoint(connection)
    finally:
        connection.disconnect()


def _connected(connection: Any) -> Any:
    with connecting():
        connection.connect()
    return connection


def redis_cli(fleet: Fleet) -> list[str]:
    """The words that start redis-cli for the fleet's server. The password is left to REDISCLI_AUTH."""
    place = place_of(fleet.masters()[0])
    words = ["redis-cli", *(["-s", place.path] if place.path else ["-h", place.host, "-p", str(place.port)])]
    if place.username:
        words += ["--user", place.username]
    if place.database:
        words += ["-n", str(place.database)]
    if place.tls:
        words += ["--tls", *(["--cacert", place.ca_certs] if place.ca_certs else [])]
    return [*words, "-c"] if fleet.clustered else words
