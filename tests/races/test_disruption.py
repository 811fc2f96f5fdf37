"""A server that forgets, hangs or drops connections under load."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import race_workers as jobs
import redis
import server_watch
from conftest import stopped, wait_until
from race_workers import FIRM, PATIENCE, Boom, Exchanges, Fleet, boom, fine, make_stale, run_threads

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Event, Policy
from pybreaker_redis.embedded import EmbeddedServer

MANY = Policy(failure_threshold=1_000_000_000)


@pytest.fixture(scope="module")
def processes() -> Iterator[Fleet]:
    """Four processes for the whole module."""
    with jobs.fleet_of(4) as started:
        yield started


@pytest.fixture
def fleet(processes: Fleet) -> Iterator[Fleet]:
    """The module's processes, all idle."""
    yield processes
    processes.renew()


@contextlib.contextmanager
def slow_link(path: str, delay: float) -> Iterator[str]:
    """The URL of a link to the server's socket that delays each reply by so many seconds."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing: list[socket.socket] = [listener]

    def pump(source: socket.socket, target: socket.socket, wait: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(wait)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(path)
                closing.extend((near, far))
                threading.Thread(target=pump, args=(near, far, 0.0), daemon=True).start()
                threading.Thread(target=pump, args=(far, near, delay), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for one in closing:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.mark.parametrize("lease", [0, 0.02])
def test_flushes_under_load_reach_no_caller(fleet: Fleet, own_server: EmbeddedServer, lease: float) -> None:
    """SCRIPT FLUSH and FLUSHALL under the calls of 4 processes x 3 threads are no outage and no error."""
    with redis.Redis.from_url(own_server.url) as client:
        fleet.start(jobs.load, 4, own_server.url, "flushed", 3, 7, {"lease": lease, **FIRM})
        assert [fleet.message_of(index) for index in range(4)] == ["running"] * 4
        for number in range(150):
            if number % 3 != 1:
                client.script_flush("ASYNC" if number % 2 else "SYNC")
            if number % 3:
                client.flushall()
            time.sleep(0.005)
        fleet.stop.set()
        results = fleet.results(4)
        assert all(result["ran"] > 50 and result["failed"] > 5 for result in results)
        for result in results:
            assert set(result["kinds"]) <= {"success", "failure"}
        breaker = CircuitBreaker("flushed", redis=client, policy=Policy(failure_threshold=5), lease=0, **FIRM)
        breaker.reset()
        for _ in range(5):
            with contextlib.suppress(Boom):
                breaker.call(boom)
        assert breaker.snapshot().state == "open"
        assert [entry.new for entry in breaker.history(1)] == ["open"]


def test_killed_connections_under_load(fleet: Fleet, own_server: EmbeddedServer) -> None:
    """CLIENT KILL under load reaches no caller; each outage is notified once, and Redis is back by itself."""
    with redis.Redis.from_url(own_server.url) as client:
        fleet.start(jobs.load, 2, own_server.url, "killed", 4, 5, {"lease": 0, "redis_timeout": 5.0})
        assert [fleet.message_of(index) for index in range(2)] == ["running"] * 2
        kills = 12
        for _ in range(kills):
            client.client_kill_filter(_type="normal", skipme=True)
            time.sleep(0.1)
        fleet.stop.set()
        results = fleet.results(2)
        for result in results:
            kinds = result["kinds"]
            assert result["ran"] <= kinds["success"] + kinds["failure"]  # and those that waited for the return
            assert result["failed"] == kinds["failure"]
            assert 1 <= kinds["redis_error"] <= kills
            assert kinds["redis_restored"] == kinds["redis_error"]
            assert set(kinds) <= {"success", "failure", "redis_error", "redis_restored"}
        failed = sum(result["failed"] for result in results)
        assert server_watch.document(client, "killed")["failure_count"] <= failed


def test_a_lost_reply_counts_once(own_server: EmbeddedServer) -> None:
    """A report whose reply never came in time is not sent again: the server counts one failure, not two."""
    with redis.Redis.from_url(own_server.url) as client:
        server_watch.load_scripts(client)
        breaker = CircuitBreaker("lost", redis=own_server.url, policy=MANY, lease=0, redis_timeout=0.4)
        wait_until(lambda: breaker.snapshot().source == "redis")
        permit = breaker.acquire()
        before = server_watch.commands(client)
        os.kill(own_server.pid, signal.SIGSTOP)
        # back when the first attempt is given up, and a second one would be under way
        back = threading.Timer(0.6, os.kill, (own_server.pid, signal.SIGCONT))
        back.start()
        permit.failure()
        back.join()
        wait_until(lambda: breaker.snapshot().source == "redis")
        wait_until(lambda: server_watch.document(client, "lost")["failure_count"] > 0)
        assert server_watch.document(client, "lost")["failure_count"] == 1
        assert (server_watch.commands(client) - before)["set"] == 1


def test_an_outage_is_notified_once(own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    """16 threads in the same outage log one warning, one more at its end, and one of them tries Redis meanwhile."""
    kinds: list[str] = []
    breaker = CircuitBreaker(
        "notified",
        redis=own_server.url,
        policy=MANY,
        lease=0,
        redis_timeout=1.0,
        listeners=[lambda event: kinds.append(event.kind)],
    )
    run_threads(16, lambda number: breaker.call(fine))

    exchanges = Exchanges(breaker)

    def retries() -> int:
        breaker.call(fine)
        return exchanges.began

    with caplog.at_level(logging.WARNING, "pybreaker_redis"):
        with stopped(own_server):
            run_threads(16, lambda number: breaker.call(fine))
            wait_until(retries)
            run_threads(16, lambda number: breaker.call(fine))
            assert exchanges.most == 1
        wait_until(lambda: breaker.snapshot().source == "redis")
        wait_until(lambda: "redis_restored" in kinds)
    assert (kinds.count("redis_error"), kinds.count("redis_restored")) == (1, 1)
    assert len(caplog.records) == 2


def test_a_link_slower_than_the_lease_is_asked_once(own_server: EmbeddedServer) -> None:
    """When a round trip takes longer than the lease, callers that waited go by the reply they waited for."""
    with redis.Redis.from_url(own_server.url) as client:
        server_watch.load_scripts(client)
        with slow_link(f"{own_server.directory}/r.sock", 0.15) as url:
            breaker = CircuitBreaker("convoy", redis=url, lease=0.1, **FIRM)
            before = server_watch.commands(client)
            run_threads(16, lambda number: breaker.call(fine))
            assert (server_watch.commands(client) - before)["evalsha"] <= 4


def test_a_local_probe_takes_no_ones_slot(own_server: EmbeddedServer) -> None:
    """A probe admitted locally in an outage does not speak for the probe that holds the slot in Redis."""
    with redis.Redis.from_url(own_server.url) as client:
        policy = Policy(failure_threshold=1, reset_timeout=0.02)
        holder = CircuitBreaker("slot", redis=client, policy=policy, lease=0, **FIRM)
        other = CircuitBreaker("slot", redis=own_server.url, policy=policy, lease=0, redis_timeout=0.2)
        holder.acquire().failure()
        wait_until(lambda: holder.snapshot().retry_after == 0)
        probe = holder.acquire()
        with pytest.raises(CircuitOpenError):
            other.acquire()
        with stopped(own_server):
            local = jobs.permit_or_none(other)
        wait_until(lambda: other.snapshot().source == "redis")
        before = client.get(other.keys.state)
        if local is not None:
            local.success()
        assert client.get(other.keys.state) == before
        probe.failure()
        assert holder.snapshot().state == "open"


def test_a_permit_outlives_an_outage(own_server: EmbeddedServer) -> None:
    """A permit from before an outage that is settled after it counts in Redis, which stays the source."""
    events: list[Event] = []
    breaker = CircuitBreaker(
        "late", redis=own_server.url, policy=MANY, lease=0, redis_timeout=0.3, listeners=[events.append]
    )
    breaker.call(fine)
    permit = breaker.acquire()
    with stopped(own_server):
        breaker.call(fine)
    wait_until(lambda: breaker.snapshot().source == "redis")
    permit.failure()
    assert breaker.snapshot().source == "redis"
    assert breaker.snapshot().failure_count == 1


def test_flushall_makes_no_old_permit_valid(client: redis.Redis) -> None:
    """Permits and probes from before a FLUSHALL count nothing after it."""
    policy = Policy(failure_threshold=1, reset_timeout=0.02)
    breaker = CircuitBreaker("gone", redis=client, policy=policy, lease=0, **FIRM)
    old: list[Any] = [breaker.acquire()]
    breaker.acquire().failure()
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    old.append(breaker.acquire())
    client.flushall()
    breaker.acquire().success()
    before = client.get(breaker.keys.state)
    for permit in old:
        permit.failure()
    assert client.get(breaker.keys.state) == before
    assert breaker.snapshot().state == "closed"


def test_an_outage_before_the_first_reply() -> None:
    """Threads whose first call finds no server at all are admitted by the local engine, and no error reaches them."""
    breaker = CircuitBreaker("never", redis="redis://127.0.0.1:1", policy=MANY, **FIRM)
    run_threads(8, lambda number: breaker.call(fine))
    assert breaker.snapshot().source == "local"


def test_successes_of_an_outage_are_reported(own_server: EmbeddedServer) -> None:
    """Successes gathered while Redis was away, under a generation that it still has, break a run of failures."""
    policy = Policy(failure_threshold=3)
    breaker = CircuitBreaker("between", redis=own_server.url, policy=policy, lease=0.2, redis_timeout=0.3)
    for _ in range(2):
        breaker.acquire().failure()
    with stopped(own_server):
        wait_until(lambda: breaker.call(fine) and breaker.snapshot().source == "local")
        for _ in range(10):
            breaker.call(fine)
    wait_until(lambda: breaker.snapshot().source == "redis")
    breaker.acquire().failure()
    assert breaker.snapshot().state == "closed"
    assert breaker.snapshot().failure_count == 1


def test_a_hung_retry_is_the_only_one(own_server: EmbeddedServer) -> None:
    """While a retry waits for a hung server, however long redis_timeout lets it, no second one is started."""
    breaker = CircuitBreaker("hung", redis=own_server.url, policy=MANY, lease=0, redis_timeout=2.0)
    breaker.call(fine)
    exchanges = Exchanges(breaker)
    with stopped(own_server):
        breaker.call(fine)  # this one waits
        end = time.monotonic() + 1.7  # longer than any pause between two retries
        while time.monotonic() < end:
            breaker.call(fine)
            time.sleep(0.01)
        assert (exchanges.began, exchanges.ended) == (1, 0)
    wait_until(lambda: breaker.snapshot().source == "redis")


def test_a_slow_listener_of_an_outage_holds_up_no_one(own_server: EmbeddedServer) -> None:
    """While a listener is still busy with the outage that a refresh ran into, other threads' calls are answered."""
    listening, go_on = threading.Event(), threading.Event()

    def listen(event: Event) -> None:
        if event.kind == "redis_error":
            listening.set()
            go_on.wait(PATIENCE)

    breaker = CircuitBreaker(
        "busy", redis=own_server.url, policy=MANY, lease=0.1, redis_timeout=0.5, listeners=[listen]
    )
    breaker.call(fine)
    link = breaker._redis.link
    wait_until(lambda: breaker._view._reported_at > 0 and not link.is_busy())  # the first success is reported
    make_stale(breaker, 10.0)  # beyond two leases and redis_timeout: the next callers wait for the refresh
    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(breaker.call(fine)), daemon=True) for _ in range(8)]
    with stopped(own_server):
        threads[0].start()
        assert listening.wait(PATIENCE)
        for thread in threads[1:]:
            thread.start()
        for thread in threads[1:]:
            thread.join(10)
        answered = list(done)
        go_on.set()
        threads[0].join(PATIENCE)
    assert answered == [1] * 7
    assert len(done) == 8
