"""Clients by URL: where each kind of URL leads, and that real servers, Sentinels and clusters answer there."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock, create_autospec

import fakeredis
import pytest
import redis
import redis.asyncio
from conftest import wait_until

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    Policy,
    PolicyError,
)
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.options import BLOCKING, address_of, client_like
from pybreaker_redis.wire.url import ClusterUrl, client_from_url, parse, without_password

NAME = "discovery"


def port(server: EmbeddedServer) -> int:
    """Of a server on TCP."""
    return int(server.url.rpartition(":")[2])


@contextlib.contextmanager
def one_sentinel(folder: pathlib.Path) -> Iterator[str]:
    """A master that one Sentinel watches; the URL."""
    with EmbeddedServer(port=0) as master:
        program = folder / "sentinel"
        (folder / "sentinel.conf").write_text(f"sentinel monitor mymaster 127.0.0.1 {port(master)} 1\n")
        # a sentinel wants its file as first argument
        program.write_text(f'#!/bin/sh\nexec "{EmbeddedServer().binary}" "{program}.conf" --sentinel "$@"\n')
        program.chmod(0o755)
        with EmbeddedServer(str(program), port=0) as sentinel:
            yield f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port(sentinel)}/mymaster/3?socket_timeout=2"


@pytest.mark.parametrize(
    ("url", "kind", "nodes", "options"),
    [
        ("redis://h", "server", [], {"host": "h"}),
        ("redis://me:p%40ss@h:7/3", "server", [], {"username": "me", "password": "p@ss", "port": 7, "db": 3}),
        ("rediss://h?ssl_ca_certs=/ca.pem", "server", [], {"ssl_ca_certs": "/ca.pem"}),
        ("unix://:s@/run/r.sock?db=2", "server", [], {"path": "/run/r.sock", "password": "s", "db": 2}),
        ("redis+sentinel://a,b:7/my/2", "sentinel", [("a", 26379), ("b", 7)], {"db": 2}),
        ("rediss+sentinel://u:p@a/my", "sentinel", [("a", 26379)], {"ssl": True, "username": "u", "password": "p"}),
        ("redis+cluster://:p@a,[::1]:7", "cluster", [("a", 6379), ("::1", 7)], {"password": "p"}),
        ("rediss+cluster://a/0?ssl_check_hostname=no", "cluster", [("a", 6379)], {"ssl_check_hostname": False}),
    ],
)
def test_urls(url: str, kind: str, nodes: list[tuple[str, int]], options: dict[str, Any]) -> None:
    """User, password, database and TLS options of each kind of URL, and a client of the right kind for each."""
    target = parse(url)
    assert (target.kind, target.nodes) == (kind, nodes)
    assert options.items() <= target.options.items()
    for module in (redis, redis.asyncio):
        client = client_from_url(url, module)
        assert isinstance(client, ClusterUrl if kind == "cluster" else module.Redis)


def test_the_same_server() -> None:
    """A URL may leave out what a client names; another database is another server."""
    same = [client_from_url(f"redis://{rest}") for rest in ("localhost", "localhost:6379", "localhost/0")]
    assert {address_of(client) for client in [*same, redis.Redis(), redis.asyncio.Redis()]} == {address_of(same[0])}
    assert address_of(redis.Redis(db=1)) != address_of(same[0])


def test_sentinels_own_options() -> None:
    """What begins with sentinel_ is for the Sentinels alone, TLS for both."""
    target = parse(
        "rediss+sentinel://me:p@a/my?sentinel_username=w&sentinel_password=q&ssl_ca_certs=/ca&socket_timeout=2"
    )
    own = {"ssl": True, "ssl_ca_certs": "/ca", "socket_timeout": 2.0}
    assert target.sentinel_options == {**own, "username": "w", "password": "q"}
    assert target.options == {**own, "username": "me", "password": "p"}


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_a_cluster_client_of_the_other_kind(scheme: str) -> None:
    """A blocking client for the cluster of an asyncio client has its nodes, its user and its TLS."""
    given = redis.asyncio.RedisCluster.from_url(f"{scheme}://me:p@a:7")
    made = client_like(given, BLOCKING)
    assert made.nodes == [("a", 7)]
    assert made.options.get("ssl", False) == (scheme == "rediss")
    assert (made.options["username"], made.options["password"]) == ("me", "p")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://h", "must begin with one of"),
        ("localhost:6379", "must begin with one of"),
        ("redis://h:x", "Port"),
        ("redis+sentinel://h", "must name the Sentinels' service"),
        ("redis+sentinel://h/my/x", "database"),
        ("redis+cluster://h/3", "database 0 only"),
        ("redis+cluster://", "host is missing"),
        ("redis+cluster://a,,b", "host is missing"),
        ("redis://h?sokcet_timeout=1", "sokcet_timeout"),
        ("redis://h?socket_timeout=soon", "socket_timeout"),
        ("redis+sentinel://h/my?sokcet_timeout=1", "sokcet_timeout"),
        ("redis+cluster://h?sokcet_timeout=1", "sokcet_timeout"),
    ],
)
@pytest.mark.parametrize("breaker", [CircuitBreaker, AsyncCircuitBreaker])
def test_refused(url: str, reason: str, breaker: type) -> None:
    """A URL that leads nowhere, or an option that redis-py does not know, is refused at once, not at the first call."""
    with pytest.raises(PolicyError, match=reason):
        breaker(NAME, redis=url)


ANY = [CircuitBreaker, AsyncCircuitBreaker]
IN_TESTS = "in tests, pass None or the URL of a pybreaker_redis.embedded.EmbeddedServer"
PASS_THE_CLIENT = "pass the client that made it"


class WithoutConnections(redis.Redis):
    """A stand-in of somebody's own."""

    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "breakers", "remedy"),
    [
        (fakeredis.FakeRedis, ANY, IN_TESTS),
        (fakeredis.FakeStrictRedis, ANY, IN_TESTS),
        (fakeredis.FakeAsyncRedis, ANY, IN_TESTS),
        (lambda: redis.Redis(connection_pool=fakeredis.FakeRedis().connection_pool), ANY, IN_TESTS),
        (MagicMock, ANY, IN_TESTS),
        (lambda: MagicMock(spec=redis.Redis), ANY, IN_TESTS),
        (lambda: MagicMock(spec=redis.Redis()), ANY, IN_TESTS),
        (lambda: create_autospec(redis.asyncio.RedisCluster, instance=True), ANY, IN_TESTS),
        (WithoutConnections, ANY, IN_TESTS),
        (lambda: redis.Redis().pipeline(), ANY, PASS_THE_CLIENT),
        (lambda: redis.asyncio.Redis().pipeline(), ANY, PASS_THE_CLIENT),
        (lambda: redis.asyncio.RedisCluster("localhost").pipeline(), ANY, PASS_THE_CLIENT),
        (lambda: redis.Redis().pubsub(), ANY, PASS_THE_CLIENT),
        (lambda: redis.asyncio.Redis().pubsub(), ANY, PASS_THE_CLIENT),
        (lambda: redis.Sentinel([]), ANY, r"pass its master_for\(service\)"),
        (lambda: redis.asyncio.Sentinel([]), ANY, r"pass its master_for\(service\)"),
        (redis.ConnectionPool, ANY, "pass a client with this connection_pool"),
        (redis.asyncio.BlockingConnectionPool, ANY, "pass a client with this connection_pool"),
        (redis.asyncio.Redis, [CircuitBreaker], "use AsyncCircuitBreaker for this client"),
        (lambda: redis.asyncio.RedisCluster("localhost"), [CircuitBreaker], "use AsyncCircuitBreaker"),
        (redis.Redis, [AsyncCircuitBreaker], "use CircuitBreaker for this client"),
        (lambda: {"host": "localhost", "password": "secret"}, ANY, "builtins.dict$"),
        (lambda: redis.Redis, ANY, "redis.client.Redis$"),
    ],
)
def test_what_is_no_client(make: Callable[[], Any], breakers: list[Any], remedy: str) -> None:
    """What is no client, or one of the other kind, is refused when the breaker or manager is made, with a remedy."""
    for breaker in breakers:
        manager = CircuitBreakerManager if breaker is CircuitBreaker else AsyncCircuitBreakerManager
        for construct in (lambda of=breaker: of(NAME, redis=make()), lambda of=manager: of.with_redis(redis=make())):
            with pytest.raises(
                PolicyError, match=f"^redis must be a redis.* client or a URL, not (a|the class) .*{remedy}"
            ) as raised:
                construct()
            assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:secret@h:1/2", "redis://me:***@h:1/2"),
        ("redis://:secret@h", "redis://:***@h"),
        ("redis+sentinel://u:secret@a,b/m?sentinel_password=secret&db=1", "redis+sentinel://u:***@a,b/m?sentinel_password=***&db=1"),
        ("unix:///run/r.sock?password=secret", "unix:///run/r.sock?password=***"),
        ("redis://h", "redis://h"),
        ("localhost:6379", "localhost:6379"),
        ("me:secret@localhost", "***@localhost"),
    ],
)  # fmt: skip
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    """A URL as it may stand in a message."""
    assert without_password(url) == shown


def use(url: str) -> None:
    """Both clients read and write there."""
    client = client_from_url(url)
    client.set("a", "1")

    async def look() -> Any:
        other = client_from_url(url, redis.asyncio)
        found = await other.get("a")
        await other.aclose()
        return found

    assert asyncio.run(look()) == b"1"
    client.close()


def check_breakers(url: str) -> None:
    """Both breakers share one state there."""
    policy, name = Policy(failure_threshold=1, reset_timeout=60), f"shared-{secrets.token_hex(4)}"
    breaker = CircuitBreaker(name, redis=url, policy=policy, redis_timeout=20)
    breaker.acquire().failure()
    assert (breaker.snapshot().state, breaker.snapshot().source) == ("open", "redis")
    assert [entry.new for entry in breaker.history()] == ["open"]
    breaker.close()

    async def look() -> None:
        other = AsyncCircuitBreaker(name, redis=url, policy=policy, redis_timeout=20)
        seen = await other.snapshot()
        assert (seen.state, seen.source) == ("open", "redis")
        await other.close()

    asyncio.run(look())


@pytest.mark.parametrize("do", [use, check_breakers])
def test_sentinel(do: Callable[[str], None], tmp_path: pathlib.Path) -> None:
    """The master that the Sentinels name, although the first of them does not answer."""
    with one_sentinel(tmp_path) as url:
        do(url)


def test_a_cluster_by_any_of_its_nodes(cluster_url: str) -> None:
    """One of the named nodes is enough, and none is asked for anything before the first command."""
    breaker = CircuitBreaker("found", redis=cluster_url.replace("://", "://127.0.0.1:1,"))
    wait_until(lambda: breaker.call(int) == 0 and breaker.snapshot().source == "redis")
    breaker.close()


def test_breakers_on_a_cluster(cluster_url: str) -> None:
    """A breaker takes the URL of a cluster."""
    check_breakers(cluster_url)


def test_a_cluster_that_is_not_there_yet() -> None:
    """While no node of a cluster answers, breakers are local; they find the cluster once it is there."""
    number = 65535
    while number > 55535:  # the nodes talk to each other on a port that is 10,000 higher
        with EmbeddedServer(port=0) as free:
            number = port(free)
    breaker = CircuitBreaker("early", redis=f"redis+cluster://127.0.0.1:{number}")
    for _ in range(2):
        assert (breaker.call(int), breaker.snapshot().source) == (0, "local")
    with (
        EmbeddedServer(port=number, args=["--cluster-enabled", "yes"]) as node,
        redis.Redis.from_url(node.url) as direct,
    ):
        direct.execute_command("CLUSTER ADDSLOTS", *range(16384))
        wait_until(lambda: direct.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        wait_until(lambda: breaker.call(int) == 0 and breaker.snapshot().source == "redis")
        breaker.close()
