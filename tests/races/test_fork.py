"""os.fork() after the first use: each test forks in a process of its own, not in pytest's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
import server_watch

from pybreaker_redis.embedded import EmbeddedServer


def scenario(name: str, *args: object, measured: bool = True) -> dict[str, Any]:
    """What the scenario printed. measured: whether the coverage of its processes is taken, if that of the tests is."""
    script = Path(__file__).parent / "fork_scenarios.py"
    environment = {key: value for key, value in os.environ.items() if measured or not key.startswith("COVERAGE_")}
    command = [sys.executable, str(script), name, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return {"stderr": done.stderr, **json.loads(done.stdout)}


@pytest.mark.parametrize("name", ["counts", "kept"])
def test_parent_and_children_count_together(server: EmbeddedServer, client: redis.Redis, name: str) -> None:
    """A breaker, or only its client, used before the fork counts right in the parent and in four children at once."""
    report = scenario(name, server.url)
    assert report["ends"] == ["ok"] * 4, report["stderr"]
    assert server_watch.document(client, f"fork-{name}")["failure_count"] == report["failures"]


def test_forking_amid_calls_never_hangs_the_child(server: EmbeddedServer, client: redis.Redis) -> None:
    """Whatever other threads of the parent were doing with the breaker, a child forked meanwhile can call."""
    report = scenario("busy", server.url, measured=False)  # a thread may be holding coverage's own lock at the fork
    assert report["ends"] == ["ok"] * 100, report["stderr"]


LOCKS = [
    "breaker",
    "nested",
    "refreshing",
    "isolated",
    "outage",
    "refusal",
    "worker",
    "messenger",
    "subscription",
]


@pytest.mark.parametrize("lock", LOCKS)
def test_forking_while_a_thread_holds_a_lock(server: EmbeddedServer, client: redis.Redis, lock: str) -> None:
    """A child is not held up by a lock that a thread of the parent held at the fork."""
    report = scenario("held", server.url, lock)
    assert report["ends"] == ["ok"], report["stderr"]


@pytest.mark.parametrize("lock", ["breaker", "nested"])
def test_forking_in_memory_while_a_thread_holds_a_lock(server: EmbeddedServer, lock: str) -> None:
    """Nor if the first call of the child fails, by a view of its parent, without Redis."""
    report = scenario("held_in_memory", server.url, lock)
    assert report["ends"] == ["ok"], report["stderr"]


def test_a_child_frees_a_breaker_that_a_thread_of_its_parent_reads(server: EmbeddedServer) -> None:
    """It has nothing to report of its parent's calls, and so needs no lock of the breaker."""
    report = scenario("freed", server.url)
    assert report["ends"] == ["ok"], report["stderr"]


def test_forking_while_a_thread_renews_a_part(server: EmbeddedServer) -> None:
    """A child that has just noticed that it is one forks: its child starts anew as well."""
    report = scenario("renewed", server.url)
    assert report["ends"] == ["ok"], report["stderr"]


def test_a_child_ends_a_watch_of_its_parent(server: EmbeddedServer) -> None:
    """Though a thread of the parent held the lock of the subscription at the fork, and the child has not called."""
    report = scenario("watched", server.url)
    assert report["ends"] == ["ok"], report["stderr"]


def test_gathered_successes_stay_the_parents(server: EmbeddedServer, client: redis.Redis) -> None:
    """What the parent gathered before the fork is reported once, by the parent."""
    server_watch.load_scripts(client)
    with server_watch.Requests(client, f"{server.directory}/r.sock") as requests:
        report = scenario("gathered", server.url)
    assert report["ends"] == ["ok"], report["stderr"]
    assert requests.total("successes") == 7 + 2


def test_a_child_is_an_instance_of_its_own(server: EmbeddedServer, client: redis.Redis) -> None:
    """The history tells a child's action from its parent's."""
    report = scenario("identity", server.url)
    assert report["ends"] == ["ok"], report["stderr"]
    assert (report["instances"], report["entries"]) == (2, 2)


def test_a_child_forked_in_an_outage_finds_back(own_server: EmbeddedServer) -> None:
    """A retry that the parent had under way at the fork does not keep the child from Redis."""
    report = scenario("outage", own_server.url, own_server.pid)
    assert report["ends"] == ["ok"], report["stderr"]
