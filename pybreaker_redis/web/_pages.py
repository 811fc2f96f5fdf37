"""What the pages show: rows, the timeline, the window, the policy. The templates only mark it up."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.resources
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import jinja2

from .._board import CONDITIONS, GROUPS, REASONS, Condition, Row, clean, next_step, outlook, select, span, why
from .._errors import PolicyError
from .._policy import DEFAULTS, RULES, plain
from .._processes import Known, Process, given_policies, known_fields
from .._protocol import POLICY_ACTIONS, HistoryEntry, Keys, Snapshot, keys_of, requests_by_hand
from .._reader import Board
from ..wire.scripts import sha1
from ._actions import ACTIONS, POLICY_FIELD, UNITS

ROWS = 50  # on one page
TIMELINE = 40  # transitions in the picture, at most
WIDTH = 1000.0  # of a picture, in its own units
NARROWEST = 4.0  # so that a short state can be seen
BARS = 10
SORTS = {
    "urgency": "most urgent first",
    "changed": "last change first",
    "failures": "most failures first",
    "name": "by name",
}


class View(NamedTuple):
    """What a viewer wants to see of the board."""

    group: str | None = None
    search: str = ""
    sort: str = "urgency"
    page: int = 1

    @classmethod
    def of(cls, query: Any) -> View:
        """The view that a query string asks for. What makes no sense is left out."""
        group, sort, page = query.get("group"), query.get("sort"), query.get("page", "")
        return cls(
            group if group in GROUPS else None,
            query.get("q", "")[:512],
            sort if sort in SORTS else "urgency",
            min(max(int(page), 1), 10**6) if page.isascii() and page.isdigit() and len(page) < 8 else 1,
        )

    def query(self, **changes: Any) -> str:
        """The query string of this view with some changes; it begins with "?", or is empty."""
        other = self._replace(**changes)
        fields = {"group": other.group, "q": other.search, "sort": other.sort, "page": other.page}
        given = {name: value for name, value in fields.items() if value not in (None, "", "urgency", 1)}
        return f"?{urlencode(given)}" if given else ""

    def rows(self, board: Board) -> list[Row]:
        """All rows of the board that this view selects, in its order."""
        found = select(board.rows, self.group, self.search)
        if self.sort == "name":
            found.sort(key=lambda row: row.name.casefold())
        elif self.sort == "changed":
            found.sort(key=lambda row: -(row.since or 0.0))
        elif self.sort == "failures":
            found.sort(key=lambda row: -row.failures)
        return found


class Page(NamedTuple):
    """The part of a view that fits on one page. first: number of its first row, from 1. total: rows of the view."""

    rows: Sequence[Row]
    first: int
    total: int
    number: int
    pages: int


def page_of(found: Sequence[Row], number: int) -> Page:
    """A page of the selected rows; the last one, if there are fewer."""
    pages = max(-(-len(found) // ROWS), 1)
    number = min(number, pages)
    start = (number - 1) * ROWS
    return Page(found[start : start + ROWS], start + 1, len(found), number, pages)


def link_of(name: str, prefix: str, key: bytes | None = None) -> str | None:
    """The last part of the address of a breaker's page; None for a name that no address can carry.

    key: its state key, if that is known: the name may be no more than an escaped form of it.
    """
    with contextlib.suppress(PolicyError):
        own = keys_of(name, prefix).state.encode()
        if name not in (".", "..") and key in (None, own):
            return quoted(name)
    return None


def quoted(name: str) -> str:
    """A name as one part of an address."""
    return quote(name, safe="")


def row_id(row: Row, prefix: str) -> str:
    """The name of a row for programs: the same for no other row, and without characters that browsers alter."""
    return quote(row.key[len(prefix.encode()) + 1 : -len(":state")], safe=" ")


class Cells(NamedTuple):
    """The changing figures of a row. threshold: failures in a row that open the circuit, if that is known."""

    calls: int
    failure_rate: float | None
    slow_rate: float | None
    health: int
    trips: int
    threshold: int | None


def cells_of(row: Row, now: float, thresholds: Mapping[str, int]) -> Cells:
    """The figures of a row as of now, in unix seconds. thresholds: by breaker, as the processes gave them."""
    calls, failures, slow = row.sums(now)
    failure_rate, slow_rate = (failures / calls, slow / calls) if calls else (None, None)
    threshold = row.override.get("failure_threshold", thresholds.get(row.name))
    return Cells(calls, failure_rate, slow_rate, row.health(now), row.recent_trips(now), threshold)


def row_json(row: Row, cells: Cells) -> dict[str, Any]:
    """One breaker of the board for a program. Times are in unix seconds."""
    left_out = ("key", "window", "trips", "closed_at_ms")
    fields = {name: value for name, value in _fields(row).items() if name not in left_out}
    return {**fields, "state": row.state, "shadow": row.shadow, **cells._asdict()}


def _fields(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


# The breaker's page


class Segment(NamedTuple):
    """A time during which the circuit was in one condition, as a bar of the timeline.

    start: unix seconds. x, width: of WIDTH.
    """

    start: float
    x: float
    width: float
    condition: Condition
    title: str


def timeline(history: Sequence[HistoryEntry], row: Row, now: float) -> list[Segment]:
    """The conditions of the last TIMELINE transitions. history: the newest first; it may have more."""
    known = [entry for entry in history if entry.time <= now and entry.reason not in POLICY_ACTIONS]
    entries = known[:TIMELINE][::-1]
    times = [entry.time for entry in entries]
    first = min([*times, now - 60, row.since or now])
    begin = first - (now - first) * 0.05
    conditions = [_before(entries, row), *(after(entry) for entry in entries)]
    edges = [begin, *times, now]
    scale = WIDTH / (now - begin)
    made = []
    for condition, start, end in zip(conditions, edges[:-1], edges[1:], strict=True):
        width = max((end - start) * scale, NARROWEST)
        x = min((start - begin) * scale, WIDTH - width)
        made.append(
            Segment(start, round(x, 1), round(width, 1), condition, f"{CONDITIONS[condition]} for {span(end - start)}")
        )
    return made


def _before(entries: Sequence[HistoryEntry], row: Row) -> Condition:
    """The condition before the first transition that is known."""
    return _plain(entries[0].old) if entries else row.condition


def after(entry: HistoryEntry) -> Condition:
    """The condition that a history entry began."""
    if entry.reason == "forced":
        return "forced_open" if entry.new == "open" else "forced_closed"
    return "held" if entry.reason == "held" else _plain(entry.new)


def _plain(state: str) -> Condition:
    """The condition of a state in the history, where another program may have written anything."""
    return "open" if state == "open" else "half_open" if state == "half_open" else "closed"


class Bar(NamedTuple):
    """One bucket of the window. The heights are percents of the greatest number of calls in a bucket."""

    calls: int
    failures: int
    slow: int
    height: float
    failed_height: float
    slow_height: float


def bars(row: Row, now: float) -> list[Bar]:
    """The buckets of the window, the oldest first; empty if no window is kept."""
    if not row.window:
        return []
    window = row.counted(now)
    past = [*window.past, *[(0, 0, 0)] * (BARS - 1 - len(window.past))]
    totals = (window.calls, window.failures, window.slow)
    newest = tuple(max(total - sum(one[kind] for one in past), 0) for kind, total in enumerate(totals))
    buckets = [*past[::-1], newest]
    most = max(1, *(calls for calls, _, _ in buckets))
    return [
        Bar(calls, failures, slow, *(round(100 * min(count, calls) / most, 1) for count in (calls, failures, slow)))
        for calls, failures, slow in buckets
    ]


class Field(NamedTuple):
    """One field of the policy on the page.

    source: "override", "client", "default" or "unknown". values: each with the number of processes that gave it; 0 for
    that of a policy override.
    """

    name: str
    source: str
    values: list[tuple[str, int]]
    meaning: str
    kind: str
    placeholder: str


def policy_fields(seen: Snapshot, processes: list[Process]) -> list[Field]:
    """Each field of the policy, as far as the policy override or the processes tell about it."""
    known = known_fields(seen, given_policies(processes, seen.name))
    return [_field(name, one) for name, one in known.items()]


def _field(name: str, known: Known) -> Field:
    values = [(shown(name, value), len({one.name for one in who})) for value, who in known.values]
    rule, default = RULES[name], f"default: {shown(name, DEFAULTS[name])}"
    return Field(name, known.source, values, rule.meaning, rule.kind, default)


def shown(name: str, value: Any) -> str:
    """The value of a policy field in words."""
    if value is None:
        return "off"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{plain(value)} s" if RULES[name].kind == "seconds" else plain(value)


def redis_cli_lines(keys: Keys, generation: int, clustered: bool) -> dict[str, str]:
    """A line for the shell that runs each script. The server's address is left to REDIS_URL: it is not everybody's."""
    made = {}
    for script, request in requests_by_hand(generation).items():
        words = ["EVALSHA", sha1(script), "3", *keys, json.dumps(request)]
        made[script] = f'redis-cli {"-c " if clustered else ""}-u "$REDIS_URL" {shlex.join(words)}'
    return made


# Templates


def stamp(at: float) -> str:
    """Unix seconds as UTC, to the second."""
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def iso(at: float) -> str:
    """Unix seconds as the `datetime` of a time element."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")


def percent(share: float | None) -> str:
    """A share as a percentage; a dash without one."""
    return "-" if share is None else f"{100 * share:.0f}%"


@functools.cache
def asset(name: str) -> bytes:
    """A packaged file of the page: a style, a script or an icon."""
    return importlib.resources.files(__package__).joinpath("static", name).read_bytes()


@functools.cache
def asset_version(name: str) -> str:
    """A short text that changes with the file, so that browsers may keep it for long."""
    return hashlib.sha256(asset(name)).hexdigest()[:12]


@functools.cache
def templates() -> jinja2.Environment:
    """The templates. Everything that they insert is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("pybreaker_redis.web"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"span": span, "stamp": stamp, "iso": iso, "percent": percent, "clean": clean}
    made.filters["quoted"] = quoted
    made.filters["json"] = lambda value: json.dumps(value, indent=2)
    made.globals |= {
        "ACTIONS": ACTIONS,
        "CONDITIONS": CONDITIONS,
        "GROUPS": GROUPS,
        "POLICY_ACTIONS": POLICY_ACTIONS,
        "POLICY_FIELD": POLICY_FIELD,
        "REASONS": REASONS,
        "SORTS": SORTS,
        "UNITS": UNITS,
        "after": after,
        "asset_version": asset_version,
        "link_of": link_of,
        "next_step": next_step,
        "row_id": row_id,
        "shown_value": shown,
        "outlook": outlook,
        "why": why,
    }
    return made
