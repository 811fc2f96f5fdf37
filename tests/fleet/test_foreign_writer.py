"""Another program shares the document: it knows the five contract fields, and writes them back many times a second."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator

import pytest
import redis
from conftest import wait_until

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis._protocol import keys_of
from pybreaker_redis.embedded import EmbeddedServer

FIELDS = ("state", "failure_count", "success_count", "last_failure_time", "opened_at")
PERIOD = 0.05  # seconds
KEY = keys_of("discovery").state


class Boom(Exception):
    """What a call of the sick service raises."""


class Writer:
    """A thread that reads the document and writes its contract fields back, every 50 ms."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.written = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def write(self) -> None:
        def rewrite(pipeline: redis.client.Pipeline) -> None:
            stored = json.loads(pipeline.get(KEY) or b'{"state":"closed","failure_count":0}')
            pipeline.multi()
            pipeline.set(KEY, json.dumps({field: stored.get(field) for field in FIELDS}), px=3_600_000)

        self.client.transaction(rewrite, KEY)
        self.written += 1

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self.write()

    def __enter__(self) -> Writer:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def writer(client: redis.Redis) -> Iterator[Writer]:
    """The other program, at work."""
    with Writer(client) as writer:
        yield writer


class Service:
    """Calls a guarded service, each time after the other program has written."""

    def __init__(self, server: EmbeddedServer, writer: Writer, lease: float) -> None:
        self.writer, self.failures = writer, 0
        policy = Policy(failure_threshold=5, reset_timeout=0.3, success_threshold=2)
        self.breaker = CircuitBreaker("discovery", redis=server.url, policy=policy, lease=lease, redis_timeout=20.0)

    def wait_for_a_write(self) -> None:
        before = self.writer.written
        while self.writer.written == before:
            threading.Event().wait(PERIOD / 10)

    def call(self, fails: bool) -> None:
        """A call during which the other program writes, so that the document has changed when its outcome is known."""
        with self.breaker.acquire():
            self.wait_for_a_write()
            if fails:
                self.failures += 1
                raise Boom


@pytest.mark.parametrize("lease", [0, 0.1])
def test_a_sick_service_trips_it(server: EmbeddedServer, writer: Writer, lease: float) -> None:
    """Failures add to what the other program writes: the fifth in a row trips it. Probes close it again."""
    service = Service(server, writer, lease)
    for _ in range(8):
        with contextlib.suppress(Boom, CircuitOpenError):
            service.call(fails=True)
    assert service.failures == 5
    assert service.breaker.history()[0].reason == "failure_threshold"

    for _ in range(40):
        try:
            service.call(fails=False)
        except CircuitOpenError:
            service.wait_for_a_write()
    assert [entry.reason for entry in service.breaker.history()] == ["probe_succeeded", "timeout", "failure_threshold"]


@pytest.mark.parametrize("lease", [0, 0.1])
def test_a_healthy_service_does_not(server: EmbeddedServer, writer: Writer, lease: float) -> None:
    """Successes count as well: every fourth call fails, so that there is never a run of five."""
    service = Service(server, writer, lease)
    for number in range(32):
        with contextlib.suppress(Boom):
            service.call(fails=number % 4 == 3)
    assert service.failures == 8
    assert service.breaker.history() == []
    assert service.breaker.snapshot().failure_count <= 2


def test_it_closes_an_open_circuit(server: EmbeddedServer, client: redis.Redis) -> None:
    """A circuit that the other program closes is a new one: with a generation of its own, which watchers notice."""
    policy, events = Policy(failure_threshold=2, reset_timeout=3600.0), []
    one, other = (CircuitBreaker("discovery", redis=server.url, policy=policy, redis_timeout=20.0) for _ in range(2))
    watching = CircuitBreaker(
        "discovery", redis=server.url, policy=policy, redis_timeout=20.0, listeners=[events.append]
    )

    def fails(breaker: CircuitBreaker) -> bool:
        with contextlib.suppress(CircuitOpenError):
            with pytest.raises(ZeroDivisionError):
                breaker.call(divmod, 1, 0)
            return True
        return False

    with watching.watch():
        assert [fails(one), fails(other)] == [True, True]
        wait_until(lambda: not fails(one) and not fails(watching))
        opened = one.snapshot().generation
        client.set(KEY, json.dumps({"state": "closed", "failure_count": 0}), px=3_600_000)
        wait_until(lambda: fails(watching))
        assert watching.snapshot().generation > opened
        wait_until(lambda: fails(one))
        assert one.snapshot().state == "open"
        wait_until(lambda: [(event.old, event.new) for event in events].count(("open", "closed")) == 1)
