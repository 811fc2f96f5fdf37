"""snapshot.lua by itself: what it tells, and that it changes nothing."""

from __future__ import annotations

import json

import pytest
import redis
from conftest import START_MS, lua_machine
from script_calls import KEYS, POLICY, ask, bring_to, commands, must_refuse, picture, put

from pybreaker_redis._policy import DEFAULT_REQUEST

COMMON = {"exists": True, "failure_number": 0, "success_count": 0, "calls": 0, "failures": 0, "slow": 0}
TOLD = {
    "closed": {"generation": START_MS * 1000, "failure_count": 0, "trips": 0, "health": 100, "probes_in_flight": 0},
    "open": {"failure_count": 3, "trips": 1, "health": 0, "probes_in_flight": 0, "retry_after_ms": 1000},
    "half_open": {"failure_count": 3, "trips": 1, "health": 40, "probes_in_flight": 1, "retry_after_ms": 100},
}


@pytest.mark.parametrize("stored", [False, True])
def test_bad_requests(client: redis.Redis, stored: bool) -> None:
    """Fields of other scripts are refused by name."""
    for field in ("generation", "successes", "failures", "probe", "action", "duration_ms"):
        must_refuse(client, "snapshot", json.dumps({field: 1}), names=field, stored=stored)


@pytest.mark.parametrize("state", TOLD)
def test_every_state(client: redis.Redis, state: str) -> None:
    """It tells the state with its counts, times and probes."""
    machine = lua_machine(client, "discovery")
    bring_to(machine, state)
    times = {} if state == "closed" else {"last_failure_time": START_MS // 1000, "opened_at": START_MS // 1000}
    reply = machine.run("snapshot", POLICY)
    in_force = reply.pop("policy")
    assert in_force == {**DEFAULT_REQUEST, **POLICY}
    reason = {"open": "failure_threshold", "half_open": "timeout"}
    changed = {} if state == "closed" else {"reason": reason[state], "changed_at_ms": machine.now_ms}
    told = {"state": state, **changed, "now_ms": machine.now_ms, "generation": reply["generation"], **COMMON, **times}
    assert reply == {**told, **TOLD[state]}


@pytest.mark.parametrize("state", ["none", *TOLD])
def test_it_only_reads(client: redis.Redis, state: str) -> None:
    """It runs no command that writes, and leaves value and expiry, also where a deadline has passed."""
    machine = lua_machine(client, "discovery")
    if state != "none":
        bring_to(machine, state)
        client.pexpire(KEYS.state, 50_000)
    machine.advance(10_000)
    before = picture(client)
    with commands(client) as seen:
        machine.run("snapshot", POLICY)
    assert {words[0] for words in seen} <= {"GET", "MGET", "EXISTS"}  # the clock of the tests is a key
    assert picture(client) == before
    assert client.pttl(KEYS.state) <= 50_000


def test_dead_probes_are_not_in_flight(client: redis.Redis) -> None:
    """A probe past its deadline is not in flight, and nobody need wait for it."""
    machine = lua_machine(client, "discovery")
    bring_to(machine, "half_open")
    machine.advance(400)
    reply = machine.run("snapshot", POLICY)
    assert (reply["probes_in_flight"], reply.get("retry_after_ms")) == (0, None)


def test_a_document_of_the_contract_exists(client: redis.Redis) -> None:
    """A document that another program wrote exists."""
    put(client, state="open", failure_count=15, success_count=0, last_failure_time=1733500800, opened_at=1733500795)
    reply = ask(client, "snapshot")
    assert (reply["state"], reply["failure_count"], reply["exists"]) == ("open", 15, True)
