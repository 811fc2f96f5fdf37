"""Transports that guard every request of a client of httpx (needs the extra `httpx`)."""

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

with needs_extra(__name__, "httpx"):
    import httpx

__all__ = ["AsyncBreakerTransport", "BreakerTransport", "CircuitOpenTransportError", "host_of", "sdk_response"]

_Breakers: TypeAlias = CircuitBreakerManager | CircuitBreaker
_AsyncBreakers: TypeAlias = AsyncCircuitBreakerManager | AsyncCircuitBreaker


class CircuitOpenTransportError(CircuitOpenError, httpx.TransportError):
    """The request was rejected, and not sent. Handlers of httpx.TransportError see it, too."""

    _request = None


class _Body(_httpx.Body, httpx.SyncByteStream):
    pass


class _AsyncBody(_httpx.AsyncBody, httpx.AsyncByteStream):
    pass


class BreakerTransport(
    _httpx.SyncGuard[_Breakers, httpx.Request, httpx.Response, httpx.BaseTransport], httpx.BaseTransport
):
    """A transport that guards each request of another transport.

    breakers: a manager, or one breaker for every request.
    transport: sends the requests. None: a new httpx.HTTPTransport(). Connection options, such as verify, http2,
        limits and proxies, belong to this transport, not to the client.
    name: the name of a request's breaker, or a function of the request. None from it: the request is not guarded.
    until: "headers": a call ends with the headers of the response. "body": it ends when the body has been read or
        closed, and a body that breaks off is a failure.
    rejected: a function of the CircuitOpenTransportError that returns a response. None: the error is raised.
    failure_statuses: the statuses that count as failures. Any other response is a success.
    failures: the exceptions that count as failures: types, or a function of the exception. Any other
        exception does not count. None: httpx.TransportError.
    ignore: exceptions in `failures` that are not counted: types, or a function of the exception. None: the caller's
        own faults, which are PoolTimeout, UnsupportedProtocol and LocalProtocolError.
    retry_after: a function of the response: for how many seconds the service asked not to be called, or None.

    The breakers' own options for failures do not apply. Raises PolicyError for an invalid option.
    """

    _library, _error, _body = httpx, CircuitOpenTransportError, _Body


class AsyncBreakerTransport(
    _httpx.AsyncGuard[_AsyncBreakers, httpx.Request, httpx.Response, httpx.AsyncBaseTransport], httpx.AsyncBaseTransport
):
    """BreakerTransport for asyncio: takes the same options."""

    _library, _error, _body = httpx, CircuitOpenTransportError, _AsyncBody


def sdk_response(error: CircuitOpenTransportError) -> httpx.Response:
    """For `rejected=`: answers a rejection with a 503 that the SDKs of OpenAI and Anthropic do not retry."""
    response: httpx.Response = _httpx.sdk_response(httpx, error)
    return response
