"""Connections that take longer to open than a caller waits. README.md lists the interleavings.

A credential provider is the gate: a connection is open once the test lets it pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import wait_until
from race_workers import PATIENCE, interrupted_at, run_threads

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import subscription, sync

NOBODY = ("default", "")


class Gate(redis.CredentialProvider):
    """Credentials that come once the test opens the gate. asked: how often a connection asked for them."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.asked = 0
        self.fails = 0

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        assert self.opened.wait(PATIENCE)
        if self.fails:
            self.fails -= 1
            raise OSError("no credentials")
        return NOBODY


class AsyncGate(Gate):
    """The same on a loop."""

    async def get_credentials_async(self) -> tuple[str, str]:
        self.asked += 1
        while not self.opened.is_set():
            await asyncio.sleep(0.005)
        if self.fails:
            self.fails -= 1
            raise OSError("no credentials")
        return NOBODY


@pytest.fixture
def gate() -> Iterator[Gate]:
    """It is open at the end, so that no thread hangs."""
    made = Gate()
    yield made
    made.opened.set()


def behind(gate: Gate, server: EmbeddedServer, redis_timeout: float = 0.25, **options: Any) -> CircuitBreaker:
    """A breaker whose connections need the gate."""
    client = redis.Redis(unix_socket_path=server.url.removeprefix("unix://"), credential_provider=gate, **options)
    return CircuitBreaker("gated", redis=client, lease=0, redis_timeout=redis_timeout)


def connections(client: redis.Redis) -> int:
    """How many connections the server has, but for the test's own."""
    return len(client.client_list()) - 1


def is_back(breaker: CircuitBreaker) -> bool:
    breaker.call(int)
    return breaker.snapshot().source == "redis"


def opening(breaker: CircuitBreaker) -> list[Any]:
    """The connections that are being opened."""
    return breaker._redis._nodes[None]._opening()


def test_a_late_connection_is_used_by_the_next_call(gate: Gate, server: EmbeddedServer) -> None:
    """Nobody waits for it when it is open: it is the next retry's, and no other one was begun."""
    breaker = behind(gate, server)
    for _ in range(3):
        breaker.call(int)
        assert breaker.snapshot().source == "local"
    assert gate.asked == 1
    gate.opened.set()
    wait_until(lambda: not opening(breaker))
    wait_until(lambda: is_back(breaker))
    assert gate.asked == 1
    breaker.close()


def test_callers_that_wait_for_a_late_attempt(gate: Gate, server: EmbeddedServer) -> None:
    """Of two callers one waits for the attempt that is late, the other for another one; both get a connection."""
    breaker = behind(gate, server)
    breaker.call(int)
    node = breaker._redis._nodes[None]
    node._timeout = PATIENCE
    threads = [threading.Thread(target=breaker._redis.history, args=(breaker._key, 1)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(node._waiting) >= 2 and gate.asked == 2)
    gate.opened.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert gate.asked == 2
    breaker.close()


def test_many_callers_leave_one_late_attempt(gate: Gate, server: EmbeddedServer, client: redis.Redis) -> None:
    """16 threads wait for new connections, of which five may be open: one attempt is left, and no more begin."""
    before = connections(client)
    breaker = behind(gate, server, max_connections=5)
    run_threads(16, lambda _: breaker.call(int))
    asked = gate.asked
    assert asked <= 5
    wait_until(lambda: connections(client) - before <= 1)  # the others are given up
    for _ in range(20):
        breaker.call(int)
    assert gate.asked == asked
    gate.opened.set()
    wait_until(lambda: is_back(breaker))
    assert connections(client) - before <= 5
    breaker.close()
    wait_until(lambda: connections(client) == before)


def test_close_gives_up_a_late_attempt(gate: Gate, server: EmbeddedServer, client: redis.Redis) -> None:
    """close() leaves nothing open, now or when the attempt ends."""
    before = connections(client)
    breaker = behind(gate, server)
    breaker.call(int)
    assert connections(client) == before + 1
    breaker.close()
    wait_until(lambda: connections(client) == before)
    gate.opened.set()
    wait_until(lambda: not any(thread.name == "pybreaker_redis-connect" for thread in threading.enumerate()))
    assert connections(client) == before


def test_a_caller_that_waits_during_close(gate: Gate, server: EmbeddedServer) -> None:
    """close() gives up the attempt for which a caller waits: another one begins, and the caller gets its connection."""
    breaker = behind(gate, server, redis_timeout=PATIENCE)
    thread = threading.Thread(target=breaker.call, args=(int,))
    thread.start()
    wait_until(lambda: gate.asked == 1)
    breaker._redis.close()
    wait_until(lambda: gate.asked == 2)
    gate.opened.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert breaker.snapshot().source == "redis"
    breaker.close()


def test_a_late_attempt_fails(gate: Gate, server: EmbeddedServer) -> None:
    """All that wait for it get its error at once, not when redis_timeout is over; the next attempt is another one."""
    breaker = behind(gate, server, max_connections=1)
    breaker.call(int)
    node, errors = breaker._redis._nodes[None], list[BaseException]()
    node._timeout = 10 * PATIENCE

    def wait() -> None:
        try:
            breaker._redis.history(breaker._key, 1)
        except (redis.RedisError, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(node._waiting) >= 2)
    gate.fails = 1
    gate.opened.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert [str(error) for error in errors] == ["no credentials"] * 2
    wait_until(lambda: is_back(breaker))
    assert gate.asked >= 2
    breaker.close()


def test_an_attempt_is_given_up(gate: Gate, server: EmbeddedServer) -> None:
    """One that takes longer than any exchange may is given up, and the next one is begun."""
    breaker = behind(gate, server, redis_timeout=0.02)
    breaker.call(int)
    [first] = opening(breaker)
    wait_until(lambda: breaker.call(int) == 0 and gate.asked > 1)
    assert first._connection._sock is None
    breaker.close()


class Trickler:
    """A listener that answers byte by byte, without end. ended: the connections that their clients have closed."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._trickle, args=(self._listener.accept()[0],), daemon=True).start()

    def _trickle(self, end: socket.socket) -> None:
        stop = threading.Event()
        with end, contextlib.suppress(OSError):
            end.sendall(b"$1000000\r\n")
            while not stop.wait(0.01):
                end.sendall(b"x")
        self.ended.append(1)

    def close(self) -> None:
        """Free the port. Open connections go on."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def trickler() -> Iterator[Trickler]:
    """It is closed at the end."""
    started = Trickler()
    yield started
    with contextlib.suppress(OSError):  # the test has closed it
        started.close()


def test_a_server_that_trickles(trickler: Trickler) -> None:
    """A listener that answers byte by byte, without end: the call waits once, and each attempt ends."""
    breaker = CircuitBreaker("trickled", redis=trickler.url, lease=0, redis_timeout=0.05)
    wait_until(lambda: breaker.call(int) == 0 and len(trickler.ended) >= 2)
    breaker.close()
    wait_until(lambda: len(trickler.ended) >= 3 or not opening(breaker))


def test_a_subscription_of_a_server_that_trickles(trickler: Trickler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt to open it ends, so that it stands once a server answers in that place."""
    monkeypatch.setattr(subscription, "PING_EVERY", 0.2)
    with CircuitBreaker("trickled", redis=trickler.url).watch() as watch:
        wait_until(lambda: len(trickler.ended) >= 2)
        trickler.close()
        with EmbeddedServer(port=trickler.port):
            wait_until(lambda: watch.active)


def test_a_connection_that_becomes_free_is_taken(gate: Gate, server: EmbeddedServer) -> None:
    """A caller that waits long for a new connection takes one that another caller gives back before."""
    breaker = behind(gate, server, redis_timeout=PATIENCE)
    gate.opened.set()
    breaker.call(int)
    gate.opened.clear()
    node = breaker._redis._nodes[None]
    pipe = node._take(PATIENCE)
    thread = threading.Thread(target=breaker._redis.history, args=(breaker._key, 1))
    thread.start()
    wait_until(lambda: gate.asked == 2)
    node._idle.append(pipe)
    node._serve()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not gate.opened.is_set()
    gate.opened.set()
    wait_until(lambda: not opening(breaker))
    assert len(node._idle) == 2
    breaker.close()


@pytest.mark.parametrize("how", ["close", "lost"])
def test_a_connection_is_given_back_as_its_era_ends(server: EmbeddedServer, how: str) -> None:
    """close(), or the loss of the server, at any point of another thread's exchange: no old connection is kept."""

    def end() -> None:
        if how == "close":
            node.close()
        else:
            node._drop(*node._lose(redis.ConnectionError("lost")))

    for line in itertools.count():
        breaker = CircuitBreaker("ends", redis=server.url, lease=0, redis_timeout=PATIENCE)
        breaker.call(int)
        node = breaker._redis._nodes[None]
        with contextlib.suppress(redis.ConnectionError):
            if not interrupted_at(line, functools.partial(breaker._redis.history, breaker._key, 1), end):
                break
        assert all(pipe.era == node._era for pipe in node._idle), f"line {line}"
        wait_until(lambda: len(node._pipes) == len(node._idle))  # noqa: B023
        breaker.close()
    assert line > 20
    breaker.close()


def test_an_attempt_ends_as_it_is_given_up(gate: Gate, server: EmbeddedServer) -> None:
    """A connection that opens while a caller gives it up is closed or kept: it is not closed while it is used."""
    for line in itertools.count():
        gate.opened.clear()
        breaker, asked = behind(gate, server, PATIENCE), gate.asked
        node = breaker._redis._nodes[None]
        for pipe in (sync.Pipe(), sync.Pipe()):
            node._pipes[pipe] = None
            node._begin(pipe)
        wait_until(lambda: gate.asked == asked + 2)  # noqa: B023

        def let_pass() -> None:
            gate.opened.set()
            wait_until(lambda: not node._opening())  # noqa: B023

        reached = interrupted_at(line, functools.partial(node._gave_up, 1.0), let_pass)
        gate.opened.set()
        wait_until(lambda: len(node._pipes) == len(node._idle))  # noqa: B023
        assert all(pipe.proves(PATIENCE) for pipe in node._idle), f"line {line}"
        breaker.close()
        if not reached:
            break
    assert line > 5


class Interrupted(BaseException):
    """Raised by a signal handler."""


def test_an_exception_in_the_wait(gate: Gate, server: EmbeddedServer, client: redis.Redis) -> None:
    """A signal handler raises while its thread waits for a connection: the next caller takes that connection."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    def send() -> None:
        wait_until(lambda: gate.asked == 1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = connections(client)
    breaker = behind(gate, server, redis_timeout=PATIENCE, max_connections=1)
    usual = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        with pytest.raises(Interrupted):
            breaker.call(int)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, usual)
    gate.opened.set()
    assert is_back(breaker)
    assert gate.asked == 1
    breaker.close()
    wait_until(lambda: connections(client) == before)


def test_no_thread_can_start(gate: Gate, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller opens the connection itself."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    gate.opened.set()
    breaker = behind(gate, server)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert is_back(breaker)
    breaker.close()


FORKING = """
import os, sys, threading, time
import redis
from pybreaker_redis import CircuitBreaker

opened = threading.Event()

class Gate(redis.CredentialProvider):
    def get_credentials(self):
        while not opened.is_set():
            time.sleep(0.01)
        return "default", ""

def back():
    while breaker.snapshot().source != "redis":
        breaker.call(int)
        time.sleep(0.01)
    return 0

client = redis.Redis(unix_socket_path=sys.argv[1], credential_provider=Gate(), max_connections=1)
breaker = CircuitBreaker("forks late", redis=client, lease=0)
breaker.call(int)
assert breaker.snapshot().source == "local"
number = breaker._redis._nodes[None]._opening()[0]._connection._sock.fileno()
child = os.fork()
if child == 0:
    try:
        os.fstat(number)
        os._exit(3)
    except OSError:  # closed
        opened.set()
        os._exit(back())
assert os.waitpid(child, 0)[1] == 0
opened.set()
back()
"""


def test_a_fork_during_a_late_attempt(server: EmbeddedServer) -> None:
    """The child has closed its copy of the socket, opens its own connection, and so does the parent later."""
    path = server.url.removeprefix("unix://")
    done = subprocess.run([sys.executable, "-c", FORKING, path], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


# asyncio ----------------------------------------------------------------------------------------


async def fine() -> int:
    return 1


def async_behind(gate: AsyncGate, server: EmbeddedServer, redis_timeout: float = 0.25) -> AsyncCircuitBreaker:
    path = server.url.removeprefix("unix://")
    client = redis.asyncio.Redis(unix_socket_path=path, credential_provider=gate)
    return AsyncCircuitBreaker("gated", redis=client, lease=0, redis_timeout=redis_timeout)


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.005)


async def async_is_back(breaker: AsyncCircuitBreaker) -> bool:
    await breaker.call(fine)
    return (await breaker.snapshot()).source == "redis"


def test_a_late_connection_of_a_loop_is_used_by_the_next_call(server: EmbeddedServer) -> None:
    """The same on asyncio, with two tasks that wait for it."""

    async def main() -> None:
        gate = AsyncGate()
        breaker = async_behind(gate, server)
        for _ in range(3):
            await breaker.call(fine)
        assert gate.asked == 1
        node = breaker._redis._nodes[None]
        node._timeout = PATIENCE
        waiting = [asyncio.create_task(breaker._redis.history(breaker._key, 1)) for _ in range(2)]
        while gate.asked < 2:  # the late attempt, and another one for the second task
            await asyncio.sleep(0.005)
        gate.opened.set()
        await asyncio.gather(*waiting)
        await until(lambda: async_is_back(breaker))
        await breaker.close()

    asyncio.run(main())


def test_a_cancelled_caller_leaves_its_attempt_to_the_next(server: EmbeddedServer, client: redis.Redis) -> None:
    """The caller is cancelled while its connection is opened: the next one takes that connection."""
    before = connections(client)

    async def main() -> None:
        gate = AsyncGate()
        breaker = async_behind(gate, server, PATIENCE)
        caller = asyncio.create_task(breaker._redis.history(breaker._key, 1))
        while gate.asked == 0:
            await asyncio.sleep(0.005)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        following = asyncio.create_task(breaker._redis.history(breaker._key, 1))
        await asyncio.sleep(0.05)
        assert gate.asked == 1
        gate.opened.set()
        assert await following == []
        assert connections(client) == before + 1
        await breaker.close()

    asyncio.run(main())


def test_a_late_attempt_of_a_loop_fails(server: EmbeddedServer) -> None:
    """The task that waits for it gets an error at once, and the next attempt is another one."""

    async def main() -> None:
        gate = AsyncGate()
        breaker = async_behind(gate, server)
        await breaker.call(fine)
        breaker._redis._nodes[None]._timeout = 10 * PATIENCE
        waiting = asyncio.create_task(breaker._redis.history(breaker._key, 1))
        await asyncio.sleep(0.05)
        gate.fails = 1
        gate.opened.set()
        with pytest.raises(redis.ConnectionError):
            await asyncio.wait_for(waiting, PATIENCE)
        await until(lambda: async_is_back(breaker))
        await breaker.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "loop"])
def test_nothing_of_a_late_attempt_stays(server: EmbeddedServer, client: redis.Redis, how: str) -> None:
    """close(), or the end of the loop, gives up the attempt and closes its connection."""
    before = connections(client)

    async def main() -> None:
        gate = AsyncGate()
        breaker = async_behind(gate, server)
        await breaker.call(fine)
        assert connections(client) == before + 1
        if how == "close":
            await breaker.close()
            wait_until(lambda: connections(client) == before)
            gate.opened.set()
            await asyncio.sleep(0.05)
            assert connections(client) == before

    asyncio.run(main())
    wait_until(lambda: connections(client) == before)


def test_a_task_takes_a_connection_that_becomes_free(server: EmbeddedServer) -> None:
    """A task that waits for a new connection takes one that another task gives back before."""

    async def main() -> None:
        gate = AsyncGate()
        gate.opened.set()
        breaker = async_behind(gate, server, PATIENCE)
        await breaker.call(fine)
        node = breaker._redis._nodes[None]
        gate.opened.clear()
        pipe = node._idle.pop()
        waiting = asyncio.create_task(breaker._redis.history(breaker._key, 1))
        while gate.asked < 2:
            await asyncio.sleep(0.005)
        node._keep(pipe)
        await asyncio.wait_for(waiting, PATIENCE)
        gate.opened.set()
        await breaker.close()

    asyncio.run(main())


@pytest.mark.parametrize("lost", [False, True])
def test_a_task_is_cancelled_as_it_is_handed_a_connection(server: EmbeddedServer, lost: bool) -> None:
    """The connection is there for the next task, as old as it was; if its era has ended meanwhile, it is closed."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker(
            "handed", redis=f"{server.url}?max_connections=1", lease=0, redis_timeout=PATIENCE
        )
        await breaker.call(fine)
        node = breaker._redis._nodes[None]
        pipe = node._idle.pop()
        waiting = asyncio.create_task(breaker._redis.history(breaker._key, 1))
        while not node._waiting:
            await asyncio.sleep(0)
        pipe.used_at = used_at = pipe.used_at - 0.5
        node._keep(pipe)
        waiting.cancel()
        if lost:
            node._end_era()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert list(node._idle) == ([] if lost else [pipe])
        assert (pipe in node._pipes) is not lost
        assert pipe.used_at == used_at
        await breaker.close()

    asyncio.run(main())


class Mute:
    """A listener that takes connections and never answers. taken: those."""

    def __init__(self) -> None:
        self.taken: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.taken.append(self._listener.accept()[0])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in [self._listener, *self.taken]:
            one.close()


@pytest.fixture
def mute() -> Iterator[Mute]:
    """It is closed at the end."""
    started = Mute()
    yield started
    started.close()


def test_a_busy_loop_and_a_server_that_is_mute(mute: Mute) -> None:
    """A call waits for a new connection for redis_timeout, even if its loop computes for most of the time."""

    async def compute() -> None:
        while True:
            ends = time.thread_time() + 0.005
            while time.thread_time() < ends:
                pass
            await asyncio.sleep(0.001)

    async def main() -> None:
        breaker = AsyncCircuitBreaker("mute", redis=mute.url, lease=0, redis_timeout=0.05)
        busy = asyncio.create_task(compute())
        assert await asyncio.wait_for(breaker.call(fine), PATIENCE / 2) == 1
        assert (await breaker.snapshot()).source == "local"
        busy.cancel()
        await breaker.close()

    asyncio.run(main())


def test_an_attempt_is_not_collected(mute: Mute) -> None:
    """An attempt for which nobody waits goes on: something refers to its task."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("mute", redis=mute.url, lease=0, redis_timeout=0.05)
        await breaker.call(fine)
        [number] = [id(pipe) for pipe in opening(breaker)]
        gc.collect()
        assert [id(pipe) for pipe in opening(breaker)] == [number]
        await breaker.close()

    asyncio.run(main())


def test_an_attempt_is_given_up_before_it_begins(mute: Mute) -> None:
    """It takes no place any more."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("mute", redis=mute.url, lease=0, redis_timeout=PATIENCE)
        node = breaker._redis._nodes[None]
        callers = [asyncio.create_task(breaker._redis.history(breaker._key, 1)) for _ in range(2)]
        await asyncio.sleep(0)  # both attempts are planned
        assert len(node._pipes) == 2
        callers[1].cancel()
        await node._leave(node._waiting[1])
        node._gave_up(PATIENCE)
        with pytest.raises(asyncio.CancelledError):
            await callers[1]
        assert len(node._pipes) == 1
        callers[0].cancel()
        await breaker.close()

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
