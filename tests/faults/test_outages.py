"""Faults of a server and of the link to it, each under the load of two processes, a threaded and an asyncio one.

check_outage() asserts what all of them have in common; see there and docs/faults.md.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import wait_until
from fault_load import (
    LOADS,
    THRESHOLD,
    TIMEOUT,
    check_bounded,
    check_outage,
    check_shared_again,
    loads,
    local,
    shared,
)
from fault_proxy import FaultProxy, proxy_to
from fault_servers import Restartable, restartable
from invariants import check_histories, check_journal

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Policy

STATE = "circuit_breaker:loaded:state"


@pytest.fixture
def target() -> Iterator[Restartable]:
    """A server of the test's own, without persistence; what it holds at the end has a legal history."""
    with restartable() as started:
        yield started
        with started.client() as client:
            check_histories(client)


@pytest.fixture
def proxy(target: Restartable) -> Iterator[FaultProxy]:
    """A link to it that misbehaves on order."""
    with proxy_to(target.port) as started:
        yield started


# The process of the server ----------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [False, True], ids=["empty", "with-data"])
def test_killed_and_restarted(keeps: bool) -> None:
    """A server that is killed, and comes back with nothing or with all it knew, is one outage."""
    with restartable(keeps=keeps) as target, loads("sync", "async", url=target.url) as running:
        check_outage(running, target.kill, target.start)
        with target.client() as client:
            assert check_histories(client) > 0
        if keeps:
            assert check_journal(target.journal.read_bytes()) > 0


def test_an_open_circuit_survives_a_restart_with_data() -> None:
    """What Redis kept on disk holds after a kill: open is open, under its old generation, with what was left of it."""
    with restartable(keeps=True) as target:
        breaker = CircuitBreaker("kept", redis=target.url, policy=Policy(failure_threshold=1, reset_timeout=3600))
        breaker.acquire().failure()
        before = breaker.snapshot()
        target.kill()
        target.start()
        with target.client() as client:
            wait_until(lambda: not client.info("persistence")["loading"])
        after = CircuitBreaker("kept", redis=target.url, redis_timeout=20).snapshot()
        assert (after.source, after.state, after.generation) == ("redis", "open", before.generation)
        assert after.retry_after is not None
        assert before.retry_after is not None
        assert 3000 < after.retry_after <= before.retry_after


def check_hangs(target: Restartable, seconds: float) -> None:
    """SIGSTOP under load, for at least so many seconds."""
    began = time.monotonic()

    def go_on() -> None:
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        os.kill(target.pid, signal.SIGCONT)

    with loads(url=target.url) as running:
        check_outage(running, lambda: os.kill(target.pid, signal.SIGSTOP), go_on)


def test_stopped(target: Restartable) -> None:
    """A server that hangs costs each caller one deadline at the most, and then none."""
    check_hangs(target, 2.0)


@pytest.mark.long
def test_stopped_for_ten_seconds(target: Restartable) -> None:
    """Nor does it cost more when it hangs for long: no retry is felt by a caller."""
    check_hangs(target, 10.0)


# The link ---------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[FaultProxy], None]] = {
    "stall": FaultProxy.stall,
    "reset": FaultProxy.reset,
    "late-replies": FaultProxy.hold_replies,
    "no-replies": FaultProxy.drop_replies,
    "truncated-replies": lambda proxy: proxy.truncate(3),
    "slow": lambda proxy: proxy.delay(TIMEOUT * 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_link(proxy: FaultProxy, target: Restartable, way: str) -> None:
    """A link that stalls, is reset, or brings replies late, cut short or never, is one outage like any other."""
    with loads(url=proxy.url) as running:
        check_outage(running, lambda: WAYS[way](proxy), proxy.fine)
        with target.client() as client:
            assert check_histories(client) > 0


@pytest.mark.parametrize("way", ["cut", "half_open"])
def test_link_lost_once(proxy: FaultProxy, way: str) -> None:
    """Links that are cut, or lead nowhere any more while new ones work, are left for new ones by themselves."""
    with loads(url=proxy.url) as running:
        for _ in range(3):
            running.until(shared)
            running.say("phase")
            getattr(proxy, way)()
            for books in running.until(shared):
                check_bounded(books)
        check_shared_again(running)
        running.check_no_surprise()


def test_delay_within_the_deadline(proxy: FaultProxy) -> None:
    """A link that is slow, but within redis_timeout, is no outage."""
    with loads(url=proxy.url, options={"redis_timeout": 5.0}) as running:
        running.until(shared)
        running.say("phase")
        proxy.delay(0.1)
        for books in running.until(lambda books: books["calls"] > 60):
            assert books["source"] == "redis"
            assert "redis_error" not in books["events"]
        running.check_no_surprise()


# Lost replies, and who repeats what ---------------------------------------------------------------


def count_of_lost_reports(breaker: Any, target: Restartable, proxy: FaultProxy, reports: int) -> int:
    """What Redis has counted after one failure and so many whose report was executed and its reply lost."""
    breaker.acquire().failure()  # loads the script: a request that finds none is executed by nobody
    for _ in range(reports):
        wait_until(lambda: breaker.snapshot().source == "redis")
        permit = breaker.acquire()
        proxy.lose_replies()
        permit.failure()
    wait_until(lambda: breaker.snapshot().source == "redis")
    with target.client() as client:
        return int(CircuitBreaker("lost", redis=client, redis_timeout=20).snapshot().failure_count)


@pytest.mark.parametrize("given", ["url", "plain client"])
def test_a_lost_reply_is_never_repeated(proxy: FaultProxy, target: Restartable, given: str) -> None:
    """Redis counts each failure whose reply was lost once, also for a client that would repeat it by itself."""
    client: Any = proxy.url if given == "url" else redis.Redis(port=proxy.port)
    policy = Policy(failure_threshold=10**6)
    breaker = CircuitBreaker("lost", redis=client, policy=policy, lease=0, redis_timeout=0.3)
    assert count_of_lost_reports(breaker, target, proxy, 3) == 1 + 3


def test_what_a_plain_client_does_by_itself(proxy: FaultProxy, target: Restartable) -> None:
    """For comparison: redis.Redis(...) runs a script again whose reply was lost, and so counts one report twice."""
    with target.client() as direct, redis.Redis(port=proxy.port, socket_timeout=0.3) as plain:
        plain.ping()
        if plain.get_retry().get_retries() < 1:
            pytest.skip("this redis-py does not repeat by default")
        proxy.lose_replies()
        assert plain.eval("return redis.call('INCR', KEYS[1])", 1, "counted") == 2
        assert int(direct.get("counted")) == 2


def test_a_client_without_timeouts(proxy: FaultProxy) -> None:
    """A client that would wait for ever makes no call wait longer: the breaker's own connections have a deadline."""
    with redis.Redis(port=proxy.port, socket_timeout=None, socket_connect_timeout=None) as client:
        breaker = CircuitBreaker("bounded", redis=client, lease=0, redis_timeout=TIMEOUT)
        breaker.call(int)
        wait_until(lambda: breaker.snapshot().source == "redis")
        proxy.stall()
        began = time.monotonic()
        for _ in range(50):
            breaker.call(int)
        assert time.monotonic() - began < TIMEOUT * 8
        assert breaker.snapshot().source == "local"


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_the_warning_says_why(proxy: FaultProxy, shell: str, caplog: pytest.LogCaptureFixture) -> None:
    """The one warning of an outage ends with its cause, for either shell."""

    async def call() -> None:
        async def fine() -> None: ...

        await AsyncCircuitBreaker("why", redis=proxy.url, lease=0, redis_timeout=TIMEOUT).call(fine)

    proxy.stall()
    if shell == "sync":
        CircuitBreaker("why", redis=proxy.url, lease=0, redis_timeout=TIMEOUT).call(int)
    else:
        asyncio.run(call())
    [warning] = [one.getMessage() for one in caplog.records if one.name == "pybreaker_redis"]
    assert re.search(r"continue on their own: \w.{5,}", warning)


def test_failures_of_an_outage_are_the_processes_own(target: Restartable) -> None:
    """Failures during an outage are counted locally only: on return Redis has what it had, and nothing twice."""
    policy = Policy(failure_threshold=100)
    breaker = CircuitBreaker("own", redis=target.url, policy=policy, lease=0, redis_timeout=TIMEOUT)
    for _ in range(3):
        breaker.acquire().failure()
    wait_until(lambda: breaker.snapshot().source == "redis")
    os.kill(target.pid, signal.SIGSTOP)
    for _ in range(7):
        breaker.acquire().failure()
    assert (breaker.snapshot().source, breaker.snapshot().failure_count) == ("local", 10)
    os.kill(target.pid, signal.SIGCONT)
    wait_until(lambda: breaker.snapshot().source == "redis")
    assert breaker.snapshot().failure_count == 3
    breaker.acquire().failure()
    assert breaker.snapshot().failure_count == 4


# What the server holds ----------------------------------------------------------------------------


def test_flushed(target: Restartable) -> None:
    """SCRIPT FLUSH and FLUSHALL again and again are no outage for either shell."""
    with loads(url=target.url) as running, target.client() as client:
        running.until(shared)
        running.say("phase")
        for _ in range(60):
            client.script_flush()
            client.flushall()
            time.sleep(0.005)
        for books in running.until(shared):
            assert "redis_error" not in books["events"]
            assert books["slow"] <= LOADS
        check_shared_again(running)
        running.check_no_surprise()


def test_full_without_eviction(target: Restartable) -> None:
    """A server at maxmemory that evicts nothing is an outage for calls that fail, over as soon as there is room."""
    with loads(url=target.url, share=20) as running, target.client() as client:

        def fill() -> None:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)

        check_outage(running, fill, lambda: client.config_set("maxmemory", 0))


def test_a_full_server_is_not_back_before_it_takes_writes(target: Restartable) -> None:
    """A server that answers but takes no writes is one outage for a process whose calls fail, not one per retry."""
    events: list[str] = []
    breaker = CircuitBreaker(
        "full",
        redis=target.url,
        policy=Policy(failure_threshold=10**6),
        redis_timeout=20,
        listeners=[lambda event: events.append(event.kind)],
    )
    breaker.call(int)
    with target.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            breaker.acquire().failure()
        assert events.count("redis_error") == 1
        assert "redis_restored" not in events
        client.config_set("maxmemory", 0)
        wait_until(lambda: breaker.acquire().failure() or breaker.snapshot().source == "redis")


def test_state_key_evicted(target: Restartable) -> None:
    """A server at maxmemory that evicts the state may lose a trip, but wedges nothing and is no outage."""
    with loads(url=target.url) as running, target.client() as client:
        running.until(shared)
        client.config_set("maxmemory-policy", "allkeys-random")
        room = client.info("memory")["used_memory"] + 3_000_000
        client.config_set("maxmemory", room)
        running.say("phase")
        evicted, number = client.info("stats")["evicted_keys"], 0
        while not (gone := client.info("stats")["evicted_keys"] - evicted) or gone < 300:
            for _ in range(50):
                number += 1
                client.set(f"filler:{number}", "x" * 20_000)
        for books in running.until(shared):
            assert not books["rejected"]
        client.delete(STATE)  # whatever chance has chosen
        running.until(shared)
        client.flushall()
        client.config_set("maxmemory", 0)
        check_shared_again(running)
        running.check_no_surprise()


@pytest.mark.parametrize("state", ["closed", "open", "half_open"])
def test_policy_and_history_evicted(target: Restartable, state: str) -> None:
    """Without its policy override and history, a breaker keeps its state, and counts by its own policy."""
    policy = Policy(failure_threshold=3, reset_timeout=0.001 if state == "half_open" else 3600)
    breaker = CircuitBreaker("evicted", redis=target.url, policy=policy, redis_timeout=20)
    with target.client() as client:
        breaker.set_policy(failure_threshold=2)
        for _ in range(0 if state == "closed" else 2):
            breaker.acquire().failure()
        wait_until(lambda: breaker.state == state)
        client.delete(breaker.keys.policy)
        client.delete(breaker.keys.history)
        snapshot = breaker.snapshot()
        assert snapshot.state == ("open" if state == "half_open" else state)
        assert snapshot.policy.failure_threshold == 3
        assert breaker.history() == []
        breaker.reset()
        for _ in range(3):
            assert breaker.snapshot().state == "closed"
            breaker.acquire().failure()
        assert breaker.snapshot().state == "open"
        assert next(entry.new for entry in breaker.history()) == "open"
        client.flushall()  # a history that begins in the middle


def test_demoted_to_replica(target: Restartable) -> None:
    """A master that becomes a replica (READONLY) is an outage until it is a master again."""
    with restartable() as other, loads(url=target.url) as running, target.client() as client:

        def promote() -> None:
            client.replicaof("NO", "ONE")

        check_outage(running, lambda: client.replicaof("127.0.0.1", str(other.port)), promote)


def test_replica_promoted() -> None:
    """A replica that is promoted knows state and generation of its master, and takes over where that ended."""
    prompt = ["--repl-diskless-sync-delay", "0"]
    with (
        restartable(args=prompt) as master,
        restartable(args=["--replicaof", "127.0.0.1", str(master.port)]) as replica,
    ):
        breaker = CircuitBreaker("moved", redis=master.url, policy=Policy(failure_threshold=1, reset_timeout=3600))
        with master.client() as first, replica.client() as second:
            wait_until(lambda: second.info("replication")["master_link_status"] == "up")
            old = breaker.acquire()
            breaker.acquire().failure()
            assert first.wait(1, 20_000) == 1
            master.kill()
            second.replicaof("NO", "ONE")
        after = CircuitBreaker("moved", redis=replica.url, redis_timeout=20)
        assert (after.snapshot().state, after.snapshot().source) == ("open", "redis")
        assert after.snapshot().generation > old.generation
        with replica.client() as client:
            assert check_histories(client) == 1


def test_connection_limit(target: Restartable) -> None:
    """A server that takes no more connections is an outage for those that need one, and no error for any caller."""
    with loads(url=target.url) as running, target.client() as client:

        def crowd() -> None:
            client.config_set("maxclients", 1)
            client.client_kill_filter(_type="normal", skipme=True)

        check_outage(running, crowd, lambda: client.config_set("maxclients", 1000))


# Who may come in ----------------------------------------------------------------------------------


def test_password_changed(target: Restartable) -> None:
    """A password that is wrong from now on is an outage until it is right again."""
    with loads(url=target.url) as running, target.client(password="secret") as client:

        def change() -> None:
            with target.client() as before:
                before.config_set("requirepass", "secret")
                before.client_kill_filter(_type="normal", skipme=True)

        check_outage(running, change, lambda: client.config_set("requirepass", ""))


def test_user_without_evalsha(target: Restartable) -> None:
    """A user that may not call EVALSHA (any more) is an outage, and no error for any caller."""
    with target.client() as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all")
        url = f"redis://app:pw@127.0.0.1:{target.port}"
        with loads(url=url) as running:
            check_outage(
                running,
                lambda: client.execute_command("ACL", "SETUSER", "app", "-evalsha"),
                lambda: client.execute_command("ACL", "SETUSER", "app", "+evalsha"),
            )


def check_never_in(**order: Any) -> None:
    """Redis is never reached: nobody sees an error of it, calls are cut off locally, and nobody waits twice."""
    with loads(**order) as running:
        for books in running.until(local):
            check_bounded(books)
            assert books["events"]["redis_error"] == 1
        running.say("fail")
        for books in running.until(lambda books: books["rejected"] > 20):
            assert books["ran_before_first_rejection"] <= THRESHOLD + LOADS - 1
            check_bounded(books, 0)
        running.check_no_surprise()


def test_name_that_does_not_resolve() -> None:
    """A host name that does not resolve is an outage from the first call on."""
    check_never_in(url="redis://no-such-host.invalid:6379")


def test_wrong_password_from_the_beginning(target: Restartable) -> None:
    """So is a wrong password."""
    with target.client() as client:
        client.config_set("requirepass", "right")
        check_never_in(url=f"redis://:wrong@127.0.0.1:{target.port}")
        client.config_set("requirepass", "")


@pytest.mark.long
def test_soak_for_a_short_while() -> None:
    """The soak itself runs, and passes."""
    program = Path(__file__).parent / "soak.py"
    done = subprocess.run([sys.executable, str(program), "40"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
