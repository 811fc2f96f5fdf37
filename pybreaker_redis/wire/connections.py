"""The connections to one server: which of them are free, and which callers wait for one. No I/O."""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any, Generic, TypeVar

import redis

from .._clock import age
from .options import Address, connects_late, limit_of, none_free, patience_after
from .outage import longest_exchange


class BasePipe:
    """A connection. It is made before it opens, which may take long, and takes a place from then on.

    opens: whether it is opening, and still wanted. era: in which it was opened. used_at: when it was last used.
    """

    give_up: Callable[[], None]  # lets it be closed; what it waits for may go on for a while
    _connection: Any = None

    def __init__(self) -> None:
        self.opens, self.era = True, 0
        self.began = self.used_at = monotonic()


P = TypeVar("P", bound=BasePipe)
C = TypeVar("C")


class BaseConnections(Generic[P]):
    """The connections to the target of a pool: a server, a socket, a Sentinel's master or a node.

    There are never more than the pool allows. Callers wait in line, in their order, for the next free connection. While
    fewer connections are opening than callers wait, another one begins to open in the background. It belongs to none of
    them, since opening may take long: it waits for a name server, a credential provider, and several addresses and
    replies. An era ends when the server is lost, and at close(). A connection of an earlier era is used no more.
    """

    _pipe_class: type[P]
    _begin: Callable[[P], None]  # opens a connection in the background
    _hand: Callable[[Any, P | BaseException], bool]  # ends a caller's turn; returns False if the caller has left

    def __init__(self, pool: Any, timeout: float) -> None:
        self._pool, self._limit = pool, limit_of(pool)
        self._timeout = min(timeout, pool.connection_kwargs.get("socket_timeout") or timeout)
        self._patience = timeout / 2  # seconds a PING may take; after connecting, as long as connecting took
        self._longest = longest_exchange(timeout)  # seconds after which opening a connection is given up
        self._idle: collections.deque[P] = collections.deque()
        # idle, in use or opening, the oldest first; weak, since a signal handler's exception may let a thread lose one
        # at any point
        self._pipes: weakref.WeakKeyDictionary[P, None] = weakref.WeakKeyDictionary()
        self._waiting: collections.deque[Any] = collections.deque()
        self._lock = threading.RLock()
        self._era = 0

    def _serve(self) -> None:
        """Give free connections to the callers that have waited longest, and open others for the rest.

        Call this after adding a caller or a connection, or closing one.
        """
        with self._lock, contextlib.suppress(IndexError):  # a caller may take the last one without the lock
            while self._waiting:
                pipe = self._idle.pop()
                if not self._hand(self._waiting.popleft(), pipe):
                    self._idle.append(pipe)
        while (another := self._another()) is not None:
            self._begin(another)

    def _another(self) -> P | None:
        """A connection to open: if fewer are opening than callers wait, and the limit allows it."""
        with self._lock:
            if len(self._pipes) >= self._limit or len(self._waiting) <= len(self._opening()):
                return None
            pipe = self._pipe_class()
            self._pipes[pipe] = None
            return pipe

    def _opened(self, pipe: P) -> bool:
        """Take a connection that is open now. Returns False if it is to be closed, since it was given up."""
        with self._lock:
            if not pipe.opens:
                return False
            pipe.opens, pipe.era, pipe.used_at = False, self._era, monotonic()
            self._patience = patience_after(pipe.used_at - pipe.began, self._timeout)
        return self._keep(pipe)

    def _keep(self, pipe: P) -> bool:
        """Let others use a connection. Returns False if its era is over: it is to be closed."""
        with self._lock:
            kept = pipe.era == self._era
            if kept:
                self._idle.append(pipe)
        if kept and self._waiting:
            self._serve()
        return kept

    def _opening(self) -> list[P]:
        pipes = [pipe for reference in self._pipes.keyrefs() if (pipe := reference()) is not None]
        return [pipe for pipe in pipes if pipe.opens]

    def _give_up(self, pipe: P) -> None:
        with self._lock:
            if not pipe.opens:  # it is open since, and perhaps in use
                return
            pipe.opens = False
        pipe.give_up()

    def _gave_up(self, timeout: float) -> redis.RedisError:
        """The error of a caller that waits no longer. One connection at least goes on opening, for the next caller."""
        opening = self._opening()
        for place, pipe in enumerate(opening):
            if place >= max(1, len(self._waiting)) or age(pipe.began, monotonic()) > self._longest:
                self._give_up(pipe)
        return connects_late(timeout) if opening else none_free(self._limit, timeout)

    def _end_era(self) -> list[P]:
        """Begin another era. Returns the idle connections, to be closed; a thread that has one puts it back no more."""
        with self._lock:
            self._era += 1
            return self._take_idle()

    def _take_idle(self) -> list[P]:
        """All idle connections, to be closed."""
        idle: list[P] = []
        with contextlib.suppress(IndexError):  # several threads may pop at once
            while True:
                idle.append(self._idle.pop())
        return idle

    def _lose(self, error: BaseException) -> list[P]:
        """End the era and the turns of all callers: each would time out on the lost server in turn.

        Returns the idle connections, to be closed. One that is opening may find the server again.
        """
        idle = self._end_era()
        with self._lock, contextlib.suppress(IndexError):
            while True:
                self._hand(self._waiting.popleft(), error)
        return idle


class Nodes(dict[Address | None, C]):
    """The connections to each node, made when they are first asked for. None: to the only server."""

    def __init__(self, kind: Callable[[Any, float], C], pool_of: Callable[[Any], Any], timeout: float) -> None:
        self._kind, self._pool_of, self._timeout = kind, pool_of, timeout

    def __missing__(self, address: Address | None) -> C:
        return self.setdefault(address, self._kind(self._pool_of(address), self._timeout))
