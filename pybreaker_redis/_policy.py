"""When a breaker trips and how it recovers: the only declaration of the policy fields in Python."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from ._errors import PolicyError

WINDOW_RULES = ("error_rate_threshold", "slow_call_rate_threshold", "failures_in_window")  # fields that need a window
_window_rules_of = operator.attrgetter(*WINDOW_RULES)
LONGEST = 365 * 86400.0
LONGEST_OPEN = 30 * 86400.0  # of a forced state, too
LONGEST_PROBE = LONGEST_WINDOW = 86400.0
_KINDS = {"count": "an integer", "seconds": "a number of seconds", "number": "a number", "flag": "true or false"}


def plain(number: float) -> str:
    """A number as people write it, without an exponent."""
    return f"{number:.9f}".rstrip("0").rstrip(".")


def check_seconds(option: str, value: object, least: float, most: float) -> None:
    """Raise PolicyError unless this is a length of time within the bounds, in seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise PolicyError(f"{option} must be from {plain(least)} to {plain(most)} seconds, not {value!r}")


class Rule(NamedTuple):
    """What a policy field accepts and means.

    kind: "count", "seconds" (`<field>_ms` in the scripts), "number" or "flag". optional: None turns the rule off; the
    scripts write 0. on_success: the field may matter to a report of only successes, which must therefore carry it.
    """

    kind: str
    least: float
    most: float
    meaning: str
    optional: bool = False
    on_success: bool = True

    def check(self, name: str, value: Any) -> None:
        """Raise PolicyError unless the value is valid for the field called name."""
        if value is None and self.optional:
            return
        if not self._fits(value) or (self.kind == "count" and not isinstance(value, int)):
            bounds = "" if self.kind == "flag" else f" from {plain(self.least)} to {plain(self.most)}"
            none = " or None" if self.optional else ""
            raise PolicyError(f"{name} must be {_KINDS[self.kind]}{bounds}{none}, not {value!r}")

    def accepts(self, value: Any) -> bool:
        """Whether the scripts accept this value, which is in their units."""
        is_off = self.optional and value == 0 and not isinstance(value, bool)
        unit = 1000 if self.kind == "seconds" else 1
        return is_off or (self._fits(value, unit) and (self.kind == "number" or value % 1 == 0))

    def _fits(self, value: Any, unit: int = 1) -> bool:
        is_flag = isinstance(value, bool)
        if is_flag or self.kind == "flag":
            return is_flag and self.kind == "flag"
        # NaN fails both comparisons
        return isinstance(value, (int, float)) and self.least * unit <= value <= self.most * unit

    def to_request(self, value: Any) -> Any:
        """Convert a value of Policy to the scripts' units."""
        if value is None:
            return 0
        if self.kind == "seconds":
            return round(value * 1000)
        return float(value) if self.kind == "number" else value

    def from_request(self, value: Any) -> Any:
        """Convert a value in the scripts' units to one of Policy."""
        if self.optional and value == 0:
            return None
        return value / 1000 if self.kind == "seconds" else value


def _field(kind: str, default: Any, least: float, most: float, meaning: str, on_success: bool = True) -> Any:
    rule = Rule(kind, least, most, meaning, optional=default is None, on_success=on_success)
    return dataclasses.field(default=default, metadata={"rule": rule})


def _count(default: int | None, meaning: str, *, most: int = 10**9, on_success: bool = True) -> Any:
    return _field("count", default, 1, most, meaning, on_success)


def _seconds(default: float | None, least: float, most: float, meaning: str, *, on_success: bool = True) -> Any:
    return _field("seconds", default, least, most, meaning, on_success)


def _share(meaning: str) -> Any:
    """Of the calls in the window; None turns the rule off."""
    return _field("number", None, 1e-9, 1, meaning)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When a breaker trips and how it recovers. Immutable. Durations are in seconds, exact to a millisecond.

    Raises PolicyError for a value of the wrong type or out of range.
    """

    failure_threshold: int = _count(
        5, "Failures in a row, across the fleet, that trip a closed breaker.", on_success=False
    )
    reset_timeout: float = _seconds(
        30.0, 0.001, LONGEST_OPEN, "How long the circuit stays open before a probe may run."
    )
    success_threshold: int = _count(1, "Successful probes that close the circuit.", on_success=False)
    probe_failure_threshold: int = _count(
        1,
        "Failed probes that open the circuit again. Above 1, a single bad host behind a load balancer cannot reopen"
        " it.",
        on_success=False,
    )
    half_open_max_calls: int = _count(
        1, "Probes that may run at the same time, across the fleet.", most=1000, on_success=False
    )
    probe_timeout: float = _seconds(
        30.0, 0.001, LONGEST_PROBE, "How long a probe may hold its slot without reporting.", on_success=False
    )
    error_rate_threshold: float | None = _share(
        "Share of failed calls in the window, 0 to 1, that trips the breaker. None turns this rule off."
    )
    failures_in_window: int | None = _count(
        None, "Failures in the window that trip the breaker, whatever succeeded in between. None turns this rule off."
    )
    minimum_calls: int = _count(20, "Calls that must be in the window before a rate counts.")
    window: float = _seconds(
        60.0,
        0.01,
        LONGEST_WINDOW,
        "Length of the sliding window. It moves by a tenth at a time, so a call counts for 0.9 to 1 window.",
    )
    slow_call_duration: float | None = _seconds(
        None,
        0.001,
        LONGEST,
        "A call that takes this long or longer counts as slow. None: calls are not timed.",
        on_success=False,
    )
    slow_call_rate_threshold: float | None = _share(
        "Share of slow calls in the window, 0 to 1, that trips the breaker. A slow probe then counts as a failed one."
        " None turns this rule off."
    )
    backoff_multiplier: float = _field(
        "number",
        1.0,
        1,
        1000,
        "Each further trip in a row makes the open period this many times longer. Back-off resets once the breaker has"
        " stayed closed for as long as its next open period would last.",
    )
    max_reset_timeout: float | None = _seconds(
        None, 0.001, LONGEST_OPEN, "Longest open period under back-off. None: 30 days.", on_success=False
    )
    jitter: float = _field(
        "number", 0.0, 0, 1, "Each open period is lengthened by up to this share of it, 0 to 1.", on_success=False
    )
    max_hold: float = _seconds(
        300.0,
        0,
        LONGEST_OPEN,
        "Longest time for which the circuit stays open because the service itself said when to come back (a hold). 0:"
        " holds are ignored.",
        on_success=False,
    )
    quorum: int = _count(
        1,
        "Hosts that must have failed, in the run of failures or in the window, before the fleet trips. Below the"
        " quorum, a failing instance opens the circuit for itself only.",
        most=100,
    )
    ttl: float = _seconds(
        3600.0,
        1,
        LONGEST,
        "How long Redis keeps the state after the last write, or until the state itself ends if that is later.",
    )
    ramp_up: float = _seconds(
        0.0, 0, LONGEST, "How long the share of admitted calls takes to grow from a tenth to all after a recovery."
    )
    enforce: bool = _field(
        "flag",
        True,
        0,
        1,
        "False is shadow mode: the breaker counts, trips and notifies, but admits every call.",
        on_success=False,
    )

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            rule.check(name, getattr(self, name))
        if self.slow_call_rate_threshold is not None and self.slow_call_duration is None:
            raise PolicyError("slow_call_rate_threshold needs slow_call_duration: without it no call counts as slow")
        if self.max_reset_timeout is not None and self.max_reset_timeout < self.reset_timeout:
            most, first = plain(self.max_reset_timeout), plain(self.reset_timeout)
            raise PolicyError(f"max_reset_timeout must be at least reset_timeout ({first} s), not {most} s")

    @property
    def _keeps_window(self) -> bool:
        """Whether a window can trip the breaker."""
        return any(_window_rules_of(self))  # an exchange asks each of its breakers: a generator would take longer

    def _to_request(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in the scripts' units."""
        given = ((name, getattr(self, name)) for name in RULES)
        return {request_field(name): RULES[name].to_request(value) for name, value in given if value != DEFAULTS[name]}

    def _with_override(self, override: Mapping[str, Any] | None) -> Policy:
        """This policy with a policy override: fields that an operator set for the fleet, in the scripts' units."""
        if not override:
            return self
        # unchecked: Redis has checked each field, and two fields that do not fit must not break every call of the fleet
        policy, own = object.__new__(Policy), {name: getattr(self, name) for name in RULES}
        for name, value in {**own, **override_fields(override)}.items():
            object.__setattr__(policy, name, value)
        return policy


RULES: dict[str, Rule] = {field.name: field.metadata["rule"] for field in dataclasses.fields(Policy)}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Policy)}
Policy.__doc__ = f"{Policy.__doc__}\n" + "\n".join(f"    {name}: {rule.meaning}" for name, rule in RULES.items())


def rule_of(name: str) -> Rule:
    """What the policy field called name accepts. Raises PolicyError if there is none."""
    if name not in RULES:
        raise PolicyError(f"{name} is not a policy field; the fields are {', '.join(RULES)}")
    return RULES[name]


def override_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Policy fields in the form that control.lua takes. Raises PolicyError for an unknown field or a bad value."""
    if not fields:
        raise PolicyError("name at least one policy field to set")
    for name, value in fields.items():
        rule_of(name).check(name, value)
    return {request_field(name): RULES[name].to_request(value) for name, value in fields.items()}


def override_fields(override: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a policy override as in Policy. Leaves out what the scripts would not accept."""
    given = ((name, rule, override.get(request_field(name))) for name, rule in RULES.items())
    return {name: rule.from_request(value) for name, rule, value in given if rule.accepts(value)}


@functools.lru_cache(maxsize=1000)
def shared_request(policy: Policy) -> tuple[dict[str, Any], bool]:
    """The policy as a request, the same object for all breakers, and whether any of its fields matters to a success."""
    given = policy._to_request()
    return given, any(rule.on_success and request_field(name) in given for name, rule in RULES.items())


def request_field(name: str) -> str:
    """The name of a policy field in the scripts."""
    return f"{name}_ms" if RULES[name].kind == "seconds" else name


DEFAULT_REQUEST = {request_field(name): rule.to_request(DEFAULTS[name]) for name, rule in RULES.items()}
"""The default of every field, in the scripts' units."""
