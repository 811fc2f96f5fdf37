"""How the program shows breakers: lines for people, the same lines without colours in a pipe, JSON for programs."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.console
import rich.text
import typer

from .. import _typed
from .._board import clean, span
from .._errors import PolicyError
from .._policy import RULES, Policy
from .._protocol import HistoryEntry, Snapshot
from ._fleet import Reading
from ._table import STYLES

LABEL = 25  # letters of a label


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Raise the error; Rich would exit with code 1."""
        raise BrokenPipeError


out = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=True)


def put(lines: Sequence[rich.text.Text]) -> None:
    """Print many lines at once. Lines without a style bypass Rich, which takes longer for them than Redis."""
    for styled, group in itertools.groupby(lines, lambda text: out.is_terminal and bool(text.style or text.spans)):
        if styled:
            out.print(rich.text.Text("\n").join(group))
        else:
            print(*[text.plain for text in group], sep="\n")


def put_json(value: object) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(value, indent=2))


# One breaker


def ago(at: float | None) -> str:
    """How long ago a time was. at: the time in unix seconds."""
    return "-" if at is None else f"{span(max(time.time() - at, 0.0))} ago"


def as_json(reading: Reading) -> dict[str, Any]:
    """Everything about one breaker for a program."""
    return {**dataclasses.asdict(reading.snapshot), "last_change": reading.last_change, "stored": reading.stored}


def details(reading: Reading, policy: Policy | None) -> Iterable[tuple[str, str]]:
    """Everything about one breaker, as label and text. policy: its clients', or None where that is unknown."""
    seen = reading.snapshot
    yield "state", _state(reading)
    yield "since", "-" if reading.last_change is None else f"{stamp(reading.last_change)} ({ago(reading.last_change)})"
    for label in ("reason", "error", "operator", "note"):
        if text := getattr(seen, label):
            yield label, clean(text)
    yield "health", f"{seen.health} of 100{'' if policy else ', if the policy is the default one'}"
    if seen.probes_in_flight:
        yield "probes running", str(seen.probes_in_flight)
    yield "failures in a row", _of(seen, policy, seen.failure_count, "failure_threshold")
    yield "probe successes", _of(seen, policy, seen.success_count, "success_threshold")
    yield "last failure", "-" if seen.last_failure_time is None else stamp(seen.last_failure_time)
    yield "calls in the window", f"{seen.calls}, failed {seen.failures}, slow {seen.slow}"
    yield "trips in a row", str(seen.trips)
    yield "generation", str(seen.generation)
    if overruled := [field for field, source in seen.policy_sources.items() if source == "override"]:
        fields = assigned({field: getattr(seen.policy, field) for field in overruled})
        yield "policy override", fields + by_whom(seen)
    for host, at in seen.reporters.items():
        yield "host with a failure", f"{clean(host)} at {stamp(at)}"


def _state(reading: Reading) -> str:
    seen = reading.snapshot
    if not reading.stored:
        return f"{seen.state} (nothing is stored under this name)"
    if seen.forced:
        return f"{seen.state}, forced for {span(max((seen.forced_until or 0.0) - time.time(), 0.0))}"
    if seen.state != "open":
        return seen.state
    return f"open, probe in {span(reading.retry_after)}" if reading.retry_after else "open, a probe is due"


def by_whom(seen: Snapshot) -> str:
    """Who set the policy override, and why, in brackets; empty where nobody said."""
    texts = filter(None, (seen.override_operator and f"by {seen.override_operator}", seen.override_note))
    return f" ({clean(': '.join(texts))})" if seen.override_operator or seen.override_note else ""


def assigned(fields: Mapping[str, Any], until: float | None = None) -> str:
    """Policy fields as they are typed. until: their end in unix seconds."""
    shown = ", ".join(f"{field}={value}" for field, value in fields.items())
    return shown if until is None else f"{shown} until {stamp(until)}"


def _of(seen: Snapshot, policy: Policy | None, count: int, threshold: str) -> str:
    known = policy is not None or seen.policy_sources[threshold] == "override"
    return f"{count} of {getattr(seen.policy, threshold)}" if known else str(count)


def pairs(found: Iterable[tuple[str, str]], width: int = 1000) -> list[rich.text.Text]:
    """Lines of a label and a text. A text that is longer than the width goes on below."""
    lines = []
    for label, text in found:
        first, *more = textwrap.wrap(text, max(width - LABEL, 20)) or [""]
        lines.append(rich.text.Text(f"{label:<{LABEL}}", "bold").append(first, ""))
        lines += [rich.text.Text(" " * LABEL + rest) for rest in more]
    return lines


def stamp(at: float) -> str:
    """Unix seconds as local time."""
    return datetime.datetime.fromtimestamp(at).isoformat(sep=" ", timespec="milliseconds")


def transition(entry: HistoryEntry, *, stamped: bool = False, brief: bool = False) -> rich.text.Text:
    """One history entry on one line. stamped: with its time. brief: without counts and alignment."""
    text = rich.text.Text(f"{stamp(entry.time)}  " if stamped else "")
    old, new = (entry.old, entry.new) if brief else (f"{entry.old:>9}", f"{entry.new:<9}")
    if entry.old != entry.new:
        text.append(clean(old), STYLES.get(entry.old, "")).append(" -> ")
    elif not brief:
        text.append(" " * 13)
    text.append(clean(new), STYLES.get(entry.new, ""))
    counts = f"  {entry.failure_count} in a row"
    if entry.calls is not None:
        counts += f", {entry.failures} of {entry.calls} failed, {entry.slow} slow"
    by = f"  by {entry.operator or entry.instance or '?'}{f': {entry.note}' if entry.note else ''}"
    shown = f"  {entry.reason}" if brief else f"  {entry.reason:<18}{counts}"
    text.append(clean(f"{shown}{by}{f'  {entry.error}' if entry.error else ''}"))
    if entry.override:
        ended = "" if entry.reason == "set_policy" else "ended "
        text.append(f"  {ended}{assigned(entry.override, entry.override_until)}")
    return text


# Arguments


def seconds(text: str) -> float:
    """A length of time as typed."""
    try:
        return _typed.seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Policy fields as typed: failure_threshold=20 reset_timeout=10s quorum=2 jitter=0.1."""
    return dict(map(_assignment, texts))


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = {"timeout_seconds": "reset_timeout"}.get(name, name)
    if not equals:
        raise typer.BadParameter(f"{text!r} must be FIELD=VALUE; the fields are {', '.join(RULES)}")
    try:
        return name, _typed.policy_value(name, value)
    except PolicyError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from error
