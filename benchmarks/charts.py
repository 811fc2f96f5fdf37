"""Draws results/*.svg from results/bench.json and results/fleet.json; the same JSON gives the same bytes."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).parent / "results"
OURS, PEER, FRAME = "#c0392b", "#7f8c9b", "#444444"
LEASE_COLORS = ("#c0392b", "#d68910", "#2471a3")
STYLE = {
    "svg.hashsalt": "pybreaker_redis",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FRAME,
    "figure.facecolor": "white",
}


def save(figure: Any, name: str) -> None:
    """Write one SVG, without a date and without the version of matplotlib."""
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)


def bars(axes: Any, title: str, unit: str, values: dict[str, float], digits: int = 3) -> None:
    """Horizontal bars on a logarithmic axis, the cheapest at the top."""
    rows = sorted(values.items(), key=lambda item: -item[1])
    names, numbers = [name for name, _ in rows], [value for _, value in rows]
    axes.barh(names, numbers, color=[OURS if name.startswith("pybreaker_redis") else PEER for name in names])
    for place, value in enumerate(numbers):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.{digits}g}"
        axes.text(value * 1.08, place, text, va="center", color=FRAME)
    axes.set_xscale("log")
    axes.set_xlim(min(numbers) / 2, max(numbers) * 5)
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)


def calls(found: dict[str, Any]) -> None:
    """What one call costs: closed and open, threads and asyncio."""
    figure, grid = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    titles = [
        ("sync, 1 thread, closed success", "closed, sync: overhead over the bare call"),
        ("asyncio, 1 task, closed success", "closed, asyncio: overhead over the bare call"),
        ("sync, 1 thread, open reject", "open, sync: one rejection"),
        ("asyncio, 1 task, open reject", "open, asyncio: one rejection"),
    ]
    for axes, (work, title) in zip(grid.flat, titles, strict=True):
        rows = {name: row["overhead_us"] for name, row in found["times"][work].items() if name != "bare call"}
        bars(axes, title, "microseconds (log)", {name: value for name, value in rows.items() if value > 0})
    save(figure, "calls")


def commands(found: dict[str, Any]) -> None:
    """The commands that each client sends."""
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    rows = found["commands"]["sync"] | found["commands"]["asyncio"]
    ordered = sorted(rows.items(), key=lambda item: -item[1]["closed success"])
    names = [name for name, _ in ordered]
    values = [row["closed success"] for _, row in ordered]
    axes.barh(names, values, color=[OURS if name.startswith("pybreaker_redis") else PEER for name in names])
    for place, value in enumerate(values):
        axes.text(value + 20, place, f"{value:,.0f}", va="center", color=FRAME)
    axes.set_title("commands sent to Redis per 1,000 successful calls, one after the other", loc="left")
    save(figure, "commands")


def fleet(found: dict[str, Any]) -> None:
    """Cost and reaction of a fleet, by its size."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    panels = [
        (left, "server_cpu", 100.0, "server CPU, % of one core"),
        (middle, "all_reject_seconds", 1.0, "seconds from the trip until all reject"),
        (right, "let_through", 1.0, f"calls let through after the trip ({found['calls_per_second']:g}/s each)"),
    ]
    for color, lease in zip(LEASE_COLORS, sorted({row["lease"] for row in found["rows"]}), strict=False):
        rows = [row for row in found["rows"] if row["lease"] == lease]
        for axes, field, factor, _ in panels:
            points = [(row["instances"], row[field] * factor, row["kept_up"]) for row in rows if row[field] is not None]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=color, label=f"lease {lease:g} s")
            for x, y, kept_up in points:
                axes.plot(x, y, "o", color=color, markerfacecolor=color if kept_up else "white")
    for axes, _, _, title in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("instances")
        axes.set_title(title, loc="left", fontsize=10)
    left.legend(frameon=False, title="hollow: did not keep up", title_fontsize=8)
    save(figure, "fleet")


def main() -> None:
    """Draw the charts of each JSON that exists."""
    with matplotlib.rc_context(STYLE):
        if (path := RESULTS / "bench.json").exists():
            found = json.loads(path.read_text())
            for draw in (calls, commands):
                draw(found)
        if (path := RESULTS / "fleet.json").exists():
            fleet(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
