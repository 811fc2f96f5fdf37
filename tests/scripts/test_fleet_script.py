"""fleet.lua on a real server: who is listed, for how long, and what is refused."""

from __future__ import annotations

import json

import pytest
import redis

from pybreaker_redis.wire.scripts import FLEET, compose

KEY = "circuit_breaker:fleet"
ENTRY = '{"host":"web","pid":1}'


def enlist(client: redis.Redis, process: str, entry: str = ENTRY) -> int:
    """The reply of the script."""
    count: int = client.eval(compose(FLEET), 1, KEY, process, entry)
    return count


def now_ms(client: redis.Redis) -> int:
    """The server's clock."""
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def test_an_entry_is_replaced_and_expires(client: redis.Redis) -> None:
    """It says when the process was seen, on the server's clock; the hash expires ten minutes after the last entry."""
    before = now_ms(client)
    assert enlist(client, "web:1-a") == 1
    client.pexpire(KEY, 1000)
    assert enlist(client, "web:1-a", '{"host":"web","pid":2}') == 1
    entry = json.loads(client.hget(KEY, "web:1-a"))
    assert before <= entry.pop("seen_ms") <= now_ms(client)
    assert entry == {"host": "web", "pid": 2}
    assert 590_000 < client.pttl(KEY) <= 600_000
    assert enlist(client, "web:2-b") == 2


def test_processes_that_are_gone_are_dropped(client: redis.Redis) -> None:
    """Entries that are older than ten minutes, lie as far in the future, or have no time go; the others stay."""
    now = now_ms(client)
    ages = {"gone": 601_000, "future": -601_000, "kept": 590_000, "skewed": -590_000}
    client.hset(KEY, mapping={name: f'{{"seen_ms":{now - age},"host":"x"}}' for name, age in ages.items()})
    client.hset(KEY, "odd", "of another program")
    assert enlist(client, "web:1-a") == 3
    assert set(client.hkeys(KEY)) == {b"kept", b"skewed", b"web:1-a"}


def test_a_crash_loop_leaves_a_bounded_list(client: redis.Redis) -> None:
    """However many processes have gone, those that list themselves find them, ten at a time."""
    gone = now_ms(client) - 700_000
    client.hset(KEY, mapping={f"gone-{number}": f'{{"seen_ms":{gone}}}' for number in range(300)})
    for number in range(3000):
        if enlist(client, f"web:{number % 5}-a") == 5:
            break
    assert client.hlen(KEY) == 5


@pytest.mark.long
def test_the_longest_list(client: redis.Redis) -> None:
    """There are never more than 10,000 entries: another one gives way at random."""
    now = now_ms(client)
    client.hset(KEY, mapping={f"web:{number}-a": f'{{"seen_ms":{now}}}' for number in range(9_999)})
    assert [enlist(client, f"new:{number}-a") for number in range(20)] == [10_000] * 20
    assert client.hlen(KEY) == 10_000


@pytest.mark.parametrize(
    ("process", "entry"),
    [("", ENTRY), ("x" * 513, ENTRY), ("a", ""), ("a", "[]"), ("a", "{}"), ("a", '{"' + "x" * 4096), ("a", "text")],
)
def test_bad_requests_change_nothing(client: redis.Redis, process: str, entry: str) -> None:
    """What is no process or no entry is refused, with the reason."""
    with pytest.raises(redis.ResponseError, match=r"BADREQUEST (process|entry): must"):
        enlist(client, process, entry)
    assert not client.exists(KEY)


def test_its_work_does_not_grow(client: redis.Redis) -> None:
    """Among 5,000 processes that have gone, one entry looks at ten of them."""
    gone = now_ms(client) - 700_000
    client.hset(KEY, mapping={f"gone:{number}-b": f'{{"seen_ms":{gone}}}' for number in range(5_000)})
    enlist(client, "web:1-a")
    client.config_resetstat()
    enlist(client, "web:1-a")
    called = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
    assert called.pop("cmdstat_hdel") <= 10
    scripts = {"cmdstat_eval", "cmdstat_time", "cmdstat_hset", "cmdstat_hrandfield", "cmdstat_hlen", "cmdstat_pexpire"}
    assert {name for name, calls in called.items() if calls == 1} >= scripts
    ours = {"cmdstat_info", "cmdstat_config", "cmdstat_config|resetstat"}  # the last since Redis 7
    assert set(called) <= scripts | ours
