"""Every example runs, and prints what its docstring promises, on a real server."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest
import redis

from pybreaker_redis import CircuitBreaker
from pybreaker_redis.embedded import EmbeddedServer

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"


def run(name: str, url: str) -> str:
    """The output of an example."""
    environment = {**os.environ, "REDIS_URL": url}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    """Each example has a test and a line in the list."""
    tests = [HERE / "test_examples.py", HERE / "test_demo.py", HERE / "integrations" / "test_examples.py"]
    tested = "".join(path.read_text() for path in tests)
    listed = (EXAMPLES / "README.md").read_text()
    folders = {path.parent for path in EXAMPLES.glob("*/__main__.py")}
    for path in {*EXAMPLES.glob("[!_]*.py"), *EXAMPLES.glob("*.mjs"), *folders}:
        assert path.name in tested
        assert f"]({path.name})" in listed


def test_a_missing_package_is_named() -> None:
    """An application that cannot start says what it needs, instead of waiting for it in vain."""
    code = "from _running import program\nwith program('no_such_package', 'module:app'): print('started')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "this example needs no_such_package: README.md says what to install\n"


def test_in_memory() -> None:
    """in_memory.py: three failures, three rejections, a recovery."""
    output = run("in_memory.py", "redis://127.0.0.1:1")
    assert re.sub(r"0\.\d s", "a while", output).splitlines() == [
        "failed: the mail server is down",
        "failed: the mail server is down",
        "closed -> open: failure_threshold",
        "failed: the mail server is down",
        *["not tried, next in a while"] * 3,
        "open -> half_open: timeout",
        "half_open -> closed: probe_succeeded",
        "sent 'mail 6'",
    ]


def test_two_services(server: EmbeddedServer, client: redis.Redis) -> None:
    """two_services.py: one service meets the failure, the other is rejected at once."""
    output = run("two_services.py", server.url).splitlines()
    assert [line for line in output if line.startswith("orders")] == [
        *["orders: payments does not answer"] * 3,
        *["orders: rejected"] * 2,
    ]
    assert any(re.fullmatch(r"invoices: rejected at once, retry in (29|30) s", line) for line in output)
    assert output[-1] == "payments is open"


def test_asyncio_workers(server: EmbeddedServer, client: redis.Redis) -> None:
    """asyncio_workers.py: every job gets done; 20 calls failed, and many more were rejected."""
    output = run("asyncio_workers.py", server.url)
    found = re.search(r"^40 jobs done, 20 calls failed, (\d+) rejected\nthe breaker is closed$", output, re.MULTILINE)
    assert found
    assert int(found[1]) > 20


def test_rolling_deployment(server: EmbeddedServer, client: redis.Redis) -> None:
    """rolling_deployment.py: a trip by one version also rejects in the other, and in instances that start later."""
    output = dict(line.split(": ") for line in run("rolling_deployment.py", server.url).splitlines())
    assert output["two of v1"] == output["one of each"] == "answered answered"
    dying = output["the database dies"].split()
    assert dying in (["failed"] * count + ["rejected"] * (6 - count) for count in (3, 4, 5))
    assert output["two of v2, the second just started"] == "rejected rejected"
    assert output["after the repair"] == "answered"


def test_node_client(server: EmbeddedServer, client: redis.Redis, bundles: pathlib.Path) -> None:
    """node_client.mjs: three failures, a rejection, a probe; a breaker of this package sees the same transitions."""
    node = shutil.which("node") or pytest.skip("needs Node.js")
    environment = {**os.environ, "REDIS_URL": server.url, "SCRIPTS": str(bundles)}
    command = [node, str(EXAMPLES / "node_client.mjs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.splitlines() == [
        *["failed: the mail server is down"] * 3,
        "rejected: the circuit of mail is open",
        "sent mail 5",
        "sent mail 6",
        "the circuit is closed, its health 80",
    ]
    recovered, probed, tripped = CircuitBreaker("mail", redis=client).history()
    assert [entry.reason for entry in (tripped, probed, recovered)] == [
        "failure_threshold",
        "timeout",
        "probe_succeeded",
    ]
    assert tripped.error == "Error: the mail server is down"
    assert tripped.instance.startswith(f"{socket.gethostname()}:")
