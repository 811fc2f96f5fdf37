"""The demo, as a person or a CI job starts it: its output, its exit code, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import wait_until
from demo import crew, plan, proof
from demo.__main__ import main
from demo.crew import Crew
from demo.proof import Promise, promises
from demo.runs import Run
from demo.screens import Live, Moment
from demo.workers import Tally

from pybreaker_redis import Event, HistoryEntry, Policy
from pybreaker_redis.embedded import EmbeddedServer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MARK = "PYBREAKER_REDIS_TEST_DEMO"
HURRY = "from demo.plan import PHASES;"
TO_THE_THIRD_RUN = f"{HURRY} PHASES['none'] = PHASES['private'] = (('dead', 0.1),); PHASES['shared'] = (('dead', 5),);"
HALF_AS_LONG = (
    f"{HURRY} PHASES.update({{guard: [(phase, lasts if phase == 'repaired' else lasts / 2) for phase, lasts in phases]"
    " for guard, phases in PHASES.items()});"
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


class Demo:
    """A demo in a session of its own, as a shell starts it; it and all its children carry a mark."""

    def __init__(self, *arguments: str, before: str = "", **environment: str) -> None:
        self.mark = f"{MARK}={secrets.token_hex(8)}"
        # a test run in the background may ignore SIGINT, which children inherit
        program = f"{before}import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler);"
        program += "runpy.run_module('demo', run_name='__main__', alter_sys=True)"
        kept = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, "PYTHONPATH": str(EXAMPLES), **dict([self.mark.split("=")]), **environment},
            start_new_session=True,
        )

    def read_until(self, text: str) -> None:
        """Read lines up to one with this text."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"{text!r} was never printed")

    def interrupt(self) -> None:
        """Send SIGINT to the whole foreground group, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; exit code, output and errors."""
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors

    def living(self) -> list[str]:
        """The ids of its processes that still run."""
        return [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if self._is_ours(path)]

    def _is_ours(self, path: Path) -> bool:
        try:
            return self.mark.encode() in path.read_bytes()
        except OSError:
            return False


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    """Starts demos, and ends those that a failed test left running."""
    started: list[Demo] = []

    def start(*arguments: str, **options: str) -> Demo:
        started.append(Demo(*arguments, **options))
        return started[-1]

    yield start
    for demo in started:
        if demo.process.poll() is None:
            demo.process.kill()
        demo.process.communicate()


def figures(pattern: str, output: str) -> tuple[int, ...]:
    """The integers in the one line that has this pattern."""
    (found,) = re.findall(pattern, output)
    return tuple(map(int, found))


@needs_proc
@pytest.mark.parametrize("before", [HALF_AS_LONG, pytest.param("", marks=pytest.mark.long)], ids=["hurried", "whole"])
def test_the_whole_demo_in_a_pipe(before: str, start: Callable[..., Demo], tmp_path: Path) -> None:
    """It ends by itself with 0, every promise holds, its figures and its record agree, and no process remains."""
    demo = start("--record", str(tmp_path / "run.json"), before=before)
    code, output, errors = demo.end()
    assert (code, errors) == (0, ""), output
    assert "\x1b" not in output
    assert len(re.findall(r"^ok      ", output, re.MULTILINE)) == 7
    assert "FAILED" not in output

    shared, private, none = figures(r"hits on the dead service: (\d+) shared, (\d+) private, (\d+) without", output)
    assert 5 <= shared < private < none
    probes, half_open, private_probes = figures(r"probes: (\d+) in (\d+) .* sent (\d+)", output)
    run = output[output.index("run 3 of 3") :]
    assert probes == half_open == run.count("open -> half_open") < private_probes
    assert run.count("closed -> open (failure_threshold)") == 1
    assert run.count("half_open -> closed (probe_succeeded)") == 1
    table = [line.split() for line in output.splitlines() if line.startswith(tuple(plan.GUARDS.values()))]
    assert [int(row[-4]) for row in table[1:]] == [private, shared]
    assert [int(row[-2]) for row in table[1:]] == [4, 1]
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert recorded["hits"] == {"none": none, "private": private, "shared": shared}
    ended = [how for calls in recorded["calls"] for _, how in calls]
    assert sum(how.startswith("probe ") for how in ended) == probes
    assert ended.count("rejected") == int(table[2][-3])
    assert [new for _, _, new in recorded["transitions"]].count("half_open") == half_open
    wait_until(lambda: not demo.living())


@needs_proc
def test_ctrl_c_ends_everything(start: Callable[..., Demo], client: redis.Redis, server: EmbeddedServer) -> None:
    """Ctrl-C while the shared breaker is open: code 130, no traceback, no process, no key of its own."""
    client.set("somebody", "else's")
    demo = start("--plain", "--workers", "5", before=TO_THE_THIRD_RUN, REDIS_URL=server.url)
    demo.read_until("run 3 of 3")
    demo.read_until("closed -> open")
    assert len(client.keys("circuit_breaker:demo-*")) == 1
    demo.interrupt()
    code, _, errors = demo.end()
    assert (code, errors) == (130, "interrupted\n")
    wait_until(lambda: not demo.living())
    assert client.keys() == [b"somebody"]


@needs_proc
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_an_early_end_leaves_nothing(how: str, start: Callable[..., Demo]) -> None:
    """However it ends while its processes start, none of them remains, nor does its server."""
    demo = start("--plain")
    demo.read_until("processes call")
    if how == "Ctrl-C":
        demo.interrupt()
    else:
        demo.process.send_signal(signal.Signals[how])
    code, _, errors = demo.end()
    assert code == {"Ctrl-C": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}[how]
    assert "Traceback" not in errors
    wait_until(lambda: not demo.living())


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PYBREAKER_REDIS_SERVER": "/nowhere/redis-server"}, "/nowhere/redis-server"),
        ({"REDIS_URL": "unix:///nowhere/r.sock"}, "REDIS_URL"),
        ({"REDIS_URL": "nonsense"}, "REDIS_URL"),
    ],
    ids=["no binary", "no server", "no URL"],
)
def test_without_a_server(environment: dict[str, str], says: str, start: Callable[..., Demo]) -> None:
    """One message on stderr and code 2, no traceback."""
    code, output, errors = start(**environment).end()
    assert (code, output) == (2, "")
    assert says in errors
    assert "Traceback" not in errors


def test_a_closed_pipe(start: Callable[..., Demo]) -> None:
    """`demo | head -1` ends it without a traceback."""
    demo = start()
    demo.read_until("processes call")
    assert demo.process.stdout is not None
    demo.process.stdout.close()
    assert demo.process.stderr is not None
    assert demo.process.stderr.read() == ""
    assert demo.process.wait(30) == 141


@pytest.mark.parametrize("workers", ["1", "33", "x"])
def test_worker_count_out_of_range(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One worker proves nothing and 33 may be too many for this machine: the message names the option."""
    with pytest.raises(SystemExit) as left:
        main(["--workers", workers])
    assert left.value.code == 2
    assert "--workers" in capsys.readouterr().err


def test_a_process_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer) -> None:
    """A process that hangs ends the demo with an error, and every process is gone, the hung one too."""
    monkeypatch.setattr(crew, "PATIENCE", 0.3)
    with Crew(2, server.url, "demo-hangs", Policy()) as started:
        pids = [process.pid for process in started._processes]
        os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"has not answered for 0\.3 s"):
            started.ready()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# Promises: made-up results in which all hold, then results in which one does not

MOVES: list[tuple[Any, Any]] = [
    ("closed", "open"),
    ("open", "half_open"),
    ("half_open", "open"),
    ("open", "half_open"),
    ("half_open", "closed"),
]


@dataclasses.dataclass
class Figures:
    """The figures that promises() checks, in a form that a test can change."""

    hits: dict[str, int] = dataclasses.field(default_factory=lambda: {"none": 500, "private": 40, "shared": 12})
    moves: list[tuple[Any, Any]] = dataclasses.field(default_factory=lambda: list(MOVES))
    notified: list[tuple[Any, Any]] = dataclasses.field(default_factory=lambda: list(MOVES))
    private_trips: int = 4
    private_probes: int = 24
    probes: int = 2
    tripped: float = 100.05
    rejecting: float | None = 100.10
    answering: float | None = 103.40
    state: str = "closed"

    def held(self) -> list[bool]:
        """Whether each promise held."""
        return [promise.held for promise in self.promises()]

    def promises(self) -> list[Promise]:
        """What promises() makes of these figures."""
        runs = {
            "none": Run(self.hits["none"], self._tallies(), {}),
            "private": Run(
                self.hits["private"], self._tallies(probes=self.private_probes, transitions=self._private()), {}
            ),
            "shared": Run(self.hits["shared"], self._tallies(probes=self.probes, transitions=self._shared()), BEGAN),
        }
        history = [
            HistoryEntry(
                time=0.0, old=old, new=new, reason="", generation=1 + n, failure_count=0, success_count=0, instance=""
            )
            for n, (old, new) in enumerate(self.moves)
        ]
        return promises(runs, history, self.state)

    def _tallies(self, probes: int = 0, transitions: list[Any] | None = None) -> tuple[Tally, ...]:
        """Four workers: the first made all probes and got all notifications, the last is the slowest."""
        early = {"rejecting_since": 100.06, "answering_since": 103.10}
        tallies = [Tally(number, 1000 + number, **early) for number in range(1, 5)]
        tallies[0].probes, tallies[0].transitions = probes, transitions or []
        tallies[-1].rejecting_since, tallies[-1].answering_since = self.rejecting, self.answering
        return tuple(tallies)

    def _shared(self) -> list[Any]:
        return [notification(self.tripped + n, old, new, 1 + n) for n, (old, new) in enumerate(self.notified)]

    def _private(self) -> list[Any]:
        return [notification(50.0, "closed", "open", n) for n in range(self.private_trips)]


BEGAN = {"dead": 100.0, "repaired": 103.0}


def notification(at: float, old: Any, new: Any, generation: int) -> tuple[float, Event]:
    """A transition as a worker stores it."""
    return at, Event("state_change", "demo", "me", old=old, new=new, reason="r", generation=generation)


def test_promises_that_hold() -> None:
    """The results that the next test varies hold, and each of their lines fits a terminal of 80 columns."""
    assert Figures().held() == [True] * 7
    assert max(len(f"{'FAILED':8}{promise.text}") for promise in Figures().promises()) <= 80


@pytest.mark.parametrize(
    ("broken", "changes"),
    [
        (0, {"hits": {"none": 500, "private": 40, "shared": 40}}),
        (0, {"hits": {"none": 500, "private": 100, "shared": 23}}),  # the most is 4 * 4 + 1 + 3 + 2 probes = 22
        (0, {"hits": {"none": 40, "private": 40, "shared": 12}}),
        (0, {"hits": {"none": 500, "private": 40, "shared": 0}}),
        (1, {"moves": [*MOVES, ("closed", "open")], "notified": [*MOVES, ("closed", "open")]}),
        (1, {"private_trips": 3}),
        (2, {"tripped": 99.9}),
        (3, {"rejecting": 101.2}),
        (3, {"rejecting": None}),
        (4, {"probes": 3}),
        (4, {"probes": 1}),
        (4, {"private_probes": 2}),
        (5, {"notified": MOVES[:-1]}),
        (5, {"notified": [*MOVES, ("half_open", "closed")]}),
        (6, {"answering": 104.6}),
        (6, {"answering": None}),
        (6, {"state": "open"}),
    ],
)
def test_a_promise_that_does_not_hold(broken: int, changes: dict[str, Any]) -> None:
    """Each promise fails on figures that break it, and no other does."""
    assert Figures(**changes).held() == [number != broken for number in range(7)]


def test_no_trip_at_all() -> None:
    """A breaker that never opened keeps no promise that is about opening."""
    held = Figures(
        moves=[], notified=[], probes=0, rejecting=None, hits={"none": 500, "private": 40, "shared": 490}
    ).held()
    assert held[:5] == [False] * 5


def test_a_broken_promise_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A promise that does not hold has FAILED in its line, and the exit code is 1."""
    for guard in plan.GUARDS:
        monkeypatch.setitem(plan.PHASES, guard, (("dead", 0.2), ("repaired", 0.2)))
    monkeypatch.setattr(proof, "ANSWERING_WITHIN", -1.0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--plain", "--workers", "2"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert re.search(r"^FAILED  .*after the repair", capsys.readouterr().out, re.MULTILINE)


def test_the_table_on_a_terminal() -> None:
    """Each process has a line; the shared state and the transitions are below."""
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=100, force_terminal=True)
    live = pytest.importorskip("rich.live").Live(console=console, auto_refresh=False)
    tally = Tally(1, 4711, calls=62, failed=3, rejected=20, probes=1, state="half_open")
    tally.transitions.append(notification(0.0, "closed", "open", 1))
    with live:
        Live(live).show(Moment("shared", "dead", 0.5, [tally], "open, probe in 0.3 s"))
        live.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "run 3 of 3: one shared breaker" in shown
    assert re.search(r"1: 4711 │\s+62 │\s+42 │\s+3 │\s+20 │\s+1 │ half_open", shown)
    assert "the breaker: open, probe in 0.3 s" in shown
    assert "closed -> open (r), notified process 1" in shown
