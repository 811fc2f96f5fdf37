"""How long after a trip does every process reject, watching and not?"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis.embedded import EmbeddedServer

RESULTS = pathlib.Path(__file__).parent / "results" / "watch.json"
POLICY = Policy(failure_threshold=1, reset_timeout=600)
# Seconds between two rounds: a process makes at most ten exchanges in a tenth of a second, whatever is published.
PAUSE = 0.2
EVERY = 0.001  # seconds between the calls of a worker


class Boom(Exception):
    """What the service raises."""


def fail() -> None:
    """A dead service."""
    raise Boom


def work(url: str, watched: bool, parent: Connection) -> None:
    """A process that calls all the time. It sends when it is first rejected, and when it is admitted again."""
    breaker = CircuitBreaker("watched" if watched else "plain", redis=url, policy=POLICY)
    if watched:
        watch = breaker.watch()
        while not watch.active:
            time.sleep(EVERY)
    admitted = True
    breaker.call(int)
    parent.send("ready")
    while not parent.poll():
        try:
            breaker.call(int)
            now_admitted = True
        except CircuitOpenError:
            now_admitted = False
        if now_admitted != admitted:
            admitted = now_admitted
            parent.send(time.monotonic())  # one clock for all processes of a machine
        time.sleep(EVERY)


def measure(url: str, watched: bool, processes: int, rounds: int) -> dict[str, Any]:
    """Seconds from the reply that tripped to the first rejection of each process, in each round."""
    breaker = CircuitBreaker("watched" if watched else "plain", redis=url, policy=POLICY, lease=0)
    pipes = [multiprocessing.Pipe() for _ in range(processes)]
    workers = [multiprocessing.Process(target=work, args=(url, watched, pipe[1]), daemon=True) for pipe in pipes]
    for worker in workers:
        worker.start()
    for ours, _ in pipes:
        ours.recv()
    waits, lasts = [], []
    for _ in range(rounds):
        with contextlib.suppress(Boom):
            breaker.call(fail)
        tripped = time.monotonic()
        delays = [ours.recv() - tripped for ours, _ in pipes]
        waits += delays
        lasts.append(max(delays))
        breaker.reset()
        for ours, _ in pipes:
            ours.recv()
        time.sleep(PAUSE)
    for ours, _ in pipes:
        ours.send("end")
    for worker in workers:
        worker.join(10)
    ms = sorted(max(wait, 0.0) * 1000 for wait in waits)
    return {
        "processes": processes,
        "rounds": rounds,
        "p50_ms": statistics.median(ms),
        "p99_ms": ms[min(int(len(ms) * 0.99), len(ms) - 1)],
        "max_ms": ms[-1],
        "median_until_all_ms": statistics.median(lasts) * 1000,
    }


def main() -> None:
    """Measure both, one after the other on one server, and print a table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--processes", type=int, default=8)
    options.add_argument("--rounds", type=int, default=60)
    given = options.parse_args()
    with EmbeddedServer() as server:
        found = {
            "watching": measure(server.url, True, given.processes, given.rounds),
            "not watching": measure(server.url, False, given.processes, given.rounds),
        }
    print(f"\nFrom a trip to the first rejection, {given.processes} processes that call every {EVERY * 1000:g} ms")
    print(f"{'':22}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'all, median ms':>17}")
    for name, row in found.items():
        cells = f"{row['p50_ms']:9.2f}{row['p99_ms']:9.2f}{row['max_ms']:9.2f}{row['median_until_all_ms']:17.2f}"
        print(f"{name:22}{cells}")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
