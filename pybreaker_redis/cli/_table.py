"""The lines of `list` and `watch`: one for each breaker, as wide as the terminal; state, until and why always fit."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.text
from rich.cells import cell_len

from .._board import CONDITIONS, GROUPS, Row, clean, next_step, span, why
from .._policy import Policy
from .._window import Sums

STYLES: dict[str, str] = {
    "open": "bold red",
    "half_open": "yellow",
    "held": "red",
    "forced_open": "bold magenta",
    "forced_closed": "bold magenta",
    "unreadable": "yellow",
    "closed": "green",
}
LONGEST_NAME = 50  # where lines may be of any length; longer names move what comes after them
GAP = "  "
_LEAST = 40  # cells of name and reason together, before a column of lesser use is shown
_WITH_ERROR = 30  # cells of a reason, before the error is shown, too


class Known(NamedTuple):
    """What is known besides the rows. now: the server's clock in unix seconds. policy_of: None where it is unknown."""

    now: float
    policy_of: Callable[[str], Policy | None]


class Seen(NamedTuple):
    """One row at one time. sums: of its window. policy: of its clients, or None where that is unknown."""

    row: Row
    now: float
    sums: Sums
    policy: Policy | None


def seen(row: Row, known: Known) -> Seen:
    """The row with what is known of it now."""
    return Seen(row, known.now, row.sums(known.now), known.policy_of(row.name))


class Column(NamedTuple):
    """A column. width: in cells, 0 for what the others leave."""

    title: str
    width: int
    right: bool
    content: Callable[[Seen], str]


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Columns with their widths. wide: lines may have any length, as in a pipe."""

    columns: Sequence[tuple[Column, int]]
    wide: bool = False

    def heading(self) -> rich.text.Text:
        """The line above those of the breakers."""
        return self._line([column.title for column, _ in self.columns], "bold")

    def line(self, row: Row, known: Known) -> rich.text.Text:
        """One breaker on one line."""
        one = seen(row, known)
        text = self._line([column.content(one) for column, _ in self.columns])
        if row.condition != "closed":
            start = sum(width + len(GAP) for column, width in self.columns[:1])
            if self.wide:
                start = max(start, cells(clean(row.name)) + len(GAP))
            text.stylize(STYLES[row.condition], start, start + len(CONDITIONS[row.condition]))
        return text

    def _line(self, cells: Iterable[str], style: str = "") -> rich.text.Text:
        parts = [
            padded(cell if self.wide else cut(cell, width, middle=column is NAME), width, right=column.right)
            for cell, (column, width) in zip(cells, self.columns, strict=True)
        ]
        return rich.text.Text(GAP.join(parts).rstrip(), style, end="")


def _until(one: Seen) -> str:
    until = one.row.until
    if until is None or next_step(one.row) is None:
        return "-"
    return span(until - one.now) if until > one.now else "due"


def _since(one: Seen) -> str:
    return "-" if one.row.since is None else span(max(one.now - one.row.since, 0.0))


def _share(count: int, calls: int) -> str:
    return f"{100 * count / calls:.0f}%" if calls else "-"


def _health(one: Seen) -> str:
    return "-" if one.policy is None else str(one.row.health(one.now, one.policy._to_request()))


def reason_of(row: Row) -> str:
    """Why the breaker is as it is, and what else is unusual about it."""
    probes = f"{row.probes} probe{'s' if row.probes > 1 else ''} running" if row.probes else ""
    trips = f"{row.trips} trips in a row" if row.trips > 1 and row.condition != "closed" else ""
    parts = ["shadow mode" if row.shadow else "", probes, why(row), trips, override_of(row)]
    return clean(", ".join(filter(None, parts)))


def override_of(row: Row) -> str:
    """That there is a policy override, and who set it; empty without one."""
    if not row.override:
        return ""
    by = f" by {row.override_operator}" if row.override_operator else ""
    return f"policy override{by}{f': {row.override_note}' if row.override_note else ''}"


NAME = Column("NAME", 0, False, lambda one: clean(one.row.name))
WHY = Column("WHY", 0, False, lambda one: reason_of(one.row))
_SHORT_WHY = Column("WHY", 0, False, lambda one: reason_of(dataclasses.replace(one.row, error=None)))
_NEEDED = (
    Column("STATE", 13, False, lambda one: CONDITIONS[one.row.condition]),
    Column("UNTIL", 5, True, _until),
)
_MORE = (
    Column("SINCE", 5, True, _since),
    Column("RUN", 5, True, lambda one: str(one.row.failures)),
    Column("CALLS", 6, True, lambda one: str(one.sums.calls or "-")),
    Column("FAILED", 6, True, lambda one: _share(one.sums.failures, one.sums.calls)),
    Column("SLOW", 5, True, lambda one: _share(one.sums.slow, one.sums.calls)),
)
_HEALTH = Column("HEALTH", 6, True, _health)


def layout(width: int | None, names: Iterable[str], with_health: bool) -> Layout:
    """The columns that fit.

    width: of the terminal in cells; None where lines may have any length. with_health: whether the policies are known
    by which it is judged.
    """
    more = (*_MORE, _HEALTH) if with_health else _MORE
    longest = max((cells(clean(name)) for name in names), default=0)
    if width is None:
        fixed = [(column, column.width) for column in (*_NEEDED, *more)]
        return Layout([(NAME, min(max(longest, len(NAME.title)), LONGEST_NAME)), *fixed, (WHY, 0)], wide=True)
    left = width - len(GAP) - sum(column.width + len(GAP) for column in _NEEDED)
    chosen = list(_NEEDED)
    for column in more:
        if left - column.width - len(GAP) < _LEAST:
            break
        left -= column.width + len(GAP)
        chosen.append(column)
    for_name = max(min(longest, left // 2), min(len(NAME.title), left))
    fixed = [(column, column.width) for column in chosen]
    for_why = max(left - for_name, 0)
    return Layout([(NAME, for_name), *fixed, (WHY if for_why >= _WITH_ERROR else _SHORT_WHY, for_why)])


def summary(counts: Mapping[str, int], total: int, width: int) -> list[str]:
    """How many breakers there are in each group, in as many lines as the width needs."""
    parts = [f"{number} {GROUPS[group]}".replace(" ", "\xa0") for group, number in counts.items() if number]
    text = f"{total}\xa0breaker{'' if total == 1 else 's'}{': ' if parts else ''}{', '.join(parts)}"
    return [line.replace("\xa0", " ") for line in textwrap.wrap(text, max(width, 1))]


def row_json(row: Row, known: Known) -> dict[str, Any]:
    """One breaker for a program. Times in unix seconds, durations of the policy override in milliseconds."""
    one = seen(row, known)
    calls, failures, slow = one.sums
    health = {} if one.policy is None else {"health": row.health(one.now, one.policy._to_request())}
    fields = ("name", "state", "condition", "until", "since", "reason", "error", "operator", "note")
    more = ("override", "override_until", "override_operator", "override_note")
    return {
        **{field: getattr(row, field) for field in fields},
        "failure_count": row.failures,
        "probes_in_flight": row.probes,
        "trips": row.recent_trips(one.now),
        **{"calls": calls, "failures": failures, "slow": slow},
        "failure_rate": failures / calls if calls else None,
        "slow_rate": slow / calls if calls else None,
        **{field: getattr(row, field) for field in more},
        **health,
    }


# Cells of a terminal


def cells(text: str) -> int:
    """How many cells of a terminal the text takes."""
    return len(text) if text.isascii() else cell_len(text)


def cut(text: str, width: int, *, middle: bool = False) -> str:
    """The text in at most so many cells. What is too long loses its end, or its middle."""
    if cells(text) <= width:
        return text
    if width < 2:
        return "" if width < 1 else "…"
    tail = (width - 1) // 2 if middle else 0
    return f"{_fitting(text, width - 1 - tail)}…{_fitting(text[::-1], tail)[::-1]}"


def _fitting(text: str, width: int) -> str:
    """The longest beginning of the text that fits into so many cells."""
    for number, letter in enumerate(text):
        width -= cells(letter)
        if width < 0:
            return text[:number]
    return text


def padded(text: str, width: int, *, right: bool = False) -> str:
    """The text with spaces up to so many cells. right: before it."""
    spaces = " " * (width - cells(text))
    return spaces + text if right else text + spaces
