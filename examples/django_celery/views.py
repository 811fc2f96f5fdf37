"""The pages of the shop. The middleware turns a rejection into 503 with Retry-After."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from pybreaker_redis.integrations.django import breakers, health

from .payments import ask
from .tasks import charge


def balance(request: HttpRequest) -> HttpResponse:
    """Asks the payment service while the browser waits."""
    try:
        breakers().call("payments", ask, "/balance")
    except OSError:
        return JsonResponse({"detail": "payments failed"}, status=502)
    return JsonResponse({"balance": 100})


def buy(request: HttpRequest, order: int) -> HttpResponse:
    """Leaves the payment to a task."""
    charge.delay(order)
    return JsonResponse({"order": order}, status=202)


urlpatterns = [path("balance", balance), path("orders/<int:order>", buy), path("health", health)]
