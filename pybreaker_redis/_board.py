"""The board: all breakers of a prefix at a glance, for the terminal and for the web page.

Reads them by SCAN and MGET and decodes the documents here, without a script: thousands of breakers cost the server a
few milliseconds. Only the policy override is known here, not the policies of the processes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from . import _rules
from ._policy import DEFAULT_REQUEST, RULES, request_field
from ._protocol import (
    EXACT,
    GREATEST_GENERATION,
    LONGEST_NOTE,
    LONGEST_OPERATOR,
    State,
    read_map,
    state_pattern,
    without_about,
)
from ._window import Sums, Window, sums, window_at
from .wire.commands import Command, checked, read
from .wire.options import connecting
from .wire.sync import Connections, Server

SCAN_COUNT = 1000
CHUNK = 500  # breakers in one MGET: bounds what client and server buffer, and for how long the server is busy
_RULES = {request_field(name): rule for name, rule in RULES.items()}
_SECONDS_OR_COUNTS = ("failure_count", "success_count", "last_failure_time", "opened_at")  # of the contract
_REASON = re.compile(r"[a-z_]{1,30}")
_BUCKET = re.compile(r" (\d{1,14}),(\d{1,14}),(\d{1,14})")

Condition: TypeAlias = Literal["open", "half_open", "held", "forced_open", "forced_closed", "unreadable", "closed"]

CONDITIONS: dict[Condition, str] = {
    "open": "open",
    "half_open": "half open",
    "held": "held",
    "forced_open": "forced open",
    "forced_closed": "forced closed",
    "unreadable": "unreadable",
    "closed": "closed",
}
"""Each condition in words, the most urgent one first."""

_STATES: dict[Condition, State] = {
    "open": "open",
    "half_open": "half_open",
    "held": "open",
    "forced_open": "open",
    "forced_closed": "closed",
    "unreadable": "closed",
    "closed": "closed",
}

GROUPS: dict[str, str] = {
    "open": "open",
    "half_open": "half open",
    "held": "held",
    "forced": "forced",
    "shadow": "shadow mode",
    "override": "policy override",
    "closed": "closed",
}
"""The groups by which a board is filtered, in words. A breaker may be in several of them."""

_MAIN_GROUPS: dict[Condition, str] = {
    "forced_open": "forced",
    "forced_closed": "forced",
    "unreadable": "closed",
}

REASONS = {
    "failure_threshold": "failures in a row",
    "failures_in_window": "failures in the window",
    "error_rate": "failure rate",
    "slow_rate": "rate of slow calls",
    "held": "the service asked to wait",
    "timeout": "the open period has ended",
    "probe_failed": "a probe failed",
    "probe_slow": "a probe was slow",
    "probe_succeeded": "probes succeeded",
    "forced": "forced",
    "reset": "reset",
    "clear_forced": "forced state ended",
    "probe": "probe allowed",
    "set_policy": "policy override set",
    "clear_policy": "policy override ended",
}
"""The reason of a history entry in words."""


class Stored(NamedTuple):
    """What Redis stores for one breaker. key: its state key. now_ms: the server's clock when it was read."""

    key: bytes
    document: bytes | None
    override: bytes | None
    now_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One breaker on the board.

    condition: the state as an operator sees it. "held": open because the service itself said when to come back.
    "unreadable": the stored value is no document; breakers start closed from it.
    until: unix seconds on the server's clock at which the condition ends; if it has passed while open, a probe is due.
    since: unix seconds of the last transition or, without one, of the document's beginning.
    reason: of the last transition, as in HistoryEntry. error: type and message of the failure that opened the circuit.
    operator, note: who acted last and why, while that explains the condition.
    failures: in a row. probes: that are running.
    override: the policy override, in the scripts' units; empty without one. override_until: its end in unix seconds.
    override_operator, override_note: who set it, and why.
    trips, closed_at_ms, window: as stored; see recent_trips(), health() and sums().
    key: the state key; its name is not always UTF-8.
    """

    name: str
    condition: Condition
    until: float | None = None
    since: float | None = None
    reason: str | None = None
    error: str | None = None
    operator: str | None = None
    note: str | None = None
    failures: int = 0
    probes: int = 0
    override: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    override_until: float | None = None
    override_operator: str | None = None
    override_note: str | None = None
    trips: int = 0
    closed_at_ms: int = 0
    window: Mapping[str, Any] | None = None
    key: bytes = b""

    @property
    def state(self) -> State:
        """The state as the scripts know it."""
        return _STATES[self.condition]

    @property
    def shadow(self) -> bool:
        """Whether a policy override puts the whole fleet into shadow mode. A client's own policy is not known here."""
        return self.override.get("enforce") is False

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, as in GROUPS, that the breaker belongs to."""
        main = _MAIN_GROUPS.get(self.condition, self.condition)
        if not self.override:
            return (main,)
        return (main, "shadow", "override") if self.shadow else (main, "override")

    def counted(self, now: float) -> Window:
        """The window with its buckets as of now, in unix seconds; empty if none is kept."""
        return window_at(_window(self.window or {}), None, round(now * 1000))

    def sums(self, now: float) -> Sums:
        """Calls, failures and slow calls in the window as of now, in unix seconds."""
        return sums(self.counted(now)) if self.window else Sums(0, 0, 0)

    def recent_trips(self, now: float) -> int:
        """Trips in a row as of now, in unix seconds, by the default policy and the policy override."""
        return _rules.recent_trips(self._document(now), {**DEFAULT_REQUEST, **self.override})

    def health(self, now: float, own: Mapping[str, Any] | None = None) -> int:
        """From 0 to 100 as of now, in unix seconds. own: a policy in the scripts' units, under the policy override."""
        return _rules.health(self._document(now), {**DEFAULT_REQUEST, **(own or {}), **self.override}, self.sums(now))

    def ends(self, now: float) -> bool:
        """Whether time alone has changed the row by now, in unix seconds, though Redis stores the same bytes."""
        forced_ends = self.condition.startswith("forced") and self.until is not None and self.until <= now
        return forced_ends or self.probes > 0 or (self.override_until is not None and self.override_until <= now)

    def _document(self, now: float) -> _rules.Document:
        return _rules.Document(
            generation=1,
            state=self.state,
            failure_count=self.failures,
            trips=self.trips,
            closed_at_ms=self.closed_at_ms or None,
            now=round(now * 1000),
        )


# Reading


def masters(server: Server) -> list[Connections]:
    """The connections to each node that serves keys. Raises OSError when no node lists them."""
    found = server.masters()
    if not found:
        raise ConnectionError("no node of the cluster lists its slots; a user with ACL rules needs +cluster|slots")
    return found


def read_stored(server: Server, prefix: str) -> Iterator[list[Stored]]:
    """What Redis stores for every breaker under a prefix, in chunks. Raises redis.RedisError or OSError."""
    keys = _each_once(key for node in masters(server) for page in scan(node, state_pattern(prefix)) for key in page)
    while chunk := list(itertools.islice(keys, CHUNK)):
        yield read_keys(server, chunk)


def _each_once(keys: Iterable[bytes]) -> Iterator[bytes]:
    seen: set[bytes] = set()
    for key in keys:
        if key not in seen:
            seen.add(key)
            yield key


def scan(node: Connections, pattern: str) -> Iterator[list[bytes]]:
    """The keys on a node that match a pattern, page by page. A key may come twice."""
    cursor = b"0"
    while True:
        words = (b"SCAN", cursor, b"MATCH", pattern.encode(), b"COUNT", b"%d" % SCAN_COUNT)
        ((cursor, keys),) = checked(node.send((Command(b"", words),)))
        yield keys
        if cursor == b"0":
            return


def read_keys(server: Server, keys: list[bytes]) -> list[Stored]:
    """What Redis stores under these state keys; without those that have expired. Raises redis.RedisError or OSError."""
    return [one for one in _read(server, keys) if one.document is not None] if keys else []


def read_one(server: Server, key: bytes) -> Stored | None:
    """What Redis stores for one breaker, or None. After its document has expired, it may still have a policy override.

    Raises redis.RedisError or OSError.
    """
    (found,) = _read(server, [key])
    return None if found.document is None and found.override is None else found


def _read(server: Server, keys: list[bytes]) -> list[Stored]:
    size = 1 if server.clustered else len(keys)  # two breakers have different slots in a cluster
    groups = [keys[start : start + size] for start in range(0, len(keys), size)]
    clock = Command(keys[0], (b"TIME",))
    reads = [read(group) for group in groups]
    (seconds, microseconds), *replies = checked(server.exchange([clock, *reads]))
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    values = [value for reply in replies for value in reply]
    return [
        Stored(key, document, override, now_ms)
        for key, document, override in zip(keys, values[::2], values[1::2], strict=True)
    ]


@contextlib.contextmanager
def subscribed(server: Server, *words: str) -> Iterator[Callable[[float], tuple[bytes, bytes] | None]]:
    """Subscribe for a `with` block, by a command such as "PSUBSCRIBE", pattern.

    Gives a function that waits a number of seconds for a notification. It returns the channel and content, or None.
    Raises redis.RedisError or OSError.
    """
    connection = server.subscriber()
    with connecting():
        connection.connect()
    try:
        connection.send_command(*words)
        for _ in words[1:]:
            connection.read_response()

        def receive(wait: float) -> tuple[bytes, bytes] | None:
            if not connection.can_read(wait):
                return None
            kind, *_, channel, content = connection.read_response()
            return (channel, content) if kind in (b"message", b"pmessage") else None

        yield receive
    finally:
        connection.disconnect()


def name_of(key: bytes, prefix: str) -> str:
    """The name of the breaker with this state key, which is also its channel."""
    return key.decode(errors="backslashreplace")[len(prefix) + 1 : -len(":state")]


# Decoding


def row_of(stored: Stored, prefix: str) -> Row:
    """The row of a breaker. Values that make no sense count as absent, as they do for the scripts."""
    name, now_ms = name_of(stored.key, prefix), stored.now_ms
    override = _override(stored.override, now_ms)
    if stored.document is None:
        return Row(name, "closed", key=stored.key, **override)
    document = read_map(stored.document)
    if document is None or not _keeps_contract(document):
        return Row(name, "unreadable", key=stored.key, **override)
    window = document.get("window")
    reason, forced_until = _text(document, "reason", 30), _integer(document, "forced_until_ms")
    forced = document.get("forced") == document["state"] and forced_until > now_ms
    return Row(
        name,
        _condition(document["state"], reason, forced),
        until=_until(document, forced),
        since=_since(document),
        reason=reason if reason and _REASON.fullmatch(reason) else None,
        error=_text(document, "error", 200),
        operator=_text(document, "operator", LONGEST_OPERATOR),
        note=_text(document, "note", LONGEST_NOTE),
        failures=_integer(document, "failure_count"),
        probes=_running(document.get("probes"), now_ms),
        trips=_integer(document, "trips"),
        closed_at_ms=_integer(document, "closed_at_ms"),
        window=window if isinstance(window, dict) else None,
        key=stored.key,
        **override,
    )


def _keeps_contract(document: Mapping[str, Any]) -> bool:
    """Whether the contract fields make sense. If not, the scripts begin anew."""
    values = (document.get(field) for field in _SECONDS_OR_COUNTS)
    sound = all(value is None or _is_whole(value, EXACT / 1000) for value in values)
    return sound and document.get("state") in ("closed", "open", "half_open")


def _condition(state: str, reason: str | None, forced: bool) -> Condition:
    if state == "half_open":
        return "half_open"
    if state == "open":
        return "forced_open" if forced else "held" if reason == "held" else "open"
    return "forced_closed" if forced else "closed"


def _until(document: Mapping[str, Any], forced: bool) -> float | None:
    field = "forced_until_ms" if forced else "open_until_ms"
    return _integer(document, field) / 1000 or None


def _since(document: Mapping[str, Any]) -> float | None:
    began_us = _integer(document, "generation", GREATEST_GENERATION)  # of a document that has had no transition
    began = _integer(document, "changed_at_ms") / 1000 or began_us / 1e6 or _integer(document, "opened_at")
    return began if 0 < began <= EXACT / 1000 else None


def _running(probes: object, now_ms: int) -> int:
    ends = probes.values() if isinstance(probes, dict) else ()
    return sum(isinstance(end, (int, float)) and end > now_ms for end in ends)


def _override(text: bytes | None, now_ms: int) -> dict[str, Any]:
    """The fields of a row about its policy override; none if it has ended, or the scripts would not accept it."""
    fields = read_map(text) or {}
    until_ms = _integer(fields, "until_ms")
    if "until_ms" in fields and until_ms <= now_ms:
        return {}
    given = without_about(fields)
    if not given or not all(name in _RULES and _RULES[name].accepts(value) for name, value in given.items()):
        return {}
    return {
        "override": given,
        "override_until": until_ms / 1000 or None,
        "override_operator": _text(fields, "operator", LONGEST_OPERATOR),
        "override_note": _text(fields, "note", LONGEST_NOTE),
    }


def _window(stored: Mapping[str, Any]) -> Window:
    fields = ("bucket_ms", "newest", "calls", "failures", "slow")
    bucket_ms, newest, calls, failures, slow = (_integer(stored, field) for field in fields)
    found = _BUCKET.findall(str(stored.get("past"))[:400])[:9]
    past = tuple((int(one), int(two), int(three)) for one, two, three in found)
    return Window(bucket_ms or 1, newest, calls, failures, slow, past)


def _integer(fields: Mapping[str, Any], name: str, most: int = EXACT) -> int:
    value = fields.get(name)
    return int(value) if value is not None and _is_whole(value, most) else 0


def _is_whole(value: Any, most: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= most and value % 1 == 0


def _text(fields: Mapping[str, Any], name: str, longest: int) -> str | None:
    value = fields.get(name)
    return value[:longest] if isinstance(value, str) and value else None


# Order, counts, filters


_RANKS = {condition: rank for rank, condition in enumerate(CONDITIONS)}


def urgency(row: Row) -> tuple[int, int, float, str]:
    """A sort key: the order of CONDITIONS; among closed breakers first those with a policy override, then those with
    failures; the latest change first."""
    healthy = 0 if row.override else 1 if row.failures else 2
    return _RANKS[row.condition], healthy if row.condition == "closed" else 0, -(row.since or 0.0), row.name


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many breakers each group has."""
    found = collections.Counter(group for row in rows for group in row.groups)
    return {group: found[group] for group in GROUPS}


def select(rows: Iterable[Row], group: str | None = None, search: str = "") -> list[Row]:
    """The rows of a group whose names contain a text, in any case."""
    wanted = search.casefold()
    found = [row for row in rows if group in row.groups] if group else list(rows)
    return [row for row in found if wanted in row.name.casefold()] if wanted else found


# Words


def clean(text: str) -> str:
    """A stored text with its control characters escaped: they could steer a terminal, or turn the text around."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def span(seconds: float) -> str:
    """A length of time for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def next_step(row: Row) -> tuple[str, str] | None:
    """What comes at row.until, in words: before that time, and afterwards. None if nothing is known to come."""
    if row.until is None:
        return None
    if row.condition in ("open", "held"):
        return "probe in", "probe is due"
    return ("ends in", "ends now") if row.condition in ("forced_open", "forced_closed") else None


def outlook(row: Row, now: float) -> str:
    """What comes next and when, as in "probe in 12 s"; empty if nothing is known to come. now: unix seconds."""
    step = next_step(row)
    if step is None or row.until is None:
        return ""
    before, after = step
    return f"{before} {span(row.until - now)}" if row.until > now else after


def why(row: Row) -> str:
    """Why the breaker is in its condition: who and their note, or the reason and the error; empty if not known."""
    if row.operator or row.note:
        return ": ".join(filter(None, (row.operator and f"by {row.operator}", row.note)))
    if row.condition == "half_open" and row.error:
        return f"opened by {row.error}"
    reason = row.reason and REASONS.get(row.reason, row.reason)
    return ": ".join(filter(None, (reason, row.error)))
