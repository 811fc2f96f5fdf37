"""The breaker's own connections: idle ones that lead nowhere, how many there are, and what they take of the client."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import pathlib
import queue
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import wait_until
from fault_proxy import FaultProxy, proxy_to
from fault_servers import Restartable, restartable
from race_workers import signalled_at

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    Policy,
)
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import aio, connections, sync
from pybreaker_redis.wire.options import limit_of

PAUSE = 1.5
TIMEOUT = 2.0  # seconds
LONG = 10.0  # seconds; a proof that waited for half of it would be seen, on however slow a machine


@pytest.fixture
def target() -> Iterator[Restartable]:
    """A server of the test's own."""
    with restartable() as started:
        yield started


@pytest.fixture
def proxy(target: Restartable, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A way to it that silently drops links on which nothing has passed for a second.

    Connections prove themselves well before: the two clocks differ by as much as this machine is slow.
    """
    for shell in (sync, aio):
        monkeypatch.setattr(shell, "PROOF_AFTER", 0.5)
    with proxy_to(target.port) as started:
        started.drop_idle(1.0)
        yield started


class Caller:
    """One breaker of either shell, called from outside of any loop. waits: how long each call took."""

    def __init__(self, shell: str, url: str, **options: Any) -> None:
        self.events: list[str] = []
        self.waits: list[float] = []
        kind: Any = CircuitBreaker if shell == "sync" else AsyncCircuitBreaker
        self.breaker = kind(
            "idle",
            redis=url,
            listeners=[lambda event: self.events.append(event.kind)],
            **{"redis_timeout": TIMEOUT, **options},
        )
        self._runner = None if shell == "sync" else asyncio.Runner()

    def do(self, what: Callable[[], Any], lasting: float = 0.0) -> Any:
        """Call, and let the loop (if there is one) go on for so many seconds."""

        async def run() -> Any:
            try:
                return await what()
            finally:
                await asyncio.sleep(lasting)

        if self._runner is not None:
            return self._runner.run(run())
        try:
            return what()
        finally:
            time.sleep(lasting)

    def call(self, fails: bool, lasting: float = 0.0) -> bool:
        """One call. Returns whether it was admitted."""

        def plain() -> None:
            if fails:
                raise ValueError

        async def coroutine() -> None:
            plain()

        async def timed() -> Any:
            began = time.monotonic()
            try:
                return await self.breaker.call(coroutine)
            finally:
                self.waits.append(time.monotonic() - began)

        def timed_plain() -> Any:
            began = time.monotonic()
            try:
                return self.breaker.call(plain)
            finally:
                self.waits.append(time.monotonic() - began)

        try:
            self.do(timed if self._runner else timed_plain, lasting)
        except ValueError:
            return True
        except CircuitOpenError:
            return False
        return True

    def call_of(self, breakers: list[Any]) -> bool:
        """One call of each of these, which succeeds."""

        async def coroutine() -> None: ...

        for breaker in breakers:
            self.do(lambda of=breaker: of.call(coroutine if self._runner else int), lasting=0.01)
        return True

    def close(self) -> None:
        self.do(self.breaker.close)
        if self._runner is not None:
            self._runner.close()


@contextlib.contextmanager
def caller(shell: str, url: str, **options: Any) -> Iterator[Caller]:
    """A Caller for a `with` block."""
    made = Caller(shell, url, **options)
    try:
        yield made
    finally:
        made.close()


def said(caplog: pytest.LogCaptureFixture, but: str = "\0") -> list[str]:
    """The warnings of this package."""
    records = [one for one in caplog.records if one.name == "pybreaker_redis" and one.levelno >= logging.WARNING]
    return [text for one in records if but not in (text := one.getMessage())]


# Idle connections -------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sync", "async"])
@pytest.mark.parametrize("options", [{}, {"lease": 0}, {"watch": True}], ids=["leased", "strict", "watched"])
def test_idle_connections_are_dropped(
    proxy: FaultProxy, shell: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Calls with pauses in which their connection is silently dropped count as ever, and are no outage."""
    watched, policy = options.pop("watch", False), Policy(failure_threshold=3, reset_timeout=60)
    with caller(shell, proxy.url, policy=policy, redis_timeout=LONG, **options) as made:
        if watched:
            made.do(made.breaker.watch)
        assert [made.call(fails=True, lasting=PAUSE) for _ in range(4)] == [True, True, True, False]
        snapshot = made.do(made.breaker.snapshot)
        assert (snapshot.state, snapshot.source) == ("open", "redis")
        assert "redis_error" not in made.events
        assert said(caplog, "the subscription is lost") == []
        assert max(made.waits) < LONG / 2
    assert proxy.dropped >= 2


@pytest.mark.long
@pytest.mark.parametrize("shell", ["sync", "async"])
def test_healthy_calls_over_dropped_connections(
    proxy: FaultProxy, shell: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor do calls that succeed wait for a timeout, nor do the reports that the background sends for them."""
    policy = Policy(error_rate_threshold=0.5, window=10)
    with caller(shell, proxy.url, policy=policy, redis_timeout=LONG) as made:
        assert all(made.call(fails=False, lasting=PAUSE) for _ in range(4))
        snapshot = made.do(made.breaker.snapshot)
        assert snapshot.source == "redis"
        assert "redis_error" not in made.events
        assert said(caplog) == []
        assert max(made.waits) < LONG / 2
    assert proxy.dropped >= 2


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_an_idle_connection_that_works_is_kept(target: Restartable, shell: str) -> None:
    """A connection that was idle, and answers, goes on: no process opens another one after each pause."""
    with proxy_to(target.port) as proxy, caller(shell, proxy.url, lease=0) as made:
        for _ in range(3):
            made.call(fails=False, lasting=1.1)
        assert proxy.accepted == 1


def test_a_closed_connection_without_poll(target: Restartable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no select.poll, as on Windows, a connection that the server has closed is no outage either."""
    monkeypatch.setattr(sync, "select", types.SimpleNamespace(select=select.select))
    with caller("sync", target.url, lease=0) as made, target.client() as admin:
        for _ in range(3):
            made.call(fails=False)
            admin.client_kill_filter(_type="normal", skipme=True)
        assert made.do(made.breaker.snapshot).source == "redis"
        assert made.events == []


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_a_refused_ping_is_a_proof(target: Restartable, shell: str) -> None:
    """A user who may not call PING needs no right to it: the refusal is an answer."""
    with target.client() as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all", "-ping")
    with proxy_to(target.port) as proxy, caller(shell, f"redis://app:pw@127.0.0.1:{proxy.port}", lease=0) as made:
        for _ in range(3):
            made.call(fails=False, lasting=1.1)
        assert proxy.accepted == 1
        assert made.events == []


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_a_dead_server_is_an_outage_after_a_pause(proxy: FaultProxy, shell: str) -> None:
    """If the proof fails, and no new connection can be opened, the server is lost: one wait, within redis_timeout."""
    with caller(shell, proxy.url, lease=0) as made:
        made.call(fails=False, lasting=1.1)
        proxy.stall()
        made.waits.clear()
        made.call(fails=False)
        assert made.events == ["redis_error"]
        assert max(made.waits) < TIMEOUT * 1.5
        proxy.fine()


def test_threads_after_a_pause_prove_their_connections_at_once(proxy: FaultProxy) -> None:
    """Connections of many threads that were dropped together are no outage, and their proofs do not add up."""
    with caller("sync", proxy.url, lease=0) as made:
        for _ in range(2):
            began = time.monotonic()
            in_threads(16, lambda: made.call(fails=False))
            assert time.monotonic() - began < TIMEOUT
            time.sleep(PAUSE)
        assert made.events == []


@pytest.mark.parametrize("shell", ["sync", pytest.param("async", marks=pytest.mark.long)])
def test_a_distant_server(target: Restartable, shell: str) -> None:
    """Several round trips to connect take longer than a caller waits: a retry takes the connection once it is open."""
    with target.client() as admin:
        admin.config_set("requirepass", "secret")
    with proxy_to(target.port) as proxy:
        proxy.delay(TIMEOUT * 0.55)  # asyncio connections take two to four round trips to open
        with caller(shell, f"redis://:secret@127.0.0.1:{proxy.port}/1", lease=0) as made:
            made.call(fails=False)
            assert made.events == ["redis_error"]
            wait_until(lambda: made.call(fails=False, lasting=0.2) and "redis_restored" in made.events)
            assert made.do(made.breaker.snapshot).source == "redis"


# How many ---------------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[], Any]) -> None:
    """Run it in so many threads at once; wait for all."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def limited(shell: str, how: str, port: int) -> Any:
    """A client, or its URL, with five connections at most."""
    module: Any = redis if shell == "sync" else redis.asyncio
    if how == "url":
        return f"redis://127.0.0.1:{port}?max_connections=5"
    pool = module.BlockingConnectionPool if how == "blocking pool" else module.ConnectionPool
    return module.Redis(connection_pool=pool(port=port, max_connections=5))


@pytest.mark.parametrize("how", ["url", "pool", "blocking pool"])
@pytest.mark.parametrize("shell", ["sync", "async"])
def test_max_connections_holds(target: Restartable, shell: str, how: str) -> None:
    """However many threads or tasks talk to Redis: five connections, one for a subscription, and nobody is left out."""
    events: list[Any] = []
    with proxy_to(target.port) as proxy:
        options = {"redis": limited(shell, how, proxy.port), "lease": 0, "redis_timeout": 20}
        options["listeners"] = [events.append]
        if shell == "sync":
            breaker = CircuitBreaker("many", **options)
            watch = breaker.watch()
            in_threads(100, lambda: [breaker.call(int) for _ in range(5)])
            wait_until(lambda: watch.active)
            accepted, counts = proxy.accepted, breaker.counts
            watch.close()
            breaker.close()
        else:
            accepted, counts = asyncio.run(tasks_of(1000, proxy, options))
        assert accepted == 5 + 1
        assert counts.successes == (500 if shell == "sync" else 1000)
        assert events == []


async def tasks_of(number: int, proxy: FaultProxy, options: dict[str, Any]) -> Any:
    """Let so many tasks call at once. Returns the number of connections, and the counts."""

    async def work() -> None:
        await asyncio.sleep(0)

    breaker = AsyncCircuitBreaker("many", **options)
    watch = await breaker.watch()
    await asyncio.gather(*[breaker.call(work) for _ in range(number)])
    while not watch.active:
        await asyncio.sleep(0.01)
    found = proxy.accepted, breaker.counts
    await watch.close()
    await breaker.close()
    return found


def test_pool_size_of_a_configuration_holds(target: Restartable) -> None:
    """redis.pool_size of a manager's configuration is the limit of its breakers' connections, on both shells."""
    with proxy_to(target.port) as proxy:
        source = {
            "redis": {"url": f"redis://127.0.0.1:{proxy.port}", "pool_size": 2},
            "circuit_breaker": {"lease": 0, "watch": False, "redis_timeout": 20},
        }
        with CircuitBreakerManager.with_redis(source) as manager:
            in_threads(20, lambda: [manager.call(f"service-{number}", int) for number in range(5)])
            assert proxy.accepted == 2

        async def work() -> None:
            await asyncio.sleep(0)

        async def use() -> None:
            async with AsyncCircuitBreakerManager.with_redis(source) as manager:
                await asyncio.gather(*[manager.call(f"service-{number % 5}", work) for number in range(100)])

        asyncio.run(use())
        assert proxy.accepted == 2 + 2


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_the_limit_of_every_kind_of_client(kind: str) -> None:
    """The limit reaches the pools of a Sentinel's master and of a cluster's nodes."""
    url = {
        "sentinel": "redis+sentinel://h/mymaster?max_connections=3",
        "cluster": "redis+cluster://h?max_connections=3",
    }[kind]
    for breaker in (CircuitBreaker("limit", redis=url), AsyncCircuitBreaker("limit", redis=url)):
        assert limit_of(breaker._redis._pool_of(("h", 6379))) == 3


def test_the_limit_without_one() -> None:
    """A client that names no limit gets 100 connections at the most, whatever redis-py's own default is."""
    for client in (redis.Redis(), redis.asyncio.Redis()):
        assert limit_of(client.connection_pool) == 100


def test_callers_are_served_in_their_order(target: Restartable) -> None:
    """With one connection and callers that ask again at once, each of them gets its turn, again and again."""
    breaker = CircuitBreaker("fair", redis=f"{target.url}?max_connections=1", lease=0, redis_timeout=20)
    counts = [0] * 12
    end = threading.Event()

    def work(number: int) -> None:
        while not end.is_set():
            breaker.call(int)
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    wait_until(lambda: max(counts) >= 200, 60)
    end.set()
    for thread in threads:
        thread.join()
    assert min(counts) > max(counts) / 2
    breaker.close()


def test_a_caller_that_gives_up_as_its_turn_comes(target: Restartable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread has taken it from the line, and hands it a connection: it takes that one."""
    with redis.Redis(port=target.port, max_connections=1) as client:
        connections = sync.Server.of(client, 30.0)._nodes[None]
        pipe, chosen, late = connections._take(30.0), threading.Event(), threading.Event()

        class Line(collections.deque[Any]):
            def popleft(self) -> Any:
                turn = super().popleft()
                chosen.set()
                late.wait(30)
                return turn

        class Turn(queue.SimpleQueue[Any]):
            def get(self, block: bool = True, timeout: float | None = None) -> Any:
                if not late.is_set():
                    chosen.wait(30)
                    late.set()
                    raise queue.Empty
                return super().get(block, timeout)

        connections._waiting = Line()
        monkeypatch.setattr(sync.queue, "SimpleQueue", Turn)
        taken: list[Any] = []
        thread = threading.Thread(target=lambda: taken.append(connections._take(30.0)))
        thread.start()
        wait_until(lambda: bool(connections._waiting))
        connections._idle.append(pipe)
        connections._serve()
        thread.join(30)
        assert taken == [pipe]


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_no_connection_in_time_is_no_outage_of_the_server(
    target: Restartable, shell: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A breaker for which no connection becomes free goes on without Redis for a moment; the others do not."""
    errors: dict[str, str] = {}
    module: Any = redis if shell == "sync" else redis.asyncio
    kind: Any = CircuitBreaker if shell == "sync" else AsyncCircuitBreaker

    def note(event: Any) -> None:
        if event.kind == "redis_error":
            errors[event.breaker] = str(event.exception)

    with proxy_to(target.port) as proxy, caller(shell, proxy.url) as made:
        client = module.Redis(port=proxy.port, max_connections=1)
        breakers = [
            kind(f"b{number}", redis=client, lease=0, redis_timeout=TIMEOUT, listeners=[note]) for number in range(4)
        ]

        async def gather() -> None:
            await asyncio.gather(*[breaker.snapshot() for breaker in breakers])

        def threads() -> None:
            waiting = iter(breakers)
            in_threads(4, lambda: next(waiting).snapshot())

        all_at_once = threads if shell == "sync" else gather
        made.do(all_at_once)
        proxy.delay(TIMEOUT * 0.7)  # the third caller in line would wait for twice as long
        made.do(all_at_once)
        assert len(errors) == 2
        assert all("all 1 connections that max_connections allows were in use" in text for text in errors.values())
        assert len(caplog.messages) == 2
        assert all("no reply from Redis; this process continues on its own: all" in text for text in caplog.messages)
        link = breakers[0]._redis.link
        assert not link._outages
        proxy.fine()
        wait_until(lambda: made.call_of(breakers) and not any(one._line.refusal for one in breakers))
        made.do(breakers[0].close)


# A signal handler -------------------------------------------------------------------------------


class Interrupted(Exception):
    """Raised by a signal handler."""


def interrupt() -> None:
    raise Interrupted


@pytest.mark.parametrize("module", [sync, connections], ids=["use", "open"])
def test_a_signal_handler_that_raises_loses_no_connection(target: Restartable, module: types.ModuleType) -> None:
    """Wherever a handler raises while a thread opens or has the only connection, the next caller gets one."""
    breaker = CircuitBreaker("raises", redis=f"{target.url}?max_connections=1", lease=0, redis_timeout=20)

    def call() -> None:
        with contextlib.suppress(Interrupted):
            breaker.call(int)

    for place in itertools.count():
        if module is connections:
            breaker.close()
        if not signalled_at(place, module, call, interrupt):
            break
        breaker.call(int)
        assert breaker.snapshot().source == "redis", f"place {place}"
    assert place > 20
    breaker.close()


@pytest.mark.long
def test_a_signal_handler_that_calls_the_breaker_waits_for_no_connection_for_ever(target: Restartable) -> None:
    """Nor does a handler hang that calls the breaker while its own thread has the only connection."""
    options: dict[str, Any] = {"lease": 0, "redis_timeout": 0.1}
    breaker = CircuitBreaker("calls", redis=f"{target.url}?max_connections=1", **options)
    called: list[int] = []
    for place in itertools.count():
        wait_until(lambda: breaker.call(int) == 0 and breaker.snapshot().source == "redis")
        if not signalled_at(place, sync, lambda: breaker.call(int), lambda: called.append(breaker.call(int))):
            break
    assert place > 20
    assert len(called) == place
    breaker.close()


FORKING = """
import os, sys, threading, time
from pybreaker_redis import CircuitBreaker

breaker = CircuitBreaker("forks", redis=sys.argv[1] + "?max_connections=1", lease=0, redis_timeout=20)

def work():
    while True:
        breaker.call(int)

for _ in range(8):
    threading.Thread(target=work, daemon=True).start()
for _ in range(20):
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        breaker.call(int)
        os._exit(0 if breaker.snapshot().source == "redis" else 3)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


def test_a_child_has_connections_of_its_own(target: Restartable) -> None:
    """A fork while threads have the only connection, or wait for it, leaves the child nothing to wait for."""
    done = subprocess.run([sys.executable, "-c", FORKING, target.url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# What they take of the client -------------------------------------------------------------------


def connections_of(target: Restartable, **fields: str) -> list[dict[str, str]]:
    """The server's connections with these fields in CLIENT LIST."""
    with target.client() as direct:
        return [one for one in direct.client_list() if fields.items() <= one.items()]


def check_shared(shell: str, client: Any, **options: Any) -> None:
    """A breaker on this client works, and asks Redis."""
    with caller(shell, client, lease=0, **options) as made:
        made.call(fails=True)
        snapshot = made.do(made.breaker.snapshot)
        assert (snapshot.source, snapshot.failure_count) == ("redis", 1)
        assert made.events == []


@pytest.mark.parametrize("shell", ["sync", "async"])
@pytest.mark.parametrize("protocol", [2, 3])
def test_options_of_the_client(target: Restartable, shell: str, protocol: int) -> None:
    """Name, library, database, user and protocol of the client are those of the breaker's own connections."""
    with target.client() as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all")
    module: Any = redis if shell == "sync" else redis.asyncio
    client = module.Redis(
        port=target.port, db=3, username="app", password="pw", client_name="mine", lib_name="own", protocol=protocol
    )
    with caller(shell, client, lease=0) as made:
        made.call(fails=True)
        fields = {"name": "mine", "db": "3", "user": "app", "resp": str(protocol)}
        [ours] = connections_of(target, **fields)
        assert ours.get("lib-name", "own") == "own"  # Redis 7.2 and later
        assert made.do(made.breaker.snapshot).failure_count == 1
    with target.client(db=3) as direct:
        assert direct.exists("circuit_breaker:idle:state")


class Rotating(redis.CredentialProvider):
    """Gives another user each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        return f"user{self.asked}", "pw"


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_credentials_that_rotate(target: Restartable, shell: str) -> None:
    """Each new connection asks the credential provider again."""
    with target.client() as admin:
        for number in (1, 2, 3):
            admin.execute_command("ACL", "SETUSER", f"user{number}", "on", ">pw", "~*", "&*", "+@all")
    provider = Rotating()
    module: Any = redis if shell == "sync" else redis.asyncio
    with (
        caller(shell, module.Redis(port=target.port, credential_provider=provider), lease=0) as made,
        target.client() as admin,
    ):
        for number in (1, 2, 3):
            made.call(fails=False)
            assert provider.asked == number
            assert len(connections_of(target, user=f"user{number}")) == 1
            admin.execute_command("ACL", "DELUSER", f"user{number}")  # closes its connections, a moment later
            wait_until(lambda: not connections_of(target, user=f"user{number}"))  # noqa: B023
        assert made.events == []


class Tunnel(redis.Connection):
    """Connects through a proxy: its own _connect() leads elsewhere than host and port."""

    def __init__(self, *, through: int, **options: Any) -> None:
        super().__init__(**options)
        self._through = through

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._through))


class AsyncTunnel(redis.asyncio.Connection):
    """The same for asyncio."""

    def __init__(self, *, through: int, **options: Any) -> None:
        super().__init__(**options)
        self._through = through

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._through)


class Making(redis.ConnectionPool):
    """A pool that makes its connections itself."""

    def make_connection(self) -> Any:
        return Tunnel(through=self.through, **self.connection_kwargs)


class AsyncMaking(redis.asyncio.ConnectionPool):
    """The same for asyncio."""

    def make_connection(self) -> Any:
        return AsyncTunnel(through=self.through, **self.connection_kwargs)


@pytest.mark.parametrize("shell", ["sync", "async"])
@pytest.mark.parametrize("way", ["connection class", "pool class"])
def test_classes_of_the_users(target: Restartable, shell: str, way: str) -> None:
    """A connection's or pool's class of the user's decides where the breaker's own connections lead."""
    module: Any = redis if shell == "sync" else redis.asyncio
    with proxy_to(target.port) as proxy:
        if way == "connection class":
            made_by: Any = Tunnel if shell == "sync" else AsyncTunnel
            pool = module.ConnectionPool(connection_class=made_by, host="nowhere.invalid", through=proxy.port)
        else:
            pool = (Making if shell == "sync" else AsyncMaking)(host="nowhere.invalid", max_connections=1)
            pool.through = proxy.port
        check_shared(shell, module.Redis(connection_pool=pool))
        assert proxy.accepted == 1


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_a_connect_function_of_the_users(target: Restartable, shell: str) -> None:
    """redis_connect_func of a client of one server runs for each of the breaker's own connections."""
    seen: list[Any] = []

    def connected(connection: Any) -> None:
        seen.append(connection)
        connection.on_connect()

    async def async_connected(connection: Any) -> None:
        seen.append(connection)
        await connection.on_connect()

    if shell == "sync":
        check_shared(shell, redis.Redis(port=target.port, redis_connect_func=connected))
    else:
        check_shared(shell, redis.asyncio.Redis(port=target.port, redis_connect_func=async_connected))
    assert len(seen) == 1


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_a_unix_socket(shell: str) -> None:
    """A client of a unix socket, with a database."""
    module: Any = redis if shell == "sync" else redis.asyncio
    with EmbeddedServer() as started:
        check_shared(shell, module.Redis(unix_socket_path=started.url.removeprefix("unix://"), db=2))


@pytest.mark.parametrize("shell", ["sync", "async"])
@pytest.mark.parametrize("given", ["ca_data", "client certificate", "dropped when idle"])
def test_tls_options(target: Restartable, shell: str, given: str, tmp_path: pathlib.Path) -> None:
    """An authority as text, a client's certificate, and connections over TLS that are dropped while they are idle."""
    authority = pytest.importorskip("trustme", reason="trustme is not installed: TLS was not tested").CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    options: dict[str, Any] = {"ssl": True, "ssl_ca_data": authority.cert_pem.bytes().decode()}
    if given == "client certificate":
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
        own = authority.issue_cert("me@example.com")
        own.private_key_pem.write_to_path(tmp_path / "key.pem")
        own.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        options |= {"ssl_keyfile": str(tmp_path / "key.pem"), "ssl_certfile": str(tmp_path / "cert.pem")}
    module: Any = redis if shell == "sync" else redis.asyncio
    with proxy_to(target.port, context) as proxy:
        client = module.Redis(port=proxy.port, host="127.0.0.1", **options)
        if given == "dropped when idle":
            proxy.drop_idle(1.0)
        with caller(shell, client, lease=0) as made:
            for _ in range(2):
                made.call(fails=True, lasting=PAUSE if given == "dropped when idle" else 0.0)
            assert made.do(made.breaker.snapshot).failure_count == 2
            assert made.events == []
        assert proxy.dropped >= (1 if given == "dropped when idle" else 0)


# How many for many breakers ---------------------------------------------------------------------


@pytest.mark.parametrize("given", ["client", "url"])
@pytest.mark.parametrize("shell", ["sync", "async"])
def test_a_hundred_breakers_share_their_connections(target: Restartable, shell: str, given: str) -> None:
    """A hundred breakers on one client, or one URL, have one connection for a thread; close() leaves none open."""
    module: Any = redis if shell == "sync" else redis.asyncio
    client: Any = module.Redis(port=target.port) if given == "client" else f"redis://127.0.0.1:{target.port}"
    kind: Any = CircuitBreaker if shell == "sync" else AsyncCircuitBreaker
    breakers = [kind(f"b{number}", redis=client, redis_timeout=20) for number in range(100)]
    with caller(shell, target.url) as made:
        made.call_of(breakers)
        # the thread's own, and that of the exchange in the background
        assert len(connections_of(target)) <= 2 + 1
        for breaker in breakers:
            made.do(breaker.close)
        wait_until(lambda: len(connections_of(target)) == 1)
