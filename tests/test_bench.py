"""benchmarks/bench.py measures guarded calls: it prints no figure for a contender whose circuit opened meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import bench
import pytest
import redis
from bench import BARE, FAILURE, MIXED, Bench, Work
from contenders import ASYNC, IN_PROCESS, OURS, SYNC, Contender, Env

from pybreaker_redis.embedded import EmbeddedServer

FAIL = {"sync": bench.fail, "asyncio": bench.afail}
CONTENDERS = {
    shell: {name: Contender(builds[name]) for name in (OURS, IN_PROCESS)}
    for shell, builds in {"sync": SYNC, "asyncio": ASYNC}.items()
}


@pytest.fixture
def run(server: EmbeddedServer, client: redis.Redis) -> Iterator[Bench]:
    """A run of two short rounds, on an empty server: each run begins with the same names."""
    with asyncio.Runner() as runner:
        yield Bench(Env(server.url), runner, rounds=2, slice_seconds=0.002)


@pytest.mark.parametrize("shell", ["sync", "asyncio"])
@pytest.mark.parametrize("width", [1, 2])
def test_a_circuit_that_opens_has_a_note_instead_of_a_figure(run: Bench, shell: str, width: int) -> None:
    """The note names the work; at other works the contender still takes part."""
    dead = Work(shell, FAILURE, width, FAIL[shell], CONTENDERS[shell], trips=True)
    assert list(run.times(dead)) == [BARE]
    assert list(run.not_run[dead.title]) == [OURS, IN_PROCESS]
    assert all(note.startswith("Tripped: its circuit opened: ") for note in run.not_run[dead.title].values())
    assert list(run.times(dead._replace(trips=False))) == [BARE, OURS, IN_PROCESS]


def test_a_circuit_that_opens_after_the_first_round(run: Bench) -> None:
    """The time of the first round is no figure either, and there is no further round."""
    calls: Callable[[], Any] = bench.succeed
    dying = Work("sync", FAILURE, 1, lambda: calls(), CONTENDERS["sync"], trips=True)
    ours = run.entries(dying)[1]
    run.round(dying, ours, 0)
    assert list(ours.seconds) == [0]
    calls = bench.fail
    run.round(dying, ours, 1)
    assert (ours.rounds, ours.seconds) == (0, {})
    assert list(run.not_run[dying.title]) == [OURS]


@pytest.mark.parametrize(
    "mixed", [work for work in bench.works(quick=True) if work.name == MIXED], ids=lambda work: work.title
)
def test_scattered_failures_cannot_trip(run: Bench, mixed: Work) -> None:
    """The rows of mixed calls have a figure even if every call fails."""
    worst = mixed._replace(func=FAIL[mixed.shell], contenders=CONTENDERS[mixed.shell])
    assert list(run.times(worst)) == [BARE, OURS, IN_PROCESS]


def test_a_refresh_without_a_script_is_an_exchange(own_server: EmbeddedServer) -> None:
    """The exchanges of a healthy process are counted, which are reads; so is the asking itself."""
    with asyncio.Runner() as runner:
        quiet = Bench(Env(own_server.url), runner, rounds=1, slice_seconds=0.001)
        client = quiet.env.client()
        client.ping()
        before = quiet.exchanges()
        for _ in range(3):
            client.mget("state", "policy")
        assert quiet.exchanges() - before == 3 + 1
