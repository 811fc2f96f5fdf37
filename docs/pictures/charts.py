"""The charts of the benchmarks, from benchmarks/results."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from .draw import Picture, Scale, number

RESULTS = pathlib.Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"
WIDTH, NAMES, ROW, GAP = 760, 220, 22, 46
WORKS = {
    "sync, 1 thread, closed success": "a call that succeeds, sync: overhead over the bare call",
    "asyncio, 1 task, closed success": "a call that succeeds, asyncio: overhead over the bare call",
    "sync, 1 thread, open reject": "a rejection, sync",
    "asyncio, 1 task, open reject": "a rejection, asyncio",
}
LEASES = ("bad", "hold", "probe")  # a colour for each lease, which a label names, too


def result(name: str) -> Any:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def overheads(work: str) -> dict[str, float]:
    """Microseconds that a guarded call takes beyond the bare call, by library, the least first."""
    rows = result("bench")["times"][work].items()
    found = {name: row["overhead_us"] for name, row in rows if name != "bare call" and row["overhead_us"] > 0}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def short(value: float) -> str:
    """A figure with as many digits as it has meaning."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"


def calls() -> Picture:
    """What one call costs with each library."""
    found = {title: overheads(work) for work, title in WORKS.items()}
    height = sum(GAP + ROW * len(rows) for rows in found.values())
    picture = Picture(
        WIDTH,
        height,
        "What a guarded call costs",
        "Bars on a logarithmic scale: microseconds per call with this library and with others, from make bench.",
    )
    top = 0.0
    for title, rows in found.items():
        _bars(picture, top, f"{title} (microseconds, logarithmic)", rows, logarithmic=True)
        top += GAP + ROW * len(rows)
    return picture


def commands() -> Picture:
    """The commands that each client sends."""
    found = result("bench")["commands"]
    rows = {name: float(row["closed success"]) for name, row in (found["sync"] | found["asyncio"]).items()}
    ordered = dict(sorted(rows.items(), key=lambda item: item[1]))
    picture = Picture(
        WIDTH,
        GAP + ROW * len(ordered),
        "Commands sent to Redis",
        "Bars: commands that each client sends to Redis for 1,000 successful calls, from make bench.",
    )
    _bars(picture, 0, "commands sent to Redis for 1,000 successful calls, one after the other", ordered)
    return picture


def _bars(picture: Picture, top: float, title: str, rows: dict[str, float], logarithmic: bool = False) -> None:
    """Horizontal bars, ours in another colour and with a bold name."""
    picture.text(0, top + 16, title, "title")
    positive = [value for value in rows.values() if value > 0]
    least, most = (min(positive) / 3, max(positive)) if logarithmic else (0.0, max(positive))
    for row, (name, value) in enumerate(rows.items()):
        y = top + 28 + ROW * row
        share = math.log(value / least) / math.log(most / least) if logarithmic else value / most
        width = max((WIDTH - NAMES - 60) * share, 1.0)
        ours = name.startswith("pybreaker_redis")
        picture.text(NAMES - 8, y + 12, name, "end small title" if ours else "end small")
        picture.add("rect", x=NAMES, y=y, width=width, height=15, class_="good-fill" if ours else "probe-fill")
        picture.text(NAMES + width + 6, y + 12, short(value), "small muted")


def fleet() -> Picture:
    """Cost and reaction of a fleet, by its size."""
    found = result("fleet")
    picture = Picture(
        WIDTH,
        300,
        "What a fleet costs its Redis",
        "Two charts over the number of instances, for each lease: the server's CPU, and the seconds from a trip until"
        " every instance rejects.",
    )
    leases = sorted({row["lease"] for row in found["rows"]})
    panels = (
        ("server_cpu", 100.0, "server CPU, % of one core"),
        ("all_reject_seconds", 1.0, "seconds until all reject"),
    )
    for panel, (field, factor, title) in enumerate(panels):
        points = {
            lease: [
                (row["instances"], row[field] * factor, row["kept_up"])
                for row in found["rows"]
                if row["lease"] == lease and row[field] is not None
            ]
            for lease in leases
        }
        _lines(picture, 60 + 380 * panel, title, points)
    picture.text(0, 294, "Hollow: server and simulator together did not keep up on this machine.", "muted small")
    return picture


def _lines(picture: Picture, left: float, title: str, points: dict[float, list[tuple[float, float, bool]]]) -> None:
    """One chart with two logarithmic axes."""
    width, top, height = 235, 40, 190
    every = [point for line in points.values() for point in line]
    x = _logarithmic([count for count, _, _ in every], left, left + width)
    y = _logarithmic([value for _, value, _ in every], top + height, top)
    picture.text(left - 50, 16, title, "title")
    for tick in _decades([count for count, _, _ in every]):
        picture.line(x(tick), top, x(tick), top + height, "rule")
        picture.text(x(tick), top + height + 18, f"{tick:,.0f}", "middle small muted")
    for tick in _decades([value for _, value, _ in every]):
        picture.line(left, y(tick), left + width, y(tick), "rule")
        picture.text(left - 8, y(tick) + 4, f"{tick:g}", "end small muted")
    picture.text(left + width / 2, top + height + 36, "instances", "middle small muted")
    label_at = float(top + height)
    for (lease, line), kind in sorted(zip(points.items(), LEASES, strict=True), key=lambda pair: pair[0][1][-1][1]):
        label_at = min(y(line[-1][1]), label_at - 14)  # lowest first, so that no two labels overlap
        picture.text(left + width + 8, label_at + 4, f"lease {lease:g} s", f"small {kind}")
        path = "L".join(f"{number(x(count))} {number(y(value))}" for count, value, _ in line)
        picture.add("path", d=f"M{path}", class_=kind, fill="none", stroke_width=2)
        for count, value, kept_up in line:
            fill = f"var(--{kind})" if kept_up else "none"
            picture.add("circle", cx=x(count), cy=y(value), r=3.5, class_=kind, style=f"fill: {fill}")


def _logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    least, most = math.log(min(values)), math.log(max(values))
    return lambda value: start + (end - start) * (math.log(value) - least) / (most - least)


def _decades(values: Sequence[float]) -> list[float]:
    return [10.0**power for power in range(-6, 9) if min(values) <= 10.0**power <= max(values)]
