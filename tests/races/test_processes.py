"""Many processes on one breaker: one decision, made once, on the server's clock."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import race_workers as jobs
import redis
import server_watch
from conftest import wait_until
from race_workers import FIRM, Fleet, boom

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis.embedded import EmbeddedServer

ALL = 16


@pytest.fixture(scope="module")
def processes() -> Iterator[Fleet]:
    """Sixteen processes for the whole module."""
    with jobs.fleet_of(ALL) as started:
        yield started


@pytest.fixture
def fleet(processes: Fleet) -> Iterator[Fleet]:
    """The module's processes, all idle."""
    yield processes
    processes.renew()


def trip(breaker: CircuitBreaker) -> None:
    """Failing calls until the breaker is open."""
    for _ in range(breaker.policy.failure_threshold):
        with pytest.raises(jobs.Boom):
            breaker.call(boom)
    assert breaker.snapshot().state == "open"


def strict(client: redis.Redis, name: str, **policy: Any) -> CircuitBreaker:
    """A breaker that asks for every call."""
    return CircuitBreaker(name, redis=client, policy=Policy(**policy), lease=0, **FIRM)


def test_trips_at_exactly_the_fifth_failure(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """Of 16 processes failing at once the fifth failure trips, and one process is notified that it caused it."""
    names = [f"fail-{number}" for number in range(8)]
    results = fleet.run(jobs.fail_together, ALL, server.url, names)
    assert len({pid for made in results for pid, _ in made}) == ALL
    for number, name in enumerate(names):
        changes = [change for made in results for change in made[number][1]]
        assert changes == ["closed>open"]
        history = strict(client, name).history()
        assert [(entry.old, entry.new, entry.failure_count) for entry in history] == [("closed", "open", 5)]
        assert server_watch.document(client, name)["failure_count"] == 5


@pytest.mark.parametrize("slots", [1, pytest.param(3, marks=pytest.mark.slots(3))])
def test_hands_out_exactly_the_slots(fleet: Fleet, server: EmbeddedServer, client: redis.Redis, slots: int) -> None:
    """Of 16 processes asking together after the open time exactly half_open_max_calls get a slot of their own."""
    names = [f"ask-{slots}-{number}" for number in range(8)]
    for name in names:
        trip(strict(client, name, failure_threshold=1, reset_timeout=0.05))
    wait_until(lambda: strict(client, names[-1]).snapshot().retry_after == 0)
    results = fleet.run(jobs.ask_together, ALL, server.url, names, slots)
    for number, name in enumerate(names):
        answers = [answer[number] for answer in results]
        assert sorted(value for kind, value in answers if kind == "slot") == list(range(1, slots + 1))
        refused = [(kind, value) for kind, value in answers if kind != "slot"]
        assert len(refused) == ALL - slots
        assert all(kind == "half_open" and 0 < value <= 60 for kind, value in refused)
        assert [entry.new for entry in strict(client, name).history()] == ["half_open", "open"]


@pytest.mark.parametrize("slots", [1, pytest.param(3, marks=pytest.mark.slots(3))])
def test_no_more_probes_run_than_slots(fleet: Fleet, server: EmbeddedServer, client: redis.Redis, slots: int) -> None:
    """Of 8 processes that trip, probe and recover all the time, never more probe at once than there are slots."""
    policy = {"failure_threshold": 1, "reset_timeout": 0.002, "success_threshold": 3, "half_open_max_calls": slots}
    ran = itertools.chain(*fleet.run(jobs.probe_again_and_again, 8, server.url, "at-once", policy, 25))
    begins_and_ends: dict[int, list[tuple[float, int]]] = {}
    for generation, begin, end in ran:  # a probe that outlives its generation holds no slot of the next one
        begins_and_ends.setdefault(generation, []).extend([(begin, 1), (end, -1)])
    most = {
        generation: max(itertools.accumulate(step for _, step in sorted(times)))
        for generation, times in begins_and_ends.items()
    }
    assert slots // 2 < max(most.values()) <= slots, most
    assert len(most) > 5


def test_a_dead_probe_frees_its_slot(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """A probe whose process dies holds its slot for probe_timeout exactly, under refused requests, then all go on."""
    policy = {"failure_threshold": 1, "reset_timeout": 0.02, "probe_timeout": 0.6}
    breaker = strict(client, "dead", **policy)
    trip(breaker)
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=jobs.die_probing, args=(server.url, "dead", policy, theirs), daemon=True)
    process.start()
    assert ours.poll(jobs.PATIENCE)
    assert ours.recv() == 1
    process.join(jobs.PATIENCE)
    assert process.exitcode == 9
    half_open = breaker.history()[0]
    assert half_open.new == "half_open"
    results = fleet.run(jobs.poll_until_admitted, 4, server.url, "dead", policy)
    admitted = [got for _, got, _ in results if got]
    by_probe = [(slot, document) for slot, document in admitted if slot is not None]
    ((slot, document),) = by_probe
    assert slot == 2
    handed_out = round(half_open.time * 1000)
    again = document["probes"]["2"] - 600
    assert again >= handed_out + 600
    assert document["generation"] == half_open.generation
    assert sum(refusals for refusals, _, _ in results) > 0
    assert breaker.snapshot().state == "closed"
    assert breaker.call(jobs.fine) == 1
    assert [entry.new for entry in breaker.history()] == ["closed", "half_open", "open"]


@pytest.mark.parametrize("lease", [0, 30.0])
@pytest.mark.parametrize("outcome", ["success", "failure"])
@pytest.mark.parametrize("where", ["open", "half_open", "closed"])
def test_stragglers_change_nothing(
    fleet: Fleet, server: EmbeddedServer, client: redis.Redis, where: str, outcome: str, lease: float
) -> None:
    """Calls that began before a trip change nothing when they end in open, in half_open or after the next close."""
    fleet.start(jobs.hold_call, 2, server.url, "straggler", {"lease": lease, **FIRM}, {"failure_threshold": 3})
    assert all(fleet.message_of(index) for index in range(2))
    breaker = strict(client, "straggler", failure_threshold=3, reset_timeout=60.0 if where == "open" else 0.02)
    trip(breaker)
    if where != "open":
        wait_until(lambda: breaker.snapshot().retry_after == 0)
        probe = breaker.acquire()
    if where == "closed":
        probe.success()
        for _ in range(2):  # a success would clear them, a failure would trip
            breaker.acquire().failure()
    before, history = client.get(breaker.keys.state), breaker.history()
    assert json.loads(before)["state"] == where
    fleet.say(2, outcome)
    fleet.results(2)
    assert client.get(breaker.keys.state) == before
    assert breaker.history() == history


def test_open_time_is_exact(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """A reset_timeout of 1.0 is 1000 ms on the server's clock, however often processes ask meanwhile."""
    policy = {"failure_threshold": 1, "reset_timeout": 1.0}
    breaker = strict(client, "exact", **policy)
    fleet.start(jobs.poll_until_admitted_after_trip, 4, server.url, "exact", policy)
    for index in range(4):
        fleet.message_of(index)
    breaker.acquire().failure()
    with pytest.raises(CircuitOpenError) as caught:
        breaker.acquire()
    assert 0.5 < caught.value.retry_after <= 1.0
    tripped = server_watch.document(client, "exact")
    fleet.say(4)
    results = fleet.results(4)
    _, half_open, opened = breaker.history()
    assert (opened.new, half_open.new) == ("open", "half_open")
    assert tripped["open_until_ms"] - round(opened.time * 1000) == 1000
    assert 1000 <= round((half_open.time - opened.time) * 1000) < 2000
    waits = [wait for _, _, waits in results for wait in waits]
    assert len(waits) > 20
    assert all(0 <= wait <= 1.0 for wait in waits)


@pytest.mark.parametrize("offset", [-3600, 3600])
def test_a_clock_an_hour_off_changes_nothing(server: EmbeddedServer, client: redis.Redis, offset: int) -> None:
    """A client whose own clocks are an hour off writes the server's times and waits the right time."""
    script = Path(__file__).parent / "skewed_client.py"
    before_s, _ = client.time()
    done = subprocess.run(
        [sys.executable, str(script), server.url, "skewed", str(offset)],
        capture_output=True,
        text=True,
        timeout=jobs.PATIENCE,
        check=True,
    )
    report = json.loads(done.stdout)
    after_s, _ = client.time()
    assert abs(report["clock"] - offset - time.time()) < 600  # the clock was off indeed
    assert report["state"] == "closed"
    assert 0 < report["first"] <= 1.0
    closed, half_open, opened = strict(client, "skewed").history()
    assert [closed.new, half_open.new, opened.new] == ["closed", "half_open", "open"]
    for entry in (closed, half_open, opened):
        assert before_s <= entry.time <= after_s + 1
        assert before_s <= entry.generation / 1e6 <= after_s + 1
    assert 1000 <= round((half_open.time - opened.time) * 1000) < 3000
    document = server_watch.document(client, "skewed")
    assert before_s <= document["last_failure_time"] <= after_s + 1


def test_a_trip_reaches_processes_that_only_succeed(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """Processes whose own calls all succeed learn of another one's trip without a failure of their own."""
    breaker = strict(client, "seen", failure_threshold=1, reset_timeout=60.0)
    fleet.start(jobs.succeed_until_rejected, 4, server.url, "seen", 0.1)
    for index in range(4):
        assert fleet.message_of(index) == "warm"
    generation = breaker.snapshot().generation
    breaker.acquire().failure()
    results = fleet.results(4)
    assert all(state == "open" and 0 < retry_after <= 60 for _, state, retry_after in results)
    assert breaker.snapshot().generation > generation
    assert breaker.snapshot().failure_count == 1
    assert len(breaker.history()) == 1


def test_forced_open_stops_every_process(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """An operator's force_open rejects in 8 processes under load, and calls that were running count nothing."""
    operator = strict(client, "forced", failure_threshold=1)
    running = [operator.acquire(), operator.acquire()]
    fleet.start(jobs.succeed_until_rejected, 8, server.url, "forced", 0.1)
    for index in range(8):
        assert fleet.message_of(index) == "warm"
    operator.force_open(duration=60.0)
    before = client.get(operator.keys.state)
    results = fleet.results(8)
    running[0].failure()
    running[1].success()
    assert all(state == "open" and 0 < retry_after <= 60 for _, state, retry_after in results)
    assert client.get(operator.keys.state) == before
    assert operator.snapshot().forced == "open"
    assert [entry.reason for entry in operator.history()] == ["forced"]


@pytest.mark.slots(3)
def test_reset_while_probes_run(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """Probes of three processes that end after an operator's reset count nothing."""
    policy = {"failure_threshold": 1, "reset_timeout": 0.02, "half_open_max_calls": 3}
    operator = strict(client, "reset", **policy)
    trip(operator)
    wait_until(lambda: operator.snapshot().retry_after == 0)
    fleet.start(jobs.hold_call, 4, server.url, "reset", {"lease": 0, **FIRM}, policy)
    permits = [fleet.message_of(index) for index in range(4)]
    assert sorted(permit[1] for permit in permits if permit) == [1, 2, 3]
    operator.reset()
    before = client.get(operator.keys.state)
    fleet.say(4, ["success", "failure", "release", "failure"])
    assert fleet.results(4) == ["closed"] * 4
    assert client.get(operator.keys.state) == before
    assert [entry.reason for entry in operator.history()] == ["reset", "timeout", "failure_threshold"]


def test_every_success_is_reported_once(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """What 4 processes x 4 threads gathered reaches the server whole: no success and no failure more or less."""
    server_watch.load_scripts(client)
    strict(client, "sum").acquire().success()
    with server_watch.Requests(client, f"{server.directory}/r.sock") as requests:
        failed = sum(fleet.run(jobs.fixed_calls, 4, server.url, "sum", 0.02, 4, 1500, 50))
    assert failed == 4 * 4 * 30
    assert requests.total("failures") == failed
    assert requests.total("successes") == 4 * 4 * 1500 - failed
    generations = {
        request["generation"] for _, key, request in requests.seen if "generation" in request and "sum" in key
    }
    assert len(generations - {0}) == 1  # 0: asked before it knew one


def test_a_healthy_breaker_sends_one_command_per_lease(fleet: Fleet, own_server: EmbeddedServer) -> None:
    """Under the load of 2 processes x 8 threads a lease of 0.1 s means ten reads a second per process at most."""
    client = redis.Redis.from_url(own_server.url)
    server_watch.load_scripts(client)
    before = server_watch.commands(client)
    fleet.start(jobs.load, 2, own_server.url, "quiet", 8, 0, {"lease": 0.1, **FIRM})
    assert [fleet.message_of(index) for index in range(2)] == ["running"] * 2
    time.sleep(1.0)
    fleet.stop.set()
    results = fleet.results(2)
    sent = server_watch.commands(client) - before
    client.close()
    elapsed = sum(result["elapsed"] for result in results)
    assert sum(result["ran"] for result in results) > 1000
    assert 2 <= sent["evalsha"] <= 2 * 5  # the first calls, the first successes, and the list of processes
    assert 2 <= sent["mget"] <= elapsed / 0.1 * 1.2 + 2 * 4  # those of the scripts, too


def test_a_strict_breaker_sends_two_commands_per_call(
    fleet: Fleet, server: EmbeddedServer, client: redis.Redis
) -> None:
    """With lease=0 each call is two EVALSHA, and nothing else reaches the server but a connection's greeting."""
    server_watch.load_scripts(client)
    fleet.run(jobs.fixed_calls, 2, server.url, "warm", 0, 1, 1, 0)
    client.delete("circuit_breaker:strict:state")
    before = server_watch.commands(client)
    fleet.run(jobs.fixed_calls, 2, server.url, "strict", 0, 4, 50, 10)
    sent = server_watch.commands(client) - before
    snapshots = 2  # fixed_calls looks at the state once to connect
    assert sent["evalsha"] == 2 * (2 * 4 * 50) + snapshots
    in_scripts = {"time", "mget", "exists", "set", "pexpire"}
    # and the proof of a connection that was idle while its process waited for the other one
    greeting = {"hello", "client|setinfo", "client|setname", "select", "client|maint_notifications", "ping"}
    assert set(sent) - {"evalsha", "info"} <= in_scripts | greeting
    assert all(sent[name] <= 2 * 5 * 2 for name in greeting)


def test_no_failure_is_lost_among_processes(fleet: Fleet, server: EmbeddedServer, client: redis.Redis) -> None:
    """Failures of 16 processes at once are all counted: not one overwrites another."""
    strict(client, "all").acquire().release()
    failed = sum(fleet.run(jobs.fixed_calls, ALL, server.url, "all", 0, 1, 25, 1))
    assert failed == ALL * 25
    assert server_watch.document(client, "all")["failure_count"] == failed
