"""What a process has gathered is reported when it ends, once, and without delay: real processes of every sort."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exit_workers as jobs
import pytest
import redis
from conftest import stopped, wait_until, wait_until_freed
from exit_workers import FIRM, NAME, RATE, Boom, failing
from fault_proxy import FaultProxy, proxy_to
from fault_servers import sentinels
from race_workers import fine
from test_access import greeting, tls_url

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    Config,
)
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.sync import Connections

PATIENCE = 100.0
long = pytest.mark.long


def start(*job: object, strict: bool = True) -> subprocess.Popen[str]:
    """A process of exit_workers. strict: every warning is an error."""
    script = str(Path(__file__).with_name("exit_workers.py"))
    options = ["-X", "dev", "-W", "error"] if strict else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    return subprocess.Popen([sys.executable, *options, script, *map(str, job)], **pipes, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Tell a process to go on. Returns its exit code, and what it wrote to stderr."""
    _, errors = process.communicate("\n", timeout=PATIENCE)
    return process.returncode, errors


def ready(process: subprocess.Popen[str]) -> None:
    """Wait until a process has done its part."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def go_on(process: subprocess.Popen[str]) -> None:
    """Let a process do its next part."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def counted(url: str, name: str = NAME) -> tuple[int, int]:
    """The calls in the window, and how many of them failed."""
    found = CircuitBreaker(name, redis=url, policy=RATE, **FIRM).snapshot()
    return found.calls, found.failures


# One call per process ----------------------------------------------------------------------------


def check(url: str, share: float, ends: list[str] | None = None, count: int = 60) -> None:
    """Every call was counted once, and they tripped the circuit, or did not, as the rate of all of them says."""
    breaker = CircuitBreaker(NAME, redis=url, policy=RATE, **FIRM)
    found, expected = breaker.snapshot(), sum(failing(share, count))
    if share < 0.5:
        assert (found.state, found.calls, found.failures) == ("closed", count, expected)
        assert ends is None or (ends.count("succeeded"), ends.count("failed")) == (count - expected, expected)
    else:
        assert found.state == "open"
        (trip,) = breaker.history()
        assert trip.reason == "error_rate"
        assert trip.calls is not None
        assert trip.calls >= 20
        assert ends is None or "rejected" in ends


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_processes_of_one_call(server: EmbeddedServer, client: redis.Redis, kind: str, share: float) -> None:
    """60 processes that make one call each count like one process that makes 60."""
    assert ended(start("processes", server.url, kind, share, 60, strict=False)) == (0, "")
    check(server.url, share)


def fork_pool(method: str, jobs_of: list[Any]) -> list[str]:
    pool = multiprocessing.get_context(method).Pool(2, maxtasksperchild=1)
    try:
        return pool.map(jobs.one, jobs_of, chunksize=1)
    finally:
        pool.close()  # a `with` block would terminate the last worker while it ends
        pool.join()


def billiard_pool(_: str, jobs_of: list[Any]) -> list[str]:
    billiard = pytest.importorskip("billiard", reason="billiard is not installed")
    pool = billiard.Pool(12, maxtasksperchild=1)  # its workers wait for a second before they end
    try:
        return list(pool.map(jobs.one, jobs_of, chunksize=1))
    finally:
        pool.close()
        pool.join()


def processes_of(context: Any, jobs_of: list[Any]) -> list[str]:
    for job in jobs_of:
        process = context.Process(target=jobs.one, args=(job,))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode == 0
    return []


def billiard_processes(_: str, jobs_of: list[Any]) -> list[str]:
    billiard = pytest.importorskip("billiard", reason="billiard is not installed")
    return processes_of(billiard, jobs_of)


def fork_processes(method: str, jobs_of: list[Any]) -> list[str]:
    return processes_of(multiprocessing.get_context(method), jobs_of)


def executor(method: str, jobs_of: list[Any]) -> list[str]:
    context = multiprocessing.get_context(method)
    found = []
    for first in range(0, len(jobs_of), 4):
        with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as pool:
            found += pool.map(jobs.one, jobs_of[first : first + 4])
    return found


WAYS: list[Any] = [
    (fork_pool, "fork"),
    pytest.param(fork_pool, "forkserver", marks=long),
    pytest.param(fork_pool, "spawn", marks=long),
    (fork_processes, "fork"),
    (executor, "fork"),
    pytest.param(executor, "spawn", marks=long),
    (billiard_pool, ""),
    (billiard_processes, ""),
]


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("kind", ["sync", "asyncio"])
@pytest.mark.parametrize(("way", "method"), WAYS)
def test_pools_of_one_call(
    server: EmbeddedServer,
    client: redis.Redis,
    way: Callable[[str, list[Any]], list[str]],
    method: str,
    kind: str,
    share: float,
) -> None:
    """The same for the workers of pools, which end without the interpreter's own end."""
    ends = way(method, [(kind, server.url, fails) for fails in failing(share, 60)])
    check(server.url, share, ends or None)


def test_a_success_ends_the_failures_before_it(server: EmbeddedServer, client: redis.Redis) -> None:
    """Without a rate, the only success of a process still ends the run of failures that the process has read."""
    for _ in range(3):
        failing_one = CircuitBreaker(NAME, redis=client, **FIRM)
        for _ in range(4):
            with pytest.raises(Boom):
                failing_one.call(jobs.work, True)
        assert ended(start("healthy", server.url)) == (0, "")
        assert failing_one.snapshot().failure_count == 0


# Never twice -------------------------------------------------------------------------------------


def test_busy_until_the_end(server: EmbeddedServer, client: redis.Redis) -> None:
    """Processes whose threads call, and whose links report, until the very end: each call is counted once."""
    for _ in range(3):
        assert ended(start("busy", server.url)) == (0, "")
    assert [counted(server.url, name) for name in "abc"] == [(3 * 2 * 300, 0)] * 3


ENDINGS = {"return": 0, "exit": 3, "error": 1, "interrupt": -signal.SIGINT, "sigint": -signal.SIGINT, "thread": 0}


@pytest.mark.parametrize(("how", "code"), ENDINGS.items())
def test_ways_to_end(server: EmbeddedServer, client: redis.Redis, how: str, code: int) -> None:
    """However the interpreter ends, the calls are counted, and its exit code stays."""
    assert ended(start("calls", server.url, how, 50))[0] == code
    assert counted(server.url) == (50, 0)


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_closed_before_the_end(server: EmbeddedServer, client: redis.Redis, kind: str) -> None:
    """After close() even os._exit() loses nothing, though the link was about to report in the background."""
    for _ in range(10):
        assert ended(start("closed", server.url, kind, strict=False)) == (0, "")
    assert counted(server.url) == (10, 0)


def test_calls_of_handlers_that_run_at_the_end(server: EmbeddedServer, client: redis.Redis) -> None:
    """Calls that handlers of atexit make count, whether they run before or after the last exchange of the link."""
    assert ended(start("handlers", server.url)) == (0, "")
    assert counted(server.url) == (5, 0)


def test_a_breaker_that_is_first_used_at_the_end(server: EmbeddedServer, client: redis.Redis) -> None:
    """The first call of a process comes from a handler of atexit, when no thread can start any more."""
    assert ended(start("unused", server.url)) == (0, "")
    assert counted(server.url) == (1, 0)


def test_event_loops_that_have_ended(server: EmbeddedServer, client: redis.Redis) -> None:
    """What event loops left is reported by the next one, or when the process ends."""
    assert ended(start("loops", server.url, strict=False))[0] == 0  # asyncio warns of what is not closed
    assert counted(server.url) == (4, 0)


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_nothing_to_report(own_server: EmbeddedServer, kind: str) -> None:
    """A process that has reported everything opens no connection to say so."""
    with redis.Redis.from_url(own_server.url) as client:
        before = client.info("stats")["total_connections_received"]
        assert ended(start("nothing", own_server.url, kind)) == (0, "")
        made = client.info("stats")["total_connections_received"] - before
    assert made <= (2 if kind == "sync" else 1)  # the caller's and, while that was in use, the link's
    assert counted(own_server.url) == (1, 0)


def test_what_does_not_matter_is_not_reported(server: EmbeddedServer, client: redis.Redis) -> None:
    """Successes that end no failures, and that no rate counts, are not sent when the process ends."""
    assert ended(start("healthy", server.url)) == (0, "")
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert ended(start("healthy", server.url)) == (0, "")
    # the first call, and the report of its success
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before == 2


# A server in trouble -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_a_server_that_hangs_at_the_end(own_server: EmbeddedServer, kind: str) -> None:
    """The process waits for redis_timeout at most, and says nothing. What was sent counts once the server goes on."""
    process = start("told", own_server.url, kind, 0.5)
    ready(process)
    with stopped(own_server):
        began = time.monotonic()
        assert ended(process) == (0, "")
        assert time.monotonic() - began < 10
    assert counted(own_server.url)[0] == (6 if kind == "sync" else 1)  # asyncio: its greeting was not answered


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_a_server_that_is_gone_at_the_end(own_server: EmbeddedServer, kind: str) -> None:
    """No server to report to: the process ends as if nothing had happened."""
    process = start("told", own_server.url, kind, 5)
    ready(process)
    own_server.stop()
    assert ended(process) == (0, "")


def test_an_outage_at_the_end(server: EmbeddedServer, client: redis.Redis) -> None:
    """While its link is down a process sends nothing at its end, and does not even try."""
    with EmbeddedServer(port=0) as target:
        proxy = FaultProxy(int(target.url.rpartition(":")[2]))
        try:
            process = start("outage", proxy.url)
            ready(process)
            proxy.reset()
            go_on(process)
            ready(process)
            tried = proxy.accepted
            code, errors = ended(process)
        finally:
            proxy.close()
        assert (code, proxy.accepted) == (0, tried)
        assert errors.count("\n") == 1  # the warning of the outage
        assert counted(target.url) == (1, 0)


# Blocking connections of asyncio's clients -------------------------------------------------------


def gathered_calls_of(url: str, kind: str, read_from: str | None = None) -> int:
    """The calls that are counted of a process that made one, and gathered five until its end."""
    code, errors = ended(start("client", url, kind, strict=kind == "url"))  # others leave open what redis-py opened
    assert code == 0, errors
    return counted(read_from or url)[0]


@pytest.mark.parametrize(("kind", "calls"), [("url", 6), ("client", 6), ("own-class", 1)])
def test_a_password_and_a_database(kind: str, calls: int) -> None:
    """The options of an asyncio client hold for the blocking connection; a class of its own has no counterpart."""
    with EmbeddedServer(port=0, args=["--requirepass", "secret"]) as target:
        assert gathered_calls_of(target.url.replace("redis://", "redis://:secret@") + "/3", kind) == calls


@pytest.mark.parametrize("kind", ["url", "client"])
def test_a_socket(server: EmbeddedServer, client: redis.Redis, kind: str) -> None:
    """A unix socket."""
    assert server.url.startswith("unix://")
    assert gathered_calls_of(server.url, kind) == 6


@pytest.mark.parametrize("kind", ["url", "cluster"])
def test_a_cluster(cluster_url: str, kind: str) -> None:
    """A cluster, whose nodes the asyncio client has learned."""
    with redis.RedisCluster.from_url(cluster_url.replace("+cluster", "")) as connected:
        connected.flushall(target_nodes="primaries")
    assert gathered_calls_of(cluster_url, kind) == 6


def test_tls(tmp_path: Path) -> None:
    """TLS, with a certificate that is checked."""
    authority = pytest.importorskip("trustme", reason="trustme is not installed: TLS was not tested").CA()
    with (
        EmbeddedServer(port=0) as target,
        proxy_to(int(target.url.rpartition(":")[2]), greeting(authority, "127.0.0.1")) as proxy,
    ):
        assert gathered_calls_of(tls_url(proxy.port, authority, tmp_path), "url", target.url) == 6


@long
def test_a_sentinel() -> None:
    """The master of a Sentinel set-up."""
    with sentinels() as formed:
        hosts = ",".join(f"{host}:{port}" for host, port in formed.addresses)
        assert gathered_calls_of(f"redis+sentinel://{hosts}/mymaster", "url") == 6


# When calls stop, and close() --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_calls_stop(server: EmbeddedServer, client: redis.Redis, kind: str) -> None:
    """What is due when calls stop is reported without another call; then nothing more is sent."""
    breaker: Any = (CircuitBreaker if kind == "sync" else AsyncCircuitBreaker)(
        NAME, redis=server.url, policy=RATE, **FIRM
    )

    async def main() -> None:
        for _ in range(100):
            result = breaker.call(fine if kind == "sync" else async_fine)
            if kind == "asyncio":
                await result
            await asyncio.sleep(0.002)
        while counted(server.url)[0] < 100:
            await asyncio.sleep(0.01)
        before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        await asyncio.sleep(1.0)
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before

    asyncio.run(asyncio.wait_for(main(), 30))


async def async_fine() -> int:
    """An awaitable success."""
    return 1


def test_a_manager_closes_in_one_exchange(
    server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred breakers with gathered calls cost one round trip, and count each call once."""
    exchanges: list[int] = []
    send = Connections.send

    def noted(self: Connections, commands: Any, *args: Any) -> Any:
        exchanges.append(len(commands))
        return send(self, commands, *args)

    config = Config(redis_url=server.url, defaults=RATE, lease=60.0, watch=False, redis_timeout=10.0)
    manager = CircuitBreakerManager.with_redis(config)
    names = [f"service-{number}" for number in range(100)]
    for name in names:
        manager.call(name, fine)
        manager.get_or_create(name).flush()
    wait_until(lambda: not manager.get_or_create(names[0])._redis.link.is_busy())
    for name in names:
        manager.call(name, fine)
    monkeypatch.setattr(Connections, "send", noted)
    manager.close()
    assert exchanges == [100]
    monkeypatch.undo()
    manager.close()
    assert {counted(server.url, name) for name in names} == {(2, 0)}


def test_an_asyncio_manager_closes_in_one_exchange(server: EmbeddedServer, client: redis.Redis) -> None:
    """The same on asyncio."""
    config = Config(redis_url=server.url, defaults=RATE, lease=60.0, watch=False, redis_timeout=10.0)
    names = [f"service-{number}" for number in range(100)]

    async def main() -> int:
        manager = AsyncCircuitBreakerManager.with_redis(config)
        for name in names:
            await manager.call(name, async_fine)
            await manager.get_or_create(name).flush()
        for name in names:
            await manager.call(name, async_fine)
        before = client.info("stats")["total_reads_processed"]
        await manager.close()
        return int(client.info("stats")["total_reads_processed"]) - before

    assert asyncio.run(main()) < 20
    assert {counted(server.url, name) for name in names} == {(2, 0)}


def test_calls_by_a_view_that_outlives_a_pause(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long lease: calls after a pause go by the view, and ask nothing. They are reported at the end all the same."""
    monkeypatch.setattr("pybreaker_redis._line.IDLE", 0.01)
    with redis.Redis.from_url(server.url) as client:
        breaker = CircuitBreaker("pause", redis=client, policy=RATE, lease=600.0, **FIRM)
        breaker.call(int)
        breaker.flush()
        for _ in range(3):  # the first exchange reports, a later one finds it idle
            time.sleep(0.05)
            breaker._redis.refresh()
        for _ in range(5):
            breaker.call(int)
        breaker._redis._at_exit()
        assert counted(server.url, "pause") == (6, 0)


def test_calls_after_close(server: EmbeddedServer, client: redis.Redis) -> None:
    """A call right after close() is not gathered unseen: the link reports it, or the end of the process does."""
    breaker = CircuitBreaker(NAME, redis=server.url, policy=RATE, lease=60.0, **FIRM)
    breaker.call(fine)
    breaker.close()
    breaker.call(fine)
    assert breaker._line in breaker._redis.link._used
    breaker.close()
    assert counted(server.url) == (2, 0)


@pytest.mark.parametrize("given", ["client", "url"])
def test_a_breaker_that_nobody_holds(server: EmbeddedServer, client: redis.Redis, given: str) -> None:
    """What a breaker has gathered is reported though it is freed before, even with its link; then they are freed."""
    breaker = CircuitBreaker(NAME, redis=client if given == "client" else server.url, policy=RATE, **FIRM)
    breaker.call(fine)
    breaker.flush()
    breaker._view.seen.closed_until = time.monotonic() + 60  # the fast path, until it is freed
    for _ in range(5):
        breaker.call(fine)
    line = weakref.ref(breaker._line)
    del breaker
    gc.collect()
    wait_until(lambda: counted(server.url) == (6, 0))
    wait_until_freed(line)
