"""Each process lists itself in its fleet, once a minute, with an exchange that takes place anyway."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import json
import logging
import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import redis
from conftest import stopped, wait_until
from fault_servers import cluster
from process_jobs import FORKS

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitBreakerManager, Config, Policy, PolicyError
from pybreaker_redis._processes import Process, disagreements, given_policies, read_processes
from pybreaker_redis.config import load
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import listing, options
from pybreaker_redis.wire.options import BLOCKING, client_of
from pybreaker_redis.wire.sync import Server

KEY = "circuit_breaker:fleet"
LEASE = 0.02
PATIENT: dict[str, Any] = {"lease": LEASE, "redis_timeout": 20.0}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is listed with its first exchange; each test has a process, as far as its link is concerned."""
    monkeypatch.setattr(listing, "FIRST", (0.0, 0.0))
    monkeypatch.setattr(options, "_by_url", weakref.WeakValueDictionary())


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed with every exchange."""
    monkeypatch.setattr(listing, "EVERY", (0.0, 0.0))


def entries(client: Any, key: str = KEY) -> list[dict[str, Any]]:
    """What is stored."""
    return [json.loads(entry) for entry in client.hgetall(key).values()]


def processes(url: str, prefix: str = "circuit_breaker") -> list[Process]:
    """What a reader makes of it."""
    return read_processes(Server.of(client_of(url, BLOCKING), 20.0), prefix)


def commands(client: redis.Redis, name: str = "hset") -> int:
    """How often the server has run a command."""
    return int(client.info("commandstats").get(f"cmdstat_{name}", {"calls": 0})["calls"])


async def fine() -> int:
    return 1


def call_sync(url: str, names: list[str], until: Callable[[], Any], **options: Any) -> None:
    """Calls of each breaker until a condition holds."""
    breakers = [CircuitBreaker(name, redis=url, **PATIENT, **options) for name in names]
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline
        for breaker in breakers:
            breaker.call(int)
        time.sleep(LEASE)


def call_async(url: str, names: list[str], until: Callable[[], Any], **options: Any) -> None:
    """The same on asyncio."""

    async def run() -> None:
        breakers = [AsyncCircuitBreaker(name, redis=url, **PATIENT, **options) for name in names]
        deadline = time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline
            for breaker in breakers:
                await breaker.call(fine)
            await asyncio.sleep(LEASE)

    asyncio.run(run())


Call = Callable[..., None]
both_shells = pytest.mark.parametrize("call", [call_sync, call_async], ids=["sync", "asyncio"])


@both_shells
def test_an_entry(server: EmbeddedServer, client: redis.Redis, call: Call) -> None:
    """It names host, process, version and the breakers by their policies, and expires."""
    policy = Policy(failure_threshold=3, window=30.0)
    call(server.url, ["a"], lambda: client.exists(KEY), policy=policy, host="web-1")
    (entry,) = entries(client)
    seconds, microseconds = client.time()
    assert 0 <= seconds * 1000 + microseconds // 1000 - entry.pop("seen_ms") < 60_000
    assert entry.pop("version")
    policies = [{"policy": {"failure_threshold": 3, "window": 30.0}, "breakers": 1, "names": ["a"]}]
    assert entry == {"host": "web-1", "pid": os.getpid(), "breakers": 1, "policies": policies}
    assert 0 < client.pttl(KEY) <= 600_000


@both_shells
def test_once_a_minute(server: EmbeddedServer, client: redis.Redis, call: Call) -> None:
    """However many exchanges there are, and however many breakers."""
    client.config_resetstat()
    names = [f"s{number}" for number in range(20)]
    call(server.url, names, lambda: commands(client) and commands(client, "mget") > 20)
    assert commands(client) == 1
    assert client.hlen(KEY) == 1


def test_a_short_process_is_not_listed(
    server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second passes before the first entry, so a process of one call leaves none, and no first call is longer."""
    monkeypatch.setattr(listing, "FIRST", (1.0, 2.0))
    breaker = CircuitBreaker("a", redis=server.url, **PATIENT)
    breaker.call(int)
    assert not client.exists(KEY)

    def is_listed() -> bool:
        breaker.call(int)
        return bool(client.exists(KEY))

    wait_until(is_listed)


def test_it_rides_along(server: EmbeddedServer, client: redis.Redis, often: None) -> None:
    """There is no listing without a refresh: breakers of lease=0 and idle processes send none."""
    strict = CircuitBreaker("strict", redis=server.url, lease=0, redis_timeout=20.0)
    for _ in range(5):
        strict.call(int)
    assert not client.exists(KEY)
    breaker = CircuitBreaker("a", redis=server.url, **PATIENT)
    breaker.call(int)
    wait_until(lambda: client.exists(KEY))

    def is_quiet() -> bool:
        before = commands(client)
        time.sleep(10 * LEASE)
        return commands(client) == before

    wait_until(is_quiet)
    client.delete(KEY)
    time.sleep(20 * LEASE)
    assert not client.exists(KEY)
    breaker.call(int)
    wait_until(lambda: client.exists(KEY))


def test_breakers_that_are_idle_or_gone(server: EmbeddedServer, client: redis.Redis, often: None) -> None:
    """A breaker stays listed while it exists, even if it is not refreshed any more; one that is freed does not."""
    breakers = [CircuitBreaker(name, redis=server.url, **PATIENT) for name in "abc"]
    for breaker in breakers:
        breaker.call(int)
    breakers[0]._redis.link.leave(breakers[0]._line)  # as after ten seconds without a call

    def names() -> set[str]:
        gc.collect()
        breakers[-1].call(int)
        return {name for entry in entries(client) for one in entry["policies"] for name in one["names"]}

    wait_until(lambda: names() == {"a", "b", "c"})
    del breakers[1], breaker
    wait_until(lambda: names() == {"a", "c"})


def test_off_by_option(server: EmbeddedServer, client: redis.Redis) -> None:
    """listed=False keeps a breaker out; a manager takes the option from its configuration."""
    client.config_resetstat()
    call_sync(server.url, ["secret"], lambda: commands(client, "mget") > 5, listed=False)
    assert not client.exists(KEY)
    for listed in (False, True):
        given = {"circuit_breaker": {"listed": listed, "lease": LEASE}, "redis": {"url": server.url}}
        with CircuitBreakerManager.with_redis(load(given)) as manager:
            before = commands(client, "mget")
            wait_until(
                lambda manager=manager, before=before: [manager.call("a", int), commands(client, "mget") > before + 5][
                    1
                ]
            )
        assert client.exists(KEY) == listed


@pytest.mark.parametrize("value", [None, 1, "no"])
def test_an_option_that_makes_no_sense(value: Any) -> None:
    """Only True and False are taken, and the error names the value."""
    for make in (lambda: CircuitBreaker("a", listed=value), lambda: Config(listed=value)):
        with pytest.raises(PolicyError, match=rf"listed must be True or False, not {value!r}"):
            make()


def test_one_hash_per_prefix(server: EmbeddedServer, client: redis.Redis, often: None) -> None:
    """The breakers of each prefix are listed in its own hash."""
    one, other = (CircuitBreaker(f"of-{prefix}", redis=server.url, prefix=prefix, **PATIENT) for prefix in ("x", "y"))
    for breaker in (one, other, one, other):
        breaker.call(int)
    wait_until(lambda: [one.call(int), client.exists("y:fleet")][1])
    for prefix in ("x", "y"):
        (process,) = processes(server.url, prefix)
        assert process.policies[0].names == {f"of-{prefix}"}


def test_many_breakers(server: EmbeddedServer, client: redis.Redis, often: None) -> None:
    """The size of an entry is bounded; it counts all breakers, and names those of the rarest policy first."""
    common = [CircuitBreaker(f"tenant-{number}-{'x' * 40}", redis=server.url, **PATIENT) for number in range(150)]
    rare = CircuitBreaker("the-exception", redis=server.url, policy=Policy(quorum=2), **PATIENT)
    for breaker in (*common, rare):
        breaker.call(int)
    wait_until(lambda: [rare.call(int), any(one["breakers"] == 151 for one in entries(client))][1])
    (process,) = processes(server.url)
    first, second = process.policies
    assert (first.fields, first.breakers, second.fields, second.breakers) == ({}, 150, {"quorum": 2}, 1)
    assert second.names == {"the-exception"}
    assert 10 < len(first.names) < 150
    assert client.hstrlen(KEY, client.hkeys(KEY)[0]) <= listing.ROOM + len('"seen_ms":1700000000000,')


def test_many_prefixes_and_hosts(server: EmbeddedServer, client: redis.Redis, often: None) -> None:
    """A process has an entry for each prefix and host, but no more than ten."""

    def listed_prefixes() -> int:
        for breaker in breakers:
            breaker.call(int)
        return len(client.keys("p*:fleet"))

    breakers = [CircuitBreaker("a", redis=server.url, prefix=f"p{number}", **PATIENT) for number in range(15)]
    wait_until(lambda: listed_prefixes() == listing.MOST_ENTRIES)
    two = [CircuitBreaker("a", redis=server.url, prefix="two", host=host, **PATIENT) for host in ("x", "y")]
    breakers.clear()
    gc.collect()

    def hosts() -> set[str]:
        for one in two:
            one.call(int)
        return {entry["host"] for entry in entries(client, "two:fleet")}

    wait_until(lambda: hosts() == {"x", "y"})


@pytest.mark.parametrize("policies", [1, 30, 20_000])
def test_twenty_thousand_breakers(client: redis.Redis, policies: int) -> None:
    """Whatever their policies, Redis takes the entry: names, and then policies, are left out."""
    given = [Policy(failure_threshold=10 + number) for number in range(policies)]
    breakers = [
        CircuitBreaker(f'té"nant-{number}' * 20, redis=client, policy=given[number % policies], host="\\" * 200)
        for number in range(20_000)
    ]
    (command,) = listing.Listing().commands([breaker._line for breaker in breakers], time.monotonic())
    assert client.execute_command("EVAL", *command.loading().words[1:]) == 1
    (entry,) = entries(client)
    assert entry["breakers"] == 20_000
    assert len(entry["policies"]) == min(policies, len(entry["policies"]))
    assert entry["policies"]


# Interleavings: tests/races/README.md


@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS)
def test_a_child_lists_itself(
    server: EmbeddedServer, client: redis.Redis, often: None, fork: Callable[[], int]
) -> None:
    """It has an entry of its own, with the breakers that it uses; that of its parent stays."""
    used, unused = (CircuitBreaker(name, redis=server.url, **PATIENT) for name in ("both", "parents"))
    wait_until(lambda: [used.call(int), unused.call(int), client.exists(KEY)][2])
    child = fork()
    if child == 0:
        try:
            deadline, own_client = time.monotonic() + 30, redis.Redis.from_url(server.url)
            while own_client.hlen(KEY) < 2 and time.monotonic() < deadline:
                used.call(int)
                time.sleep(LEASE)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found = {entry["pid"]: {name for one in entry["policies"] for name in one["names"]} for entry in entries(client)}
    assert found.keys() == {os.getpid(), child}
    assert found[child] == {"both"}
    assert found[os.getpid()] == {"both", "parents"}


def test_loops_of_one_call_each(server: EmbeddedServer, client: redis.Redis) -> None:
    """Loops that end while an exchange begins do not lose the entry for a minute."""

    async def once(breaker: AsyncCircuitBreaker) -> None:
        await breaker.call(fine)

    breaker = AsyncCircuitBreaker("a", redis=server.url, **PATIENT)

    def is_listed() -> bool:
        asyncio.run(once(breaker))
        return bool(client.exists(KEY))

    wait_until(is_listed)
    assert client.hlen(KEY) == 1


def test_two_loops_at_once(server: EmbeddedServer, client: redis.Redis, often: None) -> None:
    """Both may find the entry due: it is one field, so the process is listed once."""
    breaker = AsyncCircuitBreaker("a", redis=server.url, **PATIENT)
    client.config_resetstat()

    async def calls() -> None:
        deadline = time.monotonic() + 30
        while commands(client) < 20:
            assert time.monotonic() < deadline
            await asyncio.gather(*(breaker.call(fine) for _ in range(5)))
            await asyncio.sleep(LEASE)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(asyncio.run, calls()) for _ in range(2)]:
            done.result(60)
    assert client.hlen(KEY) == 1


@pytest.mark.parametrize("how", ["acl", "type"])
@both_shells
def test_a_refusal_is_no_outage(
    own_server: EmbeddedServer, often: None, caplog: pytest.LogCaptureFixture, call: Call, how: str
) -> None:
    """A user who may not write the hash, or a key of another type: the breakers go on, and it is said once."""
    caplog.set_level(logging.INFO, "pybreaker_redis")
    url, kinds = own_server.url, []
    with redis.Redis.from_url(own_server.url) as admin:
        if how == "acl":
            admin.execute_command("ACL", "SETUSER", "breaker", "on", ">pw", "~*", "&*", "+@all", "-hset")
            url = url.replace("unix://", "unix://breaker:pw@")
        else:
            admin.set(KEY, "of another program")
        listeners = [lambda event: kinds.append(event.kind)]
        call(url, ["a", "b"], lambda: commands(admin, "evalsha") > 10, listeners=listeners)
        assert kinds == []
        assert admin.exists("circuit_breaker:a:state", "circuit_breaker:b:state") == 2
    refusals = [one.getMessage() for one in caplog.records if "refuses to list" in one.getMessage()]
    assert len(refusals) == 1
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_scripts_that_are_flushed(server: EmbeddedServer, client: redis.Redis, often: None) -> None:
    """The script is loaded again by its next call, in the same exchange."""
    breaker = CircuitBreaker("a", redis=server.url, **PATIENT)
    breaker.call(int)
    client.flushall()
    client.script_flush()
    wait_until(lambda: [breaker.call(int), client.hlen(KEY) == 1][1])


def test_a_server_that_hangs(own_server: EmbeddedServer, often: None) -> None:
    """The outage is that of the reports; afterwards the process is listed again."""
    breaker = CircuitBreaker("a", redis=own_server.url, lease=LEASE, redis_timeout=0.1)
    with redis.Redis.from_url(own_server.url) as admin:
        wait_until(lambda: [breaker.call(int), admin.exists(KEY)][1])
        admin.delete(KEY)
        with stopped(own_server):
            wait_until(lambda: [breaker.call(int), breaker.snapshot().source == "local"][1])
        wait_until(lambda: [breaker.call(int), admin.exists(KEY)][1])


@both_shells
def test_a_cluster(cluster_url: str, call: Call, often: None) -> None:
    """The hash is on one node, whichever nodes have the breakers."""
    with redis.RedisCluster.from_url(cluster_url.replace("redis+cluster", "redis")) as client:
        client.flushall(target_nodes="primaries")
        call(cluster_url, [f"s{number}" for number in range(9)], lambda: client.exists(KEY))
    found = processes(cluster_url)
    assert {process.pid for process in found} == {os.getpid()}


def test_a_node_that_has_only_the_list(often: None) -> None:
    """The node of the hash hangs: breakers on other nodes go on with Redis, without an outage."""
    with cluster("--cluster-node-timeout", "60000") as formed:  # no failover, which would be an outage of its own
        home, kinds = formed.owner(KEY), []
        name = next(name for name in map(str, range(100)) if formed.owner(f"circuit_breaker:{name}:state") != home)
        options = {"lease": LEASE, "redis_timeout": 1.0, "listeners": [lambda event: kinds.append(event.kind)]}
        breaker = CircuitBreaker(name, redis=formed.client(), **options)
        wait_until(lambda: [breaker.call(int), formed.client().exists(KEY)][1])
        os.kill(formed.nodes[home].pid, signal.SIGSTOP)
        try:
            for _ in range(5):
                breaker.call(int)
            assert breaker.snapshot().source == "redis"
        finally:
            os.kill(formed.nodes[home].pid, signal.SIGCONT)
        assert kinds == []


# Readers


def test_processes_that_disagree(client: redis.Redis, server: EmbeddedServer) -> None:
    """A reader finds the breakers to which processes gave different policies, and passes over what makes no sense."""

    def entry(pid: int, *policies: tuple[dict[str, Any], list[str]]) -> str:
        listed = [{"policy": fields, "breakers": len(names), "names": names} for fields, names in policies]
        whole = {"seen_ms": 1000 * pid, "host": "web", "pid": pid, "version": "1", "breakers": 2, "policies": listed}
        return json.dumps(whole)

    three, four = {"failure_threshold": 3}, {"failure_threshold": 4}
    client.hset(KEY, "web:1-a", entry(1, (three, ["same", "other"])))
    client.hset(KEY, "web:2-b", entry(2, (three, ["same"]), (four, ["other"])))
    client.hset(KEY, "web:3-c", entry(3, (three, ["same", "other"])))
    for number, text in enumerate(
        [b"", b"\xff", b"[]", b"{}", b'{"seen_ms":1}', b"[" * 100_000, entry(9).encode()[:-3]]
    ):
        client.hset(KEY, f"odd-{number}", text)
    found = processes(server.url)
    assert sorted(process.pid for process in found) == [1, 2, 3]
    ((name, given),) = disagreements(found)
    assert name == "other"
    assert [(one.fields, sorted(process.pid for process in one.processes)) for one in given] == [
        (three, [1, 3]),
        (four, [2]),
    ]
    assert [one.fields for one in given_policies(found, "same")] == [three]
    assert given_policies(found, "unknown") == []


def test_one_policy_in_other_words(client: redis.Redis, server: EmbeddedServer) -> None:
    """Policies that the scripts cannot tell apart are one: 10 and 10.0 seconds, and what is left out or the default."""
    policies: list[dict[str, Any]] = [
        {"reset_timeout": 10, "jitter": 1},
        {"reset_timeout": 10.0, "jitter": 1.0, "window": 60, "slow_call_duration": None},
        {"reset_timeout": 10.0001, "jitter": 1.0, "failure_threshold": 5, "of_another_version": 1},
    ]
    for pid, fields in enumerate(policies):
        given = [{"policy": fields, "breakers": 1, "names": ["search"]}]
        whole = {"seen_ms": 1, "host": "web", "pid": pid, "version": "1", "breakers": 1, "policies": given}
        client.hset(KEY, f"web:{pid}-a", json.dumps(whole))
    found = processes(server.url)
    assert list(disagreements(found)) == []
    ((fields, who),) = given_policies(found, "search")
    assert (fields, len(who)) == ({"reset_timeout": 10, "jitter": 1}, 3)
