"""watch(): a message is a hint to read the state at once; listeners learn of the transitions of others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import threading
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
from pybreaker_redis.wire.link import BURST, BURST_TIME
from pybreaker_redis.wire.scripts import compose

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


def commands(client: redis.Redis, name: str) -> int:
    """How often a command was sent so far."""
    return int(client.info("commandstats").get(f"cmdstat_{name}", {}).get("calls", 0))


def elsewhere(client: redis.Redis, name: str = "discovery", **options: Any) -> CircuitBreaker:
    """A breaker as another process has it: it shares no link with those of `client`."""
    url = "unix://" + client.connection_pool.connection_kwargs["path"]
    return CircuitBreaker(name, redis=url, **{"policy": POLICY, "redis_timeout": 20.0, **options})


def reported(breaker: Any) -> bool:
    """Whether its first success has arrived: on its way, it could still end a failure of another instance."""
    return bool(breaker._view._reported_at > 0 and not breaker._redis.link.is_reporting(breaker._line))


LONG = 600.0  # a lease: within a test only a hint refreshes such a view


@pytest.fixture
def watched(client: redis.Redis) -> Iterator[Callable[..., CircuitBreaker]]:
    """Makes breakers that watch, and waits until their subscription stands."""
    watches = []

    def make(name: str = "discovery", **options: Any) -> CircuitBreaker:
        breaker = CircuitBreaker(
            name, redis=client, **{"policy": POLICY, "lease": LONG, "redis_timeout": 20.0, **options}
        )
        watches.append(breaker.watch())
        wait_until(lambda: watches[-1].active)
        return breaker

    yield make
    for watch in watches:
        watch.close()
    wait_until(lambda: left_over(client) == 0)


def test_a_trip_is_known_at_once(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A trip of another instance rejects here, with the right wait, for one read and one script of ours."""
    breaker = watched(listed=False)
    before = commands(client, "evalsha")
    breaker.call(int)
    wait_until(lambda: commands(client, "evalsha") == before + 2)  # the second reports the first success
    for _ in range(100):
        breaker.call(int)
    trip(elsewhere(client, listed=False))
    wait_until(lambda: breaker.state == "open")
    with pytest.raises(CircuitOpenError) as rejected:
        breaker.call(int)
    assert 50 < rejected.value.retry_after <= 60
    # the other's first call and its two reports; ours reads the trip
    assert commands(client, "evalsha") - before == 2 + 4


def test_listeners_receive_what_others_did(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Each transition of another instance arrives once, with its cause and its author; our own arrive once."""
    received: list[Event] = []
    breaker = watched(listeners=[received.append])
    breaker.call(int)
    wait_until(lambda: reported(breaker))
    other = elsewhere(client)
    trip(other)
    wait_until(lambda: len(received) == 1)
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
    assert [e.generation for e in received] == [e.generation for e in reversed(breaker.history())]


def test_listeners_receive_the_latest_of_several(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Of transitions that follow each other at once the newest arrives; history() has them all."""
    received: list[Event] = []
    breaker = watched(listeners=[received.append])
    breaker.call(int)
    other = elsewhere(client)
    for _ in range(10):
        other.force_open()
        other.reset()
    newest = breaker.history()[0]
    wait_until(lambda: received and received[-1].generation == newest.generation)
    assert (received[-1].new, received[-1].reason, breaker.state) == ("closed", "reset", "closed")
    generations = [event.generation for event in received]
    assert generations == sorted(set(generations))
    assert len(breaker.history()) == 20


def at_once(
    client: redis.Redis, breaker: CircuitBreaker, *steps: tuple[str, dict[str, Any]], lost: bool = False
) -> None:
    """Run these scripts as another instance, so that nobody reads in between. lost: the document is gone before."""
    with client.pipeline(transaction=True) as pipeline:
        if lost:
            pipeline.delete(breaker.keys.state)
        for script, request in steps:
            pipeline.eval(compose(script), 3, *breaker.keys, json.dumps({"instance": "other:1", **request}))
        pipeline.execute()


SET = "control", {"action": "set_policy", "override": {"quorum": 3}}
CLEAR = "control", {"action": "clear_policy"}


def test_a_policy_hides_no_transition(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Listeners receive the transition of a generation, not the actions on the policy override that follow it."""
    received: list[Event] = []
    breaker = watched(listeners=[received.append])
    breaker.call(int)
    at_once(client, breaker, SET, ("control", {"action": "force_open"}), CLEAR, SET, CLEAR)
    wait_until(lambda: received)
    at_once(client, breaker, SET)
    wait_until(lambda: breaker.snapshot().policy.quorum == 3)
    at_once(client, breaker, ("control", {"action": "reset"}))
    wait_until(lambda: len(received) == 2)
    assert [(e.old, e.new, e.reason, e.instance) for e in received] == [
        ("closed", "open", "forced", "other:1"),
        ("open", "closed", "reset", "other:1"),
    ]


def test_a_policy_is_no_reason(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A document that was lost begins a generation without a transition; an action on it is not told as one."""
    received: list[Event] = []
    breaker = watched(listeners=[received.append])
    breaker.call(int)
    at_once(client, breaker, ("acquire", {}), SET, CLEAR, lost=True)
    wait_until(lambda: received)
    assert [(e.old, e.new, e.reason) for e in received] == [("closed", "closed", None)]


def test_nothing_that_was_before_is_notified(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A breaker that first sees an open circuit has seen no transition."""
    trip(elsewhere(client))
    received: list[Event] = []
    breaker = watched(listeners=[received.append])
    wait_until(lambda: rejects(breaker))
    elsewhere(client).reset()
    wait_until(lambda: received)
    assert [event.reason for event in received] == ["reset"]


def test_one_subscription_for_all(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Any number of breakers of one client share a subscription, whatever their prefix; it ends with the last."""
    before = subscriptions(client)
    breakers = [*(watched(f"service {n}") for n in range(20)), watched("service 7", prefix="staging")]
    assert subscriptions(client) == before + 1
    trip(elsewhere(client, "service 7"))
    wait_until(lambda: breakers[7].state == "open")
    assert [breaker.state for breaker in breakers].count("open") == 1
    wait_until(lambda: client.pubsub_numpat() == 2)
    trip(elsewhere(client, "service 7", prefix="staging"))
    wait_until(lambda: breakers[20].state == "open")
    for breaker in breakers:
        assert breaker._watch is not None
        breaker._watch.close()
    wait_until(lambda: subscriptions(client) == before)


@pytest.mark.parametrize("prefix", ["circuit_breaker", "a*[b]?\\c"])
def test_prefixes(client: redis.Redis, watched: Callable[..., CircuitBreaker], prefix: str) -> None:
    """A prefix is no pattern: only its own breakers are watched."""
    breaker = watched("a b*", prefix=prefix)
    trip(elsewhere(client, "a b*", prefix="axb]yc"))
    witness = elsewhere(client, "other", prefix=prefix, lease=LONG)
    with witness.watch() as watch:
        wait_until(lambda: watch.active)
        trip(CircuitBreaker("other", redis=client, prefix=prefix, policy=POLICY, redis_timeout=0.3))
        wait_until(lambda: witness.state == "open")  # published later: once it has taken effect, nothing is under way
    assert (breaker.state, breaker._view.seen.generation) == ("closed", 0)
    trip(elsewhere(client, "a b*", prefix=prefix))
    wait_until(lambda: breaker.state == "open")


def test_watching_sends_nothing(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A healthy breaker that watches sends nothing within its lease, once its first success is reported."""
    breaker = watched()
    before = commands(client, "evalsha")
    breaker.call(int)
    wait_until(lambda: commands(client, "evalsha") == before + 2)
    both = commands(client, "evalsha"), commands(client, "mget")
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        breaker.call(int)
    assert (commands(client, "evalsha"), commands(client, "mget")) == both


def test_watching_lengthens_no_lease(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A watching breaker reads once per lease all the same, so that a trip without a message is known after it."""
    breaker = watched(lease=0.1)
    breaker.call(int)
    before = commands(client, "mget")
    wait_until(lambda: breaker.call(int) == 0 and commands(client, "mget") >= before + 3)
    client.set(breaker.keys.state, json.dumps(OPEN))  # as a server without permission to publish stores it
    wait_until(lambda: rejects(breaker))


def test_an_override_is_obeyed_at_once(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A policy override that an operator sets or clears is obeyed at once, however long the lease."""
    breaker = watched()
    breaker.call(int)
    elsewhere(client).set_policy(failure_threshold=1, error_rate_threshold=0.5, window=20)
    wait_until(lambda: breaker._view.policy.window == 20)
    assert breaker._view.policy.failure_threshold == 1
    elsewhere(client).clear_policy()
    wait_until(lambda: breaker._view.policy == POLICY)


def test_a_rate_bounds_what_is_not_reported(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Where a rate can trip, counts are reported within a tenth of the window, however long the lease."""
    breaker = watched(policy=Policy(error_rate_threshold=0.5, window=10))
    breaker.call(int)
    end = time.monotonic() + 3
    calls = 1
    while time.monotonic() < end:
        breaker.call(int)
        calls += 1
        time.sleep(0.01)
    assert elsewhere(client, policy=breaker.policy).snapshot().calls >= calls * 0.5


def test_a_run_of_failures_is_known_halfway(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Halfway to the threshold the successes here end the run of another instance, however long the lease."""
    policy = Policy(failure_threshold=6, reset_timeout=60)
    breaker, failing = watched(policy=policy), elsewhere(client, policy=policy)
    breaker.call(int)
    wait_until(lambda: reported(breaker))
    trip(failing, 2)
    breaker.call(int)
    assert failing.snapshot().failure_count == 2
    trip(failing, 1)  # half of six: the script publishes a hint
    wait_until(lambda: breaker.call(int) == 0 and failing.snapshot().failure_count == 0)


def test_a_lost_subscription_comes_back(own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    """Killed, it is back by itself, without a warning; what was missed is read again, however long the lease."""
    client = redis.Redis.from_url(own_server.url)
    breaker = CircuitBreaker("discovery", redis=client, policy=POLICY, lease=LONG)
    with breaker.watch() as watch:
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
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    client.close()


OPEN = {"state": "open", "failure_count": 2, "success_count": 0, "last_failure_time": None, "opened_at": None}


def test_a_subscription_that_stays_lost_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """When it cannot be opened again at once, and not for each attempt. The warning says why."""
    with EmbeddedServer() as server:
        breaker = CircuitBreaker("discovery", redis=server.url, policy=POLICY)
        watch = breaker.watch()
        wait_until(lambda: watch.active)
    wait_until(lambda: "subscription is lost" in caplog.text)
    time.sleep(0.5)
    watch.close()
    [warning] = [message for message in caplog.messages if "subscription is lost" in message]
    assert re.search("the subscription is lost: .*No such file", warning)


def test_a_hanging_server_is_noticed(own_server: EmbeddedServer) -> None:
    """A connection that stays open but silent is lost after two unanswered seconds; then it stands again."""
    client = redis.Redis.from_url(own_server.url)
    breaker = CircuitBreaker("discovery", redis=client, policy=POLICY)
    with breaker.watch() as watch:
        wait_until(lambda: watch.active)
        with stopped(own_server):
            wait_until(lambda: not watch.active)
        wait_until(lambda: watch.active)
    client.close()


def forged(generation: int) -> list[str | bytes]:
    """Messages that no script publishes, and such as it published for states that are over, or never were."""
    change = {"from": "closed", "to": "open", "reason": "failure_threshold", "failure_count": 5, "success_count": 0}
    return [
        "",
        "x",
        "[]",
        "{}",
        "null",
        '{"to":"ajar"}',
        '{"to":"open"}',
        b"\xff\xfe",
        '{"policy":1}',
        '{"policy":"set_policy"}',
        "1" * 10_000,
        "[" * 100_000,
        "x" * 25_000_000,
        '{"from":"closed","to":"open","reason":"x","generation":1e30,"failure_count":0}',
        '{"from":"closed","to":"open","reason":"x","generation":1e999,"failure_count":0}',
        '{"from":"closed","to":"open","reason":"x","generation":9e13,"failure_count":0,"retry_after_ms":1e300}',
        '{"to":"open","reason":"x","generation":9e13,"failure_count":0}',
        '{"from":"closed","to":"open","reason":5,"generation":9e13,"failure_count":0}',
        '{"from":"closed","to":["open"],"reason":"x","generation":9e13,"failure_count":0}',
        *(
            json.dumps({**change, "generation": generation + step, "instance": "1-1", "retry_after_ms": 60_000})
            for step in (-1, 0, 1, 2, 1_000_000)
        ),
    ]


@pytest.mark.parametrize("lease", [0.1, LONG])
def test_messages_of_any_content(
    client: redis.Redis,
    watched: Callable[..., CircuitBreaker],
    caplog: pytest.LogCaptureFixture,
    lease: float,
) -> None:
    """Whatever anybody publishes under our channel ends no subscription, changes no decision and notifies nobody."""
    received: list[Event] = []
    breaker = watched(lease=lease, listeners=[received.append])
    breaker.call(int)
    before = breaker.snapshot()
    watch = breaker._watch
    assert watch is not None
    messages = forged(before.generation)
    reads = commands(client, "mget")
    for message in messages:
        client.publish(breaker.keys.state, message)
        assert breaker.call(int) == 0
    # published after all others: once it has taken effect, the others have had theirs
    trip(elsewhere(client, "other"))
    witness = watched("other")
    wait_until(lambda: witness.state == "open")
    wait_until(lambda: commands(client, "mget") > reads)
    assert breaker.call(int) == 0
    assert breaker.snapshot() == before
    assert (breaker.state, breaker._view.seen.generation) == ("closed", before.generation)
    assert watch.active
    assert not received
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    trip(elsewhere(client))
    wait_until(lambda: breaker.state == "open")
    wait_until(lambda: received)
    assert [event.reason for event in received] == ["failure_threshold"]


def test_a_forged_message_closes_nothing(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Nor does a message close an open circuit, or end a forced state."""
    breaker, other = watched(), elsewhere(client)
    other.force_open(60)
    wait_until(lambda: rejects(breaker))
    generation = breaker.snapshot().generation
    change = {"from": "open", "to": "closed", "reason": "reset", "failure_count": 0, "success_count": 0}
    reads = commands(client, "mget")
    client.publish(breaker.keys.state, json.dumps({**change, "generation": generation + 1}))
    wait_until(lambda: commands(client, "mget") > reads)
    assert rejects(breaker)
    assert breaker.snapshot().forced == "open"


def test_many_messages_are_few_reads(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """Hints coalesce: a flood of messages costs a read each at most, and no script."""
    breaker = watched()
    breaker.call(int)
    before = commands(client, "mget"), commands(client, "evalsha")
    with client.pipeline(transaction=False) as pipe:
        for _ in range(10_000):
            pipe.publish(breaker.keys.state, "x")
        pipe.execute()
    trip(elsewhere(client))
    wait_until(lambda: breaker.state == "open")
    assert commands(client, "mget") - before[0] < 5_000
    assert commands(client, "evalsha") - before[1] <= 5


def test_breakers_that_are_gone_leave_nothing(client: redis.Redis) -> None:
    """However many breakers of one name have joined a subscription, and left it."""
    one = subscription.Subscription()
    for _ in range(100):
        breaker = CircuitBreaker("discovery", redis=client)
        one.join(breaker)
        one.leave(breaker)
    assert not one.is_needed()


def test_bad_watches(client: redis.Redis) -> None:
    """Without Redis there is nothing to watch; watch() takes no argument."""
    with pytest.raises(PolicyError, match="nothing to watch"):
        CircuitBreaker("discovery").watch()
    with pytest.raises(TypeError):
        CircuitBreaker("discovery", redis=client).watch(30)  # type: ignore[call-arg]


def test_without_a_server() -> None:
    """Watching needs no server."""
    breaker = CircuitBreaker("discovery", redis="redis://127.0.0.1:1")
    with breaker.watch() as watch:
        assert breaker.call(int) == 0
        assert not watch.active


def test_fork(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """A forked child watches by a subscription of its own from its next script call on."""
    breaker = watched()
    breaker.call(int)
    before = subscriptions(client)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            assert not breaker._watch.active  # type: ignore[union-attr]
            wait_until(lambda: breaker.call(int) == 0 and breaker._watch.active)  # type: ignore[union-attr]
            os.write(write, b"w")
            wait_until(lambda: breaker.state == "open")
            os.write(write, b"o")
        finally:
            os._exit(0)
    os.close(write)  # so that a child that fails ends the wait for it
    try:
        assert os.read(read, 1) == b"w"
        assert subscriptions(client) == before + 1
        trip(elsewhere(client))
        assert os.read(read, 1) == b"o"
        wait_until(lambda: breaker.state == "open")
        assert os.waitpid(child, 0) == (child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


@pytest.mark.parametrize("seconds", [pytest.param(30.0, marks=pytest.mark.long), pytest.param(2.0, id="short")])
def test_two_databases_of_one_server(client: redis.Redis, seconds: float) -> None:
    """Channels have no database: whatever happens to the same name in another one changes no decision here."""
    path = client.connection_pool.connection_kwargs["path"]
    elsewhere_url = f"unix://{path}?db=1"
    received: list[Event] = []
    names = ["healthy", "dead"]
    policy = Policy(failure_threshold=2, reset_timeout=3600)
    here = {name: CircuitBreaker(name, redis=client, policy=policy, listeners=[received.append]) for name in names}
    watches = [breaker.watch() for breaker in here.values()]
    there = {name: CircuitBreaker(name, redis=elsewhere_url, policy=POLICY, lease=0) for name in names}
    trip(here["dead"])
    assert here["healthy"].call(int) == 0
    wait_until(lambda: all(watch.active for watch in watches))
    history = len(here["dead"].history())
    del received[:]
    decisions = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name in names:
            there[name].reset()
            trip(there[name])
        for _ in range(20):
            assert here["healthy"].call(int) == 0
            assert rejects(here["dead"])
            decisions += 2
    assert decisions >= 40
    assert there["healthy"].snapshot().state == "open"
    assert (here["healthy"].state, here["dead"].state) == ("closed", "open")
    assert not received
    assert not here["healthy"].history()
    assert len(here["dead"].history()) == history
    for watch in watches:
        watch.close()


def test_a_flood_of_messages(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """However many messages anyone publishes, they cause a bounded number of reads, and the last one is not missed."""
    breaker = watched()
    breaker.call(int)
    reads, began = commands(client, "mget"), time.monotonic()
    messages = 0
    while time.monotonic() - began < 1:
        client.publish(breaker.keys.state, "x")
        messages += 1
    trip(elsewhere(client))
    wait_until(lambda: breaker.state == "open")
    tenths = (time.monotonic() - began) / BURST_TIME + 2
    assert commands(client, "mget") - reads <= tenths * (BURST + 1)  # an exchange reads once, whatever it was hinted of
    assert messages > tenths * (BURST + 1)


def test_a_slow_listener_delays_no_decision(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """While a listener of one breaker sleeps, trips and recoveries of all others, and of its own, are known at once."""
    done = threading.Event()
    slow = watched("slow", listeners=[lambda event: done.wait(60)])
    other = watched("other")
    assert (slow.call(int), other.call(int)) == (0, 0)
    wait_until(lambda: reported(slow) and reported(other))
    trip(elsewhere(client, "slow"))
    wait_until(lambda: slow.state == "open")
    trip(elsewhere(client, "other"))
    wait_until(lambda: other.state == "open")
    with pytest.raises(CircuitOpenError) as rejected:
        other.call(int)
    assert rejected.value.retry_after <= 60
    elsewhere(client, "slow").reset()
    elsewhere(client, "other").reset()
    wait_until(lambda: (slow.state, other.state) == ("closed", "closed"))
    assert not done.is_set()
    done.set()


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
    breaker = AsyncCircuitBreaker(
        "discovery", redis=url, policy=POLICY, **{"lease": LONG, "redis_timeout": 20.0, **options}
    )
    async with await breaker.watch() as watch:
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
            await until(lambda: reported(breaker))
            other = CircuitBreaker("discovery", redis=client, policy=POLICY)
            await asyncio.to_thread(trip, other)
            await until(lambda: received)
            with pytest.raises(CircuitOpenError):
                await breaker.call(aint)

    asyncio.run(main())
    [event] = received
    assert (event.old, event.new, event.reason, event.source) == ("closed", "open", "failure_threshold", "watch")
    assert event.counts == {"failure_count": 2, "success_count": 0}


def test_async_messages_of_any_content(client: redis.Redis) -> None:
    """On asyncio too no message changes a decision or notifies anybody."""
    received: list[Event] = []

    async def main() -> None:
        async with async_watched(client, listeners=[received.append]) as breaker:
            await breaker.call(aint)
            before = await breaker.snapshot()
            for message in forged(before.generation):
                reads = commands(client, "mget")
                client.publish(breaker.keys.state, message)
                await until(lambda reads=reads: commands(client, "mget") > reads)  # type: ignore[misc]
                assert await breaker.call(aint) == 0
            assert await breaker.snapshot() == before
            assert breaker._watch is not None
            assert breaker._watch.active
            assert not received
            await until(lambda: reported(breaker))
            await asyncio.to_thread(trip, CircuitBreaker("discovery", redis=client, policy=POLICY))
            await until(lambda: breaker.state == "open")
            await until(lambda: received)

    asyncio.run(main())
    assert [event.reason for event in received] == ["failure_threshold"]


def test_async_subscription_comes_back(own_server: EmbeddedServer) -> None:
    """On asyncio too a lost subscription comes back, and what was missed is read again."""

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
        async with await breaker.watch() as watch:
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
            with breaker.watch() as watch:
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
    watch: Any = breaker._watch
    watch.close()
    assert not watch.active
    other = watched("search")
    watch.close()
    wait_until(lambda: left_over(client) == before)
    trip(elsewhere(client, "search"))
    wait_until(lambda: other.state == "open")


def test_a_watch_that_was_closed_notifies_nobody(client: redis.Redis, watched: Callable[..., CircuitBreaker]) -> None:
    """The breaker learns of a transition with its lease, but its listeners are not notified, as before it watched."""
    received: list[Event] = []
    breaker = watched(lease=0.05, listeners=[received.append])
    breaker.call(int)
    watch: Any = breaker._watch
    watch.close()
    reads = commands(client, "xrevrange")
    trip(elsewhere(client, "discovery"))
    wait_until(lambda: rejects(breaker))
    CircuitBreaker("discovery", redis=client).reset()
    wait_until(lambda: not rejects(breaker))
    assert received == []
    assert commands(client, "xrevrange") == reads


def test_async_watch_ends_with_its_loop(client: redis.Redis) -> None:
    """When the loop has ended so has its subscription, and a second loop may watch anew."""
    before = subscriptions(client)
    url = "unix://" + client.connection_pool.connection_kwargs["path"]
    breaker = AsyncCircuitBreaker("discovery", redis=url, policy=POLICY)

    async def main() -> None:
        watch = await breaker.watch()
        await until(lambda: watch.active)

    for _ in range(2):
        asyncio.run(main())
        assert not breaker._watch.active  # type: ignore[union-attr]
        wait_until(lambda: subscriptions(client) == before)
