"""The output while a run lasts: lines for a pipe, a table that changes in place for a terminal."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Any, NamedTuple

from .plan import GUARDS
from .workers import Tally

COLOURS = {"closed": "green", "half_open": "yellow", "open": "red", "failing": "yellow", "dead": "red"}


class Moment(NamedTuple):
    """What a screen shows. done: the part of the phase that is over, from 0 to 1."""

    kind: str
    phase: str
    done: float
    tallies: list[Tally]
    state: str


def title(kind: str) -> str:
    """The title of a run."""
    return f"run {[*GUARDS].index(kind) + 1} of {len(GUARDS)}: {GUARDS[kind]}"


class Plain:
    """Lines for a pipe: about one every second, and one for each transition."""

    def __init__(self) -> None:
        self._began = monotonic()
        self._due = 0.0
        self._shown: dict[tuple[str, int], int] = {}

    def announce(self, kind: str) -> None:
        """Begin a run."""
        print(f"\n{title(kind)} [process: admitted/failed/rejected]", flush=True)
        self._due = 0.0

    def show(self, moment: Moment) -> None:
        """Show the present figures."""
        for line in self._news(moment):
            print(line, flush=True)
        if moment.tallies and monotonic() >= self._due:
            self._due = monotonic() + 1.0
            counts = "  ".join(f"{t.number}: {t.admitted}/{t.failed}/{t.rejected}" for t in moment.tallies)
            print(f"{self._time(monotonic())}  {moment.phase:8}  {moment.state:24}  {counts}", flush=True)

    def _time(self, at: float) -> str:
        return f"{at - self._began:5.1f} s"

    def _news(self, moment: Moment) -> Iterator[str]:
        for tally in moment.tallies:
            key = (moment.kind, tally.number)
            for at, event in tally.transitions[self._shown.get(key, 0) :]:
                # each private breaker probes, and often: only their trips and recoveries are shown
                if moment.kind == "shared" or "closed" in (event.old, event.new):
                    change = f"{event.old} -> {event.new} ({event.reason})"
                    yield f"{self._time(at)}  * {change}, notified process {tally.number}"
            self._shown[key] = len(tally.transitions)


class Live(Plain):
    """A table that changes in place, in a rich.live.Live."""

    def __init__(self, live: Any) -> None:
        super().__init__()
        self._live = live
        self._lines: collections.deque[str] = collections.deque(maxlen=8)

    def announce(self, kind: str) -> None:
        """Begin a run; the table has its title."""
        self._lines.clear()

    def show(self, moment: Moment) -> None:
        """Show the present figures."""
        self._lines.extend(self._news(moment))
        self._live.update(_frame(moment, self._lines))


@contextlib.contextmanager
def screen(plain: bool) -> Iterator[Plain]:
    """The screen for this output. plain: lines, even on a terminal."""
    if plain or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield Plain()
        return
    import rich.live

    with rich.live.Live(refresh_per_second=10) as live:
        yield Live(live)


def _frame(moment: Moment, lines: Iterable[str]) -> Any:
    from rich.console import Group
    from rich.table import Table

    table = Table()
    for column in ("process: pid", "calls", "admitted", "failed", "rejected", "probes"):
        table.add_column(column, justify="right")
    table.add_column("sees", min_width=9)
    for t in moment.tallies:
        figures = (t.calls, t.admitted, t.failed, t.rejected, t.probes)
        table.add_row(f"{t.number}: {t.pid}", *map(str, figures), _coloured(t.state))
    bar = "█" * round(moment.done * 20)
    phase = _coloured(f"{moment.phase:8}")
    return Group(
        f"[bold]{title(moment.kind)}[/]",
        f"the service is {phase} {bar:░<20}",
        table,
        f"the breaker: {_coloured(moment.state)}",
        *lines,
    )


def _coloured(text: str) -> str:
    return f"[{COLOURS.get(text.split(',')[0].strip(), 'none')}]{text}[/]"
