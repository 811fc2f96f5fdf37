"""The animated picture of the demo, drawn from a real run of it.

To record another run, in examples/: `python -m demo --workers 3 --record ../docs/pictures/demo.json`.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

from .draw import Picture, Scale, number

RECORDED = pathlib.Path(__file__).with_name("demo.json")
WIDTH, LEFT, RIGHT, TOP, LANE = 760, 92, 10, 62, 46
SECONDS = 9.0  # of one round of the animation; the run takes the first part of it
PHASES = {  # of the service: what the picture calls them, and the colour
    "healthy": ("healthy", "good"),
    "failing": ("every 4th call fails", "hold"),
    "dead": ("dead", "bad"),
    "repaired": ("repaired", "good"),
}
# top and bottom of a call's tick, and its colour
TICKS = {"answered": (-4, 10, "good"), "failed": (-14, 10, "bad"), "rejected": (-5, 1, "hold")}


def demo() -> Picture:
    """Three processes, one dead service, one trip."""
    run = json.loads(RECORDED.read_text(encoding="utf-8"))
    ends: float = max(at for calls in run["calls"] for at, _ in calls) + 0.05
    bottom = TOP + LANE * len(run["calls"])
    picture = Picture(
        WIDTH,
        bottom + 84,
        "Three processes share one breaker (a real run)",
        "Three processes call a service. It dies; after four failures in a row across the fleet the circuit opens and"
        " all three reject. One probe at a time finds out when the service is repaired.",
    )

    def x(at: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * at / ends

    picture.text(0, 30, "the service", "title")
    for (phase, at), (_, until) in itertools.pairwise([*run["began"].items(), ("", ends)]):
        picture.box(x(at) + 1, 14, x(until) - x(at) - 2, 24, *PHASES[phase])
    picture.text(0, bottom + 12, "the breaker", "title")
    lanes = {TOP + LANE * (lane + 0.5): calls for lane, calls in enumerate(run["calls"])}
    for lane, y in enumerate(lanes, 1):
        picture.text(0, y + 4.5, f"process {lane}", "title")
        picture.line(LEFT, y + 12, WIDTH - RIGHT, y + 12, "rule")
    picture.open(class_="revealed")
    for y, calls in lanes.items():
        _calls(picture, calls, x, y)
    _states(picture, run["transitions"], x, ends, bottom + 8)
    picture.close()
    picture.line(LEFT, TOP - 8, LEFT, bottom + 32, "line playhead")
    _legend(picture, run["hits"], bottom + 50)
    _animate(picture, ends)
    return picture


def _calls(picture: Picture, calls: list[Any], x: Scale, y: float) -> None:
    """The calls of one process: one path for those that ended alike, and a diamond for each probe."""
    for ended, (top, bottom, kind) in TICKS.items():
        ticks = "".join(f"M{number(x(at))} {number(y + top)}V{number(y + bottom)}" for at, how in calls if how == ended)
        picture.add("path", d=ticks, class_=kind, stroke_width=1.5, fill="none")
    for at, how in calls:
        if how.startswith("probe"):
            picture.mark(x(at), y - 2, "probe")


def _states(picture: Picture, transitions: list[Any], x: Scale, ends: float, y: float) -> None:
    """The states of the breaker: its half-open periods, too short for a name, are strokes below the open one."""
    tripped, recovered = transitions[0][0], transitions[-1][0]
    picture.box(x(0), y - 12, x(tripped) - x(0), 24, "closed", "good")
    picture.box(x(tripped), y - 12, x(recovered) - x(tripped), 24, "open, half open while a probe runs", "bad")
    picture.box(x(recovered), y - 12, x(ends) - x(recovered), 24, "closed", "good")
    for at, _, new in transitions:
        if new == "half_open":
            picture.line(x(at), y + 14, x(at), y + 21, "probe")


def _legend(picture: Picture, hits: dict[str, int], y: float) -> None:
    left = float(LEFT)
    for ended, (top, bottom, kind) in TICKS.items():
        picture.line(left, y + top, left, y + bottom, kind)
        picture.text(left + 8, y + 6, ended, "muted small")
        left += 90
    picture.mark(left, y + 2, "probe")
    picture.text(left + 11, y + 6, "probe", "muted small")
    calls = f"{hits['none']} without a breaker, {hits['private']} with one per process, {hits['shared']} with this one"
    picture.text(0, y + 28, f"Calls that reached the dead service in 3 s: {calls}.", "small")


def _animate(picture: Picture, ends: float) -> None:
    """Show all of the run, then reveal it in real time, again and again; without motion for readers who want none."""
    done = f"{ends / SECONDS * 100:.0f}%"
    moved = f"transform: translateX({WIDTH - RIGHT - LEFT}px)"
    picture.rule("@keyframes reveal { from { clip-path: inset(-20px 100% -20px 0); }")
    picture.rule(f"  {done}, to {{ clip-path: inset(-20px 0 -20px 0); }} }}")
    picture.rule("@keyframes play { from { transform: none; opacity: 1; }")
    picture.rule(f"  {done} {{ {moved}; opacity: 1; }} to {{ {moved}; opacity: 0; }} }}")
    picture.rule(".picture .playhead { opacity: 0; }")
    picture.rule("@media (prefers-reduced-motion: no-preference) {")
    picture.rule(f"  .picture .revealed {{ animation: reveal {SECONDS:g}s linear -{ends:.1f}s infinite; }}")
    picture.rule(f"  .picture .playhead {{ animation: play {SECONDS:g}s linear -{ends:.1f}s infinite; }}")
    picture.rule("}")
