"""A breaker's line: the breaker as a member of the link, and the engine that takes over while Redis is down."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from time import monotonic
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from ._clock import NEVER, age
from ._events import Notices
from ._memory import LocalEngine
from ._policy import DEFAULTS, Policy
from ._process import renew
from ._protocol import ABOUT_OVERRIDE, NOTES, Keys, Reply, Request, State, read_document, read_map, read_window
from ._slow import SlowCalls
from ._view import Seen, View
from .wire.link import IDLE, LONGEST_PAUSE, Due, Health, Link
from .wire.listing import Given

USUAL_PAUSE = 0.1  # seconds between two checks of a breaker without a lease, while Redis is down
OnRedisFailure: TypeAlias = Literal["local", "open", "closed"]
_NO_OVERRIDE: tuple[bytes | None, Reply, float] = None, {}, NEVER


class Texts(NamedTuple):
    """What Redis stores for a breaker: its document and its policy override; None where nothing is stored."""

    document: bytes | None
    policy: bytes | None


class FixedEngine:
    """Admits every call or rejects every call, and counts nothing."""

    source = "local"

    def __init__(self, state: State, retry_after_ms: int) -> None:
        self._state, self._retry_after_ms = state, retry_after_ms

    def run(self, name: str, request: Request) -> Reply:
        """The same reply to every script call."""
        return {
            "admitted": self._state == "closed",
            "applied": False,
            "state": self._state,
            "generation": -1,
            "failure_count": 0,
            "failure_number": 0,
            "success_count": 0,
            "retry_after_ms": self._retry_after_ms if self._state == "open" else None,
            "source": self.source,
        }


class Owner(Protocol):
    """A breaker, as far as its line is concerned."""

    _prefix: str
    _instance: str
    _pid: int
    _view: View
    _notices: Notices
    _slow_calls: SlowCalls
    _override: dict[str, Any] | None
    _watch: Any

    @property
    def name(self) -> str: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def host(self) -> str: ...
    @property
    def keys(self) -> Keys: ...
    @property
    def _with_policy(self) -> Request: ...

    def _after_fork(self) -> None: ...
    def _last_known(self) -> LocalEngine: ...
    def _deliver_events(self, events: list[Any]) -> None: ...
    def _reports(self, generation: int | None = None, as_it_ends: bool = False) -> list[Request]: ...
    def _complete(self, name: str, request: Request) -> Request: ...
    def _adopt_fleet(self, request: Request, reply: Reply, sent: float) -> bool: ...


class Line:
    """A breaker as a member of its process's link; wire.link.Member describes the methods.

    mode: the breaker's on_redis_failure. listed: whether to list the breaker in the fleet.
    """

    __slots__ = (
        *("_owner", "_server", "_mode", "_listed", "_link", "used_at", "trouble", "local", "news", "_texts", "_known"),
        *("_policy", "_keeps_window", "_renewed_at", "_renew_after", "__weakref__"),
    )

    def __init__(self, owner: Owner, server: Any, mode: OnRedisFailure, listed: bool) -> None:
        self._owner, self._server, self._mode, self._listed = owner, server, mode, listed
        self._link: Link = server.link
        self._start_process()

    def _start_process(self) -> None:
        self.used_at = NEVER
        self.trouble: Health = self._link.fine
        self.local: LocalEngine | FixedEngine | None = None
        self._texts: Texts | None = None  # as last read
        # the texts that the view agrees with, that view, since when they agree, and for how many seconds
        self._known: tuple[Texts, Seen, float, float] | None = None
        # the stored text of a policy override, what a reply said about it, and when
        self._policy = _NO_OVERRIDE
        self._keeps_window = False  # in Redis, whichever client asked for the window
        self._renewed_at, self._renew_after = NEVER, 0.0  # the TTL
        self.news: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self._owner.name

    @property
    def keys(self) -> Keys:
        return self._owner.keys

    @property
    def notices(self) -> Notices:
        return self._owner._notices

    @property
    def given(self) -> Given | None:
        owner = self._owner
        return Given(owner._prefix, owner.host, _given_in(owner.policy)) if self._listed else None

    def renew(self) -> None:
        renew(self._owner)

    def after_fork(self) -> None:
        """In a child: start anew, with new locks, since a thread of the parent may hold the old ones."""
        self._start_process()

    # Outages

    def own_health(self) -> Health:
        with self._owner._view.lock:
            if self.trouble is self._link.fine:
                self.trouble = self._link.new_health()
            return self.trouble

    def engine(self) -> LocalEngine | FixedEngine | None:
        """The engine that decides in this process while Redis is down; None while Redis decides."""
        if self.local is None and not self._link.failing:  # the usual case, at no cost
            return None
        with self._owner._view.lock:
            error = self._link.error(self)
            if error is None:
                self._return(None)
            elif self.local is None:
                fixed = FixedEngine(self._mode, round(LONGEST_PAUSE * 1000)) if self._mode != "local" else None
                self.local = fixed or self._owner._last_known()
                self._owner._notices.redis_down(error)
            elif self._link.retry_is_due(self):
                self._server.soon(self)
            return self.local

    def must_wait_for_retry(self) -> bool:
        """Whether a call must wait for the retry, because the last retry in the background did not end."""
        return self._link.retry_is_due(self) and self._link.retry_was_abandoned(self)

    def _return(self, since: float | None) -> None:
        if self.local is not None:
            self.local = self._known = None
            self._owner._view.drop(since)
            self._owner._notices.redis_up()

    def restored(self, reply: Reply, sent: float) -> None:
        with self._owner._view.lock:
            self._return(sent)
        self.replied({}, reply, sent)

    # Reports

    def pause(self) -> float:
        lease = self._owner._view.lease or USUAL_PAUSE
        return min(lease, self._owner._view.policy.window / 10) if self._wants_window() else lease

    def due(self, now: float, wanted: bool, hinted: bool) -> Due:
        owner, view = self._owner, self._owner._view
        seen, keeps_window = view.seen, self._wants_window()
        if view.lease <= 0:  # each call asks Redis
            return Due([], False, True)
        is_due = view.is_due(now, keeps_window) or owner._slow_calls.any_overdue()
        # an open circuit is refreshed until its time is over: calls that are rejected are not counted in the view
        rejects = seen.state != "closed" and seen.left(seen.retry_at + IDLE, now) > 0
        unused = min(age(self.used_at, monotonic()), age(seen.counter.grown_at, monotonic()))
        quiet = unused > IDLE and not rejects and not hinted
        idle = quiet and seen.age() >= view.lease  # until then calls rely on the view, unseen by the link
        must_renew = self._renewed_at > NEVER and age(self._renewed_at, monotonic()) >= self._renew_after
        if idle:  # it may be one of many tenants
            self._texts = self._known = None
        reports: list[Request] = []
        if is_due or must_renew or (idle and keeps_window):
            reports = self._take(must_renew, as_it_ends=True)
        stale = wanted and not quiet and seen.age() >= view.lease / 2
        if stale and seen.sent == NEVER and self.used_at > NEVER:  # the first call creates the document
            return Due([*reports, self.refresh_request()], False, idle)
        return Due(reports, hinted or stale, idle)

    def gathered(self, ends: bool = False) -> list[Request]:
        view = self._owner._view
        if view.lease <= 0:
            return []
        reports = self._take() if not ends or self._has_news() else []
        if ends:
            view.end()
        return reports

    def _has_news(self) -> bool:
        """Whether anything is gathered that matters to Redis."""
        view, now = self._owner._view, monotonic()
        grown = self._wants_window() and view.seen.counter.look(now) > 0
        return grown or view.is_due(now, False) or self._owner._slow_calls.any_overdue()

    def __del__(self) -> None:
        # the breaker is not in use any more: the link holds it until it has reported what is gathered
        if not self._link.ended and self._owner._view.lease > 0 and self.local is None and self._has_news():
            self._link.held.append(self)

    def _take(self, renews: bool = False, as_it_ends: bool = False) -> list[Request]:
        """Take what is gathered as reports. renews: even an empty one, to renew the TTL. as_it_ends: see View.take."""
        *reports, last = self._owner._reports(as_it_ends=as_it_ends)
        if len(last) > 1 or renews:
            reports.append(last)
        return [self._owner._complete("record", request) for request in reports if request["generation"] > 0]

    def _wants_window(self) -> bool:
        return self._keeps_window or self._owner._view.policy.keeps_window

    def give_back(self, request: Request) -> None:
        self._owner._view.give_back(request)

    def asked(self) -> None:
        """A caller has run a script."""
        if self._owner._view.lease > 0:
            self._link.use(self)
            self._renewed()

    def _renewed(self) -> None:
        """A script has renewed the TTL. The next renewal is due at a random time, well before the key expires."""
        ttl = self._owner._view.policy.ttl or DEFAULTS["ttl"]
        self._renewed_at, self._renew_after = monotonic(), ttl * random.uniform(0.25, 0.5)

    # Refreshes

    def refresh_request(self, proves: bool = False) -> Request:
        owner = self._owner
        seen = owner._view.seen
        if proves or seen.generation <= 0 or seen.state != "closed":
            return owner._with_policy
        # a closed circuit goes on under this generation if another program rewrites its document without one
        return {**owner._with_policy, "generation": seen.generation}

    def read(self, document: bytes | None, policy: bytes | None, sent: float) -> bool:
        if self.local is not None:  # an outage began meanwhile: only a write can end it
            return True
        if document is None and self._owner._view.seen.generation == 0:  # a hint, before the first call
            return True
        texts, view, now = Texts(document, policy), self._owner._view, monotonic()
        override = self._override_in(policy, now)
        if self._known is not None and override is not None and override.get("override") == self._owner._override:
            known, seen, since, length = self._known
            if known == texts and age(since, now) < length and view.extend(seen, sent):
                return True
        self._texts, window = texts, read_window(document)
        self._keeps_window = bool(window)
        reply = None if override is None else read_document(document)
        if override is None or reply is None:
            return False
        self._take_over({}, {**reply, **window, **override}, sent, texts)
        return True

    def _override_in(self, policy: bytes | None, now: float) -> Reply | None:
        """The fields of a reply that describe a stored policy override. None if a script must read it."""
        text, said, since = self._policy
        if policy is None or policy != text:
            return {} if policy is None else None
        if "override_left_ms" not in said:
            return said
        left_ms = said["override_left_ms"] - 1000 * age(since, now)
        return {**said, "override_left_ms": left_ms} if left_ms > 0 else None

    def replied(self, request: Request, reply: Reply, sent: float, read: bool = False) -> None:
        if self.local is not None:  # the request was sent before an outage began
            return
        reply["source"] = "redis"
        self._renewed()
        texts, self._texts = self._texts, None
        if not read or texts is None or not _says(texts, reply):
            self._take_over(request, reply, sent, None)
            return
        said: Reply = {key: reply[key] for key in ("override", "override_left_ms") if key in reply}
        self._policy = texts.policy, said, monotonic()
        self._take_over(request, {**reply, **read_window(texts.document)}, sent, texts)

    def _take_over(self, request: Request, reply: Reply, sent: float, texts: Texts | None) -> None:
        """Make a reply the view. texts: the stored texts that say the same."""
        owner, before = self._owner, self._owner._view.seen
        self._known = None
        if not owner._adopt_fleet(request, reply, sent):
            return
        seen = owner._view.seen
        if texts is not None and seen.generation == reply["generation"]:
            now = monotonic()
            length = reply["forced_left_ms"] / 1000 if "forced_left_ms" in reply else float("inf")
            self._known = texts, seen, now, length if seen.state == "closed" else seen.left(seen.retry_at, now)
        if 0 < before.generation < seen.generation and owner._watch is not None and "transition" not in reply:
            self.news = {"from": before.state, "to": seen.state, "reason": None, "generation": seen.generation}

    # Other instances' transitions

    def announce(self, history: list[dict[str, Any]]) -> None:
        change, self.news = self.news, None
        assert change is not None
        # the oldest entry of the generation: a new end for a forced state adds entries to it, as other actions do
        known = (entry for entry in reversed(history) if entry.get("generation") == str(change["generation"]))
        entry = next((entry for entry in known if entry.get("reason") not in NOTES), {"instance": ""})
        if entry["instance"] != self._owner._instance:  # our own transition comes with the reply that it caused
            # scripts write decimal numbers
            change |= {key: int(value) if re.fullmatch("[0-9]{1,16}", value) else value for key, value in entry.items()}
            self._owner._notices.changed(change, "watch", entry["instance"])

    def deliver(self, events: list[Any]) -> None:
        self._owner._deliver_events(events)


@functools.lru_cache(maxsize=1000)
def _given_in(policy: Policy) -> str:
    """The fields of a policy that differ from the defaults, as JSON, for people."""
    given = dataclasses.asdict(policy)
    return json.dumps({name: value for name, value in given.items() if value != DEFAULTS[name]}, separators=(",", ":"))


def _says(texts: Texts, reply: Reply) -> bool:
    """Whether a script's reply agrees with these texts, rather than with something stored a moment later."""
    document, override = texts.document or b"", reply.get("override")
    numbers = b',"generation":%d,"failure_number":%d' % (reply["generation"], reply["failure_number"])
    if not document.startswith(b'{"state":"%b"' % reply["state"].encode()) or numbers not in document:
        return False
    stored = read_map(texts.policy)
    # a corrupt policy override is not in force
    return override == (stored and {name: stored[name] for name in stored if name not in ABOUT_OVERRIDE})
