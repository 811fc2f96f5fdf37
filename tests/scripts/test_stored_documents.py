"""What may lie under the keys: the contract of other programs, other encodings, odd, corrupt and foreign values."""

from __future__ import annotations

import json
from typing import Any

import conftest
import msgpack
import pytest
import redis
from conftest import FROZEN_CLOCK, START_MS, lua_machine
from script_calls import (
    CONTRACT,
    CORRUPT,
    DAY_MS,
    GREATEST_GENERATION,
    KEYS,
    LARGEST,
    NEEDED,
    POLICY,
    ask,
    bring_to,
    document,
    picture,
    put,
)

EVERY_STATE = pytest.mark.parametrize("state", ["closed", "open", "half_open"])


@EVERY_STATE
def test_the_last_change(client: redis.Redis, state: str) -> None:
    """A document that is not closed has the error that opened it; what makes no sense is passed over."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", POLICY)["generation"]
    put(
        client, **_contract(state), version=1, generation=generation, changed_at_ms=7, reason="held", error="Boom: bang"
    )
    seen = machine.run("snapshot", POLICY)
    assert (seen["changed_at_ms"], seen["reason"]) == (7, "held")
    assert seen.get("error") == (None if state == "closed" else "Boom: bang")
    for field, value in (("changed_at_ms", 1.5), ("changed_at_ms", "7"), ("reason", "x" * 31), ("reason", 'a"b')):
        own = {"changed_at_ms": 7, "reason": "held", field: value}
        put(client, **_contract(state), version=1, generation=generation, **own)
        seen = machine.run("snapshot", POLICY)
        assert (seen.get("changed_at_ms"), seen.get("reason"), seen["state"]) == (None, None, state)
    for error in ("", "x" * 201, "caf\u00e9", "a\nb", 7):
        own = {"changed_at_ms": 7, "reason": "held", "error": error}
        put(client, **_contract(state), version=1, generation=generation, **own)
        assert machine.run("snapshot", POLICY).get("error") is None


@EVERY_STATE
def test_the_last_operator(client: redis.Redis, state: str) -> None:
    """Operator and note are taken over; what makes no sense is passed over."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", POLICY)["generation"]
    put(client, **_contract(state), version=1, generation=generation, operator="ann", note="x" * 200)
    seen = machine.run("snapshot", POLICY)
    assert (seen["operator"], seen["note"]) == ("ann", "x" * 200)
    for odd in ("", "x" * 201, "caf\u00e9", "a\nb", "\x1b[2J", 7, None, ["ann"]):
        put(client, **_contract(state), version=1, generation=generation, operator=odd, note=odd)
        seen = machine.run("snapshot", POLICY)
        assert (seen.get("operator"), seen.get("note"), seen["state"]) == (None, None, state)
    put(client, **_contract(state), version=1, operator="ann")
    assert machine.run("snapshot", POLICY).get("operator") is None  # another program wrote it


# The contract fields ----------------------------------------------------------------------------


@EVERY_STATE
def test_contract_fields(client: redis.Redis, state: str) -> None:
    """The stored JSON begins with the five contract fields, in order, as integers or null."""
    bring_to(lua_machine(client, "discovery"), state)
    text = client.get(KEYS.state).decode()
    failures, tripped = (0, "null") if state == "closed" else (3, START_MS // 1000)
    assert text.startswith(
        f'{{"state":"{state}","failure_count":{failures},"success_count":0,'
        f'"last_failure_time":{tripped},"opened_at":{tripped},"'
    )
    own = {
        "closed": set(),
        "open": {"trips", "open_until_ms", "open_ms", "changed_at_ms", "reason"},
        "half_open": {"trips", "probes", "probe_seq", "probe_ms", "changed_at_ms", "reason"},
    }
    assert json.loads(text).keys() == {*CONTRACT, "version", "generation", "failure_number", *own[state]}


@EVERY_STATE
def test_size(client: redis.Redis, state: str) -> None:
    """A document, in half_open with one probe, takes at most 300 bytes."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire")["generation"]
    if state != "closed":
        machine.run("record", generation=generation, failures=5)
        machine.advance(30_000)
    if state == "half_open":
        machine.run("acquire")
    assert document(client)["state"] == state
    print(state, client.strlen(KEYS.state), client.get(KEYS.state))
    assert client.strlen(KEYS.state) <= 300


def _contract(state: str, failures: int = 0, successes: int = 0, last: int | None = None, opened: int | None = None):
    return dict(zip(CONTRACT, (state, failures, successes, last, opened), strict=True))


def test_gateway_closed(client: redis.Redis) -> None:
    """A closed document of five fields goes on with its count, to the trip."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("closed", failures=2, last=START_MS // 1000 - 5))
    reply = machine.run("acquire", POLICY)
    assert (reply["failure_count"], reply.get("warning")) == (2, None)
    assert machine.run("record", POLICY, generation=reply["generation"], failures=1)["state"] == "open"


def test_gateway_open(client: redis.Redis) -> None:
    """An open document of five fields stays open for what is left of its time, then probes."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "reset_timeout_ms": 10_000}
    put(client, **_contract("open", failures=15, last=START_MS // 1000, opened=START_MS // 1000 - 4))
    before = picture(client)
    reply = machine.run("acquire", policy)
    assert (reply["admitted"], reply["retry_after_ms"]) == (False, 6000)
    assert picture(client) == before
    machine.advance(6000)
    reply = machine.run("acquire", policy)
    assert (reply["admitted"], reply["state"], reply["probe"]) == (True, "half_open", 1)
    assert machine.run("record", policy, generation=reply["generation"], probe=1, successes=1)["state"] == "closed"


def test_gateway_open_since_the_last_failure(client: redis.Redis) -> None:
    """Without opened_at the open time counts from the last failure; no time is longer than a reset timeout."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("open", failures=5, last=START_MS // 1000 - 4))
    assert machine.run("acquire")["retry_after_ms"] == 26_000
    put(client, **_contract("open", failures=5, opened=START_MS // 1000 + 3600))
    assert machine.run("snapshot").get("retry_after_ms", 0) <= 30_000


@pytest.mark.parametrize("opened", [None, START_MS // 1000 + 3600])
@pytest.mark.parametrize("missing", ["own fields", "deadline"])
def test_gateway_open_has_an_end(client: redis.Redis, opened: int | None, missing: str) -> None:
    """An open document with no time, or one of a clock ahead of ours, stays open for one reset timeout at most."""
    machine = lua_machine(client, "discovery")
    own = {"version": 1, "generation": START_MS - 9} if missing == "deadline" else {}
    put(client, **_contract("open", failures=15, opened=opened), **own)
    assert machine.run("acquire", POLICY)["admitted"] in (True, False)
    machine.advance(1000)
    assert machine.run("acquire", POLICY)["admitted"] is True


def test_gateway_half_open(client: redis.Redis) -> None:
    """A half-open document of five fields hands out a probe, goes on with its successes, and closes."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "success_threshold": 2}
    put(client, **_contract("half_open", failures=15, successes=1, opened=START_MS // 1000 - 60))
    reply = machine.run("acquire", policy)
    assert (reply["probe"], reply["success_count"], reply.get("transition")) == (1, 1, None)
    assert machine.run("record", policy, generation=reply["generation"], probe=1, successes=1)["state"] == "closed"


@EVERY_STATE
def test_counts_that_are_left_out(client: redis.Redis, state: str) -> None:
    """Counts that are not stored are zero."""
    put(client, state=state)
    seen = lua_machine(client, "discovery").run("snapshot")
    assert (seen["state"], seen["failure_count"], seen["success_count"]) == (state, 0, 0)


def test_the_least_generation(client: redis.Redis) -> None:
    """A stored generation goes on from 1 upwards; less is none."""
    for generation, taken in ((1, 1), (0, START_MS * 1000), (-1, START_MS * 1000)):
        put(client, **_contract("closed"), version=1, generation=generation)
        assert lua_machine(client, "discovery").run("acquire")["generation"] == taken


@pytest.mark.parametrize(
    ("own", "wait"),
    [
        ({"open_until_ms": START_MS + 300, "open_ms": 400}, None),
        ({"open_until_ms": START_MS + 300}, 29_000),
        ({"open_ms": 400}, 29_000),
        ({"open_until_ms": 0, "open_ms": 0}, 0),
        ({"open_until_ms": START_MS + 300, "open_ms": 400, "generation": None}, 29_000),
        ({"open_ms": 400, "generation": None}, 29_000),
        ({"opened_at": None}, 29_500),
    ],
    ids=str,
)
def test_an_open_document_with_half_a_deadline(client: redis.Redis, own: dict[str, Any], wait: int | None) -> None:
    """A deadline needs its own length and a generation; else the time since opened_at counts, in whole seconds."""
    machine = lua_machine(client, "discovery")
    put(client, **{**_contract("open", failures=5, opened=START_MS // 1000 - 1), "generation": 7, **own})
    machine.advance(0 if wait != 29_500 else 500)
    assert machine.run("snapshot")["retry_after_ms"] == (300 if wait is None else wait)


@pytest.mark.parametrize("generation", [1, 10**9 - 1, 10**9 + 1, 10**12 + 7, LARGEST, GREATEST_GENERATION - 1])
def test_every_generation_is_stored_exactly(client: redis.Redis, generation: int) -> None:
    """A generation of any length is written back with all its digits."""
    put(client, **_contract("closed"), version=1, generation=generation)
    lua_machine(client, "discovery").run("record", generation=generation, failures=1)
    assert f'"generation":{generation},"failure_number":1' in client.get(KEYS.state).decode()


def test_unknown_fields(client: redis.Redis) -> None:
    """Fields that we do not know are no reason to doubt a document."""
    stored = {**_contract("closed", failures=2), "shard": "a", "tags": [1, {"x": None}], "note": None}
    client.set(KEYS.state, json.dumps(stored))
    reply = ask(client, "acquire")
    assert (reply["failure_count"], reply.get("warning")) == (2, None)


def test_gateway_rewrites_ours(client: redis.Redis) -> None:
    """A closed document that another program wrote back without our fields goes on, with its count and our permits."""
    machine = lua_machine(client, "discovery")
    permit = machine.run("acquire", POLICY)["generation"]
    machine.run("record", POLICY, generation=permit, failures=1)
    for script, counts, count in (
        ("record", {"failures": 1}, 3),
        ("record", {"successes": 1, "seen_failure": 1}, 2),  # it knew of none of these failures
        ("record", {"successes": 1}, 0),
        ("acquire", {"successes": 1, "failures": 0}, 0),
        ("record", {}, 2),
    ):
        machine.advance(5)
        put(client, **_contract("closed", failures=2))
        request = {key: value for key, value in counts.items() if value}
        reply = machine.run(script, {**POLICY, "failure_threshold": 9}, generation=permit, **request)
        assert (reply["state"], reply["failure_count"], reply["generation"]) == ("closed", count, permit)
        assert document(client)["generation"] == permit
    put(client, **_contract("closed", failures=2))
    assert machine.run("record", POLICY, generation=permit, failures=1)["state"] == "open"


@pytest.mark.parametrize("generation", [None, 0, (START_MS + 6) * 1000])
def test_gateway_and_an_unknown_generation(client: redis.Redis, generation: int | None) -> None:
    """A caller that knows no generation, or one that cannot be, gets a new one; nothing of its counts."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("closed", failures=2))
    machine.advance(5)
    request = {} if generation is None else {"generation": generation, "failures": 1}
    reply = machine.run("record", POLICY, **request)
    assert (reply["applied"], reply["failure_count"], reply["generation"]) == (False, 2, (START_MS + 5) * 1000)


@pytest.mark.parametrize(("state", "slot"), [("open", None), ("open", 1), ("closed", 1), ("half_open", None)])
def test_gateway_and_a_permit_of_another_state(client: redis.Redis, state: str, slot: int | None) -> None:
    """An outcome does not count in a state that did not admit its call."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract(state, failures=2, opened=None if state == "closed" else START_MS // 1000))
    fields = {} if slot is None else {"probe": slot}
    reply = machine.run("record", POLICY, generation=START_MS * 1000 - 9, failures=1, **fields)
    assert (reply["applied"], reply["failure_count"], reply["generation"]) == (False, 2, START_MS * 1000)


@pytest.mark.parametrize(("outcome", "state"), [("successes", "closed"), ("failures", "open")])
def test_gateway_rewrites_ours_while_a_probe_runs(client: redis.Redis, outcome: str, state: str) -> None:
    """A probe that ends after another program wrote a half-open document back counts, though its slot is gone."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("half_open", failures=3, opened=START_MS // 1000 - 1))
    permit = machine.run("acquire", POLICY)
    machine.advance(200)
    put(client, **_contract("half_open", failures=3, opened=START_MS // 1000 - 1))
    reply = machine.run("record", POLICY, generation=permit["generation"], probe=permit["probe"], **{outcome: 1})
    assert (reply["applied"], reply["state"]) == (True, state)


# Bounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [65_536, 65_537])
@pytest.mark.parametrize("kind", ["document", "policy"])
def test_a_value_longer_than_64_kb_is_corrupt(client: redis.Redis, kind: str, size: int) -> None:
    """However sound it is: nobody stores so much, and it would take the server's time in every script."""
    machine, within = lua_machine(client, "discovery"), size <= 65_536
    if kind == "document":
        text = json.dumps({**_contract("closed", failures=2), "generation": START_MS, "x": ""}, separators=(",", ":"))
        client.set(KEYS.state, text.replace('"x":"', '"x":"' + "x" * (size - len(text))))
        reply = machine.run("acquire", POLICY)
        assert (reply["failure_count"], reply.get("warning")) == ((2, None) if within else (0, "corrupt_document"))
        assert (client.strlen(KEYS.state) == size) == within
    else:
        client.set(KEYS.policy, '{"failure_threshold":1' + " " * (size - 23) + "}")
        reply = machine.run("acquire", POLICY)
        assert (reply.get("override"), reply.get("warning")) == (
            ({"failure_threshold": 1}, None) if within else (None, "corrupt_policy")
        )


@pytest.mark.parametrize("count", [1000, 2000])
def test_no_more_than_a_thousand_probes_are_read(client: redis.Redis, count: int) -> None:
    """So many slots can be taken; a document with more was not written by us."""
    probes = {str(number): START_MS + 300 for number in range(count)}
    own = {"generation": 7, "probe_seq": count, "probe_ms": 400, "probes": probes}
    put(client, **_contract("half_open", failures=5, opened=START_MS // 1000), **own)
    assert lua_machine(client, "discovery").run("snapshot")["probes_in_flight"] == 1000


@pytest.mark.parametrize("count", [100, 1000])
def test_no_more_than_a_hundred_reporters_are_read(client: redis.Redis, count: int) -> None:
    """As many as the greatest quorum counts."""
    own = {"generation": 7, "reporters": {f"host-{number}": START_MS for number in range(count)}}
    put(client, **_contract("closed"), **own)
    assert len(lua_machine(client, "discovery").run("snapshot")["reporters"]) == 100


@pytest.mark.parametrize("script", ["acquire", "record"])
@pytest.mark.parametrize("generation", [7, START_MS, LARGEST - 9])
@pytest.mark.parametrize("opened_days", [None, -365, -10, 0, 365])
@pytest.mark.parametrize("open_days", [31, 730, 900_000])
def test_an_open_state_lasts_thirty_days(
    client: redis.Redis, open_days: int, opened_days: int | None, generation: int, script: str
) -> None:
    """Counted from when it began, or from now if that is unknown: then the end is stored, and later scripts keep it."""
    machine = lua_machine(client, "discovery")
    opened = None if opened_days is None else (START_MS + opened_days * DAY_MS) // 1000
    own = {"generation": generation, "open_until_ms": START_MS + open_days * DAY_MS, "open_ms": open_days * DAY_MS}
    put(client, **_contract("open", failures=5, opened=opened), **own)
    left = max(0, 30 * DAY_MS + min(opened_days or 0, 0) * DAY_MS)
    assert machine.run("snapshot")["retry_after_ms"] == pytest.approx(left, abs=999)
    reply = machine.run(script, {"ttl_ms": 1000})
    if left == 0 and script == "acquire":
        assert reply["state"] == "half_open"
        return
    machine.advance(DAY_MS)
    before = picture(client)
    machine.run(script, {"ttl_ms": 1000})
    assert picture(client) == before
    assert machine.run("snapshot")["retry_after_ms"] == pytest.approx(max(left - DAY_MS, 0), abs=999)


@pytest.mark.parametrize("state", ["open", "closed"])
def test_a_forced_state_lasts_thirty_days(client: redis.Redis, state: str) -> None:
    """Counted from when it began, whatever is stored; the end does not move from one script to the next."""
    machine = lua_machine(client, "discovery")
    for began, left_days in ((START_MS - 10 * DAY_MS, 20), (START_MS + 365 * DAY_MS, 30)):
        opened = None if state == "closed" else min(began, START_MS + DAY_MS) // 1000
        own = {"generation": began * 1000, "forced": state, "forced_until_ms": LARGEST}
        own |= {"open_ms": LARGEST, "open_until_ms": LARGEST}
        put(client, **_contract(state, opened=opened), **own)
        for day in range(3):
            left = pytest.approx((left_days - day) * DAY_MS, abs=999)
            assert machine.run("acquire")["forced_left_ms"] == left
            machine.advance(DAY_MS)
        machine.advance(-3 * DAY_MS)


def test_a_slot_lasts_a_day(client: redis.Redis) -> None:
    """The slot of a probe that is due much later is cut to a day from now, or freed if nobody can have given it."""
    machine = lua_machine(client, "discovery")
    for due_days, taken in ((1, True), (2, True), (3, False), (900_000, False)):
        own = {"generation": 7, "probe_seq": 1, "probe_ms": 900_000 * DAY_MS}
        own["probes"] = {"1": START_MS + due_days * DAY_MS}
        put(client, **_contract("half_open", failures=5, opened=START_MS // 1000), **own)
        assert machine.run("acquire")["admitted"] is not taken
        if taken:
            for left in (DAY_MS, DAY_MS // 2, 1):
                machine.advance(START_MS + DAY_MS - left - machine.now_ms)
                assert machine.run("acquire")["admitted"] is False
            machine.advance(1)
            assert machine.run("acquire")["admitted"] is True
        machine.advance(START_MS - machine.now_ms)


@pytest.mark.parametrize("policy", ["hostile", "corrupt", "list"])
def test_reset_replaces_everything(client: redis.Redis, policy: str) -> None:
    """Whatever is stored as document and as policy override, after a reset the caller's own policy is in force."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("open", failures=5), generation=LARGEST - 9, open_until_ms=LARGEST, open_ms=LARGEST)
    if policy == "list":
        client.rpush(KEYS.policy, "x")
    else:
        hostile = {"failure_threshold": 10**9, "ttl_ms": 1000, "enforce": False}
        client.set(KEYS.policy, json.dumps(hostile) if policy == "hostile" else "x" * 100_000)
    reply = machine.run("control", POLICY, action="reset", instance="me")
    assert (reply["state"], reply.get("override"), reply.get("warning")) == ("closed", None, None)
    assert not client.exists(KEYS.policy)
    assert client.pttl(KEYS.state) > 3_000_000
    assert client.xlen(KEYS.history) == 1
    assert machine.run("record", POLICY, generation=reply["generation"], failures=3)["state"] == "open"


# Foreign and corrupt values ---------------------------------------------------------------------


def _goes_on(client: redis.Redis, warning: str | None) -> None:
    """The next acquire warns and admits, and from there failures count and trip."""
    reply = ask(client, "acquire", policy=POLICY)
    assert (reply["admitted"], reply["state"], reply.get("warning")) == (True, "closed", warning)
    assert "warning" not in document(client)
    reply = ask(client, "record", policy=POLICY, generation=reply["generation"], failures=2)
    assert (reply["applied"], reply["failure_count"], reply.get("warning")) == (True, 2, None)
    assert ask(client, "record", policy=POLICY, generation=reply["generation"], failures=1)["state"] == "open"


@pytest.mark.parametrize("value", CORRUPT, ids=lambda value: repr(value[:50]))
def test_corrupt_exists(client: redis.Redis, value: bytes) -> None:
    """A key that holds no document is there all the same."""
    client.set(KEYS.state, value)
    seen = ask(client, "snapshot")
    assert (seen["exists"], seen["warning"]) == (True, "corrupt_document")


@pytest.mark.parametrize("value", CORRUPT, ids=lambda value: repr(value[:50]))
def test_corrupt_document(client: redis.Redis, value: bytes) -> None:
    """A value that is no document is told about by every script, and protection starts anew."""
    client.set(KEYS.state, value)
    assert ask(client, "snapshot")["warning"] == "corrupt_document"
    assert client.get(KEYS.state) == value
    for script in ("record", "control"):
        client.set(KEYS.state, value)
        assert ask(client, script, **NEEDED[script])["warning"] == "corrupt_document"
    client.set(KEYS.state, value)
    _goes_on(client, "corrupt_document")


@pytest.mark.parametrize(
    "command", ["RPUSH k a", "HSET k a b", "SADD k a", "ZADD k 1 a", "XADD k * a b"], ids=lambda text: text.split()[0]
)
def test_foreign_types(client: redis.Redis, command: str) -> None:
    """A value of another type under the state key, or the history key, is replaced by the next write."""
    for key in (KEYS.state, KEYS.history):
        client.execute_command(*[key if word == "k" else word for word in command.split()])
    _goes_on(client, "foreign_key")
    assert client.type(KEYS.state) == b"string"
    if not command.startswith("XADD"):
        assert client.xlen(KEYS.history) == 1


def test_string_under_the_history_key(client: redis.Redis) -> None:
    """A string under the history key gives way to the history."""
    client.set(KEYS.history, "mine")
    _goes_on(client, None)
    assert (client.xlen(KEYS.history), client.ttl(KEYS.history) > 0) == (1, True)


def test_future_version(client: redis.Redis) -> None:
    """A document of a later version is read by what both know, with a warning."""
    put(client, **_contract("closed", failures=1), version=2, generation=START_MS, shards=[1])
    assert ask(client, "snapshot")["warning"] == "future_version"
    reply = ask(client, "acquire", policy=POLICY)
    assert (reply["failure_count"], reply["generation"]) == (1, START_MS)
    assert ask(client, "record", policy=POLICY, generation=START_MS, failures=2)["state"] == "open"


@pytest.mark.parametrize(
    "own",
    [
        {"generation": "x"},
        {"generation": -1},
        {"generation": START_MS + 0.5},
        {"generation": 1e300},
        {"generation": START_MS, "open_until_ms": {}, "open_ms": []},
        {"generation": START_MS, "open_until_ms": 1e300, "open_ms": 1e300},
        {"generation": START_MS, "open_until_ms": START_MS + 10**9, "open_ms": 1000},
        {"generation": START_MS, "trips": "many", "probes": 3, "forced": "open", "forced_until_ms": None},
        {"generation": START_MS, "forced": "open", "forced_until_ms": 99999999999999},
    ],
    ids=repr,
)
def test_odd_own_fields(client: redis.Redis, own: dict[str, Any]) -> None:
    """An open document whose own fields make no sense is open for one reset timeout at most, then closes."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("open", failures=3, opened=START_MS // 1000), version=1, **own)
    machine.advance(1000)
    reply = machine.run("acquire", POLICY)
    assert (reply["admitted"], reply["state"]) == (True, "half_open")
    assert machine.run("record", POLICY, generation=reply["generation"], probe=1, successes=1)["state"] == "closed"


BEYOND = 99999999999999  # the greatest number that is still read


def test_open_time_beyond_every_policy(client: redis.Redis) -> None:
    """An open time of a thousand years, which no policy can mean, has an end within the longest reset timeout."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("open", failures=3), generation=START_MS, open_until_ms=BEYOND, open_ms=BEYOND)
    assert machine.run("acquire", POLICY)["retry_after_ms"] == POLICY["reset_timeout_ms"]
    machine.advance(POLICY["reset_timeout_ms"])
    assert machine.run("acquire", POLICY)["admitted"] is True


@pytest.mark.parametrize("own", [{"generation": 2**53}, {"generation": START_MS, "probe_seq": BEYOND}], ids=repr)
def test_greatest_numbers(client: redis.Redis, own: dict[str, int]) -> None:
    """A generation or probe number after which there is none that a report could name is not taken over."""
    put(client, **_contract("half_open" if "probe_seq" in own else "open", opened=1), version=1, **own)
    reply = ask(client, "acquire", policy=POLICY)
    report = {"generation": reply["generation"], "probe": reply["probe"]}
    assert ask(client, "record", policy=POLICY, **report, successes=1)["state"] == "closed"


@pytest.mark.parametrize(
    ("field", "value", "odd"),
    [
        ("failure_count", 90_000_000_000, None),
        ("failure_count", 90_000_000_001, "corrupt_document"),
        ("last_failure_time", 90_000_000_000, None),
        ("last_failure_time", 90_000_000_001, "corrupt_document"),
        ("failure_number", 9_999_999_999_999, None),
        ("failure_number", 90_000_000_000_000, None),
        ("failure_number", 90_000_000_000_001, "no number"),
        ("generation", 9_000_000_000_000_000, None),
        ("generation", 9_000_000_000_000_001, "another generation"),
    ],
)
@pytest.mark.parametrize("brace", ["}", ' ,"x":1}'])
def test_limits_of_a_healthy_document(client: redis.Redis, field: str, value: int, odd: str | None, brace: str) -> None:
    """A closed document is checked in the form in which we write it as in any other, to the same limits."""
    machine = lua_machine(client, "discovery")
    own = {"version": 1, "generation": START_MS, "failure_number": 0}
    stored = json.dumps({**_contract("closed"), **own, field: value}, separators=(",", ":"))
    client.set(KEYS.state, stored[:-1] + brace)
    seen = machine.run("snapshot")
    assert seen.get("warning") == (odd if odd == "corrupt_document" else None)
    if odd != "corrupt_document":
        taken = seen if field == "last_failure_time" else machine.run("acquire")
        assert (taken[field] == value) is (odd is None)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("changed_at_ms", 0, False),
        ("changed_at_ms", 1, True),
        ("changed_at_ms", 9_999_999_999_999, True),
        ("changed_at_ms", 90_000_000_000_000, True),
        ("changed_at_ms", 90_000_000_000_001, False),
        ("reason", "x" * 30, True),
        ("reason", "x" * 31, False),
        ("operator", "x" * 100, True),
        ("operator", "x" * 101, False),
        ("note", "x" * 200, True),
        ("note", "x" * 201, False),
    ],
)
@pytest.mark.parametrize("brace", ["}", ' ,"x":1}'])
@pytest.mark.parametrize("window", [False, True])
def test_limits_of_the_last_change(
    client: redis.Redis, field: str, value: Any, kept: bool, brace: str, window: bool
) -> None:
    """What a closed document says of its last change is taken to the same limits in every form of it."""
    own = {"version": 1, "generation": START_MS, "failure_number": 0, "changed_at_ms": START_MS, "reason": "reset"}
    own |= {"operator": "ann", "note": "repaired", field: value}
    if window:
        own["window"] = {"bucket_ms": 1000, "newest": NEWEST, **COUNTS}
    stored = json.dumps({**_contract("closed"), **own}, separators=(",", ":"))
    client.set(KEYS.state, stored[:-1] + brace)
    seen = lua_machine(client, "discovery").run("snapshot")
    assert (seen.get(field) == value) is kept
    assert seen["calls"] == window * COUNTS["calls"]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("state", "own", "number"),
    [
        ("closed", {}, START_MS),
        ("closed", {"generation": START_MS}, 3),
        ("closed", {"generation": START_MS, "failure_number": 2}, 3),
        ("closed", {"generation": START_MS, "failure_number": 3}, 3),
        ("closed", {"generation": START_MS, "failure_number": 10}, 10),
        ("closed", {"failure_number": 10}, START_MS),
        ("closed", {"generation": START_MS, "failure_number": "10"}, 3),
        ("closed", {"generation": START_MS, "failure_number": 10.5}, 3),
        ("closed", {"generation": START_MS, "failure_number": -1}, 3),
        ("open", {"generation": START_MS, "failure_number": 10}, 0),
        ("half_open", {"generation": START_MS, "failure_number": 10}, 0),
    ],
    ids=str,
)
def test_a_stored_failure_number(
    client: redis.Redis, dense: bool, state: str, own: dict[str, Any], number: int
) -> None:
    """Where less than the run is stored, its count stands for it; where another program wrote, the clock."""
    machine = lua_machine(client, "discovery")
    stored = {**_contract(state, failures=3, last=START_MS // 1000), "version": 1, **own}
    client.set(KEYS.state, json.dumps(stored, separators=(",", ":") if dense else None))
    assert machine.run("snapshot")["failure_number"] == number
    reply = machine.run("acquire")
    if state == "closed":
        reply = machine.run("record", generation=reply["generation"], successes=1, seen_failure=number - 1, failures=1)
        assert (reply["failure_count"], reply["failure_number"]) == (2, number + 1)
        assert (document(client)["failure_count"], document(client)["failure_number"]) == (2, number + 1)


def test_the_largest_failure_number(client: redis.Redis) -> None:
    """The number ends at the largest integer, and never begins anew within a generation."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "failure_threshold": 10**9}
    put(client, **_contract("closed"), version=1, generation=START_MS, failure_number=LARGEST - 1)
    for failures, count in ((1, 1), (5, 6)):
        reply = machine.run("record", policy, generation=START_MS, failures=failures)
        assert (reply["failure_number"], reply["failure_count"]) == (LARGEST, count)
        assert document(client)["failure_number"] == LARGEST
    reply = machine.run("record", policy, generation=START_MS, successes=1, seen_failure=LARGEST - 2)
    assert (reply["failure_number"], reply["failure_count"]) == (LARGEST, 2)


def test_a_healthy_document_is_not_decoded(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed document that save() wrote, with failures and a window or without, is read by the cheap pattern."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", POLICY)["generation"]
    monkeypatch.setattr(
        conftest, "FROZEN_CLOCK", f"{FROZEN_CLOCK}\nbreaker.take_over = function() error('decoded') end\n"
    )
    monkeypatch.setattr(conftest, "on_frozen_clock", conftest.on_frozen_clock.__wrapped__)
    reset = b'"changed_at_ms":7,"reason":"reset"'
    signed = [reset + by for by in (b"", b',"operator":"ann"', b',"note":"a/b"', b',"operator":"ann","note":"[c]"')]
    for text in [client.get(KEYS.state)[:-1] + b"," + by + b"}" for by in signed]:
        client.set(KEYS.state, text)
        assert machine.run("snapshot").get("note") == json.loads(text).get("note")
    for counts in ({"successes": 1}, {"failures": 2}, {"successes": 1, "seen_failure": 1}):
        reply = machine.run("record", POLICY, generation=generation, **counts)
    assert (reply["failure_count"], reply["failure_number"]) == (1, 2)
    for _ in range(2):
        reply = machine.run("record", RATES, generation=generation, failures=1)
    assert (reply["failure_count"], reply["failure_number"], document(client)["window"]["failures"]) == (3, 4, 2)
    client.set(KEYS.state, client.get(KEYS.state).replace(b'"failure_number":', b'"failure_number": '))
    with pytest.raises(redis.ResponseError, match="decoded"):
        machine.run("acquire")


@pytest.mark.parametrize("state", ["closed", "open"])
def test_a_new_end_without_a_last_change(client: redis.Redis, state: str) -> None:
    """A forced state of which nothing tells when and why it began can be given another end."""
    put(client, **_contract(state), generation=START_MS, forced=state, forced_until_ms=START_MS + 9000)
    machine = lua_machine(client, "discovery")
    assert machine.run("control", action=f"force_{state}", duration_ms=5000)["changed"]
    seen = machine.run("snapshot")
    assert (seen["forced_left_ms"], seen["reason"], seen["changed_at_ms"]) == (5000, "forced", START_MS)


def test_forced_half_open(client: redis.Redis) -> None:
    """There is no such override as half_open."""
    until = {"forced": "half_open", "forced_until_ms": START_MS + 9000}
    put(client, **_contract("half_open"), version=1, generation=START_MS, **until)
    assert lua_machine(client, "discovery").run("snapshot").get("forced") is None


@pytest.mark.parametrize(
    "probes",
    [None, 7, "x", [1], {"1": "soon"}, {"1": 1e300}, {"1": START_MS + 10**9}, {"1": {"deadline": 1}}, {"": START_MS}],
    ids=repr,
)
def test_odd_probes(client: redis.Redis, probes: Any) -> None:
    """Probe slots that make no sense do not hold up recovery."""
    machine = lua_machine(client, "discovery")
    put(client, **_contract("half_open"), version=1, generation=START_MS, probe_seq=7, probe_ms=400, probes=probes)
    slot = machine.run("acquire", POLICY)["probe"]
    assert machine.run("record", POLICY, generation=START_MS, probe=slot, successes=1)["state"] == "closed"


def test_probes_without_their_length(client: redis.Redis) -> None:
    """Without the longest time that a slot was given, no deadline is believed, not even the next millisecond."""
    put(client, **_contract("half_open"), version=1, generation=START_MS, probes={"1": START_MS + 1})
    assert lua_machine(client, "discovery").run("acquire", POLICY)["admitted"] is True


@pytest.mark.parametrize("trips", [1, 2])
def test_trips_without_a_recovery(client: redis.Redis, trips: int) -> None:
    """A closed document that does not say when it closed has no row of trips, whatever comes next."""
    put(client, **_contract("closed"), version=1, generation=START_MS, trips=trips)
    machine = lua_machine(client, "discovery")
    machine.run("control", POLICY, action="force_open")
    assert machine.run("snapshot", POLICY)["trips"] == 0


def test_a_thousand_trips(client: redis.Redis) -> None:
    """Trips in a row count to a thousand, also those that are stored."""
    machine = lua_machine(client, "discovery")
    for stored, counted in ((998, 999), (999, 1000), (1000, 1000), (1001, 1000)):
        put(client, **_contract("half_open"), version=1, generation=START_MS, trips=stored)
        assert machine.run("snapshot")["trips"] == min(stored, 1000)
        slot = machine.run("acquire", POLICY)["probe"]
        machine.run("record", POLICY, generation=START_MS, probe=slot, failures=1)
        assert machine.run("snapshot")["trips"] == document(client)["trips"] == counted


@pytest.mark.parametrize("state", ["open", "closed"])
def test_the_longest_override(client: redis.Redis, state: str) -> None:
    """A forced state that has ended is none; one that would last longer than thirty days ends then."""
    machine = lua_machine(client, "discovery")
    for ends, left in ((0, None), (1, 1), (30 * DAY_MS, 30 * DAY_MS), (LARGEST - START_MS, 30 * DAY_MS)):
        own = {"version": 1, "generation": START_MS * 1000, "forced": state, "forced_until_ms": START_MS + ends}
        put(client, **_contract(state, opened=None if state == "closed" else START_MS // 1000), **own)
        seen = machine.run("snapshot")
        assert seen.get("forced") == (None if left is None else state)
        assert seen.get("forced_left_ms") == (left and pytest.approx(left, abs=999))


@pytest.mark.parametrize("reporters", [{"a": "soon"}, {"a": START_MS + 60_001}, {"a": -1}, [START_MS], "a"])
def test_odd_reporters(client: redis.Redis, reporters: Any) -> None:
    """Reporters that make no sense count for no quorum, and do not hold up those that do."""
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "quorum": 2, "failure_threshold": 1}
    stored = {**_contract("closed"), "version": 1, "generation": START_MS, "reporters": reporters}
    client.set(KEYS.state, json.dumps(stored))
    assert machine.run("record", policy, generation=START_MS, failures=1, instance="b")["state"] == "closed"
    assert machine.run("snapshot", policy)["reporters"] == {"b": START_MS}
    assert machine.run("record", policy, generation=START_MS, failures=1, instance="c")["state"] == "open"


def test_a_document_without_counts(client: redis.Redis) -> None:
    """Where another program stored no count there are no failures, and none has a number."""
    put(client, state="closed", generation=START_MS)
    seen = lua_machine(client, "discovery").run("snapshot")
    assert (seen["failure_count"], seen["failure_number"]) == (0, 0)


@pytest.mark.parametrize(
    ("generation", "applied"), [(0, False), (1, True), (START_MS * 1000, True), (START_MS * 1000 + 1, False)]
)
def test_reports_to_a_document_without_a_generation(client: redis.Redis, generation: int, applied: bool) -> None:
    """They count under any generation that there may have been until now."""
    put(client, **_contract("closed"))
    reply = lua_machine(client, "discovery").run("record", POLICY, generation=generation, failures=1)
    assert (reply["applied"], reply["failure_count"]) == (applied, int(applied))


@pytest.mark.parametrize("since", ["the last change", "the generation"])
@pytest.mark.parametrize(("left_ms", "forced"), [(1, "closed"), (0, None)])
def test_the_last_millisecond_of_a_forced_state(
    client: redis.Redis, left_ms: int, forced: str | None, since: str
) -> None:
    """Whatever end another program stored, it is over thirty days after it began."""
    began = START_MS - 30 * DAY_MS + left_ms
    own = {"generation": began * 1000 + 999}
    if since == "the last change":
        own = {"generation": 7, "changed_at_ms": began, "reason": "forced"}
    put(client, **_contract("closed"), version=1, **own, forced="closed", forced_until_ms=LARGEST)
    seen = lua_machine(client, "discovery").run("snapshot")
    assert (seen.get("forced"), seen.get("forced_left_ms", 0)) == (forced, left_ms)


def test_an_open_state_without_a_last_change(client: redis.Redis) -> None:
    """It began in the second of opened_at, and its thirty days are counted from the end of that second."""
    opened = (START_MS - 30 * DAY_MS) // 1000
    put(client, **_contract("open", failures=3, opened=opened), generation=7, open_until_ms=LARGEST, open_ms=LARGEST)
    assert lua_machine(client, "discovery").run("snapshot")["retry_after_ms"] == 999


@pytest.mark.parametrize(("left_ms", "retry_after_ms"), [(2000, 2000), (2001, 0)])
def test_a_deadline_twice_as_far_as_it_may_be(client: redis.Redis, left_ms: int, retry_after_ms: int) -> None:
    """Beyond twice the open period the clock went back, and the deadline is due."""
    own = {"version": 1, "generation": 7, "open_until_ms": START_MS + left_ms, "open_ms": 1000}
    put(client, **_contract("open", failures=3, opened=START_MS // 1000), **own)
    assert lua_machine(client, "discovery").run("snapshot")["retry_after_ms"] == retry_after_ms


@pytest.mark.parametrize(("held", "applied"), [(0, False), (1, True), (7, True), (8, False)])
def test_a_stored_hold_is_extended(client: redis.Redis, held: int, applied: bool) -> None:
    """By reports under the generation that it ended, which no later one than the present can be."""
    own = {"version": 1, "generation": 7, "open_until_ms": START_MS + 50, "open_ms": 50, "held_generation": held}
    put(client, **_contract("open", failures=3, opened=START_MS // 1000), **own)
    reply = lua_machine(client, "discovery").run("record", POLICY, generation=held, hold_ms=900)
    assert (reply["applied"], reply["retry_after_ms"]) == (applied, 900 if applied else 50)


@pytest.mark.parametrize(("failed", "state"), [(10**9, "open"), (10**9 + 1, "half_open")])
def test_the_most_failed_probes(client: redis.Redis, failed: int, state: str) -> None:
    """As many are read as a policy may tolerate; of more than that none."""
    own = {"version": 1, "generation": 7, "probe_failures": failed, "probe_seq": 1, "probe_ms": 400}
    put(client, **_contract("half_open", failures=3), **own, probes={"1": START_MS + 400})
    policy = {**POLICY, "probe_failure_threshold": 2}
    reply = lua_machine(client, "discovery").run("record", policy, generation=7, probe=1, failures=1)
    assert reply["state"] == state


def test_a_pending_probe_of_a_document_without_a_generation(client: redis.Redis) -> None:
    """Its slot is gone: while its call is still running it gets a millisecond."""
    put(client, **_contract("half_open", failures=3))
    machine = lua_machine(client, "discovery")
    reply = machine.run("record", POLICY, generation=5, probe=1, slow=1, pending=1)
    assert (reply["applied"], reply["retry_after_ms"]) == (True, 1)
    assert document(client)["probes"] == {"1": START_MS + 1}


def test_a_window_without_past_buckets(client: redis.Redis) -> None:
    """Where another program stored no past buckets they are empty, and take what ended then."""
    machine = lua_machine(client, "discovery")
    window = {"bucket_ms": 1000, "newest": NEWEST, "calls": 4, "failures": 2, "slow": 1, "past": ""}
    put(client, **_contract("closed"), version=1, generation=START_MS, window=window)
    assert machine.run("record", RATES, generation=START_MS, successes=3, age_ms=2000)["applied"] is True
    assert document(client)["window"] == {**window, "calls": 7, "past": "3,0,0; 0,0,0 3,0,0" + 7 * " 0,0,0"}


def test_open_since_this_very_second(client: redis.Redis) -> None:
    """Opened now is not opened in the future: a refusal writes no deadline."""
    put(client, **_contract("open", failures=5, opened=START_MS // 1000))
    machine = lua_machine(client, "discovery")
    before = picture(client)
    assert machine.run("acquire")["retry_after_ms"] == 30_000
    assert picture(client) == before


RATES = {"failure_threshold": 10**9, "error_rate_threshold": 0.5, "minimum_calls": 10, "window_ms": 10_000}
NEWEST = START_MS // 1000
COUNTS = {"calls": 20, "failures": 2, "slow": 1, "past": "13,1,1; 7,1,0 6,0,1" + 7 * " 0,0,0"}


def test_stored_window(client: redis.Redis) -> None:
    """The window holds the counts of all buckets, and those of the past ones apart, as long as they are within it."""
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", RATES)["generation"]
    for counts in ({"successes": 6, "slow": 1}, {"successes": 6, "failures": 1}, {"successes": 6, "failures": 1}):
        machine.run("record", RATES, generation=generation, **counts)
        machine.advance(1000)
    assert document(client)["window"] == {"bucket_ms": 1000, "newest": NEWEST + 2, **COUNTS}
    machine.advance(7000)  # the first bucket has passed
    machine.run("record", RATES, generation=generation, successes=1)
    counts = {"calls": 15, "failures": 2, "slow": 0, "past": "14,2,0;" + 7 * " 0,0,0" + " 7,1,0 7,1,0"}
    assert document(client)["window"] == {"bucket_ms": 1000, "newest": NEWEST + 10, **counts}


@pytest.mark.parametrize(
    "window",
    [
        7,
        [],
        {},
        {"bucket_ms": 0, "newest": NEWEST, **COUNTS},
        {"bucket_ms": 1000, "newest": "x", **COUNTS},
        {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "calls": -1},
        {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "failures": 1e300},
        {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "past": [7]},
        {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "past": "many"},
        {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "past": "9,9,9; " + "9" * 389 + ",0,0"},
        {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "past": "99,9,9; " + "9" * 99 + ",9,9 " + "9" * 99 + ",9,9"},
        {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "past": "1,1,1;" + " 1,1,1" * 60},
        {"bucket_ms": 1000, "newest": 3, **COUNTS},
        {"bucket_ms": 1000, "newest": NEWEST * 2, **COUNTS},
    ],
    ids=lambda window: repr(window)[:60],
)
@pytest.mark.parametrize("later_ms", [0, 1000, 5000, 60_000])
def test_odd_window(client: redis.Redis, window: Any, later_ms: int) -> None:
    """A window that makes no sense leaves no more counts than it has in all, and failures trip by their rate."""
    machine = lua_machine(client, "discovery")
    stored = {**_contract("closed"), "version": 1, "generation": START_MS, "failure_number": 0, "window": window}
    dense = (",", ":") if later_ms in (0, 1000) else None  # as save writes it, or not
    client.set(KEYS.state, json.dumps(stored, separators=dense))
    machine.advance(later_ms)
    assert machine.run("record", RATES, generation=START_MS, successes=1)["applied"] is True
    stored = document(client)["window"]
    assert stored["bucket_ms"] == 1000
    assert 1 <= stored["calls"] <= 21
    assert len(stored["past"]) <= 450
    assert machine.run("record", RATES, generation=START_MS, failures=100)["transition"]["reason"] == "error_rate"


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"past": ";" * 400}, True),
        ({"past": ";" * 401}, False),
        ({"calls": 0}, True),
        ({"bucket_ms": 31_536_000_000}, True),
        ({"bucket_ms": 31_536_000_001}, False),
        ({"calls": 90_000_000_000_000}, True),
        ({"calls": 90_000_000_000_001}, False),
        ({"failures": 90_000_000_000_001}, False),
        ({"slow": 90_000_000_000_001}, False),
        ({"newest": 90_000_000_000_001}, False),
        ({"shorter_since": 0}, True),
        ({"shorter_since": -1}, False),
        ({"shorter_since": 90_000_000_000_000}, True),
        ({"shorter_since": 90_000_000_000_001}, False),
    ],
    ids=lambda changed: str(changed)[:30],
)
def test_limits_of_a_stored_window(client: redis.Redis, dense: bool, changed: dict[str, Any], kept: bool) -> None:
    """Within its limits a stored window is taken as it is, beyond them not at all, in whatever form it is stored."""
    machine = lua_machine(client, "discovery")
    window = {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, **changed}
    window["newest"] = changed.get("newest", START_MS // window["bucket_ms"])
    stored = {**_contract("closed"), "version": 1, "generation": START_MS, "failure_number": 0, "window": window}
    client.set(KEYS.state, json.dumps(stored, separators=(",", ":") if dense else None))
    machine.run("record", generation=START_MS, failures=1)
    written = document(client)
    assert ("window" in written) is kept
    if kept:
        assert written["window"]["failures"] == window["failures"] + 1


@pytest.mark.parametrize("past", [" 50,50,50" * 9, " 20,2,1" * 9, 9 * " 0,0,0" + " 5,1,1", 9 * " 0,0,0" + " 5,1,1" * 9])
def test_odd_window_of_another_length(client: redis.Redis, past: str) -> None:
    """Where the window's length is another, no past bucket has more than there is in all, and none is too old."""
    machine = lua_machine(client, "discovery")
    longer = {**RATES, "minimum_calls": 10**9, "window_ms": 20_000}
    window = {"bucket_ms": 1000, "newest": NEWEST, **COUNTS, "past": f"9,9,9;{past}"}
    put(client, **_contract("closed"), version=1, generation=START_MS, window=window)
    machine.run("record", longer, generation=START_MS, successes=1)
    machine.advance(10_000)
    seen = machine.run("snapshot", longer)
    assert (seen["calls"], seen["failures"], seen["slow"]) == (21, 2, 1)


@pytest.mark.parametrize("slot", ["7", "x\n\u00e9"])
def test_probe_slots_of_any_name(client: redis.Redis, slot: str) -> None:
    """A slot that another program named holds until its deadline."""
    machine = lua_machine(client, "discovery")
    probes = {slot: START_MS + 399}
    put(client, **_contract("half_open"), version=1, generation=START_MS, probe_seq=7, probe_ms=400, probes=probes)
    assert machine.run("acquire", POLICY)["retry_after_ms"] == 100
    machine.advance(398)
    assert machine.run("acquire", POLICY)["retry_after_ms"] == 1
    machine.advance(1)
    assert machine.run("acquire", POLICY)["probe"] == 8


@EVERY_STATE
def test_what_is_stored(client: redis.Redis, state: str) -> None:
    """A document is stored as JSON, whatever the form of the request, and has the fields of its state."""
    stored = []
    for use_json in (True, False):
        client.flushall()
        machine = lua_machine(client, "discovery", use_json=use_json)
        policy = {**POLICY, "quorum": 2, "error_rate_threshold": 0.9}
        for instance in ("a", "b"):
            generation = machine.run("acquire", policy)["generation"]
            counts = {"failures": 1, "slow": 1} if state == "closed" else {"failures": 3}
            machine.run("record", policy, generation=generation, instance=instance, **counts)
        if state == "half_open":
            machine.advance(1000)
            machine.run("acquire", policy)
        stored.append(document(client))
    assert stored[0] == stored[1]
    own = {
        "closed": {"window", "reporters", "run_since_ms"},
        "open": {"trips", "open_until_ms", "open_ms", "changed_at_ms", "reason"},
        "half_open": {"trips", "probes", "probe_seq", "probe_ms", "changed_at_ms", "reason"},
    }
    assert stored[0].keys() == {*CONTRACT, "version", "generation", "failure_number", *own[state]}


def test_an_open_circuit_has_no_reporters(client: redis.Redis) -> None:
    """Slow calls of two hosts trip it without a run of failures; who reported them is not stored any longer."""
    policy = {"quorum": 2, "slow_call_rate_threshold": 0.5, "minimum_calls": 2}
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", policy)["generation"]
    for instance, state, kept in (("a", "closed", True), ("b", "open", False)):
        machine.run("record", policy, generation=generation, successes=1, slow=1, instance=instance)
        assert (document(client)["state"], "reporters" in document(client)) == (state, kept)


def test_a_document_in_msgpack_is_corrupt(client: redis.Redis) -> None:
    """There is one stored form: a document in msgpack is replaced like any other garbage."""
    client.set(KEYS.state, msgpack.packb({**_contract("open", failures=5, opened=START_MS // 1000), "generation": 7}))
    _goes_on(client, "corrupt_document")


@pytest.mark.parametrize("own", [{}, {"version": 2, "generation": 7}])
def test_a_reset_replaces_what_others_stored(client: redis.Redis, own: dict[str, int]) -> None:
    """A document without a generation, or of a later version, is something to reset, also if it says closed."""
    put(client, **_contract("closed"), **own)
    assert [ask(client, "control", action="reset")["changed"] for _ in range(2)] == [True, False]


# A clock that goes back a little ----------------------------------------------------------------


@pytest.mark.parametrize("back_ms", [1, 400])
def test_a_clock_that_goes_back_a_little(client: redis.Redis, back_ms: int) -> None:
    """A step of the server's clock ends no open time, no override, no row of trips and no ramp."""
    policy = {**POLICY, "failure_threshold": 1, "backoff_multiplier": 2, "ramp_up_ms": 60_000, "reset_timeout_ms": 1000}
    machine = lua_machine(client, "discovery")
    generation = machine.run("acquire", policy)["generation"]
    machine.run("record", policy, generation=generation, failures=1)
    machine.advance(-back_ms)
    refused = machine.run("acquire", policy)
    assert (refused["admitted"], refused["retry_after_ms"]) == (False, 1000 + back_ms)
    machine.advance(1000 + back_ms)
    probe = machine.run("acquire", policy)
    machine.advance(-back_ms)
    assert machine.run("snapshot", policy)["probes_in_flight"] == 1
    machine.run("record", policy, generation=probe["generation"], probe=probe["probe"], successes=1)
    machine.advance(-back_ms)
    machine.run("record", policy, generation=machine.run("snapshot", policy)["generation"], successes=1)
    seen = machine.run("snapshot", policy)
    assert (seen["trips"], seen["ramp_left_ms"]) == (1, 60_000)
    for action, state in (("force_open", "open"), ("force_closed", "closed")):
        machine.run("control", policy, action=action)
        machine.advance(-back_ms)
        seen = machine.run("snapshot", policy)
        assert (seen["state"], seen["forced"]) == (state, state)
