"""Is this server fit for breakers? Each check reports what it found and, where something is wrong, how to fix it."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from .._board import clean, scan, subscribed
from .._processes import disagreements, read_processes
from .._protocol import keys_of
from ..wire.commands import checked
from ..wire.options import NO_RIGHT, REDIS_ERRORS, error_kind
from ..wire.scripts import SCRIPTS, sha1
from ..wire.sync import Connections
from ._fleet import Fleet, command, place_of, send

OLDEST = {"redis": (6, 2), "valkey": (7, 2)}
_SLOW, _SKEWED = 0.010, 1.0
_MOST_KEYS = 10_000  # whose TTL is read
_MOST_SCRIPTS = 1000
_MOST_NAMED = 5
_NOTICE = 1.0  # seconds that a notification may take


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    status: "ok", "warning" (works, but needs attention) or "wrong". detail: what was found. fix: what to do about it.
    """

    check: str
    status: Literal["ok", "warning", "wrong"]
    detail: str
    fix: str = ""


def ok(check: str, detail: str) -> Finding:
    """A check that found nothing to fix."""
    return Finding(check, "ok", detail)


def examine(fleet: Fleet) -> Iterator[Finding]:
    """Run every check on every master, then a trial of a breaker. A check that the server refuses is a finding too."""
    nodes = fleet.masters()
    for node in nodes:
        try:
            send(node, command("TIME"))  # a server that is down ends the program; PING fails where Redis cannot save
        except NO_RIGHT as error:  # perhaps as it connects
            yield Finding("rights", "wrong", f"could not connect: {error}", _grant(fleet, node))
            return
    for node in nodes:
        where = f" {_place(node)}" if len(nodes) > 1 else ""
        for check in (_version, _role, _latency, _clock, _memory, _persistence, _connections, _script_cache, _ttls):
            for finding in _run(check, fleet, node):
                yield dataclasses.replace(finding, check=finding.check + where)
    for check in (_policies, _trial):
        yield from _run(check, fleet, nodes[0])


def _place(node: Connections) -> str:
    place = place_of(node)
    return f"{place.host}:{place.port}"


def _run(
    check: Callable[[Fleet, Connections], Iterator[Finding]], fleet: Fleet, node: Connections
) -> Iterator[Finding]:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        yield from check(fleet, node)
    except REDIS_ERRORS as error:
        if not _refused(error):
            raise
        fix = "run doctor as a user that may use INFO and SCAN" if error_kind(error) == "permission" else ""
        yield Finding(name, "warning", f"could not check: {error}", fix)


def _refused(error: Exception) -> bool:
    """Whether the server works, but does not let this user do this."""
    return error_kind(error) in ("permission", "response") and not str(error).startswith("MISCONF")


def _info(node: Connections, section: str) -> dict[str, str]:
    (text,) = send(node, command("INFO", section))
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


# Checks


def _version(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    info = _info(node, "server")
    kind = "valkey" if "valkey_version" in info else "redis"
    version = info.get("valkey_version") or info["redis_version"]
    found, oldest = f"{kind} {version}", OLDEST[kind]
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        fix = f"upgrade: {kind} {oldest[0]}.{oldest[1]} is the oldest supported version"
        yield Finding("version", "wrong", found, fix)
    else:
        yield ok("version", found)
    if int(_info(node, "cluster")["cluster_enabled"]) and not fleet.clustered:
        yield Finding("cluster", "wrong", "this is a node of a cluster", "use a redis+cluster:// URL")


def _role(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    role = _info(node, "replication")["role"]
    if role == "master":
        yield ok("role", role)
    else:
        yield Finding("role", "wrong", f"{role}: it accepts no writes", "use the master's URL, or redis+sentinel://")


def _latency(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        send(node, command("TIME"))
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    detail = f"round trip {1000 * median:.2f} ms (median of {len(times)}), at most {1000 * max(times):.2f} ms"
    if max(times) > _SLOW:
        fix = "move the server closer; after redis_timeout (default 0.25 s) a call goes on without Redis"
        yield Finding("latency", "warning", detail, fix)
    else:
        yield ok("latency", detail)


def _clock(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    before = time.time()
    ((seconds, microseconds),) = send(node, command("TIME"))
    skew = int(seconds) + int(microseconds) / 1e6 - (before + time.time()) / 2
    detail = f"{skew:+.3f} s from the clock of this machine"
    if abs(skew) > _SKEWED:
        fix = (
            "run NTP on the server. Breakers use only its clock, so they work; but the times shown are wrong, and a"
            " fail-over to a server with another clock moves deadlines"
        )
        yield Finding("clock", "warning", detail, fix)
    else:
        yield ok("clock", detail)


def _memory(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    memory = _info(node, "memory")
    used, limit = int(memory["used_memory"]), int(memory.get("maxmemory", 0))
    policy = memory.get("maxmemory_policy", "noeviction")
    most = f"maxmemory {limit / 2**20:.0f} MB" if limit else "no maxmemory"
    detail = f"{used / 2**20:.0f} MB used, {most}, {policy}"
    if limit and policy != "noeviction":
        yield Finding(
            "eviction",
            "wrong",
            f"{detail}: when memory runs out, Redis evicts breakers, and their trips are forgotten",
            "CONFIG SET maxmemory-policy noeviction, or give the breakers a server of their own",
        )
    elif limit and used > 0.9 * limit:
        yield Finding(
            "eviction",
            "warning",
            f"{detail}: nearly full; a full server accepts no writes, and each process then decides on its own",
            "raise maxmemory",
        )
    else:
        yield ok("eviction", detail)


def _persistence(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    info = _info(node, "persistence")
    append_only = info.get("aof_enabled") == "1"
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding(
            "persistence",
            "wrong",
            "the last background save failed; under stop-writes-on-bgsave-error the server accepts no writes",
            "check the server's log and disk, or CONFIG SET save ''",
        )
    elif append_only and info.get("aof_last_write_status", "ok") != "ok":
        detail = "the last write to the append-only file failed"
        yield Finding("persistence", "wrong", detail, "check the server's log and disk")
    elif append_only:
        yield ok("persistence", "append-only file: trips survive a restart")
    else:
        yield ok("persistence", "no append-only file: a restart may forget trips; the next failures trip again")


def _connections(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    clients = _info(node, "clients")
    count, most = int(clients["connected_clients"]), int(clients.get("maxclients", 10000))
    detail = f"{count} of {most}"
    if count > 0.8 * most:
        yield Finding(
            "connections",
            "warning",
            f"{detail}: nearly full; new processes will be refused and decide on their own",
            "raise maxclients; a process keeps one connection for each thread that talks to Redis at the same time",
        )
    else:
        yield ok("connections", detail)


def _script_cache(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    (found,) = send(node, command("SCRIPT", "EXISTS", *map(sha1, SCRIPTS)))
    loaded, total = sum(map(bool, found)), int(_info(node, "memory").get("number_of_cached_scripts", 0))
    detail = f"{loaded} of our {len(SCRIPTS)} scripts loaded, {total} scripts in total"
    if total > _MOST_SCRIPTS:
        yield Finding(
            "script cache",
            "warning",
            f"{detail}: some program generates a new script for every call",
            "find that program, then SCRIPT FLUSH; our scripts load again by themselves",
        )
    else:
        yield ok("script cache", detail + ("" if loaded == len(SCRIPTS) else "; the first call loads the rest"))


def _ttls(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    count, endless = 0, []
    for keys in scan(node, fleet.pattern()):
        left = checked(fleet.server.exchange([command("PTTL", key, key=key) for key in keys]))
        endless += [key for key, milliseconds in zip(keys, left, strict=True) if milliseconds == -1]
        count += len(keys)
        if count >= _MOST_KEYS:
            break
    if endless:
        names = [repr(key)[2:-1] for key in endless[:_MOST_NAMED]]
        some = ", ".join(names) + (", ..." if endless[_MOST_NAMED:] else "")
        yield Finding(
            "ttl",
            "wrong",
            f"{len(endless)} of {count} state keys have no TTL, so another program wrote them: {some}",
            f"redis-cli PEXPIRE {names[0]} 3600000; a breaker's next write sets the TTL too",
        )
    else:
        yield ok("ttl", f"every state key has a TTL ({count} read)")


def _policies(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    try:
        processes = read_processes(fleet.server, fleet.prefix)
    except REDIS_ERRORS as error:
        fix = f"ACL SETUSER {_user(node)} +hscan" if error_kind(error) == "permission" else "see the other findings"
        yield Finding("policies", "warning", f"the list of processes cannot be read: {error}", fix)
        return
    disputed = [clean(breaker) for breaker, _ in disagreements(processes)]
    if disputed:
        named = ", ".join(disputed[:_MOST_NAMED]) + (", ..." if len(disputed) > _MOST_NAMED else "")
        yield Finding(
            "policies",
            "warning",
            f"the processes of this fleet disagree on the policy of {named}",
            "pybreaker-redis fleet shows who has which; each report is judged by the policy of its own process",
        )
    else:
        yield ok("policies", f"processes listed: {len(processes)}; they agree on every policy that they name")


# A trial of everything that a breaker does, on a breaker of doctor's own


def _trial(fleet: Fleet, node: Connections) -> Iterator[Finding]:
    keys, refused = keys_of(f"doctor-{secrets.token_hex(6)}", fleet.prefix), True
    try:
        problem = _use(fleet, keys.state.encode())
    except REDIS_ERRORS as error:
        problem, refused = str(error), _refused(error)
    # without this right the keys expire by themselves
    fleet.server.exchange([command("DEL", key, key=key) for key in keys])
    if problem:
        fix = _grant(fleet, node) if refused else "see the other findings"
        yield Finding("rights", "wrong", problem, fix)
    else:
        yield ok("rights", "this user can run the scripts, read the history and receive notifications")


def _grant(fleet: Fleet, node: Connections) -> str:
    """The command that gives this user the rights it needs, those that its own connections need included."""
    options = node.connection()  # not open
    named = ["+client|setname"] if options.client_name else []
    return " ".join(["ACL SETUSER", _user(node), acl_rule(fleet), *named, *(["+select"] if options.db else [])])


def acl_rule(fleet: Fleet) -> str:
    """The rights of a user, as ACL SETUSER takes them: those that breakers need, then those of this program."""
    # the channel is the pattern of PSUBSCRIBE, letter by letter: Redis compares patterns as text
    keys = f"~{fleet.prefix}:* ~{{{fleet.prefix}:* resetchannels &{fleet.pattern()}"
    scripts = ["time", "mget", "exists", "set", "setrange", "pexpire", "del", "xadd", "publish"]
    breakers = [*scripts, "evalsha", "eval", "xrevrange", "psubscribe", "subscribe", "ping"]
    cluster = ["asking", "cluster|slots"] if fleet.clustered else []
    listing = ["hset", "hrandfield", "hdel", "hlen", "hscan"]
    program = ["scan", "script|load", "script|exists", "pttl", "info", "acl|whoami"]
    return " ".join([keys, *(f"+{word}" for word in (*breakers, *cluster, *listing, *program))])


def _user(node: Connections) -> str:
    with contextlib.suppress(*REDIS_ERRORS):
        (name,) = send(node, command("ACL", "WHOAMI"))
        return str(name.decode())
    return "USER"


def _use(fleet: Fleet, key: bytes) -> str | None:
    """Take a breaker through its life. Returns the problem, or None; raises one of REDIS_ERRORS."""

    def ask(script: str, **request: Any) -> Any:
        return fleet.server.run(script, key, request)

    with subscribed(fleet.server, "PSUBSCRIBE", fleet.pattern()) as receive:
        generation = ask("acquire")["generation"]
        ask("control", action="set_policy", override={"failure_threshold": 1}, duration_ms=60_000)
        tripped = ask("record", generation=generation, failures=1)
        if tripped["state"] != "open":
            return f"one failure with failure_threshold=1 did not open the circuit: {tripped}"
        if not fleet.server.history(key, 1):
            return "the history is empty after a trip: the user may not XADD"
        if not _receives(receive, key):
            return "no notification of a trip arrived: the user may not PUBLISH, or not to this channel"
        ask("control", action="clear_policy")
        ask("snapshot")
    return None


def _receives(receive: Callable[[float], tuple[bytes, bytes] | None], channel: bytes) -> bool:
    until = time.monotonic() + _NOTICE
    while (left := until - time.monotonic()) > 0:
        message = receive(left)
        if message is not None and message[0] == channel:
            return True
    return False
