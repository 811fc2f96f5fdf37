"""The races of slow calls that still run, live policy, isolation and subscriptions."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from conftest import wait_until
from race_workers import interrupted_at, make_stale

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event, Policy

THREADS = 16
SLOW = Policy(slow_call_duration=0.002, slow_call_rate_threshold=1.0, minimum_calls=10**9, failure_threshold=10**9)
ISOLATED = Policy(failure_threshold=3, quorum=2, reset_timeout=0.02, half_open_max_calls=1)


class Boom(Exception):
    """What a guarded function raises."""


def fail() -> None:
    """A dead service."""
    raise Boom


def in_threads(work: Callable[[int], Any]) -> None:
    """Runs work(n) in THREADS threads at once; an exception in one fails the test."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def run(n: int) -> None:
        barrier.wait()
        try:
            work(n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_a_call_that_ends_while_it_is_found_slow_counts_once(client: redis.Redis) -> None:
    """Calls end at just the time at which others report them as slow: each is one call, and at most one slow call."""
    breaker = CircuitBreaker("discovery", redis=client, policy=SLOW, lease=0.001)
    ended = [[0, 0, 0] for _ in range(THREADS)]

    def work(n: int) -> None:
        rng = random.Random(n)
        for _ in range(60):
            length = rng.choice([0, 0, 0.0015, 0.002, 0.004])
            failing = rng.random() < 0.3
            with contextlib.suppress(Boom):
                breaker.call(_call, length, failing)
            ended[n][0] += 1
            ended[n][1] += failing
            ended[n][2] += length >= 0.002  # one that sleeps less may be slow all the same on a busy machine

    in_threads(work)
    breaker.flush()
    seen = breaker.snapshot()
    calls, failures, slow = (sum(counts) for counts in zip(*ended, strict=True))
    assert (seen.calls, seen.failures) == (calls, failures)
    assert slow <= seen.slow <= calls
    assert seen.slow < calls or slow == calls


def _call(length: float, failing: bool) -> None:
    time.sleep(length)
    if failing:
        raise Boom


@pytest.mark.parametrize(("interrupted", "failing"), [("report", True), ("end", False)])
def test_a_call_that_ends_at_any_line_of_its_report_counts_once(interrupted: str, failing: bool) -> None:
    """A call ends at each line of the report that finds it slow, and the reverse: it is one call and one slow call."""
    policy = dataclasses.replace(SLOW, slow_call_duration=10.0)
    for line in itertools.count():
        breaker = CircuitBreaker("discovery", policy=policy, lease=60.0)
        breaker.call(int)
        permit = breaker.acquire().__enter__()
        permit.started -= 20.0
        make_stale(breaker, 1.2)  # and not beyond the window
        report = functools.partial(breaker.call, int)
        end = permit.failure if failing else functools.partial(permit.__exit__, None, None, None)
        reached = interrupted_at(line, *((report, end) if interrupted == "report" else (end, report)))
        if not reached:
            if not permit.settled:
                permit.release()
            break
        breaker.flush()
        seen = breaker.snapshot()
        assert (seen.calls, seen.failures, seen.slow) == (3, failing, 1), f"line {line}"
    assert line > 20


def test_tasks_that_end_while_they_are_found_slow_count_once(client: redis.Redis) -> None:
    """The same with 500 tasks of one loop."""
    url = "unix://" + client.connection_pool.connection_kwargs["path"]
    breaker = AsyncCircuitBreaker("discovery", redis=url, policy=SLOW, lease=0.005)

    async def call(n: int) -> int:
        with contextlib.suppress(Boom):
            await breaker.call(_acall, n % 7 / 1000, n % 5 == 0)
        return 1

    async def main() -> Any:
        ended = sum(await asyncio.gather(*(call(n) for n in range(500))))
        await breaker.flush()
        seen = await breaker.snapshot()
        await breaker.close()
        return ended, seen

    ended, seen = asyncio.run(main())
    assert (seen.calls, seen.failures) == (ended, 100)
    assert seen.slow >= 500 * 5 // 7 - 5


async def _acall(length: float, failing: bool) -> None:
    await asyncio.sleep(length)
    if failing:
        raise Boom


def test_a_slow_call_in_flight_is_reported_once(client: redis.Redis) -> None:
    """However many threads refresh at once, a call that hangs is one slow call, before and after it returns."""
    breaker = CircuitBreaker("discovery", redis=client, policy=SLOW, lease=0.001)
    release = threading.Event()
    hung = threading.Thread(target=breaker.call, args=(release.wait,))
    hung.start()
    wait_until(lambda: breaker._slow_calls._running)
    in_threads(lambda _: [breaker.call(int) for _ in range(50)])
    wait_until(lambda: breaker.call(int) == 0 and breaker.snapshot().slow >= 1)
    before = breaker.snapshot()
    release.set()
    hung.join()
    breaker.flush()
    after = breaker.snapshot()
    assert after.slow == before.slow
    assert after.calls >= before.calls


def test_policies_change_under_load(client: redis.Redis) -> None:
    """While an operator sets and clears policies, no call fails, and what was set last is what holds for everybody."""
    breakers = [CircuitBreaker("discovery", redis=client, policy=Policy(failure_threshold=10**9)) for _ in range(4)]
    operator = CircuitBreaker("discovery", redis=client)

    def work(n: int) -> None:
        for turn in range(100):
            if n == 0 and turn % 10 == 0:
                operator.set_policy(
                    failure_threshold=10**9, error_rate_threshold=1.0, window=1 + turn, slow_call_duration=1.0
                )
            elif n == 1 and turn % 20 == 0:
                operator.clear_policy()
            with contextlib.suppress(Boom):
                breakers[n % 4].call(fail if turn % 3 == 0 else int)

    in_threads(work)
    assert operator.snapshot().state == "closed"
    operator.reset()  # all threads end by a failure: with those below, they could be the seven in a row
    operator.set_policy(failure_threshold=7, slow_call_duration=5)
    for breaker in breakers:
        with contextlib.suppress(Boom):
            breaker.call(fail)
        assert (breaker._view.policy.failure_threshold, breaker._view.policy.slow_call_duration) == (7, 5)
    assert breakers[0].snapshot().state == "closed"


def test_threads_of_an_isolated_instance(client: redis.Redis) -> None:
    """All threads of the only instance that fails share its isolation: one probe at a time, one notice per change."""
    events: list[Event] = []
    breaker = CircuitBreaker("discovery", redis=client, policy=ISOLATED, listeners=[events.append])
    healthy = CircuitBreaker("discovery", redis=client, policy=ISOLATED)
    running, most = [0], [0]
    lock = threading.Lock()

    def probe() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.001)
        with lock:
            running[0] -= 1
        raise Boom

    for _ in range(3):
        with contextlib.suppress(Boom):
            breaker.call(fail)
    assert breaker.snapshot().isolated

    def work(_: int) -> None:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            with contextlib.suppress(Boom, CircuitOpenError):
                breaker.call(probe)
            time.sleep(0.0005)

    in_threads(work)
    assert most[0] == 1
    assert healthy.call(int) == 0
    assert healthy.snapshot().state == "closed"
    changes = [event for event in events if event.kind == "state_change"]
    assert {event.source for event in changes} == {"isolated"}
    assert all(one.new == other.old for one, other in itertools.pairwise(changes))
    time.sleep(0.03)
    assert breaker.call(int) == 0
    assert not breaker.snapshot().isolated


def test_join_and_leave_at_once(client: redis.Redis) -> None:
    """However breakers begin and end to watch, the last that joined is served, by one subscription."""
    breakers = [CircuitBreaker(f"service {n}", redis=client) for n in range(THREADS)]

    def work(n: int) -> None:
        for _ in range(30):
            breakers[n].watch().close()
        breakers[n].watch()

    in_threads(work)
    watches = [breaker._watch for breaker in breakers]
    wait_until(lambda: all(watch.active for watch in watches))  # type: ignore[union-attr]
    wait_until(lambda: len(client.client_list(_type="pubsub")) == 1)
    CircuitBreaker("service 9", redis=client).force_open(60)
    wait_until(lambda: breakers[9].state == "open")
    for watch in watches:
        watch.close()  # type: ignore[union-attr]


def test_messages_amid_replies(client: redis.Redis) -> None:
    """While others trip and reset all the time, a watcher's view ends at what is stored, whatever came first."""
    breaker = CircuitBreaker("discovery", redis=client, policy=Policy(failure_threshold=1, reset_timeout=60))
    others = [CircuitBreaker("discovery", redis=client, policy=breaker.policy, lease=0) for _ in range(THREADS)]
    with breaker.watch() as watch:
        wait_until(lambda: watch.active)

        def work(n: int) -> None:
            for turn in range(30):
                if n % 4 == 0:
                    with contextlib.suppress(CircuitOpenError):
                        breaker.call(int)
                elif (n + turn) % 2:
                    with contextlib.suppress(Boom, CircuitOpenError):
                        others[n].call(fail)
                else:
                    others[n].reset()

        in_threads(work)
        stored = others[0].snapshot()
        wait_until(lambda: breaker._view.seen.generation == stored.generation)
        assert breaker._view.seen.state == stored.state


def test_many_instances_that_are_told_to_come_back_later(client: redis.Redis) -> None:
    """They report their holds at once: one transition, notified to one caller, and the longest of them lasts."""
    events: list[Event] = []
    breakers = [CircuitBreaker("discovery", redis=client, listeners=[events.append]) for _ in range(THREADS)]
    permits = [breaker.acquire() for breaker in breakers]
    in_threads(lambda n: permits[n].failure(retry_after=100 + n))
    assert [(one.old, one.new, one.reason) for one in events] == [("closed", "open", "held")]
    assert [entry.reason for entry in breakers[0].history()] == ["held"]
    left = breakers[0].snapshot().retry_after
    assert left is not None
    assert 100 + THREADS - 60 < left <= 100 + THREADS - 1
    document = json.loads(client.get(breakers[0].keys.state))
    assert document["open_ms"] >= 1000 * (100 + THREADS - 1)
