"""Instances are replaced one by one by a version with another policy; what the old ones learned, the new ones know.

The state is Redis', the policy is each instance's own: while both versions run, each reports under its own, and the
breaker trips by that of the instance whose report reaches it. A value that must change for all at once is set for the
fleet, by set_policy().
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
    """One instance: works on what comes, and on its way out reports what it has gathered (close())."""
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
    """An instance, seen from outside."""

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
        fresh = Instance("v2", url)
        print("after the repair:", fresh.ask("work"))
        for instance in (*fleet, fresh):
            instance.stop()


if __name__ == "__main__":
    main()
