"""What does the operators' page cost with 10,000 breakers and 20 viewers, and when does a trip reach all screens?"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import pathlib
import statistics
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import redis
import uvicorn

from pybreaker_redis import CircuitBreaker, Policy
from pybreaker_redis._protocol import keys_of
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.web import breakers_app

RESULTS = pathlib.Path(__file__).parent / "results" / "web.json"
POLICY = Policy(failure_threshold=1, reset_timeout=600, error_rate_threshold=0.9)
TARGETS = {"server_idle": 0.3, "app_idle": 3.0, "app_trips": 3.0, "p99_ms": 100.0}
EVERY = 1.0  # seconds between two trips


def populate(client: redis.Redis, breakers: int) -> None:
    """So many healthy breakers, each with a window."""
    model = CircuitBreaker("model", redis=client, policy=POLICY, lease=0)
    model.call(int)
    stored = client.get(model.keys.state)
    client.delete(model.keys.state)
    for start in range(0, breakers, 1000):
        numbers = range(start, min(start + 1000, breakers))
        client.mset({keys_of(f"service-{number:05}").state: stored for number in numbers})


def serve(url: str, port: int) -> None:
    """The page in a process of its own."""
    uvicorn.run(breakers_app(url), port=port, log_level="error")


async def look(port: int, seen: dict[tuple[int, str], float], viewer: int, ready: asyncio.Event) -> None:
    """One viewer: notes when each breaker that has opened appears."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    writer.write(b"GET /events?group=open HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while True:
        line = await reader.readline()
        if not line.startswith(b"data:"):
            continue
        ready.set()
        at = time.monotonic()
        for name in json.loads(line[5:])["rows"]:
            seen.setdefault((viewer, name), at)


async def watch(port: int, viewers: int, client: redis.Redis, trips: int, idle: float, app: int) -> dict[str, Any]:
    """The figures of an idle time and of so many trips."""
    seen: dict[tuple[int, str], float] = {}
    ready = [asyncio.Event() for _ in range(viewers)]
    tasks = [asyncio.create_task(look(port, seen, number, event)) for number, event in enumerate(ready)]
    await asyncio.gather(*(event.wait() for event in ready))
    await asyncio.sleep(3)
    before = cpu(client, app)
    await asyncio.sleep(idle)
    figures = {f"{part}_idle": used for part, used in shares(before, cpu(client, app)).items()}
    before, tripped = cpu(client, app), {}
    for number in range(trips):
        name = f"service-{number * 37:05}"
        permit = await asyncio.to_thread(CircuitBreaker(name, redis=client, policy=POLICY, lease=0).acquire)
        await asyncio.to_thread(permit.failure, ConnectionError("refused"))
        tripped[name] = time.monotonic()
        await asyncio.sleep(EVERY)
    figures |= {f"{part}_trips": used for part, used in shares(before, cpu(client, app)).items()}
    await asyncio.sleep(2)
    for task in tasks:
        task.cancel()
    delays = sorted(1000 * (seen[viewer, name] - at) for name, at in tripped.items() for viewer in range(viewers))
    figures |= {"p50_ms": statistics.median(delays), "p99_ms": delays[len(delays) * 99 // 100], "most_ms": delays[-1]}
    return figures


def cpu(client: redis.Redis, app: int) -> dict[str, float]:
    """Seconds of CPU time used so far, and the time."""
    info = client.info("cpu")
    fields = pathlib.Path(f"/proc/{app}/stat").read_text().rpartition(")")[2].split()
    return {
        "server": info["used_cpu_user"] + info["used_cpu_sys"],
        "app": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "at": time.monotonic(),
    }


def shares(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Percent of a core."""
    passed = after["at"] - before["at"]
    return {part: 100 * (after[part] - before[part]) / passed for part in ("server", "app")}


def report(figures: dict[str, float]) -> Iterator[str]:
    """A line for each figure."""
    units = {"ms": "ms"}
    for name, value in figures.items():
        target = f"  target {TARGETS[name]:g}" if name in TARGETS else ""
        yield f"{name:<14}{value:8.2f} {units.get(name.rpartition('_')[2], '% of a core'):<12}{target}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--breakers", type=int, default=10_000)
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--trips", type=int, default=60)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds")
    given = parser.parse_args()
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        populate(client, given.breakers)
        with EmbeddedServer(port=0) as spare:  # its port is free once it has ended
            port = urllib.parse.urlsplit(spare.url).port
        app = multiprocessing.get_context("spawn").Process(target=serve, args=(server.url, port), daemon=True)
        app.start()
        for _ in range(200):
            try:
                asyncio.run(asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 1))
                break
            except OSError:
                time.sleep(0.1)
        figures = asyncio.run(watch(port, given.viewers, client, given.trips, given.idle, app.pid))
        app.terminate()
    print(f"{given.breakers} breakers, {given.viewers} viewers, {given.trips} trips")
    print("\n".join(report(figures)))
    RESULTS.write_text(json.dumps({**vars(given), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
