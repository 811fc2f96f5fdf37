"""The application: it searches by asking another service, and answers 503 while that service's circuit is open.

SEARCH_URL names the service, REDIS_URL the server that all instances share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI, HTTPException

from pybreaker_redis import AsyncCircuitBreakerManager, CircuitOpenError, Config, Policy
from pybreaker_redis.integrations.httpx import AsyncBreakerTransport
from pybreaker_redis.integrations.starlette import install

breakers = AsyncCircuitBreakerManager.with_redis(
    Config(
        redis_url=os.environ.get("REDIS_URL", "redis://localhost:6379"),
        services={"search": Policy(failure_threshold=5, reset_timeout=2.0)},
    )
)
client = httpx.AsyncClient(
    base_url=os.environ.get("SEARCH_URL", "http://127.0.0.1:9200"),
    transport=AsyncBreakerTransport(breakers, name="search"),  # guards every request of this client
    timeout=1.0,
)


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with client:
        yield


app = FastAPI(lifespan=lifespan)
install(app, breakers, health="/health")  # 503 with Retry-After for each rejection; closes the manager at the end


@app.get("/search")
async def search(q: str) -> object:
    try:
        answer = await client.get("/", params={"q": q})
    except CircuitOpenError:  # an httpx.HTTPError, too
        raise
    except httpx.HTTPError as error:
        raise HTTPException(502, "search does not answer") from error
    if answer.is_error:
        raise HTTPException(502, "search failed")
    return answer.json()
