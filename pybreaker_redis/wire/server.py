"""What blocking and asyncio access to one Redis have in common. No I/O."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Generator
from time import monotonic
from typing import Any, Self, TypeVar

from .._line import Line
from .._process import renew, renew_at_forks
from . import exits
from .connections import Nodes
from .link import Link
from .options import Address, Kind, pools_of
from .route import Leg, Routes, to_one_server

T = TypeVar("T")

_shared: weakref.WeakKeyDictionary[Any, dict[tuple[type[BaseServer], float], Any]] = weakref.WeakKeyDictionary()


class BaseServer:
    """This process's access to one Redis: a server, a Sentinel's master, or a cluster.

    Commands go over separate connections, so the client itself is not changed. Commands are never repeated, since that
    could count a report twice. It keeps no reference to the client, which is the weak key of _shared.
    """

    _kind: Kind
    _start: Callable[[], None]  # begins an exchange in the background
    _nodes: Nodes[Any]

    def __init__(self, client: Any, timeout: float) -> None:
        self._pool_of, clustered = pools_of(client, self._kind, timeout)
        self._routes = Routes(client) if clustered else None
        self._exchange = self._routes.exchange if self._routes else to_one_server
        self._timeout = timeout
        self.link = Link(timeout, self._routes.home if self._routes else None)
        self._start_process()
        self._pid = os.getpid()
        renew_at_forks(self)
        exits.servers.add(self)

    @classmethod
    def of(cls, client: Any, timeout: float) -> Self:
        """The access to the Redis of a client; all breakers of the process share it.

        timeout: seconds for one exchange, and to wait for a connection.
        """
        known, key = _shared.setdefault(client, {}), (cls, timeout)
        server: Self = known.get(key) or known.setdefault(key, cls(client, timeout))
        renew(server)  # in a child, the parent may have made it
        return server

    def _start_process(self) -> None:
        """Start without threads, tasks and connections."""
        raise NotImplementedError

    def _after_fork(self) -> None:
        used = self.link.after_fork()
        self._start_process()
        for line in used:
            renew(line.breaker)

    def soon(self, line: Line, urgent: bool = False) -> None:
        """Refresh a breaker in the background. urgent: it has a report to send."""
        if self.link.need(line, urgent):
            self._start()

    def hint(self, line: Line) -> None:
        """Read a breaker's keys in the background, even if its view is fresh."""
        self.link.hint(line)
        self._start()

    def subscriber(self) -> Any:
        """A connection for a subscription, not yet open. Any node of a cluster will do: all get every message."""
        return self._nodes[None if self._routes is None else self._routes.any_node()].connection(protocol=2)

    def _end_over(self, node: Callable[[Address | None], Any], ends: float) -> None:
        """Report what is gathered, over blocking connections. Raises nothing.

        node: returns the connections to a node. ends: until when, on the monotonic clock.
        """

        def send(leg: Leg) -> list[Any]:
            return node(leg.address).send(leg.commands, ends - monotonic())  # type: ignore[no-any-return]

        with contextlib.suppress(Exception):
            carry_out(self.link.end(), lambda commands: carry_out(self._exchange(commands), send))


def carry_out(steps: Generator[Any, Any, T], perform: Callable[[Any], Any]) -> T:
    """Perform each step that the generator yields: send it the result, or throw it the error. Returns its result."""
    try:
        step = next(steps)
        while True:
            try:
                result = perform(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
