"""Forks. A child must not use its parent's identity, locks, sockets, threads and counts: its parts start anew.

A child notices the fork by its process id, since not every fork runs Python's hooks (uWSGI forks in C). The fast path
does not check the process id. It may go on for one lease at most, and the successes that it counts until then are
dropped together with those that the parent had gathered.
"""

from __future__ import annotations

import os
import threading
import weakref
from os import getpid
from typing import Protocol


class Part(Protocol):
    """Something that starts anew in a child. _pid: the id of the process in which it last started."""

    _pid: int

    def _after_fork(self) -> None: ...


_renewed_at_forks: weakref.WeakKeyDictionary[Part, None] = weakref.WeakKeyDictionary()  # in the order they were made
_locks: dict[int, threading.RLock] = {}  # by process id: a thread of the parent may hold the parent's
_renewing: list[tuple[int, Part]] = []  # with the process: another thread may fork meanwhile


def own_lock() -> threading.RLock:
    """A lock of this process, shared by all breakers. Hold it for a moment only, and take no other lock meanwhile."""
    pid = getpid()
    return _locks.get(pid) or _locks.setdefault(pid, threading.RLock())


def renew(part: Part) -> None:
    """In a child: let a part start anew, once. Before each use: `if getpid() != part._pid: renew(part)`."""
    pid = getpid()
    with own_lock():
        if part._pid == pid or (pid, part) in _renewing:
            return
        _renewing.append((pid, part))
        try:
            part._after_fork()
            part._pid = pid
        finally:
            _renewing.remove((pid, part))


def renew_at_forks(part: Part) -> None:
    """Renew a part right after each fork that runs Python's hooks."""
    _renewed_at_forks[part] = None


def _in_child() -> None:
    for part in list(_renewed_at_forks):
        renew(part)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
