"""A module as applications have them: managers and breakers are made when it is imported. $URL names the server."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from pybreaker_redis import (
    AsyncCircuitBreakerManager,
    CircuitBreakerManager,
    CircuitOpenError,
    Config,
    Event,
    Policy,
)

SERVICES = 5
events: list[Event] = []
forks: list[int] = []  # the processes in which Python's hook for forked children has run
os.register_at_fork(after_in_child=lambda: forks.append(os.getpid()))

config = Config(
    redis_url=os.environ["URL"],
    watch=True,
    redis_timeout=10.0,
    defaults=Policy(failure_threshold=1_000_000_000),
    services={"trips": Policy(failure_threshold=3, reset_timeout=600.0)},
)
manager = CircuitBreakerManager.with_redis(config, listeners=[events.append])
async_manager = AsyncCircuitBreakerManager.with_redis(config, listeners=[events.append])
names = [f"service-{number}" for number in range(SERVICES)]
breakers = {name: manager.get_or_create(name) for name in (*names, "trips")}
async_breakers = {name: async_manager.get_or_create(name) for name in (*names, "trips")}


@breakers["service-0"]
def decorated() -> int:
    return 1


async def succeed() -> int:
    return 1


def raises() -> None:
    raise ValueError


def first_calls() -> dict[str, Any]:
    """The first calls of this process."""
    decorated()
    for name in names:
        manager.call(name, int)
    return {"instance": breakers[names[0]].instance, "watches": waits_for_watch()}


def waits_for_watch() -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        watch = manager.get_or_create(names[0])._watch
        if watch is not None and watch.active:
            return True
        manager.call(names[0], int)
        time.sleep(0.01)
    return False


async def async_first_calls() -> dict[str, Any]:
    """The same of the asyncio manager."""
    import asyncio

    for name in names:
        await async_manager.call(name, succeed)
    deadline = time.monotonic() + 20
    watches = False
    while not watches and time.monotonic() < deadline:
        await async_manager.call(names[0], succeed)
        watch: Any = async_manager.get_or_create(names[0])._watch
        watches = watch is not None and watch.active
        await asyncio.sleep(0.01)
    await async_manager.close()
    return {"instance": async_breakers[names[0]].instance, "watches": watches}


def answer(path: str) -> dict[str, Any]:
    """What a request of the web server tests gets: /call/NAME, /fail/NAME or /snapshot/NAME."""
    _, what, name = path.split("/")
    found: dict[str, Any] = {"pid": os.getpid(), "forks": forks}
    try:
        if what == "snapshot":
            snapshot = manager.get_or_create(name).snapshot()
            found |= {"name": snapshot.name, "failures": snapshot.failure_count, "source": snapshot.source}
        else:
            manager.call(name, int if what == "call" else raises)
        found["admitted"] = True
    except CircuitOpenError:
        found["admitted"] = False
    except ValueError:
        found["admitted"] = True
    watch: Any = breakers[name]._watch
    found |= {"instance": breakers[name].instance, "watches": watch is not None and watch.active}
    found |= {"outages": [event.kind for event in events if event.kind != "state_change"]}
    return found | {"threads": [one.name for one in threading.enumerate()]}
