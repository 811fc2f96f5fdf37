"""The keys, requests and replies of the scripts. No I/O."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import msgpack

from ._errors import PolicyError
from ._policy import LONGEST_OPEN, RULES, Policy, check_seconds, override_fields, request_field

T = TypeVar("T")
State: TypeAlias = Literal["closed", "open", "half_open"]
"""The state of a circuit, in a Snapshot, an Event or a HistoryEntry."""
Forced: TypeAlias = Literal["open", "closed"]
Request: TypeAlias = dict[str, Any]
Reply: TypeAlias = dict[str, Any]


# A step of the decision code: the name of a script that Redis must run, and the request. The shell sends back the
# reply, or throws the error.
Ask: TypeAlias = tuple[str, Request]
Steps: TypeAlias = Generator[Ask, Any, T]


class NotSent(asyncio.CancelledError):
    """A call was cancelled before its command was sent, so no server has executed it."""


COUNTS = ("failure_count", "success_count", "calls", "failures", "slow")
LONGEST_NAME = 512
# the limits of lua/model.lua
EXACT = 90_000_000_000_000
GREATEST_GENERATION = 100 * EXACT
LONGEST_OPEN_MS = round(LONGEST_OPEN * 1000)
LARGEST_TEXT = 65536
LONGEST_OPERATOR, LONGEST_NOTE = 100, 200
POLICY_ACTIONS = "set_policy", "clear_policy"  # also the reasons of their history entries
NOTES = "clear_forced", "probe", *POLICY_ACTIONS  # reasons of history entries that are never a transition
_ABOUT_OVERRIDE = "until_ms", "operator", "note"  # stored with the fields of a policy override


class Keys(NamedTuple):
    """The three keys of one breaker; all hash to the same cluster slot."""

    state: str
    history: str
    policy: str


def keys_of(name: str, prefix: str = "circuit_breaker") -> Keys:
    """The keys of the breaker called name. Prefix "a" with name "b:c" has the keys of prefix "a:b" with name "c".

    Raises PolicyError when name or prefix is empty, has braces (they would split the keys over cluster
    slots), cannot be written as UTF-8, or is longer than 512 bytes.
    """
    for what, text in (("name", name), ("prefix", prefix)):
        _check_text(what, text)
    return keys_with(f"{prefix}:{name}:state")


def keys_with(state: str) -> Keys:
    """The keys of the breaker with this state key."""
    return Keys(state, f"{{{state}}}:history", f"{{{state}}}:policy")


def fleet_key(prefix: str) -> str:
    """The hash in which the processes of a prefix list themselves. No state key, since those end in ":state"."""
    return f"{prefix}:fleet"


def state_pattern(prefix: str) -> str:
    """The glob pattern of all state keys, which are also the channels."""
    escaped = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in prefix)
    return f"{escaped}:*:state"


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise PolicyError(f"{what} must be a non-empty string, not {text!r}")
    if "{" in text or "}" in text:
        raise PolicyError(f"{what} must not contain braces, which Redis Cluster reads as a hash tag: {text!r}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise PolicyError(f"{what} cannot be written as UTF-8: {text!r}") from error
    if size > LONGEST_NAME:
        raise PolicyError(f"{what} must be at most {LONGEST_NAME} bytes, not {size}")


encode: Callable[[Request], bytes] = msgpack.packb  # a request as ARGV[1]
decode: Callable[[bytes], Reply] = msgpack.unpackb  # a script's reply to an encoded request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state of a breaker at one moment.

    name: the name of the breaker. state: "closed", "open" or "half_open". generation: the number of the current
    generation; 0 if nothing is stored. failure_count: failures in a row. success_count: probes that succeeded since the
    circuit became half open. last_failure_time: unix seconds of the last failure that counted, or None. opened_at: unix
    seconds of the last trip, or None while closed.
    retry_after: seconds after which a rejected caller should try again; None while calls are admitted.
    forced: "open" or "closed" while an operator forces the state. forced_until: when the forced state ends, in unix
    seconds.
    trips: consecutive trips. probes_in_flight: probes that run now, in the whole fleet.
    calls: the calls in the window; 0 without a window. failures: the failures in the window; 0 without a window.
    slow: the slow calls in the window; 0 without a window. failure_rate: the share of failures among the calls in the
    window; None without calls. slow_rate: the share of slow calls in the window; None without calls.
    reason: the reason of the last transition, as in HistoryEntry. changed_at: when the last transition was, in unix
    seconds. error: type and message of the failure that opened the circuit, while it is not closed.
    operator: who carried out the last action on the state, until the next transition; None if not known. note: why the
    operator acted, until the next transition; None if not given.
    health: from 0 (open) to 100. A closed circuit starts from 100, a half-open one from 50. This is multiplied by
    1 - failures, by 1 - slow_rate / 2 and by 4 / (4 + trips). Here failures is the failure rate or, if that is greater,
    failure_count / failure_threshold.
    reporters: the last failure of each host in unix seconds; kept for a quorum.
    policy: the policy in force. policy_sources: the source of each field: "default", "client" or "override".
    override_operator: who set the policy override; None if not given. override_note: why the operator set the policy
    override; None if not given.
    isolated: whether the circuit is open for this instance only, below the quorum.
    source: "redis", "memory" (redis=None) or "local" (Redis is down).
    """

    name: str
    state: State
    generation: int
    failure_count: int
    success_count: int
    last_failure_time: int | None
    opened_at: int | None
    reason: str | None
    changed_at: float | None
    error: str | None
    operator: str | None
    note: str | None
    retry_after: float | None
    forced: Forced | None
    forced_until: float | None
    trips: int
    probes_in_flight: int
    source: str
    calls: int
    failures: int
    slow: int
    failure_rate: float | None
    slow_rate: float | None
    health: int
    reporters: dict[str, float]
    policy: Policy
    policy_sources: dict[str, str]
    override_operator: str | None
    override_note: str | None
    isolated: bool
    __hash__ = None  # type: ignore[assignment]  # it holds dicts


def snapshot_from(name: str, reply: Reply, policy: Policy | None = None, isolated: bool = False) -> Snapshot:
    """The reply of snapshot.lua as a Snapshot. policy: the client's own."""
    policy = policy or Policy()
    override, client = reply.get("override") or {}, policy._to_request()
    calls, failures, slow = (reply.get(key, 0) for key in COUNTS[2:])
    sources = {
        field: "override" if request_field(field) in override
        else "client" if request_field(field) in client
        else "default"
        for field in RULES
    }  # fmt: skip
    # most fields have the same name and unit
    fields: dict[str, Any] = {field.name: reply.get(field.name) for field in dataclasses.fields(Snapshot)}
    fields |= {
        "name": name,
        "changed_at": seconds(reply.get("changed_at_ms")),
        "retry_after": seconds(reply.get("retry_after_ms")),
        "forced_until": seconds(reply.get("forced_until_ms")),
        "trips": reply.get("trips", 0),
        "probes_in_flight": reply.get("probes_in_flight", 0),
        "calls": calls,
        "failures": failures,
        "slow": slow,
        "failure_rate": failures / calls if calls else None,
        "slow_rate": slow / calls if calls else None,
        "health": reply.get("health", 0 if reply["state"] == "open" else 100),
        "reporters": {host: at / 1000 for host, at in (reply.get("reporters") or {}).items()},
        "policy": policy._with_override(override),
        "policy_sources": sources,
        "isolated": isolated,
    }
    return Snapshot(**fields)


def seconds(milliseconds: int | None) -> float | None:
    """Milliseconds as seconds; None stays None."""
    return None if milliseconds is None else milliseconds / 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One transition, or an operator's action that caused none (old and new are then the same).

    time: unix seconds on the server's clock. old: the state before the transition. new: the state after it. generation:
    the generation that a transition begins, or the present one; 0 if nothing is stored. failure_count: failures in a
    row just before the transition. success_count: successful probes just before the transition.

    reason: "failure_threshold", "failures_in_window", "error_rate", "slow_rate", "held", "timeout",
    "probe_failed", "probe_slow", "probe_succeeded", "forced" or "reset". Of actions that are no transition: "forced",
    "clear_forced", "probe", "set_policy", "clear_policy", or "reset" if it only dropped a policy override.
    instance: the process that made the transition, as "host:pid-" and eight random hex digits.
    calls: the calls in the window; None without a window. failures: the failures in the window; None without a window.
    slow: the slow calls in the window; None without a window. error: type and message of the failure that opened the
    circuit, as in "ConnectionError: refused"; else None. operator: who carried out the action; None if not given.
    note: why the operator acted; None if not given.
    override: the policy fields that the action set or ended, as in Policy; None if it did neither. override_until:
    until when it set them, in unix seconds; None for good.
    """

    time: float
    old: State
    new: State
    reason: str
    generation: int
    failure_count: int
    success_count: int
    instance: str
    calls: int | None = None
    failures: int | None = None
    slow: int | None = None
    error: str | None = None
    operator: str | None = None
    note: str | None = None
    override: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    override_until: float | None = None


def without_about(override: Mapping[str, Any]) -> dict[str, Any]:
    """The policy fields of a stored policy override, without its end, operator and note."""
    return {name: value for name, value in override.items() if name not in _ABOUT_OVERRIDE}


def override_text(fields: Mapping[str, Any], until_ms: int | None = None) -> str:
    """Fields of a policy override in the scripts' units, with its end, as a history entry has them."""
    end = {} if until_ms is None else {"until_ms": until_ms}
    return json.dumps({**dict(sorted(fields.items())), **end}, separators=(",", ":"))


def history_fields(raw: list[Any]) -> list[dict[str, Any]]:
    """The entries of an XREVRANGE reply, which has a flat list of names and values for each."""
    entries = []
    for _, fields in raw:
        # another program may have written anything
        texts = [text.decode(errors="replace") for text in fields]
        entries.append(dict(zip(texts[::2], texts[1::2], strict=False)))
    return entries


def history_entry(fields: dict[str, Any]) -> HistoryEntry:
    """One entry of the history stream, or a message about it. Raises ValueError, KeyError or OverflowError for one
    that another program wrote."""
    time_ms = int(fields["time_ms"])
    if not 0 <= time_ms <= EXACT:
        raise ValueError(f"time_ms must be from 0 to {EXACT}, not {time_ms}")
    override = read_map(str(fields.get("override", "")).encode(errors="replace")) or {}
    until_ms = override.get("until_ms")
    return HistoryEntry(
        time=time_ms / 1000,
        old=fields["from"],
        new=fields["to"],
        reason=fields["reason"],
        generation=int(fields["generation"]),
        failure_count=int(fields["failure_count"]),
        success_count=int(fields["success_count"]),
        instance=fields["instance"],
        error=fields.get("error"),
        operator=fields.get("operator"),
        note=fields.get("note"),
        override=override_fields(override) or None,
        override_until=until_ms / 1000 if isinstance(until_ms, int) and 0 < until_ms <= EXACT else None,
        **{key: int(fields[key]) for key in COUNTS[2:] if key in fields},
    )


def history_entries(found: Iterable[dict[str, Any]]) -> list[HistoryEntry]:
    """The transitions in a stream. Skips entries that another program wrote."""
    entries = []
    for fields in found:
        with contextlib.suppress(KeyError, ValueError, OverflowError):
            entries.append(history_entry(fields))
    return entries


def check_history_count(count: object) -> None:
    """Raise PolicyError unless this is a valid number of entries."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise PolicyError(f"count must be an integer of at least 1, not {count!r}")


# A healthy document as save() in lua/document.lua writes it: closed, with no more than its last change and a window.
_HEALTHY = re.compile(
    rb'\{"state":"closed","failure_count":(\d{1,10}),"success_count":0,"last_failure_time":(?:\d{1,10}|null),'
    rb'"opened_at":null,"version":1,"generation":([1-9]\d{0,15}),"failure_number":(\d{1,13})'
    rb'(?:,"changed_at_ms":[1-9]\d{0,12},"reason":"[a-z_]{1,30}"'
    rb'(?:,"operator":"[ !#-\[\]-~]{1,100}")?(?:,"note":"[ !#-\[\]-~]{1,200}")?)?'
    rb'(?:,"window":\{[^{}]*\})?\}'
)
_WINDOW = re.compile(
    rb'"window":\{"bucket_ms":\d{1,14},"newest":\d{1,14},"calls":(\d{1,14}),"failures":(\d{1,14}),"slow":(\d{1,14}),'
)


def _within_bounds(text: bytes | None) -> bytes:
    return b"" if text is None or len(text) > LARGEST_TEXT else text


def read_map(text: bytes | None) -> dict[str, Any] | None:
    """A stored JSON object as the scripts read it; None for anything else."""
    text = _within_bounds(text)
    if not text.startswith(b"{"):
        return None
    try:
        value = json.loads(text.decode(errors="replace"), strict=False)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    return value  # type: ignore[no-any-return]


def read_document(text: bytes | None) -> Reply | None:
    """What the stored document of a healthy breaker says; None for any other document, which needs a script."""
    found = _HEALTHY.fullmatch(_within_bounds(text))
    if found is None:
        return None
    failure_count, generation, failure_number = map(int, found.groups())
    if failure_number < failure_count or generation > GREATEST_GENERATION:
        return None
    return {
        "state": "closed",
        "generation": generation,
        "failure_count": failure_count,
        "failure_number": failure_number,
        "success_count": 0,
        "source": "redis",
    }


def read_window(text: bytes | None) -> dict[str, int]:
    """The counts of a stored window, which may include calls that have left it since; empty without one."""
    found = _WINDOW.search(_within_bounds(text))
    return {} if found is None else dict(zip(COUNTS[2:], map(int, found.groups()), strict=True))


def requests_by_hand(generation: int) -> dict[str, Request]:
    """A request for each script, to be sent by redis-cli. acquire takes a probe where one is due, record renews the
    TTL, and control ends a forced state."""
    return {
        "acquire": {"instance": "redis-cli"},
        "record": {"generation": generation, "instance": "redis-cli"},
        "control": {"action": "clear_forced", "instance": "redis-cli"},
        "snapshot": {},
    }


def printable(text: str, most: int) -> str:
    """The text as the scripts require it: at most so many printable ASCII characters; others are escaped."""
    text = text[:most]
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown.encode("ascii", "backslashreplace").decode()[:most]


def control_request(action: str, operator: str | None, note: str | None, duration: float | None = None) -> Request:
    """The request for control.lua. action: its name. duration: seconds. operator, note: who asks, and why.

    Long texts are cut. Raises PolicyError for a value that cannot be sent.
    """
    request: Request = {"action": action}
    for field, text, most in (("operator", operator, LONGEST_OPERATOR), ("note", note, LONGEST_NOTE)):
        if text is not None and not isinstance(text, str):
            raise PolicyError(f"{field} must be a text, or None, not {text!r}")
        if text:
            request[field] = printable(text, most)
    if duration is None:
        return request
    check_seconds("duration", duration, 0.001, LONGEST_OPEN)
    return {**request, "duration_ms": round(duration * 1000)}
