"""The link of a process to one Redis. One exchange refreshes all its breakers, and they share each outage.

An exchange first retries what is down, breaker by breaker. Then it sends, in one pipeline, the reports that are due and
a read of the state and policy keys of every recently used breaker. A breaker reads a healthy document itself.
Any other document goes through a script, whose verdict holds while the stored bytes stay the same. No I/O.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import random
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol, TypeAlias

from redis.exceptions import ResponseError

from .._clock import NEVER, age
from .._protocol import Keys, NotSent, Reply, Request, decode, history_fields
from . import commands as build
from . import exits
from .commands import Command
from .listing import Given, Listing
from .options import REDIS_ERRORS, Address, concerns_server

IDLE = 10.0  # seconds after its last call for which a breaker is refreshed
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0  # seconds between two retries
SHORTEST_PAUSE = 0.01  # seconds between two checks for due reports
LAST_PAUSE = 0.1  # seconds to the last check: when a breaker is freed, it leaves _used before it joins held
READ_AT_ONCE = 250  # breakers in one MGET
BURST, BURST_TIME = 10, 0.1  # exchanges in the background, within so many seconds
logger = logging.getLogger("pybreaker_redis")

# Yields commands. Is sent their replies (a failed command's is its error), or is thrown the error of a lost server.
Pipelines: TypeAlias = Generator[Sequence[Command], list[Any], Any]


class Health:
    """Whether a server, a node of a cluster or a single breaker can be used. error: why not; None while it can.

    The error is kept without its tracebacks: they would keep what the callers had in hand for as long as the outage.
    patience: seconds after which a retry that has not ended may be claimed again. failing: the set to which it belongs
    while it has an error.
    """

    def __init__(self, patience: float, failing: weakref.WeakSet[Health]) -> None:
        self.error: BaseException | None = None
        self._failing = failing
        self.abandoned = False  # the last retry has not ended
        self._patience = patience
        self._waits_since, self._waits_for = NEVER, 0.0
        self._pause = FIRST_PAUSE
        self._lock = threading.RLock()

    def fail(self, error: BaseException) -> bool:
        """Note that it cannot be used. Returns whether it could be used before."""
        error.__traceback__ = error.__cause__ = error.__context__ = None
        with self._lock:
            new = self.error is None
            if new:
                self.error, self._pause = error, FIRST_PAUSE
                self._failing.add(self)
                self._wait()
            return new

    def is_due(self) -> bool:
        """Whether it is time for a retry."""
        return self.error is not None and age(self._waits_since, monotonic()) >= self._waits_for

    def claim(self) -> bool:
        """Whether the caller should retry. If that retry never ends, another caller may claim it later."""
        with self._lock:
            due = self.is_due()
            if due:
                self.abandoned, self._waits_since, self._waits_for = True, monotonic(), self._patience
            return due

    def retried(self, failed: bool) -> None:
        """Note the end of a retry."""
        with self._lock:
            self.abandoned = False
            if failed:
                self._wait()
            else:
                self.error = None
                self._failing.discard(self)

    def give_up(self) -> None:
        """Note that a retry was cancelled: the next caller may claim it."""
        self._waits_for = 0.0

    def _wait(self) -> None:
        self._waits_since, self._waits_for = monotonic(), self._pause * random.uniform(0.75, 1.25)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)


class Due(NamedTuple):
    """What a breaker needs from an exchange.

    reports: requests for record.lua. reads: whether to read its keys. idle: whether to refresh it no more, because it
    has not been called for IDLE.
    """

    reports: list[Request]
    reads: bool
    idle: bool


class Member(Protocol):
    """What a link needs of a breaker.

    trouble: the health of this breaker alone; the link's `fine` until it first fails. used_at: when it last asked for a
    refresh. notices: its events. news: a transition by another instance, of which the listeners must still be notified,
    or None. given: what it lists in the fleet, or None.
    """

    trouble: Health
    used_at: float
    news: Any

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> Keys: ...
    @property
    def notices(self) -> Any: ...
    @property
    def given(self) -> Given | None: ...

    def own_health(self) -> Health:
        """trouble, once it is not shared with other breakers any more."""

    def renew(self) -> None:
        """In a child: start anew."""

    def pause(self) -> float:
        """Seconds between two checks for due reports."""

    def due(self, now: float, wanted: bool, hinted: bool) -> Due:
        """Take the reports that are due. wanted: a refresh is needed, so join it. hinted: read the keys in any case."""

    def gathered(self, ends: bool = False) -> list[Request]:
        """Take all that is gathered as reports. ends: the process ends: take only what matters, and stop gathering."""

    def give_back(self, request: Request) -> None:
        """Keep the outcomes of a report that no server has executed."""

    def refresh_request(self, proves: bool = False) -> Request:
        """The request for record.lua that asks for the state. proves: it also proves that the server takes writes."""

    def read(self, document: bytes | None, policy: bytes | None, sent: float) -> bool:
        """Adopt what is stored. Returns False if a script must read it."""

    def replied(self, request: Request, reply: Reply, sent: float, read: bool = False) -> None:
        """Adopt the reply to a report. read: whether the report was sent because read() returned False."""

    def restored(self, reply: Reply, sent: float) -> None:
        """Return to Redis: it has accepted a write."""

    def announce(self, history: list[dict[str, Any]]) -> None:
        """Notify the listeners."""

    def deliver(self, events: list[Any]) -> None:
        """Call the listeners; on asyncio, in a task."""


class Link:
    """The breakers of a process that use one Redis, and whether that Redis can be used.

    timeout: the longest time in seconds that one exchange with a server takes. home: returns the node that serves a
    key; None if there is only one server. failing: the healths of what cannot be used now. undelivered: events of
    exchanges, with their breakers. held: the lines of breakers that were freed with reports that matter. ended: whether
    the process is ending, so that nothing will look at what its breakers gather. fine: the health of the breakers that
    have not failed.
    """

    def __init__(self, timeout: float, home: Callable[[bytes], Address | None] | None = None) -> None:
        self.timeout = timeout
        self.patience = LONGEST_PAUSE + 10 * timeout  # seconds after which any exchange has ended, connecting included
        self.ended = False
        self.held: collections.deque[Member] = collections.deque()
        self.wanted = False  # a breaker waits for an exchange
        self.busy_since = NEVER  # when the exchange that is under way began
        self.failing: weakref.WeakSet[Health] = weakref.WeakSet()  # a breaker that nobody holds takes its own along
        self.fine = self.new_health()
        self.undelivered: collections.deque[tuple[Any, list[Any]]] = collections.deque()
        self._home = home
        self._healths: dict[Address | None, Health] = {}
        self._used: weakref.WeakKeyDictionary[Member, None] = weakref.WeakKeyDictionary()
        self._hinted: weakref.WeakKeyDictionary[Member, None] = weakref.WeakKeyDictionary()
        self._reporting: set[Member] = set()
        self._listing = Listing()
        self._empty_since = float("inf")  # when a check first found no breaker
        self._turn = 0
        self._burst = 0, NEVER  # exchanges since when

    def after_fork(self) -> list[Member]:
        """In a child: start empty, with new healths, since a thread of the parent may hold the locks of the old ones.

        Returns the recently used breakers: calls on the fast path do not check the process id, so renew them now.
        """
        used = _alive(self._used)
        self.wanted, self.busy_since = False, NEVER
        for held in (self.failing, self.undelivered, self.held, self._used, self._hinted, self._reporting):
            held.clear()
        self._healths, self.fine = {}, self.new_health()
        self._listing.start_process()
        return used

    # Health

    def health(self, member: Member) -> Health:
        """The health of the server that serves this breaker."""
        address = None if self._home is None else self._home(member.keys.state.encode())
        return self._healths.get(address) or self._healths.setdefault(address, self.new_health())

    def new_health(self) -> Health:
        """The health of a server, node or breaker that has not failed yet."""
        return Health(self.patience, self.failing)

    def error(self, member: Member) -> BaseException | None:
        """Why this breaker cannot use Redis now; None if it can."""
        return member.trouble.error or self.health(member).error

    def failed(self, member: Member, error: BaseException) -> None:
        """Note a failed command: an outage of the breaker's server, or an error that concerns only this breaker."""
        if not concerns_server(error):
            self._trouble(member, error)
        elif self.health(member).fail(error) and not self.ended:
            logger.warning("Redis does not answer; the breakers of this process continue on their own: %s", error)

    def _trouble(self, member: Member, error: BaseException) -> None:
        if member.own_health().fail(error) and not self.ended:
            message = "circuit breaker %r: Redis refuses its commands; this process continues on its own: %s"
            logger.warning(message, member.name, error)

    def retry_is_due(self, member: Member) -> bool:
        """Whether the breaker or its server is down, and should be retried now."""
        return member.trouble.is_due() or self.health(member).is_due()

    def retry_was_abandoned(self, member: Member) -> bool:
        """Whether the last retry never ended. A short-lived event loop may end before its background retry does."""
        return member.trouble.abandoned or self.health(member).abandoned

    # Exchanges

    def is_busy(self) -> bool:
        """Whether an exchange is under way that is not overdue."""
        return age(self.busy_since, monotonic()) < self.patience

    def is_reporting(self, member: Member) -> bool:
        """Whether a report of this breaker is under way. A later failure must be counted after it."""
        return member in self._reporting

    def use(self, member: Member, hinted: bool = False) -> None:
        """Refresh this breaker until it is idle. hinted: only read it in the next exchange, even if it is fresh."""
        exits.begin()
        if self.ended:
            member.gathered(ends=True)
        if hinted:
            self._hinted[member] = None
        else:
            member.used_at = monotonic()
            self._used[member] = None
            self._empty_since = float("inf")

    def leave(self, member: Member) -> None:
        """Stop refreshing this breaker until it is used again."""
        self._used.pop(member, None)
        self._listing.left(member)

    def pause(self) -> float | None:
        """Seconds until the next check for due reports; None if no breaker is in use."""
        pauses = [member.pause() for member in [*_alive(self._used), *self.held]]
        if pauses:
            self._empty_since = float("inf")
            return max(min(*pauses, IDLE), SHORTEST_PAUSE)
        now = monotonic()
        self._empty_since = min(self._empty_since, now)
        return LAST_PAUSE if now - self._empty_since < LAST_PAUSE / 2 else None

    def rest(self) -> float:
        """Seconds to wait before the next exchange in the background: anyone can publish any number of hints."""
        (count, since), now = self._burst, monotonic()
        self._burst = (count + 1, since) if 0 <= now - since < BURST_TIME else (1, now)
        return since + BURST_TIME - now if self._burst[0] > BURST else 0.0

    def exchange(self) -> Pipelines:
        """One exchange for all breakers. Raises no error of Redis."""
        wanted, self.wanted = self.wanted, False
        self.busy_since = monotonic()
        try:
            if self.held:
                yield from self._report_held()
            hinted = {member for member in _alive(self._hinted) if self._hinted.pop(member, self) is None}
            members = [*dict.fromkeys([*_alive(self._used), *hinted])]
            if self.failing:
                yield from self._retry(members)
                down = {member for member in members if self.error(member) is not None}
                members = [member for member in members if member not in down]
                for member in down:
                    if age(member.used_at, monotonic()) > IDLE:
                        self.leave(member)
            self._reporting.update(members)  # before outcomes are taken: a failure must not overtake them
            try:
                yield from self._refresh(members, hinted, wanted)
            finally:
                self._reporting.difference_update(members)
            for member in hinted:
                if self.error(member) is not None:
                    self._hinted[member] = None  # read it after the outage
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

    def report(self, members: list[Member]) -> Pipelines:
        """Report all that these breakers have gathered, in one exchange."""
        members, sent = [member for member in members if self.error(member) is None], monotonic()
        reports = [(member, request) for member in members for request in member.gathered(self.ended)]
        replies = (yield from self._report(reports, [])) if reports else []
        for (member, request), reply in zip(reports, replies, strict=True):
            self._receive(member, request, reply, sent)
        self._collect(members)

    def _refresh(self, members: list[Member], hinted: set[Member], wanted: bool) -> Pipelines:
        sent = monotonic()
        due = {member: member.due(sent, wanted, member in hinted) for member in members}
        for member in [member for member, what in due.items() if what.idle]:
            self.leave(member)
        reports = [(member, request) for member, what in due.items() for request in what.reports]
        self._reporting.difference_update({*members} - {member for member, _ in reports})
        size = READ_AT_ONCE if self._home is None else 1  # two breakers have different slots in a cluster
        read = [member for member, what in due.items() if what.reads]
        chunks = [read[first : first + size] for first in range(0, len(read), size)]
        if reports or chunks:
            listed = self._to_list(sent)
            reads = [build.read([one.keys for one in chunk]) for chunk in chunks]
            replies = yield from self._report(reports, [*reads, *listed])
            self._listing.replied(replies[len(replies) - len(listed) :], monotonic())
            for (member, request), reply in zip(reports, replies, strict=False):
                self._receive(member, request, reply, sent)
            undecided = self._take_reads(chunks, replies[len(reports) : len(reports) + len(chunks)], sent)
            if undecided:
                yield from self._decide(members, undecided)
            if news := [member for member in members if member.news]:
                yield from self._announce(members, news)
            self._collect(members)

    def _to_list(self, now: float) -> list[Command]:
        """The commands that list this process in its fleet, if that is due, but not to nodes that are down."""
        if not self._listing.is_due(now):
            return []
        commands = self._listing.commands(_alive(self._used), now)
        if self._home is None or not self.failing:
            return commands
        healths = [self._healths.get(self._home(command.key)) for command in commands]
        return [one for one, health in zip(commands, healths, strict=True) if health is None or health.error is None]

    def _report(self, reports: list[tuple[Member, Request]], reads: list[Command]) -> Pipelines:
        """Send reports and reads. Returns their replies."""
        calls = [build.run("record", member.keys, request) for member, request in reports]
        try:
            replies = yield from self._send([*calls, *reads])
        except NotSent:
            for member, request in reports:
                member.give_back(request)
            raise
        self._reporting.difference_update(member for member, _ in reports)
        return replies

    def _send(self, commands: Sequence[Command]) -> Pipelines:
        """The replies; the error of a lost server in place of each reply that is missing."""
        try:
            return (yield commands)
        except REDIS_ERRORS as error:
            return [error] * len(commands)

    def _receive(self, member: Member, request: Request, reply: Any, sent: float, read: bool = False) -> None:
        error = reply if isinstance(reply, Exception) else None
        member.notices.script_ran("record", monotonic() - sent, error)
        if error is None:
            member.replied(request, decode(reply), sent, read)
            return
        self.failed(member, error)
        if isinstance(error, ResponseError):  # refused: the script has changed nothing
            member.give_back(request)

    def _take_reads(self, chunks: list[list[Member]], replies: list[Any], sent: float) -> list[Member]:
        """Let the breakers read what is stored. Returns the breakers that need a script to read it."""
        undecided = []
        for chunk, reply in zip(chunks, replies, strict=True):
            for place, member in enumerate(chunk):
                if isinstance(reply, Exception):
                    self.failed(member, reply)
                elif not member.read(reply[2 * place], reply[2 * place + 1], sent):
                    undecided.append(member)
        return undecided

    def _decide(self, members: list[Member], undecided: list[Member]) -> Pipelines:
        """Let the script read the documents that the breakers could not."""
        self._collect(members)
        sent, requests = monotonic(), [member.refresh_request() for member in undecided]
        pairs = list(zip(undecided, requests, strict=True))
        replies = yield from self._send([build.run("record", member.keys, request) for member, request in pairs])
        for (member, request), reply in zip(pairs, replies, strict=True):
            self._receive(member, request, reply, sent, read=True)

    def _announce(self, members: list[Member], news: list[Member]) -> Pipelines:
        """Read the history, and notify listeners of transitions by other instances."""
        self._collect(members)
        replies = yield from self._send([build.history(member.keys, 10) for member in news])
        for member, reply in zip(news, replies, strict=True):
            if not isinstance(reply, REDIS_ERRORS):  # else the next exchange asks again
                member.announce(history_fields(reply))

    def _collect(self, members: list[Member]) -> None:
        """Take the new events of the breakers, before another task of this thread does."""
        for member in members:
            if events := member.notices.take():
                self.undelivered.append((member, events))

    def deliver(self) -> None:
        """Deliver the events of exchanges, in order."""
        while True:
            try:
                member, events = self.undelivered.popleft()
            except IndexError:  # several threads may deliver at once
                return
            try:
                member.deliver(events)
            except BaseException:  # such as a listener's SystemExit
                logger.exception("a listener ended its thread")

    # Retries

    def _retry(self, members: list[Member]) -> Pipelines:
        """Retry each server that is down until one of its breakers gets an answer, then all its other breakers.

        Each breaker is asked alone, by a script that writes: a server that is full still answers reads, and one huge
        value must not starve the others. Each retry begins with another breaker.
        """
        down: dict[Health, list[Member]] = {}
        for member in members:
            health = self.health(member)
            health = member.trouble if health.error is None else health
            if health.error is not None:
                down.setdefault(health, []).append(member)
        for health, concerned in down.items():
            if not health.claim():
                continue
            try:
                yield from self._retry_one(health, concerned)
            except BaseException:
                health.give_up()
                raise

    def _retry_one(self, health: Health, members: list[Member]) -> Pipelines:
        self._turn += 1
        first = self._turn % len(members)
        for member in [*members[first:], *members[:first]]:
            sent = monotonic()
            (reply,) = yield from self._send([build.run("record", member.keys, member.refresh_request(proves=True))])
            error = reply if isinstance(reply, Exception) else None
            member.notices.script_ran("record", monotonic() - sent, error)
            if error is None:
                if health.error is not None:
                    health.retried(failed=False)
                    logger.warning("Redis answers again")
                member.trouble.retried(failed=False)
                member.restored(decode(reply), sent)
                self._collect(members)
            elif health.error is None or not concerns_server(error):
                self._trouble(member, error)
            else:
                break
        if health.error is not None:
            health.retried(failed=True)


def _alive(members: weakref.WeakKeyDictionary[Member, Any]) -> list[Member]:
    """The members of a dictionary that other threads may change meanwhile."""
    return [member for reference in members.keyrefs() if (member := reference()) is not None]
