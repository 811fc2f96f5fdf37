"""503 answers to rejections in a Flask application (needs the extra `flask`)."""

from __future__ import annotations

from .. import CircuitBreakerManager, CircuitOpenError
from .._extras import needs_extra
from ._http import UNAVAILABLE, check_breakers, unavailable_headers

with needs_extra(__name__, "flask"):
    import flask

__all__ = ["circuit_open_handler", "install"]


def install(app: flask.Flask, breakers: CircuitBreakerManager, *, health: str | None = None) -> None:
    """Make the application answer 503 with Retry-After if a CircuitOpenError leaves a view.

    breakers: the manager, which views find as current_app.extensions["circuit_breakers"]. It reports its gathered
    successes when the process ends. health: the path, like "/health", of a page with the state of every breaker as
    JSON; None: no such page. Anyone who can read the page learns which services the application calls. Raises
    PolicyError if breakers is not a CircuitBreakerManager.
    """
    check_breakers(breakers, CircuitBreakerManager)
    app.extensions["circuit_breakers"] = breakers
    app.register_error_handler(CircuitOpenError, circuit_open_handler)
    if health is not None:

        def states() -> flask.Response:
            return flask.jsonify(breakers.get_all_states())

        app.add_url_rule(health, "circuit_breakers", states)


def circuit_open_handler(error: CircuitOpenError) -> flask.Response:
    """The error handler that install() adds: for an application without a manager, register it yourself.

    It answers 503 with Retry-After. The answer does not name the service, since anyone may read it.
    """
    response = flask.jsonify(detail=UNAVAILABLE)
    response.status_code = 503
    response.headers.update(unavailable_headers(error))
    return response
