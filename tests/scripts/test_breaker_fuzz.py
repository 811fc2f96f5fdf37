"""Any request and any stored value: the reply is a valid one or BADREQUEST, and the breaker goes on protecting."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import msgpack
import pytest
import redis
from conftest import START_MS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from script_calls import CONTRACT, KEYS, POLICY, ask, document, reply_or_error

from pybreaker_redis.wire.scripts import SCRIPTS

WORDS = st.sampled_from(["closed", "open", "half_open", "json", "msgpack", "force_open", "reset", "probe", "x" * 300])
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 1.5, -1, START_MS, START_MS // 1000, 10**9, 10**13, 2**53, 2**63, 1e300, -0.0]),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=20))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | WORDS, inner, max_size=4),
    max_leaves=8,
)
LIKELY = st.one_of(NUMBERS, WORDS, VALUES, st.dictionaries(st.sampled_from(["1", "2", "x"]), NUMBERS | VALUES))
OWN = (
    "version",
    "generation",
    "failure_number",
    "open_until_ms",
    "open_ms",
    "trips",
    "probe_seq",
    "probe_ms",
    "probes",
    "probe_failures",
    "held_generation",
    "changed_at_ms",
    "reason",
    "error",
    "forced",
    "forced_until_ms",
)
NEAR = st.sampled_from([0, 1, 2, 400, START_MS, START_MS + 10**9, 10**13, 10**13 + 1, 10**14])
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "state": st.sampled_from(["closed", "open", "half_open"]),
    **dict.fromkeys(CONTRACT[1:], st.integers(0, 9) | st.none()),
    **dict.fromkeys(OWN, NEAR),
    "probes": st.dictionaries(st.sampled_from(["1", "2", "x"]), NEAR),
    "forced": st.sampled_from(["closed", "open"]),
    "reason": st.sampled_from(["held", "timeout", "", "x" * 31, "Timeout"]),
    "error": st.sampled_from(["Boom: bang", "", "x" * 201, "caf\u00e9", "\n"]),
}
# most of these are read to their last field; any of those are mostly refused at the first
OURS = st.fixed_dictionaries(
    {field: SENSIBLE[field] for field in CONTRACT},
    optional={field: SENSIBLE[field] for field in OWN},
)
ODD = st.builds(lambda ours, odd: {**ours, **odd}, OURS, st.dictionaries(st.sampled_from([*OWN, *CONTRACT]), LIKELY))
REQUEST_FIELDS = (
    *("generation", "successes", "failures", "probe", "seen_failure", "age_ms", "hold_ms", "error"),
    *("action", "duration_ms", "instance", "encoding"),
)
POLICIES = st.dictionaries(
    st.sampled_from([*POLICY, "ttl_ms", "half_open_max_calls", "failures_in_window", "probe_failure_threshold", "x"]),
    LIKELY,
    max_size=3,
)
REQUESTS = st.fixed_dictionaries({}, optional=dict.fromkeys(REQUEST_FIELDS, LIKELY) | {"policy": POLICIES})
KEYED = st.dictionaries(st.one_of(st.integers(-9, 9), st.floats(), st.booleans(), st.text(max_size=3)), SCALARS)


def written(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """The values in JSON and in msgpack, whole and cut off."""
    whole = values.map(lambda value: json.dumps(value).encode()) | values.map(msgpack.packb)
    return whole | st.tuples(whole, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])


ANYTHING = written(VALUES) | written(KEYED) | st.binary(max_size=60)
FUZZ = settings(
    max_examples=int(os.environ.get("EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def is_count(value: Any, most: int = 10**14) -> bool:
    """An integer from 0 to the greatest value."""
    return type(value) is int and 0 <= value <= most


def check_reply(reply: dict[str, Any]) -> None:
    """The reply is one that a client can work with."""
    assert reply["state"] in ("closed", "open", "half_open")
    assert is_count(reply["generation"], 10**16)
    assert is_count(reply["failure_count"])
    assert is_count(reply["failure_number"])
    assert reply["state"] != "closed" or reply["failure_number"] >= reply["failure_count"]
    assert is_count(reply["success_count"])
    assert reply.get("retry_after_ms") is None or is_count(reply["retry_after_ms"])
    assert reply.get("forced") in (None, "open", "closed")
    assert is_count(reply["forced_left_ms"]) if reply.get("forced") else "forced_left_ms" not in reply
    assert reply.get("warning") in (None, "corrupt_document", "foreign_key", "future_version")
    assert reply.get("probe") is None or is_count(reply["probe"])
    assert reply.get("admitted") is not False or reply["retry_after_ms"] >= 0


@FUZZ
@given(request=written(REQUESTS) | ANYTHING)
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_request(client: redis.Redis, script: str, request: bytes) -> None:
    """Any request gets a valid reply in its own encoding, or a BADREQUEST in one printable line."""
    raw = reply_or_error(client, script, request)
    if isinstance(raw, redis.ResponseError):
        assert re.fullmatch(r"BADREQUEST [^\x00-\x1f]*: [^\x00-\x1f]+", str(raw))
    else:
        check_reply(json.loads(raw) if request.startswith(b"{") else msgpack.unpackb(raw))


@FUZZ
@given(value=written(OURS) | written(ODD) | ANYTHING)
def test_any_stored_value(client: redis.Redis, value: bytes) -> None:
    """Whatever is stored, every script gives a valid reply, and after a reset failures trip again."""
    for script, request in (
        ("snapshot", {}),
        ("acquire", {}),
        ("record", {"generation": START_MS, "failures": 1}),
        ("record", {"generation": START_MS, "successes": 1, "seen_failure": 1, "age_ms": 30_000}),
        ("record", {"generation": START_MS, "failures": 1, "probe": 1}),
        ("record", {"generation": START_MS, "hold_ms": 60_000}),
        ("record", {"generation": START_MS, "hold_ms": 60_000, "probe": 1}),
        ("control", {"action": "clear_forced"}),
        ("control", {"action": "probe"}),
    ):
        client.set(KEYS.state, value)
        check_reply(ask(client, script, policy=POLICY, **request))
    generation = ask(client, "control", action="reset")["generation"]
    assert ask(client, "record", policy=POLICY, generation=generation, failures=3)["state"] == "open"


@FUZZ
@given(value=written(OURS) | written(ODD))
def test_stored_values_heal(client: redis.Redis, value: bytes) -> None:
    """What an acquire that admits writes over any stored value is a document that loads without a warning."""
    client.set(KEYS.state, value)
    if ask(client, "acquire", policy=POLICY)["admitted"] and client.get(KEYS.state) != value:
        assert client.pttl(KEYS.state) > 0
        assert list(document(client))[:5] == list(CONTRACT)
        assert ask(client, "snapshot", policy=POLICY).get("warning") is None
