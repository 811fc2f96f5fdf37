"""One process, one line to Redis: what users ran into, each as a test of the public API on real servers.

    A1   test_one_outage*                     20 breakers on one client wait, warn and retry once when the server hangs
    A2   test_one_bad_process_trips_nobody    8 healthy processes and one whose calls all fail: no trip, threshold 5
    A3   the same with "rate"                 and none by an error rate of 0.5
    A4   test_old_successes_hide_no_failures  200 good calls, silence, then every second call fails: trips at call 20
    A5   test_a_dead_service_*                the service dies for a fleet: 5 failures, and at most one per instance
    A7   test_healthy_*_wait_for_no_refresh   threads, or 1,000 tasks, that call while the server hangs do not wait
    A14  test_a_hanging_probe                 refusals in half open cost one script per lease, not one each
    A15  test_a_hundred_breakers*             100 healthy breakers cost 12 exchanges a second, whatever their load
         test_writes_refused                  while the server refuses writes, the process opens for itself

The situations are in benchmarks/link_fleet.py, and benchmarks/link.py prints their figures. Here the bounds are ones
that a slow and shared machine meets: counts, and waits far below redis_timeout. The long forms have larger fleets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import link_fleet
import pytest
from conftest import stopped, wait_until
from link_fleet import OneBad

from pybreaker_redis import CircuitBreaker
from pybreaker_redis._line import Line
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.commands import Command
from pybreaker_redis.wire.sync import Connections

LEASE = 0.1  # the default
HANGS = {False: 1.5, True: 2.5}  # seconds, by whether it watches: a subscription notices a hang after two
long = pytest.mark.long


@pytest.fixture
def target() -> Iterator[EmbeddedServer]:
    """A server of the test's own."""
    with EmbeddedServer() as started:
        yield started


# An outage belongs to the server ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("breakers", "by_url"),
    [(10, False), pytest.param(40, False, marks=long), pytest.param(40, True, marks=long)],
)
def test_one_outage(target: EmbeddedServer, breakers: int, by_url: bool) -> None:
    """The breakers of one client, or one URL, share a wait, a warning and a retry, and all return to Redis."""
    timeout = 0.5
    found = link_fleet.one_outage(target, breakers=breakers, by_url=by_url, redis_timeout=timeout, calls_on=1.2)
    assert found["warnings"] == 1
    assert found["waited"] + found["waited_later"] < 3 * timeout
    assert found["threads"] <= 2  # that of the link, and that of its attempt to connect
    assert found["connections"] <= 2 + found["hung_for"] / timeout  # retries one after the other
    assert found["back"]
    assert found["warnings_after"] == 1  # Redis answers again


@pytest.mark.parametrize("breakers", [10, pytest.param(40, marks=long)])
def test_one_outage_of_an_event_loop(target: EmbeddedServer, breakers: int) -> None:
    """The same for the breakers of one asyncio client."""
    found = asyncio.run(link_fleet.one_outage_async(target, breakers=breakers, redis_timeout=0.5))
    assert found["warnings"] == 1
    assert found["waited"] < 1.5


@pytest.mark.parametrize("watch", [False, pytest.param(True, marks=long)], ids=["lease", "watch"])
def test_healthy_threads_wait_for_no_refresh(target: EmbeddedServer, watch: bool) -> None:
    """While the server hangs, a call that needs nothing from it takes its usual time: none comes near redis_timeout."""
    found = link_fleet.calls_while_hung(target, watch=watch, hangs=HANGS[watch], redis_timeout=1.0, warm=0.3)
    assert found["calls"] > 100
    assert found["max_ms"] < 500
    assert found["p99_ms"] < 100


@pytest.mark.parametrize("watch", [False, pytest.param(True, marks=long)], ids=["lease", "watch"])
def test_healthy_tasks_wait_for_no_refresh(target: EmbeddedServer, watch: bool) -> None:
    """Nor does one of 1,000 tasks."""
    found = asyncio.run(
        link_fleet.tasks_while_hung(target, watch=watch, hangs=HANGS[watch], redis_timeout=1.0, warm=0.3)
    )
    assert found["calls"] > 1000
    assert found["max_ms"] < 500
    assert found["p99_ms"] < 100


# A trip comes from failures -----------------------------------------------------------------------

SHORT = [OneBad("manager", rule, seconds=2.0) for rule in ("threshold", "rate")]
LONG = [
    OneBad(client, rule, healthy, bad_rate=rate, late=late)
    for rule in ("threshold", "rate")
    for healthy, late in ((8, 1.0), (30, 5.0))
    for client, rate in (("manager", 10), ("manager", 50), ("watch", 10), ("watch", 50), ("plain", 10))
]


def _name(case: OneBad) -> str:
    return f"{case}, for {case.seconds:g} s"


@pytest.mark.parametrize("case", [*SHORT, *(pytest.param(case, marks=long) for case in LONG)], ids=_name)
def test_one_bad_process_trips_nobody(target: EmbeddedServer, case: OneBad) -> None:
    """A process that fails at every call, among healthy ones that call far more often, opens nobody's circuit."""
    found = link_fleet.one_bad_process(target, case)
    assert found["failed"] >= case.bad_rate  # it did call
    assert (found["trips"], found["rejected"]) == (0, 0)


@pytest.mark.parametrize("pause", [0.0, 0.005], ids=["at-once", "200-a-second"])
@pytest.mark.parametrize("where", ["redis", "memory"])
def test_old_successes_hide_no_failures(target: EmbeddedServer, where: str, pause: float) -> None:
    """Successes from before a silence of three windows do not count against the failures after it."""
    url = target.url if where == "redis" else None
    assert link_fleet.calls_until_trip(url, window=0.4, pause=pause, most=100) == 20


@pytest.mark.parametrize("processes", [4, pytest.param(16, marks=long)])
def test_a_dead_service_that_is_called_rarely(target: EmbeddedServer, processes: int) -> None:
    """A fleet whose service dies is rejected after the threshold and the few calls that were under way."""
    found = link_fleet.failures_until_rejection(target, rate=1.0, processes_of=processes, healthy=1.5)
    assert found["failures"] <= 12
    assert found["never"] == 0


@pytest.mark.parametrize("processes", [4, pytest.param(16, marks=long)])
def test_a_dead_service_that_is_called_all_the_time(target: EmbeddedServer, processes: int) -> None:
    """However busy its instances are, each fails once more at the most."""
    found = link_fleet.failures_until_rejection(target, rate=50.0, processes_of=processes, healthy=1.5)
    assert found["failures"] <= 5 + found["instances"]
    assert found["never"] == 0


# Work does not grow -------------------------------------------------------------------------------


def test_a_hanging_probe(target: EmbeddedServer) -> None:
    """Refusals in half open cost one script per lease, however many they are."""
    found = link_fleet.rejections_in_half_open(target, seconds=1.5, rejections=1_000, most=3.0)
    assert found["rejections"] >= 1_000
    assert found["scripts"] <= found["seconds"] / LEASE + 3
    assert found["closed"]  # as soon as the probe has ended


@pytest.mark.parametrize("rate", [pytest.param(1, marks=long), 10])
def test_a_hundred_breakers(target: EmbeddedServer, rate: float) -> None:
    """The breakers of one process are refreshed together: 12 exchanges a second."""
    found = link_fleet.exchanges_of_many(target, rate=rate, seconds=1.5)
    assert 1 <= found["exchanges_per_second"] <= 12


def sizes_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many commands each pipeline has, from here on."""
    sent: list[int] = []
    send = Connections.send

    def noted(self: Connections, commands: Sequence[Command], *left: float) -> list[Any]:
        sent.append(len(commands))
        return send(self, commands, *left)

    monkeypatch.setattr(Connections, "send", noted)
    return sent


def test_first_calls_of_many_breakers(target: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange for which a call waits is not for all breakers: 300 tenants cost little more than 300 times one."""
    looked_at: list[Line] = []
    due = Line.due

    def noted(line: Line, *given: Any) -> Any:
        looked_at.append(line)
        return due(line, *given)

    monkeypatch.setattr(Line, "due", noted)
    breakers = [CircuitBreaker(f"tenant-{number}", redis=target.url, lease=3600) for number in range(300)]
    for breaker in breakers:
        breaker.call(int)
    assert len(looked_at) < 20 * len(breakers)
    assert {one.breaker.name for one in looked_at} == {breaker.name for breaker in breakers}


def test_breakers_that_were_first_called_at_different_times(
    target: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come to share their exchanges: those of a process do not grow with the number of its breakers."""
    sent = sizes_sent(monkeypatch)
    breakers = [CircuitBreaker(f"late-{number}", redis=target.url, lease=LEASE) for number in range(10)]
    # each is first called when the others were read so short a time ago that its own exchange does not read them
    starts = [number * (2 * LEASE + 0.004) + 0.6 * LEASE for number in range(10)]
    began, counts_from = time.monotonic(), None
    while (now := time.monotonic() - began) < starts[-1] + 2.5:
        if counts_from is None and now > starts[-1] + 0.5:
            counts_from = len(sent)
        for breaker, start in zip(breakers, starts, strict=True):
            if now >= start:
                breaker.call(int)
        time.sleep(0.002)
    assert counts_from is not None
    assert 1 < len(sent) - counts_from <= 2 * 12 + 2


def test_an_exchange_in_parts(target: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of breakers are refreshed part by part, so that an event loop does other work meanwhile. A server that
    hangs is waited for once."""
    monkeypatch.setattr("pybreaker_redis.wire.link.REFRESHED_AT_ONCE", 10)
    sent = sizes_sent(monkeypatch)
    breakers = [CircuitBreaker(f"tenant-{number}", redis=target.url) for number in range(35)]
    for breaker in breakers:
        breaker.call(int)
    asked = time.monotonic()
    wait_until(lambda: breakers[0].call(int) or all(breaker._view.seen.sent >= asked for breaker in breakers))
    with stopped(target):
        sent.clear()
        wait_until(lambda: breakers[0].call(int) or breakers[0]._redis.link.outage(breakers[0]._line))
        assert len(sent) == 1


@long
def test_a_hundred_breakers_report_to_a_window() -> None:
    """With an error rate, each reports once per tenth of a warm window, and little more often if calls fail."""
    window = 10.0
    with EmbeddedServer() as healthy, EmbeddedServer() as failing:
        cases = [(healthy, 10.0, 0.0), (failing, 10.0, 0.001)]
        found = link_fleet.reports_of_many(cases, warm=1.2 * window, seconds=window, window=window)
    due = 100 / (window / 10)
    assert found[0]["scripts_per_second"] <= 1.2 * due
    assert found[1]["scripts_per_second"] <= 2.4 * due


@long
def test_a_refresh_costs_the_server_little(target: EmbeddedServer) -> None:
    """Refreshing 100 healthy breakers costs the server about one MGET of their keys."""
    assert link_fleet.refresh_cost(target, rounds=5)["ratio"] < 3


# A server that refuses writes ---------------------------------------------------------------------


@pytest.mark.parametrize("how", link_fleet.REFUSALS)
def test_writes_refused(target: EmbeddedServer, how: str) -> None:
    """Failures that Redis cannot count open the circuit of their process, until Redis can count again."""
    found = link_fleet.writes_refused(target, how)
    assert found["opened_by"] == "local"
    assert found["failures"] == 3
    assert found["stayed"], "reads alone ended the outage"
    assert found["back"]
    assert found["trips"]
