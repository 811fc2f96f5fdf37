"""What both engines must do: the Lua (with requests in both forms) and the Python mirror, on a clock of the tests."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import redis
from conftest import START_MS, Machine, in_place_machine, lua_machine, memory_machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybreaker_redis._protocol import keys_of

SEQUENCES = int(os.environ.get("SEQUENCES", "200"))  # of test_engines_agree

POLICY = {"failure_threshold": 3, "reset_timeout_ms": 1000, "probe_timeout_ms": 400}


def trip(machine: Machine, policy: dict[str, int] = POLICY) -> dict[str, Any]:
    generation = machine.run("acquire", policy)["generation"]
    return machine.run("record", policy, generation=generation, failures=3)


def probe(machine: Machine, policy: dict[str, int] = POLICY) -> dict[str, Any]:
    trip(machine, policy)
    machine.advance(1000)
    return machine.run("acquire", policy)


def test_exact_threshold(machine: Machine) -> None:
    """It opens at exactly the threshold-th failure in a row, and says so to that caller alone."""
    generation = machine.run("acquire", POLICY)["generation"]
    for count in (1, 2):
        reply = machine.run("record", POLICY, generation=generation, failures=1)
        assert (reply["state"], reply["failure_count"], reply.get("transition")) == ("closed", count, None)
    reply = machine.run("record", POLICY, generation=generation, failures=1)
    assert reply["state"] == "open"
    assert reply["transition"]["reason"] == "failure_threshold"
    assert machine.run("record", POLICY, generation=generation, failures=1).get("transition") is None


def test_failed_probes_count_up_to_the_limit(machine: Machine) -> None:
    """The failures of probes add to the count, which ends at the largest number of the contract."""
    policy = {**POLICY, "failure_threshold": 10**9}
    generation = machine.run("acquire", policy)["generation"]
    machine.run("record", policy, generation=generation, failures=10**9)
    for count in (2 * 10**9, 3 * 10**9, 4 * 10**9, 2**32 - 1, 2**32 - 1):
        machine.advance(1001)
        reply = machine.run("acquire", policy)
        reply = machine.run("record", policy, generation=reply["generation"], probe=reply["probe"], failures=10**9)
        assert (reply["failure_count"], reply["transition"]["reason"]) == (count, "probe_failed")
        assert machine.run("snapshot", policy)["last_failure_time"] == machine.now_ms // 1000


def test_success_ends_the_run(machine: Machine) -> None:
    """Successes in a report count before its failures, and end the run of failures."""
    generation = machine.run("acquire", POLICY)["generation"]
    machine.run("record", POLICY, generation=generation, failures=2)
    reply = machine.run("record", POLICY, generation=generation, successes=7, failures=1)
    assert (reply["state"], reply["failure_count"]) == ("closed", 1)


def test_gathered_successes_travel_with_acquire(machine: Machine) -> None:
    """An acquire counts the successes that it takes along."""
    generation = machine.run("acquire", POLICY)["generation"]
    machine.run("record", POLICY, generation=generation, failures=2)
    assert machine.run("acquire", POLICY, generation=generation, successes=1)["failure_count"] == 0


def test_open_until_the_deadline(machine: Machine) -> None:
    """It rejects until the very millisecond of its deadline, with the right wait, then probes."""
    assert trip(machine)["retry_after_ms"] == 1000
    machine.advance(999)
    reply = machine.run("acquire", POLICY)
    assert (reply["admitted"], reply["state"], reply["retry_after_ms"]) == (False, "open", 1)
    machine.advance(1)
    reply = machine.run("acquire", POLICY)
    assert (reply["admitted"], reply["state"], reply["probe"]) == (True, "half_open", 1)
    assert reply["transition"]["reason"] == "timeout"


@pytest.mark.parametrize("slots", [1, 3])
def test_slots(machine: Machine, slots: int) -> None:
    """Half open hands out half_open_max_calls slots; the rest may ask again after as long as the probes have been out.

    At least 100 ms, and no later than when the nearest slot ends.
    """
    policy = {**POLICY, "half_open_max_calls": slots}
    probe(machine, policy)
    for _ in range(slots - 1):
        assert machine.run("acquire", policy)["admitted"]
    for passed, wait in ((0, 100), (100, 100), (30, 130), (70, 200), (50, 150), (149, 1)):
        machine.advance(passed)
        reply = machine.run("acquire", policy)
        assert (reply["admitted"], reply["retry_after_ms"]) == (False, wait)
    machine.advance(1)
    assert machine.run("acquire", policy)["admitted"]


def test_the_oldest_probe_says_when_to_ask_again(machine: Machine) -> None:
    """Of several probes, the one that has been out longest counts, whatever timeout its client gave it."""
    policy = {**POLICY, "half_open_max_calls": 2, "probe_timeout_ms": 1000}
    probe(machine, policy)
    machine.advance(300)
    assert machine.run("acquire", {**policy, "probe_timeout_ms": 5000})["admitted"]
    machine.advance(100)
    reply = machine.run("acquire", policy)
    assert (reply["admitted"], reply["retry_after_ms"]) == (False, 600)


def test_dead_probe_frees_its_slot(machine: Machine) -> None:
    """A slot is free at its deadline, whatever was refused in between, and its late outcome is ignored."""
    first = probe(machine)
    for _ in range(4):
        machine.advance(99)
        assert not machine.run("acquire", POLICY)["admitted"]
    machine.advance(4)
    assert machine.run("acquire", POLICY)["probe"] == 2
    late = machine.run("record", POLICY, generation=first["generation"], probe=1, failures=1)
    assert (late["applied"], late["state"]) == (False, "half_open")


def test_probe_success_closes(machine: Machine) -> None:
    """success_threshold probe successes close it and clear the counts."""
    policy = {**POLICY, "success_threshold": 2}
    first = probe(machine, policy)
    assert machine.run("record", policy, generation=first["generation"], probe=1, successes=1)["state"] == "half_open"
    assert machine.run("acquire", policy)["probe"] == 2
    reply = machine.run("record", policy, generation=first["generation"], probe=2, successes=1)
    assert (reply["state"], reply["failure_count"]) == ("closed", 0)
    assert reply["transition"]["reason"] == "probe_succeeded"


def test_the_last_failure_is_a_failure(machine: Machine) -> None:
    """The time of the last failure is that of a failure: no success, slow call or release, of a probe or not."""
    policy = {**POLICY, "success_threshold": 9, "half_open_max_calls": 9}
    generation = machine.run("acquire", policy)["generation"]
    machine.run("record", policy, generation=generation, successes=1)
    assert machine.run("snapshot", policy).get("last_failure_time") is None
    machine.run("record", policy, generation=generation, failures=3)
    machine.advance(2000)
    generation = machine.run("acquire", policy)["generation"]
    machine.run("record", policy, generation=generation, probe=1, successes=1)
    machine.run("acquire", policy)
    machine.run("record", policy, generation=generation, probe=2, slow=1, pending=1)
    machine.run("record", policy, generation=generation, probe=2)
    assert machine.run("snapshot", policy)["last_failure_time"] == START_MS // 1000
    machine.run("acquire", policy)
    machine.run("record", policy, generation=generation, probe=3, failures=1)
    assert machine.run("snapshot", policy)["last_failure_time"] == START_MS // 1000 + 2
    machine.run("control", policy, action="reset")
    assert machine.run("snapshot", policy)["last_failure_time"] == START_MS // 1000 + 2


def test_probe_failure_opens(machine: Machine) -> None:
    """The first probe failure opens it for another reset timeout."""
    first = probe(machine)
    reply = machine.run("record", POLICY, generation=first["generation"], probe=1, failures=1)
    assert (reply["state"], reply["retry_after_ms"]) == ("open", 1000)
    assert machine.run("snapshot", POLICY)["trips"] == 2


def test_released_probe(machine: Machine) -> None:
    """A probe with no outcome gives its slot back and changes nothing else."""
    first = probe(machine)
    reply = machine.run("record", POLICY, generation=first["generation"], probe=1)
    assert (reply["applied"], reply["state"]) == (True, "half_open")
    assert machine.run("acquire", POLICY)["admitted"]


def test_repeated_probe_report(machine: Machine) -> None:
    """The same probe report twice counts once."""
    policy = {**POLICY, "success_threshold": 2}
    first = probe(machine, policy)
    report = {"generation": first["generation"], "probe": 1, "successes": 1}
    machine.run("record", policy, **report)
    again = machine.run("record", policy, **report)
    assert (again["applied"], again["success_count"]) == (False, 1)


@pytest.mark.parametrize("outcome", [{"successes": 1}, {"failures": 1}, {"failures": 100}])
def test_stragglers(machine: Machine, outcome: dict[str, int]) -> None:
    """An outcome from before the trip changes nothing in open, in half_open, nor after the next close."""
    old = machine.run("acquire", POLICY)["generation"]

    def straggle() -> None:
        before = machine.run("snapshot", POLICY)
        assert machine.run("record", POLICY, generation=old, **outcome)["applied"] is False
        assert machine.run("snapshot", POLICY) == before

    machine.run("record", POLICY, generation=old, failures=3)
    straggle()
    machine.advance(1000)
    first = machine.run("acquire", POLICY)
    straggle()
    machine.run("record", POLICY, generation=first["generation"], probe=1, successes=1)
    straggle()


@pytest.mark.parametrize("policy", [None, POLICY])
@pytest.mark.parametrize("state", ["closed", "open"])
def test_a_probe_of_no_half_open(machine: Machine, state: str, policy: dict[str, int] | None) -> None:
    """A report for a slot counts in half open only, also under the generation of now."""
    generation = (machine.run("acquire", POLICY) if state == "closed" else trip(machine))["generation"]
    before = machine.run("snapshot", POLICY)
    for outcome in ({"failures": 9}, {"successes": 1}, {"slow": 1}, {}):
        assert machine.run("record", policy, generation=generation, probe=1, **outcome)["applied"] is False
    assert machine.run("snapshot", POLICY) == before


@pytest.mark.parametrize("policy", [None, POLICY])
@pytest.mark.parametrize(
    ("counts", "applied"),
    [({}, False), ({"successes": 0}, False), ({"successes": 1}, True), ({"slow": 1, "pending": 1}, True)],
)
def test_what_counts(machine: Machine, policy: dict[str, int] | None, counts: dict[str, int], applied: bool) -> None:
    """A report of one outcome counts, one of nothing does not, whether or not the caller names a policy."""
    generation = machine.run("acquire", policy)["generation"]
    assert machine.run("record", policy, generation=generation, **counts)["applied"] is applied


def test_a_report_of_nothing_known(machine: Machine) -> None:
    """A report where nothing is stored counts for nothing, but begins a generation, which stays."""
    reply = machine.run("record", POLICY, generation=7, failures=9)
    assert (reply["applied"], reply["state"], reply["failure_count"]) == (False, "closed", 0)
    machine.advance(5)
    assert machine.run("acquire", POLICY)["generation"] == reply["generation"] == START_MS * 1000
    assert machine.run("snapshot", POLICY)["exists"] is True


def test_generations_grow(machine: Machine) -> None:
    """Every transition has a generation greater than the one before, within one millisecond too."""
    seen = [machine.run("acquire", POLICY)["generation"]]
    for action in ("force_open", "reset", "force_closed", "reset", "force_open"):
        seen.append(machine.run("control", action=action)["generation"])
    assert seen == sorted(set(seen))


def test_force_open_ends_by_itself(machine: Machine) -> None:
    """A forced open rejects for its duration, then a probe decides."""
    machine.run("control", action="force_open", duration_ms=5000)
    machine.advance(4999)
    reply = machine.run("acquire", POLICY)
    assert (reply["admitted"], reply["forced"], reply["retry_after_ms"]) == (False, "open", 1)
    machine.advance(1)
    assert machine.run("acquire", POLICY)["state"] == "half_open"


def test_force_closed_counts_nothing(machine: Machine) -> None:
    """Forced closed never trips and leaves no counts behind; its end is the policy's rule again."""
    generation = machine.run("control", action="force_closed", duration_ms=5000)["generation"]
    assert machine.run("record", POLICY, generation=generation, failures=50)["state"] == "closed"
    machine.advance(5000)
    reply = machine.run("record", POLICY, generation=generation, failures=1)
    assert (reply["state"], reply["failure_count"], reply.get("forced")) == ("closed", 1, None)


def test_override_without_duration_has_an_end(machine: Machine) -> None:
    """An override that names no duration ends after 30 days."""
    machine.run("control", action="force_open")
    assert machine.run("snapshot")["forced_until_ms"] == START_MS + 30 * 86400 * 1000


def test_clear_override(machine: Machine) -> None:
    """Cleared, forced open goes on with a probe, forced closed as closed; without one nothing changes."""
    assert machine.run("control", action="clear_forced")["changed"] is False
    machine.run("control", action="force_open")
    assert machine.run("control", action="clear_forced")["changed"] is True
    assert machine.run("acquire", POLICY)["state"] == "half_open"
    machine.run("control", action="force_closed")
    assert machine.run("control", action="clear_forced")["state"] == "closed"
    assert machine.run("snapshot").get("forced") is None


@pytest.mark.parametrize("action", ["force_open", "force_closed"])
def test_forced_again(machine: Machine, action: str) -> None:
    """The same forced state with another end keeps its generation, and is no transition; with the same end, nothing."""
    first = machine.run("control", action=action, duration_ms=5000)
    assert machine.run("control", action=action, duration_ms=5000)["changed"] is False
    machine.advance(1000)
    again = machine.run("control", action=action, duration_ms=9000)
    assert (again["changed"], again["generation"], again.get("transition")) == (True, first["generation"], None)
    machine.advance(8999)
    assert machine.run("acquire", POLICY)["forced"] == action.removeprefix("force_")
    machine.advance(1)
    assert machine.run("acquire", POLICY).get("forced") is None


def test_a_reset_of_nothing(machine: Machine) -> None:
    """A closed circuit without counts stays as it is, and so does a breaker that nobody used."""
    assert machine.run("control", action="reset")["changed"] is False
    assert machine.run("snapshot")["exists"] is False
    generation = machine.run("acquire", POLICY)["generation"]
    reply = machine.run("control", action="reset")
    assert (reply["changed"], reply["generation"], reply.get("transition")) == (False, generation, None)
    machine.run("control", action="set_policy", override={"quorum": 2})
    assert machine.run("control", action="reset")["changed"] is True  # a policy override is something
    assert machine.run("control", action="reset")["changed"] is False
    machine.run("record", POLICY, generation=generation, failures=1)
    assert machine.run("control", action="reset")["transition"]["reason"] == "reset"


def test_probe_now(machine: Machine) -> None:
    """The next caller of an open circuit may probe, one at a time as ever; the back-off is what it was."""
    trip(machine)
    generation = machine.run("snapshot")["generation"]
    reply = machine.run("control", POLICY, action="probe")
    assert (reply["changed"], reply["state"], reply["retry_after_ms"]) == (True, "open", 0)
    assert (reply["generation"], reply.get("transition")) == (generation, None)
    assert machine.run("control", POLICY, action="probe")["changed"] is False
    first, second = machine.run("acquire", POLICY), machine.run("acquire", POLICY)
    assert (first["state"], first["probe"], second["admitted"]) == ("half_open", 1, False)
    assert machine.run("control", POLICY, action="probe")["changed"] is False
    reply = machine.run("record", POLICY, generation=first["generation"], probe=1, failures=1)
    assert (reply["state"], machine.run("snapshot", POLICY)["trips"]) == ("open", 2)


@pytest.mark.parametrize("action", ["force_open", "force_closed", "reset"])
def test_no_probe_now(machine: Machine, action: str) -> None:
    """A forced state and a closed circuit stay as they are, and so does a breaker that nobody used."""
    assert machine.run("control", action="probe")["changed"] is False
    assert machine.run("snapshot")["exists"] is False
    machine.run("control", action=action)
    before = machine.run("snapshot")
    assert machine.run("control", action="probe")["changed"] is False
    assert machine.run("snapshot") == before


def test_reset(machine: Machine) -> None:
    """A reset closes with no counts, and calls that began before it do not count."""
    old = machine.run("acquire", POLICY)["generation"]
    trip(machine)
    reply = machine.run("control", action="reset")
    assert (reply["state"], reply["failure_count"]) == ("closed", 0)
    assert machine.run("record", POLICY, generation=old, failures=3)["applied"] is False


@pytest.mark.parametrize("forced", ["force_open", "force_closed"])
@pytest.mark.parametrize("action", ["reset", "clear_forced"])
def test_nothing_is_left_of_an_override(machine: Machine, forced: str, action: str) -> None:
    """Reset or cleared, no end of an override is told."""
    assert machine.run("control", action=forced, duration_ms=5000)["changed"] is True
    assert machine.run("snapshot")["forced_until_ms"] == START_MS + 5000
    assert machine.run("control", action=action)["changed"] is True
    seen = machine.run("snapshot")
    assert (seen.get("forced"), seen.get("forced_until_ms")) == (None, None)


def test_snapshot_changes_nothing(machine: Machine) -> None:
    """A snapshot of what is not there makes nothing, and of an overdue open state begins no probe."""
    assert machine.run("snapshot")["exists"] is False
    assert machine.run("snapshot")["generation"] == 0
    trip(machine)
    machine.advance(5000)
    reply = machine.run("snapshot")
    assert (reply["state"], reply["retry_after_ms"], reply["exists"]) == ("open", 0, True)


COUNTS = st.integers(0, 4)
INSTANCES = st.sampled_from(["a", "b", "c", "d"])
POLICIES = st.fixed_dictionaries(
    {
        "failure_threshold": st.integers(1, 6),
        "reset_timeout_ms": st.integers(1, 2000),
    },
    optional={
        "success_threshold": st.integers(1, 3),
        "half_open_max_calls": st.integers(1, 3),
        "probe_timeout_ms": st.integers(1, 2000),
        "error_rate_threshold": st.sampled_from([0, 0.1, 1 / 3, 0.5, 0.995, 1]),
        "failures_in_window": st.sampled_from([0, 1, 3, 6]),
        "probe_failure_threshold": st.integers(1, 3),
        "minimum_calls": st.integers(1, 12),
        "window_ms": st.integers(10, 3000),
        "slow_call_duration_ms": st.integers(0, 100),
        "slow_call_rate_threshold": st.sampled_from([0, 0.2, 0.5, 1]),
        "backoff_multiplier": st.sampled_from([1, 1.5, 2, 10]),
        "max_reset_timeout_ms": st.integers(0, 5000),
        "jitter": st.sampled_from([0, 0.1, 1]),
        "quorum": st.integers(1, 3),
        "ramp_up_ms": st.integers(0, 2000),
        "max_hold_ms": st.sampled_from([0, 300, 1000, 10**6]),
        "enforce": st.booleans(),
    },
)
GATHERED = st.one_of(
    st.just({}),
    st.fixed_dictionaries({}, optional={"seen_failure": st.integers(0, 12), "age_ms": st.integers(0, 3500)}),
)
SIGNED = st.fixed_dictionaries(
    {}, optional={"operator": st.sampled_from(["ann", "bob"]), "note": st.sampled_from(["repaired", 'a "b" \\ /'])}
)
_ACQUIRE = st.tuples(st.just("acquire"), INSTANCES, st.integers(0, 3), st.integers(0, 2), GATHERED)
_SETTLE = st.tuples(
    st.just("settle"),
    INSTANCES,
    st.sampled_from(["success", "failure", "release", "slow success", "slow failure", "pending", "counted"]),
    st.sampled_from([0, 0, 0, 1, 2, 5]),
)
_HOLD = st.tuples(
    st.just("hold"),
    INSTANCES,
    st.integers(0, 3000),
    st.sampled_from([0, 0, 1, 2, 5]),
    st.fixed_dictionaries(
        {}, optional={"failures": COUNTS, "successes": COUNTS, "error": st.sampled_from(["Late", "Busy: 429"])}
    ),
)
_RARE = st.one_of(
    st.tuples(
        st.just("control"),
        st.sampled_from(["force_open", "force_closed", "clear_forced", "probe", "reset"]),
        st.integers(1, 2000),
        SIGNED,
    ),
    st.tuples(st.just("set_policy"), POLICIES, SIGNED),  # one with an end goes by the clock of Redis itself
    st.tuples(st.just("clear_policy"), SIGNED),
    st.tuples(st.just("other client")),  # the next requests come from the client with the other policy
)
STEPS = st.lists(
    st.one_of(
        _ACQUIRE,
        _SETTLE,
        _SETTLE,
        _HOLD,
        st.tuples(st.just("batch"), INSTANCES, COUNTS, COUNTS, COUNTS, COUNTS, GATHERED),
        st.tuples(st.just("advance"), st.integers(0, 1500)),
        st.tuples(st.just("due")),  # advance to the deadline that was told last, and acquire
        _RARE,
    ),
    min_size=15,
    max_size=60,
)
OUTCOMES = {
    "success": {"successes": 1},
    "failure": {"failures": 1, "error": "Boom: bang"},
    "release": {},
    "slow success": {"successes": 1, "slow": 1},
    "slow failure": {"failures": 1, "slow": 1},
    "pending": {"slow": 1, "pending": 1},
    "counted": {"successes": 1, "counted": 1},
}


def parsed(entry: dict[str, Any]) -> dict[str, Any]:
    """A transition or message with the map of its policy override: of a third, the engines write different digits."""
    return {**entry, "override": json.loads(entry["override"])} if "override" in entry else entry


def play(machine: Machine, steps: list[Any], policy: dict[str, Any], other: dict[str, Any]) -> list[Any]:
    """The replies to a sequence; outcomes are reported for permits of the whole past, so stale ones too."""
    permits: list[dict[str, Any]] = []
    told = []

    def tell(step: Any, reply: dict[str, Any]) -> dict[str, Any]:
        found = {field: value for field, value in reply.items() if value is not None and field != "source"}
        if "transition" in found:
            found["transition"] = parsed(found["transition"])
        told.append((step, found))
        return reply

    for step in steps:
        kind, *rest = step
        if kind == "advance":
            machine.advance(rest[0])
        elif kind == "due":
            machine.advance(told[-1][1].get("retry_after_ms", 0) if told else 0)
            kind, rest = "acquire", ["a", 0, 0, {}]
        if kind == "acquire":
            last = permits[-1]["generation"] if permits else 0
            request = {"instance": rest[0], "generation": last, "successes": rest[1]}
            request |= {"slow": rest[2], "pending": rest[2], **rest[3]}
            reply = tell(step, machine.run("acquire", policy, **request))
            if reply["admitted"]:
                permits.append(reply)
        elif kind == "settle" and permits:
            permit = permits[-1 - rest[2] % len(permits)]
            slot = {"probe": permit["probe"]} if permit.get("probe") is not None else {}
            request = {"instance": f"{rest[0]}:{rest[2]}", "generation": permit["generation"], **slot}
            request |= OUTCOMES[rest[1]]
            tell(step, machine.run("record", policy, **request))
        elif kind == "hold" and permits:
            permit = permits[-1 - rest[2] % len(permits)]
            slot = {"probe": permit["probe"]} if permit.get("probe") is not None else {}
            request = {"instance": rest[0], "generation": permit["generation"], "hold_ms": rest[1], **slot, **rest[3]}
            tell(step, machine.run("record", policy, **request))
        elif kind == "batch" and permits:
            successes, failures, slow, counted, gathered = rest[1:]
            counts = {"successes": successes, "failures": failures, "slow": min(slow, successes + failures)}
            counts |= {"counted": min(counted, successes + failures), **gathered}
            tell(step, machine.run("record", policy, instance=rest[0], generation=permits[-1]["generation"], **counts))
        elif kind == "control":
            length = {"duration_ms": rest[1]} if rest[0].startswith("force") else {}
            tell(step, machine.run("control", policy, action=rest[0], **length, **rest[2]))
        elif kind == "set_policy":
            tell(step, machine.run("control", policy, action="set_policy", override=rest[0], **rest[1]))
        elif kind == "clear_policy":
            tell(step, machine.run("control", policy, action="clear_policy", **rest[0]))
        elif kind == "other client":
            policy, other = other, policy
        tell("snapshot", machine.run("snapshot", policy))
    told.append(("history", [parsed(entry) for entry in machine.history()]))
    return told


@pytest.mark.timeout(120 + SEQUENCES / 2)
@settings(max_examples=SEQUENCES, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, policy=POLICIES, other=POLICIES)
def test_engines_agree(client: redis.Redis, steps: list[Any], policy: dict[str, Any], other: dict[str, Any]) -> None:
    """The Lua and the Python mirror reply the same, step by step, to random sequences of two clients' requests.

    With a snapshot after each step. In the end, they have the same history.
    """
    client.delete(*keys_of("m"))
    said = play(lua_machine(client), steps, policy, other)
    assert said == play(memory_machine(), steps, policy, other)
    assert said == play(in_place_machine(), steps, policy, other)
