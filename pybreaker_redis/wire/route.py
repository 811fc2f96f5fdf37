"""Sends commands to one server or to the nodes of a cluster, and follows redirections. No I/O."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

import redis
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterError, MovedError, NoScriptError, ReadOnlyError

from .._protocol import NotSent
from .commands import ASKING, Command
from .options import REDIS_ERRORS, Address, known_nodes, remap_of

MOST_REDIRECTIONS = 5
# errors of a node that does not serve the slot now: another node may know which one does
_NOT_SERVING = (OSError, redis.ConnectionError, redis.TimeoutError, redis.InvalidResponse, ClusterError, ReadOnlyError)
_SLOTS = Command(b"", (b"CLUSTER", b"SLOTS"))


class Leg(NamedTuple):
    """Commands for one node, to be sent in one pipeline. address: None for the only server."""

    address: Address | None
    commands: Sequence[Command]


# Yields legs. Is sent their replies (a failed command's is its error), or is thrown the error of a lost connection.
# Returns the replies to all commands; those of a lost connection are its error, since it may have executed them.
Exchange: TypeAlias = Generator[Leg, list[Any], list[Any]]


def to_one_server(commands: Sequence[Command], address: Address | None = None, asking: bool = False) -> Exchange:
    """The exchange with one node. A script that it does not know is loaded by its first call.

    asking: the slot is migrating to this node, so each command needs an ASKING before it.
    """
    every = 2 if asking else 1
    try:
        replies = (yield Leg(address, _after_asking(commands) if asking else commands))[every - 1 :: every]
        missing = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            first = {commands[place].script: place for place in reversed(missing)}
            again = [commands[place].loading() if place in first.values() else commands[place] for place in missing]
            loaded = yield Leg(address, _after_asking(again) if asking else again)
            for place, reply in zip(missing, loaded[every - 1 :: every], strict=True):
                replies[place] = reply
    except REDIS_ERRORS as error:
        return [error] * len(commands)
    return replies


def _after_asking(commands: Sequence[Command]) -> list[Command]:
    return [one for command in commands for one in (ASKING, command)]


class Routes:
    """The nodes of a cluster, learned from its replies; any node tells which one serves a slot.

    It replaces redis-py's cluster client, which repeats a report if a reply is lost, and waits for dead nodes in turn.
    """

    def __init__(self, client: Any) -> None:
        self._known, self._remapped = known_nodes(client), remap_of(client)
        self._turn = itertools.count()
        self._serving: dict[int, Address] = {}  # by slot: the node that served it last
        self._homes: dict[int, Address] = {}  # by slot: the node that served it, or failed to, last
        self._ranges: list[tuple[int, int, Address]] = []  # first and last slot of each master
        self._learned: list[Address] = []  # all nodes of the last CLUSTER SLOTS, with replicas and lost nodes

    def exchange(self, commands: Sequence[Command]) -> Exchange:
        """An exchange through the cluster. Sends again only redirected commands, which no node has executed."""
        replies: list[Any] = [None] * len(commands)
        waiting = [(self.address(command.key), False, place) for place, command in enumerate(commands)]
        news: Address | None = None
        for _ in range(MOST_REDIRECTIONS):
            legs: dict[tuple[Address, bool], list[int]] = {}
            for address, asking, place in waiting:
                legs.setdefault((address, asking), []).append(place)
            waiting = []
            for (address, asking), places in legs.items():
                found = yield from to_one_server([commands[place] for place in places], address, asking)
                for place, reply in zip(places, found, strict=True):
                    replies[place] = reply
                    self._homes[key_slot(commands[place].key)] = address
                    if isinstance(reply, AskError):  # or its subclass, MovedError
                        moved = isinstance(reply, MovedError)
                        waiting.append((self._remap(address, reply.host, reply.port), not moved, place))
                    elif isinstance(reply, _NOT_SERVING):
                        self._lost(address)
                    elif not asking and self._served(commands[place].key, address):
                        news = address
        for address, _, place in waiting:
            replies[place] = redis.RedisError(f"redirected {MOST_REDIRECTIONS} times, at last to {address}")
        if news is not None:
            yield from self._learn(news)
        return replies

    def learn_masters(self) -> Exchange:
        """Ask nodes for all slots until one answers; masters() then has them."""
        for address in self._nodes():
            yield from self._learn(address)
            if self._ranges:
                break
        return []

    def masters(self) -> list[Address]:
        """The nodes that are known to serve slots."""
        return list(dict.fromkeys(address for _, _, address in self._ranges))

    def address(self, key: bytes) -> Address:
        """The node that is known to serve the key; if none is, each node in turn."""
        slot = key_slot(key)
        return self._serving.get(slot) or self._of_range(slot) or self.any_node()

    def any_node(self) -> Address:
        """Each known node in turn, including lost ones."""
        nodes = self._nodes()
        return nodes[next(self._turn) % len(nodes)]

    def home(self, key: bytes) -> Address | None:
        """The node that served the key, or failed to, last."""
        return self._homes.get(key_slot(key))

    def _of_range(self, slot: int) -> Address | None:
        return next((address for first, last, address in self._ranges if first <= slot <= last), None)

    def _nodes(self) -> list[Address]:
        return list(dict.fromkeys([*self.masters(), *self._learned, *self._known()]))

    def _served(self, key: bytes, address: Address) -> bool:
        """Note that a node served a key. Returns whether that is new: a reason to ask the node for all slots."""
        slot = key_slot(key)
        known = self._serving.get(slot) or self._of_range(slot)
        self._serving[slot] = address
        return known != address

    def _lost(self, address: Address) -> None:
        """Forget a node that does not answer, or refuses: another node may know which one serves its slots."""
        self._serving = {slot: node for slot, node in list(self._serving.items()) if node != address}
        self._ranges = [one for one in self._ranges if one[2] != address]

    def _learn(self, asked: Address) -> Exchange:
        try:
            (slots,) = yield Leg(asked, (_SLOTS,))
        except REDIS_ERRORS:
            self._lost(asked)
            return []
        except NotSent as error:  # only this question was not sent; the caller's commands were
            raise asyncio.CancelledError from error
        if isinstance(slots, list):  # an ACL may refuse the command
            listed = [
                (int(first), int(last), [self._remap(asked, (host or b"").decode(), port) for host, port, *_ in nodes])
                for first, last, *nodes in slots
            ]
            self._ranges = [(first, last, nodes[0]) for first, last, nodes in listed]
            self._learned = [node for _, _, nodes in listed for node in nodes]
        return []

    def _remap(self, asked: Address, host: str, port: int) -> Address:
        return self._remapped((host or asked[0], int(port)))  # without a host: the one that was asked
