"""The commands that this package sends, as bytes. No I/O."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

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


@functools.lru_cache(maxsize=1000)
def _encoded(keys: Keys) -> tuple[bytes, bytes, bytes]:
    return keys.state.encode(), keys.history.encode(), keys.policy.encode()


def run(name: str, keys: Keys, request: Request) -> Command:
    """A call of the script called name."""
    state, history, policy = _encoded(keys)
    return Command(state, (b"EVALSHA", sha1(name).encode(), b"3", state, history, policy, encode(request)), name)


def history(keys: Keys, count: int) -> Command:
    """Read the newest transitions."""
    stream = keys.history.encode()
    return Command(stream, (b"XREVRANGE", stream, b"+", b"-", b"COUNT", b"%d" % count))


def read(keys: Sequence[Keys]) -> Command:
    """Read the stored document and policy override of each breaker. In a cluster: of breakers of one slot."""
    names = [_encoded(one) for one in keys]
    return Command(names[0][0], (b"MGET", *(name for state, _, policy in names for name in (state, policy))))


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
