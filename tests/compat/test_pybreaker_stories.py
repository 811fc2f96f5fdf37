"""The same story told to pybreaker and to the module that takes its place: events, results and readings agree."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import pybreaker
import pytest
import redis

from pybreaker_redis.compat import pybreaker as ours

_names = itertools.count(1)
Story = Callable[["Library"], list[Any]]


class Boom(Exception):
    """A failure."""


class Busy(LookupError):
    """An exception that may be excluded."""


class Library:
    """One of the two libraries, and where its breakers are."""

    def __init__(self, module: Any, client: redis.Redis | None, **options: Any) -> None:
        self.module, self._client, self._options = module, client, options
        self.diary: list[Any] = []
        # on Redis, pybreaker cuts the time at which it opened to whole seconds
        self.open_period = 2.0 if client is not None and module is pybreaker else 0.5

    def storage(self, state: str = "closed", namespace: str | None = None) -> Any:
        """A new storage."""
        if self._client is None:
            return self.module.CircuitMemoryStorage(state)
        namespace = namespace or f"story-{next(_names)}"
        return self.module.CircuitRedisStorage(state, self._client, namespace=namespace, **self._options)

    def breaker(self, **options: Any) -> Any:
        """A breaker that trips at the third failure, and notes in the diary what its listener hears."""
        given = {"fail_max": 3, "state_storage": self.storage(), "listeners": [self.listener()], "name": "story"}
        return self.module.CircuitBreaker(**{**given, **options})

    def listener(self, prefix: str = "") -> Any:
        """A listener that writes into the diary."""
        write = self.diary.append

        class Listener(self.module.CircuitBreakerListener):  # type: ignore[misc, name-defined]
            def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
                write((prefix, "before", func.__name__, args, kwargs, cb.name))

            def success(self, cb: Any) -> None:
                write((prefix, "success", cb.fail_counter, cb.current_state))

            def failure(self, cb: Any, exc: BaseException) -> None:
                write((prefix, "failure", repr(exc), cb.fail_counter))

            def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
                write(
                    (
                        prefix,
                        "state",
                        *(state and (type(state).__name__, state.name) for state in (old_state, new_state)),
                    )
                )

        return Listener()

    def note(self, breaker: Any, act: Callable[[], Any] = lambda: None) -> None:
        """Write down how an act ends, and what the breaker then shows."""
        try:
            ended: Any = act()
        except Exception as error:
            ended = type(error).__name__, str(error)
        self.diary.append((ended, breaker.current_state, breaker.fail_counter, breaker.success_counter))


def fine(*args: Any, **kwargs: Any) -> Any:
    """A call that succeeds."""
    return args, kwargs


def boom() -> None:
    """A call that fails."""
    raise Boom("out of order")


def busy() -> None:
    """A call that raises an exception that may be excluded."""
    raise Busy("later")


def trial(library: Library, breaker: Any, act: Callable[[], Any]) -> Any:
    """What a call gives once the open period is over."""
    ran = []

    def noted() -> Any:
        ran.append(True)
        return act()

    deadline = time.monotonic() + 20
    while True:
        try:
            return breaker.call(noted)
        except library.module.CircuitBreakerError:
            if ran:
                raise
            assert time.monotonic() < deadline
            time.sleep(0.02)


# The stories -------------------------------------------------------------------------------------


def trips_and_recovers(library: Library) -> list[Any]:
    breaker = library.breaker(reset_timeout=library.open_period)
    library.note(breaker, lambda: breaker.call(fine, 1, b=2))
    for _ in range(2):
        library.note(breaker, lambda: breaker.call(boom))
    library.note(breaker, lambda: breaker.call(fine))
    for _ in range(5):
        library.note(breaker, lambda: breaker.call(boom))
    library.note(breaker, lambda: breaker.call(fine))
    library.note(breaker, lambda: trial(library, breaker, boom))
    library.note(breaker, lambda: trial(library, breaker, fine))
    library.note(breaker, lambda: breaker.call(boom))
    return library.diary


def own_error_of_the_trip(library: Library) -> list[Any]:
    breaker = library.breaker(throw_new_error_on_trip=False, fail_max=2)
    for _ in range(3):
        library.note(breaker, lambda: breaker.call(boom))
    breaker.half_open()
    library.note(breaker, lambda: breaker.call(boom))
    library.note(breaker, breaker.open)
    return library.diary


def several_successes_close(library: Library) -> list[Any]:
    breaker = library.breaker(success_threshold=3)
    breaker.half_open()
    for act in (fine, fine, boom):
        library.note(breaker, lambda act=act: breaker.call(act))
    breaker.close()
    breaker.half_open()
    for act in (fine, fine, fine, fine):
        library.note(breaker, lambda act=act: breaker.call(act))
    breaker.half_open()
    library.note(breaker, lambda: breaker.call(fine))
    breaker.success_threshold = 2
    library.note(breaker, lambda: breaker.call(fine))
    return [*library.diary, breaker.success_threshold]


def operator_acts(library: Library) -> list[Any]:
    breaker = library.breaker()
    library.note(breaker, lambda: breaker.call(boom))
    for act in (breaker.open, breaker.open, breaker.half_open, breaker.half_open, breaker.close, breaker.close):
        library.note(breaker, act)
        library.diary.append((type(breaker.state).__name__, breaker.state.name))
    for act in (breaker.half_open, breaker.open, breaker.close):
        library.note(breaker, act)
    library.note(breaker, lambda: breaker.call(boom))
    breaker.open()
    library.note(breaker, lambda: breaker.call(fine))
    breaker.close()
    library.note(breaker, lambda: breaker.call(fine))
    return library.diary


def excluded(library: Library) -> list[Any]:
    breaker = library.breaker(exclude=[LookupError])
    for act in (boom, busy, boom, boom, busy, busy):
        library.note(breaker, lambda act=act: breaker.call(act))
    breaker.remove_excluded_exception(LookupError)
    library.note(breaker, lambda: breaker.call(busy))
    breaker.add_excluded_exceptions(KeyError, lambda error: str(error) == "later")
    library.note(breaker, lambda: breaker.call(busy))
    breaker.add_excluded_exception(Boom)
    library.note(breaker, lambda: breaker.call(boom))
    breaker.half_open()
    library.note(breaker, lambda: breaker.call(busy))
    kept = [one for one in breaker.excluded_exceptions if isinstance(one, type)]
    asked = breaker.is_system_error(Busy("later")), breaker.is_system_error(ValueError())
    return [*library.diary, kept, asked]


def decorated(library: Library) -> list[Any]:
    breaker = library.breaker(fail_max=2)

    @breaker
    def lookup(query: str, *, limit: int = 3) -> tuple[str, int]:
        """Look it up."""
        if limit < 0:
            raise Boom(query)
        return query, limit

    class Service:
        @breaker
        def ask(self, query: str) -> str:
            return f"{type(self).__name__}: {query}"

    library.diary.append((lookup.__name__, lookup.__doc__))
    for limit in (1, -1, 1, -1, -2):
        library.note(breaker, lambda limit=limit: lookup("q", limit=limit))
    breaker.close()
    breaker.remove_listener(breaker.listeners[0])  # whose diary would show the instance
    library.note(breaker, lambda: Service().ask("q"))
    library.note(breaker, lambda: breaker()(fine)(7))
    return library.diary


def generators(library: Library) -> list[Any]:
    breaker = library.breaker(fail_max=2)

    @breaker
    def count(most: int, then: type[Exception] | None = None) -> Any:
        for number in range(most):
            sent = yield number
            if sent is not None:
                library.diary.append(("sent", sent))
        if then is not None:
            raise then("at the end")

    library.note(breaker, lambda: list(count(2)))
    library.note(breaker, lambda: list(count(1, Boom)))
    talk = count(2)
    library.diary.append((next(talk), talk.send("hello")))
    library.note(breaker)
    library.note(breaker, lambda: next(talk, "ended"))
    for _ in range(2):
        library.note(breaker, lambda: list(count(0, Boom)))
    library.note(breaker, lambda: count(1))
    return library.diary


def blocks(library: Library) -> list[Any]:
    breaker = library.breaker(fail_max=2)

    def block(error: Exception | None = None) -> str:
        with breaker.calling():
            if error is not None:
                raise error
            return "inside"

    breaker.remove_listener(breaker.listeners[0])  # the name of the function behind a block is nobody's business
    for error in (None, Boom("1"), None, Boom("2"), Boom("3"), None):
        library.note(breaker, lambda error=error: block(error))
    return library.diary


def listeners_come_and_go(library: Library) -> list[Any]:
    breaker = library.breaker(fail_max=1)
    second = library.listener("second")
    breaker.add_listener(second)
    library.note(breaker, lambda: breaker.call(fine))
    first = breaker.listeners[0]
    breaker.remove_listener(first)
    library.note(breaker, lambda: breaker.remove_listener(first))
    library.note(breaker, lambda: breaker.call(boom))
    breaker.remove_listener(second)
    breaker.half_open()
    library.note(breaker, lambda: breaker.call(fine))
    breaker.add_listeners(first, second)
    library.note(breaker, lambda: breaker.call(boom))
    return [*library.diary, len(breaker.listeners)]


def changed_while_it_runs(library: Library) -> list[Any]:
    breaker = library.breaker(fail_max=5)
    for _ in range(3):
        library.note(breaker, lambda: breaker.call(boom))
    breaker.fail_max, breaker.reset_timeout, breaker.name = 3, 90, "renamed"
    library.diary.append((breaker.fail_max, breaker.reset_timeout, breaker.name))
    library.note(breaker, lambda: breaker.call(boom))
    library.note(breaker, lambda: breaker.call(fine))
    return library.diary


def nobody_listens(library: Library) -> list[Any]:
    breaker = library.breaker(fail_max=2, listeners=None, exclude=[Busy])
    for act in (fine, boom, busy, boom, boom, fine):
        library.note(breaker, lambda act=act: breaker.call(act))
    return library.diary


def defaults(library: Library) -> list[Any]:
    breaker = library.module.CircuitBreaker()
    shown = (breaker.fail_max, breaker.reset_timeout, breaker.success_threshold, breaker.name, breaker.listeners)
    return [shown, breaker.excluded_exceptions, breaker.state.name, breaker._state_storage.name]


def starts_in_any_state(library: Library) -> list[Any]:
    for state in ("open", "half-open", "closed"):
        for act in (fine, boom):
            breaker = library.breaker(state_storage=library.storage(state))
            library.note(breaker)
            library.note(breaker, lambda breaker=breaker, act=act: breaker.call(act))
    return library.diary


def one_storage_for_two(library: Library) -> list[Any]:
    storage = library.storage()
    one, other = (library.breaker(state_storage=storage, fail_max=most, name=str(most)) for most in (2, 4))
    for breaker in (one, other, one):
        library.note(breaker, lambda breaker=breaker: breaker.call(fine if breaker is other else boom))
    library.note(other, lambda: other.call(boom))
    library.note(one, lambda: one.call(boom))
    library.note(other, lambda: other.call(fine))
    library.diary.append(other.state.name)
    other.close()
    library.note(one, lambda: one.call(fine))
    return library.diary


def storages_by_hand(library: Library) -> list[Any]:
    storage = library.storage()
    for act in (storage.increment_counter, storage.increment_counter, storage.reset_counter, storage.increment_counter):
        act()
        library.diary.append((storage.counter, storage.success_counter, storage.state))
    storage.state = "half-open"
    storage.increment_success_counter()
    breaker = library.breaker(state_storage=storage, success_threshold=2)
    library.note(breaker)
    storage.reset_success_counter()
    library.note(breaker, lambda: setattr(storage, "state", "nowhere") if library.module is ours else None)
    storage.state = "open"
    library.diary.append((storage.state, storage.opened_at))
    return library.diary[:-2] + library.diary[-1:]


STORIES: list[Story] = [
    trips_and_recovers,
    own_error_of_the_trip,
    several_successes_close,
    operator_acts,
    excluded,
    decorated,
    generators,
    blocks,
    listeners_come_and_go,
    changed_while_it_runs,
    nobody_listens,
    defaults,
    starts_in_any_state,
    storages_by_hand,
]
STRICT: list[Story] = [one_storage_for_two]  # with a lease, the two learn of each other as processes do


@pytest.mark.parametrize("story", [*STORIES, *STRICT], ids=lambda story: story.__name__)
def test_in_memory(story: Story) -> None:
    """Both libraries tell the same story in memory."""
    assert story(Library(ours, None)) == story(Library(pybreaker, None))


@pytest.mark.parametrize(
    ("story", "lease"),
    [*((story, lease) for story in STORIES for lease in (0, 0.1)), *((story, 0) for story in STRICT)],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_on_redis(story: Story, client: redis.Redis, lease: float) -> None:
    """Both libraries tell the same story on Redis."""
    assert story(Library(ours, client, lease=lease)) == story(Library(pybreaker, client))


async def awaited(library: Library) -> list[Any]:
    """The story of coroutine functions."""
    breaker = library.breaker(fail_max=2)

    async def afine(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return args, kwargs

    async def aboom() -> None:
        await asyncio.sleep(0)
        raise Boom("out of order")

    async def note(func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            ended: Any = await func(*args, **kwargs)
        except Exception as error:
            ended = type(error).__name__, str(error)
        library.diary.append((ended, breaker.current_state, breaker.fail_counter, breaker.success_counter))

    await note(breaker.call_async, afine, 1, b=2)
    for func in (aboom, aboom, afine):
        await note(breaker.call_async, func)
    breaker.half_open()
    for func in (aboom, afine):
        await note(breaker.call_async, func)
    breaker.half_open()
    decorate = breaker(__pybreaker_call_async=True)
    for func in (afine, aboom, afine):
        await note(decorate(func))
    return library.diary


def test_coroutine_functions(client: redis.Redis) -> None:
    """call_async tells the same story on asyncio as pybreaker's does with Tornado, in memory and on Redis."""
    pytest.importorskip("tornado")
    told = asyncio.run(awaited(Library(pybreaker, None)))
    assert asyncio.run(awaited(Library(ours, None))) == told
    assert asyncio.run(awaited(Library(ours, client, lease=0))) == told
    assert asyncio.run(awaited(Library(pybreaker, client))) == told
