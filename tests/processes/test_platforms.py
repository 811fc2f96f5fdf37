"""AWS Lambda, which freezes processes between events, and Kubernetes, where each pod has its own host name."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import programs
import pytest
import redis
from conftest import wait_until
from test_freeze import stopped_state

from pybreaker_redis import CircuitBreaker, Policy
from pybreaker_redis.embedded import EmbeddedServer

QUORUM = {"failure_threshold": 2, "quorum": 2, "reset_timeout": 600.0}
RATES = {"failure_threshold": 3, "error_rate_threshold": 0.9, "minimum_calls": 1000, "reset_timeout": 600.0}
ISOLATED = ["unshare", *([] if os.getuid() == 0 else ["--user", "--map-root-user"]), "--uts", "--pid", "--fork"]


class Handler:
    """A process that runs handler.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.frozen = False

    def call(self, **event: Any) -> dict[str, Any]:
        """The answer to one event; a frozen process is thawed for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(event) + "\n")
        self.process.stdin.flush()
        if self.frozen:
            os.kill(self.process.pid, signal.SIGCONT)
            self.frozen = False
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def freeze(self) -> None:
        """Stop the process between two events."""
        os.kill(self.process.pid, signal.SIGSTOP)
        wait_until(lambda: stopped_state(self.process.pid))
        self.frozen = True

    def invoke(self, **event: Any) -> str:
        """The outcome of one event, after which the process is frozen."""
        answer = self.call(**event)
        self.freeze()
        assert answer["outages"] == []
        outcome: str = answer["outcome"]
        return outcome


@contextlib.contextmanager
def started(url: str, policy: dict[str, Any], wrapper: list[str] | None = None, **more: str) -> Iterator[Handler]:
    """A handler's process for a `with` block. wrapper: the words before its own."""
    command = [*(wrapper or []), sys.executable, str(programs.HERE / "handler.py")]
    environment = programs.environment(URL=url, POLICY=json.dumps(policy), **more)
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Handler(process)
        finally:
            process.kill()


def stored(client: redis.Redis) -> dict[str, Any]:
    """The document in Redis."""
    found: dict[str, Any] = json.loads(client.get("circuit_breaker:discovery:state") or "{}")
    return found


# AWS Lambda


@pytest.fixture(params=[3, pytest.param(150, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def frozen_for(request: pytest.FixtureRequest) -> int:
    """Seconds between two events."""
    seconds: int = request.param
    return seconds


def test_a_handler_that_is_called_again_later(own_server: EmbeddedServer, frozen_for: int) -> None:
    """Idle connections are closed meanwhile, and another process trips: the first call knows, without an outage."""
    with redis.Redis.from_url(own_server.url) as client, started(own_server.url, RATES) as environment:
        client.config_set("timeout", 1)
        assert [environment.invoke() for _ in range(3)] == ["answered"] * 3
        time.sleep(frozen_for)
        assert environment.invoke() == "answered"
        time.sleep(frozen_for)
        other = CircuitBreaker("discovery", redis=client, lease=0, policy=Policy(**RATES), redis_timeout=10.0)
        for _ in range(3):
            other.acquire().failure()
        assert environment.invoke() == "rejected"


def test_failures_and_flushed_successes_need_no_thaw(server: EmbeddedServer, client: redis.Redis) -> None:
    """Each is in Redis when its process is frozen, and a process that is thawed sees a trip within a lease."""
    with started(server.url, RATES) as first, started(server.url, RATES) as second:
        first.invoke(calls=20)
        second.invoke(calls=20)
        assert stored(client)["window"]["calls"] == 40
        for number in (1, 2):
            assert first.invoke(fails=True) == "failed"
            assert stored(client)["failure_count"] == number
        assert second.invoke(fails=True) == "failed"
        assert stored(client)["state"] == "open"
        wait_until(lambda: first.invoke() == "rejected")


# Kubernetes


@pytest.fixture
def pods(server: EmbeddedServer, client: redis.Redis) -> Iterator[Any]:
    """Starts processes with host names and process ids of their own."""
    tried = subprocess.run([*ISOLATED, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"needs unshare with the right to use it: {tried.stderr.strip()}")
    with contextlib.ExitStack() as stack:

        def start(name: str, policy: dict[str, Any] = QUORUM, **more: str) -> Handler:
            wrapper = [*ISOLATED, "--kill-child"]
            return stack.enter_context(started(server.url, policy, wrapper, POD=name, **more))

        yield start


def state_of(client: redis.Redis) -> str:
    """The fleet's state."""
    return CircuitBreaker("discovery", redis=client, redis_timeout=10.0).snapshot().state


def test_a_pod_is_one_voice_of_the_quorum(pods: Any, client: redis.Redis) -> None:
    """Two processes of one pod open for themselves; one of another pod opens for all. The history has its name."""
    one, same, other = pods("web-7d4b9-abcde"), pods("web-7d4b9-abcde"), pods("web-7d4b9-xyz12")
    answers = [handler.call() for handler in (one, same, other)]
    assert [answer["pid"] for answer in answers] == [1, 1, 1]
    assert len({answer["instance"] for answer in answers}) == 3
    for handler in (one, same):
        assert [handler.call(fails=True)["outcome"] for _ in range(2)] == ["failed"] * 2
        assert handler.call()["outcome"] == "rejected"
    assert state_of(client) == "closed"
    assert set(stored(client)["reporters"]) == {"web-7d4b9-abcde"}
    assert other.call()["outcome"] == "answered"
    other.call(fails=True, calls=2)
    assert state_of(client) == "open"
    (trip,) = CircuitBreaker("discovery", redis=client, redis_timeout=10.0).history()
    assert trip.instance.startswith("web-7d4b9-xyz12:1-")


def test_pods_of_one_node_are_one_voice(pods: Any, client: redis.Redis) -> None:
    """With host=NODE_NAME, two pods of a broken node do not trip the fleet; a pod of another node does."""
    one, two, other = pods("web-1", NODE="node-a"), pods("web-2", NODE="node-a"), pods("web-3", NODE="node-b")
    for handler in (one, two):
        handler.call(fails=True, calls=2)
    assert state_of(client) == "closed"
    other.call(fails=True, calls=2)
    assert state_of(client) == "open"


def inside(pod: Handler) -> int:
    """The process id, outside of the pod, of its process 1."""
    outside = pod.process.pid
    (pid,) = pathlib.Path(f"/proc/{outside}/task/{outside}/children").read_text().split()
    return int(pid)


def test_a_pod_that_is_told_to_end(pods: Any, client: redis.Redis) -> None:
    """With a handler of SIGTERM it reports what it has gathered, and ends; without one, process 1 ignores it."""
    ends, ignores = pods("web-1", RATES, HANDLES="1"), pods("web-2", RATES)
    for pod in (ends, ignores):
        pod.call(calls=1)
        pod.call(calls=50, flushes=False)
        os.kill(inside(pod), signal.SIGTERM)
    assert ends.process.wait(20) == 0
    assert ignores.call()["outcome"] == "answered"
    ignores.process.kill()  # as Kubernetes does after terminationGracePeriodSeconds
    assert stored(client)["window"]["calls"] == 51 + 52
