"""Who is there, and which policies the processes were given: the commands `fleet` and `policy get`."""

from __future__ import annotations

from typing import Any

import rich.text

from .._board import clean, span
from .._processes import (
    Fields,
    Known,
    Process,
    concerns_list,
    disagreements,
    fleet_json,
    given_policies,
    known_fields,
    read_processes,
)
from .._protocol import Snapshot
from ..wire.options import REDIS_ERRORS
from ._fleet import Fleet
from ._output import by_whom, err, out, pairs, put, put_json

MOST_NAMED = 5
NOBODY = (
    "no process is listed under the prefix {}. A process lists itself a second after its first call, unless it has"
    " lease=0 or listed=False, or its user may not: see SECURITY.md"
)


def show_fleet(fleet: Fleet, use_json: bool) -> None:
    """Print the processes, and the policies on which they disagree."""
    processes = read_processes(fleet.server, fleet.prefix)
    disputed = list(disagreements(processes))
    if use_json:
        put_json(fleet_json(processes, disputed))
    elif not processes:
        err.print(NOBODY.format(clean(fleet.prefix)))
    else:
        put([rich.text.Text(f"{'SEEN':<12}{'VERSION':<12}{'BREAKERS':>8}  PROCESS", "bold"), *map(_line, processes)])
        out.print(f"\n{_sum(processes)}")
        for breaker, given in disputed:
            out.print(f"\n{clean(breaker)}: the processes disagree on its policy", style="yellow")
            put([rich.text.Text(f"  {_fields(one.fields)}  {_named(one.processes)}") for one in given])


def _line(process: Process) -> rich.text.Text:
    unnamed = process.breakers - process.named
    note = f"  ({unnamed} of its breakers are not named, for lack of room)" if unnamed > 0 else ""
    seen, version = f"{span(process.seen_ago)} ago", clean(process.version)[:11]
    return rich.text.Text(f"{seen:<12}{version:<12}{process.breakers:>8}  {clean(process.name)}{note}")


def _sum(processes: list[Process]) -> str:
    names, hosts = {process.name for process in processes}, {process.host for process in processes}
    return f"{_count(len(names), 'process', 'processes')} on {_count(len(hosts), 'host', 'hosts')}"


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _fields(fields: Fields) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "the defaults"


def _named(processes: list[Process]) -> str:
    """How many these are, and the names of some. A process with two clients has two entries."""
    names = list(dict.fromkeys(clean(process.name) for process in processes))
    more = ", ..." if len(names) > MOST_NAMED else ""
    return f"{_count(len(names), 'process', 'processes')}: {', '.join(names[:MOST_NAMED])}{more}"


def known_policy(fleet: Fleet, snapshot: Snapshot, from_file: bool) -> dict[str, Known]:
    """What is known of each policy field of a breaker.

    A policy override is stored in Redis. The rest is known from the file of --config, if one was given, or else from
    the processes that list themselves.
    """
    if from_file:
        sources = snapshot.policy_sources.items()
        return {field: Known([(getattr(snapshot.policy, field), [])], source) for field, source in sources}
    return known_fields(snapshot, given_policies(_processes(fleet), snapshot.name))


def _processes(fleet: Fleet) -> list[Process]:
    """The processes; none if this user may not read the list: the rest of the policy can be shown without it."""
    try:
        return read_processes(fleet.server, fleet.prefix)
    except REDIS_ERRORS as error:
        if not concerns_list(error):
            raise
        err.print(f"the list of processes cannot be read: {error}", style="yellow")
        return []


def show_policy(known: dict[str, Known], seen: Snapshot, override_left: float | None, use_json: bool) -> None:
    """Print what is known of a policy. override_left: seconds until the policy override ends, if it has an end."""
    if use_json:
        by = {"override_operator": seen.override_operator, "override_note": seen.override_note}
        fields = {name: _known_json(one) for name, one in known.items()}
        put_json({"fields": fields, "override_ends_in": override_left, **by})
        return
    put(pairs((name, _known_text(one)) for name, one in known.items()))
    if any(one.source == "override" for one in known.values()):
        end = "has no end" if override_left is None else f"ends in {span(override_left)}"
        out.print(f"the policy override {end}{by_whom(seen)}")
    if any(one.source == "unknown" for one in known.values()):
        err.print(
            "unknown: not stored in Redis. Each process uses its own policy, and none has listed one for this breaker."
            " --config FILE reads the policy from a file"
        )


def _known_json(known: Known) -> dict[str, Any]:
    if len(known.values) > 1:
        values = [{"value": value, "processes": [one.name for one in who]} for value, who in known.values]
        return {"value": None, "source": "client", "values": values}
    value, who = known.values[0] if known.values else (None, [])
    return {"value": value, "source": known.source, **({"processes": [one.name for one in who]} if who else {})}


def _known_text(known: Known) -> str:
    if len(known.values) > 1:
        return "the processes disagree: " + "; ".join(f"{value} ({_named(who)})" for value, who in known.values)
    value, who = known.values[0] if known.values else ("-", [])
    return f"{value!s:<12} {known.source}" + (f" ({_named(who)})" if who else "")
