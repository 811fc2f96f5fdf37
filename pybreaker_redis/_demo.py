"""The demo: an HTTP service that misbehaves on a script, worker processes, and the breaker that they share.

The same death of the service is measured three times: without a breaker, with a private breaker in each
process, with one breaker in Redis. Nothing is simulated: real processes, real HTTP on loopback, a real server.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import http.client
import http.server
import importlib.util
import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import random
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from . import (
    CircuitBreaker,
    CircuitBreakerError,
    CircuitOpenError,
    Event,
    HistoryEntry,
    Permit,
    Policy,
    RedisUnavailableError,
)
from ._protocol import keys_of
from .embedded import serve

GUARDS = {"none": "no breaker", "private": "a private breaker per process", "shared": "one shared breaker"}
DEATH = (("healthy", 0.5), ("dead", 3.0), ("repaired", 1.0))
WHOLE = (("healthy", 1.0), ("failing", 1.5), ("dead", 3.0), ("repaired", 1.5))
SCRIPTS = {"none": DEATH, "private": DEATH, "shared": WHOLE}
PAUSE, TICK, PATIENCE, GRACE = 0.02, 0.1, 15.0, 1.0
RESET_TIMEOUT = 0.5
FAILS_EVERY = 4  # while failing: this one of each worker's calls
REJECTING_WITHIN, ANSWERING_WITHIN = 1.0, 1.5
COLOURS = {"closed": "green", "half_open": "yellow", "open": "red", "failing": "yellow", "dead": "red"}
Guard: TypeAlias = AbstractContextManager[Permit | None, bool | None]
Hits: TypeAlias = collections.Counter[tuple[str, str]]  # by phase and path
_SPAWN = multiprocessing.get_context("spawn")


@dataclasses.dataclass
class Tally:
    """What one worker saw in one run. Times are of the monotonic clock, which processes share."""

    number: int
    pid: int
    calls: int = 0
    failed: int = 0
    rejected: int = 0
    probes: int = 0
    sees: str = "-"
    rejecting_since: float | None = None
    answering_since: float | None = None
    told: list[tuple[float, Event]] = dataclasses.field(default_factory=list)

    @property
    def admitted(self) -> int:
        """The calls that the breaker let through."""
        return self.calls - self.rejected

    def hear(self, event: Event) -> None:
        """The breaker's listener."""
        if event.kind == "state_change":
            self.told.append((monotonic(), event))


class Run(NamedTuple):
    """One run of the script. hits: on the dead service, by its own count. began: when each phase did."""

    hits: int
    tallies: tuple[Tally, ...]
    began: dict[str, float]

    @property
    def probes(self) -> int:
        """Calls that the workers made as probes."""
        return sum(tally.probes for tally in self.tallies)

    @property
    def told(self) -> list[tuple[float, Event]]:
        """The transitions that the workers were told, and when."""
        return [told for tally in self.tallies for told in tally.told]

    @property
    def trips(self) -> list[float]:
        """When each trip closed -> open was told."""
        return [at for at, event in self.told if (event.old, event.new) == ("closed", "open")]


class Promise(NamedTuple):
    """What was promised, with the measured figures, and whether it held."""

    held: bool
    text: str


# The service


class _Service(http.server.ThreadingHTTPServer):
    """Behaves as its phase says and counts the calls that reached it."""

    phase = "healthy"
    request_queue_size = 128  # with the default of 5 a connection beyond waits a second, in TCP

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hits: Hits = collections.Counter()
        self._lock = threading.Lock()

    def status_for(self, path: str) -> int | None:
        """The answer to a call; None for none at all."""
        with self._lock:
            phase = self.phase
            self.hits[phase, path] += 1
            fails = phase == "failing" and self.hits[phase, path] % FAILS_EVERY == 0
        return None if phase == "dead" else 500 if fails else 200

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that hung up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Service

    def do_GET(self) -> None:
        status = self.server.status_for(self.path)
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Keep the terminal to the demo."""


def serve_http(pipe: Connection) -> None:
    """The service's process: sends its port, then takes phases and answers each with all hits so far."""
    service = _Service()
    threading.Thread(target=service.serve_forever, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the demo is gone
        pipe.send(service.server_port)
        while True:
            service.phase = pipe.recv()
            pipe.send(service.hits.copy())


# The workers


def work(pipe: Connection, number: int, url: str, name: str, policy: Policy) -> None:
    """A worker's process: for each (guard, port) that it takes, calls until it takes the next message."""
    with contextlib.suppress(EOFError, ConnectionError):  # the demo is gone
        while True:
            pipe.send(None)
            kind, port = pipe.recv()
            tally = Tally(number, os.getpid())
            guard = _guard(kind, name, url, policy, tally)
            service = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
            _call_until_told(pipe, tally, guard, functools.partial(_get, service, f"/{kind}/{number}"))


def _guard(kind: str, name: str, url: str, policy: Policy, tally: Tally) -> Guard:
    if kind == "none":
        return contextlib.nullcontext()
    shared = url if kind == "shared" else None
    return CircuitBreaker(name, redis=shared, policy=policy, listeners=[tally.hear], redis_timeout=1.0)


def _call_until_told(pipe: Connection, tally: Tally, guard: Guard, get: Callable[[], None]) -> None:
    due = 0.0
    while not pipe.poll(random.uniform(0.5, 1.5) * PAUSE):
        _call(tally, guard, get)
        if monotonic() >= due:
            due = monotonic() + TICK
            pipe.send(tally)
    pipe.recv()
    pipe.send(tally)


def _call(tally: Tally, guard: Guard, get: Callable[[], None]) -> None:
    tally.calls += 1
    try:
        with guard as permit:
            if permit is not None:
                tally.probes += permit.probe is not None
                tally.sees = "closed" if permit.probe is None else "half_open"
            get()
    except CircuitOpenError as error:
        tally.rejected += 1
        tally.sees, tally.answering_since = error.state, None
        tally.rejecting_since = tally.rejecting_since or monotonic()
    except (OSError, http.client.HTTPException):
        tally.failed += 1
        tally.answering_since = None
    else:
        tally.answering_since = tally.answering_since or monotonic()


def _get(service: http.client.HTTPConnection, path: str) -> None:
    try:
        service.request("GET", path)
        with service.getresponse() as response:
            response.read()
            if response.status != 200:
                raise http.client.HTTPException(f"status {response.status}")
    except (OSError, http.client.HTTPException):
        service.close()
        raise


# The conductor


class Crew:
    """The processes of the demo, for a `with` block: the service and the workers."""

    def __init__(self, workers: int, url: str, name: str, policy: Policy) -> None:
        self._tallies: dict[int, Tally] = {}
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        multiprocessing.resource_tracker.ensure_running()  # else the first start would do it, and unblock
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            # they inherit the mask: Ctrl-C reaches the whole group, and only the conductor is to hear it
            self._service = self._start(serve_http)
            self._pipes = [self._start(work, number, url, name, policy) for number in range(1, workers + 1)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _start(self, target: Callable[..., None], *arguments: Any) -> Connection:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        self._processes.append(process)
        theirs.close()
        return ours

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._service, *self._pipes):
            pipe.close()  # at which each of them ends by itself
        deadline = monotonic() + GRACE
        for process in self._processes:
            process.join(max(deadline - monotonic(), 0.0))
            process.kill()
        for process in self._processes:
            process.join()

    def ready(self) -> None:
        """Wait until all have started."""
        self._port = _receive(self._service)
        self._settle()

    def enter(self, phase: str) -> Hits:
        """Let the service enter a phase; the hits that it counted before."""
        self._service.send(phase)
        hits: Hits = _receive(self._service)
        return hits

    def begin(self, guard: str) -> None:
        """Let the workers call."""
        self._tallies.clear()
        for pipe in self._pipes:
            pipe.send((guard, self._port))

    def listen(self) -> list[Tally]:
        """What the workers reported last."""
        for pipe in self._pipes:
            while pipe.poll():
                self._take(pipe)
        return [tally for _, tally in sorted(self._tallies.items())]

    def end(self) -> None:
        """Let the workers stop and report."""
        for pipe in self._pipes:
            pipe.send("stop")
        self._settle()

    def _settle(self) -> None:
        for pipe in self._pipes:
            while self._take(pipe):
                pass

    def _take(self, pipe: Connection) -> bool:
        tally: Tally | None = _receive(pipe)
        if tally is not None:
            self._tallies[tally.number] = tally
        return tally is not None


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE):
        raise RuntimeError(f"a process of the demo has not answered for {PATIENCE:g} s")
    return pipe.recv()


def perform(kind: str, crew: Crew, breaker: CircuitBreaker, screen: Plain) -> Run:
    """Let the workers call under one kind of guard while the service goes through the script."""
    began: dict[str, float] = {}
    screen.announce(kind)
    crew.begin(kind)
    for phase, lasts in SCRIPTS[kind]:
        began[phase] = monotonic()
        crew.enter(phase)
        while (left := began[phase] + lasts - monotonic()) > 0:
            tallies = crew.listen()
            screen.show(Moment(kind, phase, 1 - left / lasts, tallies, _state(kind, breaker, tallies)))
            sleep(min(left, TICK))
    crew.end()
    tallies = crew.listen()
    screen.show(Moment(kind, phase, 1.0, tallies, _state(kind, breaker, tallies)))
    hits = crew.enter("healthy")
    return Run(sum(hits["dead", f"/{kind}/{tally.number}"] for tally in tallies), tuple(tallies), began)


def _state(kind: str, breaker: CircuitBreaker, tallies: list[Tally]) -> str:
    if kind == "none":
        return "no breaker"
    if kind == "private":
        return ", ".join(f"{count} {sees}" for sees, count in collections.Counter(t.sees for t in tallies).items())
    snapshot = breaker.snapshot()
    wait = f", probe in {snapshot.retry_after:.1f} s" if snapshot.state == "open" and snapshot.retry_after else ""
    return f"{snapshot.state}{wait}"


# The screens


class Moment(NamedTuple):
    """What a screen shows. done: of the phase, from 0 to 1."""

    kind: str
    phase: str
    done: float
    tallies: list[Tally]
    state: str


def title(kind: str) -> str:
    """Of a run."""
    return f"run {[*GUARDS].index(kind) + 1} of {len(GUARDS)}: {GUARDS[kind]}"


class Plain:
    """Lines for a pipe: one about every second, and one for each transition."""

    def __init__(self) -> None:
        self._began = monotonic()
        self._due = 0.0
        self._heard: dict[tuple[str, int], int] = {}

    def say(self, line: str) -> None:
        """One line that stays."""
        print(line, flush=True)

    def announce(self, kind: str) -> None:
        """The head of a run."""
        self.say(f"\n{title(kind)} [process: admitted/failed/rejected]")
        self._due = 0.0

    def show(self, moment: Moment) -> None:
        """The present state of things."""
        for line in self._news(moment):
            self.say(line)
        if moment.tallies and monotonic() >= self._due:
            self._due = monotonic() + 1.0
            counts = "  ".join(f"{t.number}: {t.admitted}/{t.failed}/{t.rejected}" for t in moment.tallies)
            self.say(f"{self._time(monotonic())}  {moment.phase:8}  {moment.state:24}  {counts}")

    def _time(self, at: float) -> str:
        return f"{at - self._began:5.1f} s"

    def _news(self, moment: Moment) -> Iterator[str]:
        for tally in moment.tallies:
            key = (moment.kind, tally.number)
            for at, event in tally.told[self._heard.get(key, 0) :]:
                # private breakers probe on their own and often: their trips and closes are enough
                if moment.kind == "shared" or "closed" in (event.old, event.new):
                    yield f"{self._time(at)}  * {event.old} -> {event.new} ({event.reason}), told to {tally.number}"
            self._heard[key] = len(tally.told)


class Live(Plain):
    """A table that changes in place, in a rich.live.Live."""

    def __init__(self, live: Any) -> None:
        super().__init__()
        self._live = live
        self._lines: collections.deque[str] = collections.deque(maxlen=8)

    def announce(self, kind: str) -> None:
        """The head of a run is in the frame."""
        self._lines.clear()

    def show(self, moment: Moment) -> None:
        """The present state of things."""
        self._lines.extend(self._news(moment))
        self._live.update(_frame(moment, self._lines))


def _frame(moment: Moment, lines: Iterable[str]) -> Any:
    from rich.console import Group
    from rich.table import Table

    table = Table()
    for column in ("process: pid", "calls", "admitted", "failed", "rejected", "probes"):
        table.add_column(column, justify="right")
    table.add_column("sees", min_width=9)
    for t in moment.tallies:
        figures = (t.calls, t.admitted, t.failed, t.rejected, t.probes)
        table.add_row(f"{t.number}: {t.pid}", *map(str, figures), _coloured(t.sees))
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


# The proof


def promises(runs: dict[str, Run], history: list[HistoryEntry], state: str) -> list[Promise]:
    """What the shared breaker promises, held against the figures of all runs, its history and its last state."""
    none, private, shared = (runs[kind] for kind in GUARDS)
    workers = len(shared.tallies)
    trips = sum((entry.old, entry.new) == ("closed", "open") for entry in history)
    half_open = sum(entry.new == "half_open" for entry in history)
    generations = [event.generation or 0 for _, event in shared.told]
    tripped = min(shared.trips, default=float("-inf"))  # without a trip no promise about it holds
    after = tripped - shared.began["dead"]
    rejecting = _until_all((tally.rejecting_since for tally in shared.tallies), tripped)
    answering = _until_all((tally.answering_since for tally in shared.tallies), shared.began["repaired"])
    return [
        Promise(
            0 < shared.hits <= most_hits(workers, shared.probes) and shared.hits < private.hits < none.hits,
            f"hits on the dead service: {shared.hits} shared, {private.hits} private, {none.hits} without a breaker",
        ),
        Promise(
            trips == len(shared.trips) == 1 and len(private.trips) == workers,
            f"trips: {trips}, told to {len(shared.trips)} of {workers} processes;"
            f" private breakers tripped {len(private.trips)} times",
        ),
        Promise(
            after > 0,
            f"closed while every {FAILS_EVERY}th call failed, tripped {after:.3f} s after the death",
        ),
        Promise(
            rejecting <= REJECTING_WITHIN,
            f"every process rejected {max(rejecting, 0.0):.3f} s after the trip (promised: {REJECTING_WITHIN:g} s)",
        ),
        Promise(
            0 < shared.probes == half_open and shared.probes < private.probes,
            f"probes: {shared.probes} in {half_open} half-open times; private breakers sent {private.probes}",
        ),
        Promise(
            sorted(generations) == sorted(entry.generation for entry in history),
            f"transitions: {len(history)} in the history, {len(generations)} told, each to one process",
        ),
        Promise(
            answering <= ANSWERING_WITHIN and state == "closed",
            f"{state} again, every process served {answering:.3f} s after repair (promised: {ANSWERING_WITHIN:g} s)",
        ),
    ]


def most_hits(workers: int, probes: int) -> int:
    """The hits that a shared breaker allows a dead service at the most.

    Each worker can break the run of failures once, with its last successes; when the trip comes each of the
    others can have one call under way.
    """
    return workers * (failure_threshold(workers) - 1) + 1 + (workers - 1) + probes


def failure_threshold(workers: int) -> int:
    """More than the workers: between two failures of one in the failing phase lies a success of its own."""
    return workers + 1


def _until_all(times: Iterable[float | None], since: float) -> float:
    return max(float("inf") if time is None else time - since for time in times)


def summary(runs: dict[str, Run]) -> Iterator[str]:
    """A table of the three runs."""
    yield f"\n{'3 s of a dead service':29}{'hits on it':>10}{'rejected':>10}{'trips':>8}{'probes':>8}"
    for kind, run in runs.items():
        rejected = sum(tally.rejected for tally in run.tallies)
        figures = "".join(f"{figure:8}" for figure in (len(run.trips), run.probes)) if kind != "none" else ""
        yield f"{GUARDS[kind]:29}{run.hits:10}{rejected:10}{figures}"
    yield ""


def report(runs: dict[str, Run], held: Iterable[Promise]) -> dict[str, Any]:
    """The same for a program."""
    return {
        "runs": {
            kind: {
                "hits": run.hits,
                "rejected": sum(tally.rejected for tally in run.tallies),
                "trips": len(run.trips),
                "probes": run.probes,
            }
            for kind, run in runs.items()
        },
        "promises": [{"held": promise.held, "text": promise.text} for promise in held],
    }


# The command


def main(workers: int, *, plain: bool, use_json: bool = False) -> int:
    """Run the demo; 0 when every promise held, 1 when not, 2 without a server, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with serve() as url:
            return _demonstrate(workers, url, plain, use_json)
    except CircuitBreakerError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


@contextlib.contextmanager
def _screen(plain: bool) -> Iterator[Plain]:
    if plain or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield Plain()
        return
    import rich.live

    with rich.live.Live(refresh_per_second=10) as live:
        yield Live(live)


def _demonstrate(workers: int, url: str, plain: bool, use_json: bool) -> int:
    with contextlib.redirect_stdout(sys.stderr) if use_json else contextlib.nullcontext():
        runs, held = _run(workers, url, plain or use_json)
    if use_json:
        print(json.dumps(report(runs, held), indent=2), flush=True)
    else:
        print(*summary(runs), sep="\n")
        print(*(f"{'ok' if promise.held else 'FAILED':8}{promise.text}" for promise in held), sep="\n", flush=True)
    return 0 if all(promise.held for promise in held) else 1


def _run(workers: int, url: str, plain: bool) -> tuple[dict[str, Run], list[Promise]]:
    name = f"demo-{os.getpid()}-{secrets.token_hex(4)}"
    policy = Policy(failure_threshold=failure_threshold(workers), reset_timeout=RESET_TIMEOUT, probe_timeout=5.0)
    with _own_keys(url, keys_of(name)), Crew(workers, url, name, policy) as crew:
        breaker = CircuitBreaker(name, redis=url, policy=policy, redis_timeout=1.0)
        threshold = policy.failure_threshold
        print(
            f"{workers} processes call an HTTP service that dies; {threshold} failures in a row are a trip",
            flush=True,
        )
        crew.ready()
        with _screen(plain) as screen:
            runs = {kind: perform(kind, crew, breaker, screen) for kind in GUARDS}
        return runs, promises(runs, breaker.history(), breaker.snapshot().state)


@contextlib.contextmanager
def _own_keys(url: str, keys: Iterable[str]) -> Iterator[None]:
    """A server that answers before the block, and without our keys after it."""
    try:
        client = redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0, retry=Retry(NoBackoff(), 0))
        client.ping()
    except (redis.RedisError, ValueError) as error:
        raise RedisUnavailableError(f"no server for the demo answers at REDIS_URL: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(redis.RedisError):
            client.delete(*keys)
