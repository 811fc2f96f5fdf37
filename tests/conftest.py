"""Servers, clocks and engines for all tests. Nothing is mocked: Redis is a real server of our own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import pathlib
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from hypothesis import Phase, settings
from redis.exceptions import NoScriptError

from pybreaker_redis import CircuitBreaker, Counts
from pybreaker_redis._memory import MemoryEngine
from pybreaker_redis._protocol import Keys, decode, encode, keys_of
from pybreaker_redis._view import View
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire import exits
from pybreaker_redis.wire.scripts import SCRIPTS, compose

START_MS = 1_700_000_000_000
FROZEN_CLOCK = (pathlib.Path(__file__).parent / "lua" / "frozen_clock.lua").read_text()

# a mutant is killed by any failure: no smallest one is looked for, and every run tries the same examples
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)


def nonzero(counts: Counts) -> dict[str, int]:
    """The calls that a breaker has counted, by outcome."""
    return {name: value for name, value in dataclasses.asdict(counts).items() if value}


@pytest.fixture(autouse=True)
def only_own_breakers() -> Iterator[None]:
    """The breakers of one test are not refreshed during the next, which may use their names with other policies."""
    yield
    end = time.monotonic() + 0.2
    for used in list(exits.servers):
        used.link._used.clear()
        used.link._needing.clear()
        while used.link.is_busy() and time.monotonic() < end:  # its last exchange must not write into the next test
            time.sleep(0.001)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """One server for the tests that do not hurt it."""
    with EmbeddedServer() as started:
        yield started


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    """A client to an empty server."""
    with redis.Redis.from_url(server.url) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server that the test may hurt."""
    with EmbeddedServer() as started:
        yield started


@pytest.fixture(scope="session")
def cluster_url() -> Iterator[str]:
    """A cluster of three masters, for the tests that do not hurt it; the URL names the first of them."""
    with contextlib.ExitStack() as stack:
        ports, buses = [], [free_port() for _ in range(3)]
        for index, bus in enumerate(buses):
            node = stack.enter_context(
                EmbeddedServer(port=0, args=("--cluster-enabled", "yes", "--cluster-port", str(bus)))
            )
            ports.append(int(node.url.rpartition(":")[2]))
            with redis.Redis.from_url(node.url) as connected:
                connected.execute_command("CLUSTER ADDSLOTS", *range(index * 16384 // 3, (index + 1) * 16384 // 3))
                connected.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
                if index:
                    connected.execute_command("CLUSTER MEET", "127.0.0.1", ports[0], buses[0])
        for port in ports:
            with redis.Redis(port=port) as connected:
                wait_until(lambda of=connected: of.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        yield f"redis+cluster://127.0.0.1:{ports[0]}"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=["redis", "memory"])
def make_breaker(request: pytest.FixtureRequest, client: redis.Redis) -> Callable[..., CircuitBreaker]:
    """Makes breakers on either engine."""
    shared = client if request.param == "redis" else None
    return lambda name="discovery", **options: CircuitBreaker(name, redis=shared, **options)


def stored_calls(breaker: Any, client: redis.Redis) -> int:
    """The calls in the window as it is stored, without those that the process has gathered."""
    if breaker._memory is not None:
        return int(breaker._memory.run("snapshot", {})["calls"])
    return int(json.loads(client.get(breaker.keys.state) or "{}").get("window", {}).get("calls", 0))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the four scripts as Redis runs them, as `make bundles` writes them."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in SCRIPTS:
        (folder / f"{name}.lua").write_bytes(compose(name).encode())
    return folder


class LuaEngine:
    """The scripts on a real server, on the tests' clock."""

    def __init__(self, client: redis.Redis, keys: Keys, *, use_json: bool = False) -> None:
        self._client, self._keys, self._json = client, keys, use_json

    def run(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(request) if self._json else encode(request)
        text = on_frozen_clock(name)
        try:
            raw = self._client.evalsha(hashlib.sha1(text.encode()).hexdigest(), 3, *self._keys, body)
        except NoScriptError:
            raw = self._client.eval(text, 3, *self._keys, body)
        return json.loads(raw) if self._json else decode(raw)

    def history(self, count: int) -> list[dict[str, Any]]:
        entries = self._client.xrevrange(self._keys.history, count=count)
        return [{name.decode(): value.decode() for name, value in entry.items()} for _, entry in entries]


@functools.cache
def on_frozen_clock(name: str) -> str:
    """The script called name on the clock of the tests."""
    script = compose(name)
    cut = script.rindex("--[[")  # where the library ends: each file has one such head
    return script[:cut] + FROZEN_CLOCK + script[cut:]


class Machine:
    """One breaker of either engine on a clock that the test moves."""

    def __init__(self, engine: Any, set_clock: Callable[[int], Any]) -> None:
        self._engine, self._set_clock = engine, set_clock
        self.now_ms = START_MS
        self.advance(0)

    def advance(self, milliseconds: int) -> None:
        self.now_ms += milliseconds
        self._set_clock(self.now_ms)

    def run(self, name: str, policy: dict[str, int] | None = None, **request: Any) -> dict[str, Any]:
        return self._engine.run(name, {**request, **({"policy": policy} if policy else {})})

    def history(self) -> list[dict[str, str]]:
        """All entries, newest first, as texts."""
        entries = self._engine.history(1000)
        return [{name: str(value) for name, value in entry.items() if value is not None} for entry in entries]


def lua_machine(client: redis.Redis, name: str = "m", *, use_json: bool = False) -> Machine:
    """The Lua on the tests' clock."""
    return Machine(LuaEngine(client, keys_of(name), use_json=use_json), lambda now: client.set("test:now_ms", now))


def memory_machine(publish: Callable[[dict[str, Any]], None] | None = None) -> Machine:
    """The in-memory engine on the tests' clock."""
    clock = [START_MS]
    return Machine(MemoryEngine(now_ms=lambda: clock[0], publish=publish), lambda now: clock.__setitem__(0, now))


class InPlaceMachine(Machine):
    """The in-memory engine, which counts a failure in place wherever it can, as a breaker makes it."""

    def run(self, name: str, policy: dict[str, int] | None = None, **request: Any) -> dict[str, Any]:
        outcome = {field: value for field, value in request.items() if field not in ("instance", "generation", "error")}
        is_failure = name == "record" and outcome == {"failures": 1}
        if is_failure and self._engine.count_failure(request["generation"], policy or None, View(0.0)):
            return {**super().run("record", policy, generation=request["generation"]), "applied": True}
        return super().run(name, policy, **request)


def in_place_machine() -> Machine:
    """Like memory_machine(), but failures that can only lengthen a run are counted in place."""
    clock = [START_MS]
    return InPlaceMachine(MemoryEngine(now_ms=lambda: clock[0]), lambda now: clock.__setitem__(0, now))


@pytest.fixture(params=["lua", "lua-json", "memory", "in place"])
def machine(request: pytest.FixtureRequest, client: redis.Redis) -> Machine:
    """The state machine in Lua (requests in both forms) and in Python (failures counted by run(), or in place)."""
    if request.param == "memory":
        return memory_machine()
    if request.param == "in place":
        return in_place_machine()
    return lua_machine(client, use_json=request.param == "lua-json")


@contextlib.contextmanager
def published(client: redis.Redis, channel: str) -> Iterator[list[dict[str, Any]]]:
    """What is published on a channel within the block, once the block has ended."""
    heard: list[dict[str, Any]] = []
    with client.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.subscribe(channel)
        subscription.get_message(timeout=5)
        yield heard
        client.publish(channel, "end")
        while (message := subscription.get_message(timeout=5)) is None or message["data"] != b"end":
            if message is not None:
                heard.append(json.loads(message["data"]))


@contextlib.contextmanager
def stopped(server: EmbeddedServer) -> Iterator[None]:
    """The server hangs for the length of the block."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can start from here on."""

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)


def wait_until(condition: Callable[[], Any], timeout: float = 20.0) -> Any:
    """What the condition gives as soon as it is true; fails after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)
    return value


def wait_until_freed(reference: weakref.ref[Any], timeout: float = 20.0) -> None:
    """Collects garbage until the object is freed; fails after timeout seconds."""

    def is_freed() -> bool:
        gc.collect()
        return reference() is None

    wait_until(is_freed, timeout)
