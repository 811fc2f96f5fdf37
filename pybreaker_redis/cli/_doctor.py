"""Is this server fit for breakers? Each check tells what it found, what is wrong with that, and how to mend it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from redis.exceptions import (
    ClusterError,
    ConnectionError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from .._protocol import Keys, keys_of
from .._scripts import REDIS_ERRORS, SCRIPTS, compose, sha1
from ._fleet import SCAN_COUNT, Fleet

OLDEST = {"redis": (6, 2), "valkey": (7, 2)}
_SLOW, _SKEWED = 0.010, 1.0
_MOST_KEYS = 10_000  # whose TTL is looked at
_MOST_SCRIPTS = 1000
_MOST_TOLD = 5
_NOTICE = 1.0  # seconds that a notification may take
_NO_RIGHT_MENDS = (ReadOnlyError, OutOfMemoryError, MovedError, ClusterError, ConnectionError, TimeoutError)


@dataclasses.dataclass(frozen=True)
class Finding:
    """status: "ok", "warning" (works, but look at it) or "wrong". mend: what to do."""

    check: str
    status: Literal["ok", "warning", "wrong"]
    told: str
    mend: str = ""


def ok(check: str, told: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", told)


def examine(fleet: Fleet) -> Iterator[Finding]:
    """Every check on every master; a check that the server refuses is a finding too."""
    nodes = fleet.nodes()
    for node in nodes:
        where = f" {_place(node)}" if len(nodes) > 1 else ""
        for check in (_version, _role, _latency, _clock, _memory, _persistence, _connections, _script_cache, _ttls):
            for finding in _tried(check, fleet, node):
                yield dataclasses.replace(finding, check=finding.check + where)
    yield from _tried(_trial, fleet, nodes[0])


def _place(node: Any) -> str:
    options = node.connection_pool.connection_kwargs
    return f"{options.get('host')}:{options.get('port')}"


def _tried(check: Callable[[Fleet, Any], Iterator[Finding]], fleet: Fleet, node: Any) -> Iterator[Finding]:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        yield from check(fleet, node)
    except NoPermissionError as error:
        yield Finding(name, "warning", f"cannot be looked at: {error}", "let doctor run as a user that may use INFO")
    except ResponseError as error:
        yield Finding(name, "warning", f"cannot be looked at: {error}")


# Checks


def _version(fleet: Fleet, node: Any) -> Iterator[Finding]:
    info = node.info("server")
    kind = "valkey" if "valkey_version" in info else "redis"
    version = info.get("valkey_version") or info["redis_version"]
    told = f"{kind} {version}"
    oldest = OLDEST[kind]
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        yield Finding(
            "version", "wrong", told, f"upgrade: {kind} {oldest[0]}.{oldest[1]} is the oldest that is supported"
        )
    else:
        yield ok("version", told)
    if node.info("cluster")["cluster_enabled"] and not fleet.clustered:
        yield Finding("cluster", "wrong", "this is a node of a cluster", "use a redis+cluster:// URL")


def _role(fleet: Fleet, node: Any) -> Iterator[Finding]:
    role = node.info("replication")["role"]
    if role == "master":
        yield ok("role", role)
    else:
        yield Finding("role", "wrong", f"{role}: it takes no writes", "name the master, or use a redis+sentinel:// URL")


def _latency(fleet: Fleet, node: Any) -> Iterator[Finding]:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        node.time()
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    told = f"{1000 * median:.2f} ms for a round trip (median of {len(times)}), {1000 * max(times):.2f} ms at most"
    if max(times) > _SLOW:
        yield Finding(
            "latency",
            "warning",
            told,
            "a call waits for redis_timeout (0.25 s by default) at the most; if that is exceeded it goes on locally",
        )
    else:
        yield ok("latency", told)


def _clock(fleet: Fleet, node: Any) -> Iterator[Finding]:
    before = time.time()
    seconds, microseconds = node.time()
    skew = seconds + microseconds / 1e6 - (before + time.time()) / 2
    told = f"{skew:+.3f} s from the clock of this machine"
    if abs(skew) > _SKEWED:
        yield Finding(
            "clock",
            "warning",
            told,
            "run NTP on the server: breakers go by its clock alone, so that they work; but the times shown are off, and"
            " a fail-over to a better clock moves deadlines",
        )
    else:
        yield ok("clock", told)


def _memory(fleet: Fleet, node: Any) -> Iterator[Finding]:
    memory = node.info("memory")
    limit, policy = memory.get("maxmemory", 0), memory.get("maxmemory_policy", "noeviction")
    told = (
        f"{memory['used_memory'] / 2**20:.0f} MB used, "
        + (f"maxmemory {limit / 2**20:.0f} MB" if limit else "no maxmemory")
        + f", {policy}"
    )
    if limit and policy != "noeviction":
        yield Finding(
            "eviction",
            "wrong",
            f"{told}: when memory is short it drops breakers, and with them trips",
            "CONFIG SET maxmemory-policy noeviction, or a server of their own for breakers",
        )
    elif limit and memory["used_memory"] > 0.9 * limit:
        yield Finding(
            "eviction",
            "warning",
            f"{told}: nearly full, then it takes no writes and each process goes on locally",
            "raise maxmemory",
        )
    else:
        yield ok("eviction", told)


def _persistence(fleet: Fleet, node: Any) -> Iterator[Finding]:
    info = node.info("persistence")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding(
            "persistence",
            "wrong",
            "the last background save failed: with stop-writes-on-bgsave-error the server takes no writes",
            "look at the server's log and disk, or CONFIG SET save ''",
        )
    elif info.get("aof_enabled") and info.get("aof_last_write_status", "ok") != "ok":
        yield Finding(
            "persistence", "wrong", "the last write to the append-only file failed", "look at the server's log and disk"
        )
    elif info.get("aof_enabled"):
        yield ok("persistence", "append-only file: trips outlive a restart")
    else:
        yield ok("persistence", "no append-only file: a restart may forget trips, which the next failures make again")


def _connections(fleet: Fleet, node: Any) -> Iterator[Finding]:
    clients = node.info("clients")
    count, most = clients["connected_clients"], clients.get("maxclients", 10000)
    told = f"{count} of {most}"
    if count > 0.8 * most:
        yield Finding(
            "connections",
            "warning",
            f"{told}: nearly full, then new processes are refused and go on locally",
            "raise maxclients; each process keeps as many connections as it has threads that ask at once",
        )
    else:
        yield ok("connections", told)


def _script_cache(fleet: Fleet, node: Any) -> Iterator[Finding]:
    loaded = sum(map(bool, node.script_exists(*map(sha1, SCRIPTS))))
    total = node.info("memory").get("number_of_cached_scripts", 0)
    told = f"{loaded} of our {len(SCRIPTS)} scripts loaded, {total} in all"
    if total > _MOST_SCRIPTS:
        yield Finding(
            "script cache",
            "warning",
            f"{told}: some program makes scripts anew for every call",
            "find it, and SCRIPT FLUSH: ours load again by themselves",
        )
    else:
        yield ok("script cache", told + ("" if loaded == len(SCRIPTS) else "; the first call loads the others"))


def _ttls(fleet: Fleet, node: Any) -> Iterator[Finding]:
    looked, endless = 0, []
    for keys in _state_keys(fleet, node):
        pipeline = node.pipeline(transaction=False)
        for key in keys:
            pipeline.pttl(key)
        looked += len(keys)
        endless += [key for key, left in zip(keys, pipeline.execute(), strict=True) if left == -1]
        if looked >= _MOST_KEYS:
            break
    if endless:
        some = ", ".join(repr(key)[2:-1] for key in endless[:_MOST_TOLD]) + (", ..." if endless[_MOST_TOLD:] else "")
        yield Finding(
            "ttl",
            "wrong",
            f"{len(endless)} of {looked} states never end: another program wrote them: {some}",
            f"redis-cli PEXPIRE {repr(endless[0])[2:-1]} 3600000; the next write of a breaker sets it too",
        )
    else:
        yield ok("ttl", f"each of {looked} states ends by itself")


def _state_keys(fleet: Fleet, node: Any) -> Iterator[list[bytes]]:
    cursor = -1
    while cursor:
        cursor, keys = node.scan(max(cursor, 0), match=fleet.pattern(), count=SCAN_COUNT)
        yield keys


# A trial of all that a breaker does, on one of our own


def _trial(fleet: Fleet, node: Any) -> Iterator[Finding]:
    keys, refused = keys_of(f"doctor-{secrets.token_hex(6)}", fleet.prefix), True
    try:
        problem = _use(fleet, keys)
    except REDIS_ERRORS as error:
        problem = str(error)
        refused = not (isinstance(error, _NO_RIGHT_MENDS) or problem.startswith("MISCONF"))
    with contextlib.suppress(*REDIS_ERRORS):  # else they end by themselves
        for key in keys:
            fleet.client.delete(key)
    if problem:
        mend = f"ACL SETUSER {_user(node)} {acl_rule(fleet)}" if refused else "see the other findings"
        yield Finding("rights", "wrong", problem, mend)
    else:
        yield ok("rights", "scripts, history and notifications work for this user")


def acl_rule(fleet: Fleet) -> str:
    """What a user must be allowed, as ACL SETUSER takes it: first what breakers need, then this program."""
    # PSUBSCRIBE is allowed for the very pattern only
    keys = f"~{fleet.prefix}:* ~{{{fleet.prefix}:* resetchannels &{fleet.pattern()}"
    scripts = ["time", "mget", "exists", "set", "setrange", "pexpire", "del", "xadd", "publish"]
    breakers = [*scripts, "evalsha", "eval", "xrevrange", "psubscribe", "subscribe", "ping"]
    program = ["scan", "script|load", "script|exists", "pttl", "info", "acl|whoami"]
    return " ".join([keys, *(f"+{command}" for command in (*breakers, *program))])


def _user(node: Any) -> str:
    with contextlib.suppress(*REDIS_ERRORS):
        who = node.execute_command("ACL", "WHOAMI")
        return who.decode() if isinstance(who, bytes) else str(who)
    return "USER"


def _use(fleet: Fleet, keys: Keys) -> str | None:
    """The life of a breaker; what does not work, or None. Raises what redis-py raises."""
    with fleet.client.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.psubscribe(fleet.pattern())
        subscription.get_message(timeout=1.0)
        generation = _ask(fleet, keys, "acquire")["generation"]
        _ask(fleet, keys, "control", action="set_policy", override={"failure_threshold": 1}, duration_ms=60_000)
        tripped = _ask(fleet, keys, "record", generation=generation, failures=1)
        if tripped["state"] != "open":
            return f"one failure at a threshold of one led to {tripped}"
        if not fleet.client.xrevrange(keys.history, count=1):
            return "the history is empty after a trip: XADD was refused"
        if not _hears(subscription, keys.state):
            return "no notification of a trip arrived: PUBLISH was refused, or its channel"
        _ask(fleet, keys, "control", action="clear_policy")
        _ask(fleet, keys, "snapshot")
    return None


def _ask(fleet: Fleet, keys: Keys, script: str, **request: Any) -> Any:
    words = (3, *keys, json.dumps(request))
    try:
        return json.loads(fleet.client.evalsha(sha1(script), *words))
    except NoScriptError:
        return json.loads(fleet.client.eval(compose(script), *words))


def _hears(subscription: Any, channel: str) -> bool:
    until = time.monotonic() + _NOTICE
    while (left := until - time.monotonic()) > 0:
        message = subscription.get_message(timeout=left)
        if message is not None and message["channel"] == channel.encode():
            return True
    return False
