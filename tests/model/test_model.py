"""The explicit-state search finds no state in which a rule is broken, and finds what breaks one."""

from __future__ import annotations

from typing import Any

import pytest
from explore import LEGAL, Bounds, Broken, Search, explore

from pybreaker_redis._memory import MemoryEngine


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


class NoFence(MemoryEngine):
    """Counts an outcome of any generation."""

    def record(self, document: Any, request: Any, *rest: Any) -> bool:
        return super().record(document, {**request, "generation": document.generation}, *rest)


class StuckGeneration(MemoryEngine):
    """Gives every state the same generation."""

    def next_generation(self, document: Any, *_: Any) -> int:
        return int(document.generation)


class EndlessSlots(MemoryEngine):
    """Hands out a slot to whoever asks."""

    def free_slot(self, *arguments: Any) -> bool:
        return True


@pytest.mark.parametrize(
    ("engine", "says"),
    [(NoFence, "straggler"), (StuckGeneration, "generation"), (EndlessSlots, "live probes")],
)
def test_a_wrong_engine_is_found(engine: type[MemoryEngine], says: str) -> None:
    """An engine without one of the rules breaks it in a state that the search reaches, and the path there is told."""
    search = Search(Bounds(asks=4, policy=policy(failure_threshold=1)))
    search.engine = engine(now_ms=search.engine._now_ms)
    with pytest.raises(Broken, match=says) as broken:
        search.run()
    assert "\n" in str(broken.value)
