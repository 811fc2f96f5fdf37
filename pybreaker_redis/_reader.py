"""Reads the board for all viewers of a process: one thread, one subscription, one SCAN every few seconds.

The thread starts with the first viewer and ends soon after the last one has left, so a page that nobody looks at costs
nothing. The thread decodes off the event loop: an application that mounts the page goes on answering meanwhile, and a
terminal goes on reading keys.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

from ._board import Row, Stored, counts, read_keys, read_stored, row_of, subscribed, urgency
from ._process import renew, renew_at_forks
from ._protocol import state_pattern
from .wire.exits import starts
from .wire.options import ERROR_REPLY, REDIS_ERRORS
from .wire.sync import Server

TIMEOUT = 5.0
SHORTEST_PAUSE = 2.0  # seconds between two readings of all breakers
LONGEST_PAUSE = 30.0
SHARE = 0.005  # of the time, at most, for reading all breakers
BURST = 0.02  # seconds for which further notifications gather after the breakers of the first were read
RETRY = 1.0
MOST_AT_ONCE = 1000  # notifications that are taken together: a flood must not keep the board from being read
GLANCE = 1.0  # seconds between two readings of the breakers in sight
LINGER = 30.0  # seconds without viewers and requests after which the thread ends
logger = logging.getLogger("pybreaker_redis")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Board:
    """All breakers at one time. Immutable: whoever holds one may use it in any thread.

    rows: the most urgent first. counts: breakers by group. error: why Redis cannot be read now, else None. live:
    whether notifications arrive. clock: the server's unix seconds minus the monotonic clock.
    """

    rows: Sequence[Row] = ()
    by_key: dict[bytes, Row] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    clock: float = 0.0
    error: str | None = None
    live: bool = False
    is_read: bool = False

    @property
    def now(self) -> float:
        """The server's clock, in unix seconds."""
        return self.clock + monotonic()


_NO_THREAD = Board(error="no thread can start to read the board")


class BoardReader:
    """Keeps the board of one prefix up to date while somebody looks at it.

    on_message: receives the channel and the content of each notification, in the reader's thread.
    board: as last read; replaced, never changed. in_sight: keys of breakers to read again every second.
    """

    def __init__(self, client: Any, prefix: str, on_message: Callable[[bytes, bytes], object] | None = None) -> None:
        self.client, self.prefix, self._on_message = client, prefix, on_message
        self.in_sight: Sequence[bytes] = ()
        self._pid = os.getpid()
        self._after_fork()
        renew_at_forks(self)

    def _after_fork(self) -> None:
        """In a child: start without a thread, and without the parent's viewers."""
        self.board = Board()
        self._stored: dict[bytes, Stored] = {}
        self._viewers: weakref.WeakSet[Viewer] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._waiting = 0  # callers of _wait_for()
        self._thread: threading.Thread | None = None
        self._used_at = monotonic()

    @property
    def is_running(self) -> bool:
        """Whether the board is kept up to date now, in this process."""
        return self._thread is not None and self._pid == os.getpid()

    @property
    def server(self) -> Server:
        """This process's access to the Redis."""
        return Server.of(self.client, TIMEOUT)

    def current(self) -> Board:
        """The board, once it has been read, or an attempt has failed. Blocks meanwhile; starts the thread."""
        return self._wait_for(lambda: self.board.is_read or bool(self.board.error), 2 * TIMEOUT)

    def changed(self, board: Board, seconds: float) -> Board:
        """Wait until the board is another one, at most for so many seconds. Returns the present board."""
        return self._wait_for(lambda: self.board is not board, seconds)

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> Board:
        renew(self)
        with self._changed:
            self._waiting += 1
            try:
                self._start()
                self._changed.wait_for(condition, seconds)
                return self.board
            finally:
                self._waiting -= 1

    @contextlib.contextmanager
    def viewer(self) -> Iterator[Viewer]:
        """Follow the board for a `with` block, on the running event loop."""
        renew(self)
        viewer = Viewer(asyncio.get_running_loop())
        self._viewers.add(viewer)
        try:
            self._start()
            yield viewer
        finally:
            self._viewers.discard(viewer)
            self._used_at = monotonic()

    def _start(self) -> None:
        with self._changed:
            self._used_at = monotonic()
            if self._thread is None:
                self.board = Board()  # the last one is old
                self._thread = threading.Thread(target=self._run, name="pybreaker_redis-board", daemon=True)
                if not starts(self._thread):
                    self._thread, self.board = None, _NO_THREAD

    def _is_wanted(self) -> bool:
        with self._changed:
            if self._viewers or self._waiting or monotonic() - self._used_at < LINGER:
                return True
            self._thread = None
            return False

    # The thread

    def _run(self) -> None:
        while self._is_wanted():
            try:
                self._follow()
                return
            except REDIS_ERRORS as error:
                self._publish(error=str(error) or repr(error), live=False)
            except Exception:
                logger.exception("reading the board failed")
                self._publish(error="reading the board failed; the log of the web server says why", live=False)
            time.sleep(RETRY)

    def _follow(self) -> None:
        """Subscribe, then read until nobody looks any more. Without the right to subscribe, only read."""
        with contextlib.ExitStack() as stack:
            try:
                receive = stack.enter_context(subscribed(self.server, "PSUBSCRIBE", state_pattern(self.prefix)))
            except ERROR_REPLY:
                self._read_on(_nothing, live=False)
            else:
                self._read_on(receive, live=True)

    def _read_on(self, receive: Callable[[float], tuple[bytes, bytes] | None], live: bool) -> None:
        due, glance = monotonic(), monotonic() + GLANCE
        while self._is_wanted():
            began = monotonic()
            if began >= due:
                self._read_all(receive, live)
                ended = monotonic()
                due = ended + min(max((ended - began) / SHARE, SHORTEST_PAUSE), LONGEST_PAUSE)
            keys = self._notified(receive, min(due, glance) - monotonic())
            if monotonic() >= glance:
                keys, glance = [*keys, *self.in_sight], monotonic() + GLANCE
            if keys:
                self._read(list(dict.fromkeys(keys)))
                time.sleep(BURST)

    def _notified(self, receive: Callable[[float], tuple[bytes, bytes] | None], wait: float) -> list[bytes]:
        """The keys of the breakers that notifications are about: waits for one, then takes all that have come."""
        found: list[bytes] = []
        message = receive(min(max(wait, 0.0), RETRY))
        while message is not None:
            found.append(message[0])
            if self._on_message is not None:
                self._on_message(*message)
            message = receive(0.0) if len(found) < MOST_AT_ONCE else None
        return found

    def _read_all(self, receive: Callable[[float], tuple[bytes, bytes] | None], live: bool) -> None:
        """Read every breaker. Notifications need not wait for the last one."""
        found: dict[bytes, Stored] = {}
        hinted: dict[bytes, None] = {}
        for chunk in read_stored(self.server, self.prefix):
            found |= {one.key: one for one in chunk}
            keys = self._notified(receive, 0.0)
            hinted |= dict.fromkeys(keys)
            if keys and self.board.is_read:
                self._read(keys)
        for key in hinted:  # it may have been found before the notification was sent
            found.pop(key, None)
        found |= {one.key: one for one in read_keys(self.server, list(hinted))}
        self._replace(found, live)

    def _replace(self, found: dict[bytes, Stored], live: bool) -> None:
        by_key = {key: self._row(one) for key, one in found.items()}
        self._stored = found
        changes: dict[str, Any] = {"is_read": True, "error": None, "live": live}
        if by_key != self.board.by_key or not self.board.is_read:
            rows = sorted(by_key.values(), key=urgency)
            changes |= {"by_key": by_key, "rows": rows, "counts": counts(rows)}
        self._publish(max((one.now_ms for one in found.values()), default=round(time.time() * 1000)), **changes)

    def _read(self, keys: list[bytes]) -> None:
        """Read the breakers that notifications were about."""
        found = {one.key: one for one in read_keys(self.server, keys)}
        by_key, rows, counted = dict(self.board.by_key), list(self.board.rows), dict(self.board.counts)
        for key in keys:
            if (old := by_key.pop(key, None)) is not None:
                _take_out(rows, old)
                _count(counted, old, -1)
            if (one := found.get(key)) is not None:
                by_key[key] = new = self._row(one)
                self._stored[key] = one
                bisect.insort(rows, new, key=urgency)
                _count(counted, new, 1)
        clock = max((one.now_ms for one in found.values()), default=None)
        self._publish(clock, by_key=by_key, rows=rows, counts=counted)

    def _row(self, one: Stored) -> Row:
        """The row; the same object as before, if nothing about it has changed."""
        known, row = self._stored.get(one.key), self.board.by_key.get(one.key)
        same = known is not None and (known.document, known.override) == (one.document, one.override)
        if row is not None and same and not row.ends(one.now_ms / 1000):
            return row
        return row_of(one, self.prefix)

    def _publish(self, now_ms: int | None = None, **changes: Any) -> None:
        """Replace the board, and wake everybody who looks at it. now_ms: the server's clock."""
        if now_ms is not None:
            changes["clock"] = now_ms / 1000 - monotonic()
        with self._changed:
            self.board = dataclasses.replace(self.board, **changes)
            self._changed.notify_all()
        for viewer in list(self._viewers):
            viewer.wake()


class Viewer:
    """Somebody who looks at the board, on an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._event = loop, asyncio.Event()

    def wake(self) -> None:
        """Let the viewer look again. For other threads."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._event.set)

    async def changed(self, seconds: float) -> None:
        """Wait until the board may have changed, at most for so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()


def _nothing(seconds: float) -> None:
    time.sleep(max(seconds, 0.0))


def _take_out(rows: list[Row], row: Row) -> None:
    place = bisect.bisect_left(rows, urgency(row), key=urgency)
    while rows[place] is not row:  # two names that are no UTF-8 may look the same
        place += 1
    del rows[place]


def _count(counted: dict[str, int], row: Row, by: int) -> None:
    for group in row.groups:
        counted[group] += by
