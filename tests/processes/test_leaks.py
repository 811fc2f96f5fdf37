"""What many breakers, loops, watches and probes leave behind: nothing."""

from __future__ import annotations

import pytest
import redis
from programs import run

from pybreaker_redis.embedded import EmbeddedServer

JOBS = {  # how often: in every run, in a long one
    "breakers": (1_000, 10_000),
    "async_breakers": (500, 10_000),
    "clients": (0, 1_000),
    "managers": (100, 1_000),
    "loops": (200, 1_000),
    "watching_loops": (100, 1_000),
    "watches": (300, 1_000),
    "async_watches": (300, 1_000),
    "subscriptions": (0, 40),
    "probes": (1_000, 20_000),
    "blocks": (1_000, 20_000),
    "local_probes": (5_000, 20_000),
    "async_probes": (1_000, 20_000),
}
USUAL = ("breakers", "loops", "watches", "probes")  # the others take too long for every run
SHORT = [
    pytest.param(job, times, id=job, marks=[] if job in USUAL else [pytest.mark.long])
    for job, (times, _) in JOBS.items()
    if times
]
LONG = [
    pytest.param(job, times, id=f"{job}-{times}", marks=[pytest.mark.long, pytest.mark.timeout(400)])
    for job, (_, times) in JOBS.items()
]


@pytest.mark.parametrize(("job", "times"), [*SHORT, *LONG])
def test_nothing_is_left(server: EmbeddedServer, client: redis.Redis, job: str, times: int) -> None:
    """After the first tenth there are no more threads, sockets, objects and bytes, however often it is repeated."""
    found = run(job, server.url, times, program="leaks.py")
    before, after = found["threads"]
    assert len(after) <= len(before), found
    assert found["sockets"] <= 2, found  # one more thread may have needed a connection at the same time
    timers = {"asyncio.events.TimerHandle": 150}  # a loop keeps a hundred that were cancelled
    growing = {kind: n for kind, n in found["objects"].items() if n > timers.get(kind, max(20, times // 100))}
    assert growing == {}, found
    assert found["bytes"] < 100_000, found
