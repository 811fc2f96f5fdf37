"""The commands that this package sends, as bytes. No I/O."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import hiredis

from .._protocol import Request, encode, fleet_key
from .scripts import FLEET, compose, sha1

_new = tuple.__new__


class Command(NamedTuple):
    """One command. key: decides which node of a cluster serves it. script: the name of the script that it calls."""

    key: bytes
    words: tuple[bytes, ...]
    script: str = ""

    def loading(self) -> Command:
        """The same call with the script's text: it loads and runs in one step, so no SCRIPT FLUSH comes between."""
        return Command(self.key, (b"EVAL", compose(self.script).encode(), *self.words[2:]), self.script)


PING, ASKING = (Command(b"", (word,)) for word in (b"PING", b"ASKING"))


class _Keys(NamedTuple):
    state: bytes
    history: bytes
    policy: bytes


@functools.lru_cache(maxsize=1000)
def _keys_of(state: bytes) -> _Keys:
    """The keys of the breaker with this state key. Another program may have written it, so it need not be UTF-8."""
    return _Keys(state, b"{%b}:history" % state, b"{%b}:policy" % state)


@functools.lru_cache(maxsize=4000)
def _call_of(name: str, key: bytes) -> tuple[bytes, ...]:
    return b"EVALSHA", sha1(name).encode(), b"3", *_keys_of(key)


def run(name: str, key: bytes, request: Request) -> Command:
    """A call of the script called name. key: the breaker's state key."""
    # without the class's own constructor, which is a function in Python
    return _new(Command, (key, (*_call_of(name, key), encode(request)), name))


def history(key: bytes, count: int) -> Command:
    """Read the newest transitions. key: the breaker's state key."""
    return Command(key, (b"XREVRANGE", _keys_of(key).history, b"+", b"-", b"COUNT", b"%d" % count))


def read(keys: Sequence[bytes]) -> Command:
    """Read the stored document and policy override of each breaker. In a cluster: of breakers of one slot."""
    return Command(keys[0], (b"MGET", *(one for key in keys for one in (key, _keys_of(key).policy))))


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


def packed(commands: Sequence[Command]) -> bytes:
    """The commands as bytes of the protocol."""
    pack = hiredis.pack_command
    if len(commands) == 1:
        return pack(commands[0].words)  # type: ignore[arg-type, no-any-return]
    return b"".join(pack(command.words) for command in commands)  # type: ignore[arg-type]
