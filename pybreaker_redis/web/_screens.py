"""What the viewers of the board see. It is made once for all who see the same, and only what has changed is sent."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._board import Row
from .._processes import Process, agreed
from .._reader import Board
from . import _pages
from ._pages import Cells, Page, View, page_of, templates

MOST_RENDERED = 5000  # rows whose markup is kept
_serials = itertools.count(1)


class Screen:
    """One page of the board.

    rows: markup by row_id(). around: counts, pages, order and the state of the connection.
    """

    def __init__(self, rows: dict[str, str], around: dict[str, Any], now: float) -> None:
        self.serial = next(_serials)
        self._rows, self._around, self._now = rows, around, now
        self._messages: dict[int, str | None] = {}  # by the serial of the screen that a viewer has

    def since(self, previous: Screen | None) -> str | None:
        """The message for a viewer who has another screen, or none yet; None if both are the same."""
        serial = 0 if previous is None else previous.serial
        if serial not in self._messages:
            self._messages[serial] = self._changes(previous)
        return self._messages[serial]

    def _changes(self, previous: Screen | None) -> str | None:
        has = {} if previous is None else previous._rows
        news = {name: html for name, html in self._rows.items() if has.get(name) != html}
        if previous is not None and not news and self._around == previous._around:
            return None
        return json.dumps({**self._around, "rows": news, "now": self._now})


class _Shown(NamedTuple):
    """A row's markup, and what it shows."""

    row: Row
    root: str
    cells: Cells
    html: str


class Screens:
    """Selects rows and makes screens; keeps those of the latest board."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._board = Board()
        self._selected: dict[View, Sequence[Row]] = {}
        self._screens: dict[tuple[str, View], Screen] = {}
        self._shown: dict[bytes, _Shown] = {}
        self._thresholds: dict[str, int] = {}

    def know(self, processes: list[Process]) -> None:
        """Take the policies that the processes gave to their breakers."""
        thresholds = agreed(processes, "failure_threshold")
        if thresholds != self._thresholds:
            self._thresholds, self._screens = thresholds, {}

    def cells(self, row: Row, now: float) -> Cells:
        """The figures of a row as of now, in unix seconds."""
        return _pages.cells_of(row, now, self._thresholds)

    def rows(self, board: Board, view: View) -> Sequence[Row]:
        """All rows of a view."""
        if self._board is not board:
            self._board, self._selected, self._screens = board, {}, {}
        key = view._replace(page=1)
        if key not in self._selected:
            self._selected[key] = view.rows(board)
        return self._selected[key]

    def page(self, board: Board, view: View) -> Page:
        """The page of a view that is asked for."""
        return page_of(self.rows(board, view), view.page)

    def screen(self, root: str, board: Board, view: View) -> Screen:
        """What a viewer sees. root: the path under which the application is mounted."""
        page, key = self.page(board, view), (root, view)
        screens = self._screens  # know() may replace them from another thread
        if key not in screens:
            rows = {_pages.row_id(row, self._prefix): self._markup(root, row, board.now) for row in page.rows}
            around = {
                "order": list(rows),
                "chips": part("chips.html", root=root, board=board, view=view),
                "pager": part("pager.html", root=root, page=page, view=view),
                "status": part("status.html", board=board, is_gone=False),
            }
            screens[key] = Screen(rows, around, board.now)
        return screens[key]

    def _markup(self, root: str, row: Row, now: float) -> str:
        cells = self.cells(row, now)
        known = self._shown.get(row.key)
        if known is not None and known.row is row and (known.root, known.cells) == (root, cells):
            return known.html
        if len(self._shown) > MOST_RENDERED:
            self._shown.clear()
        html = part("row.html", root=root, row=row, cells=cells, now=now, prefix=self._prefix)
        self._shown[row.key] = _Shown(row, root, cells, html)
        return html


def part(template: str, **content: Any) -> str:
    """A part of a page."""
    return templates().get_template(template).render(**content)
