"""Celery tasks behind a breaker: a rejected task is sent again, to run when the breaker may admit calls.

payments = CircuitBreaker("payments", redis="redis://localhost")

@app.task(base=BreakerTask, breaker=payments)
def charge(order): ...
"""

from __future__ import annotations

import concurrent.futures
import functools
import random
from collections.abc import Callable
from typing import Any, NoReturn

from .. import CircuitBreaker, CircuitBreakerManager, CircuitOpenError, PolicyError
from .._extras import needs_extra

with needs_extra(__name__, "celery"):
    from celery import Task
    from celery.exceptions import Ignore, Reject, Retry

__all__ = ["BreakerTask"]

_REJECTIONS = "breaker_rejections"  # the header that counts them
_LEAST_WAIT = 0.1  # seconds


class BreakerTask(Task):  # type: ignore[misc]
    """The base class of tasks whose run() is a guarded call: `@app.task(base=BreakerTask, breaker=...)`.

    A rejected task is sent again, to run after the rejection's retry_after. That spends none of the task's own retries.
    If the call itself fails, the breaker counts it, and the task's own retries apply (autoretry_for, self.retry()). The
    task is also sent again if a CircuitOpenError of another breaker leaves run(). If a task runs without a worker, by a
    direct call or apply(), the CircuitOpenError reaches the caller.

    Options, as attributes or as arguments of app.task():
    breaker: a CircuitBreaker, or the name of a service in `breakers`. None: run() itself uses guarded functions.
    breakers: the CircuitBreakerManager in which a name is looked up.
    max_rejections: how often one task is sent again. After that a rejection is an error like any other. None: no limit.
    rejection_jitter: longest random delay in seconds, so that the tasks do not all come back at once.

    Raises PolicyError for an invalid option.
    """

    abstract = True
    breaker: CircuitBreaker | str | None = None
    breakers: CircuitBreakerManager | None = None
    max_rejections: int | None = None
    rejection_jitter: float = 1.0
    run: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self._check_options()
        run = self.run

        @functools.wraps(run)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return self._call(run, args, kwargs)
            except CircuitOpenError as rejected:
                self._send_again(rejected)

        # before autoretry_for wraps run(): then autoretry_for sees no rejection, and the breaker sees each error
        self.run = guarded

    def _check_options(self) -> None:
        if isinstance(self.breaker, str):
            if self.breakers is None:
                raise PolicyError(f"breaker={self.breaker!r} is a name: set breakers= to a CircuitBreakerManager")
        elif self.breaker is not None and not isinstance(self.breaker, CircuitBreaker):
            raise PolicyError(f"breaker must be a CircuitBreaker or the name of a service, not {self.breaker!r}")
        if self.max_rejections is not None and not self.max_rejections >= 0:
            raise PolicyError(f"max_rejections must be zero or more, or None, not {self.max_rejections!r}")
        if not self.rejection_jitter >= 0:
            raise PolicyError(f"rejection_jitter must be zero or more seconds, not {self.rejection_jitter!r}")

    def _call(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        breaker = self.breaker
        if isinstance(breaker, str):
            assert self.breakers is not None
            breaker = self.breakers.get_or_create(breaker)
        if breaker is None:
            return run(*args, **kwargs)
        signal: Exception | None = None

        def service() -> Any:
            nonlocal signal
            try:
                return run(*args, **kwargs)
            except (Retry, Ignore, Reject) as one:  # instructions to the worker, not errors of the service
                signal = one
                raise getattr(one, "exc", None) or _NoOutcome from one

        try:
            return breaker.call(service)
        except BaseException:
            if signal is None:
                raise
            raise signal from signal.__cause__

    def _send_again(self, rejected: CircuitOpenError) -> NoReturn:
        request = self.request
        headers = request.headers or {}
        rejections = headers.get(_REJECTIONS, 0)
        spent = self.max_rejections is not None and rejections >= self.max_rejections
        if spent or request.called_directly or request.is_eager:
            raise rejected
        wait = max(rejected.retry_after, _LEAST_WAIT) + random.uniform(0, self.rejection_jitter)
        again = self.signature_from_request(request, countdown=wait, headers={**headers, _REJECTIONS: rejections + 1})
        try:
            again.apply_async()
        except Exception as error:  # as Task.retry() does
            raise Reject(error, requeue=False) from error
        raise Retry(exc=rejected, when=wait, sig=again) from rejected


class _NoOutcome(concurrent.futures.CancelledError):
    """Passes a breaker as a cancelled call, which does not count."""
