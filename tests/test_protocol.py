"""Keys, requests and replies; and stored documents, which the client reads as the scripts do."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
import redis
from conftest import Machine, lua_machine

from pybreaker_redis import HistoryEntry, PolicyError
from pybreaker_redis._policy import LONGEST_OPEN
from pybreaker_redis._protocol import (
    LONGEST_NAME,
    control_request,
    decode,
    encode,
    history_entry,
    history_fields,
    keys_of,
    read_document,
    read_window,
    seconds,
    snapshot_from,
)

REPLY = {"state": "closed", "generation": 0, "failure_count": 0, "success_count": 0, "source": "redis"}
FIELDS = {
    "time_ms": "1700000000123",
    "from": "closed",
    "to": "open",
    "reason": "failure_threshold",
    "generation": "1700000000001",
    "failure_count": "5",
    "success_count": "0",
    "instance": "1-ä",
}


def test_keys() -> None:
    """The state key is the well-known one; the others carry it as their hash tag."""
    assert keys_of("discovery") == (
        "circuit_breaker:discovery:state",
        "{circuit_breaker:discovery:state}:history",
        "{circuit_breaker:discovery:state}:policy",
    )
    assert keys_of("ä b:c", "pre").state == "pre:ä b:c:state"
    assert keys_of("b:c", "a") == keys_of("c", "a:b")  # as docs/protocol.md says


@pytest.mark.parametrize("name", ["x" * LONGEST_NAME, "ä" * (LONGEST_NAME // 2)])
def test_longest_name(name: str) -> None:
    """A name may have 512 bytes, and not one more."""
    assert name in keys_of(name).state
    with pytest.raises(PolicyError, match="at most 512 bytes, not 51"):
        keys_of(name + "x")


@pytest.mark.parametrize("text", ["", "{", "}", "a{b}c", "\udcff", None, b"x", 7])
def test_bad_names(text: Any) -> None:
    """What cannot be part of a key is refused, as name and as prefix, with its role."""
    with pytest.raises(PolicyError, match=r"^name "):
        keys_of(text)
    with pytest.raises(PolicyError, match=r"^prefix "):
        keys_of("discovery", text)


@pytest.mark.parametrize("document", [{}, {"a": None, "b": [1, -1, 2**53], "c": {"d": True}, "e": "ä", "f": 0.5}])
def test_round_trip(document: dict[str, Any]) -> None:
    """What was encoded decodes to the same."""
    assert decode(encode(document)) == document


def test_snapshot_of_the_least_reply() -> None:
    """Fields that a reply leaves out are None or 0."""
    seen = snapshot_from("x", REPLY)
    assert (seen.name, seen.state, seen.source) == ("x", "closed", "redis")
    absent = (seen.last_failure_time, seen.opened_at, seen.retry_after, seen.forced, seen.forced_until)
    assert absent == (None,) * 5
    assert (seen.trips, seen.probes_in_flight) == (0, 0)


def test_snapshot_of_a_full_reply() -> None:
    """Milliseconds become seconds, and fields of a newer script are ignored."""
    more = {"retry_after_ms": 1500, "forced": "open", "forced_until_ms": 1_700_000_000_500, "trips": 2}
    times = {"last_failure_time": 1_700_000_000, "opened_at": 1_700_000_001, "probes_in_flight": 3}
    seen = snapshot_from("x", {**REPLY, **more, **times, "newer": 1})
    assert (seen.retry_after, seen.forced, seen.forced_until, seen.trips) == (1.5, "open", 1_700_000_000.5, 2)
    assert (seen.last_failure_time, seen.opened_at, seen.probes_in_flight) == (1_700_000_000, 1_700_000_001, 3)


def test_snapshot_is_frozen() -> None:
    """A snapshot does not change."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot_from("x", REPLY).state = "open"  # type: ignore[misc]


@pytest.mark.parametrize(("milliseconds", "expected"), [(None, None), (0, 0.0), (1, 0.001), (2500, 2.5)])
def test_seconds(milliseconds: int | None, expected: float | None) -> None:
    """Zero is a time, None is none."""
    assert seconds(milliseconds) == expected


def test_history_replies() -> None:
    """The flat lists of a stream parse to fields."""
    flat = [part.encode() for pair in FIELDS.items() for part in pair]
    assert history_fields([[b"1-0", flat], [b"0-1", flat]]) == [FIELDS, FIELDS]
    assert history_fields([]) == []


def test_history_entry() -> None:
    """An entry has numbers where the stream has text."""
    assert history_entry(FIELDS) == HistoryEntry(
        time=1_700_000_000.123,
        old="closed",
        new="open",
        reason="failure_threshold",
        generation=1_700_000_000_001,
        failure_count=5,
        success_count=0,
        instance="1-ä",
    )


def test_control_request() -> None:
    """A command carries its duration in whole milliseconds, if it has one."""
    assert control_request("reset", None, None) == {"action": "reset"}
    assert control_request("force_open", None, None, 1.5) == {"action": "force_open", "duration_ms": 1500}
    assert control_request("force_open", None, None, 0.001)["duration_ms"] == 1
    assert control_request("force_open", None, None, LONGEST_OPEN)["duration_ms"] == 30 * 86400 * 1000


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("ann", "ann"),
        ("x" * 300, "x" * 100),
        ("Ren\u00e9", r"Ren\xe9"),
        ("\u202eevil\x1b[2J\n", r" evil [2J "),
        ("\u6f22" * 100, (r"\u6f22" * 17)[:100]),
        ("", None),
        (None, None),
    ],
)
def test_who_acts(given: str | None, sent: str | None) -> None:
    """Operator and note are sent as the scripts require them: long ones are cut, other letters escaped."""
    assert control_request("reset", given, None).get("operator") == sent
    note = control_request("reset", None, given).get("note")
    assert (note or "")[:100] == (sent or "")
    assert len(note or "") <= 200


@pytest.mark.parametrize("given", [7, b"ann", ["ann"], True])
def test_who_acts_is_text(given: Any) -> None:
    """An operator or a note that is no text is refused."""
    with pytest.raises(PolicyError, match="operator must be a text"):
        control_request("reset", given, None)
    with pytest.raises(PolicyError, match="note must be a text"):
        control_request("reset", None, given)


@pytest.mark.parametrize("duration", [0, 0.0009, -1, LONGEST_OPEN + 1, float("nan"), float("-inf"), False, "1"])
def test_control_request_out_of_range(duration: Any) -> None:
    """A duration that makes no sense is refused."""
    with pytest.raises(PolicyError, match="duration must be from"):
        control_request("force_open", None, None, duration)


# Stored documents

HEALTHY = (
    '{"state":"closed","failure_count":2,"success_count":0,"last_failure_time":1700000000,"opened_at":null,'
    '"version":1,"generation":1700000000001,"failure_number":7}'
)
WINDOW = (
    ',"window":{"bucket_ms":6000,"newest":283333333,"calls":9,"failures":4,"slow":1,'
    '"past":"5,2,1; 5,2,1 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0 0,0,0"}}'
)


CHANGE = ',"changed_at_ms":1700000000000,"reason":"reset"'


@pytest.mark.parametrize("window", ["}", WINDOW])
@pytest.mark.parametrize(
    "change",
    ["", CHANGE, CHANGE + ',"operator":"ann"', CHANGE + ',"note":"a/b [c]"', CHANGE + ',"operator":"~","note":" "'],
)
def test_a_healthy_document(change: str, window: str) -> None:
    """A closed document, with or without a window and its last change, says what a script would reply."""
    text = (HEALTHY[:-1] + change + window).encode()
    assert read_document(text) == {
        "state": "closed",
        "generation": 1_700_000_000_001,
        "failure_count": 2,
        "failure_number": 7,
        "success_count": 0,
        "source": "redis",
    }
    assert read_window(text) == ({"calls": 9, "failures": 4, "slow": 1} if window == WINDOW else {})
    for never_failed in (text.replace(b"1700000000,", b"null,"),):
        assert read_document(never_failed) == read_document(text)


def test_nothing_stored() -> None:
    """No document says nothing."""
    assert read_document(None) is None
    assert read_window(None) == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"closed"', '"open"'),
        ('"closed"', '"half_open"'),
        ('"closed"', '"Closed"'),
        ('"failure_count":2', '"failure_count":-2'),
        ('"failure_count":2', '"failure_count":2.0'),
        ('"failure_count":2', '"failure_count":12345678901'),
        ('"failure_count":2', '"failure_count":8'),  # more than were ever numbered
        ('"failure_count":2', '"failure_count":"2"'),
        ('"failure_count":2', '"failure_count":null'),
        ('"failure_count":2,', ""),
        ('"success_count":0', '"success_count":1'),
        ("1700000000,", "17000000000,"),
        ("1700000000,", "-1,"),
        ("1700000000,", "1e9,"),
        ('"opened_at":null', '"opened_at":1700000000'),
        ('"version":1', '"version":2'),
        ('"version":1,', ""),
        ("1700000000001", "0"),
        ("1700000000001", "01700000000001"),
        ("1700000000001", "9000000000000001"),
        ("1700000000001", "17000000000000001"),
        ("1700000000001", "-1"),
        ("1700000000001", "1.7e12"),
        ('"failure_number":7', '"failure_number":12345678901234'),
        ('"failure_number":7', '"failure_number":-7'),
        (',"failure_number":7', ""),
        ("}", ',"trips":1}'),
        ("}", ',"forced_until_ms":1700000060000,"forced":"closed"}'),
        ("}", ',"closed_at_ms":1700000000000}'),
        ("}", ',"run_since_ms":1700000000000}'),
        ("}", ',"operator":"ann"}'),  # without the action
        ("}", ',"changed_at_ms":1700000000000,"reason":"reset","operator":"a\\"b"}'),
        ("}", ',"changed_at_ms":1700000000000,"reason":"reset","note":"' + "x" * 201 + '"}'),
        ("}", ',"changed_at_ms":1700000000000,"reason":"reset","note":"x","trips":1}'),
        ("}", ',"reporters":{"1-a":1700000000000}}'),
        ("}", ',"window":{"bucket_ms":1},"trips":1}'),
        ("}", ',"window":{"bucket_ms":{}}}'),
        ("}", ',"window":[]}'),
        pytest.param("}", ',"window":{"past":"' + "0" * 65_536 + '"}}', id="longer than 64 KB"),
        ("}", ',"window":{"bucket_ms":1}'),
        ("}", "} "),
        ("}", "}\n"),
        ("}", "}}"),
        ("}", ""),
        ("{", " {"),
        ("{", ""),
        (",", ", "),
        (":", ": "),
        ('"generation"', '"Generation"'),
    ],
)
def test_any_other_document(old: str, new: str) -> None:
    """A document that save() does not write for a healthy breaker is left to a script."""
    assert old in HEALTHY
    assert read_document(HEALTHY.replace(old, new).encode()) is None


@pytest.mark.parametrize("text", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b"1" * 100_000, b"\x80", b"{" * 9])
def test_other_values(text: bytes) -> None:
    """A value of another program is left to a script, too, however large."""
    assert read_document(text) is None
    assert read_window(text) == {}


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"failure_threshold": 2},
        {"error_rate_threshold": 0.5, "minimum_calls": 4, "window_ms": 10_000},
        {"failure_threshold": 3, "slow_call_rate_threshold": 0.5, "slow_call_duration_ms": 10, "minimum_calls": 4},
        {"failure_threshold": 2, "quorum": 2},
        {"failure_threshold": 2, "backoff_multiplier": 2, "success_threshold": 2},
        {"failure_threshold": 2, "ramp_up_ms": 5_000},
    ],
)
def test_documents_that_the_scripts_write(client: redis.Redis, policy: dict[str, Any]) -> None:
    """Along 400 calls: where the client reads a document, a script replies the same; healthy ones are all read."""
    machine: Machine = lua_machine(client, "discovery")
    chance = random.Random(str(policy))
    keys = keys_of("discovery")
    read = 0
    for number in range(400):
        machine.advance(chance.choice([0, 1, 10, 500, 3_000, 40_000]))
        if number % 40 == 0:
            machine.run("control", policy, action="reset", operator="ann", note="repaired")
        reply = machine.run("acquire", policy, instance=chance.choice("ab"))
        if reply["admitted"]:
            report = chance.choice([{"successes": 3}, {"failures": 1}, {"failures": 1, "successes": 2}, {"slow": 1}])
            probe = {"probe": reply["probe"]} if "probe" in reply else {}
            if probe:
                report = chance.choice([{"successes": 1}, {"failures": 1}])
            machine.run("record", policy, generation=reply["generation"], instance="a", **probe, **report)
        text = client.get(keys.state)
        found = read_document(text)
        stored = json.loads(text)
        healthy = stored["state"] == "closed" and set(stored) <= CONTRACT | CHANGED | {"window"}
        assert (found is not None) == healthy, text
        if found is None:
            continue
        read += 1
        window = read_window(text)
        assert (
            window == {key: stored["window"][key] for key in ("calls", "failures", "slow")}
            if "window" in stored
            else not window
        )
        said = machine.run("record", policy, instance="a")
        fields = ("state", "generation", "failure_count", "failure_number", "success_count")
        assert [found[field] for field in fields] == [said[field] for field in fields], text
        assert not said.keys() & {"retry_after_ms", "ramp_left_ms", "forced", "forced_left_ms", "warning"}, said
    assert read > (0 if policy.keys() & LASTING else 20)


LASTING = {"quorum", "backoff_multiplier", "ramp_up_ms"}  # a closed document holds more than a window for long
CHANGED = {"changed_at_ms", "reason", "operator", "note"}
CONTRACT = {
    "state",
    "failure_count",
    "success_count",
    "last_failure_time",
    "opened_at",
    "version",
    "generation",
    "failure_number",
}
