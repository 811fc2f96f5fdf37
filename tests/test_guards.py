"""What can be guarded, how its end is classified, what a rejected call returns, and what nested guards count."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import itertools
import json
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import redis
from conftest import nonzero, wait_until

from pybreaker_redis import (
    AsyncCircuitBreaker,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    Classification,
    Config,
    Policy,
    PolicyError,
)
from pybreaker_redis.embedded import EmbeddedServer

ONE = Policy(failure_threshold=1, reset_timeout=60)
TWO = Policy(failure_threshold=2, reset_timeout=60)


class StatusError(Exception):
    """What an HTTP client raises, whatever the status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Boom(Exception):
    """What a guarded function raises."""


def raising(error: BaseException) -> Any:
    """Raises it."""
    raise error


async def araising(error: BaseException) -> Any:
    """Raises it."""
    raise error


async def aint() -> int:
    """A healthy service."""
    return 0


def tried(breaker: CircuitBreaker, error: BaseException) -> str:
    """The state after a call that raises this."""
    with contextlib.suppress(type(error)):
        breaker.call(raising, error)
    return breaker.state


# Classification ---------------------------------------------------------------------------------


def test_a_predicate_tells_failures_from_answers(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """One class of exceptions may hold both: a 404 is an answer, a 500 is a failure."""
    breaker = make_breaker(policy=ONE, failures=lambda error: error.status >= 500)
    assert tried(breaker, StatusError(404)) == "closed"
    assert nonzero(breaker.counts) == {"successes": 1}
    assert tried(breaker, StatusError(500)) == "open"


def test_a_predicate_may_ignore(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """What `ignore` holds for counts as nothing, before `failures` is asked."""
    breaker = make_breaker(policy=ONE, ignore=lambda error: getattr(error, "status", 0) == 429)
    assert tried(breaker, StatusError(429)) == "closed"
    assert breaker.counts.ignored == 1
    assert tried(breaker, Boom()) == "open"


def test_a_predicate_that_raises(make_breaker: Callable[..., CircuitBreaker], caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, the calls count as failed, and each caller gets the call's own exception."""
    breaker = make_breaker(policy=Policy(failure_threshold=3), failures=lambda error: error.status >= 500)
    for _ in range(2):
        with pytest.raises(Boom):
            breaker.call(raising, Boom())
    assert breaker.counts.failures == 2
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert "failures=" in caplog.text


def test_a_predicate_gets_what_is_in_a_group(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A group counts as the worst of what it holds, here too."""
    breaker = make_breaker(policy=TWO, failures=lambda error: error.status >= 500)
    assert tried(breaker, ExceptionGroup("", [StatusError(404), StatusError(410)])) == "closed"
    assert breaker.counts.failures == 0
    tried(breaker, ExceptionGroup("", [StatusError(404), StatusError(503)]))
    assert breaker.counts.failures == 1


def test_several_types_in_any_iterable() -> None:
    """A tuple, list or set of types will do."""
    for types in ((Boom, OSError), [Boom, OSError], {Boom, OSError}):
        breaker = CircuitBreaker("types", policy=ONE, failures=types)
        assert tried(breaker, ValueError()) == "closed"
        assert tried(breaker, OSError()) == "open"


async def predicate(error: BaseException) -> bool:
    """No predicate can be awaited."""
    return True


@pytest.mark.parametrize("option", ["failures", "ignore"])
@pytest.mark.parametrize("value", [3, "Boom", [Boom, 3], predicate, None])
def test_what_is_no_classification(option: str, value: Any) -> None:
    """It is refused when the breaker is made."""
    with pytest.raises(PolicyError, match=option):
        CircuitBreaker("bad", **{option: value})


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"policy": {"failure_threshold": 3}}, r"Policy\(failure_threshold=3\)"),
        ({"listeners": print}, r"listeners=\[print\]"),
        ({"on_call": [3]}, "on_call"),
        ({"listeners": "log"}, "listeners"),
        ({"fallback": 3}, "fallback"),
        ({"is_failure": predicate}, "is_failure"),
    ],
)
def test_options_of_a_wrong_kind(options: dict[str, Any], hint: str) -> None:
    """The error has the value and says what to do."""
    with pytest.raises(PolicyError, match=hint) as refused:
        CircuitBreaker("bad", **options)
    assert repr(next(iter(options.values()))) in str(refused.value)


def test_a_classification_for_each_service() -> None:
    """A manager's options hold for services that have none of their own; fields left out are the manager's, too."""
    manager = CircuitBreakerManager(
        Config(defaults=ONE),
        failures=OSError,
        classify={
            "payments": Classification(failures=lambda error: getattr(error, "status", 0) >= 500),
            "search": Classification(is_failure=lambda result: result is None),
        },
    )
    payments, search, other = (manager.get_or_create(name) for name in ("payments", "search", "other"))
    assert tried(payments, OSError()) == "closed"
    assert tried(payments, StatusError(503)) == "open"
    assert tried(other, StatusError(503)) == "closed"
    assert tried(other, OSError()) == "open"
    assert search.call(int) == 0
    assert search.call(lambda: None) is None
    assert search.state == "open"
    with pytest.raises(PolicyError, match="payments"):
        CircuitBreakerManager(classify={"payments": {"failures": OSError}})  # type: ignore[dict-item]


# The error of a rejection -----------------------------------------------------------------------


def test_a_rejection_can_be_an_http_client_s_error_too() -> None:
    """Handlers of the client's errors see it, and it keeps its fields."""

    class TransportOpenError(CircuitOpenError, httpx.TransportError):
        pass

    error = TransportOpenError("payments", "open", 2.5)
    assert isinstance(error, httpx.TransportError)
    assert (error.name, error.state, error.retry_after) == ("payments", "open", 2.5)
    assert "payments" in str(error)


def test_a_rejection_can_be_pickled() -> None:
    """As a task queue does."""
    error = pickle.loads(pickle.dumps(CircuitOpenError("payments", "open", 2.5)))
    assert (type(error), error.name, error.state, error.retry_after) == (CircuitOpenError, "payments", "open", 2.5)


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [CircuitBreaker, AsyncCircuitBreaker])
def test_a_breaker_cannot_be_pickled(kind: Any, way: Callable[[Any], Any]) -> None:
    """The error says what to do, as where a breaker is an argument of a process that is spawned."""
    with pytest.raises(TypeError, match=f"<{kind.__name__} 'payments'> cannot be pickled or copied: make one"):
        way(kind("payments"))


def test_an_exception_that_passed_a_guard_can_be_pickled(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """And read where this package is not installed."""
    error = Boom("gone")
    tried(make_breaker(), error)
    stored = pickle.dumps(error)
    assert b"pybreaker_redis._" not in stored
    again = pickle.loads(stored)
    assert str(again) == "gone"
    assert tried(make_breaker("another", policy=ONE), again) == "open"


# Fallbacks --------------------------------------------------------------------------------------


def opened(breaker: CircuitBreaker) -> CircuitBreaker:
    """The breaker, once it is open."""
    breaker.force_open()
    return breaker


def test_a_fallback_answers_for_a_rejected_call(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """It gets the rejection; the guarded function does not run. Blocks raise all the same."""
    seen: list[CircuitOpenError] = []
    breaker = opened(make_breaker(fallback=lambda error: seen.append(error) or "cached"))
    ran: list[int] = []

    @breaker
    def search() -> str:
        ran.append(1)
        return "found"

    assert [search(), breaker.call(search.__wrapped__)] == ["cached", "cached"]  # type: ignore[attr-defined]
    assert not ran
    assert [(error.name, error.state) for error in seen] == [(breaker.name, "open")] * 2
    with pytest.raises(CircuitOpenError), breaker.acquire():
        pass
    assert breaker.counts.rejected == 3


def test_a_fallback_of_one_function(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """It overrules that of the breaker; call() passes every keyword on to the function."""
    breaker = opened(make_breaker(fallback=lambda error: "general"))

    @breaker(fallback=lambda error: "special")
    def search() -> str:
        return "found"

    assert search() == "special"
    assert breaker.call(int) == "general"  # type: ignore[comparison-overlap]
    breaker.reset()
    assert search() == "found"
    assert breaker.call(dict, fallback=1) == {"fallback": 1}
    with pytest.raises(TypeError, match="fallback"):
        breaker()
    with pytest.raises(PolicyError, match="fallback"):
        breaker(fallback=3)  # type: ignore[call-overload]


def test_a_fallback_is_not_for_errors_of_the_function(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """Neither for its failures, nor for rejections by another breaker within it."""
    breaker = make_breaker(policy=Policy(failure_threshold=9), fallback=lambda error: "fallback")
    other = CircuitBreaker("other")
    other.force_open()
    with pytest.raises(Boom):
        breaker.call(raising, Boom())
    with pytest.raises(CircuitOpenError) as rejected:
        breaker.call(lambda: other.call(int))
    assert rejected.value.name == "other"


def test_a_fallback_of_a_generator(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """What it returns is iterated."""
    breaker = opened(make_breaker())

    @breaker(fallback=lambda error: ["cached"])
    def pages() -> Iterator[str]:
        yield "found"

    assert list(pages()) == ["cached"]
    breaker.reset()
    assert list(pages()) == ["found"]


def test_a_fallback_of_a_generator_that_a_plain_function_returns(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """It is rejected when it starts: the circuit has opened since the function returned it."""
    breaker = make_breaker(fallback=lambda error: ["cached"])

    def pages() -> Iterator[str]:
        return (page for page in ["found"])

    special = breaker(fallback=lambda error: ["special"])(pages)
    started = [breaker.call(pages), breaker(pages)(), special()]
    breaker.force_open()
    assert [list(one) for one in started] == [["cached"], ["cached"], ["special"]]
    breaker.reset()
    assert list(breaker.call(pages)) == ["found"]


def test_async_fallbacks(server: EmbeddedServer, client: redis.Redis) -> None:
    """On asyncio a fallback may be a plain or a coroutine function; for async generators it gives async iterables."""

    async def later(error: CircuitOpenError) -> str:
        await asyncio.sleep(0)
        return f"cached {error.name}"

    async def pages(error: CircuitOpenError) -> AsyncIterator[str]:
        yield "cached page"

    async def listed(error: CircuitOpenError) -> list[str]:
        return ["listed"]

    async def main() -> None:
        breaker = AsyncCircuitBreaker("discovery", redis=server.url, fallback=lambda error: 7)
        await breaker.force_open()

        @breaker(fallback=later)
        async def search() -> str:
            return "found"

        @breaker(fallback=pages)
        async def stream() -> AsyncIterator[str]:
            yield "found"

        assert await breaker.call(aint) == 7
        assert await search() == "cached discovery"
        assert [page async for page in stream()] == ["cached page"]
        for other in (lambda error: ["listed"], listed):
            plain = breaker(fallback=other)(stream.__wrapped__)  # type: ignore[attr-defined]
            assert [page async for page in plain()] == ["listed"]
        await breaker.reset()
        assert await search() == "found"
        assert [page async for page in stream()] == ["found"]
        await breaker.close()

    asyncio.run(main())


# Everything callable keeps its kind -------------------------------------------------------------


class Service:
    """Methods of every kind, guarded by one breaker."""

    breaker = CircuitBreaker("methods", policy=ONE)

    def __init__(self, base: int) -> None:
        self.base = base

    @breaker
    def method(self, number: int) -> int:
        """Adds."""
        return self.base + number

    @classmethod
    @breaker
    def made(cls, base: int) -> Service:
        return cls(base)

    @breaker
    @classmethod
    def made_too(cls, base: int) -> Service:
        return cls(base)

    @staticmethod
    @breaker
    def plain(number: int) -> int:
        return number

    @breaker
    @staticmethod
    def plain_too(number: int) -> int:
        return number

    def __call__(self, number: int) -> int:
        return self.base * number


def test_methods_of_every_kind() -> None:
    """They are bound as without the decorator, keep their names, and are guarded."""
    service = Service.made(40)
    assert (service.method(2), Service.made_too(2).base, service.plain(3), Service.plain_too(4)) == (42, 2, 3, 4)
    assert (Service.method.__name__, Service.method.__doc__) == ("method", "Adds.")
    assert Service.method.breaker is Service.breaker  # type: ignore[attr-defined]
    assert Service.breaker.counts.successes == 5
    with pytest.raises(TypeError):
        service.method()  # type: ignore[call-arg]
    with pytest.raises(CircuitOpenError):
        Service.made_too(1)
    Service.breaker.reset()


def test_partials_and_objects(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """Whatever can be called can be guarded."""
    breaker = make_breaker()
    assert breaker(functools.partial(int, "11"))(base=2) == 3
    assert breaker(Service(3))(4) == 12
    assert breaker(len)("four") == 4
    assert breaker(dict)(a=1) == {"a": 1}
    assert breaker.counts.successes == 4


def test_a_context_manager_is_guarded_over_its_whole_block(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """Entering, body and leaving are one call; it counts once, as it ended; so does each call that it decorates."""
    breaker = make_breaker(policy=TWO)
    entered: list[str] = []

    @breaker
    @contextlib.contextmanager
    def session(name: str) -> Iterator[str]:
        entered.append(name)
        yield name

    with session("a") as name:
        assert name == "a"
        assert breaker.counts.successes == 0
    assert breaker.counts.successes == 1
    for _ in range(2):
        with pytest.raises(Boom), session("b"):
            raise Boom
    assert breaker.counts.failures == 2
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError), session("c"):
        pass
    assert entered == ["a", "b", "b"]
    breaker.reset()

    @session("decorated")
    def work() -> int:
        return 5

    assert (work(), work()) == (5, 5)
    assert entered[3:] == ["decorated", "decorated"]


def test_a_context_manager_that_swallows(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """An exception that the manager handles is no failure."""
    breaker = make_breaker(policy=ONE)

    @breaker
    @contextlib.contextmanager
    def tolerant() -> Iterator[None]:
        with contextlib.suppress(Boom):
            yield

    with tolerant():
        raise Boom
    assert (breaker.state, breaker.counts.successes) == ("closed", 1)


def test_files_are_plain_results(make_breaker: Callable[..., CircuitBreaker], tmp_path: Any) -> None:
    """Not every object with __enter__ is a guarded block: opening the file was the call."""
    breaker = make_breaker()
    path = tmp_path / "file"
    path.write_text("text")
    with breaker(open)(path) as file:
        assert breaker.counts.successes == 1
        assert file.read() == "text"


def test_a_generator_function_stays_one(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """As frameworks ask it, for yield dependencies and fixtures."""
    breaker = make_breaker()

    @breaker
    def pages() -> Iterator[int]:
        yield 1

    assert inspect.isgeneratorfunction(pages)
    assert list(pages()) == [1]


def test_async_kinds(server: EmbeddedServer, client: redis.Redis) -> None:
    """Coroutine functions, async generators, context managers, partials, objects and wrapped coroutines."""
    breaker = AsyncCircuitBreaker("kinds", redis=server.url, policy=ONE)

    class Client:
        async def __call__(self, number: int) -> int:
            return number

        @breaker
        async def method(self, number: int) -> int:
            return number

        @breaker
        @classmethod
        async def made(cls, number: int) -> int:
            return number

    @breaker
    async def coroutine(number: int) -> int:
        return number

    @breaker
    async def stream(number: int) -> AsyncIterator[int]:
        got = yield number
        yield got or 0

    @breaker
    @contextlib.asynccontextmanager
    async def session(number: int) -> AsyncIterator[int]:
        yield number

    def wrapper(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any) -> Any:
            return function(*args)

        return wrapped

    wrapped = breaker(wrapper(aint))
    wrapped_stream = breaker(wrapper(stream.__wrapped__))  # type: ignore[attr-defined]

    async def main() -> None:
        assert inspect.iscoroutinefunction(coroutine)
        assert inspect.isasyncgenfunction(stream)
        assert await coroutine(1) == 1
        assert await breaker(functools.partial(coroutine.__wrapped__, 2))() == 2  # type: ignore[attr-defined]
        assert await breaker(Client())(3) == 3
        assert await Client().method(4) == 4
        assert await Client.made(5) == 5
        assert await wrapped() == 0
        assert [item async for item in wrapped_stream(1)] == [1, 0]
        generator = stream(6)
        assert [await anext(generator), await generator.asend(7)] == [6, 7]  # type: ignore[attr-defined]
        with pytest.raises(StopAsyncIteration):
            await anext(generator)
        async with session(8) as number:
            assert number == 8
        successes = breaker.counts.successes
        assert successes == 9
        with pytest.raises(Boom):
            async with session(9):
                raise Boom
        assert breaker.state == "open"
        for rejected in (coroutine(1), wrapped(), breaker(Client())(3)):
            with pytest.raises(CircuitOpenError):
                await rejected
        with pytest.raises(CircuitOpenError):
            async with session(1):
                pass
        await breaker.close()

    asyncio.run(main())
    gc.collect()  # a coroutine that was never awaited would warn


@pytest.mark.parametrize("function", [int, lambda: 1, time.sleep, str])
def test_what_cannot_be_awaited(function: Any) -> None:
    """The asyncio breaker refuses it, at the latest when it is called, and says what guards it."""
    with pytest.raises(TypeError, match="use CircuitBreaker"):
        AsyncCircuitBreaker("kinds")(function)
    with pytest.raises(TypeError, match="use CircuitBreaker"):
        AsyncCircuitBreaker("kinds")(functools.partial(function))(*[0] * (function is time.sleep))


def test_a_yield_dependency_of_fastapi() -> None:
    """FastAPI enters and leaves a guarded dependency like a plain one, and its failures count."""
    fastapi = pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    breaker = AsyncCircuitBreaker("database", policy=ONE)
    app, log = fastapi.FastAPI(), []

    @breaker
    async def connection() -> AsyncIterator[str]:
        log.append("open")
        try:
            yield "connection"
        finally:
            log.append("close")

    @app.get("/{kind}")
    async def handle(kind: str, found: str = fastapi.Depends(connection)) -> str:
        if kind == "bad":
            raise Boom
        return found

    with TestClient(app, raise_server_exceptions=False) as web:
        assert web.get("/good").json() == "connection"
        assert web.get("/bad").status_code == 500
    assert log == ["open", "close", "open", "close"]
    assert nonzero(breaker.counts) == {"successes": 1, "failures": 1}
    assert breaker.state == "open"


# Nested guards ----------------------------------------------------------------------------------


def test_a_failure_counts_once_at_the_innermost_guard(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A guarded function that calls another one of the same breaker: decorated, called, in a block, in any mixture."""
    breaker = make_breaker(policy=Policy(failure_threshold=50))
    inner = breaker(raising)

    @breaker
    def decorated() -> None:
        with breaker.acquire():
            breaker.call(inner, Boom())

    with pytest.raises(Boom):
        decorated()
    assert nonzero(breaker.counts) == {"failures": 1, "ignored": 3}
    assert breaker.snapshot().failure_count == 1


def test_a_success_after_a_nested_failure_counts_as_nothing(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """The outer guard handled the failure; it must not end the run of failures."""
    breaker = make_breaker(policy=Policy(failure_threshold=3, reset_timeout=60))

    @breaker
    def tolerant() -> str:
        with contextlib.suppress(Boom):
            breaker.call(raising, Boom())
        return "default"

    assert [tolerant() for _ in range(3)] == ["default"] * 3
    assert breaker.state == "open"
    breaker.reset()
    for _ in range(3):
        with breaker.acquire(), contextlib.suppress(Boom):
            breaker.call(raising, Boom())
    assert breaker.state == "open"


def test_another_error_after_a_nested_failure_counts_as_nothing(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """As where an HTTP client's transport has counted a 500, and raise_for_status() then raises."""
    breaker = make_breaker(policy=Policy(failure_threshold=9))

    @breaker
    def translating() -> None:
        try:
            breaker.call(raising, Boom())
        except Boom as error:
            raise StatusError(500) from error

    for number in (1, 2):
        with pytest.raises(StatusError):
            translating()
        assert breaker.counts.failures == number
    assert breaker.snapshot().failure_count == 2


def test_later_calls_count_again(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """One exception object that is raised again and again counts each time, and successes after it count."""
    breaker = make_breaker(policy=Policy(failure_threshold=4, reset_timeout=60))
    error = Boom()
    for _ in range(3):
        tried(breaker, error)
    assert breaker.snapshot().failure_count == 3
    assert breaker.call(int) == 0
    assert breaker.snapshot().failure_count == 0
    assert [tried(breaker, error) for _ in range(4)][-1] == "open"


def test_permits_side_by_side(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A permit that was only acquired marks nothing: each counts for itself."""
    breaker = make_breaker(policy=Policy(failure_threshold=9))
    first, second = breaker.acquire(), breaker.acquire()
    second.failure()
    first.success()
    assert nonzero(breaker.counts) == {"successes": 1, "failures": 1}
    assert breaker.snapshot().failure_count == 0


def test_other_threads_count_for_themselves(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A failure of another thread, meanwhile, takes no success away."""
    breaker = make_breaker(policy=Policy(failure_threshold=9))

    def work() -> None:
        other = threading.Thread(target=tried, args=(breaker, Boom()))
        other.start()
        other.join()

    breaker.call(work)
    assert nonzero(breaker.counts) == {"successes": 1, "failures": 1}


def test_calls_that_share_an_exception(server: EmbeddedServer) -> None:
    """As where a connection fails, and with it all requests on it: each of them counts."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("shared", redis=server.url, policy=Policy(failure_threshold=50))
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting: list[None] = []

        async def request() -> None:
            waiting.append(None)
            await asyncio.shield(reply)

        requests = [asyncio.ensure_future(breaker.call(breaker(request))) for _ in range(5)]
        while len(waiting) < 5:
            await asyncio.sleep(0.01)
        reply.set_exception(Boom())
        assert [type(one) for one in await asyncio.gather(*requests, return_exceptions=True)] == [Boom] * 5
        assert (await breaker.snapshot()).failure_count == 5
        await breaker.close()

    asyncio.run(main())


def test_nested_guards_of_other_breakers_count(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """Only the same breaker counts once: same name, prefix and Redis, whatever the object."""
    breaker = make_breaker("a", policy=Policy(failure_threshold=9))
    others = [make_breaker("a", policy=breaker.policy), make_breaker("b"), make_breaker("a", prefix="other")]
    for other in others:
        with pytest.raises(Boom):
            breaker.call(lambda other=other: other.call(raising, Boom()))
    assert [other.counts.failures for other in others] == [1, 1, 1]
    # in memory each object is a breaker of its own
    assert breaker.counts.failures == (2 if breaker._memory is None else 3)


def test_nested_guards_by_a_url_and_by_a_client(server: EmbeddedServer, client: redis.Redis) -> None:
    """They are the same breaker, though a URL may leave out what a client names, such as database 0."""
    options: list[Any] = [server.url, f"{server.url}?db=0", redis.Redis(unix_socket_path=server.url[len("unix://") :])]
    breakers = [CircuitBreaker("a", redis=given, policy=Policy(failure_threshold=9)) for given in options]
    for outer, inner in itertools.permutations(breakers, 2):
        with pytest.raises(Boom):
            outer.call(lambda inner=inner: inner.call(raising, Boom()))
    assert [breaker.counts.failures for breaker in breakers] == [2, 2, 2]


def test_nested_guards_behind_other_sentinels() -> None:
    """Masters of one name, behind other Sentinels, are other servers."""
    urls = [f"redis+sentinel://{nodes}/mymaster" for nodes in ("localhost:1,localhost:2", "localhost:3")]
    given: list[Any] = [*urls, redis.Sentinel([("localhost", 2), ("localhost", 1)]).master_for("mymaster")]
    one, other, same = (CircuitBreaker("a", redis=redis, policy=Policy(failure_threshold=9)) for redis in given)
    for outer, inner in ((one, other), (one, same)):
        with pytest.raises(Boom):
            outer.call(lambda inner=inner: inner.call(raising, Boom()))
    assert (one.counts.failures, other.counts.failures, same.counts.failures) == (1, 1, 1)


def test_async_nested_guards(server: EmbeddedServer, client: redis.Redis) -> None:
    """On asyncio too, also where the inner call is a task, or the blocking breaker of that name in a thread."""
    policy = Policy(failure_threshold=50)

    async def main() -> None:
        breaker = AsyncCircuitBreaker("nested", redis=server.url, policy=policy)
        blocking = CircuitBreaker("nested", redis=client, policy=policy)

        async def in_task() -> None:
            await asyncio.ensure_future(breaker.call(araising, Boom()))

        async def in_thread() -> None:
            await asyncio.to_thread(blocking.call, raising, Boom())

        async def in_block() -> None:
            async with breaker.acquire():
                await breaker(araising)(Boom())

        async def in_group() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(breaker.call(araising, Boom()))

        for number, work in enumerate((in_task, in_thread, in_block, in_group), 1):
            with pytest.raises((Boom, ExceptionGroup)):
                await breaker.call(work)
            assert (await breaker.snapshot()).failure_count == number

        async def tolerant() -> int:
            with contextlib.suppress(Boom):
                await breaker.call(araising, Boom())
            return 1

        assert await breaker.call(tolerant) == 1
        assert (await breaker.snapshot()).failure_count == 5

        @breaker
        async def stream() -> AsyncIterator[int]:
            yield await tolerant()

        assert [item async for item in stream()] == [1]
        assert (await breaker.snapshot()).failure_count == 6
        await breaker.close()

    asyncio.run(main())


def test_wrong_arguments_of_an_async_generator(server: EmbeddedServer) -> None:
    """They are no call: no slot of a probe is taken, and nothing counts."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("wrong", redis=server.url, policy=PROBING)

        @breaker
        async def stream(number: int) -> AsyncIterator[int]:
            yield number

        with pytest.raises(Boom):
            await breaker.call(araising, Boom())
        while breaker.state != "half_open":
            await asyncio.sleep(0.01)
        wrong: Any = stream
        with pytest.raises(TypeError):
            await anext(wrong())
        assert [item async for item in stream(1)] == [1]
        assert (await breaker.snapshot()).state == "closed"
        await breaker.close()

    asyncio.run(main())


def half_open(breaker: CircuitBreaker) -> CircuitBreaker:
    """The breaker, once its open time is over."""
    tried(breaker, Boom())
    wait_until(lambda: breaker.state == "half_open")
    return breaker


PROBING = Policy(failure_threshold=1, reset_timeout=0.05)


def test_a_probe_that_is_a_generator(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """Its body may call its own breaker: that is part of the probe. Between its steps, others are not."""
    breaker = half_open(make_breaker(policy=PROBING))

    @breaker
    def pages() -> Iterator[int]:
        got = yield breaker.call(int, "1")
        assert got == "sent"
        with pytest.raises(Boom):
            yield 2
        yield breaker.call(int, "3")

    steps = pages()
    assert next(steps) == 1
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    assert steps.send("sent") == 2  # type: ignore[attr-defined]
    assert steps.throw(Boom) == 3  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(steps)
    assert breaker.snapshot().state == "closed"


def test_a_probe_that_is_a_context_manager(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """So may its block."""
    breaker = half_open(make_breaker(policy=PROBING))

    @breaker
    @contextlib.contextmanager
    def session() -> Iterator[int]:
        yield breaker.call(int, "1")

    with session() as number:
        assert breaker.call(int, "2") == number + 1
    assert breaker.snapshot().state == "closed"


def test_async_probes_that_call_their_own_breaker(server: EmbeddedServer, client: redis.Redis) -> None:
    """An async generator, a task and a thread with the blocking breaker are part of the probe."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("nested", redis=server.url, policy=PROBING)
        blocking = CircuitBreaker("nested", redis=client, policy=PROBING)

        @breaker
        async def stream() -> AsyncIterator[int]:
            yield await breaker.call(aint)
            yield await asyncio.to_thread(blocking.call, int, "1")
            yield await asyncio.ensure_future(breaker.call(aint))

        with pytest.raises(Boom):
            await breaker.call(araising, Boom())
        while breaker.state != "half_open":
            await asyncio.sleep(0.01)
        found = []
        async for number in stream():
            with pytest.raises(CircuitOpenError):
                await breaker.call(aint)
            found.append(number)
        assert found == [0, 1, 0]
        assert (await breaker.snapshot()).state == "closed"
        await breaker.close()

    asyncio.run(main())


def test_a_failure_that_a_permit_says_within_a_probe(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """The nested guard counts nothing, so the probe counts the error that it sees."""
    breaker = half_open(make_breaker(policy=PROBING))

    def nested() -> None:
        with breaker.acquire() as permit:
            error = Boom()
            permit.failure(error)
            raise error

    with pytest.raises(Boom):
        breaker.call(nested)
    assert breaker.history()[0].reason == "probe_failed"


def test_a_failed_result_within_a_probe(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """Nor does the result of a nested call: the probe's own outcome counts."""
    breaker = half_open(make_breaker(policy=PROBING, is_failure=lambda result: result == "bad"))

    def nested() -> str:
        return breaker.call(lambda: "bad") + ", but handled"

    assert breaker.call(nested) == "bad, but handled"
    assert breaker.history()[0].reason == "probe_succeeded"


# Cancelled and timed out from outside -----------------------------------------------------------

SLOW = Policy(
    failure_threshold=1000, slow_call_duration=0.02, slow_call_rate_threshold=0.5, minimum_calls=10, reset_timeout=60
)


def test_calls_that_time_out_from_outside_are_slow(server: EmbeddedServer, client: redis.Redis) -> None:
    """They had passed slow_call_duration, so they count as slow calls however they ended, and trip."""

    async def main(**options: Any) -> int:
        breaker = AsyncCircuitBreaker("hangs", policy=SLOW, **options)
        calls = 0
        while breaker.state == "closed" and calls < 40:
            calls += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.04):
                    await breaker.call(asyncio.sleep, 60)
        await breaker.close()
        return calls

    assert 10 <= asyncio.run(main(redis=server.url)) <= 12
    assert 10 <= asyncio.run(main()) <= 12


def test_a_quick_cancelled_call_counts_as_nothing(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """As before: it says nothing about the service."""
    breaker = make_breaker(policy=Policy(failure_threshold=1, slow_call_duration=60, slow_call_rate_threshold=0.1))
    with pytest.raises(KeyboardInterrupt):
        breaker.call(raising, KeyboardInterrupt())
    assert breaker.counts.ignored == 1
    assert breaker.snapshot().calls in (0, None)


def test_a_probe_that_times_out_from_outside(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A slow one opens again at once; its slot is free."""
    breaker = make_breaker(policy=dataclasses.replace(SLOW, failure_threshold=1, reset_timeout=0.05))
    tried(breaker, Boom())
    wait_until(lambda: breaker.state == "half_open")

    def hang() -> None:
        time.sleep(0.05)
        raise SystemExit

    with pytest.raises(SystemExit):
        breaker.call(hang)
    assert [entry.reason for entry in breaker.history()][:1] == ["probe_slow"]
    assert breaker.snapshot().probes_in_flight == 0


# Looking ----------------------------------------------------------------------------------------


def test_a_snapshot_includes_what_this_process_has_gathered(make_breaker: Callable[..., CircuitBreaker]) -> None:
    """A success just now has ended the run of failures, for the snapshot too."""
    breaker = make_breaker(lease=60.0, policy=Policy(failure_threshold=5, error_rate_threshold=0.9))
    tried(breaker, Boom())
    assert breaker.snapshot().failure_count == 1
    for _ in range(3):
        breaker.call(int)
    seen = breaker.snapshot()
    assert (seen.failure_count, seen.calls, seen.failures) == (0, 4, 1)


def test_the_mark_on_an_exception_is_plain() -> None:
    """A counted exception says so by plain values: programs write the attributes of an exception as JSON."""
    breaker = CircuitBreaker("plain")

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        breaker.call(fail)
    assert list(json.loads(json.dumps(vars(caught.value)))) == ["_pybreaker_redis"]


class Sealed(Exception):
    """An exception whose attributes cannot be read."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_an_exception_whose_attributes_cannot_be_read() -> None:
    """It reaches the caller, and the failure counts."""
    breaker = CircuitBreaker("sealed")

    def fail() -> None:
        raise Sealed

    for _ in range(2):
        with pytest.raises(Sealed):
            breaker.call(fail)
    assert breaker.snapshot().failure_count == 2
