"""The promises of the shared breaker, checked against the figures of all runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pybreaker_redis import HistoryEntry

from .plan import FAILS_EVERY, GUARDS, failure_threshold
from .runs import Run

REJECTING_WITHIN, ANSWERING_WITHIN = 1.0, 1.5  # seconds


class Promise(NamedTuple):
    """A promise with the measured figures, and whether it held."""

    held: bool
    text: str


def promises(runs: dict[str, Run], history: list[HistoryEntry], state: str) -> list[Promise]:
    """Check every promise. history and state: of the shared breaker, after its run."""
    none, private, shared = (runs[kind] for kind in GUARDS)
    workers = len(shared.tallies)
    trips = sum((entry.old, entry.new) == ("closed", "open") for entry in history)
    half_open = sum(entry.new == "half_open" for entry in history)
    generations = [event.generation or 0 for _, event in shared.transitions]
    tripped = min(shared.trips, default=float("-inf"))  # without a trip, no promise about it holds
    after = tripped - shared.began["dead"]
    rejecting = _until_all((tally.rejecting_since for tally in shared.tallies), tripped)
    answering = _until_all((tally.answering_since for tally in shared.tallies), shared.began["repaired"])
    return [
        Promise(
            0 < shared.hits <= most_hits(workers, shared.probes) and shared.hits < private.hits < none.hits,
            f"hits on the dead service: {shared.hits} shared, {private.hits} private, {none.hits} without a breaker",
        ),
        Promise(
            trips == len(shared.trips) == 1 and len(private.trips) == workers,
            f"trips: {trips}, announced by {len(shared.trips)} of {workers} processes;"
            f" {len(private.trips)} trips of private breakers",
        ),
        Promise(
            after > 0,
            f"closed while every {FAILS_EVERY}th call failed; tripped {after:.3f} s after the death",
        ),
        Promise(
            rejecting <= REJECTING_WITHIN,
            f"every process rejected {max(rejecting, 0.0):.3f} s after the trip (promised: {REJECTING_WITHIN:g} s)",
        ),
        Promise(
            0 < shared.probes == half_open and shared.probes < private.probes,
            f"probes: {shared.probes} in {half_open} half-open periods; private breakers sent {private.probes}",
        ),
        Promise(
            sorted(generations) == sorted(entry.generation for entry in history),
            f"transitions: {len(history)} in the history, {len(generations)} notifications, one process each",
        ),
        Promise(
            answering <= ANSWERING_WITHIN and state == "closed",
            f"{state}, every process served {answering:.3f} s after the repair (promised: {ANSWERING_WITHIN:g} s)",
        ),
    ]


def most_hits(workers: int, probes: int) -> int:
    """The most hits on a dead service that a shared breaker allows.

    Each worker can end the run of failures once, with its last success. When the breaker trips, each of the other
    workers can have one call running.
    """
    return workers * (failure_threshold(workers) - 1) + 1 + (workers - 1) + probes


def _until_all(times: Iterable[float | None], since: float) -> float:
    return max(float("inf") if time is None else time - since for time in times)


def summary(runs: dict[str, Run]) -> Iterator[str]:
    """A table of the three runs."""
    yield f"\n{'3 s of a dead service':29}{'hits on it':>10}{'rejected':>10}{'trips':>8}{'probes':>8}"
    for kind, run in runs.items():
        rejected = sum(tally.rejected for tally in run.tallies)
        figures = "".join(f"{figure:8}" for figure in (len(run.trips), run.probes)) if kind != "none" else ""
        yield f"{GUARDS[kind]:29}{run.hits:10}{rejected:10}{figures}"
    yield ""


def recording(runs: dict[str, Run]) -> dict[str, Any]:
    """The shared run, call by call, with times in seconds since its start; and the hits of every run."""
    shared = runs["shared"]
    start = min(shared.began.values())
    transitions = sorted((at, event.old, event.new) for at, event in shared.transitions)
    return {
        "hits": {kind: run.hits for kind, run in runs.items()},
        "began": {phase: round(at - start, 3) for phase, at in shared.began.items()},
        "calls": [[[round(at - start, 3), ended] for at, ended in tally.calls_made] for tally in shared.tallies],
        "transitions": [[round(at - start, 3), old, new] for at, old, new in transitions],
    }
