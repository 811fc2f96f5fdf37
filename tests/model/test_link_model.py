"""The search over the client finds no schedule that breaks a rule, and finds what breaks one."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from explore_link import WALK, Broken, Setup, search, walks

from pybreaker_redis import _view
from pybreaker_redis._core import BreakerCore
from pybreaker_redis._line import Line
from pybreaker_redis._view import Seen, Successes, View
from pybreaker_redis.wire.link import Link
from pybreaker_redis.wire.options import REDIS_ERRORS
from pybreaker_redis.wire.outage import Outage


def setup(base: Setup = WALK, /, policy: dict[str, Any] | None = None, **changed: Any) -> Setup:
    """A setup like another one."""
    return dataclasses.replace(base, **changed, policy=tuple({**dict(base.policy), **(policy or {})}.items()))


TWO_PROBES = {"failure_threshold": 1, "half_open_max_calls": 2, "success_threshold": 2, "reset_timeout": 0.25}
RATE = {"failure_threshold": 9, "error_rate_threshold": 0.5, "minimum_calls": 5, "window": 1.0}
SLOW = {"slow_call_duration": 0.2, "slow_call_rate_threshold": 0.5, "minimum_calls": 5, "window": 1.0}
WALKS = {
    "everything": WALK,
    "two breakers": setup(breakers=2),
    "three breakers": setup(breakers=3, processes=1),
    "three threads": setup(threads=3),
    "cold": setup(warm=False),
    "nobody watches": setup(watch=False),
    "two probes": setup(policy=TWO_PROBES),
    "no trip": setup(policy={"failure_threshold": 9}),
    "a rate": setup(policy=RATE),
    "slow calls": setup(policy=SLOW),
}
SEARCHES = {
    "two calls": Setup(calls=2, failures=2, times=0, repeated_hints=1),
    "time passes": Setup(calls=2, failures=1, times=1, watch=False),
    "three calls": Setup(calls=3, failures=2, times=0, watch=False, processes=1),
    "a switch": Setup(calls=3, failures=1, times=0, interrupts=1, processes=1),
    "a hint": Setup(calls=1, failures=1, times=1, lost_hints=1, repeated_hints=1, policy=(("failure_threshold", 1),)),
    "an outage": Setup(calls=2, failures=1, times=1, breaks=1, processes=1, late=1),
    "refused writes": Setup(calls=2, failures=1, times=1, refusals=1, processes=1),
    "probes": Setup(calls=2, failures=1, times=0, begins_open=True),
    "a reset": Setup(calls=2, failures=1, times=0, resets=1),
    "two breakers": Setup(calls=2, failures=1, times=0, breaks=1, breakers=2, processes=1),
}
LONG = {
    "calls": Setup(calls=3, failures=3, times=1),
    "time passes": Setup(calls=2, failures=2, times=3),
    "three threads": Setup(calls=4, failures=2, times=0, threads=3, interrupts=1, processes=1),
    "an outage": Setup(calls=3, failures=1, times=3, breaks=2, late=1, processes=1),
    "refused writes": Setup(calls=3, failures=1, times=2, refusals=1, breaks=1, processes=1),
    "probes": Setup(calls=3, failures=2, times=1, begins_open=True),
    "a reset": Setup(calls=2, failures=2, times=1, resets=1, lost_hints=1, repeated_hints=1),
    "two breakers": Setup(calls=3, failures=1, times=1, breaks=1, breakers=2, processes=1),
}


@pytest.mark.parametrize("bounds", SEARCHES.values(), ids=SEARCHES)
def test_no_state_breaks_a_rule(bounds: Setup) -> None:
    """Every state within the bounds keeps every rule, whatever is late, lost, refused or overtaken."""
    assert search(bounds, seconds=1).states > 50


@pytest.mark.parametrize("weather", WALKS.values(), ids=WALKS)
def test_no_walk_breaks_a_rule(weather: Setup) -> None:
    """Random schedules keep every rule, through outages and transitions, and end in agreement and silence."""
    found = walks(weather, count=40, steps=300, seconds=1)
    assert found.recoveries > 3
    assert found.transitions["closed > open"] > 0
    assert found.local_decisions > 10


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bounds", LONG.values(), ids=LONG)
def test_no_state_breaks_a_rule_for_long(bounds: Setup) -> None:
    """The same with more of everything, for at most a minute each."""
    found = search(bounds, seconds=60)
    assert found.states > 5000


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weather", WALKS.values(), ids=WALKS)
def test_no_walk_breaks_a_rule_for_long(weather: Setup) -> None:
    """Longer walks, for half a minute each."""
    assert walks(weather, count=100_000, steps=1000, first=1000, seconds=30).states > 10


# What the search would say of a client that is wrong --------------------------------------------------


def edited(method: Callable[..., Any], *edits: tuple[str, str]) -> Callable[..., Any]:
    """The method with other text in places; each place must be there once."""
    text = textwrap.dedent(inspect.getsource(method))
    for old, new in edits:
        assert text.count(old) == 1, f"{method.__qualname__} has no {old!r}: change the mutant with the code"
        text = text.replace(old, new)
    made: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + text, sys.modules[method.__module__].__dict__, made)
    return made[method.__name__]  # type: ignore[no-any-return]


ask_redis = BreakerCore._ask_redis


def asks_twice(breaker: BreakerCore, name: str, request: Any) -> Any:
    """Sends a report once more if the first exchange is lost."""
    try:
        return (yield from ask_redis(breaker, name, request))
    except REDIS_ERRORS:
        return (yield from ask_redis(breaker, name, request))


announce = Line.announce


def announces_all(line: Line, history: list[dict[str, Any]]) -> None:
    """Takes each transition for one of another process."""
    announce(line, [{**entry, "instance": "another"} for entry in history])


def never(*_: Any) -> bool:
    return False


LATER = "ended a later failure"
PROOF = setup(policy={"failure_threshold": 9}, threads=3)
MUTANTS: dict[str, tuple[str, Setup, Any, str, Any]] = {
    "reports what was read by the time of the report": (
        *(LATER, PROOF, View, "take"),
        (('["seen_failure"] = counter.proved', '["seen_failure"] = counter.read_number'),),
    ),
    "reads without a look": (LATER, PROOF, Successes, "read", (("self.look(now)", "pass"),)),
    "reports late as if at once": ("late report", WALK, _view, "JUST_NOW", 10.0),
    "waits for no report": (LATER, WALK, Link, "is_reporting", never),
    "adopts a reply of any earlier generation": (
        *("goes back to an earlier generation", WALK, View, "adopt"),
        (("if sent < since <= now and generation <=", "if sent < seen.sent and generation =="),),
    ),
    "adopts any reply of the generation": (
        *("goes back to an earlier reply", WALK, View, "adopt"),
        (("if sent < since <= now and generation <=", "if sent < since and generation <"),),
    ),
    "uses a view for four leases": (
        *("a view decides", WALK, BreakerCore, "_must_wait"),
        (("2 * lease + (link", "4 * lease + (link"),),
    ),
    "starts the open time anew with each read": (
        *("after its end", setup(policy={"failure_threshold": 1}), View, "extend"),
        (("seen.sent, seen.arrived =", "seen.retry_at += now - seen.arrived; seen.sent, seen.arrived ="),),
    ),
    "keeps no refusal": (
        *("asks again within its lease", setup(policy={"failure_threshold": 1}), Seen, "verdict"),
        (("if self.left(self.retry_at, now) > 0", 'if self.left(self.retry_at, now) > 0 and self.state == "open"'),),
    ),
    "lets all calls ask": (
        *("more calls of a process ask", setup(policy={"failure_threshold": 1}), BreakerCore, "_consult"),
        (("self._asking >= view.policy.half_open_max_calls", "False"),),
    ),
    "lets a read end an outage": (
        *("although Redis has executed no script", WALK, Link, "_take_reads"),
        (("undecided = []", "undecided = []; self._outages.clear()"),),
    ),
    "repeats the report of an exchange": (
        *("successes are counted twice", WALK, Link, "_receive"),
        (("if isinstance(error, ResponseError):", "if True:"),),
    ),
    "repeats the report of a call": ("is counted twice|while it is down", WALK, BreakerCore, "_ask_redis", asks_twice),
    "reports under the generation of another call": (
        *("another generation than theirs", WALK, View, "take"),
        (("generation is not None and generation != seen.generation", "False"),),
    ),
    "loses a refused report": (
        *("never reported", WALK, Link, "_receive"),
        (("if isinstance(error, ResponseError):", "if False:"),),
    ),
    "never decides for itself": ("while it is down|although Redis counts", WALK, Link, "engine", lambda *_: None),
    "does not return": ("does not count as down|has not returned", WALK, Line, "_return", lambda *_: None),
    "retries all the time": ("too soon", WALK, Outage, "is_due", lambda _: True),
    "tells its own transitions again": ("notified twice", WALK, Line, "announce", announces_all),
    "retries with all breakers at once": (
        *("too soon|one retry", setup(breakers=2), Outage, "claim"),
        (("due = self.is_due()", "due = True"),),
    ),
    "retries a refused breaker with its server and then again": (
        *("too soon", setup(breakers=2, processes=1), Link, "_retry_one"),
        (("line.refusal.failed_again()", "pass"),),
    ),
    "never rests": ("thread does not end", WALK, Line, "due", (("unused > IDLE", "False"),)),
    "ignores hints": ("disagrees", WALK, Link, "hint", (("self._hinted[line] = self.wanted = True", "pass"),)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_client_is_found(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    """A client without one of the rules breaks it on some walk, and the path there is told."""
    says, weather, owner, name, change = MUTANTS[mutant]
    changed = edited(getattr(owner, name), *change) if isinstance(change, tuple) else change
    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(Broken, match=says) as broken:
        walks(weather, count=400, steps=300)
    assert "\n" in str(broken.value)
