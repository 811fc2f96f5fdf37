"""What a refused request is told, to the letter: the field, what it must be, and the value that it was."""

from __future__ import annotations

import itertools
import json
import string
from typing import Any

import pytest
import redis
from script_calls import KEYS, NEEDED, bodies, must_refuse
from test_policy_requests import LIMITS

LONG = "".join(itertools.islice(itertools.cycle(string.ascii_letters), 201))  # one character too many
LETTERS = "must be a string of at most 200 printable ASCII characters, not "
COUNT = "must be an integer from 0 to 1e+09, not "
DURATION = "must be an integer from 1 to 30 days of milliseconds, not "
SIGNED = "must be a string of 1 to 100 printable ASCII characters, not "
ACTIONS = 'must be "force_open", "force_closed", "clear_forced", "probe", "reset", "set_policy" or "clear_policy", not '
NO_MAP, NO_COUNTS = "must be one map, in JSON or msgpack", "is required with counts, a hold or a probe"

REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    # whole numbers, each with its limit; of a long value the first 100 characters
    ("acquire", {"generation": -1}, "generation", "must be an integer from 0 to 9e+15, not -1"),
    ("acquire", {"seen_failure": 0.5}, "seen_failure", "must be an integer from 0 to 9e+13, not 0.5"),
    ("acquire", {"age_ms": True}, "age_ms", "must be an integer from 0 to 3e+10, not true"),
    ("acquire", {"successes": LONG}, "successes", COUNT + LONG[:100]),
    ("acquire", {"slow": 10**9 + 1}, "slow", COUNT + "1000000001"),
    ("acquire", {"pending": "1"}, "pending", COUNT + "1"),
    ("record", {"generation": 1, "failures": -1}, "failures", COUNT + "-1"),
    ("record", {"generation": 1, "counted": "many"}, "counted", COUNT + "many"),
    ("record", {"generation": 1, "probe": -1}, "probe", "must be an integer from 0 to 9e+13, not -1"),
    ("record", {"generation": 1, "hold_ms": 1.5}, "hold_ms", "must be an integer from 0 to 9e+13, not 1.5"),
    ("control", {"action": "force_open", "duration_ms": 0}, "duration_ms", DURATION + "0"),
    ("control", {"action": "force_open", "duration_ms": LONG}, "duration_ms", DURATION + LONG[:100]),
    # texts
    ("snapshot", {"instance": LONG}, "instance", LETTERS + LONG[:100]),
    ("snapshot", {"host": "caf\u00e9"}, "host", LETTERS + "caf\u00e9"),
    ("acquire", {"instance": "a\tb\r\nc"}, "instance", LETTERS + "a?b??c"),
    ("acquire", {"host": 7}, "host", LETTERS + "7"),
    ("record", {"generation": 1, "error": True}, "error", LETTERS + "true"),
    ("control", {"action": "reset", "note": LONG}, "note", LETTERS + LONG[:100]),
    ("control", {"action": "reset", "note": ""}, "note", "must not be empty"),
    ("control", {"action": "reset", "operator": LONG[:101]}, "operator", SIGNED + LONG[:101]),
    ("control", {"action": "reset", "operator": ""}, "operator", SIGNED),
    # fields that there are not
    ("acquire", {"failures": 1}, "failures", "unknown field"),
    ("acquire", {"a\r\nb": 1}, "a??b", "unknown field"),
    ("snapshot", {"generation": 1}, "generation", "unknown field"),
    ("snapshot", {"policy": {"color": 1}}, "policy.color", "unknown field"),
    ("control", {"action": "set_policy", "override": {"color": 1}}, "override.color", "unknown field"),
    # maps of policy fields
    ("acquire", {"policy": 7}, "policy", "must be a map of fields"),
    ("control", {"action": "set_policy", "override": "x"}, "override", "must be a map of fields"),
    ("acquire", {"policy": {"enforce": 1}}, "policy.enforce", "must be true or false, not 1"),
    ("acquire", {"policy": {"enforce": LONG}}, "policy.enforce", "must be true or false, not " + LONG[:100]),
    ("acquire", {"policy": {"quorum": LONG}}, "policy.quorum", f"must be an integer from 1 to 100, not {LONG[:100]}"),
    # fields that go together
    ("record", {"failures": 1}, "generation", NO_COUNTS),
    ("record", {"successes": 1}, "generation", NO_COUNTS),
    ("record", {"slow": 1}, "generation", NO_COUNTS),
    ("record", {"probe": 1}, "generation", NO_COUNTS),
    ("record", {"hold_ms": 1}, "generation", NO_COUNTS),
    ("acquire", {"pending": 1}, "pending", "must not be more than slow"),
    ("acquire", {"pending": 2, "slow": 1}, "pending", "must not be more than slow"),
    ("record", {"generation": 1, "counted": 1}, "counted", "must not be more than successes and failures"),
    (
        "record",
        {"generation": 1, "counted": 4, "successes": 2, "failures": 1},
        "counted",
        "must not be more than successes and failures",
    ),
    # actions
    ("control", {}, "action", ACTIONS + "nil"),
    ("control", {"action": "open"}, "action", ACTIONS + "open"),
    (
        "control",
        {"action": "probe", "duration_ms": 1},
        "duration_ms",
        "is only for force_open, force_closed and set_policy",
    ),
    ("control", {"action": "set_policy"}, "override", "set_policy needs a map of at least one field"),
    ("control", {"action": "reset", "override": {"quorum": 2}}, "override", "is only for set_policy"),
]


@pytest.mark.parametrize(
    ("script", "request_", "names", "problem"), REFUSED, ids=[f"{script} {names}" for script, _, names, _ in REFUSED]
)
def test_texts(client: redis.Redis, script: str, request_: dict[str, Any], names: str, problem: str) -> None:
    """One line: the field, what it must be and what it was, in both encodings alike."""
    for body in bodies(request_):
        must_refuse(client, script, body, names=names, problem=problem)


@pytest.mark.parametrize("field", LIMITS)
def test_limits_of_policy_fields(client: redis.Redis, field: str) -> None:
    """The text gives the limits of the field in full, and says whether it may lie between integers."""
    least, most, broken = LIMITS[field]
    wanted = f"must be {'a number' if broken else 'an integer'} from {least} to {most}, not "
    for script, value in (("acquire", -1), ("record", most + 1), ("snapshot", "x")):
        for body in bodies({**NEEDED.get(script, {}), "policy": {field: value}}):
            must_refuse(client, script, body, names=f"policy.{field}", problem=f"{wanted}{value}")


def test_texts_of_bad_calls(client: redis.Redis) -> None:
    """Keys, arguments and the request are told apart."""
    for script in ("acquire", "record", "control", "snapshot"):
        must_refuse(client, script, "{}", names="KEYS", problem="must be state, history, policy", keys=KEYS[:2])
        must_refuse(client, script, "{}", "{}", names="ARGV", problem="must be one request document")
        must_refuse(client, script, names="ARGV", problem="must be one request document")
        for body in ("", "7", "{", "[1", json.dumps([])[:1]):
            must_refuse(client, script, body, names="request", problem=NO_MAP)
