"""The live table: notifications say what to read again, at once; once a second what is shown is read anyway."""

from __future__ import annotations

import collections
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import rich.console
import rich.live
import rich.text

from .._protocol import history_entry, keys_of
from .._scripts import REDIS_ERRORS
from ._fleet import Fleet, Row, urgency
from ._output import NAME_WIDTH, as_json, clean, heading, line, out, put, stamp, table, told

REFRESH = 1.0
_NEWS = 6


class Board:
    """What is known of the breakers, and the last transitions. names: those to show, () for all."""

    def __init__(self, fleet: Fleet, names: Sequence[str]) -> None:
        self.fleet, self.names = fleet, tuple(names)
        self.rows: dict[str, Row] = {}
        self.news: collections.deque[rich.text.Text] = collections.deque(maxlen=_NEWS)
        self.lost: str | None = None

    def read_all(self) -> None:
        """Everything again: at the start, and after a subscription was lost."""
        chunks = [self.fleet.read(self.names)] if self.names else self.fleet.rows()
        self.rows = {row.snapshot.name: row for chunk in chunks for row in chunk}

    def read(self, names: Sequence[str]) -> None:
        """These again; what has gone is forgotten."""
        for row in self.fleet.read(names):
            if row.stored or self.names:
                self.rows[row.snapshot.name] = row
            else:
                self.rows.pop(row.snapshot.name, None)

    def shown(self, most: int) -> list[Row]:
        """What is not closed first, then what changed last."""
        return sorted(self.rows.values(), key=urgency)[:most]


def watch(fleet: Fleet, names: Sequence[str], limit: float | None, *, use_json: bool) -> None:
    """Show until Ctrl-C, or for `limit` seconds: a live table on a terminal, else a line for each transition."""
    board = Board(fleet, names)
    live = out.is_terminal and not use_json
    until = None if limit is None else time.monotonic() + limit
    with _screen(board) if live else contextlib.nullcontext(_Lines(use_json)) as screen:
        for heard in _messages(board, until):
            screen.show(board, heard)


class _Lines:
    """Where there is no terminal: the breakers once, then each transition as it comes."""

    def __init__(self, use_json: bool) -> None:
        self._json = use_json
        self._begun = False

    def show(self, board: Board, heard: list[dict[str, Any]]) -> None:
        if not self._begun:
            self._begun = True
            self._begin(board)
        for message in heard:
            self._tell(message)
        sys.stdout.flush()

    def _begin(self, board: Board) -> None:
        rows = board.shown(len(board.rows))
        if self._json:
            for row in rows:
                print(json.dumps({"kind": "state", **as_json(row, brief=True)}))
            return
        put([heading(), *map(line, rows)])

    def _tell(self, message: dict[str, Any]) -> None:
        if self._json:
            print(json.dumps({"kind": "change", **message}))
        else:
            out.print(news(message))


class _Table:
    def __init__(self, live: rich.live.Live) -> None:
        self._live = live

    def show(self, board: Board, heard: list[dict[str, Any]]) -> None:
        board.news.extend(map(news, heard))
        room = max(out.size.height - _NEWS - 6, 3)
        rows = board.shown(room)
        with contextlib.suppress(*REDIS_ERRORS):
            board.read([row.snapshot.name for row in rows])
        rows = board.shown(room)
        states = collections.Counter(row.snapshot.state for row in board.rows.values())
        counts = ", ".join(f"{states[state]} {state}" for state in ("open", "half_open", "closed"))
        title = f"{board.fleet.prefix}: {counts}" + (f" - {board.lost}" if board.lost else "") + "\n"
        hidden = len(board.rows) - len(rows)
        below = [rich.text.Text(f"and {hidden} more" if hidden else ""), rich.text.Text(""), *board.news]
        self._live.update(rich.console.Group(table(rows, title), *below), refresh=True)


@contextlib.contextmanager
def _screen(board: Board) -> Iterator[_Table]:
    with rich.live.Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        yield _Table(live)


def _messages(board: Board, until: float | None) -> Iterator[list[dict[str, Any]]]:
    """The transitions of each turn: as soon as there are some, else none once a second. Survives a lost server."""
    answered = False
    while until is None or time.monotonic() < until:
        try:
            with _subscription(board) as subscription:
                board.read_all()
                board.lost, answered = None, True
                yield []
                while until is None or time.monotonic() < until:
                    yield _next(board, subscription, until)
        except REDIS_ERRORS as error:
            if not answered:
                raise
            board.lost = f"Redis does not answer: {error}"
            yield []
            time.sleep(REFRESH)


def _next(board: Board, subscription: Any, until: float | None) -> list[dict[str, Any]]:
    wait = REFRESH if until is None else min(REFRESH, max(until - time.monotonic(), 0.0))
    heard = []
    message = subscription.get_message(timeout=wait)
    while message is not None:
        if content := _content(board, message):
            heard.append(content)
        message = subscription.get_message()
    board.read(list(dict.fromkeys(content["breaker"] for content in heard)))
    return heard


@contextlib.contextmanager
def _subscription(board: Board) -> Iterator[Any]:
    with board.fleet.client.pubsub(ignore_subscribe_messages=True) as subscription:
        if board.names:
            subscription.subscribe(*[keys_of(name, board.fleet.prefix).state for name in board.names])
        else:
            subscription.psubscribe(board.fleet.pattern())
        yield subscription


def _content(board: Board, message: dict[str, Any]) -> dict[str, Any] | None:
    """A message that makes sense; anybody may publish anything."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        content = {"instance": "", **json.loads(message["data"]), "breaker": board.fleet.name_of(message["channel"])}
        news(content)
        return content
    return None


def news(message: dict[str, Any]) -> rich.text.Text:
    """A message as a line."""
    name = str(message["breaker"])
    if "policy" not in message:
        return told(history_entry(message), name)
    text = rich.text.Text(f"{stamp(float(message['time_ms']) / 1000)}  ")
    text.append(f"{clean(name):<{NAME_WIDTH}}  ", "bold")
    return text.append(f"{clean(str(message['policy']))} by {clean(str(message['instance']))}")
