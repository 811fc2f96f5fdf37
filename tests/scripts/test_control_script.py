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
