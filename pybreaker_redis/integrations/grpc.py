"""gRPC clients behind a breaker: interceptors for every kind of call, blocking and asyncio.

    channel = grpc.intercept_channel(grpc.insecure_channel(target), BreakerInterceptor(breaker))
    channel = grpc.aio.insecure_channel(target, interceptors=aio_interceptors(breaker))

A call counts by its status when it ends; a stream, when the stream ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar

from .. import AsyncCircuitBreaker, AsyncPermit, CircuitBreaker, CircuitOpenError, Permit, PolicyError
from .._extras import needs_extra

with needs_extra(__name__, "grpc"):
    import grpc
    import grpc.aio

__all__ = [
    "FAILURE_CODES",
    "BreakerInterceptor",
    "CircuitOpenAioRpcError",
    "CircuitOpenRpcError",
    "FailedCallError",
    "aio_interceptors",
]

FAILURE_CODES: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
)
"""The status codes that count as failures by default."""

_B = TypeVar("_B", CircuitBreaker, AsyncCircuitBreaker)


class FailedCallError(Exception):
    """Stands for a failed call in on_call events and in the history. It is never raised.

    call: gRPC's own object, for the breaker's retry_after.
    """

    def __init__(self, code: grpc.StatusCode, details: str | None, call: Any) -> None:
        super().__init__(f"{code.name}: {details}" if details else code.name)
        self.call = call


class CircuitOpenRpcError(CircuitOpenError, grpc.RpcError):  # type: ignore[misc]
    """The call was rejected, and not sent. Handlers of grpc.RpcError see it, too, with the code UNAVAILABLE."""

    def code(self) -> grpc.StatusCode:
        """UNAVAILABLE."""
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        """What the breaker says."""
        return str(self)

    def initial_metadata(self) -> tuple[()]:
        """None: nothing was sent."""
        return ()

    def trailing_metadata(self) -> tuple[()]:
        """None: nothing was sent."""
        return ()

    def debug_error_string(self) -> str:
        """What the breaker says."""
        return str(self)


class CircuitOpenAioRpcError(CircuitOpenRpcError, grpc.aio.AioRpcError):  # type: ignore[misc]
    """CircuitOpenRpcError for grpc.aio. Handlers of grpc.aio.AioRpcError see it, too."""

    __str__, __repr__ = CircuitOpenError.__str__, CircuitOpenError.__repr__
    __reduce__ = Exception.__reduce__


class _Guard(Generic[_B]):
    """What the blocking and the asyncio interceptors share. Raises PolicyError for an invalid option.

    BreakerInterceptor describes the options.
    """

    _kind: type[_B]

    def __init__(
        self, breaker: _B | Callable[[str], _B], *, failure_codes: Iterable[grpc.StatusCode] = FAILURE_CODES
    ) -> None:
        own = isinstance(breaker, self._kind)
        if not own and (isinstance(breaker, (CircuitBreaker, AsyncCircuitBreaker)) or not callable(breaker)):
            raise PolicyError(
                f"breaker must be of type {self._kind.__name__}, or a function of the method, not {breaker!r}"
            )
        self._breaker_of: Callable[[str], Any] = (lambda _: breaker) if own else breaker
        self._failure_codes = frozenset(failure_codes)
        for code in self._failure_codes:
            if not isinstance(code, grpc.StatusCode):
                raise PolicyError(f"failure_codes must be of type grpc.StatusCode, not {code!r}")

    def _breaker(self, details: Any) -> Any:
        method = details.method
        return self._breaker_of(method.decode() if isinstance(method, bytes) else method)


class BreakerInterceptor(
    _Guard[CircuitBreaker],
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """For grpc.intercept_channel(channel, BreakerInterceptor(breaker)). A rejected call raises CircuitOpenRpcError.

    breaker: a CircuitBreaker for all calls, or a function of the method ("/package.Service/Method") that returns one.
    failure_codes: the status codes that count as failures. CANCELLED does not count, any other code is a success: the
        service did answer.

    Raises PolicyError for an invalid option.
    """

    _kind = CircuitBreaker

    def _intercept(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        try:
            permit = self._breaker(details).acquire()
        except CircuitOpenError as rejected:
            raise CircuitOpenRpcError(*rejected.args) from None
        try:
            call = continuation(details, request)
        except BaseException:
            permit.release()
            raise
        call.add_done_callback(lambda ended: self._settle(permit, ended))
        return call

    def _settle(self, permit: Permit, ended: Any) -> None:
        code = ended.code()
        if code in self._failure_codes:
            permit.failure(FailedCallError(code, ended.details(), ended))
        elif code is grpc.StatusCode.CANCELLED:
            permit.release()
        else:
            permit.success()

    intercept_unary_unary = intercept_unary_stream = _intercept
    intercept_stream_unary = intercept_stream_stream = _intercept


class _AioGuard(_Guard[AsyncCircuitBreaker]):
    _kind = AsyncCircuitBreaker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tasks: set[asyncio.Task[None]] = set()

    async def _start(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        """The permit and the call."""
        try:
            permit = await self._breaker(details).acquire()
        except CircuitOpenError as rejected:
            raise CircuitOpenAioRpcError(*rejected.args) from None
        try:
            return permit, await continuation(details, request)
        except BaseException:
            await permit.release()
            raise

    async def _intercept(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        permit, call = await self._start(continuation, details, request)

        def ended(_: object) -> None:
            task = asyncio.get_running_loop().create_task(self._settle(permit, call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        call.add_done_callback(ended)
        return call

    async def _settle(self, permit: AsyncPermit, call: Any) -> None:
        code = await call.code()
        if code in self._failure_codes:
            await permit.failure(FailedCallError(code, await call.details(), call))
        elif code is grpc.StatusCode.CANCELLED:
            await permit.release()
        else:
            await permit.success()


class _UnaryUnary(_AioGuard, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        permit, call = await self._start(continuation, details, request)
        try:
            await call.code()  # wait for the end, so that the call counts before the caller goes on
        except BaseException:  # this task was cancelled
            call.cancel()
            await permit.release()
            raise
        await self._settle(permit, call)
        return call


class _UnaryStream(_AioGuard, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    intercept_unary_stream = _AioGuard._intercept


class _StreamUnary(_AioGuard, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
    intercept_stream_unary = _AioGuard._intercept


class _StreamStream(_AioGuard, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    intercept_stream_stream = _AioGuard._intercept


def aio_interceptors(
    breaker: AsyncCircuitBreaker | Callable[[str], AsyncCircuitBreaker],
    *,
    failure_codes: Iterable[grpc.StatusCode] = FAILURE_CODES,
) -> list[grpc.aio.ClientInterceptor]:
    """For grpc.aio.insecure_channel(target, interceptors=aio_interceptors(breaker)). Returns four interceptors, since a
    channel of grpc.aio uses one object for one kind of call only. A rejected call raises CircuitOpenAioRpcError.

    breaker, failure_codes: as for BreakerInterceptor, with an AsyncCircuitBreaker.

    Raises PolicyError for an invalid option.
    """
    codes = frozenset(failure_codes)
    return [kind(breaker, failure_codes=codes) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]
