"""What the engine in memory has beside the rules it shares with the Lua: clock, history, and where it starts from."""

from __future__ import annotations

import threading
import time
from typing import Any

from conftest import START_MS, Machine, in_place_machine, memory_machine

from pybreaker_redis._memory import (
    HISTORY_ENTRIES,
    Document,
    FixedEngine,
    LocalEngine,
    MemoryEngine,
    clock_ms,
    document_for,
)
from pybreaker_redis._view import View

POLICY = {"failure_threshold": 1, "reset_timeout_ms": 1000, "backoff_multiplier": 2}


def engine_of(machine: Machine) -> MemoryEngine:
    """The engine itself."""
    engine = machine._engine
    assert isinstance(engine, MemoryEngine)
    return engine


def test_clock() -> None:
    """Its clock is Unix milliseconds, whole ones, within a second of the system's."""
    now = clock_ms()
    assert isinstance(now, int)
    assert abs(now - time.time() * 1000) < 1000


def test_history() -> None:
    """The newest transitions come first, each with its time and who caused it, and no more than are asked for."""
    machine = memory_machine()
    generation = machine.run("acquire", POLICY)["generation"]
    reply = machine.run("record", POLICY, generation=generation, failures=1, instance="a")
    machine.advance(1000)
    machine.run("acquire", POLICY)
    newest, oldest = engine_of(machine).history(9)
    assert oldest == {**reply["transition"], "time_ms": START_MS, "instance": "a"}
    assert (newest["to"], newest["time_ms"], newest["instance"]) == ("half_open", START_MS + 1000, "")
    assert engine_of(machine).history(1) == [newest]


def test_history_is_bounded() -> None:
    """It keeps the newest entries, as the stream does."""
    machine = memory_machine()
    actions = ("force_open", "reset") * HISTORY_ENTRIES
    generations = [machine.run("control", action=action)["generation"] for action in actions[: HISTORY_ENTRIES + 5]]
    kept = [entry["generation"] for entry in engine_of(machine).history(10**6)]
    assert kept == generations[: -HISTORY_ENTRIES - 1 : -1]
    assert len(kept) == 1000


def test_a_policy_ends_by_itself() -> None:
    """An operator's policy with a duration holds until its very end, one without for good."""
    machine = memory_machine()
    machine.run("control", action="set_policy", override={"quorum": 2}, duration_ms=500)
    machine.advance(499)
    assert machine.run("snapshot")["override"] == {"quorum": 2}
    machine.advance(1)
    assert machine.run("snapshot").get("override") is None
    machine.run("control", action="set_policy", override={"quorum": 3})
    machine.advance(10**9)
    assert machine.run("snapshot")["policy"]["quorum"] == 3


def test_obey() -> None:
    """A policy that was set elsewhere is taken over, and does not end by itself, whatever held before."""
    machine = memory_machine()
    machine.run("control", action="set_policy", override={"quorum": 2}, duration_ms=500)
    engine_of(machine).obey({"quorum": 3})
    machine.advance(10**9)
    assert machine.run("snapshot")["override"] == {"quorum": 3}
    engine_of(machine).obey(None)
    assert machine.run("snapshot").get("override") is None


def test_where_it_starts() -> None:
    """It goes on from the document and the operator's policy that it is given."""
    document = Document(generation=7, state="open", trips=1000, open_until_ms=START_MS + 50)
    engine = MemoryEngine(now_ms=lambda: START_MS, document=document, override={"max_reset_timeout_ms": 2000})
    reply = engine.run("acquire", {"policy": POLICY})
    assert (reply["admitted"], reply["generation"], reply["retry_after_ms"]) == (False, 7, 50)
    assert reply["override"] == {"max_reset_timeout_ms": 2000}


def test_a_row_of_a_thousand_trips() -> None:
    """Trips are counted up to a thousand."""
    for trips, counted in ((998, 999), (999, 1000), (1000, 1000)):
        engine = MemoryEngine(now_ms=lambda: START_MS, document=Document(7, "open", trips=trips))
        slot = engine.run("acquire", {"policy": POLICY})
        engine.run("record", {"policy": POLICY, "generation": slot["generation"], "probe": 1, "failures": 1})
        assert engine.run("snapshot", {"policy": POLICY})["trips"] == counted


def test_alone() -> None:
    """One that nobody else reports to trips without a quorum."""
    for alone, state in ((True, "open"), (False, "closed")):
        engine = MemoryEngine(now_ms=lambda: START_MS, quorum_of_one=alone)
        policy = {**POLICY, "quorum": 2}
        generation = engine.run("acquire", {"policy": policy})["generation"]
        engine.run("record", {"policy": policy, "generation": generation, "failures": 1})
        assert engine.run("snapshot", {"policy": policy})["state"] == state


def counts_in_place(policy: dict[str, Any], *requests: tuple[str, dict[str, Any]], later_ms: int = 0) -> bool:
    """Whether the next failure is counted in place, after these requests; if not, nothing has changed."""
    clock = [START_MS]
    engine = MemoryEngine(now_ms=lambda: clock[0])
    generation = engine.run("acquire", {"policy": policy})["generation"]
    for name, request in requests:
        engine.run(name, {"policy": policy, "generation": generation, **request})
    clock[0] += later_ms
    before = engine.run("snapshot", {"policy": policy})
    counted = engine.count_failure(generation, policy, View(0.0))
    after = engine.run("snapshot", {"policy": policy})
    assert after["failure_count"] - before["failure_count"] == counted
    assert counted or after == before
    return counted


def test_a_failure_is_counted_in_place() -> None:
    """A failure that can only lengthen a run is; one that may do more is left to the rules, and so is the threshold."""
    plain: dict[str, Any] = {"failure_threshold": 3}
    failure, trips = ("record", {"failures": 1}), ("record", {"failures": 3})
    assert counts_in_place(plain)
    assert counts_in_place(plain, failure)
    assert not counts_in_place(plain, failure, failure)
    assert counts_in_place(plain, failure, failure, ("record", {"successes": 1}))
    assert not counts_in_place({**plain, "quorum": 2})
    assert not counts_in_place({**plain, "failures_in_window": 9})
    assert not counts_in_place(plain, trips)
    for action in ("force_closed", "force_open"):
        assert not counts_in_place(plain, ("control", {"action": action}))
    assert not counts_in_place(plain, ("control", {"action": "set_policy", "override": {"failure_threshold": 9}}))
    recovery = trips, ("acquire", {"policy": {**plain, "reset_timeout_ms": 0}})
    assert not counts_in_place(plain, *recovery)


def test_a_failure_after_a_recovery_is_judged_until_the_back_off_is_over() -> None:
    """The end of the row of trips depends on time: while one is remembered, nothing is counted in place."""
    machine = in_place_machine()
    policy = {"failure_threshold": 2, "reset_timeout_ms": 1000}
    engine, view = engine_of(machine), View(0.0)
    generation = machine.run("acquire", policy)["generation"]
    machine.run("record", policy, generation=generation, failures=2)
    machine.advance(1000)
    probe = machine.run("acquire", policy)
    closed = machine.run("record", policy, generation=probe["generation"], probe=probe["probe"], successes=1)
    assert closed["state"] == "closed"
    assert not engine.count_failure(closed["generation"], policy, view)
    machine.advance(1000)
    machine.run("record", policy, generation=closed["generation"], successes=1)
    assert engine.count_failure(closed["generation"], policy, view)


def test_a_clock_that_was_turned_back_is_followed_first() -> None:
    """A failure at an earlier time than the last request is left to run(), which moves the stored times."""
    machine = in_place_machine()
    policy = {"failure_threshold": 5}
    generation = machine.run("acquire", policy)["generation"]
    machine.advance(-1)
    assert not engine_of(machine).count_failure(generation, policy, View(0.0))


def test_after_a_fork() -> None:
    """A lock that a thread of the parent held does not stop the child."""
    engine = memory_machine()._engine
    engine._lock.acquire()
    engine.after_fork(threading.RLock())
    done = threading.Thread(target=engine.run, args=("acquire", {}), daemon=True)
    done.start()
    done.join(timeout=10)
    assert not done.is_alive()
    assert engine.history(1) == []


def test_a_local_engine_starts_from_the_view() -> None:
    """It continues in the state that was read last, and its own generations are below zero and never repeat."""
    now = clock_ms()
    closed = document_for("closed", generation=7, failure_count=2, open_for=0.0)
    assert (closed.state, closed.generation, closed.failure_count, closed.opened_at) == ("closed", 7, 2, None)
    opened = document_for("open", generation=7, failure_count=5, open_for=1.5)
    assert (opened.state, opened.failure_count, opened.is_new) == ("open", 5, False)
    assert now // 1000 <= (opened.opened_at or 0) <= clock_ms() // 1000
    assert now + 1500 <= opened.open_until_ms <= clock_ms() + 1500
    assert document_for("open", 7, 5, -3.0).open_until_ms <= clock_ms()
    unknown = document_for("closed", generation=0, failure_count=0, open_for=0.0)
    generations = [document.generation for document in (opened, unknown, document_for("half_open", 7, 0, 0.0))]
    assert len({*generations}) == 3
    assert max(generations) < 0


def test_a_local_engine_takes_generations_of_its_own() -> None:
    """Each of its transitions gets a generation below zero, also without a document to start from."""
    engine = LocalEngine(document=document_for("closed", 7, 0, 0.0), quorum_of_one=True)
    assert engine.run("record", {"generation": 7, "failures": 5})["applied"]
    assert (engine.state, engine.run("snapshot", {})["source"]) == ("open", "local")
    first = engine.generation
    engine.run("control", {"action": "reset"})
    assert (engine.state, engine.generation < 0, engine.generation != first) == ("closed", True, True)
    fresh = LocalEngine(quorum_of_one=True)
    assert (fresh.state, fresh.generation) == ("closed", 0)
    fresh.run("control", {"action": "force_open"})
    assert fresh.generation < 0


def test_a_local_engine_starts_from_what_the_view_says_besides() -> None:
    """A forced state keeps its end, and an open circuit its reason and error; without them there are none."""
    now = clock_ms()
    forced = document_for("open", 7, open_for=2.0, forced="open", forced_for=1.5, reason="forced", error="Boom: bang")
    assert (forced.forced, forced.reason, forced.error) == ("open", "forced", "Boom: bang")
    assert now + 1500 <= (forced.forced_until_ms or 0) <= clock_ms() + 1500
    plain = document_for("closed")
    assert (plain.forced, plain.forced_until_ms, plain.reason, plain.error) == (None, None, None, None)
    assert (plain.failure_count, plain.open_until_ms <= clock_ms(), plain.generation < 0) == (0, True, True)
    assert document_for("closed", 7, forced="closed").forced_until_ms <= clock_ms()  # type: ignore[operator]


def test_a_local_engine_starts_with_the_policy_override_and_its_end() -> None:
    """What was set for a time ends at that time."""
    clock = [START_MS]
    engine = MemoryEngine(now_ms=lambda: clock[0], override={"quorum": 3}, override_until_ms=START_MS + 500)
    assert engine.run("snapshot", {})["override_left_ms"] == 500
    clock[0] += 499
    assert engine.run("snapshot", {})["override_left_ms"] == 1
    clock[0] += 1
    assert not {"override", "override_left_ms"} & engine.run("snapshot", {}).keys()


def test_a_fixed_engine() -> None:
    """It admits every call or none, whatever it is asked, and its generation is one that Redis rejects."""
    nothing = {"applied": False, "generation": -1, "failure_count": 0, "failure_number": 0, "success_count": 0}
    for state, admitted, wait in (("closed", True, None), ("open", False, 1000)):
        engine = FixedEngine(state, 1000)  # type: ignore[arg-type]
        expected = {**nothing, "admitted": admitted, "state": state, "retry_after_ms": wait, "source": "local"}
        assert engine.run("acquire", {}) == engine.run("record", {"generation": -1, "failures": 9}) == expected


def test_a_document_is_replaced() -> None:
    """The state goes on from the given fields, under a new generation; calls of the old one do not count."""
    machine = memory_machine()
    engine = engine_of(machine)
    engine.replace(failure_count=2)
    fresh = machine.run("snapshot", POLICY)
    assert (fresh["exists"], fresh["state"], fresh["failure_count"]) == (True, "closed", 2)
    assert fresh["generation"] == START_MS * 1000
    engine.replace(state="open", open_until_ms=START_MS + 50)
    reply = machine.run("acquire", POLICY)
    assert (reply["admitted"], reply["retry_after_ms"], reply["generation"]) == (False, 50, START_MS * 1000 + 1)
    assert not machine.run("record", POLICY, generation=fresh["generation"], failures=1)["applied"]


def test_every_time_moves_back_with_the_clock() -> None:
    """What is left of a probe's slot, of an open period and of a reporter's failure stays the same."""
    clock = [START_MS]
    policy = {**POLICY, "quorum": 2, "failure_threshold": 9, "probe_timeout_ms": 400}
    engine = MemoryEngine(now_ms=lambda: clock[0])
    generation = engine.run("acquire", {"policy": policy})["generation"]
    engine.run("record", {"policy": policy, "generation": generation, "failures": 1, "host": "a", "instance": "a"})
    before = engine.run("snapshot", {"policy": policy})
    clock[0] -= 10_500
    after = engine.run("snapshot", {"policy": policy})
    assert after["last_failure_time"] == before["last_failure_time"] - 10
    assert {host: at + 10_500 for host, at in after["reporters"].items()} == before["reporters"] != {}

    engine.run("control", {"action": "force_open", "duration_ms": 100})
    clock[0] += 100
    slot = engine.run("acquire", {"policy": policy})
    assert (slot["admitted"], engine.run("acquire", {"policy": policy})["admitted"]) == (True, False)
    clock[0] -= 10_000
    engine.run("snapshot", {"policy": policy})
    clock[0] += 399
    assert not engine.run("acquire", {"policy": policy})["admitted"]
    clock[0] += 1
    assert engine.run("acquire", {"policy": policy})["admitted"]


def test_successes_that_the_view_has_gathered_end_the_run_first() -> None:
    """A failure that is counted in place takes them along, if they are of its generation."""
    policy = {"failure_threshold": 5}
    for successes, older, count, left in ((0, 0, 3, 0), (1, 0, 1, 0), (1, 1, 3, 1)):
        machine, view = in_place_machine(), View(0.1)
        generation = machine.run("acquire", policy)["generation"]
        for _ in range(2):
            assert engine_of(machine).count_failure(generation, policy, view)
        view.adopt({**machine.run("acquire", policy), "generation": generation - older, "source": "memory"}, 0.0)
        for _ in range(successes):
            view.seen.tick()
        assert engine_of(machine).count_failure(generation, policy, view)
        assert machine.run("snapshot", policy)["failure_count"] == count
        assert view.seen.counter.take_unseen() == left


def test_a_failure_of_another_policy_or_generation_is_left_to_the_rules() -> None:
    """Nothing is counted in place for the caller of another policy, under a policy override, or of the past."""
    policy = {"failure_threshold": 5}
    machine = in_place_machine()
    engine, generation = engine_of(machine), machine.run("acquire", policy)["generation"]
    assert not engine.count_failure(generation, dict(policy), View(0.0))
    assert not engine.count_failure(generation - 1, policy, View(0.0))
    assert engine.count_failure(generation, policy, View(0.0))
    engine.obey({"failure_threshold": 9})
    assert not engine.count_failure(generation, policy, View(0.0))


def test_what_an_action_enters_into_the_history() -> None:
    """Each action of an operator has one entry, whether it was a transition or not."""
    machine = memory_machine()
    actions = [
        {"action": "set_policy", "override": {"quorum": 2}, "duration_ms": 500},
        {"action": "force_open", "duration_ms": 100},
        {"action": "force_open", "duration_ms": 900, "operator": "ann", "note": "why"},
        {"action": "probe"},  # refused while a state is forced
        {"action": "clear_forced"},
        {"action": "clear_policy"},
        {"action": "reset"},
        {"action": "reset"},  # changes nothing
    ]
    for request in actions:
        machine.run("control", **request)
    entries = engine_of(machine).history(9)[::-1]
    assert [(entry["from"], entry["to"], entry["reason"]) for entry in entries] == [
        ("closed", "closed", "set_policy"),
        ("closed", "open", "forced"),
        ("open", "open", "forced"),
        ("open", "open", "clear_forced"),
        ("open", "open", "clear_policy"),
        ("open", "closed", "reset"),
    ]
    assert entries[0]["override"] == f'{{"quorum":2,"until_ms":{START_MS + 500}}}'
    generation = START_MS * 1000
    assert [entry["generation"] for entry in entries] == [0, *[generation + 1] * 4, generation + 2]
    assert (entries[2]["operator"], entries[2]["note"]) == ("ann", "why")
