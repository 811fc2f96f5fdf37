"""record.lua by itself: what it refuses, what counts, and what it leaves alone."""

from __future__ import annotations

import json

import pytest
import redis
from conftest import START_MS, lua_machine
from script_calls import (
    GREATEST_GENERATION,
    KEYS,
    LARGEST,
    LONGEST_MS,
    NO_INTEGERS,
    POLICY,
    ask,
    bodies,
    bring_to,
    commands,
    document,
    must_refuse,
    picture,
    probe,
    put,
    trip,
)


@pytest.mark.parametrize("stored", [False, True])
def test_bad_requests(client: redis.Redis, stored: bool) -> None:
    """Counts, generations and probes that are none, and fields of other scripts, are refused by name."""
    for value in NO_INTEGERS:
        for field in ("successes", "failures", "generation", "probe", "seen_failure", "age_ms"):
            for body in bodies({"generation": 1, field: value}):
                must_refuse(client, "record", body, names=field, stored=stored)
    for field in ("action", "duration_ms"):
        must_refuse(client, "record", json.dumps({"generation": 1, field: 1}), names=field, stored=stored)


def test_generation_is_needed(client: redis.Redis) -> None:
    """A report with a count or a probe that does not say under which generation is refused."""
    needy = ({"failures": 1}, {"successes": 0}, {"slow": 1}, {"probe": 1}, {"generation": None, "successes": 1})
    for request in needy:
        for body in bodies(request):
            must_refuse(client, "record", body, names="generation")


def test_limits(client: redis.Redis) -> None:
    """The greatest allowed values are taken, and one more is not."""
    limits = dict.fromkeys(("failures", "successes", "slow"), 10**9)
    limits |= {"probe": LARGEST, "seen_failure": LARGEST, "hold_ms": LARGEST, "age_ms": LONGEST_MS}
    limits["generation"] = GREATEST_GENERATION
    for field, most in limits.items():
        assert ask(client, "record", **{"generation": 0, field: most})["applied"] is False
        must_refuse(client, "record", json.dumps({"generation": 0, field: most + 1}), names=field)


def test_failure_count_fits_u32(client: redis.Redis) -> None:
    """The stored count stays within the unsigned 32 bits that other readers have for it."""
    policy = {"failure_threshold": 10**9}
    put(client, state="closed", failure_count=2**32 - 2, success_count=0, last_failure_time=None, opened_at=None)
    generation = ask(client, "acquire", policy=policy)["generation"]
    assert ask(client, "record", policy=policy, generation=generation, failures=10**9)["failure_count"] == 2**32 - 1
    assert document(client)["failure_count"] == 2**32 - 1


def test_times_are_seconds(client: redis.Redis) -> None:
    """last_failure_time and opened_at are whole seconds; a later close keeps the first and drops the second."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", POLICY)["generation"]
    machine.advance(1999)
    machine.run("record", POLICY, generation=generation, failures=1)
    assert (document(client)["last_failure_time"], document(client)["opened_at"]) == (START_MS // 1000 + 1, None)
    machine.advance(1)
    machine.run("record", POLICY, generation=generation, failures=2)
    assert (document(client)["last_failure_time"], document(client)["opened_at"]) == (START_MS // 1000 + 2,) * 2
    machine.run("control", action="reset")
    assert (document(client)["last_failure_time"], document(client)["opened_at"]) == (START_MS // 1000 + 2, None)


@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
def test_ignored_reports_write_nothing(client: redis.Redis, state: str) -> None:
    """Outcomes of another generation, of a slot that is gone, or without a needed slot change no byte."""
    machine = lua_machine(client, "discovery")
    generation = bring_to(machine, state)["generation"]
    client.pexpire(KEYS.state, 50_000)
    before = picture(client)
    for request in ({"generation": generation - 1}, {"generation": generation + 1}, {"probe": 9}):
        for outcome in ({"failures": 9}, {"successes": 9}):
            report = {"generation": generation, **request, **outcome}
            assert machine.run("record", POLICY, **report)["applied"] is False
    assert machine.run("record", POLICY, generation=generation, probe=9)["applied"] is False
    if state != "closed":
        assert machine.run("record", POLICY, generation=generation, failures=9)["applied"] is False
    assert picture(client) == before
    assert client.pttl(KEYS.state) <= 50_000


def test_report_after_the_key_was_lost(client: redis.Redis) -> None:
    """The outcome of an old permit does not count, but makes the document whose generation the caller learns."""
    permit = ask(client, "acquire")["generation"]
    client.flushall()
    reply = ask(client, "record", generation=permit, failures=9)
    assert (reply["applied"], reply["state"], reply["failure_count"]) == (False, "closed", 0)
    assert document(client)["generation"] == reply["generation"]


def test_other_probes_after_a_failure(client: redis.Redis) -> None:
    """The first probe failure opens; what the other probes of that half_open report is void."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "half_open_max_calls": 3}
    permit = probe(machine, policy)["generation"]
    machine.run("acquire", policy)
    machine.run("acquire", policy)
    assert machine.run("record", policy, generation=permit, probe=2, failures=1)["state"] == "open"
    for slot in (1, 3):
        assert machine.run("record", policy, generation=permit, probe=slot, successes=1)["applied"] is False
    assert "probes" not in document(client)


def test_released_slot_leaves_nothing(client: redis.Redis) -> None:
    """With no probe in flight the document has no slots."""
    machine = lua_machine(client, "discovery")
    permit = probe(machine)["generation"]
    assert "probes" in document(client)
    machine.run("record", generation=permit, probe=1)
    assert "probes" not in document(client)


def test_failures_rule_over_successes_of_a_probe(client: redis.Redis) -> None:
    """A probe that reports both opens the breaker."""
    machine = lua_machine(client, "discovery")
    permit = probe(machine)["generation"]
    assert machine.run("record", POLICY, generation=permit, probe=1, successes=1, failures=1)["state"] == "open"


def test_trips_in_a_row(client: redis.Redis) -> None:
    """trips and failures count on through failed probes; a close clears them once it has held for an open time."""
    machine = lua_machine(client, "discovery")
    trip(machine)
    for trips in (2, 3):
        machine.advance(1000)
        permit = machine.run("acquire", POLICY)["generation"]
        machine.run("record", POLICY, generation=permit, probe=1, failures=1)
        stored = document(client)
        assert (stored["trips"], stored["failure_count"]) == (trips, trips + 2)
        assert stored["last_failure_time"] == stored["opened_at"] == machine.now_ms // 1000
    machine.advance(1000)
    permit = machine.run("acquire", POLICY)["generation"]
    permit = machine.run("record", POLICY, generation=permit, probe=1, successes=1)["generation"]
    assert (document(client)["trips"], document(client)["closed_at_ms"]) == (3, machine.now_ms)
    machine.advance(999)
    machine.run("record", POLICY, generation=permit, successes=1)
    assert machine.run("snapshot", POLICY)["trips"] == document(client)["trips"] == 3
    machine.advance(1)
    assert machine.run("snapshot", POLICY)["trips"] == 0
    machine.run("record", POLICY, generation=permit, successes=1)
    assert not document(client).keys() & {"trips", "closed_at_ms"}


@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
def test_an_empty_report_renews_the_ttl(client: redis.Redis, state: str) -> None:
    """A report without outcome and probe changes nothing but the TTL, so that it shows whether the server writes."""
    machine = lua_machine(client, "discovery")
    generation = bring_to(machine, state)["generation"]
    client.pexpire(KEYS.state, 50_000)
    before = picture(client)
    assert machine.run("record", POLICY, generation=generation - 1)["applied"] is False
    assert picture(client) == before
    assert client.pttl(KEYS.state) > 3_000_000


@pytest.mark.parametrize("gathered", [{}, {"seen_failure": 0, "age_ms": 50}])
@pytest.mark.parametrize("policy", [None, POLICY])
@pytest.mark.parametrize("script", ["acquire", "record"])
def test_a_healthy_report_writes_no_document(
    client: redis.Redis, script: str, policy: dict[str, int] | None, gathered: dict[str, int]
) -> None:
    """Successes of a breaker that has nothing to forget cost one read and one new expiry."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", policy)["generation"]
    client.pexpire(KEYS.state, 50_000)
    with commands(client) as seen:
        machine.run(script, policy, generation=generation, successes=3, **gathered)
    assert [words[0] for words in seen if words[0] != "GET"] == ["MGET", "PEXPIRE"]  # the clock of the tests is a key
    assert client.pttl(KEYS.state) > 3_000_000


def test_a_kept_window_outlives_the_ttl_of_others(client: redis.Redis) -> None:
    """A report that asks for a shorter window and a shorter TTL does not let the longer window expire."""
    machine, rate = lua_machine(client, "discovery"), {"error_rate_threshold": 0.5, "ttl_ms": 1000}
    generation = machine.run("acquire", {**rate, "window_ms": 60_000})["generation"]
    for window_ms in (60_000, 1000):
        machine.run("record", {**rate, "window_ms": window_ms}, generation=generation, failures=1)
        assert 50_000 < client.pttl(KEYS.state) <= 60_000


@pytest.mark.parametrize(
    ("state", "reporters"), [("closed", False), ("closed", True), ("open", False), ("half_open", False)]
)
def test_what_an_empty_report_writes(client: redis.Redis, state: str, reporters: bool) -> None:
    """A report of nothing renews the TTL; without a generation it also asks for room, and writes nothing there."""
    machine = lua_machine(client, "discovery")
    generation = bring_to(machine, state)["generation"]
    if reporters:
        machine.run("record", {**POLICY, "quorum": 2}, generation=generation, failures=1)
    before = picture(client)
    given = [{"generation": asked} for asked in (generation, generation - 1, 0)]
    for request, expected in (*[(one, ["PEXPIRE"]) for one in given], ({}, ["SETRANGE", "PEXPIRE"])):
        with commands(client) as seen:
            assert machine.run("record", POLICY, **request)["applied"] is False
        writes = [words for words in seen if words[0] not in ("GET", "MGET")]
        assert [words[0] for words in writes] == expected
        assert {words[1] for words in writes} == {KEYS.state}
    assert picture(client) == before
