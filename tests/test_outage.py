"""Redis refuses, hangs, comes back: what the calls of both breakers notice of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import logging
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import stopped, wait_until, wait_until_freed

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncPermit,
    CircuitBreaker,
    CircuitOpenError,
    Policy,
    RedisUnavailableError,
)
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.commands import Command
from pybreaker_redis.wire.sync import Connections

Make = Callable[..., Any]
MANY = Policy(failure_threshold=10**9)
PATIENT: dict[str, Any] = {"lease": 0, "redis_timeout": 20.0}


class Boom(Exception):
    """A failure of the guarded service."""


def fine() -> str:
    """A call that succeeds."""
    return "fine"


def boom() -> None:
    """A call that fails."""
    raise Boom


class OnLoop:
    """An AsyncCircuitBreaker or its permit, used from outside of its loop, which runs as long as a call lasts."""

    def __init__(self, used: AsyncCircuitBreaker | AsyncPermit, runner: asyncio.Runner) -> None:
        self._used, self._runner = used, runner

    def call(self, func: Callable[[], Any]) -> Any:
        async def awaited() -> Any:
            return func()

        return self._run(self._used.call, awaited)  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._used, name)
        return functools.partial(self._run, found) if callable(found) else found

    def _run(self, method: Callable[..., Any], *args: Any) -> Any:
        async def awaited() -> Any:
            result = method(*args)
            return await result if inspect.isawaitable(result) else result

        result = self._runner.run(awaited())
        return OnLoop(result, self._runner) if isinstance(result, AsyncPermit) else result


@pytest.fixture(params=["sync", "async"])
def shell(request: pytest.FixtureRequest) -> str:
    """Which breaker."""
    return request.param


@pytest.fixture
def make(shell: str) -> Iterator[Make]:
    """Makes breakers; the asyncio one looks like the other."""
    if shell == "sync":
        yield lambda url, **options: CircuitBreaker("discovery", redis=url, **options)
        return
    with asyncio.Runner() as runner:
        yield lambda url, **options: OnLoop(AsyncCircuitBreaker("discovery", redis=url, **options), runner)


@pytest.fixture
def dead_url() -> Iterator[str]:
    """Where nobody listens, and nobody else can begin to."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{bound.getsockname()[1]}"


class Slammer:
    """Accepts connections, counts them and closes each at once."""

    def __init__(self) -> None:
        self.count = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                if connection.getpeername() == self._last:
                    return
                self.count += 1

    _last: Any = None

    def close(self) -> None:
        """End the thread by a connection that it knows."""
        with socket.socket() as last:
            last.bind(("127.0.0.1", 0))
            self._last = last.getsockname()
            last.connect(("127.0.0.1", self.port))
            self._thread.join(60)
        self._listener.close()


@pytest.fixture
def slammer() -> Iterator[Slammer]:
    """A server that slams the door."""
    started = Slammer()
    yield started
    started.close()


def listening() -> tuple[list[str], list[Callable[[Any], None]]]:
    """The kinds of events of Redis so far, and the listeners that note them."""
    kinds: list[str] = []
    return kinds, [lambda event: kinds.append(event.kind) if event.kind.startswith("redis") else None]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning or worse by the library."""
    return [one.getMessage() for one in caplog.records if one.name == "pybreaker_redis" and one.levelno > logging.INFO]


def back(breaker: Any) -> bool:
    """Whether Redis is the source again."""
    return bool(breaker.snapshot().source == "redis")


# Nobody listens


def test_constructor_needs_no_server(make: Make, dead_url: str, slammer: Slammer) -> None:
    """Making a breaker neither raises nor connects."""
    make(dead_url)
    make("redis://no.such.host.invalid:1")
    make(slammer.url)
    assert slammer.count == 0


def check_notified_once(breaker: Any, kinds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """50 calls without a server succeed, with one warning and one event among them."""
    assert [breaker.call(fine) for _ in range(50)] == ["fine"] * 50
    assert kinds == ["redis_error"]
    [warning] = warnings(caplog)
    assert warning.startswith("Redis does not answer; the breakers of this process continue on their own: ")
    assert len(warning.partition(": ")[2]) > 5


def test_notified_once(make: Make, dead_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """An outage from the very first call on reaches no caller, and is notified once."""
    kinds, listeners = listening()
    check_notified_once(make(dead_url, lease=0, listeners=listeners), kinds, caplog)


def test_notified_once_with_a_lease(make: Make, dead_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The same where the first call refreshes the view."""
    kinds, listeners = listening()
    check_notified_once(make(dead_url, listeners=listeners), kinds, caplog)


def test_local_protection(make: Make, dead_url: str) -> None:
    """Without Redis a process trips by the same rules, and rejects with the right wait."""
    breaker = make(dead_url, lease=0, policy=Policy(failure_threshold=3, reset_timeout=3600))
    for _ in range(3):
        with pytest.raises(Boom):
            breaker.call(boom)
    with pytest.raises(CircuitOpenError) as caught:
        breaker.call(fine)
    assert caught.value.state == "open"
    assert 3000 < caught.value.retry_after <= 3600
    seen = breaker.snapshot()
    assert (seen.source, seen.state, seen.failure_count) == ("local", "open", 3)


def test_local_recovery(make: Make, dead_url: str) -> None:
    """Without Redis a process probes and recovers by itself."""
    breaker = make(dead_url, lease=0, policy=Policy(failure_threshold=1, reset_timeout=0.001))
    with pytest.raises(Boom):
        breaker.call(boom)
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    assert breaker.call(fine) == "fine"
    assert breaker.snapshot().state == "closed"


def test_mode_open(make: Make, dead_url: str) -> None:
    """With on_redis_failure="open" every call is rejected, for a second at the most."""
    breaker = make(dead_url, on_redis_failure="open")
    for _ in range(3):
        with pytest.raises(CircuitOpenError) as caught:
            breaker.call(fine)
        assert 0 < caught.value.retry_after <= 1
    assert (breaker.snapshot().state, breaker.snapshot().source) == ("open", "local")


def test_mode_closed(make: Make, dead_url: str) -> None:
    """With on_redis_failure="closed" every call is admitted, whatever fails."""
    breaker = make(dead_url, on_redis_failure="closed", policy=Policy(failure_threshold=1))
    for _ in range(20):
        with pytest.raises(Boom):
            breaker.call(boom)
    assert (breaker.snapshot().state, breaker.snapshot().source) == ("closed", "local")


@pytest.mark.parametrize("called", [False, True])
def test_operators_get_an_error(make: Make, dead_url: str, called: bool) -> None:
    """Commands and the history fail without Redis, and nothing is done locally instead."""
    breaker = make(dead_url, lease=0, policy=Policy(failure_threshold=2))
    if called:
        with pytest.raises(Boom):
            breaker.call(boom)
    before = breaker.snapshot()
    commands = (breaker.force_open, breaker.force_closed, breaker.clear_forced, breaker.reset, breaker.history)
    for command in commands:
        with pytest.raises(RedisUnavailableError) as caught:
            command()
        assert isinstance(caught.value.__cause__, (redis.RedisError, OSError))
    assert breaker.snapshot() == before


# One attempt


def test_a_call_tries_once(make: Make, slammer: Slammer) -> None:
    """A call that finds no server has tried to connect once."""
    for count in range(1, 6):  # breakers share an outage, unless their redis_timeout differs
        make(slammer.url, lease=0, redis_timeout=0.25 + count / 1000).acquire().release()
        assert slammer.count == count


def test_breakers_share_an_outage(make: Make, slammer: Slammer, caplog: pytest.LogCaptureFixture) -> None:
    """What one breaker has found out the others of its client or URL know: they try nothing, and warn of nothing."""
    kinds, listeners = listening()
    breakers = [make(slammer.url, lease=0, listeners=listeners) for _ in range(5)]
    for breaker in breakers:
        assert breaker.call(fine) == "fine"
        assert breaker.snapshot().source == "local"
        assert slammer.count == 1
    assert kinds == ["redis_error"] * 5
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("huge", [False, True])
def test_many_breakers_return_together(own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, huge: bool) -> None:
    """After an outage a hundred breakers take a few round trips. If one of them loses each connection, as one with a
    huge value does, the others return all the same."""
    breakers = [CircuitBreaker(f"tenant-{number}", redis=own_server.url) for number in range(100)]
    sizes: list[int] = []
    send = Connections.send

    def counted(self: Connections, commands: Sequence[Command], *left: float) -> list[Any]:
        sizes.append(len(commands))
        if huge and any(breakers[7]._key in command.words for command in commands):
            raise redis.TimeoutError("timed out")
        return send(self, commands, *left)

    def are_back() -> bool:
        for breaker in breakers:
            breaker.call(fine)
        return sum(breaker._line.local is None for breaker in breakers) >= 100 - huge

    for breaker in breakers:
        breaker.call(fine)
    with stopped(own_server):
        with pytest.raises(Boom):
            breakers[0].call(boom)
        for breaker in breakers:
            breaker.call(fine)
        assert all(breaker._line.local is not None for breaker in breakers)
    monkeypatch.setattr(Connections, "send", counted)
    wait_until(are_back)
    if huge:
        assert breakers[7].snapshot().source == "local"
    else:
        assert {1, 2, 4, 8, 16, 32} < {*sizes}
        assert len(sizes) < 50


@pytest.fixture
def other_program() -> Iterator[str]:
    """The URL of a web server, which closes each connection after its answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(1000)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)


def test_another_program_answers(make: Make, other_program: str, caplog: pytest.LogCaptureFixture) -> None:
    """What it says is no refusal of one breaker's command: it is an outage of the server, for all breakers."""
    breakers = [make(other_program, policy=MANY, prefix=f"p{number}", **PATIENT) for number in range(5)]
    for breaker in breakers:
        assert breaker.call(fine) == "fine"
        assert breaker.snapshot().source == "local"
    [warning] = warnings(caplog)
    assert warning.startswith("Redis does not answer; the breakers of this process continue on their own: Protocol")


def test_sentinels_are_named_by_their_addresses(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The warning does not show their options, which include their password."""
    breaker = make("redis+sentinel://:geheim@127.0.0.1:1,127.0.0.1:2/mymaster?sentinel_password=secret", **PATIENT)
    assert breaker.call(fine) == "fine"
    [warning] = warnings(caplog)
    assert re.search("'mymaster' : 127.0.0.1:1 - .*, 127.0.0.1:2 - ", warning)
    assert "secret" not in warning


def test_a_command_tries_once(make: Make, slammer: Slammer) -> None:
    """So has an operator's command, each time."""
    breaker = make(slammer.url)
    for count in range(1, 6):
        with pytest.raises(RedisUnavailableError):
            breaker.reset()
        assert slammer.count == count


def test_a_given_client_is_left_alone(make: Make, shell: str, slammer: Slammer) -> None:
    """A default client keeps its options and its retries, which the breaker does not use."""
    module: Any = redis if shell == "sync" else redis.asyncio
    given = module.Redis(port=slammer.port)
    pool = given.connection_pool
    before, retry, retries = dict(pool.connection_kwargs), given.get_retry(), given.get_retry()._retries
    assert retries > 1
    for count in range(1, 6):
        make(given, lease=0, redis_timeout=0.25 + count / 1000).acquire().release()
        assert slammer.count == count
    assert pool.connection_kwargs == before
    assert given.connection_pool is pool
    assert (given.get_retry(), retry._retries) == (retry, retries)


# A server that hangs and comes back


def test_hung_server(make: Make, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    """While the server hangs one call waits for it; the others send nothing. It is back by itself, notified once."""
    kinds, listeners = listening()
    breaker = make(own_server.url, lease=0, policy=MANY, redis_timeout=0.25, listeners=listeners)
    with redis.Redis.from_url(own_server.url) as client:

        def asked() -> int:
            stats = client.info("commandstats")
            return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))

        breaker.call(fine)
        wait_until(lambda: back(breaker))
        kinds.clear()
        caplog.clear()
        before = asked()
        with stopped(own_server):
            assert [breaker.call(fine) for _ in range(400)] == ["fine"] * 400
            assert kinds == ["redis_error"]
            assert breaker.snapshot().source == "local"
        assert asked() - before < 100  # of 800, were each asked
        wait_until(lambda: back(breaker))
        wait_until(lambda: "redis_restored" in kinds)
        assert kinds == ["redis_error", "redis_restored"]
        assert [warning.partition(";")[0] for warning in warnings(caplog)] == [
            "Redis does not answer",
            "Redis answers again",
        ]


def test_the_state_of_redis_counts_again(make: Make, own_server: EmbeddedServer) -> None:
    """What was tripped locally is closed again when Redis is back, which never knew of it."""
    breaker = make(own_server.url, lease=0, policy=Policy(failure_threshold=2, reset_timeout=3600), redis_timeout=0.25)
    breaker.call(fine)
    wait_until(lambda: back(breaker))
    with stopped(own_server):
        for _ in range(2):
            with pytest.raises(Boom):
                breaker.call(boom)
        assert breaker.snapshot().state == "open"
    wait_until(lambda: back(breaker))
    assert breaker.snapshot().state == "closed"


def test_starts_from_the_last_view(make: Make, own_server: EmbeddedServer) -> None:
    """Failures that were counted before the outage count in it."""
    breaker = make(own_server.url, policy=Policy(failure_threshold=3, reset_timeout=3600), **PATIENT)
    for _ in range(2):
        with pytest.raises(Boom):
            breaker.call(boom)
    own_server.stop()
    with pytest.raises(Boom):
        breaker.call(boom)
    seen = breaker.snapshot()
    assert (seen.source, seen.state, seen.failure_count) == ("local", "open", 3)


def test_stays_open_over_an_outage(make: Make, own_server: EmbeddedServer) -> None:
    """A circuit that was open when Redis went is open, for as long as was left."""
    breaker = make(own_server.url, policy=Policy(failure_threshold=1, reset_timeout=3600), **PATIENT)
    with pytest.raises(Boom):
        breaker.call(boom)
    own_server.stop()
    with pytest.raises(CircuitOpenError) as caught:
        breaker.call(fine)
    assert 3000 < caught.value.retry_after <= 3600
    assert breaker.snapshot().source == "local"


def test_restart(make: Make) -> None:
    """After a restart, with nothing stored and no script loaded, Redis is back by itself."""
    kinds, listeners = listening()
    with EmbeddedServer(port=0) as first:
        url = first.url
        breaker = make(url, listeners=listeners, **PATIENT)
        assert breaker.call(fine) == "fine"
        assert breaker.snapshot().source == "redis"
    assert breaker.call(fine) == "fine"
    assert breaker.snapshot().source == "local"
    with EmbeddedServer(port=int(url.rpartition(":")[2])):
        wait_until(lambda: back(breaker))
        wait_until(lambda: "redis_restored" in kinds)
        with pytest.raises(Boom):
            breaker.call(boom)
        assert breaker.snapshot().failure_count == 1
    assert kinds == ["redis_error", "redis_restored"]


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_modes_end(make: Make, own_server: EmbeddedServer, mode: str) -> None:
    """The other modes end with the outage too."""
    breaker = make(own_server.url, lease=0, on_redis_failure=mode, redis_timeout=0.25)
    with stopped(own_server):
        assert breaker.snapshot().source == "local"
        assert breaker.snapshot().state == mode
    wait_until(lambda: back(breaker))
    assert breaker.snapshot().state == "closed"


# A server that answers with errors


def test_no_flapping_without_writes(make: Make, own_server: EmbeddedServer) -> None:
    """A server that can be read but not written, as a full one or a replica, is one outage, not one per retry."""
    kinds, listeners = listening()
    breaker = make(own_server.url, policy=MANY, listeners=listeners, **PATIENT)
    breaker.call(fine)
    with redis.Redis.from_url(own_server.url) as client:
        client.replicaof("127.0.0.1", "1")
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            with pytest.raises(Boom):
                breaker.call(boom)
        meanwhile = list(kinds)
        client.replicaof("NO", "ONE")
    assert meanwhile == ["redis_error"]


def test_a_refusal_concerns_one_breaker(
    make: Make, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An error reply to one breaker is its own trouble: it goes on alone, is warned of once, and finds back."""
    kinds, listeners = listening()
    with redis.Redis.from_url(own_server.url) as client:
        grant = ("ACL", "SETUSER", "default", "resetkeys", "~mine:*", "~{mine:*")
        client.execute_command(*grant)
        mine = make(own_server.url, prefix="mine", policy=MANY, **PATIENT)
        theirs = make(own_server.url, prefix="theirs", policy=MANY, listeners=listeners, **PATIENT)
        for _ in range(50):
            assert theirs.call(fine) == "fine"
            assert mine.call(fine) == "fine"
            assert mine.snapshot().source == "redis"
            assert theirs.snapshot().source == "local"
        assert kinds == ["redis_error"]
        [warning] = warnings(caplog)
        assert warning.startswith(
            "circuit breaker 'discovery': Redis refuses its commands; this process continues on its own: "
        )
        client.execute_command(*grant, "~theirs:*", "~{theirs:*")
        wait_until(lambda: back(theirs))
        assert theirs.call(fine) == "fine"
    wait_until(lambda: kinds == ["redis_error", "redis_restored"])


def test_a_key_of_another_type(make: Make, server: EmbeddedServer, client: redis.Redis) -> None:
    """A foreign value under the state key is no outage: the breaker works on, shared."""
    client.rpush("circuit_breaker:discovery:state", "foreign")
    breaker = make(server.url, policy=Policy(failure_threshold=1), **PATIENT)
    with pytest.raises(Boom):
        breaker.call(boom)
    assert (breaker.snapshot().source, breaker.snapshot().state) == ("redis", "open")


def test_wrong_password(make: Make, own_server: EmbeddedServer) -> None:
    """A server that lets nobody in is an outage like any other."""
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", "secret")
    breaker = make(own_server.url, **PATIENT)
    assert breaker.call(fine) == "fine"
    assert breaker.snapshot().source == "local"


class Payload:
    """Something large that a caller has in hand."""


@pytest.mark.parametrize("trouble", ["server", "breaker"])
@pytest.mark.parametrize("lease", [0, 0.1])
def test_an_outage_keeps_nothing_of_its_callers(
    make: Make, own_server: EmbeddedServer, lease: float, trouble: str
) -> None:
    """The error of an outage lasts as long as the outage; what the caller who met it had in hand does not."""
    breaker = make(own_server.url, lease=lease, policy=MANY)
    breaker.call(fine)
    if trouble == "server":
        own_server.stop()
    else:
        redis.Redis.from_url(own_server.url).execute_command("ACL SETUSER default resetkeys")

    def calls() -> weakref.ref[Payload]:
        payload = Payload()

        def fails() -> None:
            raise Boom(payload)

        for _ in range(3):
            with pytest.raises(Boom):
                breaker.call(fails)
        return weakref.ref(payload)

    seen = calls()
    gc.collect()
    assert seen() is None
    assert breaker.snapshot().source == "local"


def test_a_shorter_timeout_of_the_client(make: Make) -> None:
    """A call waits for a server that does not answer only as long as its client would."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}?socket_timeout=0.05"
        breaker, began = make(url, redis_timeout=30), time.monotonic()
        breaker.call(fine)
        assert time.monotonic() - began < 10
        assert breaker.snapshot().source == "local"


def refusal_of(breaker: Any) -> Any:
    """Why Redis refuses the commands of this breaker, once it does."""
    return wait_until(lambda: breaker._line.refusal)


def test_trouble_ends_with_its_breaker(own_server: EmbeddedServer) -> None:
    """The error of a breaker that nobody holds any more is freed, and costs the other breakers of its link nothing."""
    own_client = redis.Redis.from_url(own_server.url)
    name = CircuitBreaker("good", redis=own_server.url).keys.state
    own_client.execute_command("ACL SETUSER default", "resetkeys", f"~{name}", f"~{{{name}}}:*")
    good, refused = (CircuitBreaker(name, redis=own_server.url) for name in ("good", "refused"))
    for breaker in (good, refused):
        breaker.call(fine)
    refusal = weakref.ref(refusal_of(refused))
    assert isinstance(refusal().error, redis.exceptions.NoPermissionError)
    del breaker, refused
    wait_until_freed(refusal)
    assert good.snapshot().source == "redis"
