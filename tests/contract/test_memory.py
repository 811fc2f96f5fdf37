"""What the engine in memory has beside the rules it shares with the Lua: clock, history, and where it starts from."""

from __future__ import annotations

import threading
import time

from conftest import START_MS, Machine, memory_machine

from pybreaker_redis._memory import HISTORY_ENTRIES, Document, LocalEngine, MemoryEngine, clock_ms, document_for

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


def test_after_a_fork() -> None:
    """A lock that a thread of the parent held does not stop the child."""
    engine = memory_machine()._engine
    engine._lock.acquire()
    engine.after_fork()
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
