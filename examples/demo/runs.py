"""One run: the workers call under one guard while the service goes through its phases."""

from __future__ import annotations

import collections
from time import monotonic, sleep
from typing import NamedTuple

from pybreaker_redis import CircuitBreaker, Event

from .crew import Crew
from .plan import PHASES, TICK
from .screens import Moment, Plain
from .workers import Tally


class Run(NamedTuple):
    """The figures of one run.

    hits: calls that reached the dead service, counted by the service. began: the start of each phase.
    """

    hits: int
    tallies: tuple[Tally, ...]
    began: dict[str, float]

    @property
    def probes(self) -> int:
        """The calls that the workers made as probes."""
        return sum(tally.probes for tally in self.tallies)

    @property
    def transitions(self) -> list[tuple[float, Event]]:
        """The transitions that workers were notified of, and when."""
        return [transition for tally in self.tallies for transition in tally.transitions]

    @property
    def trips(self) -> list[float]:
        """The times of the notifications closed -> open."""
        return [at for at, event in self.transitions if (event.old, event.new) == ("closed", "open")]


def perform(kind: str, crew: Crew, breaker: CircuitBreaker, screen: Plain) -> Run:
    """Run the schedule under one kind of guard."""
    began: dict[str, float] = {}
    screen.announce(kind)
    crew.begin(kind)
    for phase, lasts in PHASES[kind]:
        began[phase] = monotonic()
        crew.enter(phase)
        while (left := began[phase] + lasts - monotonic()) > 0:
            tallies = crew.tallies()
            screen.show(Moment(kind, phase, 1 - left / lasts, tallies, _state(kind, breaker, tallies)))
            sleep(min(left, TICK))
    crew.end()
    tallies = crew.tallies()
    screen.show(Moment(kind, phase, 1.0, tallies, _state(kind, breaker, tallies)))
    hits = crew.enter("healthy")
    return Run(sum(hits["dead", f"/{kind}/{tally.number}"] for tally in tallies), tuple(tallies), began)


def _state(kind: str, breaker: CircuitBreaker, tallies: list[Tally]) -> str:
    if kind == "none":
        return "no breaker"
    if kind == "private":
        return ", ".join(f"{count} {state}" for state, count in collections.Counter(t.state for t in tallies).items())
    snapshot = breaker.snapshot()
    wait = f", probe in {snapshot.retry_after:.1f} s" if snapshot.state == "open" and snapshot.retry_after else ""
    return f"{snapshot.state}{wait}"
