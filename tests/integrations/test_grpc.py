"""gRPC clients behind a breaker, against a real server on loopback. Messages are bytes, without generated code."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from typing import Any

import pytest
from conftest import wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy, PolicyError
from pybreaker_redis.testing import aset_state, set_state

grpc = pytest.importorskip("grpc")

from pybreaker_redis.integrations.grpc import (  # noqa: E402
    FAILURE_CODES,
    BreakerInterceptor,
    CircuitOpenAioRpcError,
    CircuitOpenRpcError,
    aio_interceptors,
)

KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
POLICY = Policy(failure_threshold=3, reset_timeout=60)


class Server:
    """Each method answers b"ok" three times over, but ends with the status that a request asks for by number.

    b"sleep" makes it wait until the client has gone.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        make = grpc.method_handlers_generic_handler
        handlers = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(getattr(self, f"_{kind}")) for kind in KINDS}
        self._server.add_generic_rpc_handlers((make("test.Echo", handlers), make("test.Other", handlers)))
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait(10)

    def _end(self, request: bytes, context: Any) -> None:
        if request == b"sleep":
            gone = threading.Event()
            context.add_callback(gone.set)
            gone.wait(30)
        elif request != b"fine":
            context.abort(next(code for code in grpc.StatusCode if code.name.encode() == request), "as asked")

    def _unary_unary(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        self._end(request, context)
        return b"ok"

    def _unary_stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        self.calls += 1
        yield from [b"ok"] * 3
        self._end(request, context)

    def _stream_unary(self, requests: Iterator[bytes], context: Any) -> bytes:
        self.calls += 1
        for request in requests:
            self._end(request, context)
        return b"ok"

    def _stream_stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        self.calls += 1
        for request in requests:
            yield b"ok"
            self._end(request, context)


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def echo(started: Server) -> Server:
    started.calls = 0
    return started


def caller(channel: Any, kind: str, service: str = "test.Echo") -> Callable[..., Any]:
    """Calls a method with one request, and returns all that it answers."""
    method = getattr(channel, kind)(f"/{service}/{kind}")
    requests, responses = kind.split("_")

    def call(request: bytes, **options: Any) -> Any:
        answer = method(request if requests == "unary" else iter([request]), **options)
        return answer if responses == "unary" else list(answer)

    return call


def guarded(echo: Server, breaker: Any, **options: Any) -> Any:
    return grpc.intercept_channel(grpc.insecure_channel(echo.target), BreakerInterceptor(breaker, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_service_is_left_alone(echo: Server, kind: str) -> None:
    """After failure_threshold failures no call reaches it; the rejection is an error of either library."""
    breaker = CircuitBreaker("echo", policy=POLICY)
    with guarded(echo, breaker) as channel:
        call = caller(channel, kind)
        assert b"ok" in (call(b"fine"), *call(b"fine"))
        for ended in range(1, 4):
            with pytest.raises(grpc.RpcError) as failed:
                call(b"UNAVAILABLE")
            assert not isinstance(failed.value, CircuitOpenError)
            wait_until(lambda ended=ended: breaker.counts.failures == ended)
        for _ in range(3):
            with pytest.raises(CircuitOpenError) as caught:
                call(b"fine")
            assert isinstance(caught.value, grpc.RpcError)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "echo" in caught.value.details()
            assert 0 < caught.value.retry_after <= 60
    assert echo.calls == 5
    assert (breaker.counts.successes, breaker.counts.failures, breaker.counts.rejected) == (2, 3, 3)
    assert breaker.snapshot().error == "FailedCallError: UNAVAILABLE: as asked"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("DEADLINE_EXCEEDED", "failures"),
        ("RESOURCE_EXHAUSTED", "failures"),
        ("NOT_FOUND", "successes"),
        ("INVALID_ARGUMENT", "successes"),
        ("INTERNAL", "successes"),
        ("CANCELLED", "ignored"),
    ],
)
def test_what_a_status_counts_as(echo: Server, kind: str, status: str, outcome: str) -> None:
    """Three codes are failures; CANCELLED is nothing; by any other the service did answer."""
    breaker = CircuitBreaker("echo")
    with guarded(echo, breaker) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            caller(channel, kind)(status.encode())
        assert failed.value.code().name == status
        wait_until(lambda: getattr(breaker.counts, outcome) == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_out_of_the_client_is_a_failure(echo: Server, kind: str) -> None:
    """timeout= ends the call within the guard."""
    breaker = CircuitBreaker("echo")
    with guarded(echo, breaker) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            caller(channel, kind)(b"sleep", timeout=0.2)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: breaker.counts.failures == 1)


def test_futures_and_streams_that_the_client_leaves(echo: Server) -> None:
    """A call counts when it ends, and as nothing if it was cancelled. A rejected future has the rejection."""
    breaker = CircuitBreaker("echo")
    with guarded(echo, breaker) as channel:
        method = channel.unary_unary("/test.Echo/unary_unary")
        assert method.future(b"fine").result(10) == b"ok"
        wait_until(lambda: breaker.counts.successes == 1)
        hanging = method.future(b"sleep")
        hanging.cancel()
        wait_until(lambda: breaker.counts.ignored == 1)
        stream = channel.unary_stream("/test.Echo/unary_stream")(b"sleep")
        assert next(stream) == b"ok"
        stream.cancel()
        wait_until(lambda: breaker.counts.ignored == 2)
        set_state(breaker, "open")
        rejected = method.future(b"fine")
        assert isinstance(rejected.exception(), CircuitOpenRpcError)
        with pytest.raises(CircuitOpenRpcError):
            next(channel.unary_stream("/test.Echo/unary_stream")(b"fine"))


def test_a_breaker_for_each_service_and_other_codes(echo: Server) -> None:
    """A function of the method chooses the breaker; failure_codes= names the codes."""
    breakers = {name: CircuitBreaker(name, policy=POLICY) for name in ("test.Echo", "test.Other")}
    chosen = lambda method: breakers[method.split("/")[1]]  # noqa: E731
    with guarded(echo, chosen, failure_codes=[grpc.StatusCode.INTERNAL]) as channel:
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                caller(channel, "unary_unary")(b"INTERNAL")
        with pytest.raises(CircuitOpenError):
            caller(channel, "unary_unary")(b"fine")
        assert caller(channel, "unary_unary", "test.Other")(b"fine") == b"ok"
        with pytest.raises(grpc.RpcError):
            caller(channel, "unary_unary", "test.Other")(b"UNAVAILABLE")
        assert breakers["test.Other"].counts.successes == 2


def test_no_server_at_all() -> None:
    """A connection that is refused is UNAVAILABLE."""
    breaker = CircuitBreaker("nobody", policy=POLICY)
    channel = grpc.intercept_channel(grpc.insecure_channel("127.0.0.1:1"), BreakerInterceptor(breaker))
    with channel:
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary("/test.Echo/unary_unary")(b"fine")
        with pytest.raises(CircuitOpenError):
            channel.unary_unary("/test.Echo/unary_unary")(b"fine")


def test_the_service_says_when_to_come_back(echo: Server) -> None:
    """The breaker's retry_after sees gRPC's own call, as in its trailing metadata."""
    seen: list[Any] = []

    def retry_after(error: Any) -> float:
        seen.append(error.call.trailing_metadata())
        return 7

    breaker = CircuitBreaker("echo", retry_after=retry_after)
    with guarded(echo, breaker) as channel:
        with pytest.raises(grpc.RpcError):
            caller(channel, "unary_unary")(b"UNAVAILABLE")
        wait_until(lambda: breaker.state == "open")
    assert seen == [()]
    assert breaker.snapshot().reason == "held"


def test_the_codes_by_default(echo: Server) -> None:
    """Each of FAILURE_CODES is a failure; every other code but OK and CANCELLED counts as success."""
    breaker = CircuitBreaker("echo", policy=Policy(failure_threshold=100))
    with guarded(echo, breaker) as channel:
        for code in set(grpc.StatusCode) - {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}:
            before = breaker.counts
            with pytest.raises(grpc.RpcError):
                caller(channel, "unary_unary")(code.name.encode())
            after, failed = breaker.counts, code in FAILURE_CODES
            assert (after.failures - before.failures, after.successes - before.successes) == (failed, not failed), code


def test_options_that_cannot_be() -> None:
    """A breaker of the other kind, and codes that are none."""
    for make, other in ((BreakerInterceptor, AsyncCircuitBreaker("a")), (aio_interceptors, CircuitBreaker("a"))):
        with pytest.raises(PolicyError):
            make(other)
        with pytest.raises(PolicyError):
            make("payments")
        with pytest.raises(PolicyError, match=r"failure_codes must be of type grpc\.StatusCode, not 14"):
            make(lambda method: None, failure_codes=[14])


def test_rejections_can_be_pickled() -> None:
    """They keep name, state and retry_after."""
    for kind in (CircuitOpenRpcError, CircuitOpenAioRpcError):
        copy = pickle.loads(pickle.dumps(kind("echo", "open", 1.5)))
        assert (type(copy), copy.name, copy.state, copy.retry_after) == (kind, "echo", "open", 1.5)
        assert copy.code() is grpc.StatusCode.UNAVAILABLE
        assert "echo" in str(copy)


# asyncio -----------------------------------------------------------------------------------------


def aio_caller(channel: Any, kind: str) -> Callable[..., Any]:
    method = getattr(channel, kind)(f"/test.Echo/{kind}")
    requests, responses = kind.split("_")

    async def one(request: bytes) -> AsyncIterator[bytes]:
        yield request

    async def call(request: bytes, **options: Any) -> Any:
        answer = method(request if requests == "unary" else one(request), **options)
        return await answer if responses == "unary" else [message async for message in answer]

    return call


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_service_is_left_alone_on_asyncio(echo: Server, kind: str) -> None:
    """The same through grpc.aio."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("echo", policy=POLICY)
        async with grpc.aio.insecure_channel(echo.target, interceptors=aio_interceptors(breaker)) as channel:
            call = aio_caller(channel, kind)
            await call(b"fine")
            for ended in range(1, 4):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await call(b"UNAVAILABLE")
                assert not isinstance(failed.value, CircuitOpenError)
                await until(lambda ended=ended: breaker.counts.failures == ended)
            for _ in range(3):
                with pytest.raises(CircuitOpenError) as caught:
                    await call(b"fine")
                assert isinstance(caught.value, grpc.aio.AioRpcError)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            rejected = channel.unary_unary("/test.Echo/unary_unary")(b"fine")
            assert await rejected.code() is grpc.StatusCode.UNAVAILABLE
            assert "echo" in await rejected.details()
        assert (breaker.counts.successes, breaker.counts.failures, breaker.counts.rejected) == (1, 3, 4)
        assert (await breaker.snapshot()).error == "FailedCallError: UNAVAILABLE: as asked"

    asyncio.run(main())
    assert echo.calls == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_status_counts_as_on_asyncio(echo: Server, kind: str) -> None:
    """Three codes and a timeout are failures; CANCELLED is nothing; by any other the service did answer."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("echo")
        async with grpc.aio.insecure_channel(echo.target, interceptors=aio_interceptors(breaker)) as channel:
            call = aio_caller(channel, kind)
            for status, outcome in (("NOT_FOUND", "successes"), ("RESOURCE_EXHAUSTED", "failures")):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call(status.encode())
                await until(lambda outcome=outcome: getattr(breaker.counts, outcome) == 1)
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"sleep", timeout=0.2)
            await until(lambda: breaker.counts.failures == 2)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await call(b"sleep")
            await until(lambda: breaker.counts.ignored == 1)

    asyncio.run(main())


def test_the_write_and_read_style(echo: Server) -> None:
    """Requests that are written one by one, and answers that are read one by one."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("echo")
        async with grpc.aio.insecure_channel(echo.target, interceptors=aio_interceptors(breaker)) as channel:
            call = channel.stream_unary("/test.Echo/stream_unary")()
            await call.write(b"fine")
            await call.done_writing()
            assert await call == b"ok"
            await until(lambda: breaker.counts.successes == 1)
            both = channel.stream_stream("/test.Echo/stream_stream")()
            await both.write(b"fine")
            assert await both.read() == b"ok"
            await both.done_writing()
            assert await both.code() is grpc.StatusCode.OK
            await until(lambda: breaker.counts.successes == 2)

    asyncio.run(main())


def test_probes_close_the_circuit(echo: Server) -> None:
    """The first call in half open is the probe, in either library."""
    breaker = CircuitBreaker("echo", policy=POLICY)
    set_state(breaker, "half_open")
    with guarded(echo, breaker) as channel:
        assert caller(channel, "unary_stream")(b"fine") == [b"ok"] * 3
        wait_until(lambda: breaker.state == "closed")

    async def main() -> None:
        breaker = AsyncCircuitBreaker("echo", policy=POLICY)
        await aset_state(breaker, "half_open")
        async with grpc.aio.insecure_channel(echo.target, interceptors=aio_interceptors(breaker)) as channel:
            assert await aio_caller(channel, "unary_unary")(b"fine") == b"ok"
            assert breaker.state == "closed"

    asyncio.run(main())
