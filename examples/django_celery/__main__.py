"""Starts a Redis, a payment service, the shop and a Celery worker, and lets payments fail for a while."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator

from _running import Service, free_port, program, request, wait_until

from pybreaker_redis.embedded import EmbeddedServer

ORDERS = range(1, 7)


@contextlib.contextmanager
def redis() -> Iterator[str]:
    """The server in REDIS_URL, or one of our own. Celery needs it on a TCP port."""
    if given := os.environ.get("REDIS_URL"):
        yield given
    else:
        with EmbeddedServer(port=0) as server:
            yield server.url


def main() -> None:
    with redis() as redis_url, Service() as service:
        port = free_port()
        shop, common = f"http://127.0.0.1:{port}", {"REDIS_URL": redis_url, "PAYMENTS_URL": service.url}
        web = ("gunicorn", "django_celery.wsgi", "--workers=2", "--log-level=error", f"--bind=127.0.0.1:{port}")
        worker = ("celery", "--quiet", "-A", "django_celery", "worker", "--concurrency=2", "--loglevel=ERROR")
        with program(*web, **common), program(*worker, **common):
            wait_until(lambda: request(f"{shop}/health").status == 200)
            request(f"{shop}/orders/0", "POST")
            wait_until(lambda: "/charge/0" in service.answered)
            print("payments is up: a view answers", request(f"{shop}/balance").status, "and a task is done", flush=True)

            service.down = True
            answers = collections.Counter(request(f"{shop}/balance").status for _ in range(20))
            print(f"payments is down: 20 views answer {dict(answers)}")
            accepted = [request(f"{shop}/orders/{order}", "POST").status for order in ORDERS]
            print(f"6 orders are accepted meanwhile: {accepted}", flush=True)
            wait_until(lambda: len(service.refused) > answers[502])  # a probe, by a task
            service.down = False

            wait_until(lambda: {f"/charge/{order}" for order in ORDERS} <= set(service.answered))
            charged = [path for path in service.answered if path.startswith("/charge/") and path != "/charge/0"]
            print(f"payments is up again: {len(charged)} of 6 orders are paid")
            print(f"payments got {len(service.refused)} requests while it was down")


if __name__ == "__main__":
    main()
