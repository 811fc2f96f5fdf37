"""A web application that answers 503 with Retry-After while the circuit of its search service is open.

Run it with `uvicorn fastapi_app:app`. All instances share the server in REDIS_URL; without it, each decides for itself.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from pybreaker_redis import AsyncCircuitBreakerManager, CircuitOpenError, Config, Policy

config = Config(
    services={"search": Policy(failure_threshold=5, reset_timeout=10, error_rate_threshold=0.5)},
    redis_url=os.environ.get("REDIS_URL", ""),
)
breakers = (AsyncCircuitBreakerManager.with_redis if config.redis_url else AsyncCircuitBreakerManager)(config)
backend = httpx.AsyncClient(base_url=os.environ.get("SEARCH_URL", "http://127.0.0.1:9200"), timeout=1.0)


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with breakers, backend:
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(CircuitOpenError)
async def reject(request: Request, error: CircuitOpenError) -> JSONResponse:
    wait = max(math.ceil(error.retry_after), 1)  # the header takes whole seconds
    return JSONResponse({"error": f"{error.name} is not available"}, 503, {"Retry-After": str(wait)})


@app.exception_handler(httpx.HTTPError)
async def fail(request: Request, error: httpx.HTTPError) -> JSONResponse:
    return JSONResponse({"error": "search does not answer"}, 502)


async def ask(query: str) -> object:
    answer = await backend.get("/search", params={"q": query})
    if answer.status_code >= 500:  # a 4xx is our mistake, not a failure of the service
        answer.raise_for_status()
    return answer.json()


@app.get("/search")
async def search(q: str) -> object:
    return await breakers.call("search", ask, q)


@app.get("/health")
async def health() -> dict[str, str]:
    return dict(await breakers.get_all_states())
