"""Two versions of the scripts on one server at once: during a rolling upgrade both work on the same documents.

The other version is a copy of the scripts with one comment changed, so that it has other SHAs and nothing else.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import redis
from conftest import wait_until

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis._protocol import Keys, keys_of
from pybreaker_redis.wire.scripts import SCRIPTS, compose

Run = Callable[..., dict[str, Any]]
PATIENT: dict[str, Any] = {"lease": 0, "redis_timeout": 20.0}


def old_script(name: str) -> str:
    """What a process of the other version loads."""
    return compose(name).replace("--[[\n", "--[[ The other version.\n", 1)


def runner(client: redis.Redis, keys: Keys, text_of: Callable[[str], str], instance: str) -> Run:
    """Runs the scripts of one version on one breaker."""

    def run(name: str, **request: Any) -> dict[str, Any]:
        text = json.dumps({**request, "instance": instance})
        return json.loads(client.eval(text_of(name), 3, *keys, text))

    return run


@pytest.fixture
def old(client: redis.Redis) -> Run:
    """A process that has not been upgraded yet."""
    return runner(client, keys_of("discovery"), old_script, "old")


def test_the_versions_are_two() -> None:
    """Each script of the other version has a text, and so a SHA, of its own."""
    assert all(old_script(name) != compose(name) for name in SCRIPTS)


def boom() -> None:
    raise ArithmeticError


def fail(breaker: CircuitBreaker) -> None:
    with pytest.raises(ArithmeticError):
        breaker.call(boom)


def test_both_count_in_one_row(client: redis.Redis, old: Run) -> None:
    """Failures of both versions add up, and either sees the trip that the other one made."""
    policy, request = Policy(failure_threshold=4, reset_timeout=3600), {"failure_threshold": 4}
    breaker = CircuitBreaker("discovery", redis=client, policy=policy, **PATIENT)
    for _ in range(2):
        generation = old("acquire")["generation"]
        old("record", generation=generation, failures=1, policy=request)
        fail(breaker)
    assert breaker.state == "open"
    refused = old("acquire", policy=request)
    assert (refused["admitted"], refused["state"]) == (False, "open")
    assert 3_500_000 < refused["retry_after_ms"] <= 3_600_000


def test_the_old_one_trips_and_the_new_one_recovers(client: redis.Redis, old: Run) -> None:
    """A trip of the old version is recovered by a probe of the new one, which the old one may not double."""
    policy, request = Policy(failure_threshold=1, reset_timeout=0.001), {"failure_threshold": 1, "reset_timeout_ms": 1}
    breaker = CircuitBreaker("discovery", redis=client, policy=policy, **PATIENT)
    tripped = old("record", generation=old("acquire")["generation"], failures=1, policy=request)
    assert tripped["transition"]["to"] == "open"
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    probe = breaker.acquire()
    assert old("acquire", policy=request)["admitted"] is False
    assert breaker.snapshot().probes_in_flight == old("snapshot", policy=request)["probes_in_flight"] == 1
    probe.success()
    assert old("snapshot")["state"] == breaker.state == "closed"


def test_the_new_one_trips_and_the_old_one_recovers(client: redis.Redis, old: Run) -> None:
    """The other way round."""
    policy, request = Policy(failure_threshold=1, reset_timeout=0.001), {"failure_threshold": 1, "reset_timeout_ms": 1}
    breaker = CircuitBreaker("discovery", redis=client, policy=policy, **PATIENT)
    fail(breaker)
    admitted = wait_until(lambda: (reply := old("acquire", policy=request))["admitted"] and reply)
    with pytest.raises(CircuitOpenError):
        breaker.acquire()
    closed = old("record", generation=admitted["generation"], probe=admitted["probe"], successes=1, policy=request)
    assert closed["transition"]["to"] == "closed"
    assert breaker.call(int) == 0
    assert [entry.instance for entry in breaker.history()] == ["old", "old", breaker.instance]


def test_a_straggler_of_the_other_version_changes_nothing(client: redis.Redis, old: Run) -> None:
    """Generations are one sequence for both."""
    breaker = CircuitBreaker("discovery", redis=client, policy=Policy(failure_threshold=1), **PATIENT)
    generation, permit = old("acquire")["generation"], breaker.acquire()
    old("record", generation=generation, failures=1)
    breaker.reset()
    assert old("record", generation=generation, failures=5)["applied"] is False
    permit.failure()
    assert (breaker.state, breaker.snapshot().failure_count) == ("closed", 0)


def test_overrides_hold_for_both(client: redis.Redis, old: Run) -> None:
    """An operator's command by either version stops both."""
    breaker = CircuitBreaker("discovery", redis=client, **PATIENT)
    breaker.force_open(60)
    assert old("acquire")["forced"] == "open"
    old("control", action="clear_forced")
    assert breaker.snapshot().forced is None
    old("control", action="force_open", duration_ms=60_000)
    with pytest.raises(CircuitOpenError):
        breaker.call(int)


def test_both_keep_the_window_and_obey_the_override(client: redis.Redis, old: Run) -> None:
    """A write of either version keeps the window of the other, and both obey one policy override."""
    policy = Policy(failure_threshold=10, error_rate_threshold=0.9, minimum_calls=10)
    breaker = CircuitBreaker("discovery", redis=client, policy=policy, **PATIENT)
    fail(breaker)
    fail(breaker)
    breaker.set_policy(failure_threshold=4)
    assert breaker.snapshot().calls == 2
    reported = old("record", generation=old("acquire")["generation"], failures=1, policy=policy._to_request())
    assert (reported["state"], reported["failure_count"]) == ("closed", 3)
    assert (breaker.snapshot().calls, breaker.snapshot().failure_count) == (3, 3)
    reported = old("record", generation=old("acquire")["generation"], failures=1, policy=policy._to_request())
    assert (reported["state"], breaker.snapshot().state) == ("open", "open")


@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_of_both(client: redis.Redis, seed: int) -> None:
    """Whoever acts, nothing errs or is taken for corrupt, generations grow, slots stay exact, and the history links."""
    chance = random.Random(seed)
    keys = keys_of("discovery")
    versions = [runner(client, keys, old_script, "old"), runner(client, keys, compose, "new")]
    policy: dict[str, Any] = {"failure_threshold": 3, "reset_timeout_ms": 1, "half_open_max_calls": 2}
    permits: list[dict[str, Any]] = []
    generation = 0
    for _ in range(150):
        run = chance.choice(versions)
        action = chance.choice(["acquire", "acquire", "success", "failure", "failure", "control"])
        if action == "acquire":
            reply = run("acquire", policy=policy)
            if reply["admitted"]:
                permits.append(reply)
        elif action == "control" and chance.random() < 0.2:
            reply = run("control", action=chance.choice(["reset", "force_open", "clear_forced"]), policy=policy)
        elif permits and action != "control":
            permit = permits.pop(chance.randrange(len(permits)))
            outcome = {"successes": 1} if action == "success" else {"failures": 1}
            probe = {"probe": permit["probe"]} if "probe" in permit else {}
            reply = run("record", generation=permit["generation"], policy=policy, **outcome, **probe)
        else:
            continue
        assert "warning" not in reply
        assert reply["generation"] >= generation
        generation = reply["generation"]
        slots = {version("snapshot", policy=policy)["probes_in_flight"] for version in versions}
        assert len(slots) == 1
        assert slots.pop() <= 2
    history = CircuitBreaker("discovery", redis=client, **PATIENT).history(1000)
    assert {entry.instance for entry in history} == {"old", "new"}
    for newer, older in itertools.pairwise(history):
        assert newer.old == older.new
        assert newer.generation > older.generation or newer.old == newer.new
