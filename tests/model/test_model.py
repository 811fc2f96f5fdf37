"""The explicit-state search finds no state in which a rule is broken, and finds what breaks one."""

from __future__ import annotations

from typing import Any

import pytest
from explore import LEGAL, Bounds, Broken, Search, explore

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
LONG = {
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
