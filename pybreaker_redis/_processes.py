"""Reads the processes of a fleet, as they list themselves, and finds those that disagree on a policy."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from ._errors import PolicyError
from ._policy import DEFAULTS, RULES
from ._protocol import Snapshot, fleet_key, read_map
from .wire.commands import Command, checked
from .wire.options import error_kind
from .wire.sync import Server

PAGE = 500  # entries in one reply

Fields: TypeAlias = dict[str, Any]


class GivenPolicy(NamedTuple):
    """A policy that a process has given to some of its breakers.

    fields: those that differ from the defaults. breakers: how many. names: of those, as many as there was room for.
    """

    fields: Fields
    breakers: int
    names: frozenset[str]


class Process(NamedTuple):
    """A process that has listed itself. seen_ago: seconds since then. breakers: how many it has used."""

    host: str
    pid: int
    version: str
    seen_ago: float
    breakers: int
    policies: list[GivenPolicy]

    @property
    def name(self) -> str:
        """Host and process id, as in the history."""
        return f"{self.host}:{self.pid}"

    @property
    def named(self) -> int:
        """How many of its breakers are listed by name."""
        return len(frozenset().union(*(policy.names for policy in self.policies)))


class Variant(NamedTuple):
    """A policy of one breaker, and the processes that gave it this policy."""

    fields: Fields
    processes: list[Process]


def read_processes(server: Server, prefix: str) -> list[Process]:
    """Every process that is listed, the last seen first. Entries that make no sense are left out.

    Raises redis.RedisError or OSError.
    """
    key = fleet_key(prefix).encode()
    now, cursor, found = 0.0, b"0", {}
    while True:
        words = (b"HSCAN", key, cursor, b"COUNT", b"%d" % PAGE)
        replies = checked(server.exchange([Command(key, (b"TIME",)), Command(key, words)]))
        (seconds, microseconds), (cursor, page) = replies
        now = int(seconds) + int(microseconds) / 1e6
        for process, entry in zip(page[::2], page[1::2], strict=True):
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
                found[process] = _process(read_map(entry), now)
        if cursor == b"0":
            return sorted(found.values(), key=lambda process: (process.seen_ago, process.name))


def concerns_list(error: Exception) -> bool:
    """Whether an error of read_processes() is about the list alone: it may not be read, or is no list."""
    return error_kind(error) in ("permission", "response")


def _process(entry: Any, now: float) -> Process:
    """A stored entry, which any program may have written. Raises ValueError, TypeError, KeyError or AttributeError."""
    policies = [
        GivenPolicy(
            dict(filter(None, itertools.starmap(_field, one["policy"].items()))),
            int(one["breakers"]),
            frozenset(map(str, one["names"])),
        )
        for one in entry["policies"]
    ]
    seen_ago = max(now - int(entry["seen_ms"]) / 1000, 0.0)
    return Process(
        str(entry["host"]), int(entry["pid"]), str(entry["version"]), seen_ago, int(entry["breakers"]), policies
    )


def _field(name: str, value: object) -> tuple[str, Any] | None:
    """A policy field as the scripts see it; None for its default, and for what makes no sense.

    Another version may know more fields. Two policies are the same if they differ in less than a millisecond.
    """
    try:
        rule = RULES[name]
        rule.check(name, value)
    except (KeyError, PolicyError):
        return None
    exact = rule.from_request(rule.to_request(value))
    return None if exact == DEFAULTS[name] else (name, exact)


def given_policies(processes: list[Process], breaker: str) -> list[Variant]:
    """The policies that the processes gave to a breaker, that of most processes first. Empty if none has listed it."""
    found: dict[str, Variant] = {}
    for process in processes:
        for policy in process.policies:
            if breaker in policy.names:
                found.setdefault(_text(policy.fields), Variant(policy.fields, [])).processes.append(process)
    return sorted(found.values(), key=lambda variant: -len(variant.processes))


def agreed(processes: list[Process], field: str) -> dict[str, Any]:
    """A policy field of each breaker, as its processes gave it. Without the breakers on which they disagree."""
    found: dict[str, Any] = {}
    disputed = set()
    for process in processes:
        for policy in process.policies:
            value = policy.fields.get(field, DEFAULTS[field])
            disputed |= {breaker for breaker in policy.names if found.setdefault(breaker, value) != value}
    return {breaker: value for breaker, value in found.items() if breaker not in disputed}


def disagreements(processes: list[Process]) -> Iterator[tuple[str, list[Variant]]]:
    """Each breaker to which processes gave different policies, with these policies."""
    texts: dict[str, set[str]] = {}
    for process in processes:
        for policy in process.policies:
            text = _text(policy.fields)
            for breaker in policy.names:
                texts.setdefault(breaker, set()).add(text)
    for breaker in sorted(breaker for breaker, given in texts.items() if len(given) > 1):
        yield breaker, given_policies(processes, breaker)


class Known(NamedTuple):
    """What is known of a policy field. values: each with the processes that were given it; several if they disagree.

    source: "override", "client", "default" or "unknown".
    """

    values: list[tuple[Any, list[Process]]]
    source: str


def known_fields(snapshot: Snapshot, given: list[Variant]) -> dict[str, Known]:
    """What is known of each policy field of a breaker: from the policy override, else from the processes.

    given: the policies that the processes gave to the breaker.
    """
    return {
        field: Known([(getattr(snapshot.policy, field), [])], source)
        if source == "override"
        else _from_processes(field, given)
        for field, source in snapshot.policy_sources.items()
    }


def _from_processes(field: str, given: list[Variant]) -> Known:
    values: dict[Any, list[Process]] = {}
    for one in given:
        values.setdefault(one.fields.get(field, DEFAULTS[field]), []).extend(one.processes)
    if not values:
        return Known([], "unknown")
    is_default = list(values) == [DEFAULTS[field]]
    return Known(list(values.items()), "default" if is_default else "client")


def fleet_json(processes: list[Process], disputed: Iterable[tuple[str, list[Variant]]]) -> dict[str, Any]:
    """The processes, and the breakers on whose policy they disagree, for a program."""
    return {
        "processes": [
            {
                **process._asdict(),
                "policies": [
                    {"policy": one.fields, "breakers": one.breakers, "names": sorted(one.names)}
                    for one in process.policies
                ],
            }
            for process in processes
        ],
        "disagreements": {
            breaker: [{"policy": one.fields, "processes": [process.name for process in one.processes]} for one in given]
            for breaker, given in disputed
        },
    }


def _text(fields: Fields) -> str:
    return json.dumps(fields, sort_keys=True)
