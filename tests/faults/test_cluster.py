"""A cluster and a Sentinel set-up that lose a master or move a slot, under the load of two processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import wait_until
from fault_load import TIMEOUT, Loads, check_bounded, check_shared_again, loads, shared
from fault_servers import Cluster, Sentinels, cluster, sentinels
from invariants import check_histories
from redis.crc import key_slot
from redis.exceptions import ClusterDownError, MovedError

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Policy
from pybreaker_redis._protocol import NotSent
from pybreaker_redis.wire.commands import Command
from pybreaker_redis.wire.route import Exchange, Routes
from pybreaker_redis.wire.url import client_from_url

NAME = "loaded"
STATE = f"circuit_breaker:{NAME}:state"
SLOT = key_slot(STATE.encode())


@pytest.fixture(scope="module")
def healthy() -> Iterator[Cluster]:
    """A cluster for the tests that leave its nodes alive."""
    with cluster() as formed:
        yield formed
        assert check_histories(formed.client()) > 0


def check_failover(running: Loads, lose_it: Any) -> None:
    """A master is lost: no surprise, bounded waits, and all are shared again on the new one, without a restart."""
    running.until(shared)
    running.say("phase")
    lose_it()
    running.until(lambda books: books["events"].get("redis_error"))
    for books in running.until(lambda books: books["source"] == "redis" and books["events"].get("redis_restored"), 30):
        check_bounded(books, 3)  # a fail-over may be met as more than one outage
    check_shared_again(running)
    running.check_no_surprise()


# Cluster ----------------------------------------------------------------------------------------


def test_breakers_spread_over_the_cluster(healthy: Cluster) -> None:
    """Breakers whose names hash to different masters work through one client, and both kinds share their state."""
    with healthy.client() as client:
        owners = set()
        for number in range(12):
            breaker = CircuitBreaker(f"spread-{number}", redis=client, policy=Policy(failure_threshold=1))
            breaker.acquire().failure()
            assert (breaker.snapshot().state, breaker.snapshot().source) == ("open", "redis")
            assert [entry.new for entry in breaker.history()] == ["open"]
            owners.add(healthy.owner(breaker.keys.state))
        assert owners == {0, 1, 2}


def test_asyncio_client_that_is_not_connected_yet(healthy: Cluster) -> None:
    """An asyncio cluster client needs no command before it is given to a breaker."""

    async def use() -> tuple[str, str]:
        client = redis.asyncio.RedisCluster("127.0.0.1", healthy.port(0))
        breaker = AsyncCircuitBreaker("fresh", redis=client, policy=Policy(failure_threshold=1), redis_timeout=10)
        await (await breaker.acquire()).failure()
        seen = await breaker.snapshot()
        assert [entry.new for entry in await breaker.history()] == ["open"]
        await breaker.close()
        await client.aclose()
        return seen.state, seen.source

    assert asyncio.run(use()) == ("open", "redis")


def move_slot(formed: Cluster, source: int, target: int, *, stop_before_end: Any = None) -> None:
    """Migrates the slot of this file's breaker with its keys, as redis-cli --cluster reshard does it."""
    one, other = formed.clients[source], formed.clients[target]
    one_id, other_id = formed.id(source), formed.id(target)
    other.execute_command("CLUSTER SETSLOT", SLOT, "IMPORTING", one_id)
    one.execute_command("CLUSTER SETSLOT", SLOT, "MIGRATING", other_id)
    if stop_before_end:
        stop_before_end("begun")
    keys = one.execute_command("CLUSTER GETKEYSINSLOT", SLOT, 100)
    for number, key in enumerate(keys):
        one.execute_command("MIGRATE", "127.0.0.1", formed.port(target), key, 0, 5000, "REPLACE")
        if stop_before_end and number == 0:
            stop_before_end("torn")
    if stop_before_end:
        stop_before_end("moved")
    for client in (other, one, *formed.clients[:3]):
        client.execute_command("CLUSTER SETSLOT", SLOT, "NODE", other_id)


def test_slot_moves(healthy: Cluster) -> None:
    """A slot that migrates (ASK, TRYAGAIN, MOVED) is at most a short outage, and the state goes along."""
    source = healthy.owner(STATE)
    with loads(cluster=("127.0.0.1", healthy.port(0)), name=NAME) as running:
        running.until(shared)
        CircuitBreaker(NAME, redis=healthy.client(), redis_timeout=10).force_closed(60)  # makes a history key as well
        CircuitBreaker(NAME, redis=healthy.client(), redis_timeout=10).clear_forced()
        running.say("phase")
        for number in range(2):
            place = (source + number) % 3, (source + number + 1) % 3
            move_slot(healthy, *place, stop_before_end=lambda step: time.sleep(0.3))
            for books in running.until(shared):
                check_bounded(books)
        check_shared_again(running)
        running.check_no_surprise()


def test_state_goes_along_with_its_slot(healthy: Cluster) -> None:
    """Open before its slot moves is open after it. While its keys are torn apart (TRYAGAIN) the process is local."""
    breaker = CircuitBreaker(
        NAME, redis=healthy.client(), policy=Policy(failure_threshold=1, reset_timeout=3600), redis_timeout=10, lease=0
    )
    breaker.reset()
    breaker.acquire().failure()
    generation, source = breaker.snapshot().generation, serving(healthy)

    def look(step: str) -> None:
        assert (breaker.snapshot().state, breaker.snapshot().source) == ("open", "local")

    move_slot(healthy, source, (source + 1) % 3, stop_before_end=look)
    wait_until(lambda: breaker.snapshot().source == "redis")
    assert (breaker.snapshot().state, breaker.snapshot().generation) == ("open", generation)
    breaker.reset()


def test_ask_is_followed(healthy: Cluster) -> None:
    """When all keys of a breaker have moved, but not yet their slot, ASK leads to them, and only for that request."""
    breaker = CircuitBreaker(
        NAME, redis=healthy.client(), policy=Policy(failure_threshold=1, reset_timeout=3600), redis_timeout=10, lease=0
    )
    breaker.acquire().failure()
    source = serving(healthy)
    healthy.clients[source].set(breaker.keys.policy, "{}")  # scripts of several keys need each of them to be there
    seen = []

    def look(step: str) -> None:
        if step == "moved":
            seen.extend((breaker.snapshot().source, breaker.snapshot().state) for _ in range(3))

    move_slot(healthy, source, (source + 1) % 3, stop_before_end=look)
    assert seen == [("redis", "open")] * 3
    assert (breaker.snapshot().source, breaker.snapshot().state) == ("redis", "open")
    healthy.client().delete(breaker.keys.policy)
    breaker.reset()


def serving(formed: Cluster) -> int:
    """The master that holds this file's breaker."""
    return next(i for i in range(3) if formed.clients[i].execute_command("CLUSTER COUNTKEYSINSLOT", SLOT))


def test_cluster_reports_once(healthy: Cluster) -> None:
    """A report to a cluster that hangs is sent once, not eleven times: redis-py's cluster client would repeat it."""
    breaker = CircuitBreaker(
        NAME, redis=healthy.client(), policy=Policy(failure_threshold=10**6), lease=0, redis_timeout=TIMEOUT
    )
    breaker.reset()
    breaker.acquire().failure()
    wait_until(lambda: breaker.snapshot().source == "redis")
    source = serving(healthy)
    before = breaker.snapshot().failure_count
    permit = breaker.acquire()
    os.kill(healthy.nodes[source].pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        permit.failure()
        took = time.monotonic() - began
    finally:
        os.kill(healthy.nodes[source].pid, signal.SIGCONT)
    assert took < TIMEOUT * 8
    wait_until(lambda: breaker.snapshot().source == "redis")
    wait_until(lambda: breaker.snapshot().failure_count == before + 1)
    wait_until(healthy.is_whole)
    breaker.reset()


LONG = pytest.mark.long


def lose(pid: int, how: str) -> None:
    os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)


def check_old_master_is_back(running: Loads, pid: int, how: str) -> None:
    """Where the old master was but stopped, it goes on, still thinks that it is one, and changes nothing."""
    if how == "stopped":
        os.kill(pid, signal.SIGCONT)
        check_shared_again(running)
        running.check_no_surprise()


@LONG
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_cluster_master_lost(how: str) -> None:
    """The master of the breaker's slot is lost, its replica takes over (CLUSTERDOWN, MOVED), and all find it."""
    with cluster() as formed, loads(cluster=("127.0.0.1", formed.port(0)), name=NAME) as running:
        lost = formed.nodes[formed.owner(STATE)].pid
        check_failover(running, lambda: lose(lost, how))
        check_old_master_is_back(running, lost, how)
        assert check_histories(formed.client_of_any()) > 0


@pytest.mark.long
def test_cluster_down_for_a_while() -> None:
    """A master is lost and nobody takes over: all reply CLUSTERDOWN. Once its replica does, all breakers are back."""
    with cluster() as formed:
        url = f"redis+cluster://127.0.0.1:{formed.port(0)}"
        names = [next(name for name in map(str, range(99)) if formed.owner(key(name)) == owner) for owner in range(3)]
        breakers = [CircuitBreaker(name, redis=url, lease=0) for name in names]

        def all_are(source: str) -> bool:
            for breaker in breakers:
                breaker.call(int)
            return [breaker.snapshot().source for breaker in breakers] == [source] * 3

        wait_until(lambda: all_are("redis"))
        os.kill(formed.nodes[3].pid, signal.SIGSTOP)
        os.kill(formed.nodes[0].pid, signal.SIGKILL)
        wait_until(lambda: all_are("local"))
        os.kill(formed.nodes[3].pid, signal.SIGCONT)
        wait_until(lambda: formed.is_whole(but=[0]), 30)
        wait_until(lambda: all_are("redis"))


@pytest.mark.long
def test_watch_without_the_first_master() -> None:
    """The node of slot 0 is lost, and no other one takes over: a watch of a breaker elsewhere goes on."""
    with cluster("--cluster-require-full-coverage", "no") as formed:
        name = next(name for name in map(str, range(99)) if formed.owner(key(name)) == 1)
        breaker = CircuitBreaker(name, redis=formed.client())
        breaker.call(int)
        with breaker.watch() as watch:
            wait_until(lambda: watch.active)
            os.kill(formed.nodes[3].pid, signal.SIGSTOP)
            os.kill(formed.nodes[0].pid, signal.SIGKILL)
            wait_until(lambda: "fail" in str(formed.clients[1].cluster("NODES")))
            wait_until(lambda: watch.active)


def key(name: str) -> str:
    """The key that decides which node holds a breaker."""
    return f"circuit_breaker:{name}:state"


# Routes -----------------------------------------------------------------------------------------

A, B, C, REPLICA = (("127.0.0.1", port) for port in (1, 2, 3, 4))
COMMAND = Command(STATE.encode(), (b"EVALSHA",))


def serving_slots(master: Any, *replicas: Any) -> list[Any]:
    """The reply to CLUSTER SLOTS while this node and its replicas serve this file's breaker, and B and C the rest."""
    nodes = [(SLOT, SLOT, [master, *replicas]), (0, SLOT - 1, [B]), (SLOT + 1, 16383, [C])]
    return [[low, high, *([host.encode(), port] for host, port in listed)] for low, high, listed in nodes]


def new_routes() -> Routes:
    """Routes of a client that was given the address of node A."""
    return Routes(client_from_url("redis+cluster://127.0.0.1:1"))


def travel(steps: Exchange, nodes: dict[Any, Any], slots: list[Any]) -> list[Any]:
    """Carry out an exchange. nodes: the reply of each to a command; others are lost. slots: the reply to CLUSTER SLOTS.

    Returns the replies to the commands of the exchange.
    """
    try:
        leg = next(steps)
        while True:
            if leg.address in nodes:
                replies = [slots if one.words[0] == b"CLUSTER" else nodes[leg.address] for one in leg.commands]
                leg = steps.send(replies)
            else:
                leg = steps.throw(redis.ConnectionError())
    except StopIteration as end:
        return list(end.value)


def test_nodes_of_a_cluster_that_was_down_are_not_forgotten() -> None:
    """The node of the URL is gone, and all others reply CLUSTERDOWN until a replica takes over: it is found."""
    routes = new_routes()
    before, after = serving_slots(A, REPLICA), serving_slots(REPLICA)
    assert travel(routes.exchange([COMMAND]), {A: b"reply"}, before) == [b"reply"]
    down = ClusterDownError("CLUSTERDOWN the cluster is down")
    for _ in range(8):
        travel(routes.exchange([COMMAND]), dict.fromkeys((B, C, REPLICA), down), before)
    moved = MovedError(f"{SLOT} 127.0.0.1:{REPLICA[1]}")
    for _ in range(4):  # the lost node is tried in its turn
        replies = travel(routes.exchange([COMMAND]), {B: moved, C: moved, REPLICA: b"reply"}, after)
    assert replies == [b"reply"]


def test_subscriptions_try_every_node() -> None:
    """The next subscription is opened to another node, since the one before may be lost."""
    routes = new_routes()
    travel(routes.learn_masters(), {A: b""}, serving_slots(A, REPLICA))
    assert {routes.any_node() for _ in range(4)} == {A, B, C, REPLICA}


def test_masters_after_a_failover() -> None:
    """The node that was asked first is gone: another one is asked, and names the masters that serve now."""
    routes = new_routes()
    travel(routes.learn_masters(), {A: b""}, serving_slots(A, REPLICA))
    assert routes.masters() == [A, B, C]
    for _ in range(2):
        travel(routes.learn_masters(), {B: b"", C: b"", REPLICA: b""}, serving_slots(REPLICA))
    assert routes.masters() == [REPLICA, B, C]


def test_a_report_is_executed_though_the_question_after_it_was_not_sent() -> None:
    """The caller is cancelled before it asks which node serves what: its report is not taken for unsent."""
    steps = new_routes().exchange([COMMAND])
    assert next(steps).commands == [COMMAND]
    assert steps.send([b"reply"]).commands[0].words == (b"CLUSTER", b"SLOTS")
    with pytest.raises(asyncio.CancelledError) as raised:
        steps.throw(NotSent())
    assert raised.type is asyncio.CancelledError


# Sentinel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [pytest.param("killed", marks=LONG), "stopped"])
def test_sentinel_master_lost(how: str) -> None:
    """The master under Sentinel is lost, a replica is promoted, which holds no scripts, and all find it."""
    with sentinels() as formed, loads(sentinels=formed.addresses, name=NAME) as running:
        lost = formed.data[0].pid
        check_failover(running, lambda: lose(lost, how))
        assert formed.master() != 0
        check_old_master_is_back(running, lost, how)
        check_histories(formed.client())  # none where a second fail-over has lost it


def test_watch_behind_sentinel() -> None:
    """A subscription finds the master that the sentinels name."""
    with sentinels() as formed:
        breaker = CircuitBreaker(NAME, redis=formed.client(), redis_timeout=10)
        watch = breaker.watch()
        wait_until(lambda: watch.active)
        watch.close()


def stop_all(formed: Sentinels) -> None:
    """Nothing answers any more: neither data nor sentinels."""
    for server in (*formed.sentinels, *formed.data):
        os.kill(server.pid, signal.SIGSTOP)


def test_sentinels_that_hang() -> None:
    """When the sentinels hang with the master, a call waits a few deadlines at the most: one for each of them."""
    with sentinels() as formed:
        breaker = CircuitBreaker(NAME, redis=formed.client(), lease=0, redis_timeout=TIMEOUT)
        breaker.call(int)
        wait_until(lambda: breaker.snapshot().source == "redis")
        breaker.close()  # the next call has to ask a sentinel
        stop_all(formed)
        began = time.monotonic()
        for _ in range(20):
            breaker.call(int)
        assert time.monotonic() - began < TIMEOUT * 8
        assert breaker.snapshot().source == "local"
