"""A scrape of a real cluster, before and after it loses a master."""

from __future__ import annotations

import os
import signal

from conftest import wait_until
from fault_servers import cluster

from pybreaker_redis import CircuitBreaker
from pybreaker_redis.instrumentation.prometheus import PrometheusMetrics

NAMES = [f"s{number}" for number in range(30)]


def test_a_scrape_of_a_cluster() -> None:
    """One pipeline for each node gives all breakers; MOVED leads to the replica of a lost master."""
    with cluster() as formed:
        metrics = PrometheusMetrics(redis=formed.client(), registry=None)
        breakers = [
            CircuitBreaker(name, redis=formed.client(), listeners=[metrics], redis_timeout=10) for name in NAMES
        ]
        for breaker in breakers:
            breaker.call(int)
        owners = {formed.owner(breaker.keys.state) for breaker in breakers}
        assert len(owners) > 1

        def healthy() -> int:
            return sum(one.health == 100 for one in metrics._read_all().breakers)

        assert healthy() == len(NAMES)
        assert metrics._read_all().redis_errors == {}
        os.kill(formed.nodes[owners.pop()].pid, signal.SIGKILL)
        assert 0 < healthy() < len(NAMES)
        wait_until(lambda: healthy() == len(NAMES), timeout=60)
