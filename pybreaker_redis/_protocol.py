"""Keys and requests out, replies in: pure functions between the client and the scripts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import msgpack

from ._errors import PolicyError

State: TypeAlias = Literal["closed", "open", "half_open"]
Request: TypeAlias = dict[str, Any]
Reply: TypeAlias = dict[str, Any]

LONGEST_NAME = 512
LONGEST_OVERRIDE = 30 * 86400.0


class Keys(NamedTuple):
    """The three keys of one breaker; all hash to the same cluster slot."""

    state: str
    history: str
    policy: str


def keys_of(name: str, prefix: str = "circuit_breaker") -> Keys:
    """The keys of the breaker called name.

    Raises PolicyError when name or prefix is empty, has braces (they would split the keys over cluster
    slots), is no valid text, or is longer than 512 bytes.
    """
    for what, text in (("name", name), ("prefix", prefix)):
        _check_text(what, text)
    state = f"{prefix}:{name}:state"
    return Keys(state, f"{{{state}}}:history", f"{{{state}}}:policy")


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise PolicyError(f"{what} must be a text that is not empty, not {text!r}")
    if "{" in text or "}" in text:
        raise PolicyError(f"{what} must not contain braces, which Redis Cluster reads as a hash tag: {text!r}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise PolicyError(f"{what} cannot be written as UTF-8: {text!r}") from error
    if size > LONGEST_NAME:
        raise PolicyError(f"{what} must be at most {LONGEST_NAME} bytes, not {size}")


def encode(request: Request) -> bytes:
    """A request as ARGV[1]."""
    return msgpack.packb(request)  # type: ignore[no-any-return]


def decode(reply: bytes) -> Reply:
    """What a script replied to an encoded request."""
    return msgpack.unpackb(reply)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a breaker at one moment.

    retry_after: seconds until a rejected call may be admitted, None where calls are admitted.
    last_failure_time, opened_at: unix seconds or None. generation: 0 when nothing is stored.
    forced_until: unix seconds at which the override ends. source: "redis", "memory" (redis=None) or
    "local" (Redis is down, this process protects itself).
    """

    name: str
    state: State
    generation: int
    failure_count: int
    success_count: int
    last_failure_time: int | None
    opened_at: int | None
    retry_after: float | None
    forced: Literal["open", "closed"] | None
    forced_until: float | None
    trips: int
    probes_in_flight: int
    source: str


def snapshot_from(name: str, reply: Reply) -> Snapshot:
    """The reply of snapshot.lua as a Snapshot."""
    forced_until_ms = reply.get("forced_until_ms")
    return Snapshot(
        name=name,
        state=reply["state"],
        generation=reply["generation"],
        failure_count=reply["failure_count"],
        success_count=reply["success_count"],
        last_failure_time=reply.get("last_failure_time"),
        opened_at=reply.get("opened_at"),
        retry_after=seconds(reply.get("retry_after_ms")),
        forced=reply.get("forced"),
        forced_until=None if forced_until_ms is None else forced_until_ms / 1000,
        trips=reply.get("trips", 0),
        probes_in_flight=reply.get("probes_in_flight", 0),
        source=reply["source"],
    )


def seconds(milliseconds: int | None) -> float | None:
    """Milliseconds as seconds; None stays None."""
    return None if milliseconds is None else milliseconds / 1000


@dataclasses.dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One transition. time: unix seconds, on the server's clock; the counts are those that caused it."""

    time: float
    old: State
    new: State
    reason: str
    generation: int
    failure_count: int
    success_count: int
    instance: str


def history_fields(raw: list[Any]) -> list[dict[str, Any]]:
    """The entries of an XREVRANGE reply: flat lists of names and values, or (from a cluster client) maps."""
    entries = []
    for _, fields in raw:
        pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
        entries.append({key.decode(): value.decode() for key, value in pairs})
    return entries


def history_entry(fields: dict[str, Any]) -> HistoryEntry:
    """One entry of the history stream."""
    return HistoryEntry(
        time=int(fields["time_ms"]) / 1000,
        old=fields["from"],
        new=fields["to"],
        reason=fields["reason"],
        generation=int(fields["generation"]),
        failure_count=int(fields["failure_count"]),
        success_count=int(fields["success_count"]),
        instance=fields["instance"],
    )


def control_request(action: str, duration: float | None) -> Request:
    """A request for control.lua; duration in seconds. Raises PolicyError when it is out of range."""
    if duration is None:
        return {"action": action}
    if (
        isinstance(duration, bool)
        or not isinstance(duration, (int, float))
        or not 0.001 <= duration <= LONGEST_OVERRIDE
    ):
        raise PolicyError(f"duration must be from 0.001 to {LONGEST_OVERRIDE:g} seconds, not {duration!r}")
    return {"action": action, "duration_ms": round(duration * 1000)}
