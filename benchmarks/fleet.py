"""What does a fleet cost its Redis, and how fast does it stop calling, for which lease?

Every instance sends what a link sends for a healthy breaker, one read of its keys per lease, over pipelined
connections. No instance is ever idle: an idle one would cost nothing. After a healthy period one instance
reports the failures that trip the breaker. The others learn of the trip when their lease ends. That is the slowest
way: a failing instance learns of a trip from the reply to its own report.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
from multiprocessing.connection import Connection
from time import monotonic, sleep
from typing import Any

import redis

from pybreaker_redis import _protocol
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import commands
from pybreaker_redis.wire.sync import Server

RESULTS = pathlib.Path(__file__).parent / "results" / "fleet.json"
LEASES = (0.1, 0.5, 1.0)
SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)
CALLS_PER_SECOND = 10.0  # of one instance; turns its delay into calls
BATCH = 128  # requests in one pipeline
LONGEST_WAIT = 6.0  # seconds for the whole fleet to learn of a trip
OWN_CONNECTIONS = 200
SAFE_LOAD = 0.6  # of a core, for sizing


class Instance:
    """A process that guards one service: when it learned that the circuit is open."""

    __slots__ = ("learned",)

    def __init__(self) -> None:
        self.learned = 0.0

    def adopt(self, reply: list[bytes | None], now: float) -> None:
        """Take over a read, and note when it is the first that says open."""
        if not self.learned and (reply[0] or b"").startswith(b'{"state":"open"'):
            self.learned = now


def simulate(pipe: Connection, url: str, name: str, lease: float, numbers: range, begin: float, until: float) -> None:
    """Run these instances until all have learned that the circuit is open, and send when each of them did."""
    connection = redis.Redis.from_url(url).connection_pool.get_connection()
    keys = _protocol.keys_of(name)
    instances = [Instance() for _ in numbers]
    # spread over the lease, like processes that were started at random times
    queue = collections.deque((begin + lease * i / len(instances), one) for i, one in enumerate(instances))
    missing, late = len(instances), list[float]()
    while missing and (now := monotonic()) < until:
        due = []
        while queue and len(due) < BATCH and queue[0][0] <= now:
            due.append(queue.popleft())
        if not due:
            sleep(min(max(queue[0][0] - now, 0.0), 0.01))
            continue
        sent = monotonic()
        late.append(sent - due[0][0])
        connection.send_packed_command([commands.packed([commands.read([keys.state.encode()])] * len(due))])
        for _, one in due:
            known = one.learned
            one.adopt(connection.read_response(), monotonic())
            missing -= not known and one.learned > 0
            queue.append((sent + lease, one))
    pipe.send([one.learned for one in instances])
    pipe.close()


def measure(server: EmbeddedServer, lease: float, size: int, seconds: float, processes: int) -> dict[str, Any]:
    """One fleet: its cost while healthy, then how fast it learns of a trip."""
    control = redis.Redis.from_url(server.url)
    name = f"fleet-{size}-{lease}"
    begin = monotonic() + 0.3
    trip_at = begin + 2 * lease + 0.3 + seconds
    workers, pipes = [], []
    for worker in range(min(processes, size)):
        ours, theirs = multiprocessing.Pipe()
        numbers = range(worker, size, processes)
        args = (theirs, server.url, name, lease, numbers, begin, trip_at + LONGEST_WAIT)
        workers.append(multiprocessing.Process(target=simulate, args=args, daemon=True))
        pipes.append(ours)
        workers[-1].start()
    sleep(max(trip_at - seconds - monotonic(), 0.0))
    before = server_work(control)
    sleep(max(trip_at - monotonic(), 0.0))
    after = server_work(control)
    tripped = trip(control, name)
    delays = [learned - tripped if learned else None for pipe in pipes for learned in pipe.recv()]
    for one in workers:
        one.join()
    return row(lease, size, {key: after[key] - before[key] for key in after}, delays)


def cost_of_own_connections(server: EmbeddedServer, seconds: float) -> float:
    """Server microseconds per command without pipelines: every instance has its own connection."""
    control = redis.Redis.from_url(server.url)
    keys = _protocol.keys_of("own-connections")
    pool = redis.Redis.from_url(server.url, max_connections=OWN_CONNECTIONS).connection_pool
    fleet = [(Instance(), pool.get_connection()) for _ in range(OWN_CONNECTIONS)]
    before, end = server_work(control), monotonic() + seconds
    while monotonic() < end:
        for _, connection in fleet:
            connection.send_command(*commands.read([keys.state.encode()]).words)
        for one, connection in fleet:
            one.adopt(connection.read_response(), monotonic())
    after = server_work(control)
    for _, connection in fleet:
        connection.disconnect()
    return (after["cpu"] - before["cpu"]) / (after["commands"] - before["commands"]) * 1e6


def server_work(control: redis.Redis) -> dict[str, float]:
    """Seconds, commands and CPU of the server so far."""
    cpu, stat = control.info("cpu"), control.info("commandstats")["cmdstat_mget"]
    used = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
    return {"at": monotonic(), "commands": stat["calls"], "cpu": used, "script": stat["usec"] / 1e6}


def trip(control: redis.Redis, name: str) -> float:
    """Report five failures in a row. Returns when the reply arrived."""
    keys = _protocol.keys_of(name)

    def run(script: str, request: dict[str, Any]) -> dict[str, Any]:
        return _protocol.decode(control.execute_command(*commands.run(script, keys.state.encode(), request).words))

    reply = run("record", {"generation": run("acquire", {})["generation"], "failures": 5})
    assert reply["state"] == "open", reply
    return monotonic()


def row(lease: float, size: int, spent: dict[str, float], delays: list[float | None]) -> dict[str, Any]:
    """The figures of one fleet."""
    waits = [max(delay, 0.0) for delay in delays if delay is not None]
    commands = spent["commands"] / spent["at"]
    return {
        "lease": lease,
        "instances": size,
        "commands_per_second": commands,
        "due_per_second": size / lease,
        "server_cpu": spent["cpu"] / spent["at"],
        "server_us_per_command": spent["cpu"] / max(spent["commands"], 1) * 1e6,
        "script_us_per_command": spent["script"] / max(spent["commands"], 1) * 1e6,
        "server_cpu_per_instance_us": spent["cpu"] / spent["at"] / size * 1e6,
        "all_reject_seconds": max(waits) if len(waits) == size else None,
        "median_reject_seconds": statistics.median(waits) if waits else None,
        "never_rejected": size - len(waits),
        "let_through": sum(waits) * CALLS_PER_SECOND,
        "kept_up": commands >= 0.9 * size / lease,
    }


def sizing(cost: float) -> dict[str, Any]:
    """Instances times breakers that one Redis core carries. cost: microseconds of a command."""
    return {
        "server_us_per_command": cost,
        "safe_load": SAFE_LOAD,
        "instances_times_breakers": {f"{lease:g}": int(SAFE_LOAD * lease / cost * 1e6) for lease in LEASES},
    }


def print_all(found: dict[str, Any]) -> None:
    """The table, and the sizes that follow from it."""
    print(f"{'lease':>5} {'instances':>9} {'commands/s':>10} {'due':>8} {'CPU %':>6} {'us/command':>10}", end="")
    print(f" {'us/s/instance':>13} {'median s':>8} {'all s':>6} {'let through':>11}")
    for one in found["rows"]:
        last = "-" if one["all_reject_seconds"] is None else f"{one['all_reject_seconds']:.3f}"
        median = "-" if one["median_reject_seconds"] is None else f"{one['median_reject_seconds']:.3f}"
        print(
            f"{one['lease']:>5g} {one['instances']:>9,} {one['commands_per_second']:>10,.0f}"
            f" {one['due_per_second']:>8,.0f} {one['server_cpu'] * 100:>6.1f} {one['server_us_per_command']:>10.1f}"
            f" {one['server_cpu_per_instance_us']:>13.1f} {median:>8} {last:>6} {one['let_through']:>11,.0f}"
            + ("" if one["kept_up"] else "  (did not keep up)")
        )
    print("CPU, us/command: requests that are due together are pipelined, which saves the server reads and writes")
    size = found["sizing"]
    print(f"\nlet through: after the trip, in the whole fleet, at {CALLS_PER_SECOND:g} calls per second and instance")
    cost = f"{size['server_us_per_command']:.1f} us of server CPU per command on a connection of its own"
    print(f"one core at {size['safe_load']:.0%}, {cost}:")
    for lease, many in size["instances_times_breakers"].items():
        print(f"  lease {lease} s: {many:,} instances x breakers; more: a longer lease, or shards of a cluster")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few fleets, short: to see that it runs")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--json", type=pathlib.Path, help="where to write (default results/fleet.json; quick: nowhere)")
    options = parser.parse_args()
    sizes, seconds = ((10, 1000), 1.0) if options.quick else (SIZES, 3.0)
    rows = []
    with EmbeddedServer() as server:
        control = redis.Redis.from_url(server.url)
        server_of_scripts = Server(control, 1.0)
        key = _protocol.keys_of("first").state.encode()
        for script in ("acquire", "record"):  # loads them
            server_of_scripts.run(script, key, {"generation": 0} if script == "record" else {})
        version = control.info("server").get("valkey_version") or control.info("server")["redis_version"]
        cost = cost_of_own_connections(server, seconds)
        for lease in LEASES:
            for size in sizes:
                print(f"measuring: {size:,} instances, lease {lease:g} s", file=sys.stderr)
                rows.append(measure(server, lease, size, seconds, options.processes))
    facts = {"python": platform.python_version(), "cpus": os.cpu_count(), "server": version}
    facts["processes"] = options.processes
    found = {"machine": facts, "calls_per_second": CALLS_PER_SECOND, "rows": rows, "sizing": sizing(cost)}
    print_all(found)
    target = options.json or (None if options.quick else RESULTS)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
