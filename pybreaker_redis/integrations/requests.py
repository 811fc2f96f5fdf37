"""An adapter that guards every request of a session of requests (needs the extra `requests`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from .. import CircuitBreaker, CircuitBreakerManager, CircuitOpenError
from .._classify import Exceptions, RetryAfter
from .._extras import needs_extra
from ._http import (
    FAILURE_STATUSES,
    Rules,
    Until,
    check_until,
    finder,
    host_of,
    rejection,
    retry_after_header,
)

with needs_extra(__name__, "requests"):
    import requests
    from requests.adapters import BaseAdapter, HTTPAdapter
    from urllib3.exceptions import ClosedPoolError

__all__ = ["BreakerAdapter", "CircuitOpenConnectionError", "host_of"]

_FAILURES = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.RetryError,
)


class CircuitOpenConnectionError(CircuitOpenError, requests.ConnectionError):
    """The request was rejected, and not sent. Handlers of requests.ConnectionError see it, too."""

    request: requests.PreparedRequest | None = None
    response = None


class BreakerAdapter(BaseAdapter):
    """An adapter that guards each request of another adapter: session.mount("https://", BreakerAdapter(breakers)).

    breakers: a manager, or one breaker for every request.
    adapter: sends the requests. None: a new HTTPAdapter(). Its retries by urllib3 (max_retries) happen inside the
        guard: a request and its retries are one call.
    name: the name of a request's breaker, or a function of the PreparedRequest. None from it: the request is not
        guarded.
    until: "headers": a call ends with the headers of the response. "body": it ends when the body has been read, and a
        body that breaks off is a failure; with stream=True it still ends with the headers.
    failure_statuses: the statuses that count as failures. Any other response is a success.
    failures: the exceptions that count as failures: types, or a function of the exception. Any other
        exception does not count: an invalid URL is the caller's own fault.
    ignore: exceptions in `failures` that are not counted: types, or a function of the exception. None: the errors of
        a closed pool.
    retry_after: a function of the response: for how many seconds the service asked not to be called, or None.

    The breakers' own options for failures do not apply. Raises PolicyError for an invalid option.
    """

    def __init__(
        self,
        breakers: CircuitBreakerManager | CircuitBreaker,
        adapter: BaseAdapter | None = None,
        *,
        name: str | Callable[[Any], str | None] = host_of,
        until: Until = "headers",
        failure_statuses: Collection[int] = FAILURE_STATUSES,
        failures: Exceptions = _FAILURES,
        ignore: Exceptions | None = None,
        retry_after: RetryAfter = retry_after_header,
    ) -> None:
        super().__init__()
        check_until(until)
        self._adapter = HTTPAdapter() if adapter is None else adapter
        self._find = finder(breakers, (CircuitBreakerManager, CircuitBreaker), name)
        self._until = until
        self._rules = Rules(failures, _closed_pool if ignore is None else ignore, failure_statuses, retry_after)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send the request, guarded. Raises CircuitOpenConnectionError if rejected."""
        breaker = self._find(request)
        if breaker is None:
            return self._adapter.send(request, stream, timeout, verify, cert, proxies)
        try:
            permit = breaker.acquire()
        except CircuitOpenError as rejected:
            error = rejection(CircuitOpenConnectionError, rejected)
            error.request = request
            raise error from None
        with permit:
            try:
                response = self._adapter.send(request, stream, timeout, verify, cert, proxies)
            except BaseException as error:
                self._rules.failed(permit, error)
                raise
            try:
                self._rules.answered(permit, response.status_code, response)
            except BaseException:
                response.close()
                raise
            if self._until == "body" and not stream and not permit.settled:
                try:
                    response.content  # noqa: B018 - reads it; the session would do so next
                except BaseException as error:
                    self._rules.failed(permit, error)
                    raise
        return response

    def close(self) -> None:
        """Close the other adapter."""
        self._adapter.close()


def _closed_pool(error: BaseException) -> bool:
    return bool(error.args) and isinstance(error.args[0], ClosedPoolError)
