"""Policies by hand: what every script refuses of one, what control.lua stores of one, and what is made of garbage."""

from __future__ import annotations

import json
import math
from typing import Any

import msgpack
import pytest
import redis
from conftest import START_MS, lua_machine, wait_until
from script_calls import (
    DAY_MS,
    KEYS,
    LARGEST,
    NEEDED,
    POLICY,
    ask,
    bodies,
    call,
    document,
    messages,
    must_refuse,
    picture,
    put,
)

from pybreaker_redis._policy import DEFAULT_REQUEST
from pybreaker_redis.wire.scripts import SCRIPTS

YEAR_MS = 365 * DAY_MS
# least, most, and whether it may lie between integers
LIMITS: dict[str, tuple[float, float, bool]] = {
    "failure_threshold": (1, 10**9, False),
    "reset_timeout_ms": (1, 30 * DAY_MS, False),
    "success_threshold": (1, 10**9, False),
    "probe_failure_threshold": (1, 10**9, False),
    "failures_in_window": (0, 10**9, False),
    "half_open_max_calls": (1, 1000, False),
    "probe_timeout_ms": (1, DAY_MS, False),
    "error_rate_threshold": (0, 1, True),
    "minimum_calls": (1, 10**9, False),
    "window_ms": (10, DAY_MS, False),
    "slow_call_duration_ms": (0, YEAR_MS, False),
    "slow_call_rate_threshold": (0, 1, True),
    "backoff_multiplier": (1, 1000, True),
    "max_reset_timeout_ms": (0, 30 * DAY_MS, False),
    "jitter": (0, 1, True),
    "quorum": (1, 100, False),
    "max_hold_ms": (0, 30 * DAY_MS, False),
    "ttl_ms": (1000, YEAR_MS, False),
    "ramp_up_ms": (0, YEAR_MS, False),
}
NO_NUMBERS = ["1", "", True, False, [1], {"a": 1}, math.nan, math.inf, -math.inf, 1e300]
GARBAGE: list[bytes] = [
    b"",
    b"garbage",
    b"[]",
    b"null",
    b"7",
    b'{"quorum":2',
    b'{"quorum":0}',
    b'{"quorum":null}',
    b'{"color":1}',
    b'{"failure_threshold":2,"enforce":1}',
    b"\x91" * 10_000,
    msgpack.packb({"window_ms": 9}),
    msgpack.packb({"jitter": math.nan}),
]


def bad_values(field: str) -> list[Any]:
    """What is just outside of the limits, and what is no number at all."""
    least, most, broken = LIMITS[field]
    return [*NO_NUMBERS, *([least - 1e-9, most + 1e-9] if broken else [least - 1, most + 1, least + 0.5])]


def set_policy(client: redis.Redis, override: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The reply to set_policy."""
    return ask(client, "control", action="set_policy", override=override, **fields)


def test_every_field_has_limits() -> None:
    """The tests below know every field."""
    assert {*LIMITS, "enforce"} == set(DEFAULT_REQUEST)


@pytest.mark.parametrize("field", LIMITS)
def test_bad_override_values(client: redis.Redis, field: str) -> None:
    """A value outside its limits or of another type is refused by field, also beside good ones."""
    for value in bad_values(field):
        for body in bodies({"action": "set_policy", "override": {field: value, "enforce": True}}):
            must_refuse(client, "control", body, names=f"override.{field}")


@pytest.mark.parametrize("field", LIMITS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_policy_values(client: redis.Redis, script: str, field: str) -> None:
    """What a caller sends as its own policy is checked by the same limits, by every script."""
    for value in bad_values(field)[-2:]:
        body = json.dumps({**NEEDED.get(script, {}), "policy": {field: value}})
        must_refuse(client, script, body, names=f"policy.{field}")


@pytest.mark.parametrize("field", LIMITS)
def test_limits_are_allowed(client: redis.Redis, field: str) -> None:
    """The least and the most of each field are taken, stored and told exactly."""
    for value in LIMITS[field][:2]:
        assert set_policy(client, {field: value})["override"] == {field: value}
        assert json.loads(client.get(KEYS.policy)) == {field: value}
        assert ask(client, "snapshot")["policy"][field] == value


@pytest.mark.parametrize("value", [0, 1, "false", [], {}, math.nan])
def test_enforce_is_true_or_false(client: redis.Redis, value: Any) -> None:
    """Nothing else is taken for the one flag."""
    for body in bodies({"action": "set_policy", "override": {"enforce": value}}):
        must_refuse(client, "control", body, names="override.enforce")
    for body in bodies({"policy": {"enforce": value}}):
        must_refuse(client, "acquire", body, names="policy.enforce")


def test_null_is_no_value(client: redis.Redis) -> None:
    """In JSON a null is refused like any other value that is none; in msgpack a field without a value is none."""
    body = json.dumps({"action": "set_policy", "override": {"quorum": None, "jitter": 1}})
    must_refuse(client, "control", body, names="override.quorum")
    must_refuse(
        client, "control", msgpack.packb({"action": "set_policy", "override": {"quorum": None}}), names="override"
    )


@pytest.mark.parametrize("field", ["color", "reset_timeout", "FAILURE_THRESHOLD", "", "a\r\nb"])
def test_unknown_fields(client: redis.Redis, field: str) -> None:
    """A field that no policy has is refused, also one in seconds."""
    for body in bodies({"action": "set_policy", "override": {field: 1}}):
        must_refuse(client, "control", body, names="override." + field.replace("\r\n", "??"))


@pytest.mark.parametrize("override", [7, "quorum", True, 0.5])
def test_override_is_a_map(client: redis.Redis, override: Any) -> None:
    """What is no map is no override."""
    for body in bodies({"action": "set_policy", "override": override}):
        must_refuse(client, "control", body, names="override")


def test_a_list_of_fields(client: redis.Redis) -> None:
    """A list is a map of numbers, which are no fields."""
    for body in bodies({"action": "set_policy", "override": ["quorum", 2]}):
        must_refuse(client, "control", body, names="override.1")


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        ({"action": "set_policy"}, "override"),
        ({"action": "set_policy", "override": None}, "override"),
        ({"action": "set_policy", "override": {}}, "override"),
        ({"action": "set_policy", "policy": {"quorum": 2}}, "override"),
        ({"action": "clear_policy", "override": {"quorum": 2}}, "override"),
        ({"action": "reset", "override": {"quorum": 2}}, "override"),
        ({"action": "force_open", "override": {"quorum": 2}}, "override"),
        ({"action": "clear_policy", "duration_ms": 5}, "duration_ms"),
        ({"action": "set_policy", "override": {"quorum": 2}, "duration_ms": 0}, "duration_ms"),
        ({"action": "set_policy", "override": {"quorum": 2}, "duration_ms": 30 * DAY_MS + 1}, "duration_ms"),
        ({"override": {"quorum": 2}}, "action"),
        ({"action": "setpolicy", "override": {"quorum": 2}}, "action"),
    ],
)
def test_requests_that_make_no_sense(client: redis.Redis, request_: dict[str, Any], names: str) -> None:
    """Overrides and durations go with the actions that take them only."""
    for body in bodies(request_):
        must_refuse(client, "control", body, names=names)


@pytest.mark.parametrize("script", ["acquire", "record", "snapshot"])
def test_others_take_no_override(client: redis.Redis, script: str) -> None:
    """An override is set by control.lua alone."""
    body = json.dumps({**NEEDED.get(script, {}), "override": {"quorum": 2}})
    must_refuse(client, script, body, names="override")


def test_counts_that_refer_to_others(client: redis.Redis) -> None:
    """No more calls are pending than slow, and none is counted that did not end."""
    for counts in ({"pending": 1}, {"pending": 2, "slow": 1}):
        for script in ("acquire", "record"):
            for body in bodies({"generation": 1, **counts}):
                must_refuse(client, script, body, names="pending")
    for counts in ({"counted": 1}, {"counted": 3, "successes": 1, "failures": 1}):
        for body in bodies({"generation": 1, **counts}):
            must_refuse(client, "record", body, names="counted")
    must_refuse(client, "acquire", json.dumps({"generation": 1, "counted": 1}), names="counted")


def test_a_refusal_leaves_the_override(client: redis.Redis) -> None:
    """A bad value changes nothing of what was set before, nor when it ends."""
    set_policy(client, {"quorum": 2, "jitter": 0.5}, duration_ms=50_000)
    before = picture(client)
    for body in bodies({"action": "set_policy", "override": {"quorum": 3, "jitter": 2}}):
        with pytest.raises(redis.ResponseError, match=r"^BADREQUEST override\.jitter: must be a number from 0 to 1"):
            call(client, "control", body)
    assert picture(client) == before
    assert 0 < client.pttl(KEYS.policy) <= 50_000


def test_set_policy_stores_no_document(client: redis.Redis) -> None:
    """It writes a map in JSON under the policy key, which does not expire, and a history entry; it makes no state."""
    reply = set_policy(client, {"failure_threshold": 2, "enforce": False})
    assert reply["changed"] is True
    assert set(client.keys()) == {KEYS.policy.encode(), KEYS.history.encode()}
    assert json.loads(client.get(KEYS.policy)) == {"failure_threshold": 2, "enforce": False}
    assert client.ttl(KEYS.policy) == -1
    assert ask(client, "control", action="clear_policy")["changed"] is True
    assert client.keys() == [KEYS.history.encode()]
    assert 86_000_000 < client.pttl(KEYS.history) <= 86_400_000


@pytest.mark.parametrize("value", [1 / 3, 0.1 + 0.2, 1e-9, 0.07, 1 - 2**-53])
def test_exact_values(client: redis.Redis, value: float) -> None:
    """A share is stored without loss."""
    call(client, "control", msgpack.packb({"action": "set_policy", "override": {"jitter": value}}))
    assert json.loads(client.get(KEYS.policy)) == {"jitter": value}
    assert msgpack.unpackb(call(client, "snapshot", msgpack.packb({})))["override"] == {"jitter": value}


def test_end_of_a_policy(client: redis.Redis) -> None:
    """A policy with a duration ends by itself on the server's clock."""
    set_policy(client, {"failure_threshold": 1}, duration_ms=150)
    assert ask(client, "acquire")["override"] == {"failure_threshold": 1}
    wait_until(lambda: ask(client, "acquire").get("override") is None)
    wait_until(lambda: not client.exists(KEYS.policy))  # a millisecond later
    generation = ask(client, "acquire")["generation"]
    assert ask(client, "record", generation=generation, failures=1)["state"] == "closed"


@pytest.mark.parametrize(
    ("until_ms", "left_ms"),
    [(0, None), (START_MS, None), (START_MS + 1, 1), (LARGEST, LARGEST - START_MS)],
)
def test_the_last_millisecond_of_a_policy(client: redis.Redis, until_ms: int, left_ms: int | None) -> None:
    """A stored override is in force until its end, and passed over from then on, without a warning."""
    client.set(KEYS.policy, json.dumps({"quorum": 2, "until_ms": until_ms}))
    seen = lua_machine(client, "discovery").run("snapshot")
    assert (seen.get("override_left_ms"), seen.get("warning")) == (left_ms, None)
    assert seen["policy"]["quorum"] == (1 if left_ms is None else 2)


@pytest.mark.parametrize(("field", "most"), [("operator", 100), ("note", 200)])
def test_the_longest_operator_of_a_policy(client: redis.Redis, field: str, most: int) -> None:
    """A stored operator or note is told up to the length that control.lua takes, and not at all beyond it."""
    for length in (most, most + 1):
        client.set(KEYS.policy, json.dumps({"quorum": 2, field: "x" * length}))
        assert ask(client, "snapshot").get(f"override_{field}") == ("x" * length if length == most else None)


def test_the_last_duration_holds_for_all(client: redis.Redis) -> None:
    """Every set_policy gives all fields its own end, or none."""
    set_policy(client, {"quorum": 2}, duration_ms=1)
    set_policy(client, {"jitter": 0.5}, duration_ms=30 * DAY_MS)
    assert 30 * DAY_MS - 60_000 < client.pttl(KEYS.policy) <= 30 * DAY_MS
    set_policy(client, {"jitter": 0.25})
    assert client.pttl(KEYS.policy) == -1


def test_a_message_for_each_policy(client: redis.Redis) -> None:
    """Setting and clearing are published, once each; clearing nothing is not."""
    with messages(client) as heard:
        set_policy(client, {"quorum": 2}, instance="me")
        ask(client, "control", action="clear_policy", instance="me")
        ask(client, "control", action="clear_policy", instance="me")
    assert [(one["reason"], one["instance"]) for one in heard] == [("set_policy", "me"), ("clear_policy", "me")]


@pytest.mark.parametrize("value", GARBAGE)
def test_garbage_is_ignored(client: redis.Redis, value: bytes) -> None:
    """An override that is none is told as a warning by every script, and the caller's policy holds."""
    client.set(KEYS.policy, value)
    generation = ask(client, "acquire", policy=POLICY)["generation"]
    for script, request in (
        ("acquire", {}),
        ("snapshot", {}),
        ("record", {"generation": generation, "failures": 2}),
        ("control", {"action": "clear_forced"}),
    ):
        reply = ask(client, script, policy=POLICY, **request)
        assert (reply["warning"], reply.get("override"), reply["state"]) == ("corrupt_policy", None, "closed")
    assert client.get(KEYS.policy) == value
    assert ask(client, "record", policy=POLICY, generation=generation, failures=1)["retry_after_ms"] == 1000


@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("action", ["set_policy", "clear_policy"])
def test_garbage_is_replaced(client: redis.Redis, value: bytes, action: str) -> None:
    """The operator's next word ends the garbage."""
    client.set(KEYS.policy, value)
    override = {"override": {"quorum": 2}} if action == "set_policy" else {}
    assert ask(client, "control", action=action, **override)["changed"] is True
    reply = ask(client, "snapshot")
    assert (reply.get("warning"), reply.get("override")) == (None, override.get("override"))


@pytest.mark.parametrize("action", ["set_policy", "clear_policy"])
def test_a_foreign_key_is_replaced(client: redis.Redis, action: str) -> None:
    """A value of another type under the policy key is no override, and hinders nobody from setting one."""
    client.rpush(KEYS.policy, "x")
    assert ask(client, "acquire").get("override") is None
    override = {"override": {"quorum": 2}} if action == "set_policy" else {}
    assert ask(client, "control", action=action, **override)["changed"] is True
    assert ask(client, "snapshot").get("override") == override.get("override")


def test_an_override_of_another_program(client: redis.Redis) -> None:
    """A policy override that a program stored in JSON holds, and is added to; in msgpack it is corrupt."""
    client.set(KEYS.policy, json.dumps({"failure_threshold": 1}))
    assert set_policy(client, {"jitter": 1})["override"] == {"failure_threshold": 1, "jitter": 1}
    client.set(KEYS.policy, msgpack.packb({"failure_threshold": 1}))
    assert ask(client, "acquire")["warning"] == "corrupt_policy"
    assert set_policy(client, {"jitter": 1})["override"] == {"jitter": 1}


def test_quorum_of_a_document_of_the_contract(client: redis.Redis) -> None:
    """Failures that another program counted have no reporter, and do not hinder a later quorum."""
    put(client, state="closed", failure_count=50, success_count=0, last_failure_time=1, opened_at=None)
    machine = lua_machine(client, "discovery")
    policy = {**POLICY, "quorum": 2}
    generation = machine.run("acquire", policy)["generation"]
    for instance, state in (("a", "closed"), ("a", "closed"), ("b", "open")):
        machine.advance(10)
        reply = machine.run("record", policy, generation=generation, failures=1, instance=instance)
        assert reply["state"] == state
    assert document(client)["failure_count"] == 53
