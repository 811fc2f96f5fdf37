"""Holds, on both engines: the service itself said when to come back, as by 429 with Retry-After."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import START_MS, Machine
from test_policy_rules import BACKOFF, NEVER, RATE, begin, half_open, open_ms, recover, report, sums

POLICY = {"failure_threshold": 3, "reset_timeout_ms": 1000, "probe_timeout_ms": 400}


def hold(machine: Machine, policy: dict[str, Any], generation: int, hold_ms: int, **request: Any) -> dict[str, Any]:
    """The reply to a report of a held call."""
    return machine.run("record", policy, generation=generation, hold_ms=hold_ms, **request)


def test_a_hold_opens_for_as_long_as_it_says(machine: Machine) -> None:
    """One report opens the circuit, to the millisecond of its end; then it is half open, as after any open period."""
    reply = hold(machine, POLICY, begin(machine, POLICY), 7000)
    assert (reply["applied"], reply["state"], reply["retry_after_ms"]) == (True, "open", 7000)
    assert (reply["transition"]["from"], reply["transition"]["reason"]) == ("closed", "held")
    machine.advance(6999)
    assert machine.run("acquire", POLICY)["admitted"] is False
    machine.advance(1)
    reply = machine.run("acquire", POLICY)
    assert (reply["state"], reply["probe"], reply["transition"]["reason"]) == ("half_open", 1, "timeout")
    assert machine.run("record", POLICY, generation=reply["generation"], probe=1, successes=1)["state"] == "closed"


def test_a_hold_without_a_policy(machine: Machine) -> None:
    """A report without a policy holds, too: the default lasts 300 s at most."""
    generation = machine.run("acquire")["generation"]
    assert machine.run("record", generation=generation, hold_ms=10**9)["retry_after_ms"] == 300_000


def test_a_held_call_is_neither_success_nor_failure(machine: Machine) -> None:
    """It ends no run of failures, adds none, and is no call of the window."""
    policy = {**RATE, "quorum": 2}
    generation = begin(machine, policy)
    report(machine, policy, failures=2, instance="a:1")
    reply = hold(machine, policy, generation, 7000, instance="a:1")
    assert (reply["state"], reply["failure_count"]) == ("closed", 2)
    assert sums(machine, policy) == (2, 2, 0)
    assert hold(machine, policy, generation, 7000, instance="b:1")["transition"]["failure_count"] == 2


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize("hold_ms", [0, 1])
def test_the_shortest_hold(machine: Machine, hold_ms: int, failures: int) -> None:
    """0 is no hold, and a report of nothing else counts for nothing; 1 ms is one, with a failure or without."""
    reply = hold(machine, POLICY, begin(machine, POLICY), hold_ms, failures=failures)
    assert (reply["applied"], reply["failure_count"]) == (hold_ms + failures > 0, failures)
    assert reply["state"] == ("closed", "open")[hold_ms]


@pytest.mark.parametrize(("hold_ms", "lasts"), [(4999, 4999), (5000, 5000), (5001, 5000), (10**13, 5000)])
def test_the_longest_hold(machine: Machine, hold_ms: int, lasts: int) -> None:
    """A hold lasts max_hold at most."""
    policy = {**POLICY, "max_hold_ms": 5000}
    assert hold(machine, policy, begin(machine, policy), hold_ms)["retry_after_ms"] == lasts


@pytest.mark.parametrize("probe", [False, True])
def test_no_holds(machine: Machine, probe: bool) -> None:
    """With max_hold 0 holds are ignored: a probe's failure is one like any other."""
    policy = {**POLICY, "failure_threshold": 1, "max_hold_ms": 0}
    if not probe:
        assert hold(machine, policy, begin(machine, policy), 5000)["applied"] is False
        return
    reply = half_open(machine, policy)
    seen = hold(machine, policy, reply["generation"], 5000, probe=1, failures=1)
    assert (seen["transition"]["reason"], seen["retry_after_ms"]) == ("probe_failed", 1000)


def test_a_hold_adds_nothing_to_back_off(machine: Machine) -> None:
    """A hold is no trip: neither does the next trip last longer, nor does it end a back-off that there is."""
    for trips in (0, 1):
        if trips:
            assert open_ms(machine, BACKOFF) == 1000
            recover(machine, BACKOFF)
        hold(machine, BACKOFF, begin(machine, BACKOFF), 50)
        assert machine.run("snapshot", BACKOFF)["trips"] == trips
        recover(machine, BACKOFF)
        assert machine.run("snapshot", BACKOFF)["trips"] == trips
        if not trips:
            machine.run("control", action="reset")
    assert open_ms(machine, BACKOFF) == 2000


def test_a_hold_after_a_long_time_closed(machine: Machine) -> None:
    """A back-off that was over when the hold began does not come back with it."""
    open_ms(machine, BACKOFF)
    recover(machine, BACKOFF)
    machine.advance(2000)
    hold(machine, BACKOFF, begin(machine, BACKOFF), 50)
    recover(machine, BACKOFF)
    assert open_ms(machine, BACKOFF) == 1000


def test_many_holds_are_one(machine: Machine) -> None:
    """Holds of one generation make one transition. A longer one extends the present one; a shorter one does nothing."""
    generation = begin(machine, POLICY)
    first = hold(machine, POLICY, generation, 5000)
    machine.advance(100)
    reply = hold(machine, POLICY, generation, 4900)
    assert (reply["applied"], reply["retry_after_ms"], reply.get("transition")) == (False, 4900, None)
    reply = hold(machine, POLICY, generation, 7000)
    assert (reply["applied"], reply["retry_after_ms"], reply.get("transition")) == (True, 7000, None)
    assert reply["generation"] == first["generation"]
    reply = hold(machine, POLICY, first["generation"], 7001)  # under the present generation
    assert (reply["applied"], reply["retry_after_ms"]) == (True, 7001)
    assert hold(machine, POLICY, generation - 1, 9000)["applied"] is False
    machine.advance(7001)
    assert machine.run("acquire", POLICY)["admitted"] is True


def test_an_extended_hold_lasts_max_hold_in_all(machine: Machine) -> None:
    """However often it is extended, a hold ends max_hold after it began."""
    policy = {**POLICY, "max_hold_ms": 5000}
    generation = begin(machine, policy)
    hold(machine, policy, generation, 4000)
    machine.advance(3000)
    assert hold(machine, policy, generation, 4000)["retry_after_ms"] == 2000
    machine.advance(1000)
    assert hold(machine, policy, generation, 4000)["applied"] is False
    machine.advance(1000)
    assert machine.run("acquire", policy)["state"] == "half_open"
    assert hold(machine, policy, generation, 4000)["applied"] is False


def test_a_hold_extends_no_trip(machine: Machine) -> None:
    """A call of the generation that a trip has ended is a straggler, whatever it says."""
    generation = begin(machine, POLICY)
    machine.run("record", POLICY, generation=generation, failures=3)
    reply = hold(machine, POLICY, generation, 9000)
    assert (reply["applied"], reply["retry_after_ms"]) == (False, 1000)


def test_a_report_that_trips_and_holds(machine: Machine) -> None:
    """A report whose failures trip opens for the longer of the two times, and is a trip."""
    reply = hold(machine, POLICY, begin(machine, POLICY), 7000, failures=3)
    assert (reply["transition"]["reason"], reply["retry_after_ms"]) == ("failure_threshold", 7000)
    assert machine.run("snapshot", POLICY)["trips"] == 1


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize(("hold_ms", "lasts"), [(1, 2000), (2000, 2000), (2001, 2001), (9000, 9000)])
def test_a_held_probe(machine: Machine, hold_ms: int, lasts: int, failures: int) -> None:
    """It is a failed probe, whatever its call was: it opens for the longer of the two times, and counts as a trip.

    Other probes extend it.
    """
    policy = {**BACKOFF, "half_open_max_calls": 2, "probe_failure_threshold": 5}
    first = half_open(machine, policy)
    second = machine.run("acquire", policy)
    reply = hold(machine, policy, first["generation"], hold_ms, probe=first["probe"], failures=failures)
    assert (reply["state"], reply["retry_after_ms"], reply["transition"]["reason"]) == ("open", lasts, "held")
    assert machine.run("snapshot", policy)["trips"] == 2
    reply = hold(machine, policy, second["generation"], lasts + 5, probe=second["probe"], failures=failures)
    assert (reply["applied"], reply["retry_after_ms"], reply.get("transition")) == (True, lasts + 5, None)


def test_a_held_probe_reports_once(machine: Machine) -> None:
    """A probe whose slot is gone holds nothing."""
    policy = {**POLICY, "failure_threshold": 1}
    first = half_open(machine, policy)
    machine.run("record", policy, generation=first["generation"], probe=1)
    assert hold(machine, policy, first["generation"], 9000, probe=1, failures=1)["applied"] is False


@pytest.mark.parametrize("action", ["force_open", "force_closed"])
@pytest.mark.parametrize("held_before", [False, True])
def test_a_hold_never_touches_a_forced_state(machine: Machine, action: str, held_before: bool) -> None:
    """Neither a hold under the forced generation nor one from before it changes anything."""
    old = begin(machine, POLICY)
    if held_before:
        hold(machine, POLICY, old, 5000)
    forced = machine.run("control", POLICY, action=action, duration_ms=60_000)["generation"]
    before = machine.run("snapshot", POLICY)
    for generation in (old, forced):
        assert hold(machine, POLICY, generation, 90_000)["applied"] is False
    assert machine.run("snapshot", POLICY) == before


def test_a_reset_ends_a_hold(machine: Machine) -> None:
    """After a reset, calls of before the hold hold nothing."""
    generation = begin(machine, POLICY)
    hold(machine, POLICY, generation, 5000)
    machine.run("control", POLICY, action="reset")
    assert machine.run("acquire", POLICY)["state"] == "closed"
    assert hold(machine, POLICY, generation, 5000)["applied"] is False


@pytest.mark.parametrize("waited", [1000, 60_000, 61_000])
def test_an_operators_probe_ends_a_hold(machine: Machine, waited: int) -> None:
    """A late report of another held call does not undo it, also if the hold was just over: the next caller probes."""
    generation = begin(machine, POLICY)
    present = hold(machine, POLICY, generation, 60_000)["generation"]
    machine.advance(waited)
    assert [machine.run("control", POLICY, action="probe")["changed"] for _ in range(2)] == [True, False]
    for late in (generation, present):
        assert hold(machine, POLICY, late, 60_000)["applied"] is False
    assert machine.run("acquire", POLICY)["probe"] == 1


def test_a_hold_where_nothing_is_known(machine: Machine) -> None:
    """A report where nothing is stored holds nothing: its generation is gone."""
    assert hold(machine, POLICY, START_MS - 5, 5000)["state"] == "closed"


def test_a_hold_of_a_quorum(machine: Machine) -> None:
    """The fleet holds once as many hosts as the quorum says were told to come back later, or have failed."""
    policy = {"failure_threshold": NEVER, "quorum": 2, "window_ms": 1000}
    generation = begin(machine, policy)
    for instance in ("a:1", "a:2"):
        reply = hold(machine, policy, generation, 5000, instance=instance)
        assert (reply["applied"], reply["state"]) == (True, "closed")
    machine.advance(1001)
    assert hold(machine, policy, generation, 5000, instance="b:1")["state"] == "closed"  # a's was a window ago
    report(machine, policy, failures=1, instance="c:1")
    assert hold(machine, policy, generation, 5000, instance="c:1")["transition"]["reason"] == "held"
