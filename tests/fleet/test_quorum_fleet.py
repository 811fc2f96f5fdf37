"""A hundred instances with a quorum: scattered failures and one sick host open nothing, a sick service does."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import fleet_workers
import pytest
import redis
from conftest import START_MS, on_frozen_clock, wait_until

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Event, Policy
from pybreaker_redis._protocol import decode, encode, keys_with
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import SCRIPTS

SIZE = 100
SICK = 17  # the number of the sick host
PROCESSES = 4
RULES: dict[str, Any] = {"failure_threshold": 5, "error_rate_threshold": 0.5, "quorum": 3}


class Boom(Exception):
    """What a call of the sick service raises."""


def boom() -> None:
    raise Boom


# On the clock of the tests -----------------------------------------------------------------------


class FrozenRedis:
    """What a breaker's own connection is otherwise: here the scripts run on the clock of the tests."""

    def __init__(self, client: redis.Redis, replaced: Any) -> None:
        self.client, self.link = client, replaced.link
        self.sha1 = {name: client.script_load(on_frozen_clock(name)) for name in SCRIPTS}

    def run(self, name: str, key: bytes, request: dict[str, Any]) -> dict[str, Any]:
        return decode(self.client.evalsha(self.sha1[name], 3, *keys_with(key.decode()), encode(request)))

    def history(self, key: bytes, count: int) -> list[dict[str, Any]]:
        found = self.client.xrevrange(keys_with(key.decode()).history, count=count)
        return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]

    def close(self) -> None:
        """The client is the test's."""


class SimulatedFleet:
    """A hundred real breakers whose scripts run on a clock that the test moves; each call asks."""

    window_ms = 10_000
    step_ms = 10  # between the calls of two instances: each calls once in a second, 10 times in a window

    def __init__(self, client: redis.Redis) -> None:
        self.client, self.now_ms = client, START_MS
        self.random = random.Random(4)
        self.events: dict[int, list[Event]] = {number: [] for number in range(SIZE)}
        self.breakers = [self.breaker(number) for number in range(SIZE)]
        self.tally: Counter[tuple[int, str]] = Counter()

    def breaker(self, number: int) -> CircuitBreaker:
        policy = Policy(**RULES, window=self.window_ms / 1000)
        breaker = CircuitBreaker(
            "fleet",
            redis=self.client,
            policy=policy,
            lease=0,
            listeners=[self.events[number].append],
            host=f"host-{number}",
        )
        breaker._redis = FrozenRedis(self.client, breaker._redis)
        return breaker

    def changes(self, number: int) -> list[tuple[Any, ...]]:
        """The transitions that this instance notified."""
        changes = (event for event in self.events[number] if event.kind == "state_change")
        return [(event.old, event.new, event.source) for event in changes]

    def run(self, milliseconds: int, percent: Callable[[int], float]) -> Iterator[int]:
        """Calls of all instances in turn for so long, of which these percentages fail; the time after each."""
        until = self.now_ms + milliseconds
        while self.now_ms < until:
            for number, breaker in enumerate(self.breakers):
                self.now_ms += self.step_ms
                self.client.set("test:now_ms", self.now_ms)
                fails = self.random.random() * 100 < percent(number)
                try:
                    breaker.call(boom if fails else int)
                except Boom:
                    self.tally[number, "failed"] += 1
                except CircuitOpenError:
                    self.tally[number, "rejected"] += 1
                else:
                    self.tally[number, "succeeded"] += 1
                yield self.now_ms

    def sum(self, kind: str) -> int:
        return sum(count for (_, what), count in self.tally.items() if what == kind)


@pytest.fixture
def simulated(client: redis.Redis) -> SimulatedFleet:
    """A healthy fleet."""
    return SimulatedFleet(client)


def test_scattered_failures_then_a_sick_service(simulated: SimulatedFleet) -> None:
    """With 1 % failures it stays closed for three windows; with 60 % it opens within one, for everybody."""
    for _ in simulated.run(3 * simulated.window_ms, lambda _: 1):
        pass
    breaker = simulated.breakers[0]
    assert breaker.history() == []
    assert simulated.sum("rejected") == 0
    assert 10 <= simulated.sum("failed") <= 60
    assert breaker.snapshot().calls >= 900

    began = simulated.now_ms
    open_at = next(now for now in simulated.run(simulated.window_ms, lambda _: 60) if breaker.history())
    simulated.tally.clear()
    for _ in simulated.run(SIZE * simulated.step_ms, lambda _: 60):
        pass
    entry = breaker.history()[0]
    print(f"open after {entry.time * 1000 - began:.0f} ms of 60 %, by {entry.reason}")
    assert (entry.old, entry.new) == ("closed", "open")
    assert entry.reason in ("failure_threshold", "error_rate")
    assert 0 < open_at - began <= simulated.window_ms
    assert simulated.tally == {(number, "rejected"): 1 for number in range(SIZE)}
    assert len(breaker.history()) == 1
    changes = [change for number in range(SIZE) for change in simulated.changes(number)]
    assert [change for change in changes if change[2] == "redis"] == [("closed", "open", "redis")]


def test_a_rate_only(simulated: SimulatedFleet) -> None:
    """Failures that never come five in a row open it by their rate, within one window of the change."""
    for _ in simulated.run(simulated.window_ms, lambda _: 1):
        pass
    began, turn = simulated.now_ms, [0]

    def four_of_five(_: int) -> float:
        turn[0] += 1
        return 100 if turn[0] % 5 else 0

    for _ in simulated.run(simulated.window_ms, four_of_five):
        if simulated.breakers[0].history():
            break
    entry = simulated.breakers[0].history()[0]
    print(f"open after {entry.time * 1000 - began:.0f} ms of 80 %, {entry.failures} of {entry.calls} calls")
    assert (entry.new, entry.reason) == ("open", "error_rate")
    assert entry.failures is not None
    assert entry.calls is not None
    assert entry.failures / entry.calls >= 0.5
    assert entry.time * 1000 - began <= simulated.window_ms


def test_one_sick_host(simulated: SimulatedFleet) -> None:
    """A host that fails every call isolates itself after five; the fleet stays closed, and rejects nobody else."""
    for _ in simulated.run(simulated.window_ms, lambda _: 1):
        pass
    before = simulated.sum("succeeded")
    simulated.tally.clear()
    for _ in simulated.run(2 * simulated.window_ms, lambda number: 100 if number == SICK else 1):
        pass
    sick = simulated.breakers[SICK]
    assert sick.snapshot().isolated
    assert simulated.tally[SICK, "failed"] in (4, 5)  # the fifth in a row may follow one of the scattered failures
    assert simulated.tally[SICK, "rejected"] + simulated.tally[SICK, "failed"] == 20
    assert simulated.changes(SICK) == [("closed", "open", "isolated")]

    others = [number for number in range(SIZE) if number != SICK]
    assert not any(simulated.breakers[number].snapshot().isolated for number in others)
    assert not any(simulated.tally[number, "rejected"] or simulated.changes(number) for number in others)
    assert simulated.sum("succeeded") > 1.9 * before  # twice as long
    assert simulated.breakers[0].history() == []
    assert simulated.breakers[0].snapshot().state == "closed"


# As processes ------------------------------------------------------------------------------------


class RealFleet:
    """Four processes of 25 instances each, all calling."""

    policy = Policy(**RULES, window=2.0, reset_timeout=30.0)

    def __init__(self, url: str, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.lines, self.processes = [], []
        self.watcher = CircuitBreaker(name, redis=url, policy=self.policy, redis_timeout=30.0)
        for number in range(PROCESSES):
            ours, theirs = context.Pipe()
            args = (theirs, url, name, self.policy, range(number, SIZE, PROCESSES))
            self.processes.append(context.Process(target=fleet_workers.serve, args=args, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.lines.append(ours)

    def say(self, percent: dict[int, int]) -> None:
        """Who fails how often from now on."""
        for line in self.lines:
            line.send(percent)

    def reports(self) -> dict[int, dict[str, Any]]:
        """What became of the calls of each instance so far."""
        for line in self.lines:
            line.send("report")
        found = {}
        for line in self.lines:
            assert line.poll(60), "a process does not answer"
            for one in line.recv():
                assert isinstance(one, dict), one
                found[one["number"]] = one
        return found

    def close(self) -> None:
        for line in self.lines:
            with contextlib.suppress(OSError):
                line.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


@pytest.fixture
def real(own_server: EmbeddedServer) -> Iterator[RealFleet]:
    """A fleet of processes whose instances have all called, with 1 % failures."""
    fleet = RealFleet(own_server.url, "fleet")
    try:
        wait_until(lambda: all(one.get("succeeded") for one in fleet.reports().values()))
        yield fleet
    finally:
        fleet.close()


def calls(one: dict[str, Any]) -> int:
    """Calls that an instance let through."""
    return one.get("succeeded", 0) + one.get("failed", 0)


def more(fleet: RealFleet, count: int, skipped: int | None = None) -> Callable[[], bool]:
    """A condition: every instance (but one) has made so many calls more."""
    before = {number: calls(one) for number, one in fleet.reports().items()}
    return lambda: all(
        calls(one) >= before[number] + count for number, one in fleet.reports().items() if number != skipped
    )


def server_ms(client: redis.Redis) -> float:
    seconds, microseconds = client.time()
    return seconds * 1000 + microseconds / 1000


def test_processes(real: RealFleet, own_server: EmbeddedServer) -> None:
    """A hundred instances in four processes: closed at 1 %, one sick host isolates itself, and 60 % opens for all."""
    with redis.Redis.from_url(own_server.url) as client:
        wait_until(more(real, 40), 60)
        assert real.watcher.history() == []
        assert real.watcher.snapshot().failures > 0
        healthy = real.reports()
        assert not any(one.get("rejected") or one["isolated"] for one in healthy.values())
        assert {one["source"] for one in healthy.values()} == {"redis"}

        real.say({SICK: 100})
        wait_until(lambda: real.reports()[SICK].get("rejected", 0) >= 5)
        wait_until(more(real, 20, skipped=SICK), 60)
        reports = real.reports()
        assert [number for number, one in reports.items() if one["isolated"]] == [SICK]
        assert [number for number, one in reports.items() if one.get("rejected")] == [SICK]
        assert real.watcher.history() == []
        assert real.watcher.snapshot().state == "closed"

        began = server_ms(client)
        real.say(dict.fromkeys(range(SIZE), 60))
        wait_until(lambda: real.watcher.snapshot().state == "open")
        wait_until(lambda: all(one.get("rejected") for one in real.reports().values()))
        history = real.watcher.history()
        delay = history[0].time * 1000 - began
        print(f"open {delay:.0f} ms after the order to fail, by {history[0].reason}")
        assert [(entry.old, entry.new) for entry in history] == [("closed", "open")]
        assert history[0].reason in ("failure_threshold", "error_rate")
        assert delay <= real.policy.window * 1000
