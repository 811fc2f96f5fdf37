"""The tasks. While the circuit is open, a task waits for its turn, and spends none of its retries."""

from __future__ import annotations

from celery import shared_task

from pybreaker_redis.integrations.celery import BreakerTask
from pybreaker_redis.integrations.django import breakers

from .payments import ask


class PaymentTask(BreakerTask):
    """A task that calls the payment service."""

    abstract = True
    breaker = "payments"
    breakers = breakers()
    rejection_jitter = 0.5


@shared_task(base=PaymentTask, autoretry_for=(OSError,), max_retries=3, default_retry_delay=1, retry_backoff=False)
def charge(order: int) -> None:
    ask(f"/charge/{order}")
