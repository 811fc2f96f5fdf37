"""Transports that guard every request of a client of httpx2 (needs the extra `httpx2`)."""

from __future__ import annotations

from typing import TypeAlias

from .. import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
)
from .._extras import needs_extra
from . import _httpx
from ._http import host_of

with needs_extra(__name__, "httpx2"):
    import httpx2

__all__ = ["AsyncBreakerTransport", "BreakerTransport", "CircuitOpenTransportError", "host_of", "sdk_response"]

_Breakers: TypeAlias = CircuitBreakerManager | CircuitBreaker
_AsyncBreakers: TypeAlias = AsyncCircuitBreakerManager | AsyncCircuitBreaker


class CircuitOpenTransportError(CircuitOpenError, httpx2.TransportError):
    """The request was rejected, and not sent. Handlers of httpx2.TransportError see it, too."""

    _request = None


class _Body(_httpx.Body, httpx2.SyncByteStream):
    pass


class _AsyncBody(_httpx.AsyncBody, httpx2.AsyncByteStream):
    pass


class BreakerTransport(
    _httpx.SyncGuard[_Breakers, httpx2.Request, httpx2.Response, httpx2.BaseTransport], httpx2.BaseTransport
):
    """See pybreaker_redis.integrations.httpx.BreakerTransport: takes the same options."""

    _library, _error, _body = httpx2, CircuitOpenTransportError, _Body


class AsyncBreakerTransport(
    _httpx.AsyncGuard[_AsyncBreakers, httpx2.Request, httpx2.Response, httpx2.AsyncBaseTransport],
    httpx2.AsyncBaseTransport,
):
    """BreakerTransport for asyncio: takes the same options."""

    _library, _error, _body = httpx2, CircuitOpenTransportError, _AsyncBody


def sdk_response(error: CircuitOpenTransportError) -> httpx2.Response:
    """For `rejected=`: answers a rejection with a 503 that the SDKs of OpenAI and Anthropic do not retry."""
    response: httpx2.Response = _httpx.sdk_response(httpx2, error)
    return response
