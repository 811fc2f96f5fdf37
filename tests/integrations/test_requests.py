"""The adapter for requests against a service that misbehaves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from conftest import nonzero
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pybreaker_redis import CircuitBreaker, CircuitBreakerManager, CircuitOpenError
from pybreaker_redis.integrations.requests import BreakerAdapter, CircuitOpenConnectionError

from .service import Service


def session_of(breakers: Any, adapter: HTTPAdapter | None = None, **options: Any) -> requests.Session:
    session = requests.Session()
    session.mount("http://", BreakerAdapter(breakers, adapter, **options))
    return session


def breaker_of(manager: CircuitBreakerManager, service: Service) -> CircuitBreaker:
    return manager.get_or_create(f"127.0.0.1:{service.port}")


@pytest.fixture
def session(manager: CircuitBreakerManager) -> Iterator[requests.Session]:
    with session_of(manager) as made:
        yield made


def test_statuses(session: requests.Session, service: Service, manager: CircuitBreakerManager) -> None:
    """5xx fail, 4xx succeed; the rejection is a ConnectionError of requests, too."""
    for status in (200, 204, 400, 404, 429, 501):
        assert session.get(f"{service.url}/status/{status}").status_code == status
    for status in (500, 502, 504):
        assert session.get(f"{service.url}/status/{status}").status_code == status
    with pytest.raises(requests.ConnectionError) as caught:
        session.get(service.url)
    error = caught.value
    assert isinstance(error, CircuitOpenError)
    assert isinstance(error, CircuitOpenConnectionError)
    assert error.name == f"127.0.0.1:{service.port}"
    assert error.request is not None
    assert error.request.url == f"{service.url}/"
    assert error.response is None
    assert nonzero(breaker_of(manager, service).counts) == {"successes": 6, "failures": 3, "rejected": 1}
    assert service.requests == 9
    for same in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (same.name, same.state, same.args) == (error.name, "open", error.args)


@pytest.mark.parametrize(
    ("path", "error"),
    [("/reset", requests.ConnectionError), ("/close", requests.ConnectionError), ("/hang", requests.ReadTimeout)],
)
def test_errors(
    session: requests.Session, service: Service, manager: CircuitBreakerManager, path: str, error: type[Exception]
) -> None:
    """Broken connections and timeouts are failures."""
    for _ in range(3):
        with pytest.raises(error):
            session.get(service.url + path, timeout=0.2)
    with pytest.raises(CircuitOpenError):
        session.get(service.url)
    assert nonzero(breaker_of(manager, service).counts) == {"failures": 3, "rejected": 1}


def test_the_callers_own_faults(session: requests.Session, service: Service, manager: CircuitBreakerManager) -> None:
    """A header that is none, a body that raises, and a pool without a free connection count as nothing."""
    breaker = breaker_of(manager, service)
    for _ in range(4):
        with pytest.raises(requests.exceptions.InvalidHeader):
            session.get(service.url, headers={"a": "b\nc"})
    assert nonzero(breaker.counts) == {}

    def body() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the caller's own")

    for _ in range(4):
        with pytest.raises(KeyError):
            session.post(service.url, data=body())
    assert nonzero(breaker.counts) == {"ignored": 4}


def test_a_closed_pool_counts_as_nothing(service: Service, manager: CircuitBreakerManager) -> None:
    """Though requests makes a ConnectionError of it."""
    adapter = HTTPAdapter()
    with session_of(manager, adapter) as session:
        session.get(service.url)
        pools = adapter.poolmanager.pools
        pools[next(iter(pools.keys()))].close()
        with pytest.raises(requests.ConnectionError):
            session.get(service.url)
    assert nonzero(breaker_of(manager, service).counts) == {"successes": 1, "ignored": 1}


def test_retries_of_urllib3_happen_inside(service: Service, manager: CircuitBreakerManager) -> None:
    """A request and its retries are one call."""
    retries = HTTPAdapter(max_retries=Retry(2, status_forcelist=[503], backoff_factor=0))
    with session_of(manager, retries) as session, pytest.raises(requests.exceptions.RetryError):
        session.get(f"{service.url}/status/503")
    assert service.requests == 3
    assert nonzero(breaker_of(manager, service).counts) == {"failures": 1}


@pytest.mark.parametrize("path", ["/cut", "/cut-chunks", "/hang-body"])
def test_a_body_that_breaks_off(service: Service, manager: CircuitBreakerManager, path: str) -> None:
    """It is a failure where the body is read under guard; else, and with stream=True, the headers decide."""
    errors = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)
    breaker = breaker_of(manager, service)
    with session_of(manager, until="body") as session:
        with pytest.raises(errors):
            session.get(service.url + path, timeout=0.2)
        assert nonzero(breaker.counts) == {"failures": 1}
        with session.get(service.url + path, timeout=0.2, stream=True) as response, pytest.raises(errors):
            response.content  # noqa: B018
        assert nonzero(breaker.counts) == {"failures": 1, "successes": 1}
        assert session.get(f"{service.url}/stream").text == "chunk" * 10
    with session_of(manager) as session, pytest.raises(errors):
        session.get(service.url + path, timeout=0.2)
    assert nonzero(breaker.counts) == {"failures": 1, "successes": 3}


def test_streams(session: requests.Session, service: Service) -> None:
    """A body arrives in pieces."""
    with session.get(f"{service.url}/stream", stream=True) as response:
        assert b"".join(response.iter_content(7)) == b"chunk" * 10


def test_parameters(service: Service) -> None:
    """A single breaker; names; statuses; exceptions; what holds; what is not guarded."""
    breaker = CircuitBreaker("api")
    options: dict[str, Any] = {"failure_statuses": {418}, "retry_after": lambda response: None}
    with session_of(breaker, **options) as session:
        session.get(f"{service.url}/status/418")
        session.get(f"{service.url}/status/503?Retry-After=7")
    assert nonzero(breaker.counts) == {"failures": 1, "successes": 1}
    manager = CircuitBreakerManager()
    with session_of(manager, name=lambda request: None) as session:
        session.get(service.url)
    assert manager._breakers == {}
    with session_of(manager, name="fixed", ignore=requests.Timeout) as session:
        with pytest.raises(requests.Timeout):
            session.get(f"{service.url}/hang", timeout=0.1)
        assert nonzero(manager.get_or_create("fixed").counts) == {"ignored": 1}
    with pytest.raises(ValueError, match="until must be"):
        BreakerAdapter(breaker, until="end")  # type: ignore[arg-type]
