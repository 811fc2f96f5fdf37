"""Metrics, span events and log records of real breakers, as their back ends export them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import promql_parser
import pytest
import redis
import structlog
import yaml
from conftest import stopped, wait_until
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event, Policy, PolicyError
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.instrumentation.logging import LoggingListener
from pybreaker_redis.instrumentation.otel import OpenTelemetryMetrics, OpenTelemetrySpans
from pybreaker_redis.instrumentation.prometheus import PrometheusMetrics

ONE = Policy(failure_threshold=1, reset_timeout=3600)
PATIENT: dict[str, Any] = {"redis_timeout": 20.0}
MONITORING = pathlib.Path(__file__).resolve().parent.parent / "docs" / "monitoring"
Samples = dict[tuple[str, tuple[str, ...]], float]


class Boom(Exception):
    """A failure of the guarded service."""


def boom() -> None:
    raise Boom("an id that must not become a label: 4711")


def fail(breaker: CircuitBreaker) -> None:
    """One failed call."""
    with contextlib.suppress(Boom):
        breaker.call(boom)


def in_order(labels: dict[str, str]) -> tuple[str, ...]:
    """The values, those of a transition in the order from, to, reason, source."""
    order = ["breaker", "from", "to", "reason", "source"]
    return tuple(
        labels[name]
        for name in sorted(labels, key=lambda name: (name not in order, order.index(name) if name in order else 0))
    )


def prometheus(**options: Any) -> tuple[PrometheusMetrics, Callable[[], Samples]]:
    """A listener, and a scrape of its metrics: values by name and label values."""
    registry = CollectorRegistry()
    metrics = PrometheusMetrics(registry=registry, **options)

    def scrape() -> Samples:
        text = generate_latest(registry).decode()
        return {
            (sample.name.removeprefix("circuit_breaker_"), in_order(sample.labels)): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return metrics, scrape


def opentelemetry(**options: Any) -> tuple[OpenTelemetryMetrics, Callable[[], Samples]]:
    """The same by the SDK of OpenTelemetry."""
    reader = InMemoryMetricReader()
    metrics = OpenTelemetryMetrics(meter_provider=MeterProvider([reader]), **options)

    def scrape() -> Samples:
        data = reader.get_metrics_data()
        found = data.resource_metrics[0].scope_metrics[0].metrics if data else []
        return {
            (metric.name.removeprefix("circuit_breaker."), tuple(map(str, point.attributes.values()))): getattr(
                point, "value", getattr(point, "count", 0)
            )
            for metric in found
            for point in metric.data.data_points
        }

    return metrics, scrape


# The fast path


def test_calls_of_an_instrument_stay_on_the_fast_path(client: redis.Redis) -> None:
    """A thousand successes and rejections are all exported, but the listener receives none of them."""
    received: list[Event] = []

    class Noting(PrometheusMetrics):
        def __call__(self, event: Event) -> None:
            received.append(event)

    metrics = Noting(registry=None)
    breaker = CircuitBreaker("discovery", redis=client, lease=60, policy=ONE, listeners=[metrics], **PATIENT)
    for _ in range(1001):
        breaker.call(int)
    fail(breaker)
    for _ in range(7):
        with pytest.raises(CircuitOpenError):
            breaker.call(int)
    calls = {"success": 1001, "slow": 0, "failure": 1, "ignored": 0, "rejected": 7}
    assert metrics._read_all().breakers[0].calls == calls
    assert [event.kind for event in received] == ["state_change"]


def test_an_observer_of_calls_receives_every_success(client: redis.Redis) -> None:
    """An instrument does not silence an `on_call` next to it."""
    received: list[Event] = []
    metrics, scrape = prometheus()
    breaker = CircuitBreaker(
        "discovery", redis=client, lease=60, listeners=[metrics], on_call=[received.append], **PATIENT
    )
    for _ in range(5):
        breaker.call(int)
    assert [event.kind for event in received] == ["success"] * 5
    assert scrape()["calls_total", ("discovery", "success")] == 5


def test_an_instrument_is_no_observer_of_calls() -> None:
    """Metrics that are given as `on_call`, where they would export nothing, are refused with where they belong."""
    metrics, _ = prometheus()
    for kind in (CircuitBreaker, AsyncCircuitBreaker):
        with pytest.raises(PolicyError, match="PrometheusMetrics belongs in listeners="):
            kind("discovery", listeners=[metrics], on_call=[print, metrics])


@pytest.mark.parametrize("lease", [0, 0.02, 60])
def test_successes_never_decrease_and_end_exact(client: redis.Redis, lease: float) -> None:
    """The number of successes grows with the calls, over reports, leases and scrapes."""
    metrics, scrape = prometheus()
    breaker = CircuitBreaker("discovery", redis=client, lease=lease, listeners=[metrics], **PATIENT)
    seen = []
    for _ in range(5):
        for _ in range(20):
            breaker.call(int)
        seen.append(scrape()["calls_total", ("discovery", "success")])
        breaker.flush()
    assert seen == [20, 40, 60, 80, 100]


def test_successes_across_a_transition(client: redis.Redis) -> None:
    """What was gathered when another process tripped does not make the counter go back."""
    metrics, scrape = prometheus()
    breaker = CircuitBreaker("discovery", redis=client, lease=60, policy=ONE, listeners=[metrics], **PATIENT)
    for _ in range(10):
        breaker.call(int)
    assert scrape()["calls_total", ("discovery", "success")] == 10
    CircuitBreaker("discovery", redis=client, **PATIENT).force_open()
    breaker.reset()
    assert scrape()["calls_total", ("discovery", "success")] == 10


def test_rejections_are_counted_whoever_listens(client: redis.Redis) -> None:
    """With metrics every rejection is counted, next to a logger or an `on_call` too; only `on_call` receives it."""
    metrics, scrape = prometheus()
    received: list[Event] = []
    breakers = []  # what a breaker counted that is gone counts all the same, as long as another one has its name
    for listeners, on_call in (([metrics], []), ([metrics, LoggingListener()], []), ([metrics], [received.append])):
        breaker = CircuitBreaker("discovery", redis=client, lease=60, listeners=listeners, on_call=on_call, **PATIENT)
        breakers[:] = [breaker]
        breaker.force_open()
        for _ in range(3):
            with pytest.raises(CircuitOpenError):
                breaker.call(int)
    gc.collect()
    assert scrape()["calls_total", ("discovery", "rejected")] == 9
    assert [event.kind for event in received] == ["rejected"] * 3


# What is exported


@pytest.fixture(params=[prometheus, opentelemetry])
def meter(request: pytest.FixtureRequest) -> Callable[..., tuple[Any, Callable[[], Samples]]]:
    """Either back end."""
    return request.param


def by_prometheus_names(samples: Samples) -> Samples:
    """OpenTelemetry's names as those of Prometheus."""
    names = {
        "calls": "calls_total",
        "shadow.rejections": "shadow_rejections_total",
        "transitions": "transitions_total",
        "redis.errors": "redis_errors_total",
        "health": "health_score",
        "fallback": "fallback_active",
        "probe.in_flight": "probe_slots_in_use",
        "view.age": "view_age_seconds",
        "script.duration": "script_duration_seconds_count",
    }
    return {(names.get(name, name), labels): value for (name, labels), value in samples.items()}


def test_a_breakers_life(client: redis.Redis, meter: Any) -> None:
    """Every metric has the value that a breaker's life gave it, with the same meaning in both back ends."""
    metrics, scrape = meter(redis=client)
    policy = Policy(failure_threshold=2, reset_timeout=0.001, slow_call_duration=0.01)
    breaker = CircuitBreaker(
        "discovery", redis=client, lease=0, policy=policy, listeners=[metrics], ignore=KeyError, **PATIENT
    )
    breaker.call(int)
    breaker.call(time.sleep, 0.011)
    with pytest.raises(KeyError):
        breaker.call({}.__getitem__, 1)
    fail(breaker)
    found = by_prometheus_names(scrape())
    assert found["health_score", ("discovery",)] == 50
    assert found["state", ("discovery", "closed")] == 1
    fail(breaker)
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    probe = breaker.acquire()
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    found = by_prometheus_names(scrape())
    calls = {labels[1]: value for (name, labels), value in found.items() if name == "calls_total"}
    assert calls == {"success": 1, "slow": 1, "failure": 2, "ignored": 1, "rejected": 1}
    states = {labels[1]: value for (name, labels), value in found.items() if name == "state"}
    assert states == {"closed": 0, "open": 0, "half_open": 1}
    assert found["transitions_total", ("discovery", "closed", "open", "failure_threshold", "redis")] == 1
    assert found["transitions_total", ("discovery", "open", "half_open", "timeout", "redis")] == 1
    assert found["probe_slots_in_use", ("discovery",)] == 1
    assert found["fallback_active", ("discovery",)] == 0
    assert 0 < found["view_age_seconds", ("discovery",)] < 60
    assert found["script_duration_seconds_count", ("acquire",)] == 7
    assert not [name for name, _ in found if name == "redis_errors_total"]
    probe.success()
    assert by_prometheus_names(scrape())["state", ("discovery", "closed")] == 1


def test_shadow_mode(client: redis.Redis, meter: Any) -> None:
    """Each call is one of the calls by outcome, also one that an enforcing breaker would have rejected."""
    metrics, scrape = meter(redis=client)
    policy = Policy(failure_threshold=2, reset_timeout=3600, enforce=False)
    breaker = CircuitBreaker("discovery", redis=client, policy=policy, listeners=[metrics], **PATIENT)
    for _ in range(5):
        fail(breaker)
    breaker.call(int)
    breaker.set_policy(enforce=True)
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    found = by_prometheus_names(scrape())
    calls = {labels[1]: value for (name, labels), value in found.items() if name == "calls_total"}
    assert calls == {"success": 1, "slow": 0, "failure": 5, "ignored": 0, "rejected": 1}
    assert found["shadow_rejections_total", ("discovery",)] == 4


def test_asyncio(client: redis.Redis, server: EmbeddedServer, meter: Any) -> None:
    """A breaker for asyncio is counted in the same way, its successes too."""
    metrics, scrape = meter(redis=client)

    async def run() -> None:
        breaker = AsyncCircuitBreaker("discovery", redis=server.url, policy=ONE, listeners=[metrics], **PATIENT)

        async def call(fails: bool) -> None:
            if fails:
                raise Boom

        for fails in (False, False, True, False):
            with contextlib.suppress(Boom, CircuitOpenError):
                await breaker.call(call, fails)
        await breaker.close()

    asyncio.run(run())
    found = by_prometheus_names(scrape())
    calls = {labels[1]: value for (name, labels), value in found.items() if name == "calls_total"}
    assert calls == {"success": 2, "slow": 0, "failure": 1, "ignored": 0, "rejected": 1}
    assert found["state", ("discovery", "open")] == 1


def test_a_signal_handler_that_calls_amid_a_scrape(meter: Any) -> None:
    """A handler trips a breaker and scrapes while its thread holds the locks of a scrape: no deadlock."""
    metrics, scrape = meter()
    breaker = CircuitBreaker("discovery", policy=ONE, listeners=[metrics])
    found: list[Samples] = []

    def interrupted_scrape() -> None:
        with metrics._reading, metrics._counting, getattr(metrics, "_sharing", contextlib.nullcontext()):
            fail(breaker)
            found.append(by_prometheus_names(scrape()))

    thread = threading.Thread(target=interrupted_scrape, daemon=True)
    thread.start()
    thread.join(10)
    assert found
    assert found[0]["transitions_total", ("discovery", "closed", "open", "failure_threshold", "memory")] == 1


def test_in_memory(meter: Any) -> None:
    """A breaker without Redis is read from its own engine; it has no view, and no fallback."""
    metrics, scrape = meter()
    breaker = CircuitBreaker("in memory", policy=ONE, listeners=[metrics])
    breaker.call(int)
    fail(breaker)
    found = by_prometheus_names(scrape())
    assert found["calls_total", ("in memory", "success")] == 1
    assert (found["state", ("in memory", "open")], found["health_score", ("in memory",)]) == (1, 0)
    assert found["fallback_active", ("in memory",)] == 0
    assert not [name for name, _ in found if name.startswith(("view_age", "script"))]


def test_without_a_client_the_state_is_what_was_last_read(client: redis.Redis, meter: Any) -> None:
    """Metrics that have no Redis ask nobody, and leave out what only Redis knows."""
    metrics, scrape = meter()
    breaker = CircuitBreaker("discovery", redis=client, lease=60, policy=ONE, listeners=[metrics], **PATIENT)
    fail(breaker)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    found = by_prometheus_names(scrape())
    assert found["state", ("discovery", "open")] == 1
    assert ("health_score", ("discovery",)) not in found
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before


def test_two_breakers_of_one_name_are_one_series(client: redis.Redis, meter: Any) -> None:
    """Their calls are added up, and the state is exported once."""
    metrics, scrape = meter(redis=client)
    for _ in range(2):
        CircuitBreaker("discovery", redis=client, lease=60, listeners=[metrics], **PATIENT).call(int)
    found = by_prometheus_names(scrape())
    assert found["calls_total", ("discovery", "success")] == 2
    assert found["state", ("discovery", "closed")] == 1


def test_a_transition_of_another_process_is_counted_there(client: redis.Redis) -> None:
    """What a watching breaker learns of others is no transition of its own, so a sum over processes is right."""
    metrics, scrape = prometheus()
    breaker = CircuitBreaker("discovery", redis=client, listeners=[metrics], **PATIENT)
    breaker.call(int)
    with breaker.watch() as watch:
        wait_until(lambda: watch.active)
        CircuitBreaker("discovery", redis=client, **PATIENT).force_open()
        wait_until(lambda: breaker._view.seen.state == "open")
    assert not [name for name, _ in scrape() if name == "transitions_total"]


def test_labels_are_bounded(client: redis.Redis) -> None:
    """No label value holds an exception's text or an instance."""
    metrics, scrape = prometheus(redis=client)
    breaker = CircuitBreaker("discovery", redis=client, policy=ONE, listeners=[metrics], **PATIENT)
    fail(breaker)
    values = {value for _, labels in scrape() for value in labels}
    assert not [value for value in values if "4711" in value or breaker.instance in value]


# A scrape


def test_a_scrape_is_one_pipeline(own_server: EmbeddedServer, meter: Any) -> None:
    """Fifty breakers cost a scrape fifty commands in one round trip, on a connection that stays."""
    with redis.Redis.from_url(own_server.url) as client:
        metrics, scrape = meter(redis=client)
        breakers = [CircuitBreaker(f"s{number}", redis=client, listeners=[metrics], **PATIENT) for number in range(50)]
        for breaker in breakers:
            breaker.call(int)
            breaker.close()
        scrape()  # loads the script and connects

        def asked() -> tuple[int, int, int]:
            stats = client.info("stats")
            calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            return stats["total_connections_received"], stats["total_reads_processed"], calls

        (connections, reads, calls), found, after = asked(), scrape(), asked()
        assert sum(value for (name, _), value in found.items() if name == "state") == 50
        assert after[0] == connections
        assert after[2] == calls + 50
        # two INFO of each asked(), and the pipeline, which is larger than the server's read buffer of 16 KB
        assert after[1] - reads <= 2 + 2


def test_a_scrape_loads_the_script_once_it_is_gone(client: redis.Redis, meter: Any) -> None:
    """After SCRIPT FLUSH a scrape repairs itself, and nothing is missing from it."""
    metrics, scrape = meter(redis=client)
    CircuitBreaker("discovery", redis=client, lease=60, listeners=[metrics], **PATIENT).call(int)
    client.script_flush()
    found = by_prometheus_names(scrape())
    assert found["health_score", ("discovery",)] == 100
    assert not [name for name, _ in found if name == "redis_errors_total"]


def test_a_scrape_of_a_hung_server_ends(own_server: EmbeddedServer, meter: Any) -> None:
    """A scrape waits one timeout, gives what the process knows, and counts the error."""
    with redis.Redis.from_url(own_server.url) as client:
        metrics, scrape = meter(redis=client, timeout=0.1)
        names = [f"s{number}" for number in range(20)]
        breakers = [CircuitBreaker(name, redis=client, lease=60, listeners=[metrics], **PATIENT) for name in names]
        for breaker in breakers:
            breaker.call(int)
        scrape()
        with stopped(own_server):
            began = time.monotonic()
            found = by_prometheus_names(scrape())
            took = time.monotonic() - began
        assert took < 5  # one timeout each would be 2 s already, on an idle machine
        assert found["redis_errors_total", ("timeout",)] == 1
        assert found["state", ("s7", "closed")] == 1
        assert ("health_score", ("s7",)) not in found
        wait_until(lambda: ("health_score", ("s7",)) in by_prometheus_names(scrape()))


def test_a_scrape_in_an_outage(own_server: EmbeddedServer, meter: Any) -> None:
    """A dead Redis leaves the local engine's state in the scrape, with the fallback shown and the error counted."""
    with redis.Redis.from_url(own_server.url) as client:
        metrics, scrape = meter(redis=client)
        breaker = CircuitBreaker("discovery", redis=client, lease=0, policy=ONE, listeners=[metrics])
        breaker.call(int)
        assert by_prometheus_names(scrape())["fallback_active", ("discovery",)] == 0
        own_server.stop()
        fail(breaker)
        found = by_prometheus_names(scrape())
        assert found["fallback_active", ("discovery",)] == 1
        assert (found["state", ("discovery", "open")], found["health_score", ("discovery",)]) == (1, 0)
        assert found["redis_errors_total", ("connection",)] >= 1
        assert found["transitions_total", ("discovery", "closed", "open", "failure_threshold", "local")] == 1


def test_a_scrape_without_rights(own_server: EmbeddedServer) -> None:
    """A server that refuses the scrape is counted as such, and breaks nothing."""
    with redis.Redis.from_url(own_server.url) as admin:
        admin.acl_setuser("metrics", enabled=True, nopass=True, commands=["+ping"], keys=["*"])
    user = redis.Redis.from_url(own_server.url, username="metrics", password="x")
    metrics, scrape = prometheus(redis=user)
    CircuitBreaker("discovery", redis=own_server.url, lease=60, listeners=[metrics], **PATIENT).call(int)
    assert scrape()["redis_errors_total", ("permission",)] == 1
    assert scrape()["state", ("discovery", "closed")] == 1


@contextlib.contextmanager
def cluster_of_one() -> Iterator[redis.RedisCluster]:
    """A cluster whose one node has all slots."""
    port = free_port_below(50000)
    with EmbeddedServer(port=port, args=["--cluster-enabled", "yes"]) as server:
        with redis.Redis.from_url(server.url) as node:
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: "cluster_state:ok" in str(node.execute_command("CLUSTER", "INFO")))
        with redis.RedisCluster.from_url(server.url) as client:
            yield client


def free_port_below(limit: int) -> int:
    """A free port whose bus port (10000 above) is free as well."""
    for port in range(20000 + os.getpid() % 10000, limit):
        with socket.socket() as one, socket.socket() as bus, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10000))
            return port
    raise AssertionError("no free port")


def test_a_forked_child_counts_its_own(client: redis.Redis) -> None:
    """A child's metrics begin at zero, and its scrape opens a connection of its own."""
    metrics, scrape = prometheus(redis=client)
    breaker = CircuitBreaker("discovery", redis=client, lease=60, policy=ONE, listeners=[metrics], **PATIENT)
    breaker.call(int)
    fail(breaker)
    scrape()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = scrape()
            counted = [found["calls_total", ("discovery", outcome)] for outcome in ("success", "failure")]
            os.write(writer, json.dumps([*counted, found["health_score", ("discovery",)]]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(os.read(reader, 1000)) == [0, 0, 0]
    assert scrape()["calls_total", ("discovery", "failure")] == 1


def test_registering_asks_nobody(own_server: EmbeddedServer) -> None:
    """Metrics are made and registered without a server."""
    url = own_server.url
    own_server.stop()
    registry = CollectorRegistry()
    PrometheusMetrics(redis=url, registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusMetrics(redis=url, registry=registry)


# Span events


def test_span_events(client: redis.Redis) -> None:
    """A trip and a rejection are events of the span in which they happened; calls are not."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    spans = OpenTelemetrySpans()
    breaker = CircuitBreaker(
        "discovery", redis=client, lease=60, policy=ONE, listeners=[spans], on_call=[spans], **PATIENT
    )
    breaker.call(int)  # outside of any span
    with tracer.start_as_current_span("request"):
        breaker.call(int)
        fail(breaker)
        with pytest.raises(CircuitOpenError):
            breaker.call(int)
    (span,) = exporter.get_finished_spans()
    change, rejection = span.events
    assert (change.name, rejection.name) == ("circuit_breaker.state_change", "circuit_breaker.rejected")
    assert change.attributes is not None
    assert change.attributes["circuit_breaker.name"] == "discovery"
    assert change.attributes["circuit_breaker.transition.to"] == "open"
    assert rejection.attributes is not None
    assert 0 < float(str(rejection.attributes["circuit_breaker.retry_after"])) <= 3600


def test_span_events_of_a_listener_leave_out_rejections(client: redis.Redis) -> None:
    """Spans that are given as `listeners` only have transitions, and rejections stay on the fast path."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    breaker = CircuitBreaker("discovery", redis=client, policy=ONE, listeners=[OpenTelemetrySpans()], **PATIENT)
    with provider.get_tracer("test").start_as_current_span("request"):
        fail(breaker)
        with pytest.raises(CircuitOpenError):
            breaker.call(int)
    (span,) = exporter.get_finished_spans()
    assert [event.name for event in span.events] == ["circuit_breaker.state_change"]


def test_span_events_on_asyncio(server: EmbeddedServer, client: redis.Redis) -> None:
    """The span of the awaiting task gets the event."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def run() -> None:
        spans = OpenTelemetrySpans()
        breaker = AsyncCircuitBreaker("discovery", redis=server.url, listeners=[spans], on_call=[spans], **PATIENT)
        await breaker.force_open()
        with provider.get_tracer("test").start_as_current_span("request"), contextlib.suppress(CircuitOpenError):
            async with breaker.acquire():
                pass
        await breaker.close()

    asyncio.run(run())
    (span,) = exporter.get_finished_spans()
    assert [event.name for event in span.events] == ["circuit_breaker.rejected"]


# Log records


def test_log_records(own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    """Transitions and outages are logged once each, with their facts as fields; calls are not."""
    caplog.set_level(logging.DEBUG, "pybreaker_redis.events")
    policy = Policy(failure_threshold=2, reset_timeout=3600)
    breaker = CircuitBreaker("discovery", redis=own_server.url, lease=0, policy=policy, listeners=[LoggingListener()])
    for _ in range(10):
        breaker.call(int)
    fail(breaker)
    fail(breaker)
    for _ in range(10):
        with pytest.raises(CircuitOpenError):
            breaker.call(int)
    own_server.stop()
    with pytest.raises(CircuitOpenError):
        breaker.call(int)
    records: list[Any] = [one for one in caplog.records if one.name == "pybreaker_redis.events"]
    assert [one.getMessage() for one in records] == ["circuit_breaker.state_change", "circuit_breaker.redis_error"]
    change, error = records
    assert (change.levelname, change.breaker, change.old_state, change.new_state) == (
        "WARNING",
        "discovery",
        "closed",
        "open",
    )
    assert (change.reason, change.counts["failure_count"], change.source) == ("failure_threshold", 2, "redis")
    assert (error.breaker, error.error_type) == ("discovery", "ConnectionError")


def test_log_records_through_structlog(client: redis.Redis) -> None:
    """structlog's formatter renders a record as one JSON object with the event's name and fields."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Kept()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logger = logging.Logger("events")
    logger.addHandler(handler)
    breaker = CircuitBreaker("discovery", redis=client, policy=ONE, listeners=[LoggingListener(logger)], **PATIENT)
    fail(breaker)
    (line,) = lines
    logged = json.loads(line)
    assert (logged["event"], logged["level"], logged["breaker"], logged["new_state"]) == (
        "circuit_breaker.state_change",
        "warning",
        "discovery",
        "open",
    )


# The dashboard and the alerts


def exported_labels() -> dict[str, set[str]]:
    """The labels of every series that an eventful life exports."""
    found: dict[str, set[str]] = {}
    registry = CollectorRegistry()
    with EmbeddedServer() as server:
        breaker = CircuitBreaker(
            "discovery",
            redis=server.url,
            lease=0,
            policy=ONE,
            listeners=[PrometheusMetrics(redis=server.url, registry=registry)],
            redis_timeout=1,
        )
        breaker.call(int)
        fail(breaker)
        text = generate_latest(registry).decode()
        server.stop()
        with contextlib.suppress(CircuitOpenError):
            breaker.call(int)
        text += generate_latest(registry).decode()
    for line in text.splitlines():
        if match := re.match(r"(\w+)\{(.*)\} ", line):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2]))
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of the two files, with where it stands."""
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], re.sub(r"^label_values\((.*), \w+\)$", r"\1", variable["query"])


def selectors(node: Any) -> Iterator[Any]:
    """The vector selectors of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "vs", "args"):
        below = getattr(node, name, None)
        for child in below if isinstance(below, (list, tuple)) else [below]:
            if child is not None and not isinstance(child, (str, int, float)):
                yield from selectors(child)


def test_dashboard_and_alerts_use_what_is_exported() -> None:
    """Every expression is PromQL, and every name and label in it is one that a scrape exports."""
    exported = exported_labels()
    used: set[str] = set()
    for place, expression in expressions():
        parsed = promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$breaker", ".*"))
        found = list(selectors(parsed))
        assert found, place
        for selector in found:
            assert selector.name in exported, (place, selector.name)
            labels = {matcher.name for matcher in selector.matchers.matchers}
            assert labels <= exported[selector.name] | {"job", "instance"}, (place, selector.name)
            used.add(selector.name)
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression))))
        assert grouped <= set().union(*(exported[one.name] for one in found)) | {"job", "instance"}, place
    whole = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if not name.endswith("_created")}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} == whole  # nothing is left out


def test_every_alert_says_what_to_do() -> None:
    """An alert has a severity, a summary and a description."""
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert rule["annotations"].keys() == {"summary", "description"}
