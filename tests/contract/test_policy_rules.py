"""Every way to trip, recover and be steered, on both engines: rates, slow calls, back-off, quorum, live policy."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import redis
from conftest import START_MS, Machine, lua_machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybreaker_redis._protocol import keys_of

DAY_MS = 86_400_000
NEVER = 10**9  # a failure_threshold that no test reaches
PLAIN = {"failure_threshold": 3, "reset_timeout_ms": 1000, "probe_timeout_ms": 400}
RATE = {"failure_threshold": NEVER, "error_rate_threshold": 0.5, "minimum_calls": 4, "window_ms": 1000}
SLOW = {**RATE, "error_rate_threshold": 0, "slow_call_duration_ms": 100, "slow_call_rate_threshold": 0.5}
COUNT = {"failure_threshold": NEVER, "failures_in_window": 3, "window_ms": 1000}
BACKOFF = {"failure_threshold": 1, "reset_timeout_ms": 1000, "probe_timeout_ms": 400, "backoff_multiplier": 2}
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def begin(machine: Machine, policy: dict[str, Any]) -> int:
    """The generation of a breaker that is closed."""
    reply = machine.run("acquire", policy)
    assert reply["state"] == "closed"
    return reply["generation"]


def report(machine: Machine, policy: dict[str, Any], **counts: Any) -> dict[str, Any]:
    """Reports outcomes under the generation of now."""
    return machine.run("record", policy, generation=machine.run("snapshot", policy)["generation"], **counts)


def sums(machine: Machine, policy: dict[str, Any]) -> tuple[int, int, int]:
    """Calls, failures and slow calls in the window."""
    seen = machine.run("snapshot", policy)
    return seen["calls"], seen["failures"], seen["slow"]


def open_ms(machine: Machine, policy: dict[str, Any]) -> int:
    """Trips a closed breaker, or fails its next probe; for how long it opens."""
    reply = machine.run("acquire", policy)
    slot = {"probe": reply["probe"]} if reply.get("probe") else {}
    reply = machine.run("record", policy, generation=reply["generation"], failures=1, **slot)
    assert reply["state"] == "open"
    return reply["retry_after_ms"]


def recover(machine: Machine, policy: dict[str, Any]) -> dict[str, Any]:
    """Waits until probes may run, and closes it by the first."""
    machine.advance(machine.run("snapshot", policy)["retry_after_ms"])
    reply = machine.run("acquire", policy)
    reply = machine.run("record", policy, generation=reply["generation"], probe=reply["probe"], successes=1)
    assert reply["state"] == "closed"
    return reply


# Failures in the window


@pytest.mark.parametrize("limit", [1, 3])
def test_failures_in_the_window(machine: Machine, limit: int) -> None:
    """It trips at the n-th failure within the window, whatever succeeded in between, of however few calls."""
    policy = {**COUNT, "failures_in_window": limit}
    begin(machine, policy)
    for _ in range(limit - 1):
        assert report(machine, policy, failures=1)["state"] == "closed"
        assert report(machine, policy, successes=50)["failure_count"] == 0
        machine.advance(300)
    reply = report(machine, policy, failures=1)
    assert (reply["state"], reply["transition"]["reason"]) == ("open", "failures_in_window")
    assert (reply["transition"]["failures"], reply["transition"]["calls"]) == (limit, limit + 50 * (limit - 1))


def test_failures_that_have_left_the_window(machine: Machine) -> None:
    """Failures that are older than the window do not count: one in each half of it never trips."""
    begin(machine, COUNT)
    for _ in range(12):
        assert report(machine, COUNT, failures=1)["state"] == "closed"
        machine.advance(500)


def test_failures_in_the_window_of_a_quorum(machine: Machine) -> None:
    """The failures must come from as many hosts as the quorum says."""
    policy = {**COUNT, "quorum": 2}
    begin(machine, policy)
    assert report(machine, policy, failures=5, instance="a:1")["state"] == "closed"
    assert report(machine, policy, failures=1, instance="a:2")["state"] == "closed"
    assert report(machine, policy, failures=1, instance="b:1")["transition"]["reason"] == "failures_in_window"


def test_a_window_for_failures_alone(machine: Machine) -> None:
    """The rule keeps a window by itself, which it empties at the trip; 0 turns it off."""
    begin(machine, COUNT)
    report(machine, COUNT, failures=1, successes=4)
    assert sums(machine, COUNT) == (5, 1, 0)
    assert report(machine, COUNT, failures=2)["state"] == "open"
    assert sums(machine, COUNT) == (0, 0, 0)
    machine.run("control", action="reset")
    assert report(machine, {**COUNT, "failures_in_window": 0}, failures=9)["state"] == "closed"
    assert sums(machine, COUNT) == (0, 0, 0)


# Probes


def half_open(machine: Machine, policy: dict[str, Any]) -> dict[str, Any]:
    """The reply to the first probe after a trip."""
    open_ms(machine, policy)
    machine.advance(1000)
    return machine.run("acquire", policy)


def test_as_many_failed_probes_as_the_policy_says(machine: Machine) -> None:
    """probe_failure_threshold failed probes open the circuit again; fewer do not, whatever succeeded in between."""
    policy = {**PLAIN, "failure_threshold": 1, "probe_failure_threshold": 3, "success_threshold": 9}
    reply = half_open(machine, policy)
    for _ in range(2):
        seen = machine.run("record", policy, generation=reply["generation"], probe=reply["probe"], failures=1)
        assert (seen["state"], seen["applied"]) == ("half_open", True)
        reply = machine.run("acquire", policy)
        machine.run("record", policy, generation=reply["generation"], probe=reply["probe"], successes=1)
        reply = machine.run("acquire", policy)
    seen = machine.run("record", policy, generation=reply["generation"], probe=reply["probe"], failures=1)
    assert (seen["state"], seen["transition"]["reason"]) == ("open", "probe_failed")
    machine.advance(1000)
    reply = machine.run("acquire", policy)
    seen = machine.run("record", policy, generation=reply["generation"], probe=reply["probe"], failures=1)
    assert seen["state"] == "half_open"  # each half-open state counts anew


def test_a_slow_probe_fails_once(machine: Machine) -> None:
    """A probe that was reported as slow while it ran has failed; it keeps its slot to its end, which adds nothing."""
    policy = {**SLOW, "failure_threshold": 1, "reset_timeout_ms": 1000, "probe_failure_threshold": 2}
    reply = half_open(machine, policy)
    slot = {"generation": reply["generation"], "probe": reply["probe"]}
    assert machine.run("record", policy, **slot, slow=1, pending=1)["state"] == "half_open"
    assert machine.run("acquire", policy)["admitted"] is False
    assert machine.run("record", policy, **slot, successes=1, counted=1)["state"] == "half_open"
    reply = machine.run("acquire", policy)
    seen = machine.run("record", policy, generation=reply["generation"], probe=reply["probe"], slow=1, successes=1)
    assert (seen["state"], seen["transition"]["reason"]) == ("open", "probe_slow")


# Error rate


def test_less_than_the_rate_is_not_the_rate(machine: Machine) -> None:
    """49.5 % is not 50 %: it trips at the call by which half have failed."""
    policy = {**RATE, "minimum_calls": 200}
    begin(machine, policy)
    assert report(machine, policy, successes=101, failures=99)["state"] == "closed"
    assert report(machine, policy, failures=1)["state"] == "closed"  # 100 of 201
    reply = report(machine, policy, failures=1)
    assert (reply["state"], reply["transition"]["reason"]) == ("open", "error_rate")


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("failures", "calls", "rate"),
    [(7, 100, 0.07), (29, 100, 0.29), (57, 100, 0.57), (1, 3, 1 / 3), (995, 1000, 0.995), (1, 1, 1), (1, 10**9, 1e-9)],
)
def test_exact_rate(machine: Machine, failures: int, calls: int, rate: float, live: bool) -> None:
    """It trips at exactly the rate, however it was given: 7 failures in 100 calls at 0.07, and not 6."""
    policy = {**RATE, "error_rate_threshold": 0.999999 if live else rate, "minimum_calls": calls}
    for below in (1, 0):
        machine.run("control", policy, action="reset")
        if live:
            machine.run("control", policy, action="set_policy", override={"error_rate_threshold": rate})
        reply = report(machine, policy, successes=calls - failures + below, failures=failures - below)
        assert reply["state"] == ("closed" if below else "open")
    assert reply["transition"]["reason"] == "error_rate"


def test_minimum_calls(machine: Machine) -> None:
    """However many fail, no rate is looked at before minimum_calls calls."""
    policy = {**RATE, "minimum_calls": 20}
    begin(machine, policy)
    for _ in range(19):
        assert report(machine, policy, failures=1)["state"] == "closed"
    assert report(machine, policy, failures=1)["state"] == "open"


@pytest.mark.parametrize("script", ["record", "acquire"])
def test_success_completes_minimum_calls(machine: Machine, script: str) -> None:
    """A success that completes minimum_calls trips a breaker of which enough calls have failed."""
    policy = {**RATE, "minimum_calls": 20}
    generation = begin(machine, policy)
    assert report(machine, policy, failures=10, successes=9)["state"] == "closed"
    reply = machine.run(script, policy, generation=generation, successes=1)
    assert (reply["state"], reply.get("admitted", False)) == ("open", False)
    change = reply["transition"]
    assert (change["reason"], change["calls"], change["failures"], change["slow"]) == ("error_rate", 20, 10, 0)


def test_both_rules(machine: Machine) -> None:
    """Failures in a row trip it while the rate is low, and are named as the reason."""
    policy = {**RATE, "failure_threshold": 3}
    begin(machine, policy)
    report(machine, policy, successes=1000)
    assert report(machine, policy, failures=3)["transition"]["reason"] == "failure_threshold"


# Window


def test_a_bucket_ends_at_its_millisecond(machine: Machine) -> None:
    """What the first bucket counted is there for one window from its beginning, to the millisecond."""
    begin(machine, RATE)
    report(machine, RATE, successes=5)
    machine.advance(99)
    report(machine, RATE, successes=2, failures=1)
    machine.advance(900)
    assert sums(machine, RATE) == (8, 1, 0)
    machine.advance(1)
    assert sums(machine, RATE) == (0, 0, 0)


def test_buckets_end_one_by_one(machine: Machine) -> None:
    """Ten buckets of one call each go one after the other."""
    begin(machine, RATE)
    for _ in range(10):
        report(machine, RATE, successes=1)
        machine.advance(100)
    seen = [sums(machine, RATE)[0]]
    for _ in range(9):
        machine.advance(100)
        seen.append(sums(machine, RATE)[0])
    assert seen == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def fill(machine: Machine, policy: dict[str, Any]) -> None:
    """In each of ten buckets a success, a failure and a slow call, and one more success in each than in the last."""
    for number in range(10):
        report(machine, policy, successes=number + 1)
        report(machine, policy, failures=1, slow=1)
        machine.advance(100)


def test_every_count_ends_with_its_bucket(machine: Machine) -> None:
    """Calls, failures and slow calls of a bucket go together, also when others arrive meanwhile."""
    policy = {**RATE, "minimum_calls": NEVER}
    begin(machine, policy)
    fill(machine, policy)
    for number in range(1, 10):
        assert sums(machine, policy) == (sum(range(number + 2, 12)), 10 - number, 10 - number)
        machine.advance(100)
    assert sums(machine, policy) == (0, 0, 0)


def test_buckets_that_become_longer(machine: Machine) -> None:
    """When the window grows, what two old buckets counted goes with the new one in which both of them began."""
    policy, longer = ({**RATE, "minimum_calls": NEVER, "window_ms": length} for length in (1000, 2000))
    begin(machine, policy)
    fill(machine, policy)
    machine.advance(-50)
    assert sums(machine, longer) == (65, 10, 10)
    report(machine, longer, successes=100)
    machine.advance(100)
    report(machine, longer, successes=1000)
    machine.advance(949)
    assert sums(machine, longer) == (1165, 10, 10)
    for calls, others in ((1160, 8), (1151, 6), (1138, 4), (1121, 2), (1000, 0), (0, 0)):
        machine.advance(1)
        assert sums(machine, longer) == (calls, others, others)
        machine.advance(199)


def test_a_window_outlasts_its_rule(machine: Machine) -> None:
    """Under a policy without a rate a window that was begun goes on, in buckets of its own length."""
    begin(machine, RATE)
    report(machine, RATE, successes=3)
    machine.advance(500)
    report(machine, PLAIN, successes=1)
    assert sums(machine, PLAIN)[0] == 4
    machine.advance(500)
    assert sums(machine, PLAIN)[0] == 1
    machine.advance(500)
    assert sums(machine, PLAIN)[0] == 0


def test_the_shortest_window(machine: Machine) -> None:
    """Ten milliseconds are ten buckets of one, to the last of them."""
    policy = {**RATE, "window_ms": 10, "quorum": 2}
    begin(machine, policy)
    report(machine, policy, failures=2, instance="a")
    for wait, counts in ((0, (2, 2, 0)), (9, (2, 2, 0)), (1, (0, 0, 0))):
        machine.advance(wait)
        assert sums(machine, policy) == counts


def test_a_window_that_is_no_multiple_of_ten(machine: Machine) -> None:
    """A bucket is a whole tenth of the window, rounded down."""
    policy = {**RATE, "window_ms": 1009}
    begin(machine, policy)
    report(machine, policy, successes=3)
    machine.advance(999)
    assert sums(machine, policy)[0] == 3
    machine.advance(1)
    assert sums(machine, policy)[0] == 0


@FEW
@given(st.lists(st.tuples(st.sampled_from([0, 1, 99, 100, 101, 350, 999, 1000, 1001, 5000]), st.integers(0, 3))))
def test_window_is_the_last_ten_buckets(machine: Machine, steps: list[tuple[int, int]]) -> None:
    """At any time the window holds what arrived in this bucket and the nine before."""
    machine.run("control", action="reset")
    begin(machine, RATE)
    arrived = []
    for gap, failures in steps:
        machine.advance(gap)
        report(machine, {**RATE, "minimum_calls": NEVER}, successes=1, failures=failures)
        arrived.append((machine.now_ms // 100, failures))
        recent = [count for bucket, count in arrived if bucket > machine.now_ms // 100 - 10]
        assert sums(machine, RATE)[:2] == (len(recent) + sum(recent), sum(recent))


@pytest.mark.parametrize("gap", [1000, 1001, 1999, DAY_MS])
def test_idle_gap(machine: Machine, gap: int) -> None:
    """Idle for a window or longer leaves nothing behind: the next failure is one of one."""
    begin(machine, RATE)
    report(machine, RATE, failures=3)
    machine.advance(gap)
    assert sums(machine, RATE) == (0, 0, 0)
    assert report(machine, RATE, failures=1)["state"] == "closed"
    assert sums(machine, RATE) == (1, 1, 0)


@pytest.mark.parametrize("action", ["probe", "reset", "force_closed"])
def test_empty_after_a_close(machine: Machine, action: str) -> None:
    """However it was closed, the window begins with nothing."""
    policy = {**RATE, **BACKOFF, "failure_threshold": NEVER, "reset_timeout_ms": 1}
    begin(machine, policy)
    report(machine, policy, failures=4)
    if action == "probe":
        recover(machine, policy)
    else:
        machine.run("control", policy, action=action)
        machine.run("control", policy, action="clear_forced")
    assert sums(machine, policy) == (0, 0, 0)
    assert report(machine, policy, failures=3)["state"] == "closed"
    assert sums(machine, policy) == (3, 3, 0)


def test_rejections_enter_no_rate(machine: Machine) -> None:
    """Rejections, while open and while the slots are taken, are no calls; nor are released ones."""
    policy = {**RATE, "reset_timeout_ms": 100}
    generation = begin(machine, policy)
    report(machine, policy, failures=4)
    for _ in range(20):
        assert not machine.run("acquire", policy, generation=generation, successes=1)["admitted"]
    machine.advance(100)
    first = machine.run("acquire", policy)
    for _ in range(20):
        assert not machine.run("acquire", policy)["admitted"]
    machine.run("record", policy, generation=first["generation"], probe=1, successes=1)
    begin(machine, policy)
    report(machine, policy)
    assert sums(machine, policy) == (0, 0, 0)


def test_a_batch_is_of_its_arrival(machine: Machine) -> None:
    """Successes that were gathered count in the bucket in which they arrive."""
    generation = begin(machine, RATE)
    machine.advance(950)
    machine.run("acquire", RATE, generation=generation, successes=500)
    machine.advance(949)
    assert sums(machine, RATE) == (500, 0, 0)
    machine.advance(1)
    assert sums(machine, RATE) == (0, 0, 0)


def test_a_longer_window_keeps_what_there_is(machine: Machine) -> None:
    """When the window grows live, its counts stay with the time at which their buckets began."""
    begin(machine, RATE)
    report(machine, RATE, successes=3, failures=2)
    machine.advance(500)
    report(machine, RATE, successes=2, failures=1)
    machine.run("control", RATE, action="set_policy", override={"window_ms": 10_000})
    assert sums(machine, RATE) == (8, 3, 0)
    report(machine, RATE, successes=1)
    machine.advance(9_499)
    assert sums(machine, RATE) == (9, 3, 0)
    machine.advance(1)
    assert sums(machine, RATE) == (0, 0, 0)


def test_a_shorter_window_drops_what_is_too_old(machine: Machine) -> None:
    """When the window shrinks live, what its buckets began to count longer ago is gone."""
    policy = {**RATE, "window_ms": 10_000}
    begin(machine, policy)
    report(machine, policy, successes=1)
    machine.advance(4_000)
    report(machine, policy, successes=2)
    machine.advance(900)
    report(machine, policy, successes=4)
    assert sums(machine, policy)[0] == 7
    machine.run("control", policy, action="set_policy", override={"window_ms": 1_000})
    assert sums(machine, policy)[0] == 6
    report(machine, policy, successes=8)
    machine.advance(100)
    assert sums(machine, policy)[0] == 8
    machine.run("control", policy, action="clear_policy")
    assert sums(machine, policy)[0] == 8


@pytest.mark.parametrize("recovered", [False, True])
@pytest.mark.parametrize("quorum", [1, 2])
def test_an_empty_report_leaves_the_window(machine: Machine, recovered: bool, quorum: int) -> None:
    """A report of nothing writes no window, not even for a policy that asks for another one."""
    shorter = {**RATE, "quorum": quorum}
    policy = {**shorter, "window_ms": 10_000}
    generation = begin(machine, policy)
    if recovered:
        machine.run("control", policy, action="force_open", duration_ms=1)
        generation = recover(machine, policy)["generation"]
        machine.run("record", policy, generation=generation)  # writes that the recovery is over
        machine.advance(START_MS - machine.now_ms + 10_000)
    for _ in range(2):
        report(machine, policy, failures=1, instance="a")
        machine.advance(4_000)
        machine.run("record", shorter, generation=generation)
    assert sums(machine, shorter)[0] == sums(machine, policy)[0] == 2


@pytest.mark.parametrize("first", ["long", "short"])
def test_two_clients_with_windows_of_their_own(machine: Machine, first: str) -> None:
    """The longest window that a client asks for is kept and judged: it trips at the twentieth call of a minute."""
    minute = {**RATE, "minimum_calls": 20, "window_ms": 60_000}
    second = {**minute, "error_rate_threshold": 0.9, "window_ms": 1_000}
    clients = [minute, second] if first == "long" else [second, minute]
    begin(machine, minute)
    for _ in range(9):
        for policy in clients:
            reply = report(machine, policy, successes=clients.index(policy), failures=1 - clients.index(policy))
            assert reply["state"] == "closed"
            assert reply.get("window_ms") == (60_000 if policy is second and sums(machine, minute)[0] > 1 else None)
        machine.advance(3_000)
    report(machine, second, successes=1)
    assert sums(machine, minute) == (19, 9, 0)
    assert report(machine, minute, failures=1)["transition"]["reason"] == "error_rate"


def test_any_client_judges_the_longest_window(machine: Machine) -> None:
    """A client that asks for a shorter window trips by the calls and the failed hosts of the longer one."""
    minute = {**RATE, "quorum": 2, "minimum_calls": 20, "window_ms": 60_000}
    begin(machine, minute)
    report(machine, minute, failures=19, host="a")
    machine.advance(50_000)
    reply = report(machine, {**minute, "window_ms": 1_000}, failures=1, host="b")
    assert (reply["state"], reply["transition"]["calls"]) == ("open", 20)


@pytest.mark.parametrize("counts", [{"successes": 1, "slow": 1}, {"failures": 1}, {"failures": 1, "slow": 1}])
def test_a_single_call_keeps_the_longer_window(machine: Machine, counts: dict[str, int]) -> None:
    """Whatever a call was, a client that asks for a shorter window leaves it where it is."""
    minute = {**SLOW, "window_ms": 60_000}
    begin(machine, minute)
    report(machine, minute, **counts)
    assert report(machine, SLOW, successes=1)["window_ms"] == 60_000


def test_a_longer_window_ends_when_nobody_asks_for_it(machine: Machine) -> None:
    """It makes room for a shorter one when it is empty, or after a whole window without a report that asks for it."""
    minute, second = {**RATE, "minimum_calls": NEVER, "window_ms": 60_000}, {**RATE, "minimum_calls": NEVER}
    begin(machine, minute)
    report(machine, minute, successes=1)
    machine.advance(50_000)
    assert report(machine, second, successes=2)["window_ms"] == 60_000
    machine.advance(1_000)
    report(machine, minute, successes=4)  # asks again, so that the time begins anew
    for _ in range(52):
        machine.advance(1_000)
        assert report(machine, second, successes=1)["window_ms"] == 60_000
    machine.run("record", PLAIN, generation=machine.run("snapshot")["generation"], successes=1)  # asks for none
    machine.advance(15_000)
    assert "window_ms" not in report(machine, second, successes=8)
    assert sums(machine, second)[0] == 8
    machine.advance(1_000)
    report(machine, minute, successes=1)
    machine.advance(60_000)
    assert report(machine, second, successes=1).get("window_ms") is None
    machine.advance(1_000)
    assert sums(machine, second)[0] == 0


def test_a_window_begins_with_its_rule(machine: Machine) -> None:
    """Without a rate no window is kept; a rate that is set live counts from then on."""
    generation = begin(machine, PLAIN)
    machine.run("record", PLAIN, generation=generation, successes=50, failures=2)
    assert sums(machine, PLAIN) == (0, 0, 0)
    machine.run("control", PLAIN, action="set_policy", override={"error_rate_threshold": 0.5})
    machine.run("record", PLAIN, generation=generation, successes=2, failures=1)
    assert sums(machine, PLAIN) == (3, 1, 0)


@pytest.mark.parametrize(("back", "kept"), [(1, 3), (900, 3), (901, 0), (5000, 0)])
def test_a_clock_that_went_back(machine: Machine, back: int, kept: int) -> None:
    """A clock that went back by less than ten buckets goes on in the newest of them; by more, nothing is left."""
    begin(machine, RATE)
    report(machine, RATE, successes=3)
    machine.advance(-back)
    assert sums(machine, RATE)[0] == kept
    report(machine, RATE, successes=1)
    assert sums(machine, RATE)[0] == kept + 1


# Slow calls


def test_slow_successes_and_slow_failures(machine: Machine) -> None:
    """Both are slow calls; it trips at exactly the rate, with its counts."""
    begin(machine, SLOW)
    assert report(machine, SLOW, successes=2)["state"] == "closed"
    assert report(machine, SLOW, failures=1, slow=1)["state"] == "closed"
    reply = report(machine, SLOW, successes=1, slow=1)
    change = reply["transition"]
    assert (reply["state"], change["reason"]) == ("open", "slow_rate")
    assert (change["calls"], change["failures"], change["slow"]) == (4, 1, 2)


def test_less_than_the_slow_rate(machine: Machine) -> None:
    """One slow call too few leaves it closed."""
    policy = {**SLOW, "minimum_calls": 200}
    begin(machine, policy)
    assert report(machine, policy, successes=200, slow=99)["state"] == "closed"
    assert report(machine, policy, failures=1)["state"] == "closed"
    assert report(machine, policy, failures=3, slow=3)["transition"]["reason"] == "slow_rate"  # 102 of 204


def test_slow_calls_without_a_slow_rate(machine: Machine) -> None:
    """Where no slow rate is set, slow calls are counted and trip nothing."""
    begin(machine, RATE)
    assert report(machine, RATE, successes=50, slow=50)["state"] == "closed"
    assert sums(machine, RATE) == (50, 0, 50)


@pytest.mark.parametrize("outcome", ["successes", "failures"])
@pytest.mark.parametrize("wait", [0, 100, 950])
def test_pending_counts_once(machine: Machine, outcome: str, wait: int) -> None:
    """A call that was reported as slow while it ran is one call and one slow call, also after its end."""
    begin(machine, SLOW)
    report(machine, SLOW, slow=1, pending=1)
    assert sums(machine, SLOW) == (1, 0, 1)
    machine.advance(wait)
    report(machine, SLOW, **{outcome: 1}, counted=1)
    assert sums(machine, SLOW) == (1, int(outcome == "failures"), 1)


def test_a_bucket_without_calls(machine: Machine) -> None:
    """An end in a later bucket is no call of that bucket, before and after the first one has passed."""
    policy = {**SLOW, "minimum_calls": NEVER}
    begin(machine, policy)
    report(machine, policy, slow=1, pending=1)
    machine.advance(500)
    report(machine, policy, failures=1, counted=1)
    machine.advance(100)
    report(machine, policy, failures=2, successes=3)
    assert sums(machine, policy) == (6, 3, 1)
    machine.advance(400)
    assert sums(machine, policy) == (5, 3, 0)
    machine.advance(500)
    assert sums(machine, policy) == (5, 2, 0)
    report(machine, policy, successes=1)
    machine.advance(100)
    assert sums(machine, policy) == (1, 0, 0)


def test_nothing_is_left_of_what_has_passed(machine: Machine) -> None:
    """Where all that is left is the end of a call that has passed, there are no calls."""
    begin(machine, SLOW)
    report(machine, SLOW, slow=1, pending=1)
    machine.advance(500)
    report(machine, SLOW, failures=1, counted=1)
    machine.advance(500)
    assert sums(machine, SLOW) == (0, 0, 0)


def test_pending_that_ends_after_the_window(machine: Machine) -> None:
    """The end of a call whose slowness has left the window makes neither calls below zero nor a rate above one."""
    begin(machine, SLOW)
    report(machine, SLOW, slow=3, pending=3)
    machine.advance(1000)
    report(machine, SLOW, failures=3, counted=3)
    calls, failures, slow = sums(machine, SLOW)
    assert 0 <= failures <= calls
    assert slow == 0
    report(machine, SLOW, successes=2)
    calls, failures, slow = sums(machine, SLOW)
    assert (failures <= calls, slow) == (True, 0)


@FEW
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["pending", "counted", "slow success", "failure"]), st.integers(1, 3), st.integers(0, 400)
        ),
        max_size=25,
    )
)
def test_no_more_slow_calls_than_calls(machine: Machine, steps: list[tuple[str, int, int]]) -> None:
    """Whatever is reported in whatever order, failures and slow calls are no more than calls."""
    policy = {**SLOW, "minimum_calls": NEVER}
    machine.run("control", policy, action="reset")
    requests = {"pending": "slow pending", "counted": "failures counted", "slow success": "successes slow"}
    for kind, count, gap in steps:
        machine.advance(gap)
        report(machine, policy, **dict.fromkeys(requests.get(kind, "failures").split(), count))
        calls, failures, slow = sums(machine, policy)
        assert 0 <= failures <= calls
        assert 0 <= slow <= calls


def probing(machine: Machine, policy: dict[str, Any]) -> dict[str, Any]:
    """The reply that hands out the first probe."""
    machine.run("control", policy, action="force_open", duration_ms=1)
    machine.advance(1)
    return machine.run("acquire", policy)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ({"successes": 1, "slow": 1}, "probe_slow"),
        ({"slow": 1, "pending": 1}, "probe_slow"),
        ({"failures": 1, "slow": 1}, "probe_failed"),
        ({"failures": 1}, "probe_failed"),
        ({"successes": 1}, "probe_succeeded"),
    ],
)
def test_slow_probe(machine: Machine, outcome: dict[str, int], reason: str) -> None:
    """A slow probe opens it again, before its end too; a failed one is called failed."""
    first = probing(machine, SLOW)
    reply = machine.run("record", SLOW, generation=first["generation"], probe=1, **outcome)
    assert reply["transition"]["reason"] == reason
    late = machine.run("record", SLOW, generation=first["generation"], probe=1, successes=1, counted=1)
    assert (late["applied"], late["state"]) == (False, reply["state"])


def test_pending_probe_without_a_slow_rate(machine: Machine) -> None:
    """Where no slow rate is set, a probe that became slow keeps its slot, and its success closes the circuit."""
    policy = {**PLAIN, "slow_call_duration_ms": 100}
    first = probing(machine, policy)
    reply = machine.run("record", policy, generation=first["generation"], probe=1, slow=1, pending=1)
    assert (reply["state"], reply["success_count"]) == ("half_open", 0)
    assert machine.run("snapshot", policy)["probes_in_flight"] == 1
    assert not machine.run("acquire", policy)["admitted"]
    reply = machine.run("record", policy, generation=first["generation"], probe=1, successes=1, counted=1)
    assert reply["state"] == "closed"


# Back-off


def open_times(machine: Machine, policy: dict[str, Any], count: int) -> list[int]:
    """For how long it opens at the first trips in a row, each after a failed probe."""
    times = []
    for _ in range(count):
        times.append(open_ms(machine, policy))
        machine.advance(times[-1])
    return times


@pytest.mark.parametrize(
    ("fields", "times"),
    [
        ({}, [1000, 2000, 4000, 8000, 16_000]),
        ({"max_reset_timeout_ms": 5000}, [1000, 2000, 4000, 5000, 5000]),
        ({"max_reset_timeout_ms": 1000}, [1000, 1000, 1000]),
        ({"max_reset_timeout_ms": 400}, [1000, 1000, 1000]),
        ({"max_reset_timeout_ms": 1}, [1000, 1000, 1000]),
        ({"backoff_multiplier": 1, "max_reset_timeout_ms": 5000}, [1000, 1000, 1000]),
        ({"backoff_multiplier": 1.5}, [1000, 1500, 2250, 3375, 5062]),
        ({"backoff_multiplier": 1000, "reset_timeout_ms": 10**6}, [10**6, 10**9, 30 * DAY_MS]),
    ],
)
def test_open_times(machine: Machine, fields: dict[str, Any], times: list[int]) -> None:
    """Each trip in a row opens it longer, up to the maximum, and never shorter than the first."""
    assert open_times(machine, {**BACKOFF, **fields}, len(times)) == times


@pytest.mark.parametrize(("healthy", "trips"), [(0, 2), (1999, 2), (2000, 1), (10**7, 1)])
def test_a_row_of_trips_ends_with_health(machine: Machine, healthy: int, trips: int) -> None:
    """Closed for as long as it would open for next, to the millisecond, it begins anew; before that the row goes on."""
    open_ms(machine, BACKOFF)
    recover(machine, BACKOFF)
    machine.advance(healthy)
    report(machine, BACKOFF, successes=1)
    assert machine.run("snapshot", BACKOFF)["trips"] == trips - 1
    assert open_ms(machine, BACKOFF) == 1000 * trips
    assert machine.run("snapshot", BACKOFF)["trips"] == trips


def test_a_row_of_trips_ends_after_thirty_days(machine: Machine) -> None:
    """No open period is longer, so that is as much health as any row of trips asks for, to the millisecond."""
    slow, days = {**BACKOFF, "reset_timeout_ms": 20 * DAY_MS}, 30 * DAY_MS
    open_ms(machine, slow)
    recover(machine, slow)
    machine.advance(days - 1)
    assert machine.run("snapshot", slow)["trips"] == 1
    machine.advance(1)
    assert machine.run("snapshot", slow)["trips"] == 0


def test_a_flapping_breaker_opens_longer(machine: Machine) -> None:
    """A recovery that does not last is no end of the row, nor do two of them add up to a stretch of health."""
    times = []
    for _ in range(5):
        times.append(open_ms(machine, BACKOFF))
        recover(machine, BACKOFF)
        machine.advance(1500)
    assert times == [1000, 2000, 4000, 8000, 16_000]


LONGER = {**BACKOFF, "reset_timeout_ms": 5000}  # by which a row goes on that by BACKOFF is over


def outlive(machine: Machine) -> int:
    """A trip, a recovery, and exactly as much health as ends the row of trips; the generation."""
    open_ms(machine, BACKOFF)
    recover(machine, BACKOFF)
    machine.advance(2000)
    assert machine.run("snapshot", BACKOFF)["trips"] == 0
    assert machine.run("snapshot", LONGER)["trips"] == 1
    return machine.run("snapshot", BACKOFF)["generation"]


@pytest.mark.parametrize(
    ("script", "counts"), [("record", {}), ("record", {"successes": 1}), ("acquire", {"successes": 1})]
)
def test_the_end_of_a_row_is_written(machine: Machine, script: str, counts: dict[str, int]) -> None:
    """A report that counts, or one of nothing, ends the row for good: a longer policy does not bring it back."""
    generation = outlive(machine)
    machine.run(script, BACKOFF, generation=generation, **counts)
    assert machine.run("snapshot", LONGER)["trips"] == 0
    machine.run("control", LONGER, action="force_open")
    assert machine.run("snapshot", LONGER)["trips"] == 0


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        ("acquire", {}),
        ("record", {"successes": 1, "generation": 1}),
        ("record", {"failures": 1, "generation": 1}),
        ("record", {"slow": 1, "generation": 1}),
        ("record", {"probe": 1, "generation": 1}),
    ],
)
def test_the_end_of_a_row_is_not_written(machine: Machine, script: str, fields: dict[str, int]) -> None:
    """What counts for nothing writes nothing, the end of a row neither."""
    outlive(machine)
    machine.run(script, BACKOFF, **fields)
    assert machine.run("snapshot", LONGER)["trips"] == 1


def test_the_end_of_a_row_waits_for_the_ramp(machine: Machine) -> None:
    """It is over for good at the very end of the ramp, and not before."""
    ramped = {**BACKOFF, "ramp_up_ms": 3000}
    generation = outlive(machine)
    machine.advance(999)
    machine.run("record", ramped, generation=generation)
    assert machine.run("snapshot", LONGER)["trips"] == 1
    machine.advance(1)
    machine.run("record", ramped, generation=generation)
    assert machine.run("snapshot", LONGER)["trips"] == 0


def test_a_recovery_without_a_trip(machine: Machine) -> None:
    """A ramp after a forced open is over for good at its end, though there was no trip."""
    ramped = {**BACKOFF, "ramp_up_ms": 3000}
    machine.run("control", ramped, action="force_open", duration_ms=1)
    generation = recover(machine, ramped)["generation"]
    machine.advance(3000)
    machine.run("record", ramped, generation=generation)
    assert machine.run("snapshot", {**ramped, "ramp_up_ms": 9000}).get("ramp_left_ms") is None


@pytest.mark.parametrize("action", ["reset", "force_closed"])
def test_no_trips_after_an_operator(machine: Machine, action: str) -> None:
    """Closed by hand and forced open, there is no row of trips."""
    open_times(machine, BACKOFF, 3)
    machine.run("control", BACKOFF, action=action)
    machine.run("control", BACKOFF, action="force_open")
    assert machine.run("snapshot", BACKOFF)["trips"] == 0


@pytest.mark.parametrize("action", ["reset", "force_closed"])
def test_an_operator_ends_the_row(machine: Machine, action: str) -> None:
    """Closed by hand, the next trip is the first."""
    open_times(machine, BACKOFF, 3)
    machine.run("control", BACKOFF, action=action, **({"duration_ms": 1} if action == "force_closed" else {}))
    machine.advance(1)
    assert open_ms(machine, BACKOFF) == 1000


def test_jitter(machine: Machine) -> None:
    """Jitter adds a share of the open time that follows from the generation alone, and differs from trip to trip."""
    shortest = 10**9  # milliseconds: so many that every digit of the share shows
    policy = {**BACKOFF, "reset_timeout_ms": shortest, "backoff_multiplier": 1, "jitter": 0.5}
    times = []
    for _ in range(20):
        times.append(open_ms(machine, policy))
        share = machine.run("snapshot", policy)["generation"] % 1000003 * 7919 % 1000003 / 1000003
        assert times[-1] == math.floor(shortest * (1 + 0.5 * share))
        machine.advance(times[-1] + 13)
    assert shortest <= min(times) < 1.15 * shortest
    assert 1.35 * shortest < max(times) <= 1.5 * shortest
    assert len(set(times)) > 10


def test_jitter_has_a_bound(machine: Machine) -> None:
    """Jitter adds to the longest open time too, by its share at the most, and never makes it more than thirty days."""
    policy = {**BACKOFF, "max_reset_timeout_ms": 2000, "jitter": 0.1}
    assert all(2000 <= time <= 2200 for time in open_times(machine, policy, 6)[1:])
    machine.run("control", policy, action="reset")
    assert open_times(machine, {**BACKOFF, "reset_timeout_ms": 30 * DAY_MS, "jitter": 1}, 3) == [30 * DAY_MS] * 3


# Quorum

QUORUM = {**PLAIN, "quorum": 2}
QUORUM_RATE = {**RATE, "quorum": 2}


def test_one_instance_never_trips(machine: Machine) -> None:
    """However often one instance fails, below the quorum it stays closed, by every rule."""
    for policy in (QUORUM, QUORUM_RATE, {**SLOW, "quorum": 2}):
        machine.run("control", policy, action="reset")
        for _ in range(30):
            assert report(machine, policy, failures=5, slow=5, instance="a")["state"] == "closed"
            machine.advance(7)


@pytest.mark.parametrize("policy", [QUORUM, QUORUM_RATE, {**SLOW, "quorum": 2}], ids=["run", "errors", "slow"])
def test_one_host_is_one_voice(machine: Machine, policy: dict[str, Any]) -> None:
    """However many of its instances fail, by every rule, whether they name the host or not; a second host trips it."""
    begin(machine, policy)
    for number in range(30):
        for one in ({"instance": f"a:{number}-0badcafe"}, {"host": "a", "instance": f"{number}"}):
            assert report(machine, policy, failures=5, slow=5, **one)["state"] == "closed"
    assert list(machine.run("snapshot", policy)["reporters"]) == ["a"]
    assert report(machine, policy, failures=1, slow=1, instance="b")["state"] == "open"


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ({"instance": "fe80::1:7-0badcafe"}, "fe80::1"),
        ({"instance": "me"}, "me"),
        ({"instance": ":me"}, ":me"),
        ({"instance": "me:"}, "me"),
        ({"instance": "a:1", "host": "b:2"}, "b:2"),
        ({"instance": "a:1", "host": ""}, ""),
        ({"host": "h" * 200}, "h" * 200),
    ],
    ids=str,
)
def test_the_host_of_a_report(machine: Machine, given: dict[str, str], host: str) -> None:
    """It is what the report says, else the instance up to its last colon, else the instance."""
    begin(machine, QUORUM)
    report(machine, QUORUM, failures=1, **given)
    assert list(machine.run("snapshot", QUORUM)["reporters"]) == [host]


def test_quorum_in_a_run(machine: Machine) -> None:
    """The second distinct instance that fails in the run trips it."""
    begin(machine, QUORUM)
    report(machine, QUORUM, failures=9, instance="a")
    machine.advance(10**6)  # a run has no window
    reply = report(machine, QUORUM, failures=1, instance="b")
    assert (reply["state"], reply["transition"]["reason"]) == ("open", "failure_threshold")


def test_quorum_of_this_run_only(machine: Machine) -> None:
    """Who failed before the run's last success is no part of its quorum."""
    begin(machine, QUORUM)
    report(machine, QUORUM, failures=2, instance="a")
    machine.advance(1)
    report(machine, QUORUM, successes=1, instance="c")
    machine.advance(1)
    assert report(machine, QUORUM, failures=5, instance="b")["state"] == "closed"
    assert report(machine, QUORUM, failures=1, instance="a")["state"] == "open"


@pytest.mark.parametrize("policy", [QUORUM_RATE, {**SLOW, "quorum": 2}], ids=["errors", "slow"])
def test_successes_make_no_reporter(machine: Machine, policy: dict[str, Any]) -> None:
    """A report of successes alone counts for no quorum."""
    begin(machine, policy)
    report(machine, policy, failures=10, slow=10, instance="a")
    assert report(machine, policy, successes=5, instance="b")["state"] == "closed"
    assert list(machine.run("snapshot", policy)["reporters"]) == ["a"]


@pytest.mark.parametrize(("gap", "state"), [(999, "open"), (1000, "closed")])
def test_quorum_in_the_window(machine: Machine, gap: int, state: str) -> None:
    """For a rate those count who reported a failure within the window, to the millisecond."""
    begin(machine, QUORUM_RATE)
    report(machine, QUORUM_RATE, failures=1, instance="a")
    machine.advance(gap)
    assert report(machine, QUORUM_RATE, failures=5, instance="b")["state"] == state


def test_slow_reporters(machine: Machine) -> None:
    """A slow call counts for the quorum as a failure does."""
    policy = {**SLOW, "quorum": 2}
    begin(machine, policy)
    report(machine, policy, successes=4, slow=4, instance="a")
    reply = report(machine, policy, slow=1, pending=1, instance="b")
    assert reply["transition"]["reason"] == "slow_rate"


def test_bounded_reporters(machine: Machine) -> None:
    """Of a hundred hosts that fail no more than the newest `quorum` are kept."""
    policy = {**PLAIN, "quorum": 3, "failure_threshold": NEVER}
    begin(machine, policy)
    for number in range(100):
        report(machine, policy, failures=1, successes=1, host=f"host-{number:02}")
        machine.advance(1)
    assert sorted(machine.run("snapshot", policy)["reporters"]) == ["host-97", "host-98", "host-99"]


def test_the_newest_reporters_stay(machine: Machine) -> None:
    """Whose last failure is the oldest goes first, whatever its name; of two at once, the first by name."""
    policy = {**PLAIN, "quorum": 2, "failure_threshold": NEVER}
    begin(machine, policy)
    for host in ("z", "y", "x"):
        report(machine, policy, failures=1, successes=1, host=host)
        machine.advance(1)
    assert sorted(machine.run("snapshot", policy)["reporters"]) == ["x", "y"]
    for host in ("c", "b", "a"):
        report(machine, policy, failures=1, successes=1, host=host)
    assert sorted(machine.run("snapshot", policy)["reporters"]) == ["b", "c"]


def test_a_reporter_without_a_name(machine: Machine) -> None:
    """Those that do not say who they are count as one."""
    begin(machine, QUORUM)
    for _ in range(9):
        assert report(machine, QUORUM, failures=1)["state"] == "closed"
    assert list(machine.run("snapshot", QUORUM)["reporters"]) == [""]


def test_a_row_of_four_billion(machine: Machine) -> None:
    """The row of failures counts to 2^32 - 1, where the contract's integer ends."""
    policy = {**QUORUM, "failure_threshold": NEVER}
    begin(machine, policy)
    counts = [report(machine, policy, failures=10**9, instance="a")["failure_count"] for _ in range(6)]
    assert counts == [10**9, 2 * 10**9, 3 * 10**9, 4 * 10**9, 2**32 - 1, 2**32 - 1]


def test_a_great_quorum(machine: Machine) -> None:
    """A quorum of a hundred is reached by the hundredth instance."""
    policy = {**PLAIN, "quorum": 100}
    begin(machine, policy)
    states = [report(machine, policy, failures=1, instance=str(number))["state"] for number in range(100)]
    assert states == ["closed"] * 99 + ["open"]


def test_a_smaller_quorum_keeps_fewer_reporters(machine: Machine) -> None:
    """Where the quorum shrinks live, so does what is kept."""
    policy = {**PLAIN, "quorum": 50, "failure_threshold": NEVER}
    begin(machine, policy)
    for number in range(50):
        report(machine, policy, failures=1, instance=str(number))
    machine.run("control", policy, action="set_policy", override={"quorum": 2})
    report(machine, policy, failures=1, instance="x")
    assert len(machine.run("snapshot", policy)["reporters"]) == 2


def test_a_quorum_that_is_set_in_a_run(machine: Machine) -> None:
    """A quorum that is set while calls fail is reached by those who fail from then on."""
    begin(machine, PLAIN)
    report(machine, PLAIN, failures=1, instance="a")
    machine.run("control", PLAIN, action="set_policy", override={"quorum": 2})
    machine.advance(5)
    assert report(machine, PLAIN, failures=5, instance="a")["state"] == "closed"
    machine.advance(5)
    assert report(machine, PLAIN, failures=1, instance="b")["state"] == "open"


def test_a_run_for_a_quorum_begins_under_it(machine: Machine) -> None:
    """Who was slow before the first failure under a quorum is no part of the run, nor is the run's first failure."""
    policy = {**PLAIN, "failure_threshold": 2}
    begin(machine, policy)
    report(machine, policy, failures=1, instance="a")
    machine.run("control", policy, action="set_policy", override={"quorum": 2})
    machine.advance(5)
    assert report(machine, policy, slow=1, pending=1, instance="c")["state"] == "closed"
    machine.advance(5)
    assert report(machine, policy, failures=1, instance="b")["state"] == "closed"
    assert report(machine, policy, failures=1, instance="a")["state"] == "open"


def test_a_quorum_and_a_threshold_that_is_passed(machine: Machine) -> None:
    """Where quorum and threshold are set to what the run has passed, the next failure trips, and no slow call does."""
    policy = {**PLAIN, "slow_call_rate_threshold": 1.0, "minimum_calls": 10**6}
    begin(machine, policy)
    report(machine, policy, failures=2, instance="a")
    machine.run("control", policy, action="set_policy", override={"quorum": 2, "failure_threshold": 2})
    assert report(machine, policy, slow=1, pending=1, instance="a")["state"] == "closed"
    assert report(machine, policy, slow=1, pending=1, instance="b")["state"] == "closed"
    assert report(machine, policy, failures=1, instance="b")["state"] == "open"


@pytest.mark.parametrize("rule", [{"failure_threshold": 5}, {"failure_threshold": 10**6, "error_rate_threshold": 0.5}])
def test_a_slow_call_is_no_vote_for_a_failure(machine: Machine, rule: dict[str, Any]) -> None:
    """Without a rule for slow calls, who had one has not failed, and does not make up the quorum of those who have."""
    policy = {**PLAIN, "quorum": 2, "minimum_calls": 5, "slow_call_duration_ms": 1000, **rule}
    generation = begin(machine, policy)
    machine.run("record", policy, generation=generation, slow=1, pending=1, instance="b")
    reply = machine.run("record", policy, generation=generation, failures=9, instance="a")
    assert reply["state"] == "closed"
    assert machine.run("record", policy, generation=generation, failures=1, instance="b")["state"] == "open"


# Recovery


def test_concurrent_probes(machine: Machine) -> None:
    """With several slots it closes at the success_threshold-th success, whatever the order of their ends."""
    policy = {**PLAIN, "success_threshold": 3, "half_open_max_calls": 3}
    generation = probing(machine, policy)["generation"]
    assert [machine.run("acquire", policy).get("probe") for _ in range(3)] == [2, 3, None]
    for slot, state in ((3, "half_open"), (1, "half_open"), (2, "closed")):
        reply = machine.run("record", policy, generation=generation, probe=slot, successes=1)
        assert reply["state"] == state


def test_a_slot_is_used_again(machine: Machine) -> None:
    """More successes than slots are gathered by one probe after the other, each with a number of its own."""
    policy = {**PLAIN, "success_threshold": 5, "half_open_max_calls": 2}
    reply, slots = probing(machine, policy), []
    while reply["state"] == "half_open":
        slots.append(reply["probe"])
        reply = machine.run("record", policy, generation=reply["generation"], probe=slots[-1], successes=1)
        reply = reply if reply["state"] == "closed" else machine.run("acquire", policy)
    assert slots == [1, 2, 3, 4, 5]


def test_one_failure_among_probes(machine: Machine) -> None:
    """One failed probe opens it again, whatever succeeded before; those still in flight count for nothing."""
    policy = {**PLAIN, "success_threshold": 3, "half_open_max_calls": 4}
    generation = probing(machine, policy)["generation"]
    for _ in range(3):
        machine.run("acquire", policy)
    for slot in (1, 2):
        machine.run("record", policy, generation=generation, probe=slot, successes=1)
    reply = machine.run("record", policy, generation=generation, probe=3, failures=1)
    assert (reply["state"], reply["transition"]["success_count"]) == ("open", 2)
    late = machine.run("record", policy, generation=generation, probe=4, successes=1)
    assert (late["applied"], late["state"], late["success_count"]) == (False, "open", 0)


def test_fewer_slots_live(machine: Machine) -> None:
    """Slots that are taken away live are not handed out again; those in flight still count."""
    policy = {**PLAIN, "success_threshold": 2, "half_open_max_calls": 3}
    generation = probing(machine, policy)["generation"]
    machine.run("acquire", policy)
    machine.run("control", policy, action="set_policy", override={"half_open_max_calls": 1})
    machine.run("record", policy, generation=generation, probe=1, successes=1)
    assert not machine.run("acquire", policy)["admitted"]
    assert machine.run("record", policy, generation=generation, probe=2, successes=1)["state"] == "closed"


def test_ramp_left(machine: Machine) -> None:
    """After a recovery every reply tells how long the ramp lasts, until its very end."""
    policy = {**PLAIN, "ramp_up_ms": 10_000}
    assert "ramp_left_ms" not in {k for k, v in machine.run("acquire", policy).items() if v is not None}
    report(machine, policy, failures=3)
    assert recover(machine, policy)["ramp_left_ms"] == 10_000
    for gap, left in ((4000, 6000), (5999, 1), (1, None), (5000, None)):
        machine.advance(gap)
        assert machine.run("snapshot", policy).get("ramp_left_ms") == left
        assert machine.run("acquire", policy).get("ramp_left_ms") == left
        assert report(machine, policy, successes=1).get("ramp_left_ms") == left


def test_no_ramp_by_default(machine: Machine) -> None:
    """Where no policy is named, a recovery admits every call at once."""
    machine.run("control", action="force_open", duration_ms=1)
    machine.advance(1)
    first = machine.run("acquire")
    reply = machine.run("record", generation=first["generation"], probe=first["probe"], successes=1)
    assert (reply["state"], reply.get("ramp_left_ms")) == ("closed", None)


@pytest.mark.parametrize("action", ["reset", "force_closed"])
def test_no_ramp_by_hand(machine: Machine, action: str) -> None:
    """Closed by an operator, it admits all calls at once."""
    policy = {**PLAIN, "ramp_up_ms": 10_000}
    probing(machine, policy)
    assert machine.run("control", policy, action=action).get("ramp_left_ms") is None
    assert machine.run("acquire", policy).get("ramp_left_ms") is None


def test_ramp_ends_with_a_trip(machine: Machine) -> None:
    """While open there is no ramp, and the next recovery has a whole one."""
    policy = {**PLAIN, "ramp_up_ms": 10_000}
    report(machine, policy, failures=3)
    probing(machine, policy)
    machine.run("control", policy, action="reset")
    for _ in range(2):
        begin(machine, policy)
        assert report(machine, policy, failures=3).get("ramp_left_ms") is None
        assert recover(machine, policy)["ramp_left_ms"] == 10_000
        machine.advance(700)


def test_ramp_set_live(machine: Machine) -> None:
    """A ramp that is set after the recovery began with it; one that is cleared is over."""
    begin(machine, PLAIN)
    report(machine, PLAIN, failures=3)
    recover(machine, PLAIN)
    machine.advance(100)
    machine.run("control", PLAIN, action="set_policy", override={"ramp_up_ms": 500})
    assert machine.run("acquire", PLAIN)["ramp_left_ms"] == 400
    machine.run("control", PLAIN, action="clear_policy")
    assert machine.run("acquire", PLAIN).get("ramp_left_ms") is None


# Live policy


def test_overrides_merge(machine: Machine) -> None:
    """Fields that are set are laid over those set before; clearing ends them all, and tells whether there were any."""
    assert machine.run("control", action="clear_policy")["changed"] is False
    reply = machine.run("control", action="set_policy", override={"quorum": 2, "jitter": 0.25})
    assert (reply["changed"], reply["override"]) == (True, {"quorum": 2, "jitter": 0.25})
    reply = machine.run("control", action="set_policy", override={"quorum": 3, "enforce": False})
    assert reply["override"] == {"quorum": 3, "jitter": 0.25, "enforce": False}
    for script in ("acquire", "snapshot"):
        assert machine.run(script, PLAIN)["override"] == reply["override"]
    assert machine.run("snapshot", PLAIN)["policy"] == {**machine.run("snapshot")["policy"], **PLAIN}
    assert machine.run("control", action="clear_policy")["changed"] is True
    assert machine.run("acquire", PLAIN).get("override") is None
    assert machine.run("control", action="clear_policy")["changed"] is False


def test_obeyed_by_the_next_call_of_all(machine: Machine) -> None:
    """Whatever policy a client sends, the operator's fields hold from the next call on, and end when cleared."""
    others = ({"failure_threshold": 10}, {"failure_threshold": 100, "quorum": 1}, None)
    for policy in others:
        begin(machine, policy or {})
        machine.run("control", action="set_policy", override={"failure_threshold": 2, "reset_timeout_ms": 77})
        report(machine, policy or {}, failures=1)
        reply = report(machine, policy or {}, failures=1)
        assert (reply["state"], reply["retry_after_ms"]) == ("open", 77)
        machine.run("control", action="clear_policy")
        machine.run("control", action="reset")
        assert report(machine, policy or {}, failures=4)["state"] == "closed"
        machine.run("control", action="reset")


def test_a_policy_is_no_transition(machine: Machine) -> None:
    """Setting or clearing a policy changes neither state, counts nor generation."""
    begin(machine, PLAIN)
    report(machine, PLAIN, failures=2)
    before = machine.run("snapshot", PLAIN)
    reply = machine.run("control", PLAIN, action="set_policy", override={"failure_threshold": 1})
    assert (reply["state"], reply.get("transition")) == ("closed", None)
    machine.run("control", PLAIN, action="clear_policy")
    assert machine.run("snapshot", PLAIN) == before


def test_reset_replaces_the_policy(machine: Machine) -> None:
    """A reset ends the policy override with the forced state and the counts. The history stays."""
    machine.run("control", action="force_open")
    machine.run("control", action="set_policy", override={"failure_threshold": 1, "ttl_ms": 1000}, duration_ms=60_000)
    reply = machine.run("control", PLAIN, action="reset")
    assert (reply["changed"], reply.get("override"), reply["state"]) == (True, None, "closed")
    assert report(machine, PLAIN, failures=1)["state"] == "closed"
    assert machine.run("snapshot", PLAIN)["policy"]["failure_threshold"] == PLAIN["failure_threshold"]


def test_a_lower_threshold_holds_for_the_next_failure(machine: Machine) -> None:
    """A threshold that is already passed when it is set trips at the next failure, and not before."""
    policy = {**PLAIN, "failure_threshold": 10}
    begin(machine, policy)
    report(machine, policy, failures=5)
    machine.run("control", policy, action="set_policy", override={"failure_threshold": 3})
    begin(machine, policy)
    assert report(machine, policy, failures=1)["state"] == "open"


# Shadow mode


def test_shadow_admits(machine: Machine) -> None:
    """In shadow mode it trips, but admits every call and says that it would not have."""
    policy = {**PLAIN, "enforce": False}
    begin(machine, policy)
    assert report(machine, policy, failures=3)["transition"]["reason"] == "failure_threshold"
    reply = machine.run("acquire", policy)
    assert (reply["admitted"], reply["shadow"], reply["state"]) == (True, True, "open")
    assert (reply["retry_after_ms"], reply.get("probe")) == (1000, None)
    assert machine.run("acquire", PLAIN)["admitted"] is False


def test_shadow_probes_and_recovers(machine: Machine) -> None:
    """In shadow mode probes are handed out as ever, calls beside them are admitted, and a success closes it."""
    policy = {**PLAIN, "enforce": False}
    begin(machine, policy)
    report(machine, policy, failures=3)
    machine.advance(1000)
    first, second = machine.run("acquire", policy), machine.run("acquire", policy)
    assert (first["probe"], first.get("shadow")) == (1, None)
    assert (second["admitted"], second["shadow"], second.get("probe")) == (True, True, None)
    assert (second["state"], second["retry_after_ms"]) == ("half_open", 100)
    reply = machine.run("record", policy, generation=first["generation"], probe=1, successes=1)
    assert (reply["state"], reply["transition"]["reason"]) == ("closed", "probe_succeeded")
    assert machine.run("acquire", policy).get("shadow") is None


def test_shadow_is_switched_live(machine: Machine) -> None:
    """Enforcement is switched off and on for all by one field."""
    report(machine, PLAIN, failures=3)
    begin(machine, PLAIN)
    report(machine, PLAIN, failures=3)
    machine.run("control", PLAIN, action="set_policy", override={"enforce": False})
    assert machine.run("acquire", PLAIN)["admitted"] is True
    machine.run("control", PLAIN, action="set_policy", override={"enforce": True})
    assert machine.run("acquire", PLAIN)["admitted"] is False


# Transitions


def test_reasons_and_counts(machine: Machine) -> None:
    """Every transition tells whence, whither, why, and the counts that caused it."""
    policy = {**PLAIN, "success_threshold": 2, "half_open_max_calls": 2, "error_rate_threshold": 0.9}
    told: list[tuple[Any, ...]] = []

    def tell(reply: dict[str, Any]) -> dict[str, Any]:
        change = reply["transition"]
        counts = tuple(change.get(key) for key in ("failure_count", "success_count", "calls", "failures", "slow"))
        assert (change["to"], change["generation"]) == (reply["state"], reply["generation"])
        told.append((change["from"], change["to"], change["reason"], counts))
        return reply

    begin(machine, policy)
    report(machine, policy, successes=4, failures=1, slow=2)
    tell(report(machine, policy, failures=2))
    machine.advance(1000)
    generation = tell(machine.run("acquire", policy))["generation"]
    tell(machine.run("record", policy, generation=generation, probe=1, failures=1))
    machine.advance(1000)
    generation = tell(machine.run("acquire", policy))["generation"]
    machine.run("acquire", policy)
    machine.run("record", policy, generation=generation, probe=1, successes=1)
    tell(machine.run("record", policy, generation=generation, probe=2, successes=1))
    tell(machine.run("control", policy, action="force_open"))
    tell(machine.run("control", policy, action="force_closed"))
    tell(machine.run("control", policy, action="reset"))
    none = (None, None, None)
    assert told == [
        ("closed", "open", "failure_threshold", (3, 0, 7, 3, 2)),
        ("open", "half_open", "timeout", (3, 0, *none)),
        ("half_open", "open", "probe_failed", (4, 0, *none)),
        ("open", "half_open", "timeout", (4, 0, *none)),
        ("half_open", "closed", "probe_succeeded", (4, 2, *none)),
        ("closed", "open", "forced", (0, 0, *none)),
        ("open", "closed", "forced", (0, 0, *none)),
        ("closed", "closed", "reset", (0, 0, *none)),
    ]


# Health

HEALTHY = {
    **BACKOFF,
    "failure_threshold": 10,
    "minimum_calls": NEVER,
    "error_rate_threshold": 1,
    "window_ms": 60_000,
    "backoff_multiplier": 1000,
}


def health(machine: Machine, successes: int, failures: int, slow: int, trips: int) -> tuple[int, float]:
    """The health of a closed breaker with such a past, and what the formula gives for what the snapshot tells."""
    machine.run("control", HEALTHY, action="reset")
    for _ in range(trips):
        report(machine, HEALTHY, failures=10)
        recover(machine, {**HEALTHY, "reset_timeout_ms": 1})
    report(machine, HEALTHY, successes=successes)
    report(machine, HEALTHY, failures=failures, slow=min(slow, successes + failures))
    seen = machine.run("snapshot", HEALTHY)
    rates = [seen[part] / seen["calls"] if seen["calls"] else 0 for part in ("failures", "slow")]
    failed = max(rates[0], min(seen["failure_count"] / 10, 1))
    assert (seen["state"], seen["trips"]) == ("closed", trips)
    return seen["health"], 100 * (1 - failed) * (1 - rates[1] / 2) * 4 / (4 + seen["trips"])


@FEW
@given(
    successes=st.integers(1, 50),
    failures=st.integers(0, 8),
    slow=st.integers(0, 20),
    trips=st.integers(0, 3),
    worse=st.sampled_from(["failures", "slow", "trips", "a success failed"]),
)
def test_health(machine: Machine, successes: int, failures: int, slow: int, trips: int, worse: str) -> None:
    """Health is the documented formula, from 0 to 100, and whatever gets worse never makes it better."""
    score, formula = health(machine, successes, failures, slow, trips)
    assert abs(score - formula) <= 0.5 + 1e-9
    assert 0 <= score <= 100
    past = {"successes": successes, "failures": failures, "slow": slow, "trips": trips}
    failed = {"successes": successes - 1, "failures": failures + 1}
    past |= failed if worse == "a success failed" else {worse: past[worse] + 1}
    assert health(machine, **past)[0] <= score


def test_health_of_each_state(machine: Machine) -> None:
    """Closed is better than half open, which is better than open; a breaker that nobody used is well."""
    assert machine.run("snapshot", PLAIN)["health"] == 100
    begin(machine, PLAIN)
    seen = []
    for failures in (0, 1, 1, 1):
        report(machine, PLAIN, failures=failures)
        seen.append(machine.run("snapshot", PLAIN)["health"])
    assert seen == [100, 67, 33, 0]
    machine.advance(1000)
    machine.run("acquire", PLAIN)
    assert machine.run("snapshot", PLAIN)["health"] == 40
    machine.run("record", PLAIN, generation=machine.run("snapshot")["generation"], probe=1, successes=1)
    assert machine.run("snapshot", PLAIN)["health"] == 80
    machine.advance(1000)
    assert machine.run("snapshot", PLAIN)["health"] == 100


def test_health_of_one_call(machine: Machine) -> None:
    """One failed call is all there were, one slow call as well; a run past its threshold is as bad as one at it."""
    for policy, counts, score in (
        (SLOW, {"failures": 1}, 0),
        (SLOW, {"successes": 1, "slow": 1}, 50),
        (QUORUM, {"failures": 3}, 0),
        (QUORUM, {"failures": 9}, 0),
    ):
        machine.run("control", policy, action="reset")
        begin(machine, policy)
        assert report(machine, policy, instance="a", **counts)["state"] == "closed"
        assert machine.run("snapshot", policy)["health"] == score


# What a reset ends


def resets(machine: Machine, policy: dict[str, Any]) -> bool:
    """Whether a reset changes anything; a second one does not."""
    first, second = (machine.run("control", policy, action="reset")["changed"] for _ in range(2))
    assert second is False
    return first


def test_a_reset_ends_a_ramp(machine: Machine) -> None:
    """A ramp is something to end, also where no trip was before it."""
    ramped = {**PLAIN, "ramp_up_ms": 3000}
    machine.run("control", ramped, action="force_open", duration_ms=1)
    recover(machine, ramped)
    assert resets(machine, ramped)


def test_a_reset_forgets_reporters(machine: Machine) -> None:
    """Who has reported a failure is something to forget, also when its run has ended."""
    begin(machine, QUORUM)
    report(machine, QUORUM, failures=1, instance="a")
    assert report(machine, QUORUM, successes=1)["failure_count"] == 0
    assert resets(machine, QUORUM)
    assert machine.run("snapshot", QUORUM).get("reporters") is None


def test_a_reset_empties_a_window(machine: Machine) -> None:
    """Calls in the window are something to end, also if all have failed and no run is left; an empty window is not."""
    begin(machine, SLOW)
    report(machine, SLOW, slow=1, pending=1)
    machine.advance(1000)
    report(machine, SLOW, failures=1)
    assert report(machine, SLOW, successes=1, counted=1)["failure_count"] == 0
    assert sums(machine, SLOW) == (1, 1, 0)
    assert resets(machine, SLOW)
    begin(machine, SLOW)
    report(machine, SLOW, successes=1)
    machine.advance(1000)
    assert sums(machine, SLOW) == (0, 0, 0)
    assert not resets(machine, SLOW)


# What is stored


def test_size_with_a_full_window(client: redis.Redis) -> None:
    """After ten million calls in a window, of many instances, the document has less than 800 bytes."""
    machine = lua_machine(client)
    policy = {**RATE, "minimum_calls": NEVER, "quorum": 3, "window_ms": 60_000, **BACKOFF, "failure_threshold": NEVER}
    open_ms(machine, {**policy, "failure_threshold": 1, "quorum": 1})
    recover(machine, policy)
    names = itertools.cycle(f"{number}-0123abcd" for number in range(100_000, 100_007))
    for _ in range(10):
        for _ in range(5):
            report(machine, policy, successes=200_000, failures=99_999, slow=99_999)
            report(machine, policy, failures=1, instance=next(names))
        machine.advance(6000)
    assert sums(machine, policy)[0] > 10**7
    stored = client.get(keys_of("m").state)
    assert len(stored) < 800
    assert len(json.loads(stored)["reporters"]) == 3


def test_the_document_of_a_long_healthy_breaker(client: redis.Redis) -> None:
    """When back-off and ramp are over, only the last change is stored, however the circuit had been opened."""
    machine = lua_machine(client)
    begin(machine, PLAIN)
    fields = set(json.loads(client.get(keys_of("m").state))) | {"changed_at_ms", "reason"}
    for opened_by in ("failures", "force_open"):
        if opened_by == "failures":
            report(machine, PLAIN, failures=3)
        else:
            machine.run("control", PLAIN, action="force_open", duration_ms=5)
        recover(machine, PLAIN)
        machine.advance(1000)
        report(machine, PLAIN, successes=1)
        assert set(json.loads(client.get(keys_of("m").state))) == fields


@pytest.mark.parametrize("rule", [RATE, QUORUM_RATE, QUORUM], ids=["rate", "rate of a quorum", "run of a quorum"])
def test_expiry_with_a_window(client: redis.Redis, rule: dict[str, Any]) -> None:
    """A document with a window, or with reporters, is kept for a window at least, however short its ttl."""
    machine = lua_machine(client)
    policy = {**rule, "window_ms": 7_200_000, "ttl_ms": 1000}
    generation = begin(machine, policy)
    for counts in ({"failures": 1}, {"successes": 3}, {}):
        machine.run("record", policy, generation=generation, instance="a", **counts)
        assert 7_190_000 < client.pttl(keys_of("m").state) <= 7_200_000


def test_expiry_after_a_recovery(client: redis.Redis) -> None:
    """A document outlives its probes, then the row of trips and the ramp, however short its ttl."""
    machine = lua_machine(client)
    policy = {"failure_threshold": 1, "backoff_multiplier": 2.0, "reset_timeout_ms": 7_200_000, "ttl_ms": 1000}
    policy |= {"probe_timeout_ms": 20_000_000}

    def left_ms() -> int:
        return client.pttl(keys_of("m").state)

    begin(machine, policy)
    report(machine, policy, failures=1)
    machine.advance(7_200_000)
    probe = machine.run("acquire", policy)
    assert 20_000_000 < left_ms() <= 20_060_000
    machine.run("record", policy, generation=probe["generation"], probe=probe["probe"], successes=1)
    assert 14_400_000 < left_ms() <= 14_460_000  # as long as it would open for next
    machine.advance(7_200_000)
    report(machine, policy | {"ramp_up_ms": 30_000_000})
    assert 22_800_000 < left_ms() <= 22_860_000


def test_machine_starts_on_a_bucket() -> None:
    """The clock of these tests starts where a bucket does, as they assume."""
    assert START_MS % 10_000 == 0


def test_a_shorter_window_applies_after_ten_buckets_of_the_longer(machine: Machine) -> None:
    """Once nobody has asked for the longer one for its whole length, its buckets make room for shorter ones."""
    longer, shorter = ({**RATE, "minimum_calls": NEVER, "window_ms": window_ms} for window_ms in (1000, 500))
    generation = machine.run("acquire", longer)["generation"]
    machine.run("record", longer, generation=generation, successes=1)
    assert machine.run("record", shorter, generation=generation, successes=1)["window_ms"] == 1000
    machine.advance(900)
    assert machine.run("record", shorter, generation=generation, successes=1)["window_ms"] == 1000
    machine.advance(100)
    assert machine.run("record", shorter, generation=generation, successes=1).get("window_ms") is None


def test_a_reset_drops_failures_that_have_left_the_window(machine: Machine) -> None:
    """The run of failures goes on when they leave the window, so there is something to drop."""
    policy = {**RATE, "failure_threshold": NEVER, "minimum_calls": NEVER}
    for times, calls in ((1, 0), (2, 1)):
        generation = machine.run("acquire", policy)["generation"]
        for _ in range(times):
            machine.run("record", policy, generation=generation, failures=1)
            machine.advance(1000 // times)
        assert machine.run("snapshot", policy)["calls"] == calls
        assert machine.run("control", policy, action="reset")["transition"]["failure_count"] == times
