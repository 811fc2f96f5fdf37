"""A middleware that guards every request of a client session of aiohttp (needs the extra `aiohttp`)."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Collection
from typing import Any

from .. import AsyncCircuitBreaker, AsyncCircuitBreakerManager, CircuitOpenError
from .._classify import Exceptions, RetryAfter
from .._extras import needs_extra
from ._http import FAILURE_STATUSES, Rules, finder, host_of, rejection, retry_after_header

with needs_extra(__name__, "aiohttp"):
    import aiohttp

__all__ = ["CircuitOpenClientError", "breaker_middleware", "host_of", "is_callers_fault"]

_FAILURES = (aiohttp.ClientConnectionError, aiohttp.ClientResponseError, aiohttp.ClientPayloadError, OSError)
_POOL_WAIT = "_wait_for_available_connection"  # the method of aiohttp's connectors that waits for a free connection


def is_callers_fault(error: BaseException) -> bool:
    """The default of `ignore`: whether the caller caused this error.

    True for a wait for a free connection of the pool, a closed connector, and a body that raised. aiohttp has no
    separate exception types for these.
    """
    if type(error) is aiohttp.ClientConnectionError and not isinstance(error.__cause__, OSError):
        return True
    cause: BaseException | None = error
    while isinstance(cause, (TimeoutError, asyncio.CancelledError)):
        if any(frame.f_code.co_name == _POOL_WAIT for frame, _ in traceback.walk_tb(cause.__traceback__)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class CircuitOpenClientError(CircuitOpenError, aiohttp.ClientConnectionError):
    """The request was rejected, and not sent. Handlers of aiohttp.ClientConnectionError see it, too."""


def breaker_middleware(
    breakers: AsyncCircuitBreakerManager | AsyncCircuitBreaker,
    *,
    name: str | Callable[[Any], str | None] = host_of,
    failure_statuses: Collection[int] = FAILURE_STATUSES,
    failures: Exceptions = _FAILURES,
    ignore: Exceptions = is_callers_fault,
    retry_after: RetryAfter = retry_after_header,
) -> aiohttp.ClientMiddlewareType:
    """A middleware for ClientSession(middlewares=[...]), with aiohttp 3.12 or newer.

    breakers: a manager, or one breaker for every request.
    name: the name of a request's breaker, or a function of the ClientRequest. None from it: the request is not guarded.
    failure_statuses: the statuses that count as failures. Any other response is a success.
    failures: the exceptions that count as failures: types, or a function of the exception. Any other
        exception does not count.
    ignore: exceptions in `failures` that are not counted: types, or a function of the exception.
    retry_after: a function of the response: for how many seconds the service asked not to be called, or None.

    A call ends with the headers of the response. To guard the body as well, read it in a block of your own. aiohttp
    repeats an idempotent request once when its connection breaks: each try is a call. A timeout of ClientTimeout is a
    failure, including `total`. A task that is cancelled does not count.

    The breakers' own options for failures do not apply. A rejected request raises CircuitOpenClientError. Raises
    PolicyError for breakers that do not fit.
    """
    find = finder(breakers, (AsyncCircuitBreakerManager, AsyncCircuitBreaker), name)
    rules = Rules(failures, ignore, failure_statuses, retry_after)

    async def guard(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        breaker = find(request)
        if breaker is None:
            return await handler(request)
        try:
            permit = await breaker.acquire()
        except CircuitOpenError as rejected:
            raise rejection(CircuitOpenClientError, rejected) from None
        async with permit:
            try:
                response = await handler(request)
            except BaseException as error:
                await rules.failed(permit, _as_time_out(error, request))
                raise
            try:
                if (report := rules.answered(permit, response.status, response)) is not None:
                    await report
            except BaseException:
                response.close()
                raise
        return response

    return guard


def _as_time_out(error: BaseException, request: aiohttp.ClientRequest) -> BaseException:
    """The error; but a TimeoutError for a cancellation by aiohttp's own timer, which aiohttp converts further out."""
    if isinstance(error, asyncio.CancelledError) and (timer := getattr(request, "_timer", None)) is not None:
        try:
            timer.assert_timeout()
        except TimeoutError as time_out:
            time_out.__cause__ = error
            return time_out
    return error
