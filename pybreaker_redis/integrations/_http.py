"""What the guards of all HTTP clients and frameworks share. Imports no third-party library."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from email.utils import mktime_tz, parsedate_tz
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args
from urllib.parse import urlsplit

from .. import CircuitOpenError, PolicyError
from .._classify import FAILURE, Classifier, Exceptions, RetryAfter

FAILURE_STATUSES: Final = frozenset({500, 502, 503, 504})
HOLD_STATUSES: Final = frozenset({429, 503})
DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}
FIRST_EPOCH: Final = 10**9  # seconds; a larger RateLimit-Reset is a Unix time
UNAVAILABLE: Final = "a service that this request needs is not available"

Until: TypeAlias = Literal["headers", "body"]
E_ = TypeVar("E_", bound=CircuitOpenError)


class FailedResponseError(Exception):
    """Stands for a failed response in on_call events and in the history. It is never raised."""


def retry_after_header(response_or_error: Any, statuses: Collection[int] = HOLD_STATUSES) -> float | None:
    """Seconds after which the service wants to be asked again, or None if it did not say.

    response_or_error: a response of httpx, requests or aiohttp; or an error that carries a response or its headers, of
    these libraries or of an SDK built on them. statuses: responses with any other status return None: on a 200,
    RateLimit-Reset does not mean that the client should wait. Reads retry-after-ms, then both forms of Retry-After
    (seconds, HTTP date), then RateLimit-Reset.
    """
    status = _status(response_or_error)  # first: most responses do not ask the client to wait
    if status is not None and status not in statuses:
        return None
    response = getattr(response_or_error, "response", None)
    if response is None:
        response = response_or_error
    elif status is None and (status := _status(response)) is not None and status not in statuses:
        return None
    headers = getattr(response, "headers", None)
    if headers is None:
        return None
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if (seconds := _number(text)) is not None:
        return seconds
    if (until := _date(text)) is not None:
        return max(until - time.time(), 0.0)
    reset = _number(headers.get("ratelimit-reset"))
    return max(reset - time.time(), 0.0) if reset is not None and reset > FIRST_EPOCH else reset


def _status(response: Any) -> int | None:
    """The status of a response, or of an error that knows it."""
    status = getattr(response, "status_code", None)
    if status is None:
        status = getattr(response, "status", None)
    return status if isinstance(status, int) else None


def _number(text: Any) -> float | None:
    """A finite number of at least zero, or None."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < math.inf else None


def _date(text: Any) -> float | None:
    """The Unix time of an HTTP date, or None."""
    try:
        parsed = parsedate_tz(text)
        return None if parsed is None else mktime_tz(parsed)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def host_of(request: Any) -> str:
    """The default name of a request's breaker: the host, and the port unless it is the scheme's default.

    All clients use the same name for a host, so that they share one circuit.
    """
    url = request.url
    if isinstance(url, str):
        url = urlsplit(url)
        host = url.hostname
    else:
        host = url.raw_host  # not .host: in ASCII, as requests has it
    if isinstance(host, bytes):
        host = host.decode("ascii")
    host = host or ""
    if ":" in host:
        host = f"[{host}]"
    port = url.port
    return host if port is None or port == DEFAULT_PORTS.get(url.scheme) else f"{host}:{port}"


def check_breakers(breakers: object, *kinds: type) -> None:
    """Raise PolicyError unless breakers are of one of these types."""
    if not isinstance(breakers, kinds):
        raise PolicyError(f"breakers must be of type {' or '.join(kind.__name__ for kind in kinds)}, not {breakers!r}")


def check_until(until: object) -> None:
    """Raise PolicyError unless this is a value of the option `until`."""
    if until not in get_args(Until):
        raise PolicyError(f"until must be 'headers' or 'body', not {until!r}")


def finder(
    breakers: Any, kinds: tuple[type[Any], type[Any]], name: str | Callable[[Any], str | None]
) -> Callable[[Any], Any]:
    """A function of a request that returns its breaker, or None if the request is not guarded.

    breakers: a manager, or one breaker for all requests. kinds: the manager and breaker types that fit the client. A
    request without a host is not guarded: the client itself reports the mistake. Raises PolicyError if breakers do not
    fit.
    """
    manager, breaker = kinds
    check_breakers(breakers, manager, breaker)
    if isinstance(breakers, breaker):
        return lambda request: breakers
    get_or_create = breakers.get_or_create
    if isinstance(name, str):
        return lambda request: get_or_create(name)

    def find(request: Any) -> Any:
        service = name(request)
        return get_or_create(service) if service else None

    return find


def rejection(kind: type[E_], rejected: CircuitOpenError) -> E_:
    """The rejection as an error class of an HTTP client."""
    error = kind(*rejected.args)
    vars(error).update(vars(rejected))
    return error


def unavailable_headers(error: CircuitOpenError) -> dict[str, str]:
    """The headers of a 503 that answers a rejection. Retry-After takes whole seconds."""
    return {"Retry-After": str(max(math.ceil(error.retry_after), 1)), "Cache-Control": "no-store"}


class Rules:
    """Decides how an HTTP call counts. Responses that the options do not name count as success, errors as nothing.

    failures, ignore: exception types, one or several, or a function of the exception. failure_statuses: the statuses
    that count as failures. retry_after: a function of the response that returns the seconds to hold, or None. The
    breaker's own options of these names do not apply. Raises PolicyError for an invalid option.

    The methods return what the permit's method returns. With an asyncio permit, await it.
    """

    def __init__(
        self, failures: Exceptions, ignore: Exceptions, failure_statuses: Collection[int], retry_after: RetryAfter
    ) -> None:
        self._classifier = Classifier("HTTP client", failures, ignore, None, retry_after)
        self._failure_statuses = frozenset(failure_statuses)

    def failed(self, permit: Any, error: BaseException) -> Any:
        """Settle the permit of a call that raised."""
        if isinstance(error, CircuitOpenError) or self._classifier.of_exception(error) != FAILURE:
            return permit.release()
        return permit.failure(error, retry_after=0)

    def answered(self, permit: Any, status: int, response: Any) -> Any:
        """Settle the permit if the response is a failure or a hold. Otherwise return None: its block settles it."""
        hold = self._classifier.hold_ms_of(response) / 1000
        if hold or status in self._failure_statuses:
            return permit.failure(FailedResponseError(f"HTTP {status}"), retry_after=hold)
        return None
