"""Stories of one breaker, told to Redis with and without a lease and to the engine in memory: all must end alike.

A story is a policy and a line of steps:

  s f i   a call that succeeds, fails, or raises an exception that is ignored
  S F     the same, slow
  h9      a call that fails, and whose service asks to come back in 9 s
  r       a call that must be rejected
  (s )    a call that stays open: what is between the brackets happens meanwhile; it ends as its letter says
  +       a pause until an open period is over; ++ until a window has passed, and a lease
  open closed half   what the state must be now
  @open @closed      an operator forces that state; @clear ends it; @reset resets; @probe lets the next caller probe
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import redis
from conftest import wait_until

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy

OPEN = 0.15  # seconds
SLOW = 0.03
WINDOW = 0.6

STORIES: dict[str, tuple[dict[str, Any], str]] = {
    # failures in a row
    "healthy": ({}, "s s s s closed"),
    "one short of the threshold": ({}, "f f closed"),
    "the threshold": ({}, "f f f open r"),
    "a threshold of one": ({"failure_threshold": 1}, "f open r r"),
    "a success between": ({}, "f f s f f closed"),
    "a success after each": ({}, "f s f s f s f s closed"),
    "many successes, then the threshold": ({}, "s s s s s s f f f open"),
    "ignored calls end no run": ({}, "f f i i f open"),
    "ignored calls are no failures": ({}, "i i i i closed"),
    "a slow success ends a run": ({"slow_call_duration": SLOW}, "f f S f f closed"),
    "rejections count nothing": ({}, "f f f r r r r + s closed"),
    # half open
    "a probe that succeeds": ({}, "f f f open + half s closed"),
    "a probe that fails": ({}, "f f f + f open r"),
    "a probe that is ignored": ({}, "f f f + i half s closed"),
    "a probe after a probe that failed": ({}, "f f f + f open + s closed"),
    "two successes to close": ({"success_threshold": 2}, "f f f + s half s closed"),
    "a failure between two successes": ({"success_threshold": 2}, "f f f + s f open + s s closed"),
    "one probe at a time": ({}, "f f f + (s r r ) closed"),
    "two probes at a time": ({"half_open_max_calls": 2, "success_threshold": 2}, "f f f + (s (s r ) ) closed"),
    "two probes, one fails": ({"half_open_max_calls": 2, "success_threshold": 2}, "f f f + (s (f r ) open ) open"),
    "a probe that ends after the circuit closed": (
        {"half_open_max_calls": 2},
        "f f f + (f s closed ) closed f f closed f open",
    ),
    "counts begin anew after a recovery": ({}, "f f f + s closed f f closed f open"),
    "a call from before the trip fails afterwards": ({}, "(f f f f open ) open + s closed"),
    "a call from before the trip succeeds afterwards": ({}, "(s f f f open ) open r + s closed"),
    "a call from before the trip ends after the recovery": ({}, "(f f f f + s closed ) closed f f closed"),
    "tolerated failures of probes": (
        {"probe_failure_threshold": 2, "half_open_max_calls": 3, "success_threshold": 3},
        "f f f + f half f open",
    ),
    "a tolerated failure, then successes": (
        {"probe_failure_threshold": 2, "success_threshold": 2, "half_open_max_calls": 2},
        "f f f + f half s s closed",
    ),
    "a slow probe": ({"slow_call_duration": SLOW, "slow_call_rate_threshold": 0.5}, "f f f + S open r"),
    "a slow probe where nobody minds": ({"slow_call_duration": SLOW}, "f f f + S closed"),
    # rates
    "below the minimum": ({"error_rate_threshold": 0.5, "minimum_calls": 5, "failure_threshold": 99}, "f f f f closed"),
    "the minimum": ({"error_rate_threshold": 0.5, "minimum_calls": 5, "failure_threshold": 99}, "f f f f f open"),
    "half of the calls": (
        {"error_rate_threshold": 0.5, "minimum_calls": 6, "failure_threshold": 99},
        "s s s f f f open",
    ),
    "less than half": (
        {"error_rate_threshold": 0.5, "minimum_calls": 6, "failure_threshold": 99},
        "s s s s f f f closed",
    ),
    "alternating": ({"error_rate_threshold": 0.5, "minimum_calls": 6, "failure_threshold": 99}, "s f s f s f open"),
    "all must fail": ({"error_rate_threshold": 1.0, "minimum_calls": 3, "failure_threshold": 99}, "s f f f f closed"),
    "old successes are forgotten": (
        {"error_rate_threshold": 0.9, "minimum_calls": 3, "failure_threshold": 99, "window": WINDOW},
        "s s s s s s ++ f f f open",
    ),
    "old failures are forgotten": (
        {"error_rate_threshold": 0.5, "minimum_calls": 3, "failure_threshold": 99, "window": WINDOW},
        "f f ++ s s s s s f closed",
    ),
    "ignored calls are not in the window": (
        {"error_rate_threshold": 0.5, "minimum_calls": 4, "failure_threshold": 99},
        "i i i i f f f closed f open",
    ),
    "a rate after a recovery begins anew": (
        {"error_rate_threshold": 0.5, "minimum_calls": 4, "failure_threshold": 99},
        "f f f f open + s closed f f closed",
    ),
    "a run trips before the rate": ({"error_rate_threshold": 0.5, "minimum_calls": 50}, "s s s f f f open"),
    # slow calls
    "all slow": ({"slow_call_duration": SLOW, "slow_call_rate_threshold": 0.5, "minimum_calls": 3}, "S S S open"),
    "half slow": ({"slow_call_duration": SLOW, "slow_call_rate_threshold": 0.5, "minimum_calls": 4}, "s s S S open"),
    "a third slow": ({"slow_call_duration": SLOW, "slow_call_rate_threshold": 0.5, "minimum_calls": 3}, "s s S closed"),
    "slow failures count twice": (
        {"slow_call_duration": SLOW, "slow_call_rate_threshold": 0.5, "minimum_calls": 2, "failure_threshold": 9},
        "F F open",
    ),
    "slow, but no rule": ({"slow_call_duration": SLOW}, "S S S S S closed"),
    # failures in the window
    "failures in the window": ({"failures_in_window": 3, "failure_threshold": 99}, "f s f s f open"),
    "failures in the window, one short": ({"failures_in_window": 3, "failure_threshold": 99}, "f s s f s closed"),
    "failures that have left the window": (
        {"failures_in_window": 3, "failure_threshold": 99, "window": WINDOW},
        "f s f s ++ f s f closed f open",
    ),
    "a run trips before them": ({"failures_in_window": 9}, "f f f open"),
    # back-off
    "the second open period is longer": ({"backoff_multiplier": 4.0}, "f f f + f open + open r"),
    "no back-off": ({}, "f f f + f open + half s closed"),
    "at most": ({"backoff_multiplier": 9.0, "max_reset_timeout": OPEN}, "f f f + f open + half s closed"),
    # holds
    "a hold": ({}, "h9 open r r"),
    "a hold in a run": ({}, "f f h9 open r"),
    "a hold that ends": ({}, "h0.1 open + s closed"),
    "no hold": ({}, "h0 closed h0 h0 open"),
    "at most a hold": ({"max_hold": 0.1}, "h9 open + s closed"),
    "a probe that is held": ({}, "f f f + h9 open + open r"),
    "a hold adds nothing to back-off": ({"backoff_multiplier": 9.0}, "h0.1 open + s closed f f f open + half s closed"),
    "a hold and an operator": ({}, "@closed h9 closed @clear closed s"),
    # operators
    "forced open": ({}, "@open open r r + open r"),
    "forced open, then cleared": ({}, "@open r @clear half s closed"),
    "forced closed": ({"failure_threshold": 1}, "@closed f f f closed @clear f open"),
    "forced closed while open": ({}, "f f f open @closed closed s"),
    "reset while open": ({}, "f f f open @reset closed f f closed f open"),
    "reset ends a run": ({}, "f f @reset f f closed"),
    "reset ends a forced state": ({}, "@open @reset closed s"),
    "calls from before a reset": ({}, "(f f f @reset ) closed f f closed f open"),
    "a probe on demand": ({"reset_timeout": 60.0}, "f f f open r @probe half s closed"),
    "shadow mode": ({"enforce": False}, "f f f open f f s"),
}


class Down(Exception):
    """A failure."""


class Busy(Exception):
    """A failure of a service that says when to come back."""


class Ignored(Exception):
    """Neither success nor failure."""


class Story:
    """One breaker, and what happens to it."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self.breaker = breaker
        self.hold = 0.0

    def call(self, how: str, meanwhile: list[str] | None = None) -> None:
        """One call that ends as its letter says."""
        error = {"s": None, "f": Down, "i": Ignored, "h": Busy}[how[0].lower()]
        self.hold = float(how[1:] or 0)

        def work() -> None:
            if how[0].isupper():
                time.sleep(SLOW * 1.5)
            if error is not None:
                raise error

        if meanwhile is None:
            with contextlib.suppress(Down, Busy, Ignored):
                self.breaker.call(work)
            return
        # in two steps: what happens in a block would be part of its call
        permit = self.breaker.acquire()
        self.tell(meanwhile)
        if error is None:
            permit.success()
        else:
            permit.failure(error())

    def tell(self, steps: list[str]) -> None:
        """All steps, or those up to the bracket that ends a call."""
        while steps:
            step = steps.pop(0)
            if step == ")":
                return
            if step.startswith("("):
                self.call(step[1:], steps)
            elif step in ("open", "closed", "half"):
                wanted = {"half": "half_open"}.get(step, step)
                wait_until(lambda wanted=wanted: self.state() == wanted)
                assert self.breaker.state == wanted
            elif step == "r":
                with pytest.raises(CircuitOpenError):
                    self.breaker.call(int)
            elif step.startswith("+"):
                time.sleep(OPEN * 1.1 if step == "+" else WINDOW * 1.4)
            elif step.startswith("@"):
                names = {"open": "force_open", "closed": "force_closed", "clear": "clear_forced"}
                getattr(self.breaker, names.get(step[1:], step[1:]))()
            else:
                self.call(step)

    def state(self) -> str:
        """The state; an open circuit counts as half open once its time is over."""
        seen = self.breaker.snapshot()
        return "half_open" if seen.state == "open" and seen.retry_after == 0 and not seen.forced else seen.state


@pytest.mark.parametrize("engine", ["redis-0", "redis-0.1", "memory"])
@pytest.mark.parametrize("name", STORIES)
def test_stories(client: redis.Redis, name: str, engine: str) -> None:
    """It ends alike on every engine."""
    given, steps = STORIES[name]
    options: dict[str, Any] = {"redis": None if engine == "memory" else client}
    if engine != "memory":
        options |= {"lease": float(engine[6:]), "redis_timeout": 20.0}
    story: Story
    breaker = CircuitBreaker(
        "story",
        policy=Policy(**{"failure_threshold": 3, "reset_timeout": OPEN, **given}),
        ignore=Ignored,
        retry_after=lambda outcome: story.hold if isinstance(outcome, Busy) else None,
        **options,
    )
    story = Story(breaker)
    story.tell(steps.split())


def test_there_are_enough_stories() -> None:
    """Each capability has some."""
    assert len(STORIES) >= 60
