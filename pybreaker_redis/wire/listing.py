"""Lists this process in its fleet, for people: which processes are there, and which policy each breaker was given.

There is one hash for each prefix, with an entry for each process. lua/fleet.lua describes them. A process renews its
entry once a minute at most, in the pipeline of an exchange that takes place anyway. No I/O.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import random
import secrets
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from .._clock import NEVER, age
from .._line import Line
from .._policy import DEFAULTS, Policy
from . import commands as build
from .commands import Command
from .options import concerns_server, refuses_command

FIRST = 1.0, 2.0  # seconds after its first exchange for which a process is not listed: it may be short-lived
EVERY = 60.0, 70.0  # seconds between two listings
ROOM = 4096  # bytes of an entry, as in lua/fleet.lua
MOST_ENTRIES = 10  # of one process: it has one for each prefix and each host= that its breakers were given
_HEAD = 600  # bytes that are kept for its first fields: a host has 200 characters at most
_AROUND = 50  # bytes around a policy
logger = logging.getLogger("pybreaker_redis")


class Listing:
    """The entries of this process, and when to renew them."""

    def __init__(self) -> None:
        self.start_process()

    def start_process(self) -> None:
        """Start as a process that is not listed, also in a forked child."""
        self._since, self._wait = NEVER, 0.0
        self._digits = secrets.token_hex(4)
        self._refused = False
        self._idle: weakref.WeakKeyDictionary[Line, None] = weakref.WeakKeyDictionary()

    def left(self, line: Line) -> None:
        """Go on listing a breaker that is refreshed no more, as long as it exists."""
        self._idle[line] = None

    def is_due(self, now: float) -> bool:
        """Whether it is time to renew the entries. The first time comes a little after the first exchange."""
        if self._since == NEVER:
            self._put_off(now, FIRST)
        return age(self._since, now) >= self._wait

    def commands(self, used: Iterable[Line], now: float) -> list[Command]:
        """The commands that renew the entries. used: the breakers that are refreshed."""
        # by prefix and host, and then by policy: the names
        named: dict[tuple[str, str], dict[Policy, dict[str, None]]] = {}
        idle = (line for reference in self._idle.keyrefs() if (line := reference()) is not None)
        for line in dict.fromkeys([*used, *idle]):
            if line.listed:
                breaker = line.breaker
                by_policy = named.setdefault((breaker._prefix, breaker.host), {})
                by_policy.setdefault(breaker.policy, {})[breaker.name] = None
        if not named:
            self._put_off(now, EVERY)
        some = list(named.items())[:MOST_ENTRIES]
        return [build.listing(prefix, *self._entry(host, by_policy)) for (prefix, host), by_policy in some]

    def replied(self, replies: Sequence[Any], now: float) -> None:
        """Note that the commands were sent. An error is no outage: the reports of the same exchange show outages."""
        self._put_off(now, EVERY)
        for error in replies:
            refused = isinstance(error, Exception) and (refuses_command(error) or not concerns_server(error))
            if refused and not self._refused:
                self._refused = True
                logger.info("Redis refuses to list this process for `pybreaker-redis fleet`: %s", error)

    def _put_off(self, now: float, by: tuple[float, float]) -> None:
        self._since, self._wait = now, random.uniform(*by)

    def _entry(self, host: str, named: dict[Policy, dict[str, None]]) -> tuple[str, str]:
        """The name of this process, and what it says of its breakers. named: their names by their policies."""
        pid, breakers = os.getpid(), len(set().union(*named.values()))
        head = {"host": host, "pid": pid, "version": _version(), "breakers": breakers}
        return f"{host[:180]}:{pid}-{self._digits}", _json({**head, "policies": _policies(named)})


def _policies(named: dict[Policy, dict[str, None]]) -> list[dict[str, Any]]:
    """The policies and the names of their breakers, as far as there is room."""
    room = ROOM - _HEAD
    found: list[tuple[dict[str, Any], Iterable[str]]] = []
    for policy, names in sorted(named.items(), key=lambda one: -len(one[1])):
        given = {name: value for name, value in dataclasses.asdict(policy).items() if value != DEFAULTS[name]}
        room -= len(_json(given)) + _AROUND
        if room < 0:
            break
        found.append(({"policy": given, "breakers": len(names), "names": []}, names))
    for shown, names in reversed(found):  # the exceptions first: they are what people look for
        for name in names:
            room -= len(_json(name)) + 1
            if room < 0:
                break
            shown["names"].append(name)
    return [shown for shown, _ in found]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("pybreaker_redis")
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return "unknown"
