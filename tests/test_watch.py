"""watch(): one subscription keeps all views up to date, and notifies listeners of the transitions of others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import stopped, wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, CircuitOpenError, Event, Policy, PolicyError
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import subscription

POLICY = Policy(failure_threshold=2, reset_timeout=60)


class Boom(Exception):
    """What a guarded function raises."""


def fail() -> None:
    """A dead service."""
    raise Boom


def trip(breaker: CircuitBreaker, times: int = 2) -> None:
    """Opens it."""
    for _ in range(times):
        with contextlib.suppress(Boom):
            breaker.call(fail)


def rejects(breaker: CircuitBreaker) -> bool:
    """Whether a call is rejected now."""
    try:
        breaker.call(int)
    except CircuitOpenError:
        return True
    return False


def subscriptions(client: redis.Redis) -> int:
    """How many connections the server has subscribed."""
    return len(client.client_list(_type="pubsub"))


def left_over(client: redis.Redis) -> int:
    """How many subscriptions are left; a message wakes those that nobody is in any more."""
    client.publish("circuit_breaker:nobody:state", "wake up")
    return subscriptions(client)


def evalshas(client: redis.Redis) -> int:
    """Script calls so far."""
    return int(client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


@pytest.fixture
def watched(client: redis.Redis) -> Iterator[Callable[..., CircuitBreaker]]:
    """Makes breakers that watch, and waits until their subscription stands."""
    watches = []

    def make(name: str = "discovery", lease: float = 30.0, **options: Any) -> CircuitBreaker:
        breaker = CircuitBreaker(name, redis=client, **{"policy": POLICY, **options})
        watches.append(breaker.watch(lease))
        wait_until(lambda: watches[-1].active)
        return breaker

    yield make
    for watch in watches:
        watch.close()
    wait_until(lambda: left_over(client) == 0)


def test_a_trip_is_known_at_once(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A trip of another instance rejects here, with the right wait, and without a command of ours."""
    breaker = watched()
    breaker.call(int)
    before = evalshas(client)
    for _ in range(100):
        breaker.call(int)
    trip(CircuitBreaker("discovery", redis=client, policy=POLICY))
    wait_until(lambda: breaker.state == "open")
    with pytest.raises(CircuitOpenError) as rejected:
        breaker.call(int)
    assert 50 < rejected.value.retry_after <= 60
    assert evalshas(client) - before == 3  # the other's acquire and its two reports


def test_listeners_receive_what_others_did(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Every transition of another instance arrives with its cause and its author; our own arrive once."""
    received: list[Event] = []
    breaker = watched(listeners=[received.append])
    other = CircuitBreaker("discovery", redis=client, policy=POLICY)
    trip(other)
    other.reset()
    wait_until(lambda: len(received) == 2)
    breaker.force_open(5)
    assert [(e.old, e.new, e.reason, e.source, e.instance) for e in received] == [
        ("closed", "open", "failure_threshold", "watch", other.instance),
        ("open", "closed", "reset", "watch", other.instance),
        ("closed", "open", "forced", "redis", breaker.instance),
    ]
    assert {e.kind for e in received} == {"state_change"}
    assert received[0].counts == {"failure_count": 2, "success_count": 0}


def test_one_subscription_for_all(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Any number of breakers on one server share a subscription; it ends with the last of them."""
    before = subscriptions(client)
    breakers = [watched(f"service {n}") for n in range(20)]
    by_url = CircuitBreaker("by url", redis=client)
    assert subscriptions(client) == before + 1
    trip(CircuitBreaker("service 7", redis=client, policy=POLICY))
    wait_until(lambda: breakers[7].state == "open")
    assert [breaker.state for breaker in breakers].count("open") == 1
    with by_url.watch() as watch:
        wait_until(lambda: watch.active)
        assert subscriptions(client) == before + 1
    assert not watch.active
    for breaker in breakers:
        assert breaker._watch is not None
        breaker._watch.close()
    wait_until(lambda: subscriptions(client) == before)


@pytest.mark.parametrize("prefix", ["circuit_breaker", "a*[b]?\\c"])
def test_prefixes(client: redis.Redis, watched: Callable[..., CircuitBreaker], prefix: str) -> None:
    """A prefix is no pattern: only its own breakers are watched."""
    breaker = watched("a b*", prefix=prefix)
    trip(CircuitBreaker("a b*", redis=client, policy=POLICY, prefix="axb]yc"))
    trip(CircuitBreaker("a b*", redis=client, policy=POLICY, prefix=prefix))
    wait_until(lambda: breaker.state == "open")


def test_a_watched_view_is_long_lived(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """While the subscription stands a healthy breaker sends nothing for longer than its own lease."""
    breaker = watched()
    breaker.call(int)
    before = evalshas(client)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        breaker.call(int)
    assert evalshas(client) == before


def test_rates_bound_the_lease(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Where a rate can trip, counts are flushed within a tenth of the window, also when an operator sets the rate."""
    breaker = watched()
    assert breaker._view.lease == 30
    CircuitBreaker("discovery", redis=client).set_policy(error_rate_threshold=0.5, window=20)
    wait_until(lambda: breaker.call(int) == 0 and breaker._view.lease == 2)
    CircuitBreaker("discovery", redis=client).clear_policy()
    wait_until(lambda: breaker.call(int) == 0 and breaker._view.lease == 30)


def test_a_lost_subscription_shortens_the_lease(own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    """Killed, it is back by itself; until then the short lease holds; what was missed is read again."""
    client = redis.Redis.from_url(own_server.url)
    breaker = CircuitBreaker("discovery", redis=client, policy=POLICY)
    with breaker.watch(30) as watch:
        wait_until(lambda: watch.active)
        breaker.call(int)
        before = subscriptions(client)
        with client.client() as admin:  # no time for a reconnect between the kill and the trip
            pipe = admin.pipeline(transaction=True)
            pipe.client_kill_filter(_type="pubsub")
            pipe.set(breaker.keys.state, json.dumps(OPEN))
            pipe.execute()
        wait_until(lambda: rejects(breaker))
        wait_until(lambda: watch.active and subscriptions(client) == before)
    assert sum("subscription is lost" in record.message for record in caplog.records) == 1
    client.close()


OPEN = {"state": "open", "failure_count": 2, "success_count": 0, "last_failure_time": None, "opened_at": None}


def test_a_hanging_server_is_noticed(own_server: EmbeddedServer) -> None:
    """A connection that stays open but silent is lost after two unanswered seconds; then it stands again."""
    client = redis.Redis.from_url(own_server.url)
    breaker = CircuitBreaker("discovery", redis=client, policy=POLICY)
    with breaker.watch(30) as watch:
        wait_until(lambda: watch.active)
        with stopped(own_server):
            wait_until(lambda: not watch.active)
            assert breaker._view.lease == 0.1
        wait_until(lambda: watch.active)
    client.close()


def test_messages_of_any_content(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """What anybody publishes under our channel never ends the subscription nor moves a view to what is not stored."""
    breaker = watched()
    breaker.call(int)
    generation = breaker.snapshot().generation
    for data in (
        "",
        "x",
        "[]",
        "{}",
        "null",
        '{"to":"ajar"}',
        '{"to":"open"}',
        b"\xff\xfe",
        '{"policy":1}',
        "1" * 10_000,
        "[" * 100_000,
        '{"from":"closed","to":"open","reason":"x","generation":1e30,"failure_count":0}',
        '{"from":"closed","to":"open","reason":"x","generation":1e999,"failure_count":0}',
        '{"from":"closed","to":"open","reason":"x","generation":9e13,"failure_count":0,"retry_after_ms":1e300}',
        '{"to":"open","reason":"x","generation":9e13,"failure_count":0}',
        '{"from":"closed","to":"open","reason":5,"generation":9e13,"failure_count":0}',
        '{"from":"closed","to":["open"],"reason":"x","generation":9e13,"failure_count":0}',
    ):
        client.publish(breaker.keys.state, data)
    late = {"from": "closed", "to": "open", "reason": "failure_threshold", "generation": generation - 1}
    client.publish(breaker.keys.state, json.dumps({**late, "failure_count": 5, "success_count": 0}))
    trip(CircuitBreaker("other", redis=client, policy=POLICY))
    assert breaker.call(int) == 0
    assert breaker._watch is not None
    assert breaker._watch.active
    trip(CircuitBreaker("discovery", redis=client, policy=POLICY))
    wait_until(lambda: breaker.state == "open")


def test_bad_watches(client: redis.Redis) -> None:
    """Without Redis there is nothing to watch, and a lease has bounds."""
    with pytest.raises(PolicyError, match="nothing to watch"):
        CircuitBreaker("discovery").watch()
    for lease in (0, -1, float("nan"), "1", True, 3601):
        with pytest.raises(PolicyError, match="watch must be"):
            CircuitBreaker("discovery", redis=client).watch(lease)  # type: ignore[arg-type]


def test_without_a_server() -> None:
    """Watching needs no server: the lease stays short until there is one."""
    breaker = CircuitBreaker("discovery", redis="redis://127.0.0.1:1")
    with breaker.watch() as watch:
        assert breaker.call(int) == 0
        assert (watch.active, breaker._view.lease) == (False, 0.1)


def test_fork(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A forked child watches by a subscription of its own from its next script call on."""
    breaker = watched()
    breaker.call(int)
    before = subscriptions(client)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            assert breaker._view.lease == 0.1
            wait_until(lambda: breaker.call(int) == 0 and breaker._watch.active)  # type: ignore[union-attr]
            os.write(write, b"w")
            wait_until(lambda: breaker.state == "open")
            os.write(write, b"o")
        finally:
            os._exit(0)
    try:
        assert os.read(read, 1) == b"w"
        assert subscriptions(client) == before + 1
        trip(CircuitBreaker("discovery", redis=client, policy=POLICY))
        assert os.read(read, 1) == b"o"
        wait_until(lambda: breaker.state == "open")
        assert os.waitpid(child, 0) == (child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


# asyncio ----------------------------------------------------------------------------------------


async def until(condition: Callable[[], Awaitable[Any] | Any]) -> Any:
    """What the condition gives as soon as it is true; waits for 20 seconds at most."""
    async with asyncio.timeout(20):
        while True:
            value = condition()
            if value := await value if asyncio.iscoroutine(value) else value:
                return value
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def async_watched(client: redis.Redis, **options: Any) -> AsyncIterator[AsyncCircuitBreaker]:
    """A breaker that watches."""
    url = "unix://" + client.connection_pool.connection_kwargs["path"]
    breaker = AsyncCircuitBreaker("discovery", redis=url, policy=POLICY, **options)
    async with await breaker.watch(30) as watch:
        await until(lambda: watch.active)
        yield breaker
    await breaker.close()


async def aint() -> int:
    """A healthy service."""
    return 0


def test_async_trip_and_listeners(client: redis.Redis) -> None:
    """On asyncio a trip elsewhere rejects here at once; async listeners are awaited with what others did."""
    received: list[Event] = []

    async def listen(event: Event) -> None:
        await asyncio.sleep(0)
        received.append(event)

    async def main() -> None:
        async with async_watched(client, listeners=[listen]) as breaker:
            await breaker.call(aint)
            other = CircuitBreaker("discovery", redis=client, policy=POLICY)
            await asyncio.to_thread(trip, other)
            await until(lambda: any(event.source == "watch" for event in received))
            with pytest.raises(CircuitOpenError):
                await breaker.call(aint)

    asyncio.run(main())
    assert [event.new for event in received] == ["open"]


def test_async_subscription_comes_back(own_server: EmbeddedServer) -> None:
    """On asyncio too a lost subscription shortens the lease and comes back."""

    async def main() -> None:
        client = redis.Redis.from_url(own_server.url)
        async with async_watched(client) as breaker:
            await breaker.call(aint)
            before = subscriptions(client)
            client.client_kill_filter(_type="pubsub")
            client.set(breaker.keys.state, json.dumps(OPEN))

            async def rejects() -> bool:
                try:
                    await breaker.call(aint)
                except CircuitOpenError:
                    return True
                return False

            await until(rejects)
            await until(lambda: breaker._watch.active and subscriptions(client) == before)  # type: ignore[union-attr]
        client.close()

    asyncio.run(main())


def test_async_hanging_server_is_noticed(own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On asyncio too a silent connection is asked whether it lives, and is lost when it does not answer."""
    monkeypatch.setattr(subscription, "PING_EVERY", 0.2)

    async def main() -> None:
        client = redis.Redis.from_url(own_server.url)
        async with async_watched(client) as breaker:
            watch: Any = breaker._watch
            pings = await until(lambda: client.info("commandstats").get("cmdstat_ping", {}).get("calls"))
            await until(lambda: client.info("commandstats")["cmdstat_ping"]["calls"] > pings)
            assert watch.active
            with stopped(own_server):
                await until(lambda: not watch.active)
                assert breaker._view.lease == 0.1
            await until(lambda: watch.active)
        client.close()

    asyncio.run(main())


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_a_refused_ping_is_an_answer(
    shell: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses PING, as one does that cannot save, lives: the subscription stands, nothing is logged."""
    monkeypatch.setattr(subscription, "PING_EVERY", 0.05)

    def refused(admin: redis.Redis, times: int) -> bool:
        return admin.info("commandstats").get("cmdstat_ping", {}).get("rejected_calls", 0) >= times

    async def use(url: str, admin: redis.Redis) -> None:
        breaker = AsyncCircuitBreaker("discovery", redis=url, policy=POLICY, redis_timeout=20)
        async with await breaker.watch(30) as watch:
            await until(lambda: watch.active)
            await until(lambda: refused(admin, 3))
            assert watch.active
        await breaker.close()

    with EmbeddedServer(port=0) as server, redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~*", "&*", "+@all", "-ping")
        url = server.url.replace("://", "://me:secret@")
        if shell == "async":
            asyncio.run(use(url, admin))
        else:
            breaker = CircuitBreaker("discovery", redis=url, policy=POLICY, redis_timeout=20)
            with breaker.watch(30) as watch:
                wait_until(lambda: watch.active)
                wait_until(lambda: refused(admin, 3))
                assert watch.active
                trip(CircuitBreaker("discovery", redis=url, policy=POLICY, redis_timeout=20))
                wait_until(lambda: breaker.state == "open")
    assert not caplog.records


def test_a_subscription_that_nobody_needs_ends(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """The last that leaves ends it; who joins at the next moment gets another one, and whoever left may leave again."""
    breaker = watched()
    before = subscriptions(client)
    breaker._watch.close()  # type: ignore[union-attr]
    assert breaker._view.lease == 0.1
    other = watched("search")
    breaker._watch.close()  # type: ignore[union-attr]
    wait_until(lambda: left_over(client) == before)
    trip(CircuitBreaker("search", redis=client, policy=POLICY))
    wait_until(lambda: other.state == "open")


def test_async_watch_ends_with_its_loop(client: redis.Redis) -> None:
    """When the loop has ended the short lease holds, and a second loop may watch anew."""
    before = subscriptions(client)
    url = "unix://" + client.connection_pool.connection_kwargs["path"]
    breaker = AsyncCircuitBreaker("discovery", redis=url, policy=POLICY)

    async def main() -> None:
        watch = await breaker.watch()
        await until(lambda: watch.active)
        assert breaker._view.lease == 30

    for _ in range(2):
        asyncio.run(main())
        assert breaker._view.lease == 0.1
        wait_until(lambda: subscriptions(client) == before)
