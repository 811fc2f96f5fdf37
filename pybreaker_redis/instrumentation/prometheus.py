"""Metrics of circuit breakers for Prometheus. Needs the extra `prometheus`."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from os import getpid
from typing import Any, NamedTuple, TypeAlias

from .._extras import needs_extra
from .._process import renew
from ..wire import exits
from ..wire.sync import Worker
from ._meter import DURATION_BOUNDS, STATES, BreakerReading, Meter, Reading

with needs_extra(__name__, "prometheus"):
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
    from prometheus_client.values import MutexValue, ValueClass

_WRITE_EVERY = 0.5  # seconds

_Samples: TypeAlias = Iterator[tuple[Sequence[str], float]]

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

    In prometheus_client's multi-process mode (PROMETHEUS_MULTIPROC_DIR), each process writes its counts into that
    mode's files, in the background, half a second late at most, and at its end. MultiProcessCollector exports the
    files; this collector then exports only the facts about the whole fleet: state, health and probe slots.
    """

    def __init__(
        self, redis: Any = None, *, registry: CollectorRegistry | None = REGISTRY, timeout: float = 0.25
    ) -> None:
        super().__init__(redis, timeout)
        if registry is not None:
            registry.register(self)
        if self._files is not None:
            exits.servers.add(self)

    def _start_process(self) -> None:
        super()._start_process()
        self._durations = Histogram(
            "circuit_breaker_script_duration_seconds",
            "Time of a script call, from sending it to its reply or error.",
            ["script"],
            registry=None,
            buckets=DURATION_BOUNDS,
        )
        self._files = None if ValueClass is MutexValue else _Files()
        self._writer = Worker(
            "pybreaker_redis-prometheus",
            weakref.WeakMethod(self._write),
            lambda: 0.0 if self._breakers else None,
            lambda: _WRITE_EVERY,
        )

    def _used(self) -> None:
        if self._files is not None:
            if getpid() != self._pid:
                renew(self)
            exits.begin()
            self._writer.wake()

    def _script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        super()._script_ran(name, seconds, error)
        self._durations.labels(name).observe(seconds)

    def _at_exit(self) -> None:
        """Write the last counts of a process that ends. Raises nothing."""
        with contextlib.suppress(Exception):
            self._write()

    def _write(self) -> None:
        if self._files is not None:
            reading = self._read_here()  # in a child, this makes other files first
            self._files.write(reading)

    def describe(self) -> Iterator[Metric]:
        """The names, without reading anything."""
        return self._families(Reading([], {}, {}))

    def collect(self) -> Iterator[Metric]:
        """All metrics; raises nothing when Redis is down."""
        self._write()
        return self._families(self._read_all())

    def _families(self, reading: Reading) -> Iterator[Metric]:
        if self._files is not None:
            return (_family(metric, reading) for metric in _OF_FLEET)
        return iter([*(_family(metric, reading) for metric in (*_OF_FLEET, *_OF_PROCESS)), *self._durations.collect()])


class _Metric(NamedTuple):
    """samples: reads label values and values."""

    kind: type[Counter] | type[Gauge]
    name: str
    help: str
    labels: Sequence[str]
    samples: Callable[[Reading], _Samples]


def _family(metric: _Metric, reading: Reading) -> Metric:
    kind = CounterMetricFamily if metric.kind is Counter else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in metric.samples(reading):
        family.add_metric(labels, value)
    return family


class _Files:
    """What this process adds to the files of the multi-process mode, from whichever of its threads writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written: dict[tuple[str, tuple[str, ...]], float] = {}
        self._counters = [
            (metric, Counter(metric.name, metric.help, metric.labels, registry=None))
            for metric in _OF_PROCESS
            if metric.kind is Counter
        ]
        self._gauges = [
            (metric, Gauge(metric.name, metric.help, metric.labels, registry=None, multiprocess_mode="livemax"))
            for metric in _OF_PROCESS
            if metric.kind is Gauge
        ]

    def write(self, reading: Reading) -> None:
        """Write a reading, unless another thread does that just now."""
        # with a timeout: a signal handler may scrape amid a write of its own thread
        if not self._lock.acquire(timeout=_WRITE_EVERY):
            return
        try:
            for metric, counter in self._counters:
                for labels, total in metric.samples(reading):
                    self._grow(counter, (metric.name, tuple(labels)), total)
            for metric, gauge in self._gauges:
                for labels, value in metric.samples(reading):
                    gauge.labels(*labels).set(value)
        finally:
            self._lock.release()

    def _grow(self, counter: Counter, key: tuple[str, tuple[str, ...]], total: float) -> None:
        before = self._written.get(key)
        if before is None or before < total:  # another thread may have written a later reading
            self._written[key] = total
            counter.labels(*key[1]).inc(total - (before or 0))


def _each(value: Callable[[BreakerReading], float | None]) -> Callable[[Reading], _Samples]:
    def samples(reading: Reading) -> _Samples:
        for one in reading.breakers:
            if (found := value(one)) is not None:
                yield (one.name,), found

    return samples


def _states(reading: Reading) -> _Samples:
    return (((one.name, state), one.state == state) for one in reading.breakers for state in STATES)


def _calls(reading: Reading) -> _Samples:
    return (((one.name, outcome), count) for one in reading.breakers for outcome, count in one.calls.items())


def _transitions(reading: Reading) -> _Samples:
    return iter(reading.transitions.items())


def _errors(reading: Reading) -> _Samples:
    return (((kind,), count) for kind, count in reading.redis_errors.items())


_OF_FLEET = (
    _Metric(
        Gauge,
        "circuit_breaker_state",
        "1 for the present state, 0 for the others.",
        ["breaker", "state"],
        _states,
    ),
    _Metric(Gauge, "circuit_breaker_health_score", "0 (open) to 100.", ["breaker"], _each(lambda one: one.health)),
    _Metric(
        Gauge,
        "circuit_breaker_probe_slots_in_use",
        "Probes that run now, in the whole fleet.",
        ["breaker"],
        _each(lambda one: one.probes_in_flight),
    ),
)
_OF_PROCESS = (
    _Metric(
        Counter,
        "circuit_breaker_calls",
        "Calls by outcome; a slow one succeeded, but late.",
        ["breaker", "outcome"],
        _calls,
    ),
    _Metric(
        Counter,
        "circuit_breaker_shadow_rejections",
        "Calls that shadow mode would have rejected; circuit_breaker_calls has them by their outcome.",
        ["breaker"],
        _each(lambda one: one.shadow_rejected),
    ),
    _Metric(
        Gauge,
        "circuit_breaker_fallback_active",
        "1 while this process continues without Redis.",
        ["breaker"],
        _each(lambda one: one.fallback),
    ),
    _Metric(
        Gauge,
        "circuit_breaker_view_age_seconds",
        "Age of the local view, since its request was sent.",
        ["breaker"],
        _each(lambda one: one.view_age),
    ),
    _Metric(
        Counter,
        "circuit_breaker_transitions",
        "Transitions that this process caused; each is counted by one process of the fleet.",
        ["breaker", "from", "to", "reason", "source"],
        _transitions,
    ),
    _Metric(Counter, "circuit_breaker_redis_errors", "Script calls that Redis did not answer.", ["kind"], _errors),
)
