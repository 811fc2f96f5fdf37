"""The link against everything that can happen during one of its exchanges. README.md lists the interleavings."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import itertools
import threading
import time
import types
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import redis
from conftest import wait_until
from race_workers import PATIENCE, run_threads, signalled_at

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import sync
from pybreaker_redis.wire.commands import Command
from pybreaker_redis.wire.sync import Worker

FIRM: dict[str, Any] = {"redis_timeout": 20.0}


class Boom(Exception):
    """A failure of the guarded service."""


def boom() -> None:
    raise Boom


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        with contextlib.suppress(Boom):
            breaker.call(boom)


def settled(breaker: CircuitBreaker) -> CircuitBreaker:
    """The breaker, once its first success is reported and no exchange is under way."""
    breaker.call(int)
    line, link = breaker._line, breaker._redis.link
    assert line is not None
    wait_until(lambda: breaker._view._reported_at > 0 and not link.is_reporting(line) and not link.is_busy())
    return breaker


def during_exchange(
    breaker: CircuitBreaker, monkeypatch: pytest.MonkeyPatch, act: Callable[[Sequence[Command]], object]
) -> list[str]:
    """Act once the server has answered the next pipeline, before its replies are taken. Returns what was sent."""
    server, sent = breaker._redis, list[str]()
    exchange = server.exchange

    def exchange_and_act(commands: Sequence[Command]) -> list[Any]:
        replies = exchange(commands)
        first = not sent
        sent.extend(command.script or command.words[0].decode() for command in commands)
        monkeypatch.setattr(server, "exchange", exchange)
        if first:
            act(commands)
        return list(replies)

    monkeypatch.setattr(server, "exchange", exchange_and_act)
    return sent


def refresh(breaker: CircuitBreaker) -> None:
    """One exchange in this thread, with this breaker in it."""
    breaker._view.seen.sent -= 100.0  # as old as if nobody had called
    breaker._redis.link.use(breaker._line)
    breaker._redis.refresh()


@pytest.mark.parametrize("changed", [False, True])
def test_a_read_from_before_a_trip(
    server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """A refresh has read "closed" when a failure's report trips the circuit: the view stays open."""
    breaker = settled(CircuitBreaker("tripped", redis=server.url, lease=60, policy=Policy(failure_threshold=1), **FIRM))
    refresh(breaker)  # from now on the stored texts are known
    if changed:
        CircuitBreaker("tripped", redis=client, lease=0, **FIRM).acquire().failure()
    sent = during_exchange(breaker, monkeypatch, lambda _: fail(breaker))
    refresh(breaker)
    assert sent[-1:] == ["MGET"]
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError):
        breaker.call(int)


def test_a_document_that_changes_before_the_script_reads_it(
    server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script's reading of a newer document is not kept for the texts that were read before it."""
    breaker = settled(CircuitBreaker("changed", redis=server.url, lease=60, **FIRM))
    other = CircuitBreaker("changed", redis=client, lease=0, **FIRM)
    other.force_open(50)
    sent = during_exchange(breaker, monkeypatch, lambda _: other.reset())
    refresh(breaker)  # reads "open"; the script reads "closed"
    assert sent == ["MGET", "record"]
    assert breaker.state == "closed"
    assert breaker._line is not None
    assert breaker._line._known is None
    other.force_open(50)
    refresh(breaker)
    assert breaker.state == "open"


def test_an_override_that_ends_before_it_was_read_twice(
    server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script reads another override than the process did, and nobody reads it again before it is cleared."""
    policy = Policy()
    breaker = settled(CircuitBreaker("overridden", redis=server.url, policy=policy, lease=60, **FIRM))
    other = CircuitBreaker("overridden", redis=client, lease=0, **FIRM)
    other.set_policy(failure_threshold=7)
    sent = during_exchange(breaker, monkeypatch, lambda _: other.set_policy(failure_threshold=8))
    refresh(breaker)
    assert sent == ["MGET", "record"]
    assert breaker._view.policy.failure_threshold == 8
    other.clear_policy()
    refresh(breaker)
    assert breaker._view.policy == policy


def test_a_first_call_and_a_hint_at_once(server: EmbeddedServer, client: redis.Redis) -> None:
    """The exchange of a first call creates the document, though a message asks for no more than a read."""
    breaker = CircuitBreaker("hinted", redis=server.url, **FIRM)
    breaker._hinted()
    wait_until(lambda: not breaker._redis.link.is_busy() and not breaker._redis.link.wanted)
    assert not client.exists(breaker.keys.state)
    breaker._redis.link.hint(breaker._line)
    refresh(breaker)
    assert client.exists(breaker.keys.state)


def test_a_failure_waits_for_the_success_before_it(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A success is on its way to Redis when a call fails: the failure is counted after it, and stays counted."""
    policy = Policy(failure_threshold=9)
    breaker = settled(CircuitBreaker("ordered", redis=server.url, lease=60, policy=policy, **FIRM))
    fail(breaker, 2)  # from now on the process is alert
    breaker._view.hinted()  # and may report at once
    under_way, go_on, order = threading.Event(), threading.Event(), list[str]()
    exchange, run = breaker._redis.exchange, breaker._redis.run

    def slow_exchange(commands: Sequence[Command]) -> list[Any]:
        under_way.set()
        assert go_on.wait(20)
        replies = exchange(commands)
        order.append("success")
        return list(replies)

    def noted_run(*asked: Any) -> Any:
        order.append("failure")
        return run(*asked)

    monkeypatch.setattr(breaker._redis, "exchange", slow_exchange)
    monkeypatch.setattr(breaker._redis, "run", noted_run)
    breaker.call(int)
    assert under_way.wait(20)
    failing = threading.Thread(target=fail, args=(breaker,))
    failing.start()
    time.sleep(0.1)
    assert order == []
    go_on.set()
    failing.join()
    assert order == ["success", "failure"]
    assert breaker.snapshot().failure_count == 1


def test_a_first_call_during_an_exchange(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A breaker that is made, and called, while an exchange is under way gets its own right after it."""
    first = settled(CircuitBreaker("here before", redis=server.url, lease=60, **FIRM))
    made: list[CircuitBreaker] = []
    callers: list[threading.Thread] = []

    def call_another(_: object) -> None:
        made.append(CircuitBreaker("made meanwhile", redis=server.url, lease=60, **FIRM))
        callers.append(threading.Thread(target=made[0].call, args=(int,)))
        callers[0].start()
        time.sleep(0.05)
        assert callers[0].is_alive()  # it waits for this exchange

    during_exchange(first, monkeypatch, call_another)
    refresh(first)
    callers[0].join(20)
    assert made[0].counts.successes == 1
    assert made[0].snapshot().generation > 0


def test_a_breaker_that_is_dropped_during_an_exchange(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds a breaker any more when its read is answered: the others are refreshed, and it is freed."""
    stays = settled(CircuitBreaker("stays", redis=server.url, lease=60, **FIRM))
    goes = [settled(CircuitBreaker("goes", redis=server.url, lease=60, **FIRM))]
    freed = weakref.ref(goes[0])
    goes[0]._view.seen.sent -= 100.0
    during_exchange(stays, monkeypatch, lambda _: (goes.clear(), gc.collect()))
    before = time.monotonic()
    refresh(stays)
    assert stays._view.seen.sent >= before
    gc.collect()
    assert freed() is None


def test_two_loops_learn_of_one_transition(
    server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both read the history for it at the same time: the listeners are notified once, and both exchanges end well."""
    received: list[str | None] = []
    breaker = AsyncCircuitBreaker(
        "news", redis=server.url, listeners=[lambda event: received.append(event.new)], **FIRM
    )
    ready, read = threading.Barrier(3), threading.Barrier(2)
    exchange = breaker._redis.exchange

    async def exchange_at_once(commands: Sequence[Command]) -> list[Any]:
        replies = await exchange(commands)
        if commands[0].words[0] == b"XREVRANGE" and not received:
            await asyncio.to_thread(read.wait, PATIENCE)
        return replies

    async def fine() -> None:
        pass

    async def main(watches: bool) -> None:
        if watches:
            await breaker.watch()
        await breaker.call(fine)
        await asyncio.to_thread(ready.wait, PATIENCE)
        while not received:
            breaker._hinted()
            await asyncio.sleep(0.01)
        await breaker._redis.refresh()  # until the exchange that is under way has ended
        await breaker.close()

    with concurrent.futures.ThreadPoolExecutor(2) as loops:
        running = [loops.submit(asyncio.run, main(watches)) for watches in (True, False)]
        ready.wait(PATIENCE)
        monkeypatch.setattr(breaker._redis, "exchange", exchange_at_once)
        CircuitBreaker("news", redis=client, **FIRM).force_open()
        for loop in running:
            loop.result()
    gc.collect()  # an exchange that fails in the background is told of when its task is collected
    assert not caplog.records
    assert received == ["open"]


def test_an_exchange_is_wanted_while_its_loop_ends(
    server: EmbeddedServer, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A message may come between the end of all tasks and the closing of the loop: no task is left behind."""
    breaker = AsyncCircuitBreaker("last", redis=server.url, **FIRM)

    async def last_message() -> AsyncIterator[None]:
        try:
            yield
        finally:
            breaker._hinted()

    async def main() -> None:
        message = last_message()
        await anext(message)
        await breaker._redis.refresh()

    for _ in range(20):  # loops close their generators in any order
        asyncio.run(main())
    gc.collect()
    assert not caplog.records


def test_a_caller_that_is_cancelled_while_it_waits(own_server: EmbeddedServer) -> None:
    """Of two tasks that wait for one exchange, one is cancelled: the other gets its call."""

    async def main() -> None:
        breaker = AsyncCircuitBreaker("waits", redis=own_server.url, **FIRM)
        exchange, started = breaker._redis.exchange, asyncio.Event()

        async def slow(commands: Sequence[Command]) -> list[Any]:
            started.set()
            await asyncio.sleep(0.1)
            return list(await exchange(commands))

        breaker._redis.exchange = slow  # type: ignore[method-assign]

        async def fine() -> int:
            return 5

        cancelled, other = asyncio.create_task(breaker.call(fine)), asyncio.create_task(breaker.call(fine))
        await started.wait()
        cancelled.cancel()
        assert await other == 5
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await breaker.close()

    asyncio.run(main())


def test_an_outage_found_while_a_refresh_is_out(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure's report is lost while a refresh is under way: that the refresh is answered ends no outage."""
    breaker = settled(CircuitBreaker("found", redis=server.url, lease=60, **FIRM))
    run = breaker._redis.run

    def lost(*_: Any) -> Any:
        raise redis.ConnectionError("lost")

    def lose_a_report(_: object) -> None:
        monkeypatch.setattr(breaker._redis, "run", lost)
        fail(breaker)
        monkeypatch.setattr(breaker._redis, "run", run)

    line = breaker._line
    assert line is not None
    during_exchange(breaker, monkeypatch, lose_a_report)
    refresh(breaker)
    assert line.local is not None
    assert breaker.snapshot().source == "local"
    wait_until(lambda: breaker.call(int) == 0 and breaker.snapshot().source == "redis")


def test_a_thread_that_ends_misses_nothing() -> None:
    """The link's thread is about to end when it is woken: the work is done."""
    done: list[int] = []

    class Work:
        def work(self) -> None:
            done.append(1)

    work = Work()
    worker = Worker("test", weakref.WeakMethod(work.work), lambda: None)  # it ends as soon as nothing wakes it
    for number in range(1, 500):
        worker.wake()
        wait_until(lambda number=number: len(done) >= number)


class Interrupted(Exception):
    """Raised by a signal handler."""


# a thread whose start is interrupted ends with an error of Python's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("module", [sync, threading], ids=["package", "threading"])
@pytest.mark.parametrize("handler", ["calls", "raises"])
def test_a_signal_handler_amid_a_wake(module: types.ModuleType, handler: str) -> None:
    """Wherever a handler interrupts a thread that wakes the link's, and wakes it itself or raises: the work is done."""
    done: list[int] = []

    class Work:
        def work(self) -> None:
            done.append(1)

    work = Work()

    def interrupted(worker: Worker, place: int) -> bool:
        def handle() -> None:
            worker.wake()
            if handler == "raises":
                raise Interrupted

        reached: list[bool] = []

        def wake(_: int) -> None:
            with contextlib.suppress(Interrupted):
                reached.append(signalled_at(place, module, worker.wake, handle))

        run_threads(1, wake)
        return reached != [False]

    for begun in (False, True):  # the first wake starts the thread
        for place in itertools.count():
            worker = Worker("test", weakref.WeakMethod(work.work), lambda: 60.0)
            if begun:
                worker.wake()
            goes_on = interrupted(worker, place)
            for _ in range(2):  # the second one needs a thread that lives on
                before = len(done)
                run_threads(1, lambda _, worker=worker: worker.wake())
                wait_until(lambda before=before: len(done) > before)
            if not goes_on:
                break
        assert place > 3 or begun


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_a_listener_ends_is_replaced() -> None:
    """SystemExit ends the link's thread: the next wake starts another."""
    done: list[threading.Thread] = []

    class Work:
        def work(self) -> None:
            done.append(threading.current_thread())
            raise SystemExit

    work = Work()
    worker = Worker("test", weakref.WeakMethod(work.work), lambda: 60.0)
    for number in range(1, 4):
        worker.wake()
        wait_until(lambda number=number: len(done) == number)
        done[-1].join(PATIENCE)


def test_a_policy_override_ends_by_itself(server: EmbeddedServer, client: redis.Redis) -> None:
    """The key of a policy override expires between two reads: the next read obeys the breaker's own policy."""
    breaker = settled(CircuitBreaker("override", redis=server.url, **FIRM))
    CircuitBreaker("override", redis=client, **FIRM).set_policy(failure_threshold=77, duration=0.5)
    wait_until(lambda: breaker.call(int) == 0 and breaker._view.policy.failure_threshold == 77)
    wait_until(lambda: breaker.call(int) == 0 and breaker._view.policy.failure_threshold == 5)
    assert client.get(breaker.keys.policy) is None


def test_a_document_that_is_only_read_does_not_expire(server: EmbeddedServer, client: redis.Redis) -> None:
    """A healthy breaker that is called for longer than its TTL keeps its document, and its generation."""
    breaker = settled(CircuitBreaker("kept", redis=server.url, policy=Policy(ttl=1.0), **FIRM))
    generation, end = breaker.snapshot().generation, time.monotonic() + 2.5
    while time.monotonic() < end:
        breaker.call(int)
        assert client.pttl(breaker.keys.state) > 0
        time.sleep(0.02)
    assert breaker.snapshot().generation == generation


def test_a_document_that_expired_between_two_reads(server: EmbeddedServer, client: redis.Redis) -> None:
    """A document that is gone is made anew by the script, under a new generation."""
    breaker = settled(CircuitBreaker("gone", redis=server.url, **FIRM))
    before = breaker.snapshot().generation
    client.delete(breaker.keys.state)
    wait_until(lambda: breaker.call(int) == 0 and breaker._view.seen.generation > before)
    assert client.exists(breaker.keys.state)


def test_sixteen_threads_ask_for_one_probe(server: EmbeddedServer, client: redis.Redis) -> None:
    """When the open time ends, one thread asks and probes; the others are rejected without a script each."""
    breaker = CircuitBreaker(
        "probing", redis=server.url, policy=Policy(failure_threshold=1, reset_timeout=0.2), lease=60, **FIRM
    )
    fail(settled(breaker))
    time.sleep(0.25)
    began, release, rejected = threading.Event(), threading.Event(), list[CircuitOpenError]()

    def probe() -> None:
        began.set()
        assert release.wait(20)

    prober = threading.Thread(target=breaker.call, args=(probe,))
    prober.start()
    assert began.wait(20)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]

    def call() -> None:
        for _ in range(50):
            with pytest.raises(CircuitOpenError) as rejection:
                breaker.call(int)
            rejected.append(rejection.value)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    release.set()
    prober.join()
    assert len(rejected) == 16 * 50
    assert asked <= 3
    assert breaker.state == "closed"
