"""The breakers under one prefix: all of them by SCAN and MGET, single ones by their snapshot script."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .. import _protocol
from .._board import Row, masters, name_of, read_keys, read_stored, row_of, scan, urgency
from .._policy import Policy
from .._processes import given_policies, read_processes
from .._protocol import HistoryEntry, Snapshot, keys_of, state_pattern
from .._sync import CircuitBreaker
from ..wire.commands import Command, checked, history, run
from ..wire.options import REDIS_ERRORS, Endpoint, connecting, endpoint, error_kind, is_cluster
from ..wire.sync import Connections, Server

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


class Fleet:
    """All breakers under one prefix of one server or cluster.

    client: a redis-py client.
    policy_of: the policy of a breaker's clients, or None where it is not known.
    timeout: seconds to wait for each answer.
    """

    def __init__(
        self, client: Any, prefix: str, policy_of: Callable[[str], Policy | None], timeout: float = TIMEOUT
    ) -> None:
        self.client, self.server, self.prefix = client, Server.of(client, timeout), prefix
        self.policy_of = policy_of

    def impatient(self, timeout: float) -> Fleet:
        """The same fleet, with so many seconds to wait for each answer."""
        return Fleet(self.client, self.prefix, self.policy_of, timeout)

    @property
    def clustered(self) -> bool:
        """Whether the fleet's keys are spread over a cluster."""
        return is_cluster(self.client)

    @property
    def knows_policies(self) -> bool:
        """Whether the breakers' own policies are known: those of a configuration file."""
        return self.policy_of("") is not None

    def breaker(self, name: str) -> CircuitBreaker:
        """A breaker to steer; it has no lease, so every request goes to Redis at once."""
        return CircuitBreaker(
            name,
            redis=self.client,
            policy=self.policy_of(name),
            prefix=self.prefix,
            lease=0,
            redis_timeout=TIMEOUT,
        )

    def pattern(self) -> str:
        """The pattern of all state keys, for SCAN, and of all channels, for PSUBSCRIBE."""
        return state_pattern(self.prefix)

    def name_of(self, key: bytes) -> str:
        """The name of the breaker with this state key, which is also its channel."""
        return name_of(key, self.prefix)

    def masters(self) -> list[Connections]:
        """The connections to each node that serves keys. Raises OSError when no node lists them."""
        return masters(self.server)

    def ping(self) -> None:
        """Raise an error unless every node answers."""
        for node in self.masters():
            send(node, command("PING"))

    def names(self) -> Iterator[str]:
        """The name of every breaker, perhaps twice."""
        for node in self.masters():
            for keys in scan(node, self.pattern()):
                yield from map(self.name_of, keys)

    def rows(self) -> tuple[list[Row], float]:
        """Every breaker, the most urgent first, and the server's clock in unix seconds."""
        found = [one for chunk in read_stored(self.server, self.prefix) for one in chunk]
        now_ms = found[-1].now_ms if found else round(time.time() * 1000)
        return sorted((row_of(one, self.prefix) for one in found), key=urgency), now_ms / 1000

    def row(self, name: str) -> tuple[Row, float]:
        """One breaker, and the server's clock; a closed one if nothing is stored under its name."""
        key = keys_of(name, self.prefix).state.encode()
        for one in read_keys(self.server, [key]):
            return row_of(one, self.prefix), one.now_ms / 1000
        return Row(name, "closed", key=key), time.time()

    def is_known(self, name: str) -> bool:
        """Whether Redis knows this name: by a document, a history, a policy override, or the list of processes."""
        keys = keys_of(name, self.prefix)
        if any(checked(self.server.exchange([command("EXISTS", key, key=key) for key in keys]))):
            return True
        try:
            return bool(given_policies(read_processes(self.server, self.prefix), name))
        except REDIS_ERRORS as error:
            if error_kind(error) != "permission":
                raise
            return False

    def read(self, name: str) -> Reading:
        """One breaker, by its snapshot script. Raises redis.RedisError or OSError."""
        return self.read_key(keys_of(name, self.prefix).state.encode())

    def read_key(self, key: bytes) -> Reading:
        """The breaker with this state key, by its snapshot script. Raises redis.RedisError or OSError."""
        name, read_at = self.name_of(key), time.monotonic()
        (reply,) = checked(self.server.exchange([run("snapshot", key, _request(self.policy_of(name)))]))
        content = {**_protocol.decode(reply), "source": "redis"}
        return Reading(_protocol.snapshot_from(name, content, self.policy_of(name)), content["exists"], read_at)

    def history(self, key: bytes, count: int) -> list[HistoryEntry]:
        """The last entries in the history of the breaker with this state key. Raises redis.RedisError or OSError."""
        (raw,) = checked(self.server.exchange([history(key, count)]))
        return _protocol.history_entries(_protocol.history_fields(raw))


def _request(policy: Policy | None) -> _protocol.Request:
    given = policy._to_request() if policy else {}
    return {"policy": given} if given else {}


def command(*words: str | bytes, key: str | bytes = b"") -> Command:
    """A command that calls no script. key: decides which node of a cluster gets it."""
    encoded = tuple(word.encode() if isinstance(word, str) else word for word in words)
    return Command(key.encode() if isinstance(key, str) else key, encoded)


def send(node: Connections, *commands: Command) -> list[Any]:
    """The replies of this very node. Raises the first error among them."""
    return checked(node.send(commands))


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
