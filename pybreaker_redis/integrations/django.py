"""Circuit breakers for a Django project, and 503 answers to rejections (needs the extra `django`).

    INSTALLED_APPS = [..., "pybreaker_redis.integrations.django.CircuitBreakersConfig"]
    MIDDLEWARE = [..., "pybreaker_redis.integrations.django.CircuitOpenMiddleware"]
    CIRCUIT_BREAKERS = {"redis": {"url": "redis://localhost:6379"}, "circuit_breaker": {"services": {...}}}

CIRCUIT_BREAKERS is a source for pybreaker_redis.config.load(), or a Config. CIRCUIT_BREAKERS_SHARED = False keeps the
breakers in memory, as tests may want. CIRCUIT_BREAKERS_OPTIONS holds further options of CircuitBreakerManager.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from .. import AsyncCircuitBreakerManager, CircuitBreakerManager, CircuitOpenError
from .._extras import needs_extra
from ._http import UNAVAILABLE, unavailable_headers

with needs_extra(__name__, "django"):
    from django.apps import AppConfig, apps
    from django.conf import settings
    from django.http import HttpRequest, HttpResponse, JsonResponse
    from django.utils.deprecation import MiddlewareMixin

__all__ = ["CircuitBreakersConfig", "CircuitOpenMiddleware", "async_breakers", "breakers", "health"]

_M = TypeVar("_M", CircuitBreakerManager, AsyncCircuitBreakerManager)


class CircuitBreakersConfig(AppConfig):
    """The app that has the managers. A worker that is forked from a loaded project has its own connections."""

    name = "pybreaker_redis.integrations.django"
    label = "circuit_breakers"
    verbose_name = "Circuit breakers"

    def ready(self) -> None:
        """Read the settings. Needs no server. Raises ConfigError; PolicyError."""
        _ = self.breakers

    @functools.cached_property
    def breakers(self) -> CircuitBreakerManager:
        """The manager for views and tasks."""
        return _make(CircuitBreakerManager)

    @functools.cached_property
    def async_breakers(self) -> AsyncCircuitBreakerManager:
        """The manager for asynchronous views. The two share their circuits through Redis."""
        return _make(AsyncCircuitBreakerManager)


def _make(kind: type[_M]) -> _M:
    config = getattr(settings, "CIRCUIT_BREAKERS", None)
    options: dict[str, Any] = getattr(settings, "CIRCUIT_BREAKERS_OPTIONS", {})
    shared = getattr(settings, "CIRCUIT_BREAKERS_SHARED", True)
    return kind.with_redis(config, **options) if shared else kind(config, **options)


def _config() -> CircuitBreakersConfig:
    found = apps.get_app_config(CircuitBreakersConfig.label)
    assert isinstance(found, CircuitBreakersConfig)
    return found


def breakers() -> CircuitBreakerManager:
    """The manager of this project. Raises LookupError if the app is not in INSTALLED_APPS."""
    return _config().breakers


def async_breakers() -> AsyncCircuitBreakerManager:
    """The asyncio manager of this project. Raises LookupError if the app is not in INSTALLED_APPS."""
    return _config().async_breakers


class CircuitOpenMiddleware(MiddlewareMixin):
    """Answers 503 with Retry-After if a CircuitOpenError leaves a view, sync or async.

    The answer does not name the service, since anyone may read it.
    """

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Called by Django."""
        if not isinstance(exception, CircuitOpenError):
            return None
        return JsonResponse({"detail": UNAVAILABLE}, status=503, headers=unavailable_headers(exception))


def health(request: HttpRequest) -> HttpResponse:
    """A view that shows the state of every breaker as JSON. Add it to your URLs: path("health", health)."""
    return JsonResponse(breakers().get_all_states())
