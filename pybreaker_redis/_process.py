"""This process. What a fork copies and a child must not use starts anew: identity, locks, sockets, threads and counts.

A child is noticed by its process id, since not every fork runs Python's hooks (uWSGI forks in C). The fast path does
not look: it goes on for one lease at most, and what it counts until then is dropped with what the parent has gathered.
"""

from __future__ import annotations

import os
import threading
import weakref
from os import getpid
from typing import Protocol


class Part(Protocol):
    """Something that starts anew in a child."""

    def _after_fork(self) -> None: ...


class Process:
    """The process that this code runs in. pid: the process for which all parts have started."""

    def __init__(self) -> None:
        self.pid = getpid()
        self._parts: weakref.WeakKeyDictionary[Part, None] = weakref.WeakKeyDictionary()  # in the order they were made
        self._starting: dict[int, threading.RLock] = {}  # by process: a thread of the parent may hold the parent's

    def add(self, part: Part) -> None:
        """Let a part start anew in each child."""
        self._parts[part] = None

    def check(self) -> None:
        """Start anew if this is a child. Where every 0.1 us counts, this method's line stands in place of its call."""
        if getpid() != self.pid:
            self.start()

    def start(self) -> None:
        """In a child: let all parts start anew, once, before any of them is used."""
        pid = getpid()
        with self._starting.setdefault(pid, threading.RLock()):
            if self.pid != pid:
                for part in list(self._parts):
                    part._after_fork()
                self.pid = pid


process = Process()
if hasattr(os, "register_at_fork"):  # for forks by Python, at once
    os.register_at_fork(after_in_child=process.start)
