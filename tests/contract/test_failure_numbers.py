"""Failures are numbered: which of them gathered successes end, when successes count, and who is told of a run."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from conftest import START_MS, Machine, lua_machine, memory_machine, published
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_state_machine import POLICIES, STEPS, parsed, play

from pybreaker_redis._memory import MemoryEngine, document_for
from pybreaker_redis._protocol import keys_of

NEVER = 10**9
POLICY = {"failure_threshold": 10, "reset_timeout_ms": 1000, "probe_timeout_ms": 400}
WINDOW = {"failure_threshold": NEVER, "error_rate_threshold": 0.5, "minimum_calls": NEVER, "window_ms": 1000}


def begin(machine: Machine, policy: dict[str, Any] = POLICY) -> int:
    """The generation of a new breaker."""
    return machine.run("acquire", policy)["generation"]


def run_of(reply: dict[str, Any]) -> tuple[int, int]:
    """The run of failures in a reply, and the number of the latest failure."""
    return reply["failure_count"], reply["failure_number"]


# Numbers


def test_every_failure_gets_a_number(machine: Machine) -> None:
    """The number grows with each failure of the generation, also when successes have ended the run in between."""
    generation = begin(machine)
    reports = ({"failures": 1}, {"failures": 2}, {"successes": 1}, {"failures": 1}, {"successes": 1, "failures": 2})
    seen = [run_of(machine.run("record", POLICY, generation=generation, **counts)) for counts in reports]
    assert seen == [(1, 1), (3, 3), (0, 3), (1, 4), (2, 6)]
    assert run_of(machine.run("acquire", POLICY)) == run_of(machine.run("snapshot", POLICY)) == (2, 6)
    assert run_of(machine.run("control", POLICY, action="clear_forced")) == (2, 6)


def test_a_generation_begins_at_zero(machine: Machine) -> None:
    """Each transition begins a generation without failures; a probe's failure needs no number."""
    generation = begin(machine)
    reply = machine.run("record", POLICY, generation=generation, failures=10)
    assert (reply["state"], *run_of(reply)) == ("open", 10, 0)
    machine.advance(1000)
    permit = machine.run("acquire", POLICY)
    assert run_of(permit) == (10, 0)
    reply = machine.run("record", POLICY, generation=permit["generation"], probe=1, failures=1)
    assert (reply["state"], *run_of(reply)) == ("open", 11, 0)
    machine.advance(1000)
    permit = machine.run("acquire", POLICY)
    reply = machine.run("record", POLICY, generation=permit["generation"], probe=1, successes=1)
    assert (reply["state"], *run_of(reply)) == ("closed", 0, 0)
    assert run_of(machine.run("record", POLICY, generation=reply["generation"], failures=1)) == (1, 1)
    assert run_of(machine.run("control", POLICY, action="reset")) == (0, 0)


def test_a_local_engine_starts_with_the_run() -> None:
    """Where Redis is down, the failures of the last known run have numbers, too."""
    engine = MemoryEngine(document=document_for("closed", 7, 3, 0.0))
    reply = engine.run("record", {"policy": POLICY, "generation": 7, "successes": 1, "seen_failure": 2})
    assert run_of(reply) == (1, 3)
    engine = MemoryEngine(document=document_for("open", 7, 3, 0.0))
    assert run_of(engine.run("snapshot", {})) == (3, 0)


# Gathered successes


@pytest.mark.parametrize("script", ["acquire", "record"])
@pytest.mark.parametrize(("seen", "left"), [(0, 5), (2, 5), (3, 4), (4, 3), (6, 1), (7, 0), (8, 0), (10**12, 0)])
def test_successes_end_what_came_before(machine: Machine, script: str, seen: int, left: int) -> None:
    """Successes end the failures up to the number that their process had read, and no others."""
    generation = begin(machine)
    machine.run("record", POLICY, generation=generation, failures=2)
    machine.run("record", POLICY, generation=generation, successes=1, failures=5)
    reply = machine.run(script, POLICY, generation=generation, successes=9, seen_failure=seen)
    assert run_of(reply) == run_of(machine.run("snapshot", POLICY)) == (left, 7)


def test_without_a_number_they_end_the_run(machine: Machine) -> None:
    """Successes that say nothing of what their process knew were reported as they ended, and end all failures."""
    generation = begin(machine)
    machine.run("record", POLICY, generation=generation, failures=5)
    assert run_of(machine.run("record", POLICY, generation=generation, successes=1)) == (0, 5)


@pytest.mark.parametrize("counts", [{}, {"successes": 0}, {"failures": 1}])
def test_a_number_without_successes(machine: Machine, counts: dict[str, int]) -> None:
    """What a process had read matters only to its successes."""
    generation = begin(machine)
    machine.run("record", POLICY, generation=generation, failures=5)
    reply = machine.run("record", POLICY, generation=generation, seen_failure=5, age_ms=7, **counts)
    assert reply["failure_count"] == 5 + counts.get("failures", 0)


def test_failures_count_after_successes(machine: Machine) -> None:
    """The failures of a report come after its successes: none of them is ended."""
    generation = begin(machine)
    machine.run("record", POLICY, generation=generation, failures=3)
    reply = machine.run("record", POLICY, generation=generation, successes=1, failures=2, seen_failure=10**9)
    assert run_of(reply) == (2, 5)


def test_late_successes_do_not_stop_a_trip(machine: Machine) -> None:
    """Successes from before the failures, reported between them, leave the run to reach its threshold."""
    generation = begin(machine)
    for count in range(1, 10):
        machine.run("record", POLICY, generation=generation, failures=1)
        reply = machine.run("acquire", POLICY, generation=generation, successes=100, seen_failure=0)
        assert run_of(reply) == (count, count)
    assert machine.run("record", POLICY, generation=generation, failures=1)["state"] == "open"


def test_a_run_that_is_ended_in_part_goes_on(machine: Machine) -> None:
    """For the quorum, a run goes on from its beginning until its last failure is ended."""
    policy = {**POLICY, "failure_threshold": 2, "quorum": 2}
    generation = begin(machine, policy)
    machine.run("record", policy, generation=generation, failures=2, instance="a")
    machine.advance(10)
    machine.run("record", policy, generation=generation, successes=1, seen_failure=1)
    machine.advance(10)
    reply = machine.run("record", policy, generation=generation, failures=1, instance="b")
    assert reply["transition"]["reason"] == "failure_threshold"
    machine.run("control", policy, action="reset")
    generation = begin(machine, policy)
    machine.run("record", policy, generation=generation, failures=2, instance="a")
    machine.advance(10)
    machine.run("record", policy, generation=generation, successes=1, seen_failure=2)
    reply = machine.run("record", policy, generation=generation, failures=2, instance="b")
    assert reply["state"] == "closed"


# The age of successes


def calls(machine: Machine, policy: dict[str, Any] = WINDOW) -> int:
    """The calls in the window."""
    return machine.run("snapshot", policy)["calls"]


@pytest.mark.parametrize("script", ["acquire", "record"])
@pytest.mark.parametrize(
    ("age_ms", "left_ms"),
    [(0, 1000), (30, 1000), (31, 900), (130, 900), (131, 800), (831, 100), (930, 100), (931, 0), (10**7, 0)],
)
def test_successes_count_when_they_ended(machine: Machine, script: str, age_ms: int, left_ms: int) -> None:
    """They leave the window with the bucket of the time at which they ended; what has left it never counts."""
    machine.advance(30)
    generation = begin(machine)
    machine.run(script, WINDOW, generation=generation, successes=5, age_ms=age_ms)
    if left_ms:
        machine.advance(left_ms - 31)
        assert calls(machine) == 5
        machine.advance(1)
    assert calls(machine) == 0


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 99, 100, 101, 350, 999, 1000, 5000]),
            st.integers(0, 3),
            st.sampled_from([0, 1, 50, 99, 100, 101, 350, 899, 900, 999, 1000, 1001]),
        )
    )
)
def test_window_is_the_last_ten_buckets(machine: Machine, steps: list[tuple[int, int, int]]) -> None:
    """At any time the window holds the successes that ended, and the failures that arrived, in its ten buckets."""
    machine.run("control", action="reset")
    generation = begin(machine, WINDOW)
    counted: list[tuple[int, int]] = []
    for gap, failures, age_ms in steps:
        machine.advance(gap)
        machine.run("record", WINDOW, generation=generation, successes=5, failures=failures, age_ms=age_ms)
        counted += [((machine.now_ms - age_ms) // 100, 5), (machine.now_ms // 100, failures)]
        oldest = machine.now_ms // 100 - 9
        assert calls(machine) == sum(count for bucket, count in counted if bucket >= oldest)


def test_each_bucket_keeps_its_own(machine: Machine) -> None:
    """Successes of an earlier time are added to those of their bucket, and other buckets are left alone."""
    generation = begin(machine)
    for number in range(10):
        machine.run("record", WINDOW, generation=generation, successes=1, failures=1)
        machine.advance(100 if number < 9 else 0)
    for number in range(10):
        machine.run("record", WINDOW, generation=generation, successes=10**number, age_ms=number * 100)
    expected = 1_111_111_111 + 20
    for number in reversed(range(10)):
        assert calls(machine) == expected
        assert machine.run("snapshot", WINDOW)["failures"] == number + 1
        machine.advance(100)
        expected -= 10**number + 2
    assert calls(machine) == expected == 0


def test_only_successes_have_an_age(machine: Machine) -> None:
    """Failures, slow calls, and calls that still run are of now, whatever the age of the successes beside them."""
    generation = begin(machine)
    counts = {"successes": 7, "failures": 2, "slow": 4, "pending": 3}
    machine.run("record", WINDOW, generation=generation, age_ms=500, **counts)
    seen = machine.run("snapshot", WINDOW)
    assert (seen["calls"], seen["failures"], seen["slow"]) == (12, 2, 4)
    machine.advance(500)
    seen = machine.run("snapshot", WINDOW)
    assert (seen["calls"], seen["failures"], seen["slow"]) == (5, 2, 4)


@pytest.mark.parametrize(("counted", "kept"), [(1, 1), (3, 0), (4, 0)])
def test_pending_calls_that_ended_before(machine: Machine, counted: int, kept: int) -> None:
    """Successes that were counted while they ran are no further calls, whatever their age."""
    generation = begin(machine)
    machine.advance(500)
    machine.run("record", WINDOW, generation=generation, slow=counted, pending=counted)
    machine.run("record", WINDOW, generation=generation, successes=3, failures=1, counted=counted, age_ms=500)
    assert calls(machine) == 4
    machine.advance(500)
    assert calls(machine) == 4 - max(3 - counted, 0)
    machine.advance(500)
    assert calls(machine) == 0


def test_what_left_the_window_ends_failures(machine: Machine) -> None:
    """Successes that are too old for the window still end the failures that came before them."""
    generation = begin(machine)
    machine.run("record", WINDOW, generation=generation, failures=3)
    reply = machine.run("record", WINDOW, generation=generation, successes=1, age_ms=5000, seen_failure=2)
    assert (run_of(reply), calls(machine)) == ((1, 3), 3)


def test_successes_that_left_the_window_complete_no_minimum(machine: Machine) -> None:
    """Only calls that are in the window count towards minimum_calls."""
    policy = {**WINDOW, "minimum_calls": 4}
    generation = begin(machine, policy)
    machine.run("record", policy, generation=generation, failures=3)
    for age_ms, state in ((1000, "closed"), (900, "open")):
        reply = machine.run("record", policy, generation=generation, successes=1, age_ms=age_ms)
        assert reply["state"] == state


def test_age_after_a_clock_went_back(machine: Machine) -> None:
    """Where the clock went back, counting goes on in the newest bucket, and an age counts back from there."""
    generation = begin(machine)
    machine.run("record", WINDOW, generation=generation, successes=1)
    machine.advance(-250)
    machine.run("record", WINDOW, generation=generation, successes=10, age_ms=50)
    machine.run("record", WINDOW, generation=generation, successes=100, age_ms=51)
    assert calls(machine) == 111
    machine.advance(250 + 899)
    assert calls(machine) == 111
    machine.advance(1)
    assert calls(machine) == 11
    machine.advance(100)
    assert calls(machine) == 0


# Hints and other messages


def told(engine: str, client: redis.Redis, play_it: Any) -> list[dict[str, Any]]:
    """What is published while play_it uses a machine of the engine."""
    heard: list[dict[str, Any]] = []
    if engine == "memory":
        play_it(memory_machine(heard.append))
    else:
        with published(client, keys_of("m").state) as heard:
            play_it(lua_machine(client))
    return [parsed(message) for message in heard]


EACH_ENGINE = pytest.mark.parametrize("engine", ["lua", "memory"])


@EACH_ENGINE
@pytest.mark.parametrize(
    ("threshold", "reports", "counts"),
    [
        (1, [{"failures": 1}], []),
        (2, [{"failures": 1}], []),
        (3, [{"failures": 1}, {"failures": 1}], [2]),
        (4, [{"failures": 1}] * 3, [2]),
        (5, [{"failures": 1}] * 4, [3]),
        (6, [{"failures": 1}] * 5, [3]),
        (6, [{"failures": 5}], [5]),
        (6, [{"failures": 6}], []),
        (6, [{"failures": 2}, {"failures": 4}], []),
        (6, [{"failures": 3}, {"successes": 1}, {"failures": 2}, {"failures": 1}], [3, 3]),
        (6, [{"failures": 3}, {"successes": 1, "seen_failure": 1}, {"failures": 1}], [3, 3]),
        (6, [{"failures": 3}, {"successes": 1, "seen_failure": 0}, {"slow": 1}], [3]),
        (6, [{"failures": 4}, {"successes": 1, "failures": 3}], [4]),
        (6, [{"failures": 4}, {"successes": 1, "seen_failure": 1}], [4]),
    ],
)
def test_a_run_that_reaches_half(
    client: redis.Redis, engine: str, threshold: int, reports: list[dict[str, int]], counts: list[int]
) -> None:
    """A run of at least two failures is published once, as it reaches half of its threshold without tripping."""
    policy = {**POLICY, "failure_threshold": threshold}

    def play_it(machine: Machine) -> None:
        generation = begin(machine, policy)
        for report in reports:
            machine.run("record", policy, generation=generation, instance="a", **report)

    hints = [message for message in told(engine, client, play_it) if "from" not in message]
    assert hints == [{"failure_count": count, "instance": "a", "time_ms": START_MS} for count in counts]


@EACH_ENGINE
def test_a_run_below_the_quorum(client: redis.Redis, engine: str) -> None:
    """A run that only lacks the quorum is published like any other."""
    policy = {**POLICY, "quorum": 2}

    def play_it(machine: Machine) -> None:
        machine.run("record", policy, generation=begin(machine, policy), instance="a", failures=99)

    assert told(engine, client, play_it) == [{"failure_count": 99, "instance": "a", "time_ms": START_MS}]


@EACH_ENGINE
def test_no_hint_while_forced(client: redis.Redis, engine: str) -> None:
    """Where nothing is counted there is no run to tell of."""

    def play_it(machine: Machine) -> None:
        generation = machine.run("control", POLICY, action="force_closed")["generation"]
        machine.run("record", POLICY, generation=generation, failures=9)
        machine.run("control", POLICY, action="force_open")
        machine.advance(1)
        machine.run("record", POLICY, generation=generation, failures=9)

    assert [message["reason"] for message in told(engine, client, play_it)] == ["forced", "forced"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, policy=POLICIES, other=POLICIES)
def test_engines_publish_the_same(
    client: redis.Redis, steps: list[Any], policy: dict[str, Any], other: dict[str, Any]
) -> None:
    """Both engines publish the same messages, in the same order."""
    client.delete(*keys_of("m"))

    def play_it(machine: Machine) -> None:
        play(machine, steps, policy, other)

    assert told("lua", client, play_it) == told("memory", client, play_it)


# How long a forced state lasts


@pytest.mark.parametrize("action", ["force_open", "force_closed"])
def test_the_end_of_a_forced_state_is_told(machine: Machine, action: str) -> None:
    """Every reply that says that the state is forced says for how long."""
    reply = machine.run("control", action=action, duration_ms=5000)
    assert reply["forced_left_ms"] == 5000
    machine.advance(4999)
    for script in ("acquire", "snapshot", "record"):
        request = {"generation": reply["generation"], "failures": 1} if script == "record" else {}
        assert machine.run(script, **request)["forced_left_ms"] == 1
    machine.advance(1)
    assert machine.run("snapshot").get("forced_left_ms") is None
    machine.run("control", action=action)
    assert machine.run("control", action="reset").get("forced_left_ms") is None
