"""A Django project in one file, for test_django."""

from __future__ import annotations

import contextlib
import os

import django
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from pybreaker_redis.integrations.django import async_breakers, breakers, health

settings.configure(
    SECRET_KEY="of a test",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["pybreaker_redis.integrations.django.CircuitBreakersConfig"],
    MIDDLEWARE=["pybreaker_redis.integrations.django.CircuitOpenMiddleware"],
    CIRCUIT_BREAKERS={
        "redis": {"url": os.environ.get("PROJECT_REDIS", "redis://localhost:6379")},
        "circuit_breaker": {"redis_timeout": 10, "services": {"search": {"failure_threshold": 3, "reset_timeout": 20}}},
    },
    CIRCUIT_BREAKERS_OPTIONS={"failures": ConnectionError},
    CIRCUIT_BREAKERS_SHARED="PROJECT_REDIS" in os.environ,
)
django.setup()


def fail() -> None:
    raise ConnectionError


async def async_fail() -> None:
    raise ConnectionError


def search(request: HttpRequest) -> HttpResponse:
    with contextlib.suppress(ConnectionError):
        breakers().call("search", fail)
    return JsonResponse({"pid": os.getpid()})


async def async_search(request: HttpRequest) -> HttpResponse:
    with contextlib.suppress(ConnectionError):
        await async_breakers().call("search", async_fail)
    return JsonResponse({"pid": os.getpid()})


def broken(request: HttpRequest) -> HttpResponse:
    raise ConnectionError


urlpatterns = [
    path("search", search),
    path("async-search", async_search),
    path("broken", broken),
    path("health", health),
]
wsgi, asgi = WSGIHandler(), ASGIHandler()
