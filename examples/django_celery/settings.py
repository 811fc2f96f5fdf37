"""The settings of the project. REDIS_URL is Celery's broker, too. PAYMENTS_URL names the payment service."""

from __future__ import annotations

import os

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
PAYMENTS_URL = os.environ.get("PAYMENTS_URL", "http://127.0.0.1:9300")

SECRET_KEY = "of an example"
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "django_celery.views"
INSTALLED_APPS = ["pybreaker_redis.integrations.django.CircuitBreakersConfig", "django_celery"]
MIDDLEWARE = ["pybreaker_redis.integrations.django.CircuitOpenMiddleware"]
CIRCUIT_BREAKERS = {
    "redis": {"url": REDIS_URL},
    "circuit_breaker": {"services": {"payments": {"failure_threshold": 3, "reset_timeout": 2.0}}},
}

CELERY_BROKER_URL = REDIS_URL
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_IGNORE_RESULT = True
