"""How the link retries a server for many breakers: whom it asks in one pipeline, and what it makes of each reply.

The retry is driven by hand, without a thread, so that the order of what is asked is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import redis

from pybreaker_redis import CircuitBreaker
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.outage import Outage

LOST = redis.TimeoutError("timed out")
FULL = redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'")
DENIED = redis.exceptions.NoPermissionError("No permissions to access a key")
Answer = Callable[[int, int], Exception | None]


@pytest.fixture
def breakers(server: EmbeddedServer, client: redis.Redis) -> list[CircuitBreaker]:
    """Some breakers of one link."""
    return [CircuitBreaker(f"tenant-{number}", redis=client) for number in range(20)]


def retried(breakers: list[CircuitBreaker], answer: Answer) -> list[list[int]]:
    """Retries a server that is down. Returns the numbers of the breakers in each pipeline, in order.

    answer: the error that a breaker gets instead of the server's reply, by its number and that of the pipeline.
    """
    lines = [breaker._line for breaker in breakers]
    server, link = breakers[0]._redis, breakers[0]._redis.link
    link.failed(lines[0], redis.ConnectionError("lost"))
    link._turn = -1  # begin with the first one
    steps, asked, replies = link._retry_one(link.outage(lines[0]), lines), [], None
    with contextlib.suppress(StopIteration):
        while True:
            commands = steps.send(replies)
            numbers = [[line.key for line in lines].index(command.key) for command in commands]
            asked.append(numbers)
            errors = [answer(number, len(asked)) for number in numbers]
            replies = [error or server.exchange([one])[0] for error, one in zip(errors, commands, strict=True)]
    return asked


def put_off(monkeypatch: pytest.MonkeyPatch, breakers: list[CircuitBreaker], *numbers: int) -> list[int]:
    """Refuses these breakers. Returns the numbers of those whose next retry was put off since then, in order."""
    later: list[int] = []
    refusals = {}
    for number in numbers:
        breakers[number]._redis.link.failed(breakers[number]._line, DENIED)
        refusals[breakers[number]._line.refusal] = number
    failed_again = Outage.failed_again

    def noted(self: Outage) -> None:
        later.extend([refusals[self]] if self in refusals else [])
        failed_again(self)

    monkeypatch.setattr(Outage, "failed_again", noted)
    return later


def test_all_answer(breakers: list[CircuitBreaker]) -> None:
    """The first one alone, then ever more at once."""
    asked = retried(breakers, lambda *_: None)
    assert [len(numbers) for numbers in asked] == [1, 2, 4, 8, 5]
    assert not any(breaker._redis.link.outage(breaker._line) for breaker in breakers)


def test_none_answers(breakers: list[CircuitBreaker]) -> None:
    """One breaker is asked."""
    assert retried(breakers, lambda *_: LOST) == [[0]]
    assert all(breaker._line.refusal is None for breaker in breakers)


@pytest.mark.parametrize("error", [LOST, FULL])
def test_one_gets_no_reply(breakers: list[CircuitBreaker], error: Exception) -> None:
    """Only it is asked again. It is then refused alone."""
    asked = retried(breakers, lambda number, _: error if number == 4 else None)
    assert asked[:5] == [[0], [1, 2], [3, 4, 5, 6], [4], [7, 8]]
    assert sum(map(len, asked)) == 21
    assert [number for number, breaker in enumerate(breakers) if breaker._line.refusal] == [4]
    assert [*breakers[0]._redis.link._outages] == []


def test_the_pipeline_of_one_is_lost(breakers: list[CircuitBreaker]) -> None:
    """As one with a huge value loses all replies of its pipeline: each of them is asked alone, and answers."""
    asked = retried(breakers, lambda number, pipeline: LOST if pipeline == 3 or number == 4 else None)
    assert asked[2:8] == [[3, 4, 5, 6], [3], [4], [5], [6], [7, 8]]
    assert [number for number, breaker in enumerate(breakers) if breaker._line.refusal] == [4]


def test_silence_after_an_answer(breakers: list[CircuitBreaker], caplog: pytest.LogCaptureFixture) -> None:
    """A server that answers once and then no more is down again: not each of its breakers finds that out."""
    asked = retried(breakers, lambda number, _: LOST if number else None)
    assert asked == [[0], [1, 2], [1], [2]]
    assert [*breakers[0]._redis.link._outages] == [None]
    assert sum("no reply from Redis" in record.message for record in caplog.records) == 1


def test_two_huge_neighbours(breakers: list[CircuitBreaker]) -> None:
    """Two that get no reply in a row look like an outage once; then one of them is known, and the others return."""

    def answer(number: int, _: int) -> Exception | None:
        return LOST if number in (4, 5) else None

    retried(breakers, answer)
    assert breakers[0]._redis.link._outages
    retried(breakers, answer)
    assert not breakers[0]._redis.link._outages
    assert [number for number, breaker in enumerate(breakers) if breaker._line.refusal] == [4, 5]


def test_refused_breakers_wait(breakers: list[CircuitBreaker], monkeypatch: pytest.MonkeyPatch) -> None:
    """A breaker that was refused before and is refused again, as the server returns, is asked again later."""
    later = put_off(monkeypatch, breakers, 2, 5)
    asked = retried(breakers, lambda number, _: DENIED if number in (2, 5) else None)
    assert [len(numbers) for numbers in asked] == [1, 2, 4, 8, 5]
    assert later == [2, 5]
    assert not any(breakers[number]._line.refusal.is_due() for number in (2, 5))


def test_a_refusal_before_any_answer(breakers: list[CircuitBreaker]) -> None:
    """A server that refuses the first breaker answers, but is not known to take writes: the next ones are asked."""
    asked = retried(breakers, lambda number, _: DENIED if number == 0 else LOST)
    assert asked == [[0], [1, 2]]
    assert breakers[0]._redis.link._outages
