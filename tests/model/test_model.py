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
NEWER = {
    "holds": Bounds(
        **{"asks": 4, "waits": 3, "crashes": 0, "resets": 0, "repeats": 0, "holds": 3, "probes": 1},
        policy=policy(failure_threshold=2, reset_timeout_ms=5, max_hold_ms=12),
    ),
    "failures in the window": Bounds(
        **{"asks": 5, "waits": 1, "crashes": 0, "resets": 0, "transitions": 2},
        policy=policy(failure_threshold=9, failures_in_window=3),
    ),
    "tolerated failures of probes": Bounds(
        **{"asks": 4, "waits": 2, "crashes": 0, "resets": 0, "repeats": 0},
        policy=policy(failure_threshold=1, half_open_max_calls=2, probe_failure_threshold=2, success_threshold=2),
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


@pytest.mark.parametrize("bounds", NEWER.values(), ids=NEWER)
def test_no_state_breaks_a_newer_rule(bounds: Bounds) -> None:
    """Holds, failures in the window, tolerated failures of probes, and an operator's probe."""
    search = explore(bounds)
    assert search.steps > 2000
    reasons = {key.split("(")[1].rstrip(")") for key in search.transitions}
    if bounds.holds:
        assert "held" in reasons
        assert search.extended > 0
    else:
        assert reasons & {"failures_in_window", "probe_failed"}


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


def as_a_trip(document: Any, rules: Any, reason: str, hold_ms: int = 0) -> None:
    """Counts a hold as a trip."""
    trip(document, rules, reason, hold_ms)
    document.trips += reason == "held"


def of_any_generation(document: Any, request: Any, rules: Any) -> bool:
    """Lets any report extend a hold."""
    return extend_hold(document, {**request, "generation": document.generation}, rules)


def without_a_limit(document: Any, request: Any, rules: Any) -> bool:
    """Extends a hold beyond the longest one."""
    return extend_hold(document, request, {**rules, "max_hold_ms": 10**6})


def without_a_look(document: Any, request: Any, rules: Any) -> bool:
    """Gives a hold another end, even an earlier one."""
    if document.held_generation is not None:
        document.open_until_ms = document.now + request["hold_ms"]
    return document.held_generation is not None


def keeps_the_hold(document: Any) -> bool:
    """Lets the next caller probe, but does not end the hold."""
    held = document.held_generation
    changed = probe_now(document)
    document.held_generation = held
    return changed


def never_probes(document: Any) -> bool:
    """Does nothing."""
    return False


def at_the_first(document: Any, rules: Any, reason: str, hold_ms: int) -> None:
    """Opens at the first failed probe."""
    fail_probe(document, {**rules, "probe_failure_threshold": 1}, reason, hold_ms)


def one_more(document: Any, rules: Any, *rest: Any) -> str | None:
    """Lets one more failure into the window."""
    return trip_reason(document, {**rules, "failures_in_window": rules["failures_in_window"] + 1}, *rest)


trip, extend_hold, probe_now = _rules.trip, _rules.extend_hold, _rules.probe_now
fail_probe, trip_reason = _rules.fail_probe, _rules.trip_reason


@pytest.mark.parametrize(
    ("says", "bounds", "rule", "engine"),
    [
        ("counted wrongly", "holds", "trip", as_a_trip),
        ("may not", "holds", "extend_hold", of_any_generation),
        ("may not", "holds", "extend_hold", without_a_limit),
        ("may not", "holds", "extend_hold", without_a_look),
        ("takes a probe back", "holds", "probe_now", keeps_the_hold),
        ("cannot probe", "holds", "probe_now", never_probes),
        ("after 1 failed probes", "tolerated failures of probes", "fail_probe", at_the_first),
        ("failures in the window", "failures in the window", "trip_reason", one_more),
    ],
)
def test_a_wrong_newer_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, says: str, bounds: str, rule: str, engine: Any
) -> None:
    """An engine that gets a newer rule wrong is found, with the path there."""
    monkeypatch.setattr(_rules, rule, engine)
    with pytest.raises(Broken, match=says) as broken:
        Search(NEWER[bounds]).run()
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
