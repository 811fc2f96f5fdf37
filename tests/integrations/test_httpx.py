"""The transports for httpx and httpx2 against a service that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from conftest import nonzero, wait_until

from pybreaker_redis import (
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    PolicyError,
)
from pybreaker_redis.integrations import httpx as for_httpx

from .service import Service, running_probe


class Library:
    """httpx or httpx2, and the module that guards it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.http: Any = importlib.import_module(name)
        self.guard: Any = importlib.import_module(f"pybreaker_redis.integrations.{name}")


@pytest.fixture(params=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


class Caller:
    """Gets paths of the service through a guarded client, and knows what its breaker counted."""

    def __init__(self, library: Library, service: Service, manager: CircuitBreakerManager, **options: Any) -> None:
        self.library, self.service = library, service
        transport = library.guard.BreakerTransport(manager, **options)
        self.client = library.http.Client(transport=transport, base_url=service.url, timeout=5)
        self.breaker = manager.get_or_create(f"127.0.0.1:{service.port}")

    def get(self, path: str = "/", **options: Any) -> Any:
        return self.client.get(path, **options)

    def error_of(self, path: str, **options: Any) -> Any:
        with pytest.raises(Exception) as caught:
            self.get(path, **options)
        return caught.value

    @property
    def counts(self) -> dict[str, int]:
        """The outcomes that are not zero."""
        return nonzero(self.breaker.counts)


@pytest.fixture
def call(library: Library, service: Service, manager: CircuitBreakerManager) -> Iterator[Callable[..., Caller]]:
    """Makes callers."""
    with contextlib.ExitStack() as stack:

        def make(breakers: Any = manager, **options: Any) -> Caller:
            caller = Caller(library, service, breakers, **options)
            stack.enter_context(caller.client)
            return caller

        yield make


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_statuses_that_fail(call: Callable[..., Caller], status: int) -> None:
    """Three of them open the circuit: the fourth request is not sent, and its error is one of the library, too."""
    caller = call()
    for _ in range(3):
        assert caller.get(f"/status/{status}").status_code == status
    error = caller.error_of("/")
    assert isinstance(error, CircuitOpenError)
    assert isinstance(error, caller.library.http.TransportError)
    assert (error.name, error.state) == (f"127.0.0.1:{caller.service.port}", "open")
    assert 0 < error.retry_after <= 60
    assert str(error.request.url) == f"{caller.service.url}/"
    assert caller.service.requests == 3
    assert caller.counts == {"failures": 3, "rejected": 1}


@pytest.mark.parametrize("status", [200, 204, 302, 400, 401, 404, 409, 429, 501])
def test_statuses_that_succeed(call: Callable[..., Caller], status: int) -> None:
    """The service did answer."""
    caller = call()
    for _ in range(4):
        assert caller.get(f"/status/{status}").status_code == status
    assert caller.counts == {"successes": 4}


@pytest.mark.parametrize(
    ("path", "error"),
    [("/reset", "ReadError"), ("/close", "RemoteProtocolError"), ("/hang", "ReadTimeout")],
)
def test_errors_that_fail(call: Callable[..., Caller], path: str, error: str) -> None:
    """A broken connection, a broken protocol and a timeout are failures, and pass through as they are."""
    caller = call()
    for _ in range(3):
        assert type(caller.error_of(path, timeout=0.1)).__name__ == error
    assert isinstance(caller.error_of("/"), CircuitOpenError)
    assert caller.counts == {"failures": 3, "rejected": 1}


def test_nobody_listens(library: Library, manager: CircuitBreakerManager) -> None:
    """A refused connection is a failure."""
    with library.http.Client(transport=library.guard.BreakerTransport(manager)) as client:
        for _ in range(3):
            with pytest.raises(library.http.ConnectError):
                client.get("http://127.0.0.1:1/")
        with pytest.raises(library.guard.CircuitOpenTransportError):
            client.get("http://127.0.0.1:1/")


def test_the_callers_own_faults_count_as_nothing(
    library: Library, service: Service, call: Callable[..., Caller], manager: CircuitBreakerManager
) -> None:
    """A bad URL, a pool without a free connection, a body that raises, and a client that is closed."""
    http = library.http
    transport = http.HTTPTransport(limits=http.Limits(max_connections=1))
    caller = call(transport=transport)
    with caller.client.stream("GET", "/stream"):
        for _ in range(4):
            assert isinstance(caller.error_of("/", timeout=http.Timeout(5, pool=0.01)), http.PoolTimeout)
    assert caller.counts == {"successes": 1, "ignored": 4}
    for _ in range(4):
        with pytest.raises(http.UnsupportedProtocol):
            caller.client.get(f"gopher://127.0.0.1:{service.port}/")

    client = library.http.Client(transport=library.guard.BreakerTransport(manager))
    with client, pytest.raises(http.UnsupportedProtocol):
        client.get("/no/host")

    def body() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the caller's own")

    for _ in range(4):
        with pytest.raises(KeyError):
            caller.client.post("/", content=body())
    assert caller.counts == {"successes": 1, "ignored": 12}
    caller.client.close()
    for _ in range(4):
        assert isinstance(caller.error_of("/"), RuntimeError)
    assert caller.counts == {"successes": 1, "ignored": 12}


@pytest.mark.parametrize(
    ("path", "error"),
    [("/cut", "RemoteProtocolError"), ("/cut-chunks", "RemoteProtocolError"), ("/hang-body", "ReadTimeout")],
)
def test_a_body_that_breaks_off(call: Callable[..., Caller], path: str, error: str) -> None:
    """It is a failure where the body is read under guard; else the headers have decided."""
    caller = call(until="body")
    for _ in range(3):
        assert type(caller.error_of(path, timeout=0.1)).__name__ == error
    assert caller.counts == {"failures": 3}
    assert isinstance(caller.error_of("/"), CircuitOpenError)
    caller.breaker.reset()
    other = call()
    other.breaker.force_closed()
    assert type(other.error_of(path, timeout=0.1)).__name__ == error
    assert other.counts == {"failures": 3, "rejected": 1, "successes": 1}


@pytest.mark.parametrize("until", ["headers", "body"])
def test_streams(call: Callable[..., Caller], until: str) -> None:
    """A body arrives whole, in pieces, and may be left early."""
    caller = call(until=until)
    assert caller.get("/stream").text == "chunk" * 10
    with caller.client.stream("GET", "/stream") as response:
        assert "".join(response.iter_text()) == "chunk" * 10
    with caller.client.stream("GET", "/stream") as response:
        parts = response.iter_raw()  # kept: httpx2 closes a response whose iterator is freed
        next(parts)
        assert caller.counts == {"successes": 2 + (until == "headers")}
    with caller.client.stream("GET", "/stream"):
        pass
    assert caller.get("/status/404").status_code == 404
    assert caller.counts == {"successes": 5}
    assert caller.get("/status/503").status_code == 503
    assert caller.counts == {"successes": 5, "failures": 1}


def test_a_probe_ends_with_its_body(
    call: Callable[..., Caller], make_manager: Callable[..., CircuitBreakerManager]
) -> None:
    """The slot is taken until then, and the circuit closes only for a body that arrived."""
    caller = call(make_manager(failure_threshold=1, reset_timeout=0.05), until="body")
    caller.get("/status/500")
    wait_until(lambda: caller.breaker.snapshot().retry_after == 0)
    with caller.client.stream("GET", "/stream") as response:
        assert caller.breaker.snapshot().state == "half_open"
        response.read()
    assert caller.breaker.snapshot().state == "closed"


def test_mounts_and_names(library: Library, service: Service, manager: CircuitBreakerManager) -> None:
    """Only what is mounted is guarded; a name may be fixed, come from a function, or be None."""
    guard = library.guard
    mounted = guard.BreakerTransport(manager, name="api")
    with library.http.Client(mounts={"http://localhost": mounted}) as client:
        client.get(f"{service.url}/status/500")
        assert sorted(manager._breakers) == []
        client.get(f"http://localhost:{service.port}/status/500")
    assert nonzero(manager.get_or_create("api").counts) == {"failures": 1}

    def first_part(request: Any) -> str | None:
        part = request.url.path.split("/")[1]
        return None if part == "unguarded" else str(part)

    with library.http.Client(transport=guard.BreakerTransport(manager, name=first_part)) as client:
        for path in ("/a/1", "/a/2", "/b/1", "/unguarded"):
            client.get(service.url + path)
    assert sorted(manager._breakers) == ["a", "api", "b"]
    assert nonzero(manager.get_or_create("a").counts) == {"successes": 2}


def test_one_breaker_for_everything(library: Library, service: Service) -> None:
    """Instead of a manager."""
    breaker = CircuitBreaker("api")
    with library.http.Client(transport=library.guard.BreakerTransport(breaker)) as client:
        client.get(service.url)
    assert nonzero(breaker.counts) == {"successes": 1}


def test_everything_is_a_parameter(call: Callable[..., Caller]) -> None:
    """Statuses, exceptions (types or functions), and what holds."""
    caller = call(
        failure_statuses={418},
        failures=lambda error: type(error).__name__ == "ReadTimeout",
        ignore=(),
        retry_after=lambda response: None,
    )
    caller.get("/status/503?Retry-After=7")
    assert caller.counts == {"successes": 1}
    caller.get("/status/418")
    assert caller.counts == {"successes": 1, "failures": 1}
    caller.error_of("/reset")
    assert caller.counts == {"successes": 1, "failures": 1, "ignored": 1}
    caller.error_of("/hang", timeout=0.1)
    assert caller.counts == {"successes": 1, "failures": 2, "ignored": 1}
    with pytest.raises(PolicyError, match="until must be 'headers' or 'body', not 'end'"):
        call(until="end")


def test_types_may_come_alone_or_in_any_collection(call: Callable[..., Caller]) -> None:
    """As for a breaker."""
    caller = call(failures=call().library.http.ReadTimeout, ignore=[])
    caller.error_of("/reset")
    assert caller.counts == {"ignored": 1}
    caller.error_of("/hang", timeout=0.1)
    assert caller.counts == {"ignored": 1, "failures": 1}


def test_breakers_of_the_other_kind_are_refused(library: Library) -> None:
    """Before the first request, with what to pass instead."""
    with pytest.raises(PolicyError, match="breakers must be of type CircuitBreakerManager or CircuitBreaker, not"):
        library.guard.BreakerTransport(AsyncCircuitBreakerManager())
    with pytest.raises(PolicyError, match="of type AsyncCircuitBreakerManager or AsyncCircuitBreaker, not"):
        library.guard.AsyncBreakerTransport(CircuitBreaker("a"))


def test_redirects_are_calls_of_their_own(call: Callable[..., Caller]) -> None:
    """Each hop is guarded by the breaker of its host."""
    caller = call()
    assert caller.get("/status/302?Location=/status/500", follow_redirects=True).status_code == 500
    assert caller.counts == {"successes": 1, "failures": 1}


def test_a_nested_guard_of_the_same_breaker_counts_once(call: Callable[..., Caller]) -> None:
    """A function decorated by the breaker that also guards its client: one call, one count."""
    caller = call()
    assert caller.breaker(caller.get)("/").status_code == 200
    assert caller.counts["successes"] == 2  # a success may count at each guard: it ends a run all the same
    for _ in range(2):
        with pytest.raises(caller.library.http.ReadError):
            caller.breaker(caller.get)("/reset")
    assert caller.counts["failures"] == 2
    assert caller.breaker(caller.get)("/status/500").status_code == 500
    assert caller.counts["failures"] == 3


def test_the_rejection_of_an_inner_transport_is_no_failure(call: Callable[..., Caller], library: Library) -> None:
    """It says nothing about the service of the outer one."""
    inner = CircuitBreaker("inner")
    inner.force_open()
    caller = call(transport=library.guard.BreakerTransport(inner))
    assert caller.error_of("/").name == "inner"
    assert caller.counts == {"ignored": 1}


@pytest.mark.parametrize("status", [429, 503])
def test_a_hold_opens_the_circuit(call: Callable[..., Caller], status: int) -> None:
    """The service said when to come back: one such answer is enough, for as long as it said."""
    caller = call()
    caller.get(f"/status/{status}?Retry-After=9")
    error = caller.error_of("/")
    assert isinstance(error, CircuitOpenError)
    assert 5 < error.retry_after <= 9


def test_a_rejection_can_be_a_response(call: Callable[..., Caller]) -> None:
    """One that SDKs do not retry, or any other."""
    seen: list[Any] = []

    def answer_for(error: Any) -> Any:
        seen.append(error)
        return caller.library.guard.sdk_response(error)

    caller = call(rejected=answer_for)
    caller.breaker.force_open(30)
    answer = caller.get("/")
    assert str(seen[0].request.url) == f"{caller.service.url}/"
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"
    assert 0 < int(answer.headers["retry-after"]) <= 30
    assert answer.json()["error"]["type"] == "circuit_open"
    assert caller.service.requests == 0


def test_the_error_can_be_copied_and_pickled(call: Callable[..., Caller]) -> None:
    """As errors are that cross processes, or are stored with the result of a task."""
    caller = call()
    caller.breaker.force_open(30)
    error = caller.error_of("/")
    for same in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(same), same.args, same.name, same.retry_after) == (
            type(error),
            error.args,
            error.name,
            error.retry_after,
        )
        assert same.request.url == error.request.url
    assert "is open (forced); retry after" in str(error)


def test_closing_the_client_closes_the_inner_transport(library: Library) -> None:
    """As entering it enters that."""
    did = []

    class Inner(library.http.BaseTransport):  # type: ignore[name-defined, misc]
        def __enter__(self) -> Any:
            did.append("enter")

        def __exit__(self, *error: object) -> None:
            did.append("exit")

        def close(self) -> None:
            did.append("close")

    with library.http.Client(transport=library.guard.BreakerTransport(CircuitBreaker("a"), Inner())):
        pass
    library.http.Client(transport=library.guard.BreakerTransport(CircuitBreaker("a"), Inner())).close()
    assert did == ["enter", "exit", "close"]


# asyncio


def on_loop(
    library: Library,
    service: Service,
    make: Callable[..., AsyncCircuitBreakerManager],
    use: Callable[[Any, Any], Any],
    policy: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Run use(client, breaker) on a loop of its own."""

    async def run() -> None:
        async with make(**(policy or {})) as manager:
            transport = library.guard.AsyncBreakerTransport(manager, **options)
            async with library.http.AsyncClient(transport=transport, base_url=service.url, timeout=5) as client:
                await use(client, manager.get_or_create(f"127.0.0.1:{service.port}"))

    asyncio.run(run())


Make = Callable[..., AsyncCircuitBreakerManager]


def test_asyncio_failures_open(library: Library, service: Service, make_async_manager: Make) -> None:
    """Statuses and errors, as in threads."""

    async def use(client: Any, breaker: Any) -> None:
        assert (await client.get("/status/404")).status_code == 404
        assert (await client.get("/status/500")).status_code == 500
        with pytest.raises(library.http.ReadError):
            await client.get("/reset")
        with pytest.raises(library.http.ReadTimeout):
            await client.get("/hang", timeout=0.1)
        with pytest.raises(library.guard.CircuitOpenTransportError) as caught:
            await client.get("/")
        assert isinstance(caught.value, CircuitOpenError)
        assert nonzero(breaker.counts) == {"successes": 1, "failures": 3, "rejected": 1}

    on_loop(library, service, make_async_manager, use)


@pytest.mark.parametrize("until", ["headers", "body"])
def test_asyncio_bodies(library: Library, service: Service, make_async_manager: Make, until: str) -> None:
    """They arrive, may be left early, and fail under guard when they break off."""

    async def use(client: Any, breaker: Any) -> None:
        assert (await client.get("/stream")).text == "chunk" * 10
        async with client.stream("GET", "/stream") as response:
            await anext(response.aiter_raw())
        assert nonzero(breaker.counts) == {"successes": 2}
        with pytest.raises(library.http.RemoteProtocolError):
            await client.get("/cut")
        broken = {"successes": 2, "failures": 1} if until == "body" else {"successes": 3}
        assert nonzero(breaker.counts) == broken

    on_loop(library, service, make_async_manager, use, until=until)


@pytest.mark.parametrize(("until", "path"), [("headers", "/hang"), ("body", "/hang"), ("body", "/hang-body")])
def test_a_cancelled_request_frees_its_probe_slot(
    library: Library, service: Service, make_async_manager: Make, until: str, path: str
) -> None:
    """The next request is the probe, and no failure was counted."""

    async def use(client: Any, breaker: Any) -> None:
        await client.get("/status/500")
        probe = await running_probe(service, path, lambda: client.get(path))
        with pytest.raises(library.guard.CircuitOpenTransportError):
            await client.get("/")
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(CircuitOpenError):
                    assert (await client.get("/")).status_code == 200
                    break
                await asyncio.sleep(0.05)
        assert breaker.counts.failures == 1
        assert breaker.counts.ignored == 1

    policy = {"failure_threshold": 1, "reset_timeout": 0.05, "probe_timeout": 3600.0}
    on_loop(library, service, make_async_manager, use, policy, until=until)


def test_an_option_that_raises_is_logged_once_and_the_caller_gets_its_response(
    library: Library,
    service: Service,
    call: Callable[..., Caller],
    make_async_manager: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A fault in retry_after= costs nobody a response."""

    def retry_after(response: Any) -> float | None:
        raise KeyError("a fault in an option")

    async def use(client: Any, breaker: Any) -> None:
        for _ in range(2):
            assert (await client.get("/")).status_code == 200
        assert breaker.counts.successes == 2

    caller = call(retry_after=retry_after)
    assert [caller.get().status_code, caller.get().status_code] == [200, 200]
    assert caplog.text.count("retry_after= of 'HTTP client' failed") == 1
    on_loop(library, service, make_async_manager, use, retry_after=retry_after)


def test_a_predicate_that_raises_leaves_the_caller_its_own_error(
    library: Library, call: Callable[..., Caller], caplog: pytest.LogCaptureFixture
) -> None:
    """The call counts as failed."""

    def failures(error: BaseException) -> bool:
        raise KeyError("a fault in an option")

    caller = call(failures=failures)
    assert isinstance(caller.error_of("/reset"), library.http.TransportError)
    assert "failures= or ignore= of 'HTTP client' failed" in caplog.text
    assert caller.counts == {"failures": 1}


def test_each_library_has_an_error_of_its_own() -> None:
    """The errors of one are none of the other."""
    for_httpx2 = Library("httpx2").guard
    assert not issubclass(for_httpx2.CircuitOpenTransportError, httpx.TransportError)
    assert issubclass(for_httpx.CircuitOpenTransportError, httpx.TransportError)
