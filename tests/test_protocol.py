"""Keys, requests and replies, without a server."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pybreaker_redis import HistoryEntry, PolicyError
from pybreaker_redis._protocol import (
    LONGEST_NAME,
    LONGEST_OVERRIDE,
    control_request,
    decode,
    encode,
    history_entry,
    history_fields,
    keys_of,
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
    """Flat lists and maps of a stream parse to the same fields."""
    raw = {key.encode(): value.encode() for key, value in FIELDS.items()}
    flat = [part for pair in raw.items() for part in pair]
    assert history_fields([[b"1-0", flat], [b"0-1", flat]]) == [FIELDS, FIELDS]
    assert history_fields([(b"1-0", raw)]) == [FIELDS]
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
    assert control_request("reset", None) == {"action": "reset"}
    assert control_request("force_open", 1.5) == {"action": "force_open", "duration_ms": 1500}
    assert control_request("force_open", 0.001)["duration_ms"] == 1
    assert control_request("force_open", LONGEST_OVERRIDE)["duration_ms"] == 30 * 86400 * 1000


@pytest.mark.parametrize("duration", [0, 0.0009, -1, LONGEST_OVERRIDE + 1, float("nan"), float("-inf"), False, "1"])
def test_control_request_out_of_range(duration: Any) -> None:
    """A duration that makes no sense is refused."""
    with pytest.raises(PolicyError, match="duration must be from"):
        control_request("force_open", duration)
