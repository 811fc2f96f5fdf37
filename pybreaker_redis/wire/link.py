"""The link of a process to one Redis. One exchange refreshes all its breakers, and they share each outage.

An exchange first retries what is down. Then it sends, in one pipeline, the reports that are due and a read of the state
and policy keys of every recently used breaker. A breaker reads a healthy document itself. Any other document goes
through a script, whose verdict holds while the stored bytes stay the same.

A process may use thousands of breakers. So an exchange for one that was idle, or for an urgent report, is for this
breaker alone, unless it is time for all. No I/O.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from time import monotonic
from typing import Any, TypeAlias

from redis.exceptions import ResponseError

from .._clock import NEVER, age
from .._core import BreakerCore
from .._events import Event
from .._line import IDLE, Line, Texts
from .._memory import FixedEngine, LocalEngine
from .._protocol import NotSent, Request, decode, history_fields
from . import commands as build
from . import exits
from .commands import Command
from .listing import Listing
from .options import REDIS_ERRORS, Address, concerns_server
from .outage import Outage, longest_exchange

SHORTEST_PAUSE = 0.01  # seconds between two checks for due reports
LAST_PAUSE = 0.1  # seconds to the last check: when a breaker is freed, it leaves _used before it joins held
READ_AT_ONCE = 250  # breakers in one MGET
REFRESHED_AT_ONCE = 500  # breakers in one pipeline: an event loop does nothing else while it prepares or reads one
BURST, BURST_TIME = 10, 0.1  # exchanges in the background, within so many seconds
logger = logging.getLogger("pybreaker_redis")

# Yields commands. Is sent their replies; that of a failed command, or of one whose server is lost, is the error.
Pipelines: TypeAlias = Generator[Sequence[Command], list[Any], Any]


class Link:
    """The breakers of a process that use one Redis, and whether that Redis can be used.

    timeout: the longest time in seconds that one exchange with a server takes. home: returns the node that serves a
    key; None if there is only one server. undelivered: events of exchanges, with their breakers. ended: whether the
    process is ending, so that nothing will look at what its breakers gather. held: the lines of freed breakers that
    have something to report.
    """

    line_of = Line  # breakers make their lines by it, since the module of Line imports theirs

    def __init__(self, timeout: float, home: Callable[[bytes], Address | None] | None = None) -> None:
        self.timeout = timeout
        self.patience = longest_exchange(timeout)
        self.ended = False
        self.wanted = False  # a breaker waits for an exchange
        self.busy_since = NEVER  # when the exchange that is under way began
        self.sweeps = True  # whether this exchange, or else the last one, is for all breakers in use
        self.undelivered: collections.deque[tuple[BreakerCore, list[Event]]] = collections.deque()
        self.held: collections.deque[Line] = collections.deque()
        self._home = home or (lambda key: None)
        self._read_at_once = READ_AT_ONCE if home is None else 1  # two breakers have different slots in a cluster
        self._outages: dict[Address | None, Outage] = {}  # by node
        self._used: weakref.WeakKeyDictionary[Line, None] = weakref.WeakKeyDictionary()
        # which need the next exchange, and whether it may be for them alone
        self._needing: weakref.WeakKeyDictionary[Line, bool] = weakref.WeakKeyDictionary()
        self._hinted: weakref.WeakKeyDictionary[Line, bool] = weakref.WeakKeyDictionary()
        self._swept_at, self._sweep_after = NEVER, IDLE  # when an exchange was last for all; seconds until the next one
        self._reporting: set[Line] = set()
        self._listing = Listing()
        self._empty_since = float("inf")  # when a check first found no breaker
        self._turn = 0
        self._burst = 0, NEVER  # how many exchanges there were, since when

    def after_fork(self) -> list[Line]:
        """In a child: start empty, without the outages, since a thread of the parent may hold their locks.

        Returns the recently used breakers: calls on the fast path do not check the process id, so renew them now.
        """
        used = _alive(self._used)
        self.wanted, self.busy_since = False, NEVER
        for kept in (self._outages, self._used, self._needing, self._hinted, self.held, self._reporting):
            kept.clear()
        self.undelivered.clear()
        self._listing.start_process()
        return used

    # Outages

    def outage(self, line: Line) -> Outage | None:
        """Why this breaker cannot use Redis now: an outage of its server, or a refusal of its own. None if it can."""
        of_server = self._outages.get(self._node_of(line)) if self._outages else None
        return of_server or line.refusal

    def failed(self, line: Line, error: BaseException) -> None:
        """Note a failed command: an outage of the breaker's server, or an error that concerns only this breaker."""
        if not concerns_server(error):
            self._refused(line, error)
            return
        outage = Outage(error, self.patience)
        if self._outages.setdefault(self._node_of(line), outage) is outage and not self.ended:
            logger.warning("Redis does not answer; the breakers of this process continue on their own: %s", error)

    def _refused(self, line: Line, error: BaseException) -> None:
        if line.refuse(Outage(error, self.patience)) and not self.ended:
            what = "Redis refuses its commands" if isinstance(error, ResponseError) else "no reply from Redis"
            logger.warning(
                "circuit breaker %r: %s; this process continues on its own: %s", line.breaker.name, what, error
            )

    def _node_of(self, line: Line) -> Address | None:
        return self._home(line.key)

    def engine(self, line: Line) -> LocalEngine | FixedEngine | None:
        """The engine that decides in this process while Redis is down; None while Redis decides."""
        if line.local is None and line.refusal is None and not self._outages:  # the usual case
            return None
        with line.view.lock:
            outage = self.outage(line)
            return line.engine(None if outage is None else outage.error)

    def due_outage(self, line: Line) -> Outage | None:
        """The outage of this breaker or its server, if it should be retried now."""
        outage = self.outage(line)
        return outage if outage is not None and outage.is_due() else None

    # Exchanges

    def is_busy(self) -> bool:
        """Whether an exchange is under way that is not overdue."""
        return age(self.busy_since, monotonic()) < self.patience

    def is_reporting(self, line: Line) -> bool:
        """Whether a report of this breaker is under way. A later failure must be counted after it."""
        return line in self._reporting

    def asked(self, line: Line) -> None:
        """Note that a caller has run a script."""
        if line.view.lease > 0:
            self.use(line)
            line.renewed()

    def use(self, line: Line) -> None:
        """Refresh this breaker until it is idle."""
        exits.begin()
        if self.ended:
            line.gathered(ends=True)
        line.used_at = monotonic()
        if line not in self._used:
            self._used[line] = None
            self._sweep_after = min(self._sweep_after, line.pause())
        self._empty_since = float("inf")

    def need(self, line: Line, urgent: bool) -> bool:
        """Refresh this breaker soon. urgent: it has a report to send. Returns whether an exchange must begin."""
        alone = urgent or line not in self._used
        self.use(line)
        if not alone and self.sweeps and self.is_busy():
            return False  # the exchange that is under way is for it, too
        self._needing.setdefault(line, alone)
        self.wanted = True
        return True

    def hint(self, line: Line) -> None:
        """Read the keys of this breaker in the next exchange, even if its view is fresh."""
        exits.begin()
        self._hinted[line] = self.wanted = True

    def leave(self, line: Line) -> None:
        """Stop refreshing this breaker until it is used again."""
        self._used.pop(line, None)
        self._needing.pop(line, None)
        self._listing.left(line)

    def pause(self) -> float | None:
        """Seconds until the next check for due reports; None if no breaker is in use."""
        if self._used or self.held:
            self._empty_since = float("inf")
            if self.sweeps:  # else only few breakers may have changed
                self._sweep_after = min(map(Line.pause, [*_alive(self._used), *self.held]), default=IDLE)
            return max(min(self._sweep_after, IDLE), SHORTEST_PAUSE)
        now = monotonic()
        self._empty_since = min(self._empty_since, now)
        return LAST_PAUSE if now - self._empty_since < LAST_PAUSE / 2 else None

    def rest(self) -> float:
        """Seconds to wait before the next exchange in the background: anyone can publish any number of hints."""
        (count, since), now = self._burst, monotonic()
        self._burst = (count + 1, since) if 0 <= now - since < BURST_TIME else (1, now)
        return since + BURST_TIME - now if self._burst[0] > BURST else 0.0

    def exchange(self) -> Pipelines:
        """One exchange, for all breakers in use or only for some. Raises no error of Redis."""
        wanted, self.wanted = self.wanted, False
        self.busy_since = monotonic()
        try:
            if self.held:
                yield from self._report_held()
            # another event loop may take some of them
            taken = {line: self._needing.pop(line, None) for line in _alive(self._needing)}
            needing = {line: alone for line, alone in taken.items() if alone is not None}
            hinted = {line for line in _alive(self._hinted) if self._hinted.pop(line, False)}
            # a breaker in use that is stale shares the exchange with all others, so that all become stale together
            is_time = not wanted or age(self._swept_at, self.busy_since) >= self._sweep_after
            self.sweeps = is_time or bool(self._outages) or not (needing or hinted) or not all(needing.values())
            if self.sweeps:
                self._swept_at = self.busy_since
            lines = [*dict.fromkeys([*(_alive(self._used) if self.sweeps else needing), *hinted])]
            if self._outages or any(line.refusal for line in lines):
                lines = yield from self._retry(lines)
            for first in range(0, len(lines), REFRESHED_AT_ONCE):
                part = lines[first : first + REFRESHED_AT_ONCE]
                if self._outages:  # one may have begun with the part before
                    part = [line for line in part if self.outage(line) is None]
                self._reporting.update(part)  # before outcomes are taken: a failure must not overtake them
                try:
                    yield from self._refresh(part, hinted, wanted)
                finally:
                    self._reporting.difference_update(part)
            for line in hinted:
                if self.outage(line) is not None:
                    self._hinted[line] = True  # read it after the outage
        finally:
            self.busy_since = NEVER

    def end(self) -> Pipelines:
        """The last exchange of a process: only reports, and only to servers that are not down."""
        self.ended = True
        yield from self._report_held()
        yield from self.report(_alive(self._used))

    def _report_held(self) -> Pipelines:
        held = []
        with contextlib.suppress(IndexError):  # another event loop may take them, too
            while self.held:
                held.append(self.held.popleft())
        try:
            yield from self.report(held)
        except NotSent:
            self.held.extend(held)
            raise

    def report(self, lines: list[Line]) -> Pipelines:
        """Report all that these breakers have gathered, in one exchange."""
        lines, sent = [line for line in lines if self.outage(line) is None], monotonic()
        reports = [(line, request) for line in lines for request in line.gathered(self.ended)]
        replies = (yield from self._report(reports, [])) if reports else []
        for (line, request), reply in zip(reports, replies, strict=True):
            self._receive(line, request, reply, sent)
        self._collect(lines)

    def _refresh(self, lines: list[Line], hinted: Collection[Line], wanted: bool) -> Pipelines:
        sent = monotonic()
        due = {line: line.due(sent, wanted, line in hinted) for line in lines}
        for line, what in due.items():
            if what.idle:
                self.leave(line)
        reports = [(line, request) for line, what in due.items() for request in what.reports]
        self._reporting.difference_update({*lines} - {line for line, _ in reports})
        size = self._read_at_once
        read = [line for line, what in due.items() if what.reads]
        chunks = [read[first : first + size] for first in range(0, len(read), size)]
        if reports or chunks:
            listed = self._to_list(sent) if self._listing.is_due(sent) else []
            reads = [build.read([line.key for line in chunk]) for chunk in chunks]
            replies = yield from self._report(reports, [*reads, *listed])
            if listed:
                self._listing.replied(replies[-len(listed) :], monotonic())
            for (line, request), reply in zip(reports, replies, strict=False):
                self._receive(line, request, reply, sent)
            undecided = self._take_reads(chunks, replies[len(reports) : len(reports) + len(chunks)], sent)
            if undecided:
                yield from self._decide(lines, undecided)
            if news := [line for line in lines if line.news]:
                yield from self._announce(lines, news)
            self._collect(lines)

    def _to_list(self, now: float) -> list[Command]:
        """The commands that list this process in its fleet, but not to nodes that are down."""
        commands = self._listing.commands(_alive(self._used), now)
        return [command for command in commands if self._home(command.key) not in self._outages]

    def _report(self, reports: list[tuple[Line, Request]], reads: list[Command]) -> Pipelines:
        """Send reports and reads. Returns their replies."""
        calls = [build.run("record", line.key, request) for line, request in reports]
        try:
            replies = yield [*calls, *reads]
        except NotSent:
            for line, request in reports:
                line.view.give_back(request)
            raise
        self._reporting.difference_update(line for line, _ in reports)
        return replies

    def _receive(self, line: Line, request: Request, reply: Any, sent: float, texts: Texts | None = None) -> None:
        error = reply if isinstance(reply, Exception) else None
        line.notices.script_ran("record", monotonic() - sent, error)
        if error is None:
            line.replied(request, decode(reply), sent, texts)
            return
        self.failed(line, error)
        if isinstance(error, ResponseError):  # refused: the script has changed nothing
            line.view.give_back(request)

    def _take_reads(self, chunks: list[list[Line]], replies: list[Any], sent: float) -> list[tuple[Line, Texts]]:
        """Let the breakers read what is stored. Returns what a script must read."""
        undecided = []
        for chunk, reply in zip(chunks, replies, strict=True):
            for place, line in enumerate(chunk):
                if isinstance(reply, Exception):
                    self.failed(line, reply)
                elif texts := line.read(reply[2 * place], reply[2 * place + 1], sent):
                    undecided.append((line, texts))
        return undecided

    def _decide(self, lines: list[Line], undecided: list[tuple[Line, Texts]]) -> Pipelines:
        """Let the script read the documents that the breakers could not."""
        self._collect(lines)
        sent, requests = monotonic(), [line.refresh_request() for line, _ in undecided]
        calls = [build.run("record", line.key, request) for (line, _), request in zip(undecided, requests, strict=True)]
        replies = yield calls
        for (line, texts), request, reply in zip(undecided, requests, replies, strict=True):
            self._receive(line, request, reply, sent, texts)

    def _announce(self, lines: list[Line], news: list[Line]) -> Pipelines:
        """Read the history, and notify listeners of transitions by other instances."""
        self._collect(lines)
        replies = yield [build.history(line.key, 10) for line in news]
        for line, reply in zip(news, replies, strict=True):
            if not isinstance(reply, REDIS_ERRORS):  # else the next exchange asks again
                line.announce(history_fields(reply))

    def _collect(self, lines: list[Line]) -> None:
        """Take the new events of the breakers, before another task of this thread does."""
        for line in lines:
            if line.notices.waiting and (events := line.notices.take()):
                self.undelivered.append((line.breaker, events))

    def deliver(self) -> None:
        """Deliver the events of exchanges, in order."""
        while True:
            try:
                breaker, events = self.undelivered.popleft()
            except IndexError:  # several threads may deliver at once
                return
            try:
                breaker._deliver_events(events)
            except BaseException:  # such as a listener's SystemExit
                logger.exception("a listener ended its thread")

    # Retries

    def _retry(self, lines: list[Line]) -> Pipelines:
        """Retry what is down and due. Returns the breakers that can use Redis."""
        down: dict[Outage, list[Line]] = {}
        for line in lines:
            if (outage := self.outage(line)) is not None:
                down.setdefault(outage, []).append(line)
        for outage, concerned in down.items():
            if outage.claim():
                try:
                    yield from self._retry_one(outage, concerned)
                except BaseException:
                    outage.give_up()
                    raise
        for line in itertools.chain(*down.values()):
            if self.outage(line) is not None and age(line.used_at, monotonic()) > IDLE:
                self.leave(line)
        return [line for line in lines if self.outage(line) is None]

    def _retry_one(self, outage: Outage, lines: list[Line]) -> Pipelines:
        """Retry a server until one of its breakers gets an answer, then all its other breakers.

        Each is asked by a script that writes: a server that is full still answers reads. The first one is asked alone;
        after an answer, ever more are asked at once. Those that then meet an error of the server are asked again, each
        alone: one huge value must not starve the others. If two in a row still meet one, the server is down again. Each
        retry begins with another breaker.
        """
        self._turn += 1
        first = self._turn % len(lines)
        node = self._node_of(lines[0])
        waiting = collections.deque([*lines[first:], *lines[:first]])
        size = 1  # how many breakers to ask at once
        alone = 1  # how many breakers to ask one by one first
        silent = False  # whether the last one that was asked alone met an error of the server
        while waiting:
            asked = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            sent = monotonic()
            replies = yield [build.run("record", line.key, line.refresh_request(proves=True)) for line in asked]
            lost = []
            for line, reply in zip(asked, replies, strict=True):
                error = reply if isinstance(reply, Exception) else None
                line.notices.script_ran("record", monotonic() - sent, error)
                is_lost = error is not None and concerns_server(error)
                if error is None:
                    silent = False
                    self._answered(line, node, outage)
                    line.restored(decode(reply), sent)
                elif is_lost and (len(asked) > 1 or node in self._outages):
                    lost.append(line)
                elif is_lost and silent and line.refusal is None:
                    self.failed(line, error)
                    lost.append(line)
                else:  # it is refused, or the only one that meets an error of the server
                    if line.refusal is None:
                        silent = is_lost
                    elif line.refusal is not outage:
                        line.refusal.failed_again()
                    self._refused(line, error)
            self._collect(asked)
            if lost and node in self._outages:
                break
            waiting.extendleft(reversed(lost))
            alone = len(lost) or alone - 1
            size = 1 if alone > 0 else min(2 * size, READ_AT_ONCE)
        for failed in {outage, self._outages.get(node, outage)}:  # another one may have begun after an answer
            failed.failed_again()

    def _answered(self, line: Line, node: Address | None, outage: Outage) -> None:
        """Note the end of an outage, of this node or this breaker alone: Redis has accepted a write."""
        if outage in (self._outages.get(node), line.refusal):
            logger.warning("Redis answers again")
        if self._outages.get(node) is outage:
            del self._outages[node]
        line.refusal = None


def _alive(lines: weakref.WeakKeyDictionary[Line, Any]) -> list[Line]:
    """The lines of a dictionary that other threads may change meanwhile."""
    return [*filter(None, map(weakref.ref.__call__, lines.keyrefs()))]
