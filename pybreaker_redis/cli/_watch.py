"""The live board on a terminal, or a line for each change in a pipe."""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import rich.text

from .._board import clean
from .._errors import CircuitBreakerError
from .._protocol import history_entry, keys_of
from .._reader import Board, BoardReader
from ..wire.options import REDIS_ERRORS
from ._fleet import Fleet
from ._output import details, err, out, pairs, put, stamp, transition
from ._screen import HELP_ONE, Screen
from ._table import Known, cut, layout, padded, row_json
from ._terminal import Terminal

REFRESH = 1.0  # seconds after which times count on, whether or not anything has changed
TICK = 0.1  # seconds in which a key or a change is shown
PATIENCE = 1.0  # seconds to wait for what an opened breaker shows
MOST_WAITING = 10_000  # changes that wait to be shown
_HISTORY = 100
_WIDE = 120  # cells from which a line of the history shows counts
NAME_WIDTH = 28  # in the lines of changes, where they may be of any length


class _Watched:
    """The board of the watched breakers, and their changes since the last look.

    names: of the breakers; empty for all.
    """

    def __init__(self, fleet: Fleet, names: Sequence[str]) -> None:
        self.fleet, self.names = fleet, names
        self._keys = {keys_of(name, fleet.prefix).state.encode() for name in names}
        self._messages: collections.deque[tuple[bytes, bytes]] = collections.deque(maxlen=MOST_WAITING)
        self.reader = BoardReader(fleet.client, fleet.prefix, self._hear)

    def _hear(self, channel: bytes, content: bytes) -> None:
        if not self._keys or channel in self._keys:
            self._messages.append((channel, content))

    def changes(self) -> Iterator[dict[str, Any]]:
        """The changes that have not been looked at yet."""
        while self._messages:
            if change := _change(self.fleet, *self._messages.popleft()):
                yield change


def watch(fleet: Fleet, names: Sequence[str], limit: float | None, *, use_json: bool) -> None:
    """Show the board on a terminal, else a line for each change: for `limit` seconds, or until somebody ends it."""
    fleet.ping()
    watched = _Watched(fleet, names)
    until = float("inf") if limit is None else time.monotonic() + limit
    if out.is_terminal and not out.is_dumb_terminal and not use_json:
        with Terminal(out) as terminal:
            _View(watched, terminal).run(until)
    else:
        _print_changes(watched, until, use_json)


# In a pipe


def _print_changes(watched: _Watched, until: float, use_json: bool) -> None:
    board = watched.reader.current()
    _print_rows(watched, board, use_json)
    while time.monotonic() < until:
        sys.stdout.flush()
        before, board = board, watched.reader.changed(board, min(REFRESH, until - time.monotonic()))
        if board.error and board.error != before.error:
            err.print(f"Redis does not answer, trying again: {clean(board.error)}", style="yellow")
        for change in watched.changes():
            if use_json:
                print(json.dumps({"kind": "change", **change}))
            else:
                out.print(change_line(change))


def _print_rows(watched: _Watched, board: Board, use_json: bool) -> None:
    known = Known(board.now, watched.fleet.policy_of)
    rows = Screen(watched.fleet.policy_of, watched.names).of_names(board.rows)
    for name in sorted({*watched.names} - {row.name for row in rows}):
        err.print(f"nothing is stored under {clean(name)} yet", style="yellow")
    if use_json:
        for row in rows:
            print(json.dumps({"kind": "state", **row_json(row, known)}))
        return
    wide = layout(None, (row.name for row in rows), watched.fleet.knows_policies)
    put([wide.heading(), *(wide.line(row, known) for row in rows)])


def _change(fleet: Fleet, channel: bytes, content: bytes) -> dict[str, Any] | None:
    """The change that a message describes. None for a malformed message: anyone can publish."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError):
        change = {"instance": "", **json.loads(content), "breaker": fleet.name_of(channel)}
        change_line(change)
        return change
    return None


def change_line(change: dict[str, Any], width: int | None = None) -> rich.text.Text:
    """A transition or an operator's action on one line. width: of the terminal; None: as long as needed."""
    name, at = clean(str(change["breaker"])), float(change["time_ms"]) / 1000
    shown = padded(name, NAME_WIDTH) if width is None else cut(name, width // 4, middle=True)
    when = stamp(at) if width is None else stamp(at)[11:19]
    text = rich.text.Text(f"{when}  ").append(f"{shown}  ", "bold")
    text.append_text(transition(history_entry(change), brief=width is not None))
    if width is not None:
        text.truncate(width, overflow="ellipsis")
    return text


# On a terminal


class _View:
    """Draws the screen whenever something has changed, and obeys its keys."""

    def __init__(self, watched: _Watched, terminal: Terminal) -> None:
        self._watched, self._terminal = watched, terminal
        self._screen = Screen(watched.fleet.policy_of, watched.names)
        self._changes: collections.deque[dict[str, Any]] = collections.deque(maxlen=_HISTORY)
        self._one = _One(watched.fleet.impatient(PATIENCE))

    def run(self, until: float) -> None:
        reader, screen = self._watched.reader, self._screen
        board = Board()
        size, due = out.size, 0.0
        while not screen.is_over and time.monotonic() < until:
            pressed = self._wait(board)
            found = list(self._watched.changes())
            if pressed or found or reader.board is not board or out.size != size or time.monotonic() >= due:
                board, size, due = reader.board, out.size, time.monotonic() + REFRESH
                self._changes.extend(found)
                screen.look_at(board)
                for key in pressed:
                    screen.press(key, max(size.height - 6, 1))
                self._draw(size.width, size.height)

    def _wait(self, board: Board) -> list[str]:
        """The keys pressed meanwhile."""
        is_known = board.is_read or board.error
        pressed = self._terminal.read(TICK if is_known else 0.0)
        self._watched.reader.changed(board, TICK if pressed is None or not is_known else 0.0)  # unused, it ends
        return pressed or []

    def _draw(self, width: int, height: int) -> None:
        screen = self._screen
        if screen.opened is not None:
            self._terminal.show(self._one.draw(screen, width, height))
            return
        changes = [change_line(change, width) for change in self._changes]
        self._terminal.show(screen.draw(width, height, changes))
        self._watched.reader.in_sight = screen.in_sight(height)


class _One:
    """One breaker on the whole screen: everything that Redis knows, and its last transitions."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lines: list[rich.text.Text] = []
        self._read: tuple[bytes, float] = b"", 0.0

    def draw(self, screen: Screen, width: int, height: int) -> list[rich.text.Text]:
        row = screen.opened
        assert row is not None
        key, at = self._read
        if key != row.key or time.monotonic() - at >= REFRESH:
            with contextlib.suppress(*REDIS_ERRORS, CircuitBreakerError):
                self._lines = self._told(row.key, row.name, width)
            self._read = row.key, time.monotonic()
        head = [rich.text.Text(cut(clean(row.name), width, middle=True), "bold"), *screen.trouble(width)]
        room = max(height - len(head) - 2, 1)
        screen.scrolled = min(screen.scrolled, max(len(self._lines) - room, 0))
        told = self._lines[screen.scrolled : screen.scrolled + room]
        lines = [line.copy() for line in (*head, rich.text.Text(""), *told)]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        lines += [rich.text.Text("")] * (height - 1 - len(lines))
        return [*lines, rich.text.Text(cut(HELP_ONE, width), "dim")][:height]

    def _told(self, key: bytes, name: str, width: int) -> list[rich.text.Text]:
        lines = pairs(details(self._fleet.read_key(key), self._fleet.policy_of(name)), width)
        entries = self._fleet.history(key, _HISTORY)
        brief = width < _WIDE
        return [*lines, rich.text.Text(""), *(transition(entry, stamped=True, brief=brief) for entry in entries)]
