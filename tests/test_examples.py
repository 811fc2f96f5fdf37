"""Every example runs, and prints what its docstring promises, on a real server."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import redis

from pybreaker_redis import CircuitBreaker
from pybreaker_redis.embedded import EmbeddedServer

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


def run(name: str, url: str) -> str:
    """The output of an example."""
    environment = {**os.environ, "REDIS_URL": url}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    """Each example has a test here and a line in the list; the demo has its own tests."""
    ours, listed = pathlib.Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.mjs")):
        assert path.name in ours
        assert path.name in listed
    assert "demo" in listed


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


class Backend(BaseHTTPRequestHandler):
    """A search service that answers with a status of the test's choice."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"hits": 1}')

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def backend() -> Iterator[str]:
    """The URL of a running one."""
    Backend.status = 200
    with HTTPServer(("127.0.0.1", 0), Backend) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}"
        service.shutdown()


def test_fastapi_app(
    backend: str, server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastapi_app.py: 200; 502 for a failed call; 503 with Retry-After, without a call, while the circuit is open."""
    testing = pytest.importorskip("fastapi.testclient", reason="needs fastapi and httpx")
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("SEARCH_URL", backend)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import fastapi_app

    with testing.TestClient(fastapi_app.app, raise_server_exceptions=False) as web:
        assert web.get("/search?q=x").json() == {"hits": 1}
        Backend.status = 404
        assert [web.get("/search?q=x").status_code for _ in range(8)] == [200] * 8
        Backend.status = 500
        assert [web.get("/search?q=x").status_code for _ in range(7)] == [502] * 5 + [503] * 2
        answer = web.get("/search?q=x")
        assert 8 <= int(answer.headers["Retry-After"]) <= 10
        assert answer.json() == {"error": "search is not available"}
        assert web.get("/health").json() == {"search": "open"}
    assert client.exists("circuit_breaker:search:state")
