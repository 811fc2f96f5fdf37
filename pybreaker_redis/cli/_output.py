"""How the program shows breakers: lines for people, the same lines without colours in a pipe, JSON for programs."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text
import typer

from .._policy import RULES
from .._protocol import HistoryEntry, Snapshot
from ._fleet import Reading

STYLES = {"closed": "green", "open": "bold red", "half_open": "yellow"}
NAME_WIDTH = 28
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ONLY_IN_FULL = ("policy", "policy_sources", "reporters", "isolated", "source")


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Raise the error; Rich would exit with code 1."""
        raise BrokenPipeError


out = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=True)


def put(lines: Sequence[rich.text.Text]) -> None:
    """Print many lines at once. A pipe does without Rich, which needs more time for them than Redis."""
    if out.is_terminal:
        out.print(rich.text.Text("\n").join(lines))
    else:
        print(*[text.plain for text in lines], sep="\n")


def put_json(value: object) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(value, indent=2))


def clean(text: str) -> str:
    """A stored text with its control characters escaped: they could steer the terminal."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


# Lines of the list

_Cell = tuple[str, str]  # text, style


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def _ago(at: float | None) -> str:
    return "-" if at is None else f"{span(max(time.time() - at, 0.0))} ago"


def span(seconds: float) -> str:
    """A length of time for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _note(reading: Reading) -> str:
    seen, notes = reading.snapshot, []
    if seen.forced:
        left = max((seen.forced_until or 0.0) - time.time(), 0.0)
        notes.append(f"forced {seen.forced} for {span(left)}")
    elif seen.state == "open":
        notes.append(f"probe in {span(reading.retry_after)}" if reading.retry_after else "probe is due")
    if seen.probes_in_flight:
        notes.append(f"{seen.probes_in_flight} of {seen.policy.half_open_max_calls} probes")
    if seen.trips > 1:
        notes.append(f"{seen.trips} trips in a row")
    if "override" in seen.policy_sources.values():
        notes.append("policy override")
    return ", ".join(notes)


# heading, width (0: the rest of the line), whether it is a number, content
_COLUMNS: tuple[tuple[str, int, bool, Callable[[Reading], _Cell]], ...] = (
    ("NAME", NAME_WIDTH, False, lambda reading: (clean(reading.snapshot.name), "")),
    ("STATE", 9, False, lambda reading: (reading.snapshot.state, STYLES[reading.snapshot.state])),
    ("RUN", 5, True, lambda reading: (str(reading.snapshot.failure_count), "")),
    ("CALLS", 6, True, lambda reading: (str(reading.snapshot.calls or "-"), "")),
    ("FAILED", 6, True, lambda reading: (_percent(reading.snapshot.failure_rate), "")),
    ("SLOW", 5, True, lambda reading: (_percent(reading.snapshot.slow_rate), "")),
    ("HEALTH", 6, True, lambda reading: (str(reading.snapshot.health), _health_style(reading.snapshot.health))),
    ("CHANGED", 10, True, lambda reading: (_ago(reading.last_change), "")),
    ("", 0, False, lambda reading: (_note(reading), "dim")),
)


def _health_style(health: int) -> str:
    return "green" if health >= 75 else "yellow" if health >= 25 else "red"


def heading() -> rich.text.Text:
    """The line above those of the breakers."""
    return _line([(title, "bold") for title, *_ in _COLUMNS])


def line(reading: Reading) -> rich.text.Text:
    """One breaker on one line."""
    return _line([content(reading) for *_, content in _COLUMNS])


def _line(cells: Iterable[_Cell]) -> rich.text.Text:
    text = rich.text.Text(end="")
    for (_, width, number, _content), (content, style) in zip(_COLUMNS, cells, strict=True):
        if width:
            content = f"{content:>{width}}" if number else f"{content:<{width}}"
        text.append(content, style).append("  ")
    text.rstrip()
    return text


def table(readings: Iterable[Reading], title: str) -> rich.table.Table:
    """The same lines as a table that a terminal redraws in place."""
    made = rich.table.Table(box=None, title=title, title_justify="left", title_style="", pad_edge=False)
    for name, width, number, _ in _COLUMNS:
        made.add_column(name, justify="right" if number else "left", no_wrap=True, overflow="ellipsis", min_width=width)
    for reading in readings:
        made.add_row(*[rich.text.Text(*content(reading)) for *_, content in _COLUMNS])
    return made


def as_json(reading: Reading, *, brief: bool = False) -> dict[str, Any]:
    """One breaker for a program. brief: only the fields that belong in a list."""
    fields = dataclasses.asdict(reading.snapshot)
    for name in _ONLY_IN_FULL if brief else ():
        del fields[name]
    return {**fields, "last_change": reading.last_change, "stored": reading.stored}


def details(reading: Reading) -> Iterable[tuple[str, str]]:
    """Everything about one breaker, as label and text."""
    seen = reading.snapshot
    yield "state", seen.state + ("" if reading.stored else " (nothing is stored under this name)")
    yield "since", "-" if reading.last_change is None else f"{stamp(reading.last_change)} ({_ago(reading.last_change)})"
    if seen.reason:
        yield "reason", clean(seen.reason)
    if seen.error:
        yield "error", clean(seen.error)
    yield "health", f"{seen.health} of 100"
    if note := _note(reading):
        yield "now", note
    yield "failures in a row", _of(seen, seen.failure_count, "failure_threshold")
    yield "probe successes", _of(seen, seen.success_count, "success_threshold")
    yield "last failure", "-" if seen.last_failure_time is None else stamp(seen.last_failure_time)
    yield "calls in the window", f"{seen.calls}, failed {seen.failures}, slow {seen.slow}"
    yield "trips in a row", str(seen.trips)
    yield "generation", str(seen.generation)
    for host, at in seen.reporters.items():
        yield "host with a failure", f"{clean(host)} at {stamp(at)}"


def _of(seen: Snapshot, count: int, threshold: str) -> str:
    known = seen.policy_sources[threshold] != "default"  # without --config only policy overrides are known
    return f"{count} of {getattr(seen.policy, threshold)}" if known else str(count)


def stamp(at: float) -> str:
    """Unix seconds as local time."""
    return datetime.datetime.fromtimestamp(at).isoformat(sep=" ", timespec="milliseconds")


def transition(entry: HistoryEntry, name: str = "") -> rich.text.Text:
    """One transition on one line. name: of the breaker, where several are shown."""
    text = rich.text.Text(f"{stamp(entry.time)}  ").append(f"{clean(name):<{NAME_WIDTH}}  " if name else "", "bold")
    text.append(f"{entry.old:>9}", STYLES[entry.old]).append(" -> ").append(f"{entry.new:<9}", STYLES[entry.new])
    counts = f"{entry.failure_count} in a row"
    if entry.calls is not None:
        counts += f", {entry.failures} of {entry.calls} failed, {entry.slow} slow"
    text.append(f"  {clean(entry.reason):<18}  {counts}  by {clean(entry.instance) or '?'}")
    return text.append(f"  {clean(entry.error)}") if entry.error else text


# Arguments


def seconds(text: str) -> float:
    """A length of time as typed: 30, 0.5, 250ms, 10m, 2h, 1d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a length of time; write 30, 0.5, 250ms, 10m, 2h or 1d")
    return round(float(found[1]) * _UNITS[found[2]], 3)


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Policy fields as typed: failure_threshold=20 reset_timeout=10s quorum=2 jitter=0.1."""
    return dict(map(_assignment, texts))


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = {"timeout_seconds": "reset_timeout"}.get(name, name)
    if not equals or name not in RULES:
        raise typer.BadParameter(f"{text!r} must be FIELD=VALUE; the fields are {', '.join(RULES)}")
    words = {"none": None, "off": None, "true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    kind = RULES[name].kind
    try:
        return name, seconds(value) if kind == "seconds" else int(value) if kind == "count" else float(value)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from error
