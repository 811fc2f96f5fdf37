"""Metrics of circuit breakers for Prometheus. Needs the extra `prometheus`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ._meter import DURATION_BOUNDS, STATES, Meter, Reading

__all__ = ["PrometheusMetrics"]


class PrometheusMetrics(Meter, Collector):
    """A listener for any number of breakers, and the collector that exports them.

        metrics = PrometheusMetrics(redis="redis://localhost:6379")
        breaker = CircuitBreaker("discovery", redis=..., listeners=[metrics])

    redis: a blocking redis-py client (Redis, RedisCluster, Sentinel master) or a URL, through which a scrape reads all
    breakers in one exchange. Without it, and while Redis is down, a scrape gives the state that this process last read,
    and neither health nor probe slots. registry: where to register. timeout: seconds that a scrape waits for Redis to
    connect, and to reply.

    Calls are read from `breaker.counts`, so metrics do not slow down any call.
    """

    def __init__(
        self, redis: Any = None, *, registry: CollectorRegistry | None = REGISTRY, timeout: float = 0.25
    ) -> None:
        super().__init__(redis, timeout)
        if registry is not None:
            registry.register(self)

    def _start_process(self) -> None:
        super()._start_process()
        self._durations = Histogram(
            "circuit_breaker_script_duration_seconds",
            "Time of a script call, from sending it to its reply or error.",
            ["script"],
            registry=None,
            buckets=DURATION_BOUNDS,
        )

    def script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        super().script_ran(name, seconds, error)
        self._durations.labels(name).observe(seconds)

    def describe(self) -> Iterator[Metric]:
        """The names, without reading anything."""
        return self._families(Reading([], {}, {}))

    def collect(self) -> Iterator[Metric]:
        """All metrics; raises nothing when Redis is down."""
        return self._families(self.read())

    def _families(self, reading: Reading) -> Iterator[Metric]:
        breaker = ["breaker"]
        state = GaugeMetricFamily(
            "circuit_breaker_state", "1 for the present state, 0 for the others.", labels=["breaker", "state"]
        )
        calls = CounterMetricFamily(
            "circuit_breaker_calls", "Calls by outcome; a slow one succeeded, but late.", labels=["breaker", "outcome"]
        )
        health = GaugeMetricFamily("circuit_breaker_health_score", "0 (open) to 100.", labels=breaker)
        slots = GaugeMetricFamily(
            "circuit_breaker_probe_slots_in_use", "Probes in flight, in the whole fleet.", labels=breaker
        )
        fallback = GaugeMetricFamily(
            "circuit_breaker_fallback_active", "1 while this process continues without Redis.", labels=breaker
        )
        age = GaugeMetricFamily(
            "circuit_breaker_view_age_seconds", "Age of the local view, since its request was sent.", labels=breaker
        )
        for one in reading.breakers:
            for name in STATES:
                state.add_metric([one.name, name], one.state == name)
            for outcome, count in one.calls.items():
                calls.add_metric([one.name, outcome], count)
            fallback.add_metric([one.name], one.fallback)
            for family, value in ((health, one.health), (slots, one.probes_in_flight), (age, one.view_age)):
                if value is not None:
                    family.add_metric([one.name], value)
        transitions = CounterMetricFamily(
            "circuit_breaker_transitions",
            "Transitions that this process caused; each is counted by one process of the fleet.",
            labels=["breaker", "from", "to", "reason", "source"],
        )
        for change, count in reading.transitions.items():
            transitions.add_metric(list(change), count)
        errors = CounterMetricFamily(
            "circuit_breaker_redis_errors", "Script calls that Redis did not answer.", labels=["kind"]
        )
        for kind, count in reading.redis_errors.items():
            errors.add_metric([kind], count)
        yield from (state, calls, health, slots, fallback, age, transitions, errors)
        yield from self._durations.collect()
