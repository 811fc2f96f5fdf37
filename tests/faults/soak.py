"""A soak: several processes under load while one fault after the other hits their Redis, in random order.

    python tests/faults/soak.py [SECONDS] [--seed N]

Fails when anything but CircuitOpenError reaches a caller, when a process does not find back to Redis, when calls wait
too long, when the memory of a process or of the server grows, or when anything that the server stored, at any time of
the run, breaks a rule of tests/invariants.py: an illegal transition, a generation that does not grow, a probe too many.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent)]

from fault_load import LOADS, TIMEOUT, Loads, loads  # noqa: E402
from fault_proxy import FaultProxy, proxy_to  # noqa: E402
from fault_servers import Restartable, restartable  # noqa: E402
from invariants import check_histories, check_journal  # noqa: E402

SHELLS = ("sync", "async", "sync", "async")
MEGABYTE = 1 << 20
ROOM_CLIENT, ROOM_SERVER = 16 * MEGABYTE, 4 * MEGABYTE  # by which memory may differ from what it was after warming up
BACK_WITHIN = 30.0
Fault = Callable[[float], None]


class Soak:
    """The faults, and the books of a run."""

    def __init__(self, target: Restartable, proxy: FaultProxy, running: Loads, chance: random.Random) -> None:
        self.target, self.proxy, self.running, self.chance = target, proxy, running, chance
        self.done: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.longest = 0.0
        self.documents = 0
        self.faults: dict[str, Fault] = {
            "killed": self.killed,
            "hung": self.hung,
            "scripts flushed": self.scripts_flushed,
            "all flushed": self.all_flushed,
            "full": self.configured("maxmemory", 1, 0),
            "crowded": self.configured("maxclients", 1, 1000),
            "demoted": self.demoted,
            "dependency dead": self.dependency_dead,
            "stalled": self.way(proxy.stall),
            "reset": self.way(proxy.reset),
            "late": self.way(proxy.hold_replies),
            "mute": self.way(proxy.drop_replies),
            "truncated": self.way(lambda: proxy.truncate(chance.randrange(1, 40))),
            "slow": self.way(lambda: proxy.delay(chance.uniform(0.0, 2 * TIMEOUT))),
            "cut": lambda _: proxy.cut(),
            "half open": lambda _: proxy.half_open(),
        }

    # Faults

    def way(self, begin: Callable[[], None]) -> Fault:
        def fault(seconds: float) -> None:
            begin()
            time.sleep(seconds)
            self.proxy.fine()

        return fault

    def configured(self, option: str, bad: int, good: int) -> Fault:
        def fault(seconds: float) -> None:
            with self.target.client() as client:
                client.config_set(option, bad)
                time.sleep(seconds)
                client.config_set(option, good)

        return fault

    def killed(self, seconds: float) -> None:
        self.target.kill()
        time.sleep(seconds)
        self.target.start()

    def hung(self, seconds: float) -> None:
        os.kill(self.target.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(self.target.pid, signal.SIGCONT)

    def scripts_flushed(self, seconds: float) -> None:
        with self.target.client() as client:
            client.script_flush()

    def all_flushed(self, seconds: float) -> None:
        with self.target.client() as client:
            client.flushall()

    def demoted(self, seconds: float) -> None:
        with self.target.client() as client:
            client.replicaof("127.0.0.1", "1")
            time.sleep(seconds)
            client.replicaof("NO", "ONE")

    def dependency_dead(self, seconds: float) -> None:
        self.running.say("fail")
        time.sleep(seconds)
        self.running.say("work")

    # The run

    def next_fault(self) -> None:
        """One fault, now and then a second one within it, and the way back."""
        name = self.chance.choice(list(self.faults))
        self.faults[name](self.chance.uniform(0.1, 2.0))
        self.done[name] += 1
        if self.chance.random() < 0.5:
            self.find_back()

    def find_back(self) -> None:
        """Every process is with Redis again, and its calls run."""
        self.running.say("collect")
        for books in self.running.until(lambda books: books["source"] == "redis" and books["calls"] > 20, BACK_WITHIN):
            self.totals.update({field: books[field] for field in ("calls", "ran", "failed", "rejected", "slow")})
            self.longest = max(self.longest, books["longest"])
        self.running.say("phase")
        self.running.check_no_surprise()

    def memory(self) -> tuple[list[int], int]:
        """What the processes and the server occupy."""
        books = self.running.say("collect")
        with self.target.client() as client:
            return [one["memory"] for one in books], client.info("memory")["used_memory"]

    def check(self, before: tuple[list[int], int], after: tuple[list[int], int]) -> None:
        for load, was, now in zip(self.running, before[0], after[0], strict=True):
            assert now - was < ROOM_CLIENT, f"the {load.order['shell']} process grew from {was} to {now} bytes"
        assert after[1] - before[1] < ROOM_SERVER, f"the server grew from {before[1]} to {after[1]} bytes"
        faults = sum(self.done.values())
        assert self.totals["slow"] <= len(SHELLS) * LOADS * 3 * faults, self.totals
        assert self.longest < TIMEOUT * 16, self.longest
        assert self.totals["rejected"] > 0 or not self.done["dependency dead"], self.totals
        with self.target.client() as client:
            check_histories(client)
        self.documents = check_journal(self.target.journal.read_bytes())


def soak(seconds: float, seed: int) -> None:
    """Run it; raises AssertionError for what went wrong."""
    print(f"soaking for {seconds:g} s, --seed {seed}", flush=True)
    order: dict[str, Any] = {"pause": 0.005, "share": 9, "silent": True}
    with (
        restartable(keeps=True) as target,
        proxy_to(target.port) as proxy,
        loads(*SHELLS, url=proxy.url, **order) as running,
    ):
        run = Soak(target, proxy, running, random.Random(seed))
        run.find_back()
        began = printed = time.monotonic()
        before = None
        while (now := time.monotonic()) - began < seconds:
            run.next_fault()
            if before is None and now - began > seconds / 5:  # by then all caches and pools are what they will be
                run.find_back()
                before = run.memory()
            if now - printed > 10:
                printed = now
                print(f"{now - began:5.0f} s  {sum(run.done.values())} faults, {dict(run.totals)}", flush=True)
        run.find_back()
        run.check(before or run.memory(), run.memory())
    waited, checked = f"longest wait {run.longest:.2f} s", f"{run.documents} stored documents checked"
    print(f"passed: {dict(run.done)}, {dict(run.totals)}, {waited}, {checked}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, nargs="?", default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    soak(options.seconds, options.seed)
