"""When a breaker trips and how it recovers: the one declaration of each policy field in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ._errors import PolicyError

LONGEST = 365 * 86400.0
_KINDS = {"count": "an integer", "seconds": "a number of seconds", "number": "a number", "flag": "true or false"}


class Rule(NamedTuple):
    """What a policy field accepts and means.

    kind: "count", "seconds" (`<field>_ms` in the scripts), "number" or "flag". optional: None means "off", which the
    scripts write as 0. on_success: a report of nothing but successes must carry it, whatever state it meets.
    """

    kind: str
    least: float
    most: float
    meaning: str
    optional: bool = False
    on_success: bool = True

    def check(self, name: str, value: Any) -> None:
        """Raise PolicyError unless the field called name may have this value."""
        if value is None and self.optional:
            return
        if self.kind == "flag":
            fits = isinstance(value, bool)
        else:
            types = int if self.kind == "count" else (int, float)
            # NaN fails both comparisons
            fits = isinstance(value, types) and not isinstance(value, bool) and self.least <= value <= self.most
        if not fits:
            bounds = "" if self.kind == "flag" else f" from {self.least:g} to {self.most:g}"
            none = " or None" if self.optional else ""
            raise PolicyError(f"{name} must be {_KINDS[self.kind]}{bounds}{none}, not {value!r}")

    def to_request(self, value: Any) -> int | float | bool:
        """A value in the scripts' units."""
        if self.kind == "flag":
            return bool(value)
        if self.kind == "seconds":
            return round((value or 0) * 1000)
        return int(value) if self.kind == "count" else float(value or 0)

    def from_request(self, value: Any) -> Any:
        """A value in the scripts' units as Policy has it."""
        if self.optional and value == 0:
            return None
        return value / 1000 if self.kind == "seconds" else value


def _field(kind: str, default: Any, least: float, most: float, meaning: str, *, on_success: bool = True) -> Any:
    rule = Rule(kind, least, most, meaning, optional=default is None, on_success=on_success)
    return dataclasses.field(default=default, metadata={"rule": rule})


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one breaker; immutable, and checked when built. Durations are in seconds, exact to a millisecond.

    Raises PolicyError for a value out of range or of the wrong type.
    """

    failure_threshold: int = _field(
        "count", 5, 1, 10**9, "Failures in a row, in the whole fleet, that trip a closed breaker.", on_success=False
    )
    reset_timeout: float = _field(
        "seconds", 30.0, 0.001, LONGEST, "How long the circuit stays open before a probe may run."
    )
    success_threshold: int = _field("count", 1, 1, 10**9, "Successful probes that close the circuit.", on_success=False)
    half_open_max_calls: int = _field(
        "count", 1, 1, 1000, "Probes in flight at a time, in the whole fleet.", on_success=False
    )
    probe_timeout: float = _field(
        "seconds",
        30.0,
        0.001,
        LONGEST,
        "After this time a probe that never reported gives its slot back.",
        on_success=False,
    )
    error_rate_threshold: float | None = _field(
        "number",
        None,
        1e-9,
        1,
        "Share of failed calls in the window, 0 to 1, that trips the breaker. None: no such rule.",
    )
    minimum_calls: int = _field("count", 20, 1, 10**9, "Calls that the window must hold before a rate is judged.")
    window: float = _field(
        "seconds",
        60.0,
        0.01,
        LONGEST,
        "Length of the sliding window. It has ten buckets, so a call counts for 0.9 to 1 window.",
    )
    slow_call_duration: float | None = _field(
        "seconds",
        None,
        0.001,
        LONGEST,
        "A call that takes this long or longer is slow. None: no call is slow.",
        on_success=False,
    )
    slow_call_rate_threshold: float | None = _field(
        "number",
        None,
        1e-9,
        1,
        "Share of slow calls in the window, 0 to 1, that trips the breaker; a slow probe then opens it again."
        " None: no such rule.",
    )
    backoff_multiplier: float = _field(
        "number",
        1.0,
        1,
        1000,
        "Each trip in a row opens the circuit this much longer. Back-off resets once the breaker has stayed closed for"
        " as long as its next open period would last.",
    )
    max_reset_timeout: float | None = _field(
        "seconds", None, 0.001, LONGEST, "The longest open period under back-off. None: 365 days.", on_success=False
    )
    jitter: float = _field(
        "number", 0.0, 0, 1, "Each trip adds up to this share, 0 to 1, of the open period to it.", on_success=False
    )
    quorum: int = _field(
        "count",
        1,
        1,
        100,
        "Distinct instances that must have reported failures, in the run or the window, before the fleet trips. An"
        " instance that fails below the quorum opens the circuit for itself only.",
    )
    ttl: float = _field(
        "seconds",
        3600.0,
        1,
        LONGEST,
        "How long Redis keeps the state after the last write; longer where the state itself lasts longer.",
    )
    ramp_up: float = _field(
        "seconds",
        0.0,
        0,
        LONGEST,
        "After a recovery, the time over which the share of admitted calls grows from a tenth to all of them.",
    )
    enforce: bool = _field(
        "flag",
        True,
        0,
        1,
        "False is shadow mode: calls are counted and trips are notified, but every call is admitted.",
        on_success=False,
    )

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            rule.check(name, getattr(self, name))
        if self.slow_call_rate_threshold is not None and self.slow_call_duration is None:
            raise PolicyError("slow_call_rate_threshold needs slow_call_duration, which says which calls are slow")

    def to_request(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in the scripts' units."""
        given = ((name, getattr(self, name)) for name in RULES)
        return {request_field(name): RULES[name].to_request(value) for name, value in given if value != DEFAULTS[name]}

    def with_override(self, override: Mapping[str, Any] | None) -> Policy:
        """This policy under a policy override: the fields that an operator set for the fleet, in the scripts' units."""
        if not override:
            return self
        # built without the check: the server has checked each field, and the operator's word is final
        policy = object.__new__(Policy)
        for name, rule in RULES.items():
            field = request_field(name)
            value = rule.from_request(override[field]) if field in override else getattr(self, name)
            object.__setattr__(policy, name, value)
        return policy


RULES: dict[str, Rule] = {field.name: field.metadata["rule"] for field in dataclasses.fields(Policy)}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Policy)}
Policy.__doc__ = f"{Policy.__doc__}\n" + "\n".join(f"    {name}: {rule.meaning}" for name, rule in RULES.items())


def override_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a policy as control.lua takes them. Raises PolicyError for an unknown field or a bad value."""
    if not fields:
        raise PolicyError("name at least one policy field to set")
    for name, value in fields.items():
        if name not in RULES:
            raise PolicyError(f"{name} is not a policy field; the fields are {', '.join(RULES)}")
        RULES[name].check(name, value)
    return {request_field(name): RULES[name].to_request(value) for name, value in fields.items()}


def request_field(name: str) -> str:
    """The name of a policy field in the scripts."""
    return f"{name}_ms" if RULES[name].kind == "seconds" else name


def default_request() -> dict[str, Any]:
    """The default of every field, in the scripts' units."""
    return {request_field(name): rule.to_request(DEFAULTS[name]) for name, rule in RULES.items()}
