"""Does one process keep one line to one Redis, and do trips come from failures rather than from delay?"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import link_fleet as fleet
import redis
import watch
from link_fleet import OneBad

from pybreaker_redis.embedded import EmbeddedServer

RESULTS = pathlib.Path(__file__).parent / "results" / "link.json"
WINDOW = 60.0  # seconds, of the row "reports"


class Row(NamedTuple):
    """One line of the table. met: whether the figure is as it must be. found: all that was measured."""

    measure: str
    must: str
    measured: str
    met: bool
    found: dict[str, Any]


Rows = Iterator[Row]


def one_bad(quick: bool) -> Rows:
    """Healthy processes of 50 calls a second and one whose calls all fail."""
    seconds = 5.0 if quick else 20.0
    for case in one_bad_cases(quick, seconds):
        with EmbeddedServer() as server:
            found = fleet.one_bad_process(server, case)
        calls = found["succeeded"] + found["failed"] + found["rejected"]
        measured = f"{found['trips']} trips, {found['rejected'] / calls:.0%} of {calls:,} calls rejected"
        if found["redis_error"]:
            measured += f", {found['redis_error']} outages"
        yield Row(str(case), "0 trips", measured, found["trips"] == found["rejected"] == 0, found)


def one_bad_cases(quick: bool, seconds: float) -> Iterator[OneBad]:
    """Every fleet: quick ones are of 8 healthy processes."""
    for rule in ("threshold", "rate"):
        for healthy in (8,) if quick else (8, 30):
            late = 1.0 if healthy == 8 else 5.0
            for client, rate in (("manager", 10), ("manager", 50), ("watch", 10), ("watch", 50), ("plain", 10)):
                yield OneBad(client, rule, healthy, bad_rate=rate, late=late, seconds=seconds)


def old_rate(quick: bool) -> Rows:
    """Successes from before a silence do not count against failures after it."""
    with EmbeddedServer() as server:
        for where, url, pause in (
            ("on Redis", server.url, 0.0),
            ("on Redis, 200/s", server.url, 0.005),
            ("redis=None", None, 0.0),
        ):
            calls = fleet.calls_until_trip(url, pause=pause)
            measured = "no trip in 600" if calls is None else str(calls)
            yield Row(
                f"after silence, calls until a rate trips, {where}", "20", measured, calls == 20, {"calls": calls}
            )


def dead_service(quick: bool) -> Rows:
    """The service dies for a whole fleet at one moment."""
    processes = 4 if quick else 16
    for load, rate, most in (("rare calls", 1.0, 8), ("busy", 50.0, 12 + 8 * processes)):
        with EmbeddedServer() as server:
            found = fleet.failures_until_rejection(server, rate=rate, processes_of=processes)
        measure = f"service dies, failures until a rejection, {found['instances']} instances, {load}"
        measured = f"{found['failures']} ({found['calls_per_second']:,.0f} calls/s)"
        yield Row(measure, f"<= {most}", measured, found["failures"] <= most, found)


def outage(quick: bool) -> Rows:
    """The server hangs under 20 breakers of one thread."""
    timeout = 0.25
    with EmbeddedServer() as server:
        found = fleet.one_outage(server, redis_timeout=timeout, calls_on=2.0 if quick else 5.0)
    waited = found["waited"] + found["waited_later"]
    yield Row(
        "server hangs, 20 breakers: waiting", f"<= {2 * timeout:g} s", f"{waited:.2f} s", waited <= 2 * timeout, found
    )
    yield Row("  warnings", "1", str(found["warnings"]), found["warnings"] == 1, {})
    measured = f"{found['threads']} threads, {found['connections']} connections in {found['hung_for']:.0f} s"
    # two threads: that of the link, and that of its attempt to connect
    at_a_time = found["threads"] <= 2 and found["connections"] <= retries_one_at_a_time(found["hung_for"], timeout)
    yield Row("  retries at a time", "1", measured, at_a_time, {})


def retries_one_at_a_time(seconds: float, redis_timeout: float) -> int:
    """The most connections of retries that never run together, each of which waits for redis_timeout."""
    return 2 + int(seconds / redis_timeout)


def hung(quick: bool) -> Rows:
    """Healthy calls while the server hangs."""
    for watching, hangs in ((False, 2.0), (True, 3.0)):  # a subscription notices a hang after two seconds
        for kind in ("asyncio, 1,000 tasks", "sync, 16 threads"):
            with EmbeddedServer() as server:
                if kind.startswith("asyncio"):
                    found = asyncio.run(fleet.tasks_while_hung(server, watch=watching, hangs=hangs))
                else:
                    found = fleet.calls_while_hung(server, watch=watching, hangs=hangs)
            measured = f"p99 {found['p99_ms']:.2f}, max {found['max_ms']:.1f} ms (before: {found['max_before_ms']:.1f})"
            met = found["p99_ms"] < 5 and found["max_ms"] < 30
            name = f"server hangs {hangs:g} s, healthy call, {kind}, {'watch' if watching else 'lease 0.1'}"
            yield Row(name, "p99 < 5, max < 30 ms", measured, met, found)


def exchanges(quick: bool) -> Rows:
    """What a process with 100 healthy breakers sends."""
    for rate in (1, 10):
        with EmbeddedServer() as server:
            found = fleet.exchanges_of_many(server, rate=rate, seconds=3.0 if quick else 10.0, monitor=2.0)
        measured = f"{found['exchanges_per_second']:.1f} ({found['commands_per_second']:,.1f} commands/s)"
        name = f"100 healthy breakers, {rate} calls/s each: exchanges/s"
        yield Row(name, "<= 12", measured, found["exchanges_per_second"] <= 12, found)


def reports(quick: bool) -> Rows:
    """The same with an error rate over 60 s, which is warm before the count begins."""
    warm, seconds = (15.0, 5.0) if quick else (WINDOW, 20.0)
    younger = WINDOW / warm  # a younger window is reported to more often
    with EmbeddedServer() as a, EmbeddedServer() as b, EmbeddedServer() as c, EmbeddedServer() as d:
        cases = [(a, 1.0, 0.0), (b, 10.0, 0.0), (c, 1.0, 0.001), (d, 10.0, 0.001)]
        for found in fleet.reports_of_many(cases, warm=warm, seconds=seconds, window=WINDOW):
            most = (40 if found["failing"] else 20) * younger
            measured = found["scripts_per_second"]
            name = f"100 breakers with a rate, {found['rate']:g} calls/s each, {found['failing']:.1%} fail: scripts/s"
            yield Row(name, f"<= {most:g}", f"{measured:.1f}", measured <= most, found)


def refresh(quick: bool) -> Rows:
    """Server time of a refresh."""
    with EmbeddedServer() as server:
        found = fleet.refresh_cost(server, rounds=3 if quick else 10)
    measured = f"{found['ratio']:.2f} ({found['refresh_usec']:,.0f} / {found['mget_usec']:,.0f} us)"
    yield Row("server time, refresh of 100 breakers / bare MGET", "<= 1.5", measured, found["ratio"] <= 1.5, found)


def half_open(quick: bool) -> Rows:
    """A probe hangs, and a thread keeps calling."""
    with EmbeddedServer() as server:
        found = fleet.rejections_in_half_open(server, rejections=2_000 if quick else 20_000)
    measured = f"{found['scripts_per_second']:,.1f} ({found['rejections']:,} rejections)"
    yield Row("half open, a probe hangs: scripts/s", "<= 10", measured, found["scripts_per_second"] <= 10, found)


def trip(quick: bool) -> Rows:
    """From a trip to the rejections of other processes."""
    with EmbeddedServer() as server:
        for watched, name, most in ((False, "plain", 110.0), (True, "watching", 5.0)):
            found = watch.measure(server.url, watched, 8, 10 if quick else 60)
            measured = f"{found['p99_ms']:.1f} ms"
            met = found["p99_ms"] <= most
            yield Row(f"trip to rejection, 8 processes, {name}: p99", f"<= {most:g} ms", measured, met, found)


def writes(quick: bool) -> Rows:
    """Calls fail while the server refuses writes."""
    for how in fleet.REFUSALS:
        with EmbeddedServer() as server:
            found = fleet.writes_refused(server, how)
        met = found["opened_by"] == "local" and all(found[what] for what in ("stayed", "back", "trips"))
        measured = (
            f"{'yes' if met else 'no'} (opened by {found['opened_by']} at {found['failures']}, back: {found['back']})"
        )
        yield Row(f"writes refused ({how}): opens locally, returns", "yes", measured, met, found)


def strict(quick: bool) -> Rows:
    """lease=0 against the same two scripts over a bare socket."""
    for what, port, most in (("TCP socket", 0, 1.4), ("unix socket", None, None)):
        with EmbeddedServer(port=port) as server:
            found = fleet.strict_call(server, rounds=7 if quick else 25)
        measured = f"{found['ratio']:.2f} ({found['call_usec']:.0f} / {found['raw_usec']:.0f} us)"
        limit, met = ("-", True) if most is None else (f"<= {most}", found["ratio"] <= most)
        yield Row(f"strict call / its two scripts, bare {what}", limit, measured, met, found)


def path(quick: bool) -> Rows:
    """What a reader follows from the link's thread to the socket and back."""
    with EmbeddedServer() as server:
        found = fleet.functions_of_a_refresh(server)
    yield Row(
        "functions entered by a refresh of one breaker",
        "<= 30",
        f"{len(found)}",
        len(found) <= 30,
        {"functions": found},
    )


SECTIONS: dict[str, Callable[[bool], Rows]] = {
    "one-bad": one_bad,
    "old-rate": old_rate,
    "dead-service": dead_service,
    "outage": outage,
    "hung": hung,
    "exchanges": exchanges,
    "reports": reports,
    "refresh": refresh,
    "half-open": half_open,
    "trip": trip,
    "writes": writes,
    "strict": strict,
    "path": path,
}


def measure(names: list[str], quick: bool) -> dict[str, Any]:
    """Run these sections, one after the other, and print each row as soon as it is known."""
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        info = client.info("server")
    facts = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "server": info.get("valkey_version") or info["redis_version"],
    }
    rows = []
    print(f"{'measure':78} | {'must':>20} | measured")
    print(f"{'-' * 78} | {'-' * 20} | {'-' * 40}")
    for name in names:
        print(f"measuring: {name}", file=sys.stderr)
        for row in SECTIONS[name](quick):
            print(f"{row.measure:78} | {row.must:>20} | {row.measured}{'' if row.met else '  (missed)'}", flush=True)
            rows.append({"section": name, **row._asdict()})
    missed = sum(not row["met"] for row in rows)
    print(f"\n{missed} of {len(rows)} missed; Python {facts['python']}, {facts['cpus']} cores")
    return {"machine": facts, "quick": quick, "rows": rows}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs and small fleets, in three minutes")
    parser.add_argument("--only", choices=SECTIONS, help="only these rows")
    parser.add_argument("--json", type=pathlib.Path, help="where to write (default: results/link.json for a full run)")
    options = parser.parse_args()
    logging.getLogger("pybreaker_redis").addHandler(logging.NullHandler())  # outages are what is measured
    found = measure([options.only] if options.only else list(SECTIONS), options.quick)
    path = options.json or (None if options.quick or options.only else RESULTS)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
