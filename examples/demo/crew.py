"""The processes of the demo, as its main process starts, directs and ends them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from pybreaker_redis import Policy

from .service import Hits, serve_http
from .workers import Tally, work

PATIENCE = 15.0  # seconds that a process may take to answer
GRACE = 1.0  # seconds that the processes may take to end
_SPAWN = multiprocessing.get_context("spawn")


class Crew:
    """The service and the workers, for a `with` block."""

    def __init__(self, workers: int, url: str, name: str, policy: Policy) -> None:
        self._tallies: dict[int, Tally] = {}
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        multiprocessing.resource_tracker.ensure_running()  # the first start would do it, and unblock SIGINT
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            # the children inherit the mask: Ctrl-C reaches the whole group, but only the main process may act on it
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
            pipe.close()  # each process ends when its pipe does
        deadline = monotonic() + GRACE
        for process in self._processes:
            process.join(max(deadline - monotonic(), 0.0))
            process.kill()
        for process in self._processes:
            process.join()

    def ready(self) -> None:
        """Wait until all processes have started."""
        self._port = _receive(self._service)
        self._settle()

    def enter(self, phase: str) -> Hits:
        """Start a phase of the service. Returns the hits that the service counted before it."""
        self._service.send(phase)
        hits: Hits = _receive(self._service)
        return hits

    def begin(self, guard: str) -> None:
        """Let the workers call under this guard."""
        self._tallies.clear()
        for pipe in self._pipes:
            pipe.send((guard, self._port))

    def tallies(self) -> list[Tally]:
        """The last figures that each worker reported."""
        for pipe in self._pipes:
            while pipe.poll():
                self._take(pipe)
        return [tally for _, tally in sorted(self._tallies.items())]

    def end(self) -> None:
        """Stop the workers, and wait for their last figures."""
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
