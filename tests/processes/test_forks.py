"""Forks, with Python's hooks and without them, and children of every kind: each test forks in a process of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import programs
import pytest
import redis
import server_watch
from programs import run

from pybreaker_redis import CircuitBreaker, Policy
from pybreaker_redis.embedded import EmbeddedServer

HOW = ["os", "c"]  # os.fork(), and the C library's fork(), which runs no hook of Python's
WAYS = ["multiprocessing-fork", "multiprocessing-spawn", "multiprocessing-forkserver", "billiard", "executor"]
WAYS += ["subprocess", "fork"]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """A server that is reached by TCP, so that it can tell connections apart."""
    with EmbeddedServer(port=0) as started:
        yield started


def check_many(server: EmbeddedServer, client: redis.Redis, job: str, *args: object) -> list[Any]:
    """What the children found; checks all that must hold for the children of `many` and `many_async`."""
    server_watch.load_scripts(client)
    with server_watch_socket(server, client) as senders:
        report = run(job, server.url, *args)
    assert [child["wrong"] for child in report["found"] if child["wrong"]] == []  # no reply of another one's
    assert [child["outages"] for child in report["found"] if child["outages"]] == []
    assert report["outages"] == []
    assert report["counted"] == report["expected"]  # every call of parent and children, once
    assert senders.shared() == {}
    assert len({sender for runs in senders.runs.values() for sender in runs}) == len(report["found"]) + 1
    groups = [child["instances"] for child in report["found"]] + [report["instances"]]
    for number in range(len(report["instances"])):
        assert len({instances[number] for instances in groups}) == len(groups)
    return report["found"]  # type: ignore[no-any-return]


def server_watch_socket(server: EmbeddedServer, client: redis.Redis) -> programs.Senders:
    return programs.Senders(client, f"{server.directory}/r.sock")


# with a short lease the link's thread runs all the time, and Python itself does not survive a fork without its hooks
@pytest.mark.parametrize(("how", "lease"), [("os", 0), ("os", 0.02), ("os", 600), ("c", 0), ("c", 600)])
def test_children_share_nothing(server: EmbeddedServer, client: redis.Redis, how: str, lease: float) -> None:
    """Children of a process with 20 breakers have connections, replies, identities and counts of their own."""
    assert len(check_many(server, client, "many", how, 60, lease)) == 60


@pytest.mark.parametrize("how", HOW)
def test_children_of_a_loop_share_nothing(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """The same with asyncio breakers, whose loop stays open in the parent and goes on after each fork."""
    assert len(check_many(server, client, "many_async", how, 60)) == 60


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("how", "lease"), [("os", 0.02), ("c", 600)])
def test_a_thousand_children_share_nothing(server: EmbeddedServer, client: redis.Redis, how: str, lease: float) -> None:
    """The same a thousand times."""
    assert len(check_many(server, client, "many", how, 1000, lease)) == 1000


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", HOW)
def test_a_thousand_children_of_a_loop_share_nothing(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """The same a thousand times with asyncio breakers."""
    assert len(check_many(server, client, "many_async", how, 1000)) == 1000


@pytest.mark.parametrize("how", HOW)
def test_a_fork_of_a_fork(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """Each generation is an instance of its own, and every call counts once."""
    report = run("generations", server.url, how)
    assert len(set(report["instances"])) == 4
    assert (report["failures"], report["calls"]) == (7, 1 + 4 + 7)


@pytest.mark.parametrize("how", HOW)
def test_what_a_child_makes_of_its_parents_client(server: EmbeddedServer, how: str) -> None:
    """Its breakers and meters use no connection of the parent, though they were no part of the parent's link."""
    report = run("made_in_child", server.url, how)
    assert len(report["found"]) == 2, report["errors"]
    assert len(report["parent"]) == 2
    for sockets in report["found"]:
        assert sockets
        assert not set(sockets) & set(report["parent"])


@pytest.mark.parametrize("how", HOW)
def test_gathered_counts_stay_the_parents(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """Of calls before the fork only the parent reports; a child reports at least what follows its first question.

    Until then a child decides by its parent's view, and those calls may be lost. None counts twice: were the seven of
    the parent reported by each child, too, 53 would be counted.
    """
    report = run("gathered", server.url, how)
    assert 1 + 7 + 4 * 1 <= report["calls"] <= 1 + 7 + 4 * 6


@pytest.mark.parametrize("how", HOW)
def test_a_child_that_ends_reports_its_own_calls_only(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """It has used one link; those that only its parent has used are not its own."""
    report = run("ended", server.url, how)
    assert report["calls"] == [1 + 7, 4], report


@pytest.mark.parametrize("how", HOW)
def test_a_child_closes_its_parents_manager(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """It reports nothing that the parent has gathered, and uses no connection of the parent."""
    report = run("closed_managers", server.url, how)
    assert report["calls"] == 1 + 7, report


@pytest.mark.parametrize("how", HOW)
def test_a_child_outlives_the_probe_that_forked_it(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """A child that a probe's function forked is no part of that probe: it needs a slot, as everybody does."""
    report = run("probe", server.url, how)
    assert report["found"] == [[False] * 20]
    assert report["state"] == "closed"


@pytest.mark.parametrize("how", HOW)
def test_a_probe_that_forks_counts_once(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """Parent and child both leave the block of a probe: it is one success, where two would close the circuit."""
    report = run("probe_of_two", server.url, how)
    assert (report["state"], report["successes"]) == ("half_open", 1)


@pytest.mark.parametrize("watching", ["lease", "watch"])
@pytest.mark.parametrize("how", HOW)
def test_a_childs_trip_reaches_its_siblings(
    server: EmbeddedServer, client: redis.Redis, how: str, watching: str
) -> None:
    """Parent and children learn of a child's trip; those that watch have a subscription each."""
    report = run("siblings", server.url, how, watching)
    assert [child["rejects"] for child in report["found"]] == [True] * 5
    assert report["parent_rejects"]
    assert report["outages"] == []
    assert len({report["parent"], *[child["instance"] for child in report["found"]]}) == 6
    if watching == "watch":
        assert [child["watches"] for child in report["found"] if child["watches"] is not None] == [True] * 4
        assert report["subscribed"] >= 5  # the parent's, and one for each child that called


@pytest.mark.parametrize("way", WAYS)
def test_children_of_every_kind(server: EmbeddedServer, client: redis.Redis, way: str) -> None:
    """A child that ends normally has reported every call, whatever started it, and so has its parent."""
    if way == "billiard" and importlib.util.find_spec("billiard") is None:
        pytest.skip("billiard is not installed")
    report = run("ways", server.url, way)
    assert len({report["parent"], *report["instances"]}) == 5
    reader = CircuitBreaker("ways", redis=client, policy=Policy(error_rate_threshold=1.0, window=3600.0))
    snapshot = reader.snapshot()
    assert (snapshot.failures, snapshot.calls) == (4, 4 * 6 + 3)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("how", HOW)
def test_nothing_starts_before_the_first_call(server: EmbeddedServer, client: redis.Redis, how: str, kind: str) -> None:
    """Managers made at import, which watch, start no thread and open no socket, and their children work."""
    before = client.info("stats")["total_connections_received"]
    report = run("imported", server.url, how, kind)
    nothing = {"threads": [], "sockets": []}
    assert (report["before"], report["after"]) == (nothing, nothing)
    assert [child["watches"] for child in [*report["found"], report["parent"]]] == [True] * 9
    assert len({child["instance"] for child in [*report["found"], report["parent"]]}) == 9
    assert report["outages"] == []
    assert client.info("stats")["total_connections_received"] > before
