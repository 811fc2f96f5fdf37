"""The same story told to circuitbreaker and to the module that takes its place: events and results are the same."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import circuitbreaker
import pytest
import redis

from pybreaker_redis.compat import circuitbreaker as ours

Story = Callable[[Any, list[Any]], None]


class Boom(Exception):
    """A failure."""


class Note(Exception):
    """An exception that is no failure."""


@pytest.fixture(autouse=True)
def in_memory() -> Iterator[None]:
    """Each test begins in memory, with an empty monitor."""
    ours.configure()
    for library in (ours, circuitbreaker):
        library.CircuitBreakerMonitor.circuit_breakers = {}
    yield
    ours.configure()


def work(error: type[Exception] | None = None, result: Any = "done") -> Any:
    """A call that raises the error, if there is one."""
    if error is not None:
        raise error("out of order")
    return result


def note(diary: list[Any], breaker: Any, act: Callable[[], Any]) -> None:
    """Write down how an act ends, and what the breaker then shows."""
    try:
        ended: Any = act()
    except Exception as error:
        ended = type(error).__name__, re.sub(r"until .*? \(", "until (", str(error))
    diary.append((ended, *shown(breaker)))


def shown(breaker: Any) -> tuple[Any, ...]:
    """What a breaker shows."""
    flags = breaker.closed, breaker.opened
    return breaker.name, breaker.state, *flags, breaker.failure_count, repr(breaker.last_failure), str(breaker)


def until_half_open(breaker: Any) -> None:
    """Wait for the end of the open period."""
    deadline = time.monotonic() + 20
    while breaker.state == "open":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trips_and_recovers(library: Any, diary: list[Any]) -> None:
    breaker = library.CircuitBreaker(failure_threshold=2, recovery_timeout=1, name="story")
    guarded = breaker(work)
    for error in (None, Boom, None, Boom, Boom, Boom, None):
        note(diary, breaker, lambda error=error: guarded(error))
    diary.append(breaker.open_remaining)
    until_half_open(breaker)
    diary.append(breaker.open_remaining)
    note(diary, breaker, lambda: guarded(Boom))
    note(diary, breaker, lambda: guarded())
    until_half_open(breaker)
    for error in (None, Boom, None):
        note(diary, breaker, lambda error=error: guarded(error))


def what_is_a_failure(library: Any, diary: list[Any]) -> None:
    def says(kind: type[BaseException], error: BaseException) -> bool:
        return kind is Boom and "order" in str(error)

    for expected in (Boom, (Boom, KeyError), [Boom], says):
        breaker = library.CircuitBreaker(failure_threshold=2, expected_exception=expected, name="story")
        guarded = breaker(work)
        for error in (Boom, Note, Boom, Boom, Note):
            note(diary, breaker, lambda error=error, guarded=guarded: guarded(error))
        breaker.reset()
        note(diary, breaker, lambda guarded=guarded: guarded())
        diary.append((breaker.is_failure(Note, Note()), breaker.is_failure(Boom, Boom("order"))))


def fallbacks(library: Any, diary: list[Any]) -> None:
    breaker = library.circuit(1, 30, name="story", fallback_function=lambda *args, **kwargs: ("instead", args, kwargs))
    guarded = breaker(work)
    for _ in range(2):
        note(diary, breaker, lambda: guarded(Boom, result=3))
    diary.append(breaker.fallback_function is not None)


def generators(library: Any, diary: list[Any]) -> None:
    breaker = library.CircuitBreaker(2, name="story", fallback_function=lambda *args: iter(["instead"]))

    def count(most: int, error: type[Exception] | None = None) -> Iterator[int]:
        yield from range(most)
        work(error)

    guarded = breaker(count)
    diary.append(inspect.isgeneratorfunction(guarded))
    for given in ((2,), (1, Boom), (1,), (0, Boom), (1, Boom), (2,)):
        note(diary, breaker, lambda given=given: list(guarded(*given)))
    breaker.reset()
    note(diary, breaker, lambda: list(breaker.call_generator(count, 2)))


def classes(library: Any, diary: list[Any]) -> None:
    class Nervous(library.CircuitBreaker):  # type: ignore[misc, name-defined]
        FAILURE_THRESHOLD = 1
        RECOVERY_TIMEOUT = 60
        EXPECTED_EXCEPTION = Boom

    for decorate in (library.circuit(cls=Nervous), Nervous(), library.circuit(cls=Nervous, failure_threshold=2)):
        guarded = decorate(work)
        [breaker] = library.CircuitBreakerMonitor.get_circuits()
        diary.append((type(breaker).__name__, round(breaker.open_remaining)))
        for error in (Note, Boom, None):
            note(diary, breaker, lambda error=error, guarded=guarded: guarded(error))
        breaker.reset()


def monitored(library: Any, diary: list[Any]) -> None:
    monitor = library.CircuitBreakerMonitor

    @library.circuit
    def bare(error: type[Exception] | None = None) -> Any:
        """Its docstring."""
        return work(error)

    @library.circuit(failure_threshold=1, name="named")
    def fragile(error: type[Exception] | None = None) -> Any:
        return work(error)

    def look() -> None:
        circuits = sorted(breaker.name for breaker in monitor.get_circuits())
        is_open, closed = ([breaker.name for breaker in found] for found in (monitor.get_open(), monitor.get_closed()))
        diary.append((monitor.all_closed(), circuits, is_open, closed, monitor.get("nobody")))

    diary.append((bare(), bare.__name__, bare.__doc__))
    look()
    note(diary, monitor.get("named"), lambda: fragile(Boom))
    look()
    monitor.get("named").reset()
    look()


def blocks_and_calls(library: Any, diary: list[Any]) -> None:
    breaker = library.CircuitBreaker(2, name="story")

    def block(error: type[Exception] | None = None) -> Any:
        with breaker as entered:
            return entered, work(error)

    for error in (None, Boom, None, Boom, Boom):
        note(diary, breaker, lambda error=error: block(error))
    breaker.reset()
    for error in (None, Boom, None, Boom, Boom):
        note(diary, breaker, lambda error=error: breaker.call(work, error, result=1))
    note(diary, library.CircuitBreaker(name="other"), lambda: breaker.name)


def mistakes(library: Any, diary: list[Any]) -> None:
    for wrong in ("name", b"name", int, 3):
        with pytest.raises(ValueError, match="expected_exception") as caught:
            library.circuit(10, 20, wrong)
        diary.append(type(caught.value) is ValueError)


STORIES: list[Story] = [
    trips_and_recovers,
    what_is_a_failure,
    fallbacks,
    generators,
    classes,
    monitored,
    blocks_and_calls,
    mistakes,
]


def told(story: Story, library: Any) -> list[Any]:
    """The diary of a story."""
    diary: list[Any] = []
    story(library, diary)
    return diary


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_in_memory(story: Story) -> None:
    """Both libraries tell the same story in memory."""
    assert told(story, ours) == told(story, circuitbreaker)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_on_redis(story: Story, client: redis.Redis) -> None:
    """A shared breaker tells the same story."""
    ours.configure(client, lease=0)
    assert told(story, ours) == told(story, circuitbreaker)


async def awaited(library: Any) -> list[Any]:
    """The story of coroutine functions and async generators."""
    diary: list[Any] = []
    breaker = library.CircuitBreaker(2, 1, name="story")

    async def awork(error: type[Exception] | None = None) -> Any:
        await asyncio.sleep(0)
        return work(error)

    async def acount(most: int, error: type[Exception] | None = None) -> AsyncIterator[int]:
        for number in range(most):
            yield number
        work(error)

    async def collected(items: AsyncIterator[int]) -> list[int]:
        return [item async for item in items]

    async def anote(awaitable: Any) -> None:
        try:
            ended: Any = await awaitable
        except Exception as error:
            ended = type(error).__name__
        diary.append((ended, *shown(breaker)))

    guarded, iterated = breaker(awork), breaker(acount)
    diary.append((inspect.iscoroutinefunction(guarded), inspect.isasyncgenfunction(iterated)))
    for error in (None, Boom, None, Boom, Boom, None):
        await anote(guarded(error))
    until_half_open(breaker)
    await anote(guarded())
    for given in ((2,), (1, Boom), (0,), (0, Boom), (1, Boom), (2,)):
        await anote(collected(iterated(*given)))
    breaker.reset()
    await anote(breaker.call_async(awork))
    await anote(collected(breaker.call_async_generator(acount, 2)))
    return diary


def test_coroutine_functions(client: redis.Redis) -> None:
    """Coroutine functions and async generators tell the same story, in memory and on Redis."""
    theirs = asyncio.run(awaited(circuitbreaker))
    assert asyncio.run(awaited(ours)) == theirs
    ours.configure(client, lease=0)
    assert asyncio.run(awaited(ours)) == theirs
