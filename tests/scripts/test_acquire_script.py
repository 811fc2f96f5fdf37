"""acquire.lua by itself: what it refuses, what it writes, what a refusal leaves alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis
from conftest import START_MS, Machine, lua_machine
from script_calls import (
    DAY_MS,
    GREATEST_GENERATION,
    KEYS,
    LARGEST,
    LONGEST_MS,
    NO_INTEGERS,
    POLICY,
    ask,
    bodies,
    commands,
    document,
    must_refuse,
    picture,
    probe,
    trip,
)


@pytest.mark.parametrize("stored", [False, True])
def test_bad_requests(client: redis.Redis, stored: bool) -> None:
    """Counts and generations that are none, and fields of other scripts, are refused by name."""
    for value in NO_INTEGERS:
        for field in ("successes", "generation", "seen_failure", "age_ms"):
            for body in bodies({field: value}):
                must_refuse(client, "acquire", body, names=field, stored=stored)
    for field in ("failures", "probe", "action", "duration_ms"):
        must_refuse(client, "acquire", json.dumps({field: 1}), names=field, stored=stored)


def test_limits(client: redis.Redis) -> None:
    """The greatest allowed values are taken, and one more is not."""
    limits = {"successes": 10**9, "generation": GREATEST_GENERATION, "seen_failure": LARGEST, "age_ms": LONGEST_MS}
    for field, most in limits.items():
        assert ask(client, "acquire", **{field: most})["admitted"] is True
        must_refuse(client, "acquire", json.dumps({field: most + 1}), names=field, stored=False)
    assert ask(client, "acquire", instance="x" * 200)["admitted"] is True


def test_first_acquire_makes_the_document(client: redis.Redis) -> None:
    """The first acquire stores a closed document seeded from the clock; the second writes nothing."""
    machine = lua_machine(client, "discovery")
    assert machine.run("acquire", POLICY) == {
        "admitted": True,
        "state": "closed",
        "generation": START_MS * 1000,
        "failure_count": 0,
        "failure_number": 0,
        "success_count": 0,
    }
    assert (document(client)["generation"], document(client).get("trips")) == (START_MS * 1000, None)
    with commands(client) as seen:
        assert machine.run("acquire", POLICY)["generation"] == START_MS * 1000
    assert {words[0] for words in seen} == {"MGET"}


def test_counted_successes_are_written(client: redis.Redis) -> None:
    """Successes of the current generation are stored and renew the expiry; those of another are not."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", POLICY)["generation"]
    machine.run("record", POLICY, generation=generation, failures=2)
    client.pexpire(KEYS.state, 50_000)
    machine.run("acquire", POLICY, generation=generation - 1, successes=5)
    assert (document(client)["failure_count"], client.pttl(KEYS.state) <= 50_000) == (2, True)
    machine.run("acquire", POLICY, generation=generation, successes=5)
    assert (document(client)["failure_count"], client.pttl(KEYS.state) > 50_000) == (0, True)


def force(machine: Machine, policy: dict[str, int]) -> dict[str, Any]:
    """Opens it by hand for as long as that can be."""
    return machine.run("control", policy, action="force_open")


@pytest.mark.parametrize("probe_timeout_ms", [400, DAY_MS])
@pytest.mark.parametrize("begin", [trip, probe, force])
def test_refusal_writes_nothing(client: redis.Redis, begin: Any, probe_timeout_ms: int) -> None:
    """A refused request reads the document and does nothing else: no write, no longer expiry."""
    machine = lua_machine(client, "discovery")
    generation = begin(machine, {**POLICY, "probe_timeout_ms": probe_timeout_ms})["generation"]
    assert client.pexpire(KEYS.state, 50_000)
    before = picture(client)
    with commands(client) as seen:
        for _ in range(5):
            reply = machine.run("acquire", POLICY, generation=generation, successes=3)
            assert (reply["admitted"], "transition" in reply, "probe" in reply) == (False, False, False)
    assert {words[0] for words in seen} == {"GET", "MGET"}  # the clock of the tests is a key
    assert picture(client) == before
    assert client.pttl(KEYS.state) <= 50_000


def test_probe_slots_are_stored(client: redis.Redis) -> None:
    """Each probe has a slot of its own with its deadline, and a freed slot's number is not used again."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "half_open_max_calls": 2}
    permit = probe(machine, policy)
    machine.advance(10)
    assert machine.run("acquire", policy)["probe"] == 2
    assert document(client)["probes"] == {"1": START_MS + 1400, "2": START_MS + 1410}
    machine.run("record", policy, generation=permit["generation"], probe=1)
    assert machine.run("acquire", policy)["probe"] == 3
    assert document(client)["probes"] == {"2": START_MS + 1410, "3": START_MS + 1410}


def test_slots_of_different_lengths(client: redis.Redis) -> None:
    """A request with a short probe timeout does not end the longer slot of another."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "half_open_max_calls": 2, "probe_timeout_ms": 5000}
    permit = probe(machine, policy)
    assert machine.run("acquire", {**policy, "probe_timeout_ms": 100})["probe"] == 2
    machine.advance(200)
    assert machine.run("snapshot", policy)["probes_in_flight"] == 1
    reply = machine.run("record", policy, generation=permit["generation"], probe=1, successes=1)
    assert (reply["applied"], reply["state"]) == (True, "closed")


def test_fewer_slots_than_in_flight(client: redis.Redis) -> None:
    """A caller whose policy has fewer slots than are in flight is refused."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "half_open_max_calls": 3}
    probe(machine, policy)
    assert machine.run("acquire", policy)["admitted"] is True
    assert machine.run("acquire", POLICY)["admitted"] is False
    assert machine.run("acquire", policy)["probe"] == 3
