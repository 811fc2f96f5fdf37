"""A Flask application under its own server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flask
import httpx
import pytest
from werkzeug.serving import make_server

from pybreaker_redis import (
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    PolicyError,
)
from pybreaker_redis.integrations.flask import circuit_open_handler, install
from pybreaker_redis.testing import set_state


@contextlib.contextmanager
def served(app: flask.Flask) -> Iterator[httpx.Client]:
    """A client of the application under werkzeug's server."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as client:
            yield client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_rejection_is_a_503(make_manager: Callable[..., CircuitBreakerManager]) -> None:
    """With Retry-After; other errors stay what they are; no page of health."""
    app = flask.Flask("shop")
    install(app, make_manager(reset_timeout=20.0))

    def fail() -> None:
        raise ConnectionError

    @app.get("/search")
    def search() -> str:
        with contextlib.suppress(ConnectionError):
            flask.current_app.extensions["circuit_breakers"].call("search", fail)
        return "found"

    @app.get("/broken")
    def broken() -> str:
        raise ConnectionError

    with served(app) as browser:
        for _ in range(3):
            assert browser.get("/search").status_code == 200
        answer = browser.get("/search")
        assert answer.status_code == 503
        assert 0 < int(answer.headers["retry-after"]) <= 20
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json() == {"detail": "a service that this request needs is not available"}
        assert browser.get("/broken").status_code == 500
        assert browser.get("/health").status_code == 404


@pytest.mark.parametrize("breakers", [AsyncCircuitBreakerManager(), CircuitBreaker("a"), None])
def test_what_is_no_manager_is_refused(breakers: Any) -> None:
    """When it is installed, not with the first request."""
    app = flask.Flask("shop")
    with pytest.raises(PolicyError, match="breakers must be of type CircuitBreakerManager, not"):
        install(app, breakers)
    assert "circuit_breakers" not in app.extensions


@pytest.mark.parametrize("state", ["open", "closed"])
def test_health(state: str) -> None:
    """Only where it is asked for; two applications share nothing."""
    app, breakers = flask.Flask("shop"), CircuitBreakerManager()
    install(app, breakers, health="/health")
    getattr(breakers.get_or_create("search"), f"force_{state}")()
    with served(app) as browser:
        assert browser.get("/health").json() == {"search": state}


def test_the_handler_without_a_manager() -> None:
    """An application with a single breaker registers it itself."""
    app, breaker = flask.Flask("shop"), CircuitBreaker("search")
    app.register_error_handler(CircuitOpenError, circuit_open_handler)
    app.add_url_rule("/search", view_func=lambda: breaker.call(str))
    with served(app) as browser:
        assert browser.get("/search").status_code == 200
        set_state(breaker, "open")
        answer = browser.get("/search")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
