"""When a breaker trips and how it recovers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ._errors import PolicyError

LONGEST = 365 * 86400.0


class _Field(NamedTuple):
    """kind: "count", "seconds" (`<field>_ms` in the scripts), "number" or "flag". optional: None is "off"."""

    kind: str
    least: float
    most: float
    optional: bool = False


_FIELDS: dict[str, _Field] = {
    "failure_threshold": _Field("count", 1, 10**9),
    "reset_timeout": _Field("seconds", 0.001, LONGEST),
    "success_threshold": _Field("count", 1, 10**9),
    "half_open_max_calls": _Field("count", 1, 1000),
    "probe_timeout": _Field("seconds", 0.001, LONGEST),
    "error_rate_threshold": _Field("number", 1e-9, 1, optional=True),
    "minimum_calls": _Field("count", 1, 10**9),
    "window": _Field("seconds", 0.01, LONGEST),
    "slow_call_duration": _Field("seconds", 0.001, LONGEST, optional=True),
    "slow_call_rate_threshold": _Field("number", 1e-9, 1, optional=True),
    "backoff_multiplier": _Field("number", 1, 1000),
    "max_reset_timeout": _Field("seconds", 0.001, LONGEST, optional=True),
    "jitter": _Field("number", 0, 1),
    "quorum": _Field("count", 1, 100),
    "ttl": _Field("seconds", 1, LONGEST),
    "ramp_up": _Field("seconds", 0, LONGEST),
    "enforce": _Field("flag", 0, 1),
}
_KINDS = {"count": "an integer", "seconds": "a number of seconds", "number": "a number", "flag": "true or false"}


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one breaker; checked when built. Durations are in seconds, exact to a millisecond.

    failure_threshold: failures in a row that trip a closed breaker.
    reset_timeout: how long it stays open before a probe may run.
    success_threshold: probe successes that close it again.
    half_open_max_calls: probes in flight at a time, in the whole fleet.
    probe_timeout: after this a probe that never reported gives its slot back.
    error_rate_threshold: share of failed calls in the window, 0 to 1, that trips it. None: no such rule.
    minimum_calls: calls in the window before a rate is looked at.
    window: length of the sliding window, kept in ten buckets: a call counts for 0.9 to 1 window.
    slow_call_duration: a call that takes this long or longer is slow. None: no call is.
    slow_call_rate_threshold: share of slow calls in the window, 0 to 1, that trips it; a slow probe then opens
        it again. None: no such rule.
    backoff_multiplier: each trip in a row opens it this much longer; the row ends when it was closed for as long
        as it would open for next.
    max_reset_timeout: where the growth of the open time ends. None: 365 days.
    jitter: share of the open time, 0 to 1, up to which a trip adds to it.
    quorum: distinct instances that must have reported failures (in the row or the window) for the fleet to trip.
        An instance that fails below the quorum opens for itself alone.
    ttl: how long Redis keeps the state after the last write.
    ramp_up: after a recovery, seconds over which the share of admitted calls grows to all. 0: all at once.
    enforce: False is shadow mode: all is counted, told and kept as ever, but every call is admitted.

    Raises PolicyError for a value out of range or of the wrong type.
    """

    failure_threshold: int = 5
    reset_timeout: float = 30.0
    success_threshold: int = 1
    half_open_max_calls: int = 1
    probe_timeout: float = 30.0
    error_rate_threshold: float | None = None
    minimum_calls: int = 20
    window: float = 60.0
    slow_call_duration: float | None = None
    slow_call_rate_threshold: float | None = None
    backoff_multiplier: float = 1.0
    max_reset_timeout: float | None = None
    jitter: float = 0.0
    quorum: int = 1
    ttl: float = 3600.0
    ramp_up: float = 0.0
    enforce: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))
        if self.slow_call_rate_threshold is not None and self.slow_call_duration is None:
            raise PolicyError("slow_call_rate_threshold needs slow_call_duration, which says what is slow")

    def to_request(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as the scripts take them (milliseconds, 0 for None)."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {request_field(name): request_value(name, value) for name, value in given.items()}

    def with_override(self, override: Mapping[str, Any] | None) -> Policy:
        """This policy under the fields that an operator set for the fleet (as the scripts give them)."""
        if not override:
            return self
        fields = {f.name: request_field(f.name) for f in dataclasses.fields(self)}
        given = {name: override[field] for name, field in fields.items() if field in override}
        # made without the check: the server has checked each field, and the operator's word is final
        policy = object.__new__(Policy)
        for name in fields:
            value = _from_request(name, given[name]) if name in given else getattr(self, name)
            object.__setattr__(policy, name, value)
        return policy


def override_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a policy as control.lua takes them. Raises PolicyError for an unknown field or a bad value."""
    if not fields:
        raise PolicyError("name at least one field of the policy to set")
    for name, value in fields.items():
        if name not in _FIELDS:
            raise PolicyError(f"{name} is no field of a policy; there are {', '.join(_FIELDS)}")
        _check(name, value)
    return {request_field(name): request_value(name, value) for name, value in fields.items()}


def request_field(name: str) -> str:
    """The name under which the scripts know a policy field."""
    return f"{name}_ms" if _FIELDS[name].kind == "seconds" else name


def request_value(name: str, value: Any) -> int | float | bool:
    """A policy value in the scripts' units; None is 0."""
    kind = _FIELDS[name].kind
    if kind == "flag":
        return bool(value)
    if kind == "seconds":
        return round((value or 0) * 1000)
    return int(value) if kind == "count" else float(value or 0)


def _from_request(name: str, value: Any) -> Any:
    field = _FIELDS[name]
    if field.optional and value == 0:
        return None
    return value / 1000 if field.kind == "seconds" else value


def _check(name: str, value: Any) -> None:
    kind, least, most, optional = _FIELDS[name]
    if value is None and optional:
        return
    if kind == "flag":
        fits = isinstance(value, bool)
    else:
        right_type = isinstance(value, int if kind == "count" else (int, float)) and not isinstance(value, bool)
        fits = right_type and least <= value <= most  # which NaN is not either
    if not fits:
        bounds = "" if kind == "flag" else f" from {least:g} to {most:g}"
        raise PolicyError(f"{name} must be {_KINDS[kind]}{bounds}{' or None' if optional else ''}, not {value!r}")
