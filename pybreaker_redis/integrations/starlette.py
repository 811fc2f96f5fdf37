"""503 answers to rejections in a Starlette or FastAPI application (needs the extra `starlette`)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from .. import AsyncCircuitBreakerManager, CircuitBreakerManager, CircuitOpenError
from .._extras import needs_extra
from ._http import UNAVAILABLE, check_breakers, unavailable_headers

with needs_extra(__name__, "starlette"):
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.websockets import WebSocket

__all__ = ["circuit_open_handler", "install"]

_TRY_AGAIN_LATER = 1013  # a close code of WebSocket


def install(
    app: Starlette, breakers: AsyncCircuitBreakerManager | CircuitBreakerManager, *, health: str | None = None
) -> None:
    """Make the application answer 503 with Retry-After if a CircuitOpenError leaves an endpoint.

    app: a Starlette or FastAPI application. breakers: its manager, which is closed after the application's own lifespan
    has ended. health: the path, like "/health", of a page with the state of every breaker as JSON; None: no such page.
    Anyone who can read the page learns which services the application calls. Raises PolicyError if breakers is not a
    manager.
    """
    check_breakers(breakers, AsyncCircuitBreakerManager, CircuitBreakerManager)
    app.add_exception_handler(CircuitOpenError, circuit_open_handler)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        try:
            async with inner(app) as state:
                yield state
        finally:
            if isinstance(breakers, AsyncCircuitBreakerManager):
                await breakers.close()
            else:
                await run_in_threadpool(breakers.close)

    app.router.lifespan_context = lifespan
    if health is not None:

        async def states(request: Request) -> Response:
            if isinstance(breakers, AsyncCircuitBreakerManager):
                return JSONResponse(await breakers.get_all_states())
            return JSONResponse(await run_in_threadpool(breakers.get_all_states))

        app.add_route(health, states, include_in_schema=False)


async def circuit_open_handler(connection: Request | WebSocket, error: Exception) -> Any:
    """The exception handler that install() adds: for an application without a manager, add it yourself.

    It answers 503 with Retry-After, and closes a WebSocket with code 1013. The answer does not name the service, since
    anyone may read it.
    """
    assert isinstance(error, CircuitOpenError)
    if isinstance(connection, WebSocket):
        await connection.close(_TRY_AGAIN_LATER, UNAVAILABLE)
        return None
    return JSONResponse({"detail": UNAVAILABLE}, 503, unavailable_headers(error))
