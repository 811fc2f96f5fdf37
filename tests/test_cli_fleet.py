"""The commands of the program that say which processes are there, and what is known of a policy and from whom."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import redis
from conftest import wait_until

from pybreaker_redis import CircuitBreaker, Policy
from pybreaker_redis.embedded import EmbeddedServer

pytest.importorskip("typer", reason="needs the extra cli")

from pybreaker_redis.cli import main

KEY = "circuit_breaker:fleet"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command in this process: its exit code, output and error output."""
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("COLUMNS", "200")

    def do(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(arguments), *capsys.readouterr()

    return do


def enlist(
    client: redis.Redis, process: str, policies: dict[str, dict[str, Any]], breakers: int | None = None, ago: float = 12
) -> None:
    """List a process with the policy of each of its breakers, as the script does."""
    seconds, _ = client.time()
    host, _, pid = process.partition(":")
    listed = [{"policy": fields, "breakers": 1, "names": [name]} for name, fields in policies.items()]
    head = {"seen_ms": round((seconds - ago) * 1000), "host": host, "pid": int(pid), "version": "1.0.0"}
    entry = {**head, "breakers": breakers or len(policies), "policies": listed}
    client.hset(KEY, f"{process}-00000000", json.dumps(entry))


def test_a_fleet(run: Run, client: redis.Redis) -> None:
    """A line for each process, the last seen first, and the policies on which they disagree, by process."""
    enlist(client, "web-1:4102", {"discovery": {"failure_threshold": 3}, "mail": {}})
    enlist(client, "web-2:77", {"discovery": {"failure_threshold": 3}, "mail": {}}, ago=5 * 60)
    enlist(client, "web-3:12", {"discovery": {"failure_threshold": 9, "quorum": 2}, "mail": {}}, breakers=20_000)
    code, out, _ = run("fleet")
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading.split() == ["SEEN", "VERSION", "BREAKERS", "PROCESS"]
    assert [line.split()[-1] for line in lines[:3] if "(" not in line] == ["web-1:4102", "web-2:77"]
    assert re.search(r"^1[0-9] s ago +1\.0\.0 +2  web-1:4102$", out, re.MULTILINE)
    assert re.search(r"^5 m ago +1\.0\.0 +2  web-2:77$", out, re.MULTILINE)
    assert "20000  web-3:12  (19998 of its breakers are not named, for lack of room)" in out
    assert "3 processes on 3 hosts" in lines
    assert lines[-3:] == [
        "discovery: the processes disagree on its policy",
        "  failure_threshold=3  2 processes: web-1:4102, web-2:77",
        "  failure_threshold=9, quorum=2  1 process: web-3:12",
    ]


def test_a_fleet_as_json(run: Run, client: redis.Redis) -> None:
    """The same for programs."""
    enlist(client, "web-1:4102", {"discovery": {"failure_threshold": 3}})
    enlist(client, "web-2:77", {"discovery": {}}, ago=60)
    _, out, _ = run("fleet", "--json")
    found = json.loads(out)
    first, second = found["processes"]
    assert 11 <= first.pop("seen_ago") <= 100
    policies = [{"policy": {"failure_threshold": 3}, "breakers": 1, "names": ["discovery"]}]
    assert first == {"host": "web-1", "pid": 4102, "version": "1.0.0", "breakers": 1, "policies": policies}
    assert second["pid"] == 77
    assert found["disagreements"] == {
        "discovery": [
            {"policy": {"failure_threshold": 3}, "processes": ["web-1:4102"]},
            {"policy": {}, "processes": ["web-2:77"]},
        ]
    }


def test_a_real_process(run: Run, client: redis.Redis, server: EmbeddedServer) -> None:
    """A process that calls is shown a second or two later, with the policy that it was given."""
    policy = Policy(failure_threshold=7, window=30)
    breaker = CircuitBreaker("mine", redis=redis.Redis.from_url(server.url), policy=policy, redis_timeout=20)
    wait_until(lambda: [breaker.call(int), client.exists(KEY)][1])
    _, out, _ = run("fleet")
    assert re.search(rf"1  \S+:{os.getpid()}$", out, re.MULTILINE)
    _, out, _ = run("policy", "get", "mine", "--json")
    fields = json.loads(out)["fields"]
    assert (fields["failure_threshold"]["value"], fields["failure_threshold"]["source"]) == (7, "client")
    assert [name.rpartition(":")[2] for name in fields["window"]["processes"]] == [str(os.getpid())]
    assert fields["quorum"]["source"] == "default"


def test_nobody(run: Run, client: redis.Redis) -> None:
    """An empty fleet says why a process may be missing."""
    code, out, err = run("fleet")
    assert (code, out) == (0, "")
    assert "no process is listed under the prefix circuit_breaker" in err
    assert "lease=0" in err


def test_hostile_entries(run: Run, client: redis.Redis) -> None:
    """Escape sequences in names do not reach the terminal; what makes no sense is passed over."""
    enlist(client, "\x1b[2Jweb\u202e:1", {"a\x1b[31m": {"failure_threshold": 3}})
    enlist(client, "web:2", {"a\x1b[31m": {"failure_threshold": 4, "reset_timeout": "\x1b[2J", "other": 1}})
    client.hset(KEY, "odd", b"\xff\x1b[2J")
    for command in (["fleet"], ["doctor"], ["policy", "get", "a\x1b[31m"]):
        _, out, err = run(*command)
        assert "\x1b" not in out + err
        assert "\u202e" not in out + err
        assert "disagree" in out


def test_doctor_names_policies_on_which_processes_disagree(run: Run, client: redis.Redis) -> None:
    """That is a warning with a fix, and no failure."""
    enlist(client, "web-1:1", {"discovery": {"failure_threshold": 3}})

    def finding() -> Any:
        code, out, _ = run("doctor", "--json")
        assert code == 0
        return next(one for one in json.loads(out) if one["check"] == "policies")

    assert finding()["status"] == "ok"
    enlist(client, "web-2:1", {"discovery": {}})
    found = finding()
    assert found["status"] == "warning"
    assert "discovery" in found["detail"]
    assert "pybreaker-redis fleet" in found["fix"]


def test_a_policy_that_nobody_knows(run: Run, client: redis.Redis) -> None:
    """No default is shown as a fact: what neither Redis nor a process says is unknown."""
    run("policy", "set", "d", "quorum=2", "-y", "--create")
    code, out, err = run("policy", "get", "d")
    assert code == 0
    assert re.search(r"^quorum +2 +override$", out, re.MULTILINE)
    assert re.search(r"^reset_timeout +- +unknown$", out, re.MULTILINE)
    assert "30.0" not in out
    assert "--config" in err
    fields = json.loads(run("policy", "get", "d", "--json")[1])["fields"]
    assert fields["reset_timeout"] == {"value": None, "source": "unknown"}
    assert fields["quorum"] == {"value": 2, "source": "override"}


def test_a_breaker_that_a_process_lists_is_known(run: Run, client: redis.Redis) -> None:
    """A command that acts needs no --create for a breaker that a process uses, though nothing is stored for it yet."""
    enlist(client, "web-1:4102", {"discovery": {}})
    assert run("force-open", "discovery", "-y")[0] == 0
    assert run("force-open", "discovry", "-y")[0] == 1


def test_a_policy_that_processes_know(run: Run, client: redis.Redis) -> None:
    """Each field says from whom it is known; processes that disagree are all shown."""
    enlist(client, "web-1:1", {"d": {"reset_timeout": 600, "failure_threshold": 3}})
    enlist(client, "web-2:1", {"d": {"reset_timeout": 600}})
    _, out, err = run("policy", "get", "d")
    assert re.search(r"^reset_timeout +600\.0 +client \(2 processes: web-1:1, web-2:1\)$", out, re.MULTILINE)
    disagree = r"^failure_threshold +the processes disagree: 3 \(1 process: web-1:1\); 5 \(1 process: web-2:1\)$"
    assert re.search(disagree, out, re.MULTILINE)
    assert re.search(r"^quorum +1 +default \(2 processes: web-1:1, web-2:1\)$", out, re.MULTILINE)
    assert err == ""
    fields = json.loads(run("policy", "get", "d", "--json")[1])["fields"]
    assert fields["reset_timeout"] == {"value": 600, "source": "client", "processes": ["web-1:1", "web-2:1"]}
    values = [{"value": 3, "processes": ["web-1:1"]}, {"value": 5, "processes": ["web-2:1"]}]
    assert fields["failure_threshold"] == {"value": None, "source": "client", "values": values}


def test_a_user_who_may_not_read_the_list(run: Run) -> None:
    """The policy override is shown all the same; doctor and fleet say which right is missing."""
    with EmbeddedServer(port=0) as server, redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~*", "&*", "+@all", "-hscan")
        url = ["--redis", server.url.replace("://", "://me:secret@")]
        assert run("policy", "set", "d", "quorum=2", "-y", "--create", *url)[0] == 0
        code, out, err = run("policy", "get", "d", *url)
        assert code == 0
        assert re.search(r"^quorum +2 +override$", out, re.MULTILINE)
        assert "the list of processes cannot be read" in err
        assert "hscan" in run("fleet", *url)[2]
        found = {one["check"]: one for one in json.loads(run("doctor", "--json", *url)[1])}
        assert (found["policies"]["status"], "hscan" in found["policies"]["detail"]) == ("warning", True)


def test_a_policy_of_a_file(run: Run, client: redis.Redis, tmp_path: pathlib.Path) -> None:
    """With --config the file is the client, whatever processes say."""
    file = tmp_path / "breakers.yaml"
    file.write_text("circuit_breaker: {services: {d: {reset_timeout: 7}}}")
    enlist(client, "web-1:1", {"d": {"reset_timeout": 600}})
    _, out, _ = run("policy", "get", "d", "--config", str(file))
    assert re.search(r"^reset_timeout +7(\.0)? +client$", out, re.MULTILINE)
    assert "unknown" not in out


def test_a_large_fleet(run: Run, client: redis.Redis) -> None:
    """A thousand processes are read in pages, and a policy names a few of them."""
    for number in range(1000):
        enlist(client, f"web-{number}:1", {"d": {"quorum": 2}})
    _, out, _ = run("fleet", "--json")
    assert len(json.loads(out)["processes"]) == 1000
    _, out, _ = run("policy", "get", "d")
    assert re.search(r"^quorum +2 +client \(1,000 processes: (web-\d+:1, ){5}\.\.\.\)$", out, re.MULTILINE)
