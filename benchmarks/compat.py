"""What does a guarded call cost through pybreaker_redis.compat.pybreaker, beside pybreaker itself?

    python benchmarks/compat.py [--rounds 30] [--slice 0.1]

One process and one server on a unix socket. In each round every contender makes healthy calls, one after the other, for
one slice, in an order that moves on by one. The table has the median time per call less that of the bare call of the
same round, and the medians over the rounds of the ratios that must hold.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import circuitbreaker
import pybreaker
import redis
from contenders import MANY, in_turn

from pybreaker_redis.compat import circuitbreaker as our_circuitbreaker
from pybreaker_redis.compat import pybreaker as ours
from pybreaker_redis.embedded import EmbeddedServer

Call = Callable[[], Any]
BARE, THEIRS, THEIRS_REDIS = "bare call", "pybreaker (memory)", "pybreaker (Redis)"
OURS, OURS_REDIS, STRICT = "compat (memory)", "compat (Redis, lease 0.1)", "compat (Redis, lease 0)"
OBSERVED = ", a listener"
CIRCUIT, OUR_CIRCUIT, OUR_CIRCUIT_REDIS = "circuitbreaker", "compat circuitbreaker", "compat circuitbreaker (Redis)"
AT_ONCE = 50  # calls between two looks at the clock
# which overhead, as a share of which other, at most
MUST_HOLD = [(OURS_REDIS, THEIRS_REDIS, 0.01), (OURS_REDIS, THEIRS, 1.0)]
WORTH_KNOWING = [
    (OURS, THEIRS),
    (OURS_REDIS + OBSERVED, THEIRS + OBSERVED),
    (OURS_REDIS + OBSERVED, THEIRS_REDIS + OBSERVED),
    (STRICT, THEIRS_REDIS),
    (OUR_CIRCUIT, CIRCUIT),
    (OUR_CIRCUIT_REDIS, CIRCUIT),
]


def succeed() -> int:
    """A healthy service."""
    return 1


def pybreakers(url: str) -> dict[str, Call]:
    """A decorated function for each storage of both, without a listener and with one."""

    def decorated(module: Any, storage: Any, **options: Any) -> Call:
        breaker = module.CircuitBreaker(fail_max=MANY, state_storage=storage, **options)
        guarded: Call = breaker(succeed)
        return guarded

    calls = {}
    for suffix in ("", OBSERVED):
        for name, module, make in (
            (THEIRS, pybreaker, lambda: pybreaker.CircuitMemoryStorage("closed")),
            (THEIRS_REDIS, pybreaker, lambda: on_redis(pybreaker, url)),
            (OURS, ours, lambda: ours.CircuitMemoryStorage("closed")),
            (OURS_REDIS, ours, lambda suffix=suffix: on_redis(ours, url, f"lease{suffix}")),
            (STRICT, ours, lambda suffix=suffix: on_redis(ours, url, f"strict{suffix}", lease=0)),
        ):
            listeners = [module.CircuitBreakerListener()] if suffix else None
            calls[name + suffix] = decorated(module, make(), listeners=listeners)
    return calls


def on_redis(module: Any, url: str, namespace: str = "theirs", **options: Any) -> Any:
    """A storage of either module on Redis."""
    return module.CircuitRedisStorage("closed", redis.Redis.from_url(url), namespace=namespace, **options)


def circuitbreakers(url: str) -> dict[str, Call]:
    """A decorated function of circuitbreaker, and ours in memory and on Redis."""
    calls = {CIRCUIT: circuitbreaker.circuit(MANY)(succeed), OUR_CIRCUIT: our_circuitbreaker.circuit(MANY)(succeed)}
    calls[OUR_CIRCUIT]()
    our_circuitbreaker.configure(redis.Redis.from_url(url))
    calls[OUR_CIRCUIT_REDIS] = our_circuitbreaker.circuit(MANY)(succeed)
    return calls


def timed(call: Call, seconds: float) -> float:
    """Seconds per call."""
    count, began = 0, perf_counter()
    while (now := perf_counter()) - began < seconds:
        for _ in range(AT_ONCE):
            call()
        count += AT_ONCE
    return (now - began) / count


def measure(calls: dict[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The overhead of each contender, by round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timed(call, seconds / 2)
    for number in range(rounds):
        for name in in_turn(number, list(calls)):
            times[name].append(timed(calls[name], seconds))
    bare = times.pop(BARE)
    return {name: [one - floor for one, floor in zip(taken, bare, strict=True)] for name, taken in times.items()}


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """The median of the ratios of one contender's overhead to another's in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(times[one], times[other], strict=True))


def main() -> None:
    """Measure, and fail if a ratio that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--slice", type=float, default=0.1, help="seconds")
    options = parser.parse_args()
    with EmbeddedServer() as server:
        calls = {BARE: succeed, **pybreakers(server.url), **circuitbreakers(server.url)}
        times = measure(calls, options.rounds, options.slice)
    for name, taken in times.items():
        print(f"{name:40} {statistics.median(taken) * 1e6:10.2f} us")
    for one, other in WORTH_KNOWING:
        print(f"{one} / {other}: {ratio(times, one, other):.4f}")
    missed = False
    for one, other, most in MUST_HOLD:
        found = ratio(times, one, other)
        missed = missed or found > most
        print(f"{one} / {other}: {found:.4f}, at most {most}{' (missed)' if found > most else ''}")
    if missed:
        raise SystemExit("a guarded call costs more than it may")


if __name__ == "__main__":
    main()
