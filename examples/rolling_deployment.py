"""Instances are replaced one by one with a version that has another policy; the new ones know of an earlier trip.

The state is in Redis, but each instance brings its own policy. While both versions run, each report is judged by the
policy of the instance that sends it. To change a value for all instances at once, use set_policy().
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from pybreaker_redis import CircuitBreakerManager, CircuitOpenError, Config, Policy
from pybreaker_redis.embedded import serve

VERSIONS = {
    "v1": Policy(failure_threshold=5, reset_timeout=30),
    "v2": Policy(failure_threshold=3, reset_timeout=30, error_rate_threshold=0.5),
}
spawn = multiprocessing.get_context("spawn")


def down() -> None:
    raise ConnectionError("the database is down")


def serve_requests(version: str, url: str, pipe: Connection) -> None:
    """One instance: handles requests. The end of the `with` block reports the gathered successes."""
    config = Config(services={"database": VERSIONS[version]}, redis_url=url)
    with CircuitBreakerManager.with_redis(config) as manager:
        manager.get_state("database")
        pipe.send("ready")
        while (request := pipe.recv()) != "stop":
            try:
                manager.call("database", down if request == "fail" else str)
                pipe.send("answered")
            except ConnectionError:
                pipe.send("failed")
            except CircuitOpenError:
                pipe.send("rejected")


class Instance:
    """An instance in a process of its own, as the deployment sees it."""

    def __init__(self, version: str, url: str) -> None:
        self.version = version
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve_requests, args=(version, url, theirs))
        self._process.start()
        self._pipe.recv()

    def ask(self, request: str) -> Any:
        self._pipe.send(request)
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.send("stop")
        self._process.join()


def main() -> None:
    with serve() as url, CircuitBreakerManager.with_redis(Config(redis_url=url)) as operator:
        operator.get_or_create("database").reset()
        fleet = [Instance("v1", url) for _ in range(2)]
        print("two of v1:", *(instance.ask("work") for instance in fleet))
        fleet.pop(0).stop()
        fleet.append(Instance("v2", url))
        print("one of each:", *(instance.ask("work") for instance in fleet))
        print("the database dies:", *(fleet[number % 2].ask("fail") for number in range(6)))
        fleet.pop(0).stop()
        fleet.append(Instance("v2", url))
        print("two of v2, the second just started:", *(instance.ask("work") for instance in fleet))
        operator.get_or_create("database").reset()
        fleet.append(Instance("v2", url))
        print("after the repair:", fleet[-1].ask("work"))
        for instance in fleet:
            instance.stop()


if __name__ == "__main__":
    main()
