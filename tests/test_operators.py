"""Who acted on a breaker, and why: in snapshot, history and policy override, and in the arguments that say it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import redis
from conftest import wait_until
from test_holds import make, make_any, shell
from test_policies import LONG, STRICT, Make, fail, fine

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Policy, PolicyError

__all__ = ["make", "make_any", "shell"]  # fixtures
WHO = {"operator": "ann", "note": "moving the database, see https://wiki/7"}
ACTIONS = ("force_open", "force_closed", "clear_forced", "probe", "reset", "set_policy", "clear_policy")


def who(found: Any) -> dict[str, Any]:
    """Operator and note of a snapshot or a history entry."""
    return {"operator": found.operator, "note": found.note}


@pytest.mark.parametrize("action", ["force_open", "force_closed", "reset", "probe"])
def test_who_acted(make_any: Make, action: str) -> None:
    """The snapshot and the newest entry of the history say who acted and why, whatever holds the state."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=LONG), **STRICT)
    fail(breaker)
    assert who(breaker.snapshot()) == who(breaker.history()[0]) == {"operator": None, "note": None}
    getattr(breaker, action)(**WHO)
    assert who(breaker.snapshot()) == who(breaker.history()[0]) == WHO


def test_until_the_next_transition(make_any: Make) -> None:
    """A call that succeeds leaves the operator of a reset; a trip ends that, and the history keeps it."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=LONG), **STRICT)
    fail(breaker)
    breaker.reset(**WHO)
    breaker.call(fine)
    assert who(breaker.snapshot()) == WHO
    fail(breaker)
    assert who(breaker.snapshot()) == {"operator": None, "note": None}
    assert [entry.operator for entry in breaker.history()] == [None, "ann", None]


def test_the_end_of_a_forced_state(make_any: Make) -> None:
    """Who ends a forced state replaces who forced it; the history has an entry of each."""
    breaker = make_any(**STRICT)
    breaker.force_open(**WHO)
    breaker.clear_forced(operator="bob")
    assert who(breaker.snapshot()) == {"operator": "bob", "note": None}
    told = [(entry.old, entry.new, entry.reason, entry.operator) for entry in breaker.history()]
    assert told == [("open", "open", "clear_forced", "bob"), ("closed", "open", "forced", "ann")]


def test_who_set_the_policy(make_any: Make) -> None:
    """The policy override has an operator and a note of its own, until it ends."""
    breaker = make_any(**STRICT)
    breaker.call(fine)
    breaker.set_policy(reset_timeout=7, **WHO)
    seen = breaker.snapshot()
    assert (seen.policy.reset_timeout, seen.operator) == (7, None)
    assert (seen.override_operator, seen.override_note) == tuple(WHO.values())
    breaker.set_policy(failure_threshold=2)
    assert (breaker.snapshot().override_operator, breaker.snapshot().override_note) == (None, None)
    breaker.set_policy(failure_threshold=3, duration=60, operator="bob")
    assert breaker.snapshot().override_operator == "bob"
    breaker.clear_policy(**WHO)
    assert (breaker.snapshot().override_operator, breaker.snapshot().policy) == (None, Policy())


@pytest.mark.parametrize("action", ["reset", "set_policy"])
def test_views_go_on_without_scripts(make: Make, client: redis.Redis, action: str) -> None:
    """Who reset a breaker or set its policy makes no view more expensive: a process still reads it without a script."""
    breaker = make(lease=0.02, policy=Policy(failure_threshold=9))
    fail(breaker)
    getattr(breaker, action)(**WHO, **({"quorum": 2} if action == "set_policy" else {}))

    def called(command: str) -> int:
        return int(client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])

    def reads_alone() -> bool:
        scripts, reads = called("evalsha"), called("mget")
        wait_until(lambda: breaker.call(fine) and called("mget") > reads + 5)
        return called("evalsha") == scripts

    wait_until(reads_alone)  # not at once: the failure and pauses of this test cause scripts


def test_texts_of_any_kind(make_any: Make) -> None:
    """Long texts are cut, and letters that a terminal might obey are escaped."""
    breaker = make_any(**STRICT)
    breaker.force_open(operator="\u202eRen\u00e9\x1b[2J\n" + "x" * 500, note="n" * 500)
    seen = breaker.snapshot()
    assert (seen.operator, seen.note) == ((" Ren\\xe9 [2J " + "x" * 500)[:100], "n" * 200)
    breaker.reset(operator="", note="")
    assert who(breaker.snapshot()) == {"operator": None, "note": None}


@pytest.mark.parametrize("action", ACTIONS)
def test_texts_that_are_none(make_any: Make, action: str) -> None:
    """An operator that is no text is refused, and nothing changes."""
    breaker = make_any(**STRICT)
    breaker.call(fine)
    for odd in ({"operator": 7}, {"note": b"why"}):
        with pytest.raises(PolicyError, match="must be a text, or None"):
            getattr(breaker, action)(**odd, **({"quorum": 2} if action == "set_policy" else {}))
    assert (breaker.history(), breaker.snapshot().policy) == ([], Policy())


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_asks_who(action: str) -> None:
    """Both breakers take operator and note by keyword, for every action."""
    for kind in (CircuitBreaker, AsyncCircuitBreaker):
        given = inspect.signature(getattr(kind, action)).parameters
        for name in WHO:
            assert (given[name].kind, given[name].default) == (inspect.Parameter.KEYWORD_ONLY, None)


# The policy override in the history -----------------------------------------------------------------


def told(breaker: Any) -> list[tuple[Any, ...]]:
    """The actions on the policy override in the history, the oldest first: what, who, and which fields."""
    on_policy = (entry for entry in breaker.history()[::-1] if entry.old == entry.new)
    return [(entry.reason, entry.operator, entry.override) for entry in on_policy]


def test_who_set_and_who_cleared_it(make_any: Make) -> None:
    """Each action on the policy override has an entry: who, why, which fields, until when. It is no transition."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=LONG), **STRICT)
    fail(breaker)
    before, trip = breaker.snapshot(), breaker.history()[0]
    breaker.set_policy(reset_timeout=7.5, jitter=1 / 3, duration=60, **WHO)
    breaker.set_policy(error_rate_threshold=None, operator="bob")
    breaker.clear_policy(note="done")
    after = breaker.snapshot()
    assert (after.generation, after.changed_at, after.reason) == (before.generation, before.changed_at, before.reason)
    assert (after.operator, after.note) == (None, None)
    cleared, added, first, oldest = breaker.history()
    assert oldest == trip
    for entry, reason in ((first, "set_policy"), (added, "set_policy"), (cleared, "clear_policy")):
        assert (entry.old, entry.new, entry.generation, entry.reason) == ("open", "open", before.generation, reason)
        assert (entry.failure_count, entry.instance) == (1, trip.instance)
    assert (who(first), first.override) == (WHO, {"reset_timeout": 7.5, "jitter": 1 / 3})
    assert first.override_until == pytest.approx(first.time + 60)
    assert (added.operator, added.note, added.override) == ("bob", None, {"error_rate_threshold": None})
    assert (added.override_until, cleared.override_until) == (None, None)
    assert (cleared.operator, cleared.note) == (None, "done")
    assert cleared.override == {"reset_timeout": 7.5, "jitter": 1 / 3, "error_rate_threshold": None}
    assert list(cleared.override) == ["reset_timeout", "error_rate_threshold", "jitter"]  # in the order of Policy


def test_an_action_that_changes_no_policy(make_any: Make) -> None:
    """Fields that are in force already, with the same end, and a policy override that is not there: no entry."""
    breaker = make_any(**STRICT)
    breaker.clear_policy(operator="eve")
    breaker.set_policy(quorum=2, jitter=0.5, operator="ann")
    breaker.set_policy(jitter=0.5, operator="eve")
    assert (told(breaker), breaker.snapshot().override_operator) == (
        [("set_policy", "ann", {"quorum": 2, "jitter": 0.5})],
        "ann",
    )
    breaker.set_policy(jitter=0.5, duration=60, operator="bob")
    breaker.clear_policy(operator="cem")
    breaker.clear_policy(operator="eve")
    assert told(breaker)[1:] == [
        ("set_policy", "bob", {"jitter": 0.5}),
        ("clear_policy", "cem", {"quorum": 2, "jitter": 0.5}),
    ]


def test_a_policy_before_the_first_call(make_any: Make) -> None:
    """Where nothing is stored, the entry has generation 0, and the first call begins a generation of its own."""
    breaker = make_any(**STRICT)
    breaker.set_policy(quorum=2, **WHO)
    assert (breaker.snapshot().generation, [entry.generation for entry in breaker.history()]) == (0, [0])
    breaker.call(fine)
    breaker.clear_policy()
    assert [entry.generation for entry in breaker.history()] == [breaker.snapshot().generation, 0]
    assert {(entry.old, entry.new) for entry in breaker.history()} == {("closed", "closed")}


@pytest.mark.parametrize("tripped", [False, True])
def test_a_reset_names_the_policy_that_it_drops(make_any: Make, tripped: bool) -> None:
    """It has one entry, whether it drops the policy override alone or changes the state, too."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=LONG), **STRICT)
    breaker.call(fine)
    breaker.set_policy(probe_timeout=9)
    if tripped:
        fail(breaker)
    before = breaker.snapshot()
    breaker.reset(**WHO)
    newest, *_ = breaker.history()
    assert (newest.old, newest.new, newest.reason) == (before.state, "closed", "reset")
    assert (who(newest), newest.override) == (WHO, {"probe_timeout": 9.0})
    assert (newest.generation > before.generation) is tripped
    assert who(breaker.snapshot()) == (WHO if tripped else {"operator": None, "note": None})
    breaker.reset(operator="eve")
    assert breaker.history()[0] == newest or tripped


def test_listeners_are_not_told_of_a_policy(make_any: Make) -> None:
    """An action on the policy override notifies no listener: it is no transition."""
    events: list[Any] = []
    breaker = make_any(listeners=[events.append], **STRICT)
    breaker.call(fine)
    breaker.set_policy(quorum=2)
    breaker.clear_policy()
    breaker.set_policy(quorum=3)
    breaker.reset()
    assert (len(breaker.history()), events) == (4, [])


def test_a_strange_policy_in_the_history(make: Make, client: redis.Redis) -> None:
    """What another program wrote as the fields of a policy override is left out; the entry is there."""
    breaker = make(**STRICT)
    breaker.set_policy(quorum=2)
    ((_, entry),) = client.xrange(breaker.keys.history)
    for odd in ("", "x", "[]", '{"quorum":', '{"quorum":0,"nothing":1,"until_ms":"x"}', "[" * 60_000, b"\xff"):
        client.xadd(breaker.keys.history, {**entry, b"override": odd})
    assert {(found.override is None, found.override_until) for found in breaker.history()[:-1]} == {(True, None)}
    assert len(breaker.history()) == 8
    assert len(set(breaker.history())) > 0  # an entry can be a member of a set
