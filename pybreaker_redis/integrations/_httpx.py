"""The transports for httpx and httpx2, which have the same interface. Imports neither."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any, Generic, Self, TypeVar

from .. import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
)
from .._classify import Exceptions, RetryAfter
from ._http import (
    FAILURE_STATUSES,
    UNAVAILABLE,
    Rules,
    Until,
    check_until,
    finder,
    host_of,
    rejection,
    retry_after_header,
    unavailable_headers,
)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
TransportT = TypeVar("TransportT")
BreakersT = TypeVar("BreakersT")


class Body:
    """The body of a response, read under guard. A subclass also inherits from the library's stream class."""

    def __init__(self, stream: Any, permit: Any, rules: Rules, block: contextlib.ExitStack) -> None:
        self._stream, self._permit, self._rules, self._block = stream, permit, rules, block

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except GeneratorExit:
            raise
        except BaseException as error:
            if not self._permit.settled:
                self._rules.failed(self._permit, error)
            raise
        self._block.close()

    def close(self) -> None:
        """Close the stream. If the caller did not read it to its end, the call is a success, since nothing broke."""
        try:
            self._stream.close()
        finally:
            self._block.close()


class AsyncBody:
    """Body for asyncio."""

    def __init__(self, stream: Any, permit: Any, rules: Rules, block: contextlib.AsyncExitStack) -> None:
        self._stream, self._permit, self._rules, self._block = stream, permit, rules, block

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                yield part
        except GeneratorExit:
            raise
        except BaseException as error:
            if not self._permit.settled:
                await self._rules.failed(self._permit, error)
            raise
        await self._block.aclose()

    async def aclose(self) -> None:
        """See Body.close."""
        try:
            await self._stream.aclose()
        finally:
            await self._block.aclose()


class Guard(Generic[BreakersT, RequestT, ResponseT, TransportT]):
    """What both transports share. Their docstrings describe the options."""

    _library: Any
    _kinds: tuple[type[Any], type[Any]]
    _error: type[CircuitOpenError]
    _body: type[Any]
    _default_transport: str

    def __init__(
        self,
        breakers: BreakersT,
        transport: TransportT | None = None,
        *,
        name: str | Callable[[RequestT], str | None] = host_of,
        until: Until = "headers",
        rejected: Callable[[Any], ResponseT] | None = None,
        failure_statuses: Collection[int] = FAILURE_STATUSES,
        failures: Exceptions | None = None,
        ignore: Exceptions | None = None,
        retry_after: RetryAfter = retry_after_header,
    ) -> None:
        check_until(until)
        library = self._library
        self._transport: Any = getattr(library, self._default_transport)() if transport is None else transport
        self._find = finder(breakers, self._kinds, name)
        self._until = until
        self._rejected = rejected
        if failures is None:
            failures = (library.TransportError,)
        if ignore is None:
            ignore = (library.PoolTimeout, library.UnsupportedProtocol, library.LocalProtocolError)
        self._rules = Rules(failures, ignore, failure_statuses, retry_after)

    def _reject(self, request: RequestT, rejected: CircuitOpenError) -> ResponseT:
        error: Any = rejection(self._error, rejected)
        error.request = request
        if self._rejected is None:
            raise error from None
        return self._rejected(error)


class SyncGuard(Guard[BreakersT, RequestT, ResponseT, TransportT]):
    """A transport that guards each request of another transport."""

    _kinds = (CircuitBreakerManager, CircuitBreaker)
    _default_transport = "HTTPTransport"

    def handle_request(self, request: RequestT) -> ResponseT:
        """Send the request, guarded. Raises CircuitOpenTransportError if rejected."""
        breaker = self._find(request)
        if breaker is None:
            return self._transport.handle_request(request)  # type: ignore[no-any-return]
        try:
            permit = breaker.acquire()
        except CircuitOpenError as rejected:
            return self._reject(request, rejected)
        if self._until == "body":
            return self._send_until_body(request, permit)
        with permit:
            return self._send(request, permit)

    def _send(self, request: RequestT, permit: Any) -> ResponseT:
        """Send it, and settle the permit unless the response is a success."""
        try:
            response: Any = self._transport.handle_request(request)
        except BaseException as error:
            self._rules.failed(permit, error)
            raise
        try:
            self._rules.answered(permit, response.status_code, response)
        except BaseException:
            response.close()
            raise
        return response  # type: ignore[no-any-return]

    def _send_until_body(self, request: RequestT, permit: Any) -> ResponseT:
        with contextlib.ExitStack() as block:
            block.enter_context(permit)
            response: Any = self._send(request, permit)
            if not permit.settled:
                response.stream = self._body(response.stream, permit, self._rules, block.pop_all())
        return response  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the other transport."""
        self._transport.close()

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._transport.__exit__(*error)


class AsyncGuard(Guard[BreakersT, RequestT, ResponseT, TransportT]):
    """SyncGuard for asyncio."""

    _kinds = (AsyncCircuitBreakerManager, AsyncCircuitBreaker)
    _default_transport = "AsyncHTTPTransport"

    async def handle_async_request(self, request: RequestT) -> ResponseT:
        """Send the request, guarded. Raises CircuitOpenTransportError if rejected."""
        breaker = self._find(request)
        if breaker is None:
            return await self._transport.handle_async_request(request)  # type: ignore[no-any-return]
        try:
            permit = await breaker.acquire()
        except CircuitOpenError as rejected:
            return self._reject(request, rejected)
        if self._until == "body":
            return await self._send_until_body(request, permit)
        async with permit:
            return await self._send(request, permit)

    async def _send(self, request: RequestT, permit: Any) -> ResponseT:
        """See SyncGuard._send."""
        try:
            response: Any = await self._transport.handle_async_request(request)
        except BaseException as error:
            await self._rules.failed(permit, error)
            raise
        try:
            if (report := self._rules.answered(permit, response.status_code, response)) is not None:
                await report
        except BaseException:
            await response.aclose()
            raise
        return response  # type: ignore[no-any-return]

    async def _send_until_body(self, request: RequestT, permit: Any) -> ResponseT:
        async with contextlib.AsyncExitStack() as block:
            await block.enter_async_context(permit)
            response: Any = await self._send(request, permit)
            if not permit.settled:
                response.stream = self._body(response.stream, permit, self._rules, block.pop_all())
        return response  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Close the other transport."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._transport.__aexit__(*error)


def sdk_response(library: Any, error: CircuitOpenError) -> Any:
    """A 503 that tells the SDKs of OpenAI and Anthropic not to retry."""
    headers = {**unavailable_headers(error), "x-should-retry": "false"}
    body = {"error": {"type": "circuit_open", "message": UNAVAILABLE, "breaker": error.name}}
    return library.Response(503, headers=headers, json=body)
