"""What a server was asked: counts of commands, and the requests themselves as MONITOR shows them."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from typing import Any

import redis

from pybreaker_redis._protocol import decode
from pybreaker_redis.wire.scripts import SCRIPTS, compose, sha1

_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}


def commands(client: redis.Redis) -> Counter[str]:
    """How often each command ran so far, inside scripts too."""
    stats = client.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()})


def load_scripts(client: redis.Redis) -> None:
    """Make every script known, so that no call has to be repeated for NOSCRIPT."""
    for name in SCRIPTS:
        client.script_load(compose(name))


def document(client: redis.Redis, name: str) -> dict[str, Any]:
    """The state document of the breaker called name."""
    return json.loads(client.get(f"circuit_breaker:{name}:state"))


def _unescape(text: bytes) -> bytes:
    def one(match: re.Match[bytes]) -> bytes:
        code = match.group(1)
        return bytes.fromhex(code[1:].decode()) if code[:1] == b"x" else _ESCAPES.get(code, code)

    return re.sub(rb"\\(x[0-9a-fA-F]{2}|.)", one, text, flags=re.DOTALL)


class Requests:
    """The requests that reach the server during a `with` block, as (script, breaker's state key, request)."""

    def __init__(self, client: redis.Redis, path: str) -> None:
        self._client, self._path = client, path
        self.seen: list[tuple[str, str, dict[str, Any]]] = []

    def __enter__(self) -> Requests:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(self._path)
        self._file = self._socket.makefile("rb")
        self._socket.sendall(b"MONITOR\r\n")
        assert self._file.readline() == b"+OK\r\n"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.echo("end of the watch")
        self._thread.join(60)
        self._file.close()
        self._socket.close()
        assert not self._thread.is_alive()

    def _read(self) -> None:
        names = {sha1(name).encode(): name for name in SCRIPTS}
        for line in self._file:
            words = [_unescape(word) for word in re.findall(rb'"((?:[^"\\]|\\.)*)"', line)]
            if words[:2] == [b"ECHO", b"end of the watch"]:
                return
            if words[0].upper() == b"EVALSHA" and words[1] in names:
                self.seen.append((names[words[1]], words[3].decode(), decode(words[6])))

    def total(self, field: str) -> int:
        """The sum of a field over all requests."""
        return sum(request.get(field, 0) for _, _, request in self.seen)
