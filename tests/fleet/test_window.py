"""A window under heavy traffic: neither its bytes nor the work for it grow with the calls."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from conftest import START_MS, on_frozen_clock

from pybreaker_redis._protocol import decode, encode, keys_of

CALLS = 10_000_000
ROUNDS = 20
REPORTS = 125  # of one round
CALLS_PER_REPORT = CALLS // ROUNDS // REPORTS
STEP_MS = 240  # between reports: a bucket ends with every 25th
MOST_BYTES = 800
POLICY = {
    "failure_threshold": 10**9,
    "error_rate_threshold": 0.5,
    "slow_call_duration_ms": 1000,
    "slow_call_rate_threshold": 0.5,
    "window_ms": 60_000,
}


class Traffic:
    """Reports of one breaker, whose counts differ from report to report."""

    def __init__(self, client: redis.Redis, name: str, quorum: int) -> None:
        self.client, self.keys = client, keys_of(name)
        self.policy = {**POLICY, "quorum": quorum}
        self.usec = 0.0  # of a report in the last round
        self.sha1 = {script: client.script_load(on_frozen_clock(script)) for script in ("acquire", "record")}
        self.counts = self.random_counts(random.Random(4))
        self.instances = itertools.cycle(f"{number:05}-{number * 7919:08x}" for number in range(40_000, 40_100))
        client.set("test:now_ms", START_MS)
        body = encode({"policy": self.policy})
        self.generation = decode(client.evalsha(self.sha1["acquire"], 3, *self.keys, body))["generation"]

    def random_counts(self, chance: random.Random) -> Iterator[dict[str, int]]:
        """Successes with some failures and slow calls; each pair of reports has 2 * CALLS_PER_REPORT calls."""
        while True:
            more = chance.randrange(CALLS_PER_REPORT)
            for calls in (CALLS_PER_REPORT + more, CALLS_PER_REPORT - more):
                failures = chance.randrange(calls // 50 + 1)
                slow = chance.randrange(calls // 20 + 1)
                yield {"successes": calls - failures, "failures": failures, "slow": slow}

    def run(self, first: int) -> tuple[int, list[int], dict[str, int]]:
        """One round: calls counted, bytes of the document after each report, and commands by name."""
        pipeline = self.client.pipeline(transaction=False)
        calls = 0
        for number in range(first, first + REPORTS):
            counts = next(self.counts)
            calls += counts["successes"] + counts["failures"]
            request = {"generation": self.generation, "instance": next(self.instances), "policy": self.policy, **counts}
            pipeline.set("test:now_ms", START_MS + number * STEP_MS)
            pipeline.evalsha(self.sha1["record"], 3, *self.keys, encode(request))
            pipeline.strlen(self.keys.state)
        self.client.config_resetstat()
        replies = pipeline.execute()
        stats: dict[str, Any] = self.client.info("commandstats")
        self.usec = stats["cmdstat_evalsha"]["usec_per_call"]
        return calls, replies[2::3], {name: stat["calls"] for name, stat in stats.items() if "config" not in name}


@pytest.mark.parametrize("quorum", [1, 3])
def test_ten_million_calls(client: redis.Redis, quorum: int) -> None:
    """Over 10 million calls in ten windows the document stays under 800 bytes, and a report costs what it did at first.

    In turn with each round a breaker of no past gets the same traffic, so that a slow moment of the machine meets both.
    """
    old = Traffic(client, "old", quorum)
    total, sizes, costs, fresh_costs, commands = 0, list[int](), list[float](), list[float](), list[dict[str, int]]()
    for number in range(ROUNDS):
        calls, lengths, counts = old.run(number * REPORTS)
        total, sizes = total + calls, sizes + lengths
        costs.append(old.usec)
        commands.append(counts)
        fresh = Traffic(client, f"fresh-{number}", quorum)
        fresh.run(0)
        fresh_costs.append(fresh.usec)
    stored = json.loads(client.get(old.keys.state))
    print(f"{total:,} calls, at most {max(sizes)} bytes, {statistics.median(costs):.1f} us", client.get(old.keys.state))
    assert total >= CALLS * 0.99
    assert 10 * POLICY["window_ms"] <= ROUNDS * REPORTS * STEP_MS
    assert stored["window"]["calls"] > 20 * CALLS_PER_REPORT
    assert len(stored.get("reporters", {})) == (quorum if quorum > 1 else 0)
    assert max(sizes) < MOST_BYTES
    assert commands[0] == commands[-1]  # inside the scripts too
    late = statistics.median(costs[ROUNDS // 2 :])
    assert late < 2 * statistics.median(fresh_costs[ROUNDS // 2 :])
    assert late < 2 * statistics.median(costs[: ROUNDS // 2])
