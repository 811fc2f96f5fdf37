"""control.lua by itself: what it refuses, and what each action stores."""

from __future__ import annotations

import json

import pytest
import redis
from conftest import lua_machine
from script_calls import (
    CONTRACT,
    DAY_MS,
    KEYS,
    NO_INTEGERS,
    POLICY,
    ask,
    bodies,
    bring_to,
    document,
    history,
    messages,
    must_refuse,
    picture,
)

ACTIONS = ["force_open", "force_closed", "clear_forced", "reset"]


@pytest.mark.parametrize("stored", [False, True])
def test_bad_requests(client: redis.Redis, stored: bool) -> None:
    """Actions and durations that are none, and fields of other scripts, are refused by name."""
    for value in [0, "", "open", "reset\r\n", *NO_INTEGERS]:
        for body in bodies({"action": value}):
            must_refuse(client, "control", body, names="action", stored=stored)
    for value in [0, 30 * DAY_MS + 1, *NO_INTEGERS]:
        for body in bodies({"action": "force_open", "duration_ms": value}):
            must_refuse(client, "control", body, names="duration_ms", stored=stored)
    for field in ("generation", "successes", "failures", "probe"):
        must_refuse(client, "control", json.dumps({"action": "reset", field: 1}), names=field, stored=stored)


def test_action_is_needed(client: redis.Redis) -> None:
    """A request without an action is refused, with a duration too."""
    for request in ({}, {"duration_ms": 5}, {"action": None}):
        for body in bodies(request):
            must_refuse(client, "control", body, names="action")


@pytest.mark.parametrize("action", ["reset", "clear_forced"])
def test_duration_of_what_lasts_not(client: redis.Redis, action: str) -> None:
    """A duration with an action that has none is refused."""
    must_refuse(client, "control", json.dumps({"action": action, "duration_ms": 5}), names="duration_ms")


@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
@pytest.mark.parametrize("duration_ms", [1, 5000, 30 * DAY_MS])
def test_force_open(client: redis.Redis, state: str, duration_ms: int) -> None:
    """From any state, forced open is stored with its end, for exactly its duration."""
    machine = lua_machine(client, "discovery")
    bring_to(machine, state)
    reply = machine.run("control", POLICY, action="force_open", duration_ms=duration_ms)
    assert (reply["changed"], reply["transition"]["from"], reply["retry_after_ms"]) == (True, state, duration_ms)
    stored = document(client)
    assert (stored["state"], stored["forced"], stored["opened_at"]) == ("open", "open", machine.now_ms // 1000)
    assert stored["forced_until_ms"] == stored["open_until_ms"] == machine.now_ms + duration_ms
    machine.advance(duration_ms - 1)
    assert machine.run("acquire", POLICY)["admitted"] is False
    machine.advance(1)
    assert machine.run("acquire", POLICY)["state"] == "half_open"


@pytest.mark.parametrize("first", ["force_open", "force_closed"])
@pytest.mark.parametrize("then", ["reset", "clear_forced"])
def test_override_leaves_nothing(client: redis.Redis, first: str, then: str) -> None:
    """After a reset or a clear the document does not mention the override."""
    ask(client, "control", action=first)
    assert ask(client, "control", action=then).get("forced") is None
    assert not document(client).keys() & {"forced", "forced_until_ms"}


@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
def test_nothing_to_clear(client: redis.Redis, state: str) -> None:
    """Clearing what is not there changes no byte."""
    bring_to(lua_machine(client, "discovery"), state)
    before = picture(client)
    assert ask(client, "control", action="clear_forced")["changed"] is False
    assert picture(client) == before


@pytest.mark.parametrize("action", ACTIONS)
def test_without_a_document(client: redis.Redis, action: str) -> None:
    """Every action works on a breaker that nobody has used; where it changes nothing, the breaker stays unmade."""
    reply = ask(client, "control", action=action)
    assert reply["state"] == ("open" if action == "force_open" else "closed")
    assert bool(client.exists(KEYS.state)) is reply["changed"] is action.startswith("force")


@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
def test_a_reset_leaves_the_contract_fields(client: redis.Redis, state: str) -> None:
    """After a reset nothing of what was before is stored, but when the last call failed, and the reset itself."""
    machine = lua_machine(client, "discovery")
    bring_to(machine, state)
    assert machine.run("control", action="reset")["changed"] is (state != "closed")
    changed = set() if state == "closed" else {"changed_at_ms", "reason"}
    assert document(client).keys() == {*CONTRACT, "version", "generation", "failure_number", *changed}


# Who acts, and why --------------------------------------------------------------------------------

SIGNED = {"operator": "ann", "note": 'see https://wiki/7: "repaired" \\o/'}
ACTS = [
    ("closed", "force_open", "forced"),
    ("half_open", "force_closed", "forced"),
    ("open", "probe", "probe"),
    ("half_open", "reset", "reset"),
]


@pytest.mark.parametrize("field", ["operator", "note"])
@pytest.mark.parametrize("value", ["", "caf\u00e9", "a\nb", "\x1b[2J", "x" * 201, 7, True, ["ann"]])
def test_who_acts_is_short_and_printable(client: redis.Redis, field: str, value: object) -> None:
    """An operator or a note that no terminal should see, or that is too long, is refused by name."""
    for body in bodies({"action": "force_closed", field: value}):
        must_refuse(client, "control", body, names=field)
    must_refuse(client, "control", json.dumps({"action": "reset", "operator": "x" * 101}), names="operator")
    for script in ("acquire", "record", "snapshot"):
        must_refuse(client, script, json.dumps({field: "ann"}), names=field)


@pytest.mark.parametrize(("state", "action", "reason"), ACTS)
def test_who_acted(client: redis.Redis, state: str, action: str, reason: str) -> None:
    """Operator and note of an action are in the document, the snapshot, the history and the message."""
    machine = lua_machine(client, "discovery")
    bring_to(machine, state)
    with messages(client) as heard:
        assert machine.run("control", POLICY, action=action, **SIGNED)["changed"] is True
    for found in (document(client), machine.run("snapshot", POLICY), history(client)[-1], heard[0]):
        assert SIGNED.items() <= found.items()
    assert (history(client)[-1]["reason"], len(heard)) == (reason, 1)


@pytest.mark.parametrize("forced", ["force_open", "force_closed"])
def test_who_ended_a_forced_state(client: redis.Redis, forced: str) -> None:
    """The operator who ended a forced state replaces the one who forced it; both are in the history."""
    ask(client, "control", action=forced, operator="ann", note="maintenance")
    ask(client, "control", action="clear_forced", operator="bob")
    seen = ask(client, "snapshot")
    assert (seen["operator"], seen.get("note")) == ("bob", None)
    assert not document(client).keys() & {"note", "forced"}
    told = [(entry["reason"], entry["operator"], entry.get("note")) for entry in history(client)]
    assert told == [("forced", "ann", "maintenance"), ("clear_forced", "bob", None)]


def test_nobody_says_who_acts(client: redis.Redis) -> None:
    """An action without operator and note leaves none of the one before it."""
    for action in ("force_open", "clear_forced", "reset"):
        ask(client, "control", action="force_open", duration_ms=50_000 + len(action), **SIGNED)
        ask(client, "control", action=action)
        assert not document(client).keys() & SIGNED.keys()
        assert not history(client)[-1].keys() & SIGNED.keys()


@pytest.mark.parametrize("signed", [SIGNED, {"operator": "ann"}, {"note": "repaired"}])
def test_until_the_next_transition(client: redis.Redis, signed: dict[str, str]) -> None:
    """Reports leave the operator or note of a reset in the document; the next transition drops them."""
    machine = lua_machine(client, "discovery")
    bring_to(machine, "open")
    generation = machine.run("control", POLICY, action="reset", **signed)["generation"]
    machine.run("record", POLICY, generation=generation, failures=1)
    assert signed.items() <= document(client).items()
    machine.run("record", POLICY, generation=generation, failures=2)
    assert document(client)["state"] == "open"
    assert not document(client).keys() & SIGNED.keys()
    assert not history(client)[-1].keys() & SIGNED.keys()


def test_who_set_the_policy(client: redis.Redis) -> None:
    """A policy override keeps operator and note of the action that set it last, and they are no policy fields."""
    with messages(client) as heard:
        ask(client, "control", action="set_policy", override={"quorum": 2}, **SIGNED)
        seen = ask(client, "snapshot")
        ask(client, "control", action="set_policy", override={"failure_threshold": 2}, operator="bob")
        last = ask(client, "snapshot")
        ask(client, "control", action="clear_policy", operator="eve")
    assert (seen["override_operator"], seen["override_note"]) == tuple(SIGNED.values())
    assert (last["override_operator"], last.get("override_note")) == ("bob", None)
    assert last["override"] == {"quorum": 2, "failure_threshold": 2}
    told = [("set_policy", "ann"), ("set_policy", "bob"), ("clear_policy", "eve")]
    assert [(message["reason"], message["operator"]) for message in heard] == told
    assert [(entry["reason"], entry["operator"]) for entry in history(client)] == told
    assert not ask(client, "snapshot").keys() & {"override", "override_operator"}


@pytest.mark.parametrize("odd", ["", "x" * 201, "caf\u00e9", "a\nb", 7, None, ["ann"]])
def test_odd_operator_of_a_policy(client: redis.Redis, odd: object) -> None:
    """An operator or a note of a stored policy override that makes no sense is passed over; the fields are in force."""
    client.set(KEYS.policy, json.dumps({"quorum": 2, "operator": odd, "note": odd}))
    seen = ask(client, "snapshot")
    assert (seen["policy"]["quorum"], seen.get("warning")) == (2, None)
    assert not seen.keys() & {"override_operator", "override_note"}


def test_a_reset_that_only_ends_a_policy(client: redis.Redis) -> None:
    """Who ended a policy override by a reset is in the history; there is no state that they changed."""
    ask(client, "acquire")
    ask(client, "control", action="set_policy", override={"quorum": 2})
    with messages(client) as heard:
        assert ask(client, "control", action="reset", **SIGNED)["changed"] is True
    told = {**SIGNED, "reason": "reset", "from": "closed", "to": "closed", "override": '{"quorum":2}'}
    assert [told.items() <= message.items() for message in (history(client)[-1], *heard)] == [True, True]
    assert int(history(client)[-1]["generation"]) == heard[0]["generation"] == document(client)["generation"]
    assert not document(client).keys() & SIGNED.keys()
