"""The explicit-state search finds no state in which a rule is broken, and finds what breaks one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from explore import LEGAL, Bounds, Broken, Gatherer, Message, Search, explore

from pybreaker_redis import _rules


def policy(**changed: int) -> tuple[tuple[str, int], ...]:
    """The search's policy with other numbers."""
    return tuple({**dict(Bounds.policy), **changed}.items())


SHORT = {
    "lost replies, crashes, repeats, a reset": Bounds(asks=4, waits=2),
    "one failure trips": Bounds(asks=5, crashes=0, repeats=0, resets=0, policy=policy(failure_threshold=1)),
    "two slots": Bounds(asks=4, resets=0, crashes=0, policy=policy(failure_threshold=1, half_open_max_calls=2)),
    "two successes close": Bounds(asks=4, resets=0, policy=policy(failure_threshold=1, success_threshold=2)),
}
GATHERING = {
    "no trip": Bounds(
        **{"clients": 2, "asks": 3, "waits": 0, "crashes": 0, "resets": 0, "repeats": 0},
        **{"gatherers": 1, "reads": 3, "successes": 2},
        policy=policy(failure_threshold=9),
    ),
    "two gatherers": Bounds(
        **{"clients": 1, "asks": 2, "waits": 0, "crashes": 0, "resets": 0, "repeats": 0},
        **{"gatherers": 2, "reads": 3, "successes": 1},
        policy=policy(failure_threshold=9),
    ),
    "a replica takes over": Bounds(
        **{"clients": 1, "asks": 3, "waits": 0, "crashes": 0, "resets": 0, "repeats": 0, "failovers": 1},
        **{"gatherers": 1, "reads": 2, "successes": 2},
        policy=policy(failure_threshold=9),
    ),
}
LONG = {
    "trips and a reset": Bounds(
        **{"clients": 1, "asks": 3, "waits": 1, "crashes": 0, "resets": 1, "repeats": 0},
        **{"gatherers": 1, "reads": 2, "successes": 2},
    ),
    "more of gathered successes": Bounds(
        **{"clients": 1, "asks": 4, "waits": 2, "crashes": 0, "resets": 1, "repeats": 1},
        **{"gatherers": 1, "reads": 3, "successes": 2},
        policy=policy(failure_threshold=2),
    ),
    "lost replies, crashes, repeats, a reset": Bounds(asks=6),
    "many rounds": Bounds(asks=7, transitions=6, crashes=0, resets=0, policy=policy(failure_threshold=1)),
    "two slots": Bounds(asks=5, policy=policy(failure_threshold=1, half_open_max_calls=2)),
}


@pytest.mark.parametrize("bounds", SHORT.values(), ids=SHORT)
def test_no_state_breaks_a_rule(bounds: Bounds) -> None:
    """Three clients, whatever is lost, repeated, late or dead: every state within the bounds keeps every rule."""
    search = explore(bounds)
    assert search.steps > 2000
    reached = {tuple(key.split(" (")[0].split(" > ")) for key in search.transitions}
    assert reached >= {("closed", "open"), ("open", "half_open"), ("half_open", "open")}


@pytest.mark.parametrize("bounds", GATHERING.values(), ids=GATHERING)
def test_gathered_successes_end_no_later_failure(bounds: Bounds) -> None:
    """Whatever is late, lost or overtaken, gathered successes end no failure that was counted after they ended."""
    search = explore(bounds)
    assert search.steps > 2000
    assert search.spared > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bounds", LONG.values(), ids=LONG)
def test_no_state_breaks_a_rule_for_long(bounds: Bounds) -> None:
    """The same with more calls under way, through several rounds of every transition."""
    search = explore(bounds)
    assert {tuple(key.split(" (")[0].split(" > ")) for key in search.transitions} >= set(LEGAL)


# What the search would say of an engine that is wrong ------------------------------------------------


def count_any_generation(document: Any, request: Any, *rest: Any) -> bool:
    """Counts an outcome of any generation."""
    return record(document, {**request, "generation": document.generation}, *rest)


record = _rules.record
WRONG: dict[str, tuple[str, Any]] = {
    "straggler": ("record", count_any_generation),
    "generation": ("next_generation", lambda document: document.generation),
    "live probes": ("free_slot", lambda *_: True),
}


@pytest.mark.parametrize("says", WRONG)
def test_a_wrong_engine_is_found(monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """An engine without one of the rules breaks it in a state that the search reaches, and the path there is told."""
    monkeypatch.setattr(_rules, *WRONG[says])
    search = Search(Bounds(asks=4, policy=policy(failure_threshold=1)))
    with pytest.raises(Broken, match=says) as broken:
        search.run()
    assert "\n" in str(broken.value)


# What the search would say of a client, or an engine, that forgets too much --------------------------


class Hasty(Gatherer):
    """A client that reports what it has read by the time of the report."""

    def report(self) -> tuple[Gatherer, Message]:
        after, message = super().report()
        return after, dataclasses.replace(message, seen=self.read_number)


class Careless(Gatherer):
    """A client that takes over what it reads without a look at what has succeeded since."""

    def read(self, generation: int, number: int) -> Gatherer:
        after = super().read(generation, number)
        return dataclasses.replace(after, read_at=-1) if after.generation == generation else after


def without_seen(document: Any, request: Any, *rest: Any) -> None:
    """Counts gathered successes as if they were reported as they end."""
    count_outcomes(document, {field: value for field, value in request.items() if field != "seen_failure"}, *rest)


def without_a_bound(document: Any, request: Any, *rest: Any) -> None:
    """Takes a number that was never given for one of a failure."""
    before, number = document.failure_count, document.failure_number
    count_outcomes(document, request, *rest)
    if request.get("successes") and "seen_failure" in request:
        document.failure_count = min(before, number - request["seen_failure"]) + request.get("failures", 0)


def one_too_many(document: Any, request: Any, *rest: Any) -> None:
    """Forgets one failure more than was seen."""
    if "seen_failure" in request:
        request = {**request, "seen_failure": request["seen_failure"] + 1}
    count_outcomes(document, request, *rest)


count_outcomes = _rules.count_outcomes
LATER, NO_PART = "ended a later failure", "no part of its numbers"


@pytest.mark.parametrize(
    ("says", "bounds", "gatherer", "engine"),
    [
        (LATER, "no trip", Hasty, count_outcomes),
        (LATER, "no trip", Careless, count_outcomes),
        (LATER, "no trip", Gatherer, without_seen),
        (LATER, "no trip", Gatherer, one_too_many),
        (NO_PART, "a replica takes over", Gatherer, without_a_bound),
    ],
)
def test_a_wrong_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, says: str, bounds: str, gatherer: type[Gatherer], engine: Any
) -> None:
    """A client or an engine that ends failures which came after the successes is found, with the path there."""
    monkeypatch.setattr(_rules, "count_outcomes", engine)
    with pytest.raises(Broken, match=says) as broken:
        Search(GATHERING[bounds], gatherer).run()
    assert "\n" in str(broken.value)
