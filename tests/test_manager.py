"""The managers: one breaker for each service, by one configuration, in memory and through Redis."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import gc
import inspect
import itertools
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import stopped, stored_calls, wait_until, wait_until_freed

from pybreaker_redis import (
    AsyncCircuitBreaker,
    AsyncCircuitBreakerManager,
    CircuitBreaker,
    CircuitBreakerManager,
    CircuitOpenError,
    Config,
    ConfigError,
    Event,
    Policy,
    PolicyError,
    _manager,
)
from pybreaker_redis._events import Instrument
from pybreaker_redis._manager import ManagerOptions
from pybreaker_redis._protocol import keys_of
from pybreaker_redis.embedded import EmbeddedServer

ONE = Policy(failure_threshold=1, reset_timeout=60)
NOWHERE = ["redis://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/mymaster", "redis+cluster://127.0.0.1:1"]


class Boom(Exception):
    """A failure of the guarded service."""


def boom() -> None:
    raise Boom


async def async_boom() -> None:
    raise Boom


async def one() -> int:
    return 1


def trip(manager: CircuitBreakerManager, service: str, times: int = 1) -> None:
    """Lets a service fail."""
    for _ in range(times):
        with pytest.raises(Boom):
            manager.call(service, boom)


@pytest.fixture
def make_manager(client: redis.Redis) -> Iterator[Callable[..., CircuitBreakerManager]]:
    """Makes managers that share through the tests' server, and closes them."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            CircuitBreakerManager.with_redis(Config(**{"redis_timeout": 20.0, **options}), redis=client)
        )


# Policies and calls


def test_in_memory() -> None:
    """A manager alone needs no server: calls, results, exceptions, a trip, states."""
    manager = CircuitBreakerManager(Config(services={"discovery": ONE, "auth": ONE}))
    assert manager.call("auth", lambda a, b: a - b, 5, b=3) == 2
    trip(manager, "discovery")
    with pytest.raises(CircuitOpenError) as rejected:
        manager.call("discovery", boom)
    assert rejected.value.name == "discovery"
    assert manager.get_state("discovery") == "open"
    manager.get_or_create("new")
    assert manager.get_all_states() == {"auth": "closed", "discovery": "open", "new": "closed"}
    assert manager.get_or_create("discovery").snapshot().source == "memory"


def test_defaults_for_a_service_that_is_not_listed() -> None:
    """Ten failures trip it, for two seconds, and half of the calls in the window."""
    manager = CircuitBreakerManager()
    policy = manager.get_or_create("any").policy
    assert (policy.failure_threshold, policy.reset_timeout, policy.error_rate_threshold) == (10, 2.0, 0.5)
    trip(manager, "any", 9)
    assert manager.get_state("any") == "closed"
    trip(manager, "any")
    assert manager.get_state("any") == "open"


def test_one_breaker_for_a_service_under_threads() -> None:
    """However many threads ask at once, they get one and the same breaker."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for round_ in range(50):
            manager = CircuitBreakerManager()
            found = list(pool.map(lambda _, of=manager: of.get_or_create("discovery"), range(16)))
            assert len(set(map(id, found))) == 1, round_


@pytest.mark.parametrize("shared", [False, True])
def test_disabled(client: redis.Redis, shared: bool) -> None:
    """Disabled, every call goes straight through, decorated ones too, and nothing is sent."""
    config = Config(enabled=False, services={"discovery": ONE})
    manager = CircuitBreakerManager.with_redis(config, redis=client) if shared else CircuitBreakerManager(config)
    decorated = manager.get_or_create("discovery")(boom)
    client.config_resetstat()
    for _ in range(30):
        trip(manager, "discovery")
        with pytest.raises(Boom):
            decorated()
    assert manager.get_all_states() == {"discovery": "closed"}
    assert manager.call("discovery", lambda: 7) == 7
    assert not client.keys()
    assert "cmdstat_evalsha" not in client.info("commandstats")


def test_hooks_of_all_breakers(make_manager: Callable[..., CircuitBreakerManager], client: redis.Redis) -> None:
    """Listeners, on_call and the classification of outcomes are given to the manager once."""
    changes: list[Event] = []
    calls: list[Event] = []
    manager = CircuitBreakerManager.with_redis(
        Config(defaults=ONE, redis_timeout=20),
        redis=client,
        listeners=iter([changes.append]),
        on_call=iter([calls.append]),
        ignore=KeyError,
    )
    with manager:
        with pytest.raises(KeyError):
            manager.call("a", {}.__getitem__, 1)
        trip(manager, "b")
    assert [(event.breaker, event.kind, event.new) for event in changes] == [("b", "state_change", "open")]
    assert [(event.breaker, event.kind) for event in calls] == [("a", "ignored"), ("b", "failure")]


# Through Redis


def test_two_managers_share(make_manager: Callable[..., CircuitBreakerManager], client: redis.Redis) -> None:
    """What one trips is open in the other, by the well-known key."""
    first, second = (make_manager(services={"discovery": ONE}) for _ in range(2))
    assert second.call("discovery", lambda: 1) == 1
    trip(first, "discovery")
    wait_until(lambda: second.get_state("discovery") == "open")
    wait_until(lambda: second.get_or_create("discovery").state == "open")  # as calls see it
    with pytest.raises(CircuitOpenError):
        second.call("discovery", boom)
    assert client.exists("circuit_breaker:discovery:state")
    assert second.get_all_states() == {"discovery": "open"}


def test_one_subscription(make_manager: Callable[..., CircuitBreakerManager], client: redis.Redis) -> None:
    """However many breakers, one connection subscribes; watch=False wants none; close() ends it."""
    manager = make_manager()
    for number in range(20):
        manager.call(f"service {number}", int)
    wait_until(lambda: len(client.client_list(_type="pubsub")) == 1)
    wait_until(lambda: all(manager.get_or_create(f"service {n}")._watch.active for n in range(20)))
    manager.close()
    wait_until(lambda: not client.client_list(_type="pubsub"))
    quiet = make_manager(watch=False)
    quiet.call("service", int)
    assert not client.client_list(_type="pubsub")


def test_a_server_that_goes_after_close(caplog: pytest.LogCaptureFixture) -> None:
    """Once closed, nobody is warned of a subscription that nobody needs any more."""
    before = set(threading.enumerate())
    with (
        EmbeddedServer() as server,
        CircuitBreakerManager.with_redis(Config(redis_url=server.url, redis_timeout=20)) as manager,
    ):
        assert manager.call("a", int) == 0
        wait_until(lambda: manager.get_or_create("a")._watch.active)
    wait_until(lambda: not any(t.name == "pybreaker_redis-watch" for t in {*threading.enumerate()} - before))
    assert "subscription" not in caplog.text


def test_states_cost_nothing_while_views_are_fresh(
    make_manager: Callable[..., CircuitBreakerManager], client: redis.Redis
) -> None:
    """get_all_states() of watched breakers that were used sends no command."""
    manager = make_manager(lease=60.0)
    before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
    for number in range(10):
        manager.call(f"s{number}", int)
        wait_until(lambda n=number: manager.get_or_create(f"s{n}")._watch.active)
    # each has asked once, and has reported its first success
    wait_until(lambda: client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0) - before == 2 * 10)
    client.config_resetstat()
    assert set(manager.get_all_states().values()) == {"closed"}
    assert "cmdstat_evalsha" not in client.info("commandstats")


def test_by_url(server: EmbeddedServer, client: redis.Redis) -> None:
    """A URL in the configuration is all that a manager needs."""
    with CircuitBreakerManager.with_redis(Config(redis_url=server.url, defaults=ONE, redis_timeout=20)) as manager:
        trip(manager, "discovery")
        assert manager.get_or_create("discovery").snapshot().source == "redis"


@pytest.mark.parametrize("url", NOWHERE)
def test_without_redis(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """No server there: made all the same, one warning, and this process protects itself by the same policy."""
    with CircuitBreakerManager.with_redis(Config(redis_url=url, services={"discovery": ONE})) as manager:
        assert not caplog.records
        trip(manager, "discovery")
        with pytest.raises(CircuitOpenError):
            manager.call("discovery", boom)
        assert manager.get_all_states() == {"discovery": "open"}
        assert manager.get_or_create("discovery").snapshot().source == "local"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Redis does not answer; the breakers of this process continue on their own: " in caplog.text


def test_services_share_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    """One warning and one wait, however many services lose the server; each protects itself."""
    options: dict[str, Any] = {"redis_timeout": 0.5, "defaults": ONE, "watch": False}
    with (
        EmbeddedServer(port=0) as server,
        CircuitBreakerManager.with_redis(Config(redis_url=server.url, **options)) as manager,
    ):
        names = [f"s{number}" for number in range(20)]
        for name in names:
            manager.call(name, int)
        with stopped(server):
            before = time.monotonic()
            for name in names:
                trip(manager, name)
                with pytest.raises(CircuitOpenError):
                    manager.call(name, int)
            assert time.monotonic() - before < 3 * 0.5
            assert {manager.get_or_create(name).snapshot().source for name in names} == {"local"}
        wait_until(lambda: {manager.get_or_create(name).snapshot().source for name in names} == {"redis"})
        # one at most has failed in Redis, too: its report waited there for the server
        assert list(manager.get_all_states().values()).count("open") <= 1
    said = [record.getMessage().partition(";")[0] for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["Redis does not answer", "Redis answers again"]


def test_states_of_a_server_that_hangs(own_server: EmbeddedServer) -> None:
    """get_all_states() waits for one timeout, not for one of each breaker."""
    services = {f"s{number}": ONE for number in range(20)}
    config = Config(redis_url=own_server.url, services=services, redis_timeout=0.3, lease=0.0, watch=False)
    with CircuitBreakerManager.with_redis(config) as manager:
        manager.get_all_states()
        with stopped(own_server):
            before = time.monotonic()
            assert set(manager.get_all_states().values()) == {"closed"}
            assert time.monotonic() - before < 3.0


def test_names_that_cannot_be_keys() -> None:
    """A service whose name cannot be a key is refused, in the configuration and at the first use."""
    with pytest.raises(PolicyError, match="braces"):
        Config(services={"{x}": ONE})
    with pytest.raises(PolicyError, match="braces"):
        CircuitBreakerManager().call("{x}", int)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lease": -1}, "lease"),
        ({"on_redis_failure": "maybe"}, "on_redis_failure"),
        ({"prefix": ""}, "prefix"),
        ({"services": {"a": {"quorum": 1}}}, "must be a Policy"),
        ({"watch": 0}, "watch"),
        ({"watch": None}, "watch"),
        ({"watch": 30.0}, "watch"),
        ({"host": ""}, "host"),
    ],
)
def test_a_bad_config(options: dict[str, Any], says: str) -> None:
    """What makes no sense is refused when the configuration is made, not at some later call."""
    with pytest.raises(PolicyError, match=says):
        Config(**options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork(make_manager: Callable[..., CircuitBreakerManager]) -> None:
    """A manager goes on in a forked child, with breakers and subscription of its own."""
    manager = make_manager(defaults=ONE)
    manager.call("discovery", int)
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            manager.call("other", int)
            with contextlib.suppress(Boom):
                manager.call("discovery", boom)
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    wait_until(lambda: manager.get_state("discovery") == "open")


# asyncio


def test_async_manager(client: redis.Redis, server: EmbeddedServer) -> None:
    """The same on asyncio: call, trip, shared state, one subscription, fallback."""

    async def use() -> None:
        config = Config(redis_url=server.url, defaults=ONE, redis_timeout=20)
        manager = AsyncCircuitBreakerManager.with_redis(config)
        other = CircuitBreakerManager.with_redis(config)
        with other:
            assert await manager.call("a", one) == 1
            assert await manager.call("b", one) == 1
            while not manager.get_or_create("a")._watch.active:
                await asyncio.sleep(0.01)
            while len(client.client_list(_type="pubsub")) != 1:  # that of an earlier test ends within a second
                await asyncio.sleep(0.01)
            await asyncio.to_thread(trip, other, "a")
            while await manager.get_state("a") != "open" or manager.get_or_create("a").state != "open":
                await asyncio.sleep(0.01)
            with pytest.raises(CircuitOpenError):
                await manager.call("a", one)
            with pytest.raises(Boom):
                await manager.call("b", async_boom)
            assert await manager.get_all_states() == {"a": "open", "b": "open"}
        await manager.close()

    asyncio.run(use())
    wait_until(lambda: not client.client_list(_type="pubsub"))


def test_async_manager_in_two_loops(server: EmbeddedServer, client: redis.Redis) -> None:
    """Made outside of a loop and used in one after the other, it subscribes in each."""
    manager = AsyncCircuitBreakerManager.with_redis(Config(redis_url=server.url, redis_timeout=20))
    breaker = manager.get_or_create("a")

    async def use() -> bool:
        async with manager:
            assert await manager.call("a", one) == 1
            while not breaker._watch.active:
                await asyncio.sleep(0.01)
            return True

    assert asyncio.run(use())
    assert asyncio.run(use())


@pytest.mark.parametrize("url", NOWHERE)
def test_async_without_redis(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """No server there: made all the same, one warning, and protected by the same policy."""

    async def use() -> None:
        manager = AsyncCircuitBreakerManager.with_redis(Config(redis_url=url, services={"a": ONE}))
        async with manager:
            with pytest.raises(Boom):
                await manager.call("a", async_boom)
            with pytest.raises(CircuitOpenError):
                await manager.call("a", one)
            assert await manager.get_all_states() == {"a": "open"}

    asyncio.run(use())
    assert "does not answer" in caplog.text


def test_async_in_memory_and_disabled() -> None:
    """In memory, and disabled, on asyncio."""

    async def use() -> None:
        manager = AsyncCircuitBreakerManager(Config(defaults=ONE))
        with pytest.raises(Boom):
            await manager.call("a", async_boom)
        assert await manager.get_all_states() == {"a": "open"}
        await manager.close()
        off = AsyncCircuitBreakerManager(Config(enabled=False, defaults=ONE))
        for _ in range(30):
            with pytest.raises(Boom):
                await off.call("a", async_boom)
        assert await off.get_state("a") == "closed"

    asyncio.run(use())


# Both


def test_one_interface() -> None:
    """Both managers have the same public names and arguments; what does I/O is awaited."""
    plain, awaited = CircuitBreakerManager, AsyncCircuitBreakerManager
    names = {name for name in dir(plain) if not name.startswith("_")}
    assert names == {name for name in dir(awaited) if not name.startswith("_")}
    assert names == {"call", "close", "get_all_states", "get_or_create", "get_state", "with_redis"}
    for name in [*names, "__init__"]:
        one, two = (inspect.signature(getattr(kind, name)).parameters for kind in (plain, awaited))
        assert [(p.name, p.kind, p.default) for p in one.values()] == [
            (p.name, p.kind, p.default) for p in two.values()
        ]
    coroutines = {name for name in names if inspect.iscoroutinefunction(getattr(awaited, name))}
    assert coroutines == {"call", "close", "get_all_states", "get_state"}


def test_breakers_are_of_the_manager_s_kind() -> None:
    """Each manager hands out breakers of its own world."""
    assert type(CircuitBreakerManager().get_or_create("a")) is CircuitBreaker
    assert type(AsyncCircuitBreakerManager().get_or_create("a")) is AsyncCircuitBreaker


MANAGERS = pytest.mark.parametrize("kind", [CircuitBreakerManager, AsyncCircuitBreakerManager])


@MANAGERS
def test_a_manager_takes_a_server_as_a_breaker_does(kind: Any, client: redis.Redis, server: EmbeddedServer) -> None:
    """redis= shares the breakers, and None keeps them in memory; with_redis() takes the configuration's URL."""
    here, elsewhere = Config(redis_url=server.url, redis_timeout=20), Config(redis_timeout=20)
    managers = {
        "memory": kind(here),
        "url": kind(elsewhere, redis=server.url),
        "with_redis": kind.with_redis(here),
        "with_redis of a url": kind.with_redis(elsewhere, redis=server.url),
    }

    async def main() -> None:
        for name, manager in managers.items():
            forcing = manager.get_or_create(name).force_open()
            if forcing is not None:
                await forcing
            await closed(manager)

    asyncio.run(main())
    stored = {name for name in managers if client.exists(keys_of(name).state)}
    assert stored == {"url", "with_redis", "with_redis of a url"}


@MANAGERS
def test_an_unknown_keyword_of_a_manager(kind: Any) -> None:
    """It is refused with the name of the manager, and with the keywords that there are."""
    for make in (kind, kind.with_redis):
        with pytest.raises(TypeError, match=f"^{kind.__name__} takes config, redis, failures.* no 'polcy'"):
            make(polcy=ONE)


def test_with_redis_takes_the_same_options() -> None:
    """The options that type checkers see at with_redis() are those of the constructor."""
    keywords = {*inspect.signature(CircuitBreakerManager).parameters} - {"config", "redis"}
    assert keywords == set(ManagerOptions.__annotations__)


@pytest.mark.parametrize("url", [None, "", 6379])
def test_a_configuration_without_a_server(url: Any) -> None:
    """It is refused with what to do: a manager in memory needs none."""
    with pytest.raises(PolicyError, match=f"redis_url must be .* not {url!r}: leave it out"):
        Config(redis_url=url)


@MANAGERS
def test_listeners_of_a_manager_are_checked_at_once(kind: Any) -> None:
    """A mistake is reported where it is made, and not when the first breaker is made."""
    for hooks, message in (({"listeners": print}, "listeners must be"), ({"on_call": [Instrument()]}, "belongs in")):
        with pytest.raises(PolicyError, match=message):
            kind(**hooks)


def test_when_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """It overrides a file and a dict. A Config is taken as it is, and so is none."""
    pytest.importorskip("pydantic_settings")
    (tmp_path / "gateway.json").write_text("{}")
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere:7000")
    for make in (CircuitBreakerManager, CircuitBreakerManager.with_redis, AsyncCircuitBreakerManager.with_redis):
        for source in ({}, str(tmp_path / "gateway.json"), tmp_path / "gateway.json"):
            assert make(source).config.redis_url == "redis://elsewhere:7000"
        for source in (None, Config()):
            assert make(source).config.redis_url == "redis://localhost:6379"


WITHOUT_EXTRA = """
import sys
sys.modules["pydantic"] = None
from pybreaker_redis import CircuitBreakerManager, Config, ConfigError, Policy
manager = CircuitBreakerManager(Config(services={"a": Policy(failure_threshold=3)}))
assert manager.call("a", lambda: 1) == 1
try:
    CircuitBreakerManager({"circuit_breaker": {}})
except ConfigError as error:
    print(error)
"""


def test_without_the_extra() -> None:
    """Without pydantic a Config does all; a dict or a file is refused with the name of the extra."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True, check=True)
    assert "pip install 'pybreaker_redis[config]'" in done.stdout
    assert "pybreaker_redis.Config" in done.stdout


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("redis://:secret@localhost:6379", r"is a URL: pass it as redis="),
        (3, "must be a path, a dict or a Config, not 3"),
        (Policy(), "must be a path, a dict or a Config, not Policy"),
    ],
)
def test_what_is_no_configuration(source: Any, message: str) -> None:
    """It is refused before anything is read, with what to pass instead and without a password."""
    for make in (CircuitBreakerManager, CircuitBreakerManager.with_redis, AsyncCircuitBreakerManager.with_redis):
        with pytest.raises(ConfigError, match=message) as raised:
            make(source)
        assert "secret" not in str(raised.value)


def test_a_dict() -> None:
    """A dict, and a file, are taken as pybreaker_redis.config.load() takes them."""
    pytest.importorskip("pydantic_settings")
    server = {"url": "redis://localhost:6379"}
    manager = CircuitBreakerManager({"circuit_breaker": {"services": {"a": {"failure_threshold": 1}}}, "redis": server})
    trip(manager, "a")
    assert manager.get_state("a") == "open"
    with pytest.raises(ConfigError, match="failure_treshold"):
        CircuitBreakerManager({"circuit_breaker": {"services": {"a": {"failure_treshold": 1}}}})


def test_breakers_that_nobody_asks_for_are_forgotten(
    make_manager: Callable[..., CircuitBreakerManager], client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their memory and subscription; but not an open one, and whoever holds one still gets the same."""
    monkeypatch.setattr(_manager, "FORGET_EVERY", 0.0)
    manager = make_manager(idle_after=0.05, defaults=ONE)
    manager.call("idle", int)
    held = manager.get_or_create("held")
    trip(manager, "open")
    idle = weakref.ref(manager.get_or_create("idle"))
    time.sleep(0.1)
    assert set(manager.get_all_states()) == {"idle", "held", "open"}  # a look at all of them keeps none
    manager.call("other", int)
    assert repr(manager) == "<CircuitBreakerManager ['open', 'other']>"
    wait_until_freed(idle)
    assert manager.get_or_create("held") is held
    assert manager.get_state("open") == "open"
    assert manager.call("idle", int) == 0


@pytest.mark.parametrize("kind", [CircuitBreakerManager, AsyncCircuitBreakerManager])
def test_close_includes_breakers_that_were_forgotten(
    kind: Any, server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds one may still call it: close() reports its successes, and ends its subscription."""
    monkeypatch.setattr(_manager, "FORGET_EVERY", 0.0)

    async def main() -> None:
        manager = kind.with_redis(Config(redis_url=server.url, idle_after=0.05, redis_timeout=20, lease=600.0))
        guarded = manager.get_or_create("held")(one if kind is AsyncCircuitBreakerManager else lambda: 1)
        await asyncio.sleep(0.1)
        manager.get_or_create("other")
        assert repr(manager) == f"<{kind.__name__} ['other']>"
        for _ in range(10):
            await result if inspect.isawaitable(result := guarded()) else None
        while not client.client_list(_type="pubsub"):
            await asyncio.sleep(0.01)
        await closed(manager)
        assert stored_calls(guarded.breaker, client) == 10

    asyncio.run(main())
    wait_until(lambda: not client.client_list(_type="pubsub"))


def test_close_while_another_thread_makes_breakers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so forgets idle ones, which somebody still holds: close() raises nothing."""
    monkeypatch.setattr(_manager, "FORGET_EVERY", 0.0)
    manager, ends, interval = CircuitBreakerManager(Config(idle_after=0.0)), threading.Event(), sys.getswitchinterval()
    held: collections.deque[CircuitBreaker] = collections.deque(maxlen=300)

    def make() -> None:
        for number in itertools.count():
            held.append(manager.get_or_create(f"tenant-{number}"))
            if ends.is_set():
                return

    thread = threading.Thread(target=make)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        wait_until(lambda: len(held) == 300)
        for _ in range(200):
            manager.close()
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_nothing_is_forgotten_while_it_is_used(make_manager: Callable[..., CircuitBreakerManager]) -> None:
    """By default a breaker is kept for an hour; with None, for ever."""
    for idle_after in (3600.0, None):
        manager = make_manager(idle_after=idle_after)
        breaker = manager.get_or_create("a")
        for number in range(3):
            manager.get_or_create(f"b{number}")
        assert manager.get_or_create("a") is breaker


TENANTS = 1000
LIMIT = 3 * 1024  # bytes for each


async def called_once(manager: Any, group: str) -> None:
    """Call a breaker for each of many tenants, once."""

    async def fine() -> None:
        pass

    for number in range(TENANTS):
        if isinstance(manager, CircuitBreakerManager):
            manager.call(f"{group}-{number:04}", int)
        else:
            await manager.call(f"{group}-{number:04}", fine)


async def closed(manager: Any) -> None:
    """Close a manager of either kind."""
    if inspect.isawaitable(closing := manager.close()):
        await closing


@pytest.mark.long
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [CircuitBreakerManager, AsyncCircuitBreakerManager])
def test_what_a_tenant_costs(client: redis.Redis, server: EmbeddedServer, kind: Any, shared: bool) -> None:
    """A breaker that was called once, ten seconds ago, takes at most 3 KB, while its process watches."""
    config = Config(redis_url=server.url)

    async def main() -> float:
        earlier, manager = (kind.with_redis(config) if shared else kind(config) for _ in range(2))
        await called_once(earlier, "earlier")  # fills the caches, whose size is limited
        await closed(earlier)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await called_once(manager, "tenants")
        while shared and manager.get_or_create("tenants-0000")._redis.link._used:  # until all are idle
            await asyncio.sleep(0.1)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        await closed(manager)
        return (after - before) / TENANTS

    tracemalloc.start()
    try:
        kept = asyncio.run(main())
    finally:
        tracemalloc.stop()
    print(f"{kept:.0f} bytes for each tenant")
    assert kept <= LIMIT
