"""A Starlette and a FastAPI application under a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import fastapi
import httpx
import pytest
import redis
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    PolicyError,
)
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.integrations.starlette import circuit_open_handler, install
from pybreaker_redis.testing import aset_state

Make = Callable[..., AsyncCircuitBreakerManager]


@contextlib.contextmanager
def served(app: Any) -> Iterator[httpx.Client]:
    """A client of the application under uvicorn; its lifespan has ended after the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, headers={"Connection": "close"}) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def make_starlette(**options: Any) -> Starlette:
    return Starlette(**options)


def make_fastapi(**options: Any) -> Starlette:
    return fastapi.FastAPI(**options)


async def fail() -> None:
    raise ConnectionError


@pytest.mark.parametrize("make_app", [make_starlette, make_fastapi])
def test_a_rejection_is_a_503(
    make_app: Callable[..., Starlette], make_async_manager: Make, server: EmbeddedServer, client: redis.Redis
) -> None:
    """With Retry-After; other errors stay what they are; the manager is closed after the application's lifespan."""
    did: list[str] = []

    class Manager(AsyncCircuitBreakerManager):
        async def close(self) -> None:
            did.append("closed")
            await super().close()

    breakers = Manager.with_redis(make_async_manager(reset_timeout=20.0).config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        did.append("started")
        yield
        did.append("stopped")

    async def search(request: Request) -> Response:
        with contextlib.suppress(ConnectionError):
            await breakers.call("search", fail)
        return JSONResponse({"found": []})

    async def broken(request: Request) -> Response:
        raise ConnectionError

    app = make_app(lifespan=lifespan)
    app.add_route("/search", search)
    app.add_route("/broken", broken)
    install(app, breakers)
    with served(app) as browser:
        for _ in range(3):
            assert browser.get("/search").status_code == 200
        answer = browser.get("/search")
        assert answer.status_code == 503
        assert 0 < int(answer.headers["retry-after"]) <= 20
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json() == {"detail": "a service that this request needs is not available"}
        assert browser.get("/broken").status_code == 500
        assert browser.get("/health").status_code == 404
        assert did == ["started"]
    assert did == ["started", "stopped", "closed"]


@pytest.mark.parametrize("make_app", [make_starlette, make_fastapi])
def test_health(make_app: Callable[..., Starlette], make_async_manager: Make) -> None:
    """Off by default, the state of each breaker if asked for."""
    breakers = make_async_manager()
    app = make_app()
    install(app, breakers, health="/health")

    async def search(request: Request) -> Response:
        await breakers.get_or_create("search").force_open(30)
        return JSONResponse({})

    app.add_route("/search", search)
    with served(app) as browser:
        assert browser.get("/health").json() == {}
        browser.get("/search")
        assert browser.get("/health").json() == {"search": "open"}


def test_synchronous_endpoints(make_manager: Callable[..., CircuitBreakerManager]) -> None:
    """A CircuitBreakerManager serves them; its work with Redis stays off the event loop."""
    did: list[str] = []

    class Manager(CircuitBreakerManager):
        def close(self) -> None:
            did.append("closed")
            super().close()

    breakers = Manager.with_redis(make_manager().config)
    app = fastapi.FastAPI()
    install(app, breakers, health="/health")

    @app.get("/search")
    def search() -> str:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return breakers.call("search", lambda: "found")

    with served(app) as browser:
        assert browser.get("/search").json() == "found"
        breakers.get_or_create("search").force_open(30)
        assert browser.get("/search").status_code == 503
        assert browser.get("/health").json() == {"search": "open"}
    assert did == ["closed"]


@pytest.mark.parametrize("breakers", [CircuitBreaker("a"), AsyncCircuitBreaker("a"), None])
def test_what_is_no_manager_is_refused(breakers: Any) -> None:
    """When it is installed, not when the application ends."""
    with pytest.raises(PolicyError, match="of type AsyncCircuitBreakerManager or CircuitBreakerManager, not"):
        install(Starlette(), breakers)


def test_two_applications_share_nothing() -> None:
    """Each has the manager that it was given."""
    for state in ("open", "closed"):
        breakers = CircuitBreakerManager()
        app = Starlette()
        install(app, breakers, health="/health")
        getattr(breakers.get_or_create("search"), f"force_{state}")()
        with TestClient(app) as browser:
            assert browser.get("/health").json() == {"search": state}


def test_the_errors_of_clients_are_rejections_too() -> None:
    """Also where the application handles the client's errors by another handler."""
    from pybreaker_redis.integrations.httpx import BreakerTransport

    breaker = CircuitBreaker("search")
    breaker.force_open()
    backend = httpx.Client(transport=BreakerTransport(breaker))
    app = fastapi.FastAPI()
    install(app, CircuitBreakerManager())

    @app.exception_handler(httpx.HTTPError)
    async def bad_gateway(request: Request, error: Exception) -> Response:
        return JSONResponse({}, 502)

    @app.get("/search")
    def search() -> None:
        backend.get("http://127.0.0.1:1/")

    with TestClient(app) as browser:
        assert browser.get("/search").status_code == 503


@pytest.mark.parametrize("accept", [True, False])
def test_websockets(accept: bool) -> None:
    """A rejection closes them, and does no more: try again later."""

    async def endpoint(websocket: WebSocket) -> None:
        if accept:
            await websocket.accept()
        raise CircuitOpenError("search", "open", 3.0)

    app = Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    install(app, CircuitBreakerManager())
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"", "subprotocols": []}
    asyncio.run(app(scope, receive, send))
    accepted = ["websocket.accept"] if accept else []
    assert [message["type"] for message in sent] == [*accepted, "websocket.close"]
    assert sent[-1]["code"] == 1013


@pytest.mark.parametrize("make_app", [make_starlette, make_fastapi])
def test_the_handler_without_a_manager(make_app: Callable[..., Starlette]) -> None:
    """An application with a single breaker adds it itself."""
    breaker = AsyncCircuitBreaker("search")

    async def search(request: Request) -> Response:
        await breaker.call(asyncio.sleep, 0)
        await aset_state(breaker, "open")
        return JSONResponse("found")

    app = make_app(exception_handlers={CircuitOpenError: circuit_open_handler})
    app.add_route("/search", search)
    with TestClient(app) as browser:
        assert browser.get("/search").status_code == 200
        answer = browser.get("/search")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
