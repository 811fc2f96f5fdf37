"""The tasks of test_celery.py, for its workers. BROKER and SERVICE are URLs."""

from __future__ import annotations

import functools
import os
import time
import urllib.error
import urllib.request
from typing import Any

import celery
from celery.exceptions import Ignore

from pybreaker_redis import CircuitBreaker, CircuitBreakerManager, Config, Policy
from pybreaker_redis.integrations.celery import BreakerTask

BROKER, SERVICE = os.environ.get("BROKER", "redis://127.0.0.1:1"), os.environ.get("SERVICE", "http://127.0.0.1:1")
THRESHOLD, RESET_TIMEOUT = 3, 1.0
QUICK = Policy(failure_threshold=THRESHOLD, reset_timeout=RESET_TIMEOUT, probe_timeout=1.0)
PATIENT = Policy(failure_threshold=1000)
RETRIES: dict[str, Any] = {
    "autoretry_for": (Exception,),
    "retry_backoff": False,
    "retry_jitter": False,
    "max_retries": 8,
    "default_retry_delay": 0.1,
}

app = celery.Celery("tasks", broker=BROKER, backend=BROKER)
task = functools.partial(app.task, shared=False)  # not for other apps of this process
app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1, result_expires=600)
breakers = CircuitBreakerManager.with_redis(Config(redis_url=BROKER, defaults=QUICK, services={"patient": PATIENT}))
service = CircuitBreaker("service", redis=BROKER, policy=QUICK)


class Named(BreakerTask):
    """Tasks whose breakers have names."""

    abstract = True
    breakers = breakers
    rejection_jitter = 0.2


def ask(path: str = "/") -> str:
    try:
        with urllib.request.urlopen(SERVICE + path, timeout=10) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:  # a result backend could not keep it
        raise OSError(f"answered {error.code}") from None


@task(bind=True, base=BreakerTask, breaker=service, rejection_jitter=0.2, **RETRIES)
def guarded(self: Any) -> tuple[int, int]:
    """Returns how often it was retried and rejected."""
    ask()
    return self.request.retries, (self.request.headers or {}).get("breaker_rejections", 0)


@task(bind=True, base=Named, breaker="named", acks_late=True, **RETRIES)
def named(self: Any) -> tuple[int, int]:
    """The same, acknowledged late."""
    ask()
    return self.request.retries, (self.request.headers or {}).get("breaker_rejections", 0)


@task(bind=True, base=Named, breaker="patient", autoretry_for=(OSError,), max_retries=2, default_retry_delay=0.1)
def failing(self: Any) -> None:
    """Its own call always fails."""
    ask("/broken")


@task(bind=True, base=Named, breaker="once", max_retries=0)
def once(self: Any) -> int:
    """Has no retries of its own."""
    return (self.request.headers or {}).get("breaker_rejections", 0)


@task(base=Named, breaker="impatient", max_rejections=2, rejection_jitter=0.0)
def impatient() -> None:
    """Gives up after two rejections."""


@task(bind=True, base=Named, breaker="counted", max_retries=2, default_retry_delay=0.1)
def by_hand(self: Any) -> None:
    """Retries by itself, with the error."""
    try:
        ask("/broken")
    except OSError as error:
        raise self.retry(exc=error) from error


@task(bind=True, base=Named, breaker="counted", max_retries=5, default_retry_delay=0.05)
def not_yet(self: Any) -> int:
    """Retries by itself, without an error, and once tells the worker to ignore the task."""
    if self.request.retries < 5:
        raise self.retry()
    raise Ignore


@task(base=BreakerTask, rejection_jitter=0.1)
def within() -> str:
    """Uses a breaker of its own accord."""
    return breakers.call("within", str)


@task(base=Named, breaker="hangs", soft_time_limit=1)
def hangs() -> None:
    """Waits for longer than it may."""
    time.sleep(30)
