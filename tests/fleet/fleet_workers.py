"""A process with several instances of one breaker, each with a thread that calls; spawned by test_quorum_fleet."""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy

# Seconds between two calls of an instance. Four processes report some 40 successes a second; more than so many failures
# in a row would trip a healthy fleet (docs/concepts/trips.md).
PAUSE = 0.1


class Boom(Exception):
    """What a call of the sick service raises."""


class Instance:
    """One breaker and what became of its calls; percent of them fail, spread evenly over calls and instances."""

    def __init__(self, number: int, url: str, name: str, policy: Policy) -> None:
        self.number, self.percent, self.tally = number, 1, Counter[str]()
        # a slow machine is no outage
        self.breaker = CircuitBreaker(name, redis=url, policy=policy, redis_timeout=30.0, host=f"host-{number}")

    def work(self) -> None:
        turn = (self.number + 37 * self.tally.total()) % 100
        if turn < self.percent:
            raise Boom

    def call(self) -> None:
        """One call, and what it was."""
        try:
            self.breaker.call(self.work)
        except Boom:
            self.tally["failed"] += 1
        except CircuitOpenError:
            self.tally["rejected"] += 1
        else:
            self.tally["succeeded"] += 1

    def report(self) -> dict[str, Any]:
        """What the test asks for."""
        seen = self.breaker.snapshot()
        return {"number": self.number, "isolated": seen.isolated, "source": seen.source, **self.tally}


def serve(line: Connection, url: str, name: str, policy: Policy, numbers: range) -> None:
    """Let these instances call until the line says None; {number: percent} sets who fails how often, "report" asks."""
    stop = threading.Event()
    instances = {number: Instance(number, url, name, policy) for number in numbers}
    errors: list[str] = []

    def run(instance: Instance) -> None:
        try:
            while not stop.wait(PAUSE):
                instance.call()
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(instance,), daemon=True) for instance in instances.values()]
    for thread in threads:
        thread.start()
    while (order := line.recv()) is not None:
        if order == "report":
            line.send(errors or [instance.report() for instance in instances.values()])
        else:
            for number in order.keys() & instances.keys():
                instances[number].percent = order[number]
    stop.set()
    for thread in threads:
        thread.join()
