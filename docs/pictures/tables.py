"""The figures of the documentation, from benchmarks/results.

A page has a table between the marks `<!-- figures: NAME -->` and `<!-- end -->`, where NAME is a function below.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from typing import Any

from .charts import overheads, result, short

DOCS = pathlib.Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "pybreaker_redis (lease 0.1)"


def filled(page: str) -> str:
    """The text of a page with every table as the results say."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", page)


def table(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table of Markdown."""
    lines = [list(headings)]
    lines += [["---"] * len(lines[0])]
    lines += [[str(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> str:
    """What the figures were measured on."""
    found = result("bench")["machine"]
    rows = [
        ("Python", found["python"]),
        ("server", found["server"]),
        ("system", f"{found['system']}, {found['cpus']} cores"),
    ]
    return table(("what", "version"), [*rows, *found["libraries"].items()])


def ratios() -> str:
    """This library beside others."""
    values = {target["measure"]: target["value"] for target in result("bench")["targets"]}
    rows = [
        ("this library / pybreaker in memory, sync", values["decorator / pybreaker's in memory, overhead"]),
        ("this library / circuitbreaker, sync", values["decorator / circuitbreaker's, overhead"]),
        ("this library / interlock-cb in memory, asyncio", values["decorator / interlock-cb's, asyncio, overhead"]),
        ("pybreaker with Redis / this library, sync", values["pybreaker's decorator with Redis / ours, overhead"]),
    ]
    return table(("overhead of a guarded call that succeeds", "ratio"), [(name, short(value)) for name, value in rows])


def overhead() -> str:
    """The calls of every library, sync."""
    success, rejection = overheads("sync, 1 thread, closed success"), overheads("sync, 1 thread, open reject")
    rows = [(name, short(value), short(rejection[name])) for name, value in success.items() if name in rejection]
    return table(("library", "success", "rejection"), rows)


def one_call() -> str:
    """The calls of this library, sync."""
    success, rejection = overheads("sync, 1 thread, closed success"), overheads("sync, 1 thread, open reject")
    rows = [
        ("success, lease 0.1 s", short(success[OURS])),
        ("success, `lease=0` (two round trips on a unix socket)", short(success["pybreaker_redis (strict)"])),
        ("rejection, by the view", short(rejection[OURS])),
    ]
    return table(("overhead of a guarded call, sync, one thread", "microseconds"), rows)


def targets() -> str:
    """What `make bench` asserts, and what it found."""
    rows = [
        (target["measure"], short(target["value"]), target["must"], "yes" if target["must_reached"] else "**no**")
        for target in result("bench")["targets"]
    ]
    return table(("measure", "found", "limit", "met"), rows)


def reach() -> str:
    """How soon a trip reaches all processes."""
    rows = [
        (name, f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['max_ms']:.1f}", row["rounds"])
        for name, row in result("watch").items()
    ]
    return table(("from a trip to a rejection, 8 processes", "median, ms", "p99, ms", "most, ms", "trips"), rows)


def processes() -> str:
    """How many processes one server carries."""
    sizing = result("fleet")["sizing"]
    load = f"processes on one core at {sizing['safe_load'] * 100:.0f} % load"
    rows = [
        (f"{lease} s", f"{float(f'{count:.1g}'):,.0f}") for lease, count in sizing["instances_times_breakers"].items()
    ]
    return table(("lease", load), rows)


def simulated() -> str:
    """What fleet_sim.py found."""
    rows = []
    for row in result("fleet_sim"):
        found, sent, oldest = [*row["measured"].split("; "), "", ""][:3]
        sent, oldest = sent.removeprefix("per second "), oldest.removeprefix("oldest view ")
        rows.append((row["measure"], row["must"], found, sent, oldest))
    return table(("fleet", "limit", "found", "sent per second", "oldest view"), rows)


def documents() -> str:
    """The size of what Redis stores."""
    return table(("document", "bytes"), result("bench")["document_bytes"].items())


def operators_page() -> str:
    """What the operators' page costs, and how soon it shows a trip."""
    found = result("web")
    rows = [
        ("CPU of the Redis server, nothing happens", f"{found['server_idle']:.2f} % of a core"),
        ("CPU of the web process, nothing happens", f"{found['app_idle']:.2f} % of a core"),
        ("CPU of the web process, a trip every second", f"{found['app_trips']:.1f} % of a core"),
        (
            "from a trip to all screens",
            f"{found['p50_ms']:.0f} ms in the median, {found['p99_ms']:.0f} ms in 99 of 100 cases",
        ),
    ]
    return table(("what", "measured"), rows)


DRAWN = (machine, ratios, overhead, one_call, targets, reach, processes, simulated, documents, operators_page)
TABLES = {one.__name__: one for one in DRAWN}
