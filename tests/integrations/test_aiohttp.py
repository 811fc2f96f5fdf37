"""The middleware for aiohttp against a service that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from conftest import nonzero

from pybreaker_redis import AsyncCircuitBreaker, AsyncCircuitBreakerManager, CircuitOpenError
from pybreaker_redis.integrations.aiohttp import CircuitOpenClientError, breaker_middleware

from .service import Service, running_probe

Make = Callable[..., AsyncCircuitBreakerManager]
Use = Callable[[aiohttp.ClientSession, AsyncCircuitBreaker], Awaitable[None]]


def on_loop(make: Make, service: Service, use: Use, policy: dict[str, Any] | None = None, **options: Any) -> None:
    """Run use(session, breaker) on a loop of its own."""

    async def run() -> None:
        async with make(**(policy or {})) as manager:
            guard = breaker_middleware(manager, **options)
            timeout = aiohttp.ClientTimeout(total=5)
            async with aiohttp.ClientSession(service.url, middlewares=[guard], timeout=timeout) as session:
                await use(session, manager.get_or_create(f"127.0.0.1:{service.port}"))

    asyncio.run(run())


async def status_of(session: aiohttp.ClientSession, path: str, **options: Any) -> int:
    async with session.get(path, **options) as response:
        await response.read()
        return response.status


def test_statuses(make_async_manager: Make, service: Service) -> None:
    """5xx fail, 4xx succeed; the rejection is a ClientConnectionError of aiohttp, too."""

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        for status in (200, 204, 400, 404, 429, 501, 500, 502, 504):
            assert await status_of(session, f"/status/{status}") == status
        with pytest.raises(aiohttp.ClientConnectionError) as caught:
            await status_of(session, "/")
        error = caught.value
        assert isinstance(error, CircuitOpenClientError)
        assert isinstance(error, CircuitOpenError)
        assert pickle.loads(pickle.dumps(error)).args[:3] == (error.name, "open", error.retry_after)
        assert nonzero(breaker.counts) == {"successes": 6, "failures": 3, "rejected": 1}
        assert service.requests == 9

    on_loop(make_async_manager, service, use)


@pytest.mark.parametrize(
    ("path", "error"), [("/reset", aiohttp.ClientOSError), ("/close", aiohttp.ServerDisconnectedError)]
)
def test_connections_that_break(make_async_manager: Make, service: Service, path: str, error: type[Exception]) -> None:
    """Each try of aiohttp's is a call: it repeats an idempotent request once."""

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        with pytest.raises(error):
            async with session.post(path):
                pass
        assert breaker.counts.failures == service.requests == 1
        with pytest.raises(error):
            await status_of(session, path)
        assert breaker.counts.failures == service.requests == 3
        with pytest.raises(CircuitOpenError):
            await status_of(session, "/")

    on_loop(make_async_manager, service, use)


@pytest.mark.parametrize("timeout", [{"total": 0.2}, {"sock_read": 0.2}])
def test_time_outs(make_async_manager: Make, service: Service, timeout: dict[str, float]) -> None:
    """Those of aiohttp are failures, the total one too, which cancels the task from within."""

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await status_of(session, "/hang", timeout=aiohttp.ClientTimeout(**timeout))
        assert nonzero(breaker.counts) == {"failures": 3}

    on_loop(make_async_manager, service, use)


@pytest.mark.parametrize("timeout", [{"total": 0.2}, {"connect": 0.2}, {"sock_connect": 0.2}])
def test_time_outs_while_connecting(make_async_manager: Make, service: Service, timeout: dict[str, float]) -> None:
    """A host that takes no connections: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)

        async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
            url = f"http://127.0.0.1:{address[1]}/"
            with pytest.raises(TimeoutError):
                await status_of(session, url, timeout=aiohttp.ClientTimeout(**timeout))
            assert nonzero(breaker.counts) == {"failures": 1}

        on_loop(make_async_manager, service, use, name=f"127.0.0.1:{service.port}")


def test_cancelled_from_outside(make_async_manager: Make, service: Service) -> None:
    """It counts as nothing, and frees the slot of a probe."""

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        await status_of(session, "/status/500")
        probe = await running_probe(service, "/hang", lambda: status_of(session, "/hang"))
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(CircuitOpenError):
                    assert await status_of(session, "/") == 200
                    break
                await asyncio.sleep(0.05)
        assert (breaker.counts.failures, breaker.counts.ignored) == (1, 1)

    policy = {"failure_threshold": 1, "reset_timeout": 0.05, "probe_timeout": 3600.0}
    on_loop(make_async_manager, service, use, policy)


def test_nobody_listens(make_async_manager: Make, service: Service) -> None:
    """A refused connection is a failure."""

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        with pytest.raises(aiohttp.ClientConnectorError):
            await status_of(session, "http://127.0.0.1:1/")
        assert nonzero(breaker.counts) == {"failures": 1}

    on_loop(make_async_manager, service, use, name=f"127.0.0.1:{service.port}")


def test_the_callers_own_faults(make_async_manager: Make, service: Service) -> None:
    """A bad URL, a body that raises, a pool without a free connection, and a closed connector count as nothing."""

    async def body() -> Any:
        yield b"half"
        raise KeyError("the caller's own")

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        with pytest.raises(aiohttp.InvalidURL):
            await status_of(session, "http://:80/")
        with pytest.raises(aiohttp.ClientConnectionError):
            async with session.post("/", data=body()):
                pass
        assert nonzero(breaker.counts) == {"ignored": 1}
        assert session.connector is not None
        await session.connector.close()
        with pytest.raises((RuntimeError, aiohttp.ClientError)):
            await status_of(session, "/")
        assert breaker.counts.failures == breaker.counts.successes == 0

    async def full_pool(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        connector = aiohttp.TCPConnector(limit=1)
        async with (
            aiohttp.ClientSession(service.url, connector=connector, middlewares=[breaker_middleware(breaker)]) as other,
            other.get("/hang-body"),
        ):
            for time_out in ({"connect": 0.1}, {"total": 0.1}):
                with pytest.raises(TimeoutError):
                    await status_of(other, "/", timeout=aiohttp.ClientTimeout(**time_out))
            assert nonzero(breaker.counts) == {"successes": 1, "ignored": 3}

    async def both(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        await use(session, breaker)
        await full_pool(session, breaker)

    on_loop(make_async_manager, service, both)


def test_streams(make_async_manager: Make, service: Service) -> None:
    """A body arrives in pieces; the call has ended with the headers."""

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        async with session.get("/stream") as response:
            assert nonzero(breaker.counts) == {"successes": 1}
            assert b"".join([part async for part in response.content.iter_any()]) == b"chunk" * 10
        with pytest.raises(aiohttp.ClientPayloadError):
            await status_of(session, "/cut")
        assert nonzero(breaker.counts) == {"successes": 2}

    on_loop(make_async_manager, service, use)


def test_parameters(make_async_manager: Make, service: Service) -> None:
    """Statuses, exceptions, what holds, and what is not guarded."""

    async def use(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        await status_of(session, "/status/418")
        await status_of(session, "/status/503?Retry-After=7")
        with pytest.raises(TimeoutError):
            await status_of(session, "/hang", timeout=aiohttp.ClientTimeout(sock_read=0.1))
        assert nonzero(breaker.counts) == {"failures": 1, "successes": 1, "ignored": 1}

    options: dict[str, Any] = {"failure_statuses": {418}, "retry_after": lambda response: None}
    on_loop(make_async_manager, service, use, ignore=TimeoutError, **options)

    async def unguarded(session: aiohttp.ClientSession, breaker: AsyncCircuitBreaker) -> None:
        await status_of(session, "/status/500")
        assert nonzero(breaker.counts) == {}

    on_loop(make_async_manager, service, unguarded, name=lambda request: None)
