"""Which node of a cluster serves a key, and what to do when it does not. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError

from .commands import Command
from .options import Address

MOST_REDIRECTIONS = 5
SLOTS = Command(b"", (b"CLUSTER", b"SLOTS"))


class Routes:
    """The nodes of a cluster, learned from its replies; any node tells which one serves a slot.

    redis-py's own cluster client repeats a report whose reply was lost, and waits for one dead node after another.
    """

    def __init__(self, client: Any) -> None:
        self._manager = client.nodes_manager
        self._turn = itertools.count()
        self._serving: dict[int, Address] = {}  # slots by the node that is known to serve them
        self._ranges: list[tuple[int, int, Address]] = []

    def address(self, key: bytes) -> Address:
        """The node that is known to serve the key; without one, any node in turn."""
        slot = key_slot(key)
        if slot in self._serving:
            return self._serving[slot]
        for first, last, address in self._ranges:
            if first <= slot <= last:
                return address
        nodes = self.nodes()
        return nodes[next(self._turn) % len(nodes)]

    def nodes(self) -> list[Address]:
        """All nodes, those that were learned first."""
        known = [*list(self._manager.nodes_cache.values()), *list(self._manager.startup_nodes.values())]
        learned = (address for _, _, address in self._ranges)
        return list(dict.fromkeys([*learned, *((node.host, int(node.port)) for node in known)]))

    def masters(self) -> list[Address]:
        """The nodes that serve slots, as far as it was learned."""
        return list(dict.fromkeys(address for _, _, address in self._ranges))

    def redirected(self, asked: Address, error: AskError) -> Address:
        """Where the node that was asked sends us."""
        return self._remap(asked, error.host, error.port)

    def serves(self, key: bytes, address: Address) -> bool:
        """The node served the key. True where that is news, and so a reason to ask the node for all slots."""
        slot = key_slot(key)
        known = self._serving.get(slot)
        self._serving[slot] = address
        return known != address and not any(first <= slot <= last and address == at for first, last, at in self._ranges)

    def lost(self, address: Address) -> None:
        """The node does not answer, or refuses: another one may know who serves its slots."""
        self._serving = {slot: node for slot, node in list(self._serving.items()) if node != address}
        self._ranges = [one for one in self._ranges if one[2] != address]

    def learn(self, asked: Address, slots: Any) -> None:
        """All slots, as a node lists them; the client that was given may know one node only."""
        if isinstance(slots, list):  # an ACL may refuse the command
            self._ranges = [
                (int(first), int(last), self._remap(asked, (node[0] or b"").decode(), node[1]))
                for first, last, node, *_ in slots
            ]

    def _remap(self, asked: Address, host: str, port: int) -> Address:
        host, port = self._manager.remap_host_port(host or asked[0], int(port))  # without a host: on the same one
        return host, port


class Leg(NamedTuple):
    """Commands for one node. asking: it serves a slot that is on its way to it."""

    address: Address
    asking: bool
    places: list[int]


class Batch:
    """Commands on their way through a cluster: only what was redirected, and so executed by nobody, is repeated.

    replies: in the order of the commands; an error is a reply. news: a node that turned out to serve a slot.
    """

    def __init__(self, routes: Routes, commands: Sequence[Command]) -> None:
        self.commands = commands
        self.replies: list[Any] = [None] * len(commands)
        self.news: Address | None = None
        self._routes = routes
        self._tries = 0
        self._next = [(routes.address(command.key), False, place) for place, command in enumerate(commands)]

    def legs(self) -> list[Leg]:
        """What to send now, node by node; empty at the end."""
        waiting, self._next = self._next, []
        self._tries += 1
        if self._tries > MOST_REDIRECTIONS:
            for address, _, place in waiting:
                self.replies[place] = redis.RedisError(
                    f"sent from node to node {MOST_REDIRECTIONS} times, at last to {address}"
                )
            return []
        legs: dict[tuple[Address, bool], list[int]] = {}
        for address, asking, place in waiting:
            legs.setdefault((address, asking), []).append(place)
        return [Leg(address, asking, places) for (address, asking), places in legs.items()]

    def arrived(self, leg: Leg, replies: Sequence[Any]) -> None:
        """What a node replied."""
        for place, reply in zip(leg.places, replies, strict=True):
            if isinstance(reply, AskError):  # or its subclass, MovedError
                address = self._routes.redirected(leg.address, reply)
                self._next.append((address, not isinstance(reply, MovedError), place))
                continue
            self.replies[place] = reply
            if not leg.asking and not isinstance(reply, Exception):
                if self._routes.serves(self.commands[place].key, leg.address):
                    self.news = leg.address
            elif isinstance(reply, Exception):
                self._routes.lost(leg.address)

    def failed(self, leg: Leg, error: BaseException) -> None:
        """The node was lost on the way: its commands may have been executed."""
        self._routes.lost(leg.address)
        for place in leg.places:
            self.replies[place] = error
