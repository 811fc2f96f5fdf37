"""Names, policies and requests that nobody sane would send."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from typing import Any

import msgpack
import pytest
import redis
from conftest import wait_until

from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker, Event, Policy, PolicyError
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import SCRIPTS, compose

ODD_NAMES = [
    " ",
    "a b\tc",
    "line\nbreak\r\n",
    "*",
    "disc?very[a-z]*",
    "\\",
    "\"quoted\" 'twice'",
    "]] redis.call('FLUSHALL') --[[",
    "'..redis.call('FLUSHALL')..'",
    "%s %d %%",
    "\x00null\x00",
    "\r\n*1\r\n$8\r\nFLUSHALL\r\n",
    "größe-発見-🔥",
    "a:b::c:",
    ":state",
    "../../etc/passwd",
    "x" * 512,
    "é" * 256,
    "\u202eright to left\ufeff",
]
NO_NAMES: list[Any] = ["", "x" * 513, "é" * 257, "x" * 10_000, "{a}", "a}b", "\ud800", None, 7, b"bytes", ["a"]]


def use_sync(url: str, name: str, **options: Any) -> tuple[Any, ...]:
    breaker = CircuitBreaker(name, redis=url, redis_timeout=20, **options)
    breaker.acquire().failure()
    seen = breaker.snapshot()
    return seen.state, seen.source, [entry.new for entry in breaker.history()], breaker.keys


async def use_async(url: str, name: str, **options: Any) -> tuple[Any, ...]:
    breaker = AsyncCircuitBreaker(name, redis=url, redis_timeout=20, **options)
    await (await breaker.acquire()).failure()
    seen, history = await breaker.snapshot(), await breaker.history()
    await breaker.close()
    return seen.state, seen.source, [entry.new for entry in history], breaker.keys


@pytest.mark.parametrize("shell", ["sync", "async"])
def test_odd_names(client: redis.Redis, server: EmbeddedServer, shell: str) -> None:
    """Any text without braces is a name like any other: its own two keys, and nothing else happens on the server."""
    client.script_flush()
    client.set("bystander", "safe")
    wanted = {b"bystander"}
    for name in ODD_NAMES:
        options = {"policy": Policy(failure_threshold=1, reset_timeout=3600)}
        used = use_sync(server.url, name, **options) if shell == "sync" else None
        state, source, history, keys = used or asyncio.run(use_async(server.url, name, **options))
        assert (state, source, history) == ("open", "redis", ["open"])
        wanted |= {key.encode() for key in keys[:2]}
    assert set(client.keys()) == wanted
    assert len(wanted) == 1 + 2 * len(ODD_NAMES)


def test_names_are_no_code(client: redis.Redis, server: EmbeddedServer) -> None:
    """However many names and policies there are, the server holds the same few scripts."""
    client.script_flush()
    for number, name in enumerate(ODD_NAMES):
        use_sync(server.url, name, policy=Policy(failure_threshold=number + 1))
    assert client.info("memory")["number_of_cached_scripts"] <= 4


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: repr(name)[:12])
def test_no_names(name: Any) -> None:
    """What is no name, or would tear the keys apart in a cluster, or is endless, is refused with the reason."""
    for kind in (CircuitBreaker, AsyncCircuitBreaker):
        with pytest.raises(PolicyError, match=r"must|cannot"):
            kind(name)
        with pytest.raises(PolicyError, match=r"must|cannot"):
            kind("fine", prefix=name)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Policy)])
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, -1, -0.001, 1e300, 10**400, "5", b"5", True, [], {}, 1j, object],
    ids=lambda value: repr(value)[:12],
)
def test_policies_that_make_no_sense(field: str, value: Any) -> None:
    """No field of a policy takes NaN, an infinity, a negative, an endless number or another type."""
    if isinstance(value, bool) and isinstance(getattr(Policy(), field), bool):
        return  # a flag
    with pytest.raises(PolicyError, match=field):
        Policy(**{field: value})


@pytest.mark.parametrize("field", ["failure_threshold", "success_threshold", "half_open_max_calls"])
def test_a_count_of_zero(field: str) -> None:
    """Nor do the counts take zero or a fraction."""
    for value in (0, 1.5):
        with pytest.raises(PolicyError, match=field):
            Policy(**{field: value})


EXTREMES = [
    {"failure_threshold": 10**9, "reset_timeout": 2_592_000.0, "success_threshold": 10**9},
    {"half_open_max_calls": 1000, "probe_timeout": 86_400.0, "ttl": 31_536_000.0},
    {"failure_threshold": 1, "reset_timeout": 0.001, "probe_timeout": 0.001, "ttl": 1.0},
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=["long", "many", "short"])
def test_extreme_policies_work(server: EmbeddedServer, client: redis.Redis, extreme: dict[str, Any]) -> None:
    """What a policy takes, the scripts take: no extreme is an error of the server."""
    use_sync(server.url, "extreme", policy=Policy(**extreme))
    breaker = CircuitBreaker("extreme", redis=server.url, policy=Policy(**extreme), redis_timeout=20)
    breaker.force_open(0.001)
    assert breaker.snapshot().source == "redis"
    assert client.pttl(breaker.keys.state) > 0


@pytest.mark.parametrize("option", ["lease", "redis_timeout"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1e9, "1", None, True])
def test_options_that_make_no_sense(option: str, value: Any) -> None:
    """Nor do the durations among the options."""
    with pytest.raises(PolicyError, match=option):
        CircuitBreaker("x", **{option: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1, 1e9, "1", True])
def test_durations_that_make_no_sense(value: Any) -> None:
    """Nor do the durations of a forced state."""
    with pytest.raises(PolicyError, match="duration"):
        CircuitBreaker("x").force_open(value)


HUGE = {
    "a long instance": {"instance": "x" * 10_000_000},
    "many fields": {f"field-{number}": number for number in range(100_000)},
    "a long policy": {"policy": {f"field-{number}": number for number in range(100_000)}},
    "a long list": {"generation": list(range(1_000_000))},
}


@pytest.mark.parametrize("pack", [msgpack.packb, lambda request: json.dumps(request).encode()], ids=["msgpack", "json"])
@pytest.mark.parametrize("what", HUGE)
def test_huge_requests(client: redis.Redis, what: str, pack: Any) -> None:
    """A request of megabytes is refused in one short line, and nothing is stored."""
    for script in SCRIPTS:
        with pytest.raises(redis.ResponseError, match=r"^BADREQUEST ") as refused:
            client.eval(compose(script), 3, "state", "history", "policy", pack(HUGE[what]))
        assert len(str(refused.value)) < 300
    assert client.dbsize() == 0


def test_huge_stored_values(server: EmbeddedServer, client: redis.Redis) -> None:
    """Megabytes under the keys of a breaker cause no outage: they are not decoded, and the document is replaced."""
    events: list[Event] = []
    policy = Policy(failure_threshold=2)
    breakers = [CircuitBreaker(name, redis=server.url, policy=policy, listeners=[events.append]) for name in "ab"]
    reporters = {f"host-{number}": 1_700_000_000_000 for number in range(300_000)}
    document = {"state": "closed", "failure_count": 0, "generation": 1_700_000_000_000, "reporters": reporters}
    client.set(breakers[0].keys.state, json.dumps(document))
    client.set(breakers[0].keys.policy, json.dumps({"failure_threshold": 9, "x": "x" * 6_000_000}))
    for _ in range(2):
        for breaker in breakers:
            with pytest.raises(ZeroDivisionError):
                breaker.call(divmod, 1, 0)
    assert [(event.breaker, event.kind, event.source) for event in events] == [
        ("a", "state_change", "redis"),
        ("b", "state_change", "redis"),
    ]
    assert client.strlen(breakers[0].keys.state) < 1000
    breakers[0].reset()
    assert not client.exists(breakers[0].keys.policy)


def test_odd_entries_in_the_history(server: EmbeddedServer, client: redis.Redis) -> None:
    """Whatever another program adds to it, the transitions are there, also for listeners of watchers."""
    received: list[Event] = []
    breaker = CircuitBreaker("odd", redis=client, policy=Policy(failure_threshold=1), listeners=[received.append])
    breaker.call(int)
    key = breaker.keys.history
    usual = {"from": "open", "to": "closed", "reason": "x", "failure_count": 1, "success_count": 0, "instance": "me"}
    with breaker.watch() as watch:
        wait_until(lambda: watch.active)
        CircuitBreaker("odd", redis=server.url, policy=breaker.policy).force_open()
        for odd in (
            {b"\xff": b"\xfe"},
            {**usual, "time_ms": "9" * 400, "generation": 1},
            {**usual, "time_ms": 1, "generation": "9" * 5000},
            {**usual, "time_ms": "x", "generation": 1},
            {**usual, "time_ms": 1, "generation": breaker.snapshot().generation, "failure_count": "9" * 5000},
            {"time_ms": 1},
        ):
            client.xadd(key, odd)  # type: ignore[arg-type]
        assert [entry.new for entry in breaker.history()] == ["open"]
        wait_until(lambda: received)
        CircuitBreaker("odd", redis=server.url, policy=breaker.policy).reset()
        wait_until(lambda: received[-1].new == "closed")
    assert [entry.new for entry in breaker.history()] == ["closed", "open"]


def test_names_with_line_breaks_stay_in_their_log_line(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A name that comes from outside cannot forge a log line."""
    name = "payments\n2026-01-01 root: all is well \x1b[31m"
    breaker = CircuitBreaker(name, redis=client, policy=Policy(failure_threshold=1), lease=0)
    client.set(breaker.keys.state, "corrupt")
    breaker.call(int)
    breaker.force_open()
    with caplog.at_level("INFO"):
        breaker.reset()
    assert len(caplog.records) >= 1
    assert not [record for record in caplog.records if "\n" in record.getMessage() or "\x1b" in record.getMessage()]
