"""What listeners receive, and what a breaker counts for metrics."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

from ._protocol import State

EventKind: TypeAlias = Literal[
    "state_change", "redis_error", "redis_restored", "success", "failure", "ignored", "rejected"
]
CALL_KINDS = frozenset({"success", "failure", "ignored", "rejected"})


class Event(NamedTuple):
    """What happened to a breaker. Fields that do not concern the kind are None.

    kind: `listeners` receive "state_change", "redis_error" and "redis_restored"; `on_call` receives "success",
    "failure", "ignored" and "rejected".
    breaker: its name. instance: the process that caused the event.
    old, new, reason, generation, counts: of a state_change. Exactly one process of the fleet is notified of each,
    and so is every process that watches, with source "watch".
    retry_after: seconds, of a rejection. enforced: False for a rejection in shadow mode: the call was admitted.
    exception: of a failure, an ignored call or a redis_error.
    slow: of a success or failure, whether the call took slow_call_duration; None where that is not measured.
    source: "redis", "memory", "local" (Redis is down), "isolated" (this instance alone fails, below the quorum) or
    "watch".
    """

    kind: EventKind
    breaker: str
    instance: str
    old: State | None = None
    new: State | None = None
    reason: str | None = None
    generation: int | None = None
    counts: dict[str, int] | None = None
    retry_after: float | None = None
    exception: BaseException | None = None
    source: str | None = None
    slow: bool | None = None
    enforced: bool | None = None


class Counts(NamedTuple):
    """The calls of one breaker in this process, by outcome; they only grow.

    successes: all of them, the slow ones too. slow: successes that took slow_call_duration or longer.
    """

    successes: int
    slow: int
    failures: int
    ignored: int
    rejected: int


class Instrument:
    """A listener that also wants to know its breakers, such as a collector of metrics.

    It receives transitions and outages like every listener, and reads the calls from `breaker.counts`.
    """

    def attach(self, breaker: Any) -> None:
        """A breaker was made with this listener."""

    def script_ran(self, name: str, seconds: float, error: BaseException | None) -> None:
        """A script call ended after so many seconds, with a reply or with an error."""

    def __call__(self, event: Event) -> object:
        """Like every listener."""
