"""Celery tasks behind a breaker, with real workers on a real broker."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy, PolicyError
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.testing import set_state

celery = pytest.importorskip("celery")
pytest.importorskip("celery.backends.redis")

from celery.exceptions import SoftTimeLimitExceeded  # noqa: E402

from pybreaker_redis.integrations.celery import BreakerTask  # noqa: E402

HERE = pathlib.Path(__file__).parent
OUTAGE = 2.5  # seconds
CONCURRENCY = 2
PATIENCE = 60.0
OPTIONS = ["-c", str(CONCURRENCY), "--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO"]


class Service(http.server.ThreadingHTTPServer):
    """Answers 503 while it is down, and always on /broken. Counts what it refused."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.down_until: float | None = 0.0  # None: from the first call on, for OUTAGE
        self.refused = self.broken = self.answered = 0
        self.lock = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        service = self.server
        with service.lock:
            if service.down_until is None:
                service.down_until = time.monotonic() + OUTAGE
            down = time.monotonic() < service.down_until
            if self.path == "/broken":
                service.broken += 1
            elif down:
                service.refused += 1
            else:
                service.answered += 1
        self.send_response(503 if down or self.path == "/broken" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service() as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


@pytest.fixture(scope="module", params=["prefork", "gevent"])
def tasks(request: pytest.FixtureRequest, service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of the tasks, with a worker that runs them."""
    if request.param == "gevent":
        pytest.importorskip("gevent")
    log = tmp_path_factory.mktemp("celery") / "log"
    with EmbeddedServer(port=0) as broker, pytest.MonkeyPatch.context() as patch, log.open("wb") as output:
        patch.setenv("BROKER", broker.url)
        patch.setenv("SERVICE", service.url)
        patch.syspath_prepend(HERE)
        sys.modules.pop("celery_tasks", None)
        module = importlib.import_module("celery_tasks")
        path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", *OPTIONS, "-P", request.param],
            env={**os.environ, "PYTHONPATH": path},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: worker.poll() is not None or b" ready." in log.read_bytes(), PATIENCE)
            assert worker.poll() is None, log.read_text()
            yield module
        finally:
            worker.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(20)
            worker.kill()
            worker.wait()
            module.app.close()
            module.breakers.close()
            module.service.close()
            print(log.read_text()[-4000:])


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> None:
    """Each test begins with closed circuits."""
    if "tasks" in request.fixturenames:
        module = request.getfixturevalue("tasks")
        for breaker in (module.service, *map(module.breakers.get_or_create, ("named", "counted", "patient"))):
            set_state(breaker, "closed")


@pytest.mark.parametrize("name", ["guarded", "named"])
def test_an_outage_costs_no_task(tasks: Any, service: Service, name: str) -> None:
    """6 of 6 tasks complete, and meanwhile the service sees only what trips the breaker, and probes."""
    service.refused, service.down_until = 0, None
    results = [getattr(tasks, name).delay() for _ in range(6)]
    ended = [result.get(timeout=PATIENCE) for result in results]
    probes = OUTAGE // tasks.RESET_TIMEOUT + 1
    under_way = CONCURRENCY - 1
    assert 0 < service.refused <= tasks.THRESHOLD + probes + under_way
    assert sum(retries for retries, _ in ended) == service.refused  # each task's own retries: one for each failed call
    assert sum(rejections for _, rejections in ended) > 0


def test_a_call_that_fails_follows_the_tasks_own_retries(tasks: Any, service: Service) -> None:
    """Two retries, then the task fails with the service's error. The breaker counts each call."""
    service.broken, service.down_until = 0, 0.0
    with pytest.raises(Exception, match="503"):
        tasks.failing.delay().get(timeout=PATIENCE)
    assert service.broken == 3
    assert tasks.breakers.get_or_create("patient").snapshot().failure_count == 3


def test_a_rejection_spends_no_retry(tasks: Any) -> None:
    """A task without any retries of its own waits until the circuit lets it through."""
    set_state(tasks.breakers.get_or_create("once"), "forced_open", duration=1.0)
    assert tasks.once.delay().get(timeout=PATIENCE) >= 1


def test_rejections_may_have_a_limit(tasks: Any) -> None:
    """After max_rejections the task fails with the CircuitOpenError."""
    breaker = tasks.breakers.get_or_create("impatient")
    set_state(breaker, "forced_open", duration=1.0)
    result = tasks.impatient.delay()
    seen: set[str] = set()

    def ended() -> bool:
        seen.add(result.state)
        breaker.force_open(1.0)  # for ever
        return result.ready()

    wait_until(ended, PATIENCE)
    with pytest.raises(CircuitOpenError) as caught:
        result.get()
    assert caught.value.name == "impatient"
    assert "RETRY" in seen


def test_retries_by_hand_count_with_their_error(tasks: Any, service: Service) -> None:
    """self.retry(exc=error) is a failed call for the breaker, self.retry() and Ignore are none."""
    service.broken = 0
    breaker = tasks.breakers.get_or_create("counted")
    tasks.not_yet.delay()
    with pytest.raises(Exception, match="503"):
        tasks.by_hand.delay().get(timeout=PATIENCE)
    assert service.broken == 3
    wait_until(lambda: breaker.snapshot().state == "open")
    assert [entry.reason for entry in breaker.history()][:1] == ["failure_threshold"]


def test_a_breaker_within_a_task(tasks: Any) -> None:
    """A rejection that leaves the task has it sent again, whoever raised it."""
    set_state(tasks.breakers.get_or_create("within"), "forced_open", duration=1.0)
    sent_at = time.monotonic()
    assert tasks.within.delay().get(timeout=PATIENCE) == ""
    assert time.monotonic() - sent_at > 0.5


def test_a_soft_time_limit_is_a_failure(request: pytest.FixtureRequest, tasks: Any) -> None:
    """SoftTimeLimitExceeded is an exception of the guarded call. Only the prefork pool has such limits."""
    if "gevent" in request.node.name:
        pytest.skip("gevent has no soft time limits")
    with pytest.raises(SoftTimeLimitExceeded):
        tasks.hangs.delay().get(timeout=PATIENCE)
    assert tasks.breakers.get_or_create("hangs").snapshot().failure_count == 1


def double(number: int) -> int:
    return 2 * number


# Without a worker --------------------------------------------------------------------------------


@pytest.fixture
def app() -> Any:
    return celery.Celery("local", broker="memory://")


def test_a_task_that_is_called_directly(app: Any) -> None:
    """The caller gets the rejection, also from apply() and in eager mode."""
    breaker = CircuitBreaker("payments")

    task = app.task(base=BreakerTask, shared=False, breaker=breaker, autoretry_for=(OSError,))(double)
    assert task(2) == task.run(2) == task.apply((2,)).get() == 4
    assert breaker.counts.successes == 3
    set_state(breaker, "open")
    with pytest.raises(CircuitOpenError):
        task(2)
    with pytest.raises(CircuitOpenError):
        task.apply((2,)).get()
    app.conf.task_always_eager = True
    with pytest.raises(CircuitOpenError):
        task.delay(2).get()


def test_errors_are_classified_as_the_breaker_says(app: Any) -> None:
    """autoretry_for does not hide an error from the breaker."""
    breaker = CircuitBreaker("payments", failures=OSError, policy=Policy(failure_threshold=2))

    @app.task(
        base=BreakerTask,
        shared=False,
        breaker=breaker,
        autoretry_for=(Exception,),
        max_retries=1,
        default_retry_delay=0,
    )
    def fail(error: str) -> None:
        raise {"os": OSError, "value": ValueError}[error]

    with pytest.raises(ValueError):
        fail("value")
    assert breaker.snapshot().failure_count == 0
    for _ in range(2):
        with pytest.raises(OSError):
            fail("os")
    assert breaker.state == "open"


@pytest.mark.parametrize(
    "options",
    [
        {"breaker": "payments"},
        {"breaker": AsyncCircuitBreaker("payments")},
        {"breaker": 7},
        {"max_rejections": -1},
        {"rejection_jitter": -0.5},
    ],
)
def test_options_that_cannot_be(app: Any, options: dict[str, Any]) -> None:
    """They are refused where the task is made."""
    with pytest.raises(PolicyError):
        app.task(base=BreakerTask, lazy=False, shared=False, **options)(double)


def test_a_task_as_a_class(app: Any) -> None:
    """A class with a run() works like a function."""
    breaker = CircuitBreaker("payments")

    class Double(BreakerTask):
        name = "double"

        def run(self, number: int) -> int:
            return 2 * number

    Double.breaker = breaker
    task = app.register_task(Double())
    assert task(2) == 4
    set_state(breaker, "open")
    with pytest.raises(CircuitOpenError):
        task(2)
