"""What `watch` shows on a terminal, and what its keys do. Draws lines of text; reads neither Redis nor the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import rich.text

from .._board import GROUPS, Row, clean, counts, select, urgency
from .._policy import Policy
from .._reader import Board
from ._table import Known, Layout, cut, layout, summary

HELP = "q quit  ↑↓ move  ⏎ open  s sort  f filter  / search"
HELP_SEARCH = "type a part of the name  ⏎ done  esc clear"
HELP_ONE = "q quit  esc back  ↑↓ next breaker  space scroll"
_MARK, _NO_MARK = "> ", "  "

SORTS: dict[str, Callable[[Row, Known], Any]] = {
    "urgency": lambda row, _: urgency(row),
    "name": lambda row, _: row.name,
    "failures in a row": lambda row, _: (-row.failures, urgency(row)),
    "failure rate": lambda row, known: (-_failure_rate(row, known.now), urgency(row)),
    "last change": lambda row, _: (-(row.since or 0.0), row.name),
}


def _failure_rate(row: Row, now: float) -> float:
    found = row.sums(now)
    return found.failures / found.calls if found.calls else 0.0


class Screen:
    """The board as somebody looks at it: order, filter, search, the chosen row, and whether that is opened.

    policy_of: as in Known. names: the breakers to show; empty for all.
    opened: the row whose breaker is shown alone, or None. scrolled: how many of its lines are above the screen.
    is_over: whether somebody has asked to quit.
    """

    def __init__(self, policy_of: Callable[[str], Policy | None], names: Sequence[str] = ()) -> None:
        self._policy_of, self._names = policy_of, frozenset(names)
        self._sort, self._group, self._search = next(iter(SORTS)), "", ""
        self._is_typing = False
        self._top, self._at = 0, 0
        self._chosen: bytes | None = None  # stays chosen wherever it moves to; None: whatever is the first row
        self._rows: list[Row] = []
        self._board = Board()
        self.opened: Row | None = None
        self.scrolled = 0
        self.is_over = False

    def look_at(self, board: Board) -> None:
        """Show this board from now on."""
        self._board = board
        rows = select(self.of_names(board.rows), self._group or None, self._search)
        known = self._known()
        if self._sort != "urgency":  # the order of the board itself
            rows.sort(key=lambda row: SORTS[self._sort](row, known))
        self._rows = rows
        places = {row.key: number for number, row in enumerate(rows)}
        self._at = 0 if self._chosen is None else places.get(self._chosen, min(self._at, max(len(rows) - 1, 0)))
        if self.opened is not None:
            self.opened = board.by_key.get(self.opened.key, self.opened)

    def of_names(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that this screen is about."""
        return [row for row in rows if not self._names or row.name in self._names]

    def in_sight(self, height: int) -> list[bytes]:
        """The keys of the rows that a screen of this height shows."""
        return [row.key for row in self._rows[self._top : self._top + height]]

    def _known(self) -> Known:
        return Known(self._board.now, self._policy_of)

    # Keys

    def press(self, key: str, page: int) -> None:
        """Obey a key: a character, or the name of a special one. page: rows that PgUp and PgDn move by."""
        if self._is_typing:
            self._type(key)
        elif key in ("q", "Q"):
            self.is_over = True
        elif self.opened is not None and key in _BACK:
            self.opened = None
        elif self.opened is not None and key in _PAGES:
            self.scrolled = max(self.scrolled + _MOVES[key](page, 0), 0)
        elif key in _MOVES:
            self._move(_MOVES[key](page, len(self._rows)))
        elif self.opened is None:
            self._press_on_board(key)
        self.look_at(self._board)

    def _press_on_board(self, key: str) -> None:
        if key in ("enter", "right", "l") and self._rows:
            self._open(self._rows[self._at])
        elif key in ("s", "S"):
            self._sort = _next(list(SORTS), self._sort, -1 if key == "S" else 1)
        elif key in ("f", "F"):
            found = counts(self.of_names(self._board.rows))
            groups = ["", *(group for group in GROUPS if found[group] or group == self._group)]
            self._group = _next(groups, self._group, -1 if key == "F" else 1)
        elif key == "/":
            self._is_typing = True
        elif key == "escape":
            self._group = self._search = ""

    def _type(self, key: str) -> None:
        if key in ("enter", "escape"):
            self._is_typing = False
            self._search = "" if key == "escape" else self._search
        elif key == "backspace":
            self._search = self._search[:-1]
        elif len(key) == 1 and key.isprintable():
            self._search += key

    def _move(self, by: int) -> None:
        if self._rows:
            self._at = min(max(self._at + by, 0), len(self._rows) - 1)
            self._chosen = self._rows[self._at].key if self._at else None
            if self.opened is not None:
                self._open(self._rows[self._at])

    def _open(self, row: Row) -> None:
        self.opened, self._chosen, self.scrolled = row, row.key, 0

    # Drawing

    def draw(self, width: int, height: int, changes: Sequence[rich.text.Text]) -> list[rich.text.Text]:
        """The lines of the board, at most `height` of at most `width` cells. changes: the last ones, oldest first."""
        head = self._head(width)
        last = list(changes)[-max((height - 12) // 4, 0) :] if height > 15 else []
        room = max(height - len(head) - 2 - (len(last) + 1 if last else 0), 1)
        self._top = min(max(self._top, self._at - room + 1), self._at, max(len(self._rows) - room, 0))
        names = [row.name for row in self._rows]
        fits = layout(width - len(_MARK), names, any(self._policy_of(name) is not None for name in names[:1]))
        shown = [self._row(fits, number) for number in range(self._top, min(self._top + room, len(names)))]
        rows = [_indented(fits.heading(), _NO_MARK), *shown]
        rows += [rich.text.Text("")] * (room + 1 - len(rows))
        below = [rich.text.Text(""), *last] if last else []
        footer = rich.text.Text(cut(HELP_SEARCH if self._is_typing else HELP, width), "dim")
        return [*head, *rows, *below, footer][:height]

    def _head(self, width: int) -> list[rich.text.Text]:
        rows = self.of_names(self._board.rows)
        lines = [rich.text.Text(cut(line, width), "bold") for line in summary(counts(rows), len(rows), width)]
        parts = [f"{self._at + 1 if self._rows else 0} of {len(self._rows)}", f"by {self._sort}"]
        parts.append(GROUPS.get(self._group, ""))
        if self._search or self._is_typing:
            parts.append(f"/{clean(self._search)}{'_' if self._is_typing else ''}")
        if missing := self._names - {row.name for row in rows}:
            parts.append(f"nothing is stored under {', '.join(sorted(map(clean, missing)))}")
        lines.append(rich.text.Text(cut("  ".join(filter(None, parts)), width), "dim"))
        return [*lines, *self.trouble(width)]

    def trouble(self, width: int) -> list[rich.text.Text]:
        """A line if the board is not up to date, with the reason."""
        if self._board.error:
            text = f"Redis does not answer, trying again: {clean(self._board.error)}"
            return [rich.text.Text(cut(text, width), "bold red")]
        if self._board.is_read and not self._board.live:
            text = "no right to subscribe: the board is read every few seconds"
            return [rich.text.Text(cut(text, width), "yellow")]
        return []

    def _row(self, fits: Layout, number: int) -> rich.text.Text:
        chosen = number == self._at
        line = _indented(fits.line(self._rows[number], self._known()), _MARK if chosen else _NO_MARK)
        if chosen:
            line.stylize("reverse")
        return line


_BACK = {"escape", "left", "backspace", "h"}
_PAGES = {"page up", "page down", " "}
_MOVES: dict[str, Callable[[int, int], int]] = {
    "up": lambda page, total: -1,
    "k": lambda page, total: -1,
    "down": lambda page, total: 1,
    "j": lambda page, total: 1,
    "page up": lambda page, total: -page,
    "page down": lambda page, total: page,
    " ": lambda page, total: page,
    "home": lambda page, total: -total,
    "g": lambda page, total: -total,
    "end": lambda page, total: total,
    "G": lambda page, total: total,
}


def _next(among: Sequence[str], now: str, step: int) -> str:
    return among[(among.index(now) + step) % len(among)]


def _indented(line: rich.text.Text, by: str) -> rich.text.Text:
    return rich.text.Text(by, end="").append_text(line)
