"""Metrics and span events of circuit breakers for OpenTelemetry. Needs the extra `otel`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .._events import Event
from .._extras import needs_extra
from ..wire.options import error_kind
from ._meter import DURATION_BOUNDS, STATES, BreakerReading, Meter, Reading

with needs_extra(__name__, "otel"):
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

__all__ = ["OpenTelemetryMetrics", "OpenTelemetrySpans"]

_SCOPE = "pybreaker_redis"
_NAME = "circuit_breaker.name"


class OpenTelemetryMetrics(Meter):
    """A listener for any number of breakers. Its instruments read them when the SDK collects.

    redis, timeout: as for PrometheusMetrics; a collection reads all breakers in one exchange.
    meter_provider: by default the global one.
    """

    def __init__(
        self, redis: Any = None, *, meter_provider: MeterProvider | None = None, timeout: float = 0.25
    ) -> None:
        super().__init__(redis, timeout)
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self._duration = meter.create_histogram(
            "circuit_breaker.script.duration",
            unit="s",
            description="Time of a script call, from sending it to its reply or error.",
            explicit_bucket_boundaries_advisory=DURATION_BOUNDS,
        )
        counter, gauge = meter.create_observable_counter, meter.create_observable_gauge
        meter.create_observable_up_down_counter(
            "circuit_breaker.probe.in_flight",
            [self._reads(_probes)],
            "{probe}",
            "Probes that run now, in the whole fleet.",
        )
        gauge("circuit_breaker.state", [self._reads(_state)], "1", "1 for the present state, 0 for the others.")
        gauge("circuit_breaker.health", [self._reads(_health)], "1", "Health score, 0 (open) to 100.")
        gauge(
            "circuit_breaker.fallback", [self._reads(_fallback)], "1", "1 while this process continues without Redis."
        )
        gauge(
            "circuit_breaker.view.age", [self._reads(_age)], "s", "Age of the local view, since its request was sent."
        )
        counter("circuit_breaker.calls", [self._reads(_calls)], "{call}", "Calls by outcome.")
        counter(
            "circuit_breaker.shadow.rejections",
            [self._reads(_shadow_rejections)],
            "{call}",
            "Calls that shadow mode would have rejected; circuit_breaker.calls has them by their outcome.",
        )
        counter(
            "circuit_breaker.transitions",
            [self._reads(_transitions)],
            "{transition}",
            "Transitions that this process caused.",
        )
        counter(
            "circuit_breaker.redis.errors", [self._reads(_errors)], "{error}", "Script calls that Redis did not answer."
        )

    def _start_process(self) -> None:
        super()._start_process()
        self._sharing = threading.RLock()
        self._shared: Reading | None = None
        self._returned: set[object] = set()

    def _script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        super()._script_ran(name, seconds, error)
        attributes = {"circuit_breaker.script": name}
        if error is not None:
            attributes["error.type"] = error_kind(error)
        self._duration.record(seconds, attributes)

    def _reads(
        self, what: Callable[[Reading], Iterator[Observation]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """A callback. All callbacks of a collection share one reading; the next begins when one is called again."""

        def callback(_: CallbackOptions) -> Iterable[Observation]:
            with self._sharing:
                if self._shared is None or what in self._returned:
                    self._shared, self._returned = self._read_all(), set()
                self._returned.add(what)
                return list(what(self._shared))

        return callback


def _each(reading: Reading, value: Callable[[BreakerReading], float | None]) -> Iterator[Observation]:
    for one in reading.breakers:
        found = value(one)
        if found is not None:
            yield Observation(found, {_NAME: one.name})


def _health(reading: Reading) -> Iterator[Observation]:
    return _each(reading, lambda one: one.health)


def _probes(reading: Reading) -> Iterator[Observation]:
    return _each(reading, lambda one: one.probes_in_flight)


def _fallback(reading: Reading) -> Iterator[Observation]:
    return _each(reading, lambda one: int(one.fallback))


def _age(reading: Reading) -> Iterator[Observation]:
    return _each(reading, lambda one: one.view_age)


def _state(reading: Reading) -> Iterator[Observation]:
    for one in reading.breakers:
        for state in STATES:
            yield Observation(int(one.state == state), {_NAME: one.name, "circuit_breaker.state": state})


def _calls(reading: Reading) -> Iterator[Observation]:
    for one in reading.breakers:
        for outcome, count in one.calls.items():
            yield Observation(count, {_NAME: one.name, "circuit_breaker.outcome": outcome})


def _shadow_rejections(reading: Reading) -> Iterator[Observation]:
    return _each(reading, lambda one: one.shadow_rejected)


def _transitions(reading: Reading) -> Iterator[Observation]:
    for change, count in reading.transitions.items():
        yield Observation(
            count,
            {
                _NAME: change.breaker,
                "circuit_breaker.transition.from": change.old,
                "circuit_breaker.transition.to": change.new,
                "circuit_breaker.transition.reason": change.reason,
                "circuit_breaker.transition.source": change.source,
            },
        )


def _errors(reading: Reading) -> Iterator[Observation]:
    for kind, count in reading.redis_errors.items():
        yield Observation(count, {"error.type": kind})


class OpenTelemetrySpans:
    """Adds events to the current span. It has no effect without a recording span.

        spans = OpenTelemetrySpans()
        breaker = CircuitBreaker("discovery", redis=..., listeners=[spans], on_call=[spans])

    As a listener: `circuit_breaker.state_change`, `circuit_breaker.redis_error`, `circuit_breaker.redis_restored`.
    As an on_call: `circuit_breaker.rejected`.
    """

    def __call__(self, event: Event) -> None:
        if event.kind in ("success", "failure", "ignored"):
            return
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event(f"circuit_breaker.{event.kind}", dict(_attributes(event)))


def _attributes(event: Event) -> Iterator[tuple[str, str | float | bool]]:
    yield _NAME, event.breaker
    for key, value in (
        ("transition.from", event.old),
        ("transition.to", event.new),
        ("transition.reason", event.reason),
        ("source", event.source),
        ("generation", event.generation),
        ("retry_after", event.retry_after),
        ("enforced", event.enforced),
    ):
        if value is not None:
            yield f"circuit_breaker.{key}", value
    if event.exception is not None:
        yield "error.type", error_kind(event.exception)
