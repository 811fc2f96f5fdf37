"""The commands that this package sends, as bytes. No I/O."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import hiredis

from .._protocol import Keys, Request, encode, fleet_key
from .scripts import FLEET, compose, sha1

PING = b"*1\r\n$4\r\nPING\r\n"
_ASKING = b"*1\r\n$6\r\nASKING\r\n"


class Command(NamedTuple):
    """One command. key: decides which node of a cluster serves it. script: the name of the script that it calls."""

    key: bytes
    words: tuple[bytes, ...]
    script: str = ""

    def loading(self) -> Command:
        """The same call with the script's text: it loads and runs in one step, so no SCRIPT FLUSH comes between."""
        return Command(self.key, (b"EVAL", compose(self.script).encode(), *self.words[2:]), self.script)


class RawKeys(NamedTuple):
    """Keys as bytes."""

    state: bytes
    history: bytes
    policy: bytes


def keys_at(state: bytes) -> RawKeys:
    """The keys of the breaker with this state key. Another program may have written it, so it need not be UTF-8."""
    return RawKeys(state, b"{%b}:history" % state, b"{%b}:policy" % state)


@functools.lru_cache(maxsize=1000)
def _encoded(keys: Keys) -> RawKeys:
    return keys_at(keys.state.encode())


def run(name: str, keys: Keys, request: Request) -> Command:
    """A call of the script called name."""
    return run_at(name, _encoded(keys), encode(request))


def run_at(name: str, keys: RawKeys, request: bytes) -> Command:
    """A call of the script called name. request: encoded."""
    return Command(keys.state, (b"EVALSHA", sha1(name).encode(), b"3", *keys, request), name)


def history(keys: Keys, count: int) -> Command:
    """Read the newest transitions."""
    return history_at(_encoded(keys), count)


def history_at(keys: RawKeys, count: int) -> Command:
    """Read the newest transitions."""
    return Command(keys.state, (b"XREVRANGE", keys.history, b"+", b"-", b"COUNT", b"%d" % count))


def read(keys: Sequence[Keys]) -> Command:
    """Read the stored document and policy override of each breaker. In a cluster: of breakers of one slot."""
    return read_at([_encoded(one) for one in keys])


def read_at(keys: Sequence[RawKeys]) -> Command:
    """Read the stored document and policy override of each breaker. In a cluster: of breakers of one slot."""
    return Command(keys[0].state, (b"MGET", *(key for one in keys for key in (one.state, one.policy))))


def checked(replies: list[Any]) -> list[Any]:
    """The replies. Raises the first error among them."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def listing(prefix: str, process: str, entry: str) -> Command:
    """List a process in the fleet of a prefix."""
    key = fleet_key(prefix).encode()
    return Command(key, (b"EVALSHA", sha1(FLEET).encode(), b"1", key, process.encode(), entry.encode()), FLEET)


def packed(commands: Sequence[Command], asking: bool) -> bytes:
    """The commands as bytes of the protocol."""
    pack = hiredis.pack_command
    if len(commands) == 1 and not asking:
        return pack(commands[0].words)  # type: ignore[arg-type, no-any-return]
    return b"".join((_ASKING if asking else b"") + pack(command.words) for command in commands)  # type: ignore[arg-type]
