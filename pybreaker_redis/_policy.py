"""When a breaker trips and how it recovers."""

from __future__ import annotations

import dataclasses
from typing import Any

from ._errors import PolicyError

_LONGEST = 365 * 86400.0
# field: (least, most); a float is a duration in seconds, sent to the scripts as `<field>_ms`
_RANGES: dict[str, tuple[float, float]] = {
    "failure_threshold": (1, 10**9),
    "reset_timeout": (0.001, _LONGEST),
    "success_threshold": (1, 10**9),
    "half_open_max_calls": (1, 1000),
    "probe_timeout": (0.001, _LONGEST),
    "ttl": (1.0, _LONGEST),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one breaker; checked when built. Durations are in seconds, exact to a millisecond.

    failure_threshold: failures in a row that trip a closed breaker.
    reset_timeout: how long it stays open before a probe may run.
    success_threshold: probe successes that close it again.
    half_open_max_calls: probes in flight at a time, in the whole fleet.
    probe_timeout: after this a probe that never reported gives its slot back.
    ttl: how long Redis keeps the state after the last write.

    Raises PolicyError for a value out of range or of the wrong type.
    """

    failure_threshold: int = 5
    reset_timeout: float = 30.0
    success_threshold: int = 1
    half_open_max_calls: int = 1
    probe_timeout: float = 30.0
    ttl: float = 3600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), isinstance(field.default, float))

    def to_request(self) -> dict[str, int]:
        """The fields that differ from the defaults, as the scripts take them (integers, milliseconds)."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {request_field(name): request_value(name, value) for name, value in given.items()}


def request_field(name: str) -> str:
    """The name under which the scripts know a policy field."""
    return name if _is_count(name) else f"{name}_ms"


def request_value(name: str, value: float) -> int:
    """A policy value in the scripts' units."""
    return int(value) if _is_count(name) else round(value * 1000)


def _is_count(name: str) -> bool:
    return isinstance(getattr(Policy, "__dataclass_fields__")[name].default, int)  # noqa: B009


def _check(name: str, value: Any, duration: bool) -> None:
    least, most = _RANGES[name]
    kind = "a number of seconds" if duration else "an integer"
    right_type = isinstance(value, (int, float) if duration else int) and not isinstance(value, bool)
    if not right_type or not least <= value <= most:  # which NaN is not either
        raise PolicyError(f"{name} must be {kind} from {least:g} to {most:g}, not {value!r}")
