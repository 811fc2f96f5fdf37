"""The live table: a notification says which breaker to read again; every second all breakers shown are read anyway."""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console
import rich.live
import rich.text

from .._protocol import history_entry
from ..wire.options import REDIS_ERRORS
from ._fleet import Fleet, Reading, urgency
from ._output import NAME_WIDTH, as_json, clean, heading, line, out, put, stamp, table, transition

REFRESH = 1.0  # seconds
_CHANGES_SHOWN = 6


class Board:
    """The breakers as last read, and the last changes.

    names: the breakers to show, () for all. error: why Redis cannot be read just now, else None.
    """

    def __init__(self, fleet: Fleet, names: Sequence[str]) -> None:
        self.fleet, self.names = fleet, tuple(names)
        self.readings: dict[str, Reading] = {}
        self.changes: collections.deque[rich.text.Text] = collections.deque(maxlen=_CHANGES_SHOWN)
        self.error: str | None = None

    def read_all(self) -> None:
        """Read every breaker: at the start, and after a lost subscription."""
        chunks = [self.fleet.read(self.names)] if self.names else self.fleet.read_all()
        self.readings = {reading.snapshot.name: reading for chunk in chunks for reading in chunk}

    def read(self, names: Sequence[str]) -> None:
        """Read these breakers, and drop those that have expired."""
        for reading in self.fleet.read(names):
            if reading.stored or self.names:
                self.readings[reading.snapshot.name] = reading
            else:
                self.readings.pop(reading.snapshot.name, None)

    def most_urgent(self, count: int) -> list[Reading]:
        """So many breakers: open and half-open ones first, then the latest change first."""
        return sorted(self.readings.values(), key=urgency)[:count]


def watch(fleet: Fleet, names: Sequence[str], limit: float | None, *, use_json: bool) -> None:
    """Show a live table on a terminal, else a line for each change, for `limit` seconds or until Ctrl-C."""
    board = Board(fleet, names)
    live = out.is_terminal and not use_json
    until = None if limit is None else time.monotonic() + limit
    with _screen(board) if live else contextlib.nullcontext(_Lines(use_json)) as screen:
        for changes in _changes(board, until):
            screen.show(board, changes)


class _Lines:
    """Output for a pipe: the breakers once, then each change as it happens."""

    def __init__(self, use_json: bool) -> None:
        self._json = use_json
        self._begun = False

    def show(self, board: Board, changes: list[dict[str, Any]]) -> None:
        if not self._begun:
            self._begun = True
            self._begin(board)
        for change in changes:
            self._put(change)
        sys.stdout.flush()

    def _begin(self, board: Board) -> None:
        readings = board.most_urgent(len(board.readings))
        if self._json:
            for reading in readings:
                print(json.dumps({"kind": "state", **as_json(reading, brief=True)}))
            return
        put([heading(), *map(line, readings)])

    def _put(self, change: dict[str, Any]) -> None:
        if self._json:
            print(json.dumps({"kind": "change", **change}))
        else:
            out.print(change_line(change))


class _Table:
    """Output for a terminal."""

    def __init__(self, live: rich.live.Live) -> None:
        self._live = live

    def show(self, board: Board, changes: list[dict[str, Any]]) -> None:
        board.changes.extend(map(change_line, changes))
        room = max(out.size.height - _CHANGES_SHOWN - 6, 3)
        with contextlib.suppress(*REDIS_ERRORS):
            board.read([reading.snapshot.name for reading in board.most_urgent(room)])
        shown = board.most_urgent(room)
        states = collections.Counter(reading.snapshot.state for reading in board.readings.values())
        counts = ", ".join(f"{states[state]} {state}" for state in ("open", "half_open", "closed"))
        title = f"{board.fleet.prefix}: {counts}" + (f" - {board.error}" if board.error else "") + "\n"
        hidden = len(board.readings) - len(shown)
        below = [rich.text.Text(f"and {hidden} more" if hidden else ""), rich.text.Text(""), *board.changes]
        self._live.update(rich.console.Group(table(shown, title), *below), refresh=True)


@contextlib.contextmanager
def _screen(board: Board) -> Iterator[_Table]:
    with rich.live.Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        yield _Table(live)


def _changes(board: Board, until: float | None) -> Iterator[list[dict[str, Any]]]:
    """The new changes, as soon as there are any; an empty list after a second without. Survives a lost server."""
    answered = False
    while until is None or time.monotonic() < until:
        try:
            with board.fleet.subscribed(board.names) as receive:
                board.read_all()
                board.error, answered = None, True
                yield []
                while until is None or time.monotonic() < until:
                    yield _next(board, receive, until)
        except REDIS_ERRORS as error:
            if not answered:
                raise
            board.error = f"Redis does not answer: {error}"
            yield []
            time.sleep(REFRESH)


def _next(
    board: Board, receive: Callable[[float], tuple[bytes, bytes] | None], until: float | None
) -> list[dict[str, Any]]:
    wait = REFRESH if until is None else min(REFRESH, max(until - time.monotonic(), 0.0))
    changes = []
    message = receive(wait)
    while message is not None:
        if change := _change(board, *message):
            changes.append(change)
        message = receive(0.0)
    board.read(list(dict.fromkeys(change["breaker"] for change in changes)))
    return changes


def _change(board: Board, channel: bytes, content: bytes) -> dict[str, Any] | None:
    """The change that a message describes. None for a malformed message: anyone can publish."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        change = {"instance": "", **json.loads(content), "breaker": board.fleet.name_of(channel)}
        change_line(change)
        return change
    return None


def change_line(change: dict[str, Any]) -> rich.text.Text:
    """A transition, or a change of the policy override, on one line."""
    name = str(change["breaker"])
    if "policy" not in change:
        return transition(history_entry(change), name)
    text = rich.text.Text(f"{stamp(float(change['time_ms']) / 1000)}  ")
    text.append(f"{clean(name):<{NAME_WIDTH}}  ", "bold")
    return text.append(f"{clean(str(change['policy']))} by {clean(str(change['instance']))}")
