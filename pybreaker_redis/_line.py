"""A breaker's line: what an exchange of the link takes from the breaker, and what the breaker makes of the replies."""

from __future__ import annotations

import random
import re
from os import getpid
from time import monotonic
from typing import Any, NamedTuple

from ._clock import NEVER, age
from ._config import OnRedisFailure
from ._core import BreakerCore
from ._memory import FixedEngine, LocalEngine
from ._policy import DEFAULTS
from ._protocol import NOTES, Reply, Request, read_document, read_map, read_window, without_about
from ._view import Seen
from .wire.outage import LONGEST_PAUSE, Outage

IDLE = 10.0  # seconds after its last call for which a breaker is refreshed
USUAL_PAUSE = 0.1  # seconds between two checks of a breaker without a lease, while Redis is down
_NO_OVERRIDE: tuple[bytes | None, Reply, float] = None, {}, NEVER


class Texts(NamedTuple):
    """What Redis stores for a breaker: its document and its policy override; None where nothing is stored."""

    document: bytes | None
    policy: bytes | None


class Due(NamedTuple):
    """What a breaker needs from an exchange.

    reports: requests for record.lua. reads: whether to read its keys. idle: whether to refresh it no more, because it
    has not been called for IDLE.
    """

    reports: list[Request]
    reads: bool
    idle: bool


class Line:
    """A breaker as a member of its process's link, which calls these methods.

    key: the breaker's state key. mode: its on_redis_failure. listed: whether to list the breaker in the fleet.
    used_at: when the breaker last asked for a refresh. refusal: why Redis refuses its commands, or None. local: the
    engine that decides while Redis is down, or None. news: a transition by another instance, of which the listeners
    must still be notified, or None.
    """

    __slots__ = (
        *("breaker", "key", "view", "notices", "listed", "used_at", "refusal", "local", "news", "_mode"),
        *("_known", "_policy", "_keeps_window", "_renewed_at", "_renew_after", "__weakref__"),
    )

    def __init__(self, breaker: BreakerCore, mode: OnRedisFailure, listed: bool) -> None:
        self.breaker, self.key = breaker, breaker._key
        self.view, self.notices = breaker._view, breaker._notices
        self.listed, self._mode = listed, mode
        self.start_process()

    def start_process(self) -> None:
        """Start anew, also in a forked child."""
        self.used_at = NEVER
        self.refusal: Outage | None = None
        self.local: LocalEngine | FixedEngine | None = None
        # the texts that the view agrees with, that view, since when they agree, and for how many seconds
        self._known: tuple[Texts, Seen, float, float] | None = None
        # the stored text of a policy override, what a reply said about it, and when
        self._policy = _NO_OVERRIDE
        self._keeps_window = False  # in Redis, whichever client asked for the window
        self._renewed_at, self._renew_after = NEVER, 0.0  # the TTL
        self.news: dict[str, Any] | None = None

    # Outages

    def refuse(self, outage: Outage) -> bool:
        """Note that Redis refuses the commands of this breaker. Returns whether that is new."""
        with self.view.lock:
            is_new = self.refusal is None
            self.refusal = self.refusal or outage
            return is_new

    def engine(self, error: BaseException | None) -> LocalEngine | FixedEngine | None:
        """Begin or end an outage, unless it is known. Returns the engine that decides meanwhile.

        error: why the breaker cannot use Redis now; None if it can.
        """
        if error is None:
            self._return(None)
        elif self.local is None:
            fixed = FixedEngine(self._mode, round(LONGEST_PAUSE * 1000)) if self._mode != "local" else None
            self.local = fixed or self.breaker._last_known()
            self.notices.redis_down(error)
        return self.local

    def restored(self, reply: Reply, sent: float) -> None:
        """Return to Redis: it has accepted a write."""
        with self.view.lock:
            self._return(sent)
        self.replied({}, reply, sent)

    def _return(self, since: float | None) -> None:
        if self.local is not None:
            self.local = self._known = None
            self.view.drop(since)
            self.notices.redis_up()

    # Reports

    def pause(self) -> float:
        """Seconds between two checks for due reports."""
        lease = self.view.lease or USUAL_PAUSE
        return min(lease, self.view.policy.window / 10) if self._wants_window() else lease

    def due(self, now: float, wanted: bool, hinted: bool) -> Due:
        """Take the reports that are due. wanted: a refresh is needed, so join it. hinted: read the keys in any case."""
        view = self.view
        seen, keeps_window = view.seen, self._wants_window()
        if view.lease <= 0:  # each call asks Redis
            return Due([], False, True)
        is_due = view.is_due(now, keeps_window) or self.breaker._slow_calls.first_overdue() is not None
        # an open circuit is refreshed until its time is over: calls that are rejected are not counted in the view
        rejects = seen.state != "closed" and seen.left(seen.retry_at + IDLE, now) > 0
        unused = min(age(self.used_at, monotonic()), age(seen.counter.grown_at, monotonic()))
        quiet = unused > IDLE and not rejects and not hinted
        read_for = age(seen.sent, monotonic())
        idle = quiet and read_for >= view.lease  # a younger view serves calls that the link does not see
        must_renew = self._renewed_at > NEVER and age(self._renewed_at, monotonic()) >= self._renew_after
        if idle:  # keep little: there may be a breaker for each of many tenants
            self._known = None
        reports: list[Request] = []
        if is_due or must_renew or (idle and keeps_window):
            reports = self._take(must_renew, as_it_ends=True)
        stale = wanted and not quiet and read_for >= view.lease / 2
        if stale and seen.sent == NEVER and self.used_at > NEVER:  # the first call creates the document
            return Due([*reports, self.refresh_request()], False, idle)
        return Due(reports, hinted or stale, idle)

    def gathered(self, ends: bool = False) -> list[Request]:
        """Take all that is gathered as reports. ends: the process ends: take only what matters, and stop gathering."""
        view = self.view
        if view.lease <= 0:
            return []
        reports = self._take() if not ends or self._has_news() else []
        if ends:
            view.end()
        return reports

    def _has_news(self) -> bool:
        """Whether anything is gathered that matters to Redis."""
        view, now = self.view, monotonic()
        with view.lock:  # only one thread may read a counter
            grown = self._wants_window() and view.seen.counter.look(now) > 0
        return grown or view.is_due(now, False) or self.breaker._slow_calls.first_overdue() is not None

    def __del__(self) -> None:
        # The breaker is not in use any more: the link holds it until it has reported what is gathered. A child leaves
        # that to its parent, one of whose threads may hold a lock.
        is_ours = self.breaker._pid == getpid()
        if is_ours and self.view.lease > 0 and self.local is None and self._has_news():
            self.breaker._redis.link.held.append(self)

    def _take(self, renews: bool = False, as_it_ends: bool = False) -> list[Request]:
        """Take what is gathered as reports. renews: also an empty one, to renew the TTL. as_it_ends: see View.take."""
        *reports, last = self.breaker._reports(as_it_ends=as_it_ends)
        if len(last) > 1 or renews:
            reports.append(last)
        return [self.breaker._complete("record", request) for request in reports if request["generation"] > 0]

    def _wants_window(self) -> bool:
        return self._keeps_window or self.view.policy._keeps_window

    def renewed(self) -> None:
        """Note that a script has renewed the TTL, and choose when to renew it next, well before the key expires."""
        ttl = self.view.policy.ttl or DEFAULTS["ttl"]
        self._renewed_at, self._renew_after = monotonic(), ttl * random.uniform(0.25, 0.5)

    # Refreshes

    def refresh_request(self, proves: bool = False) -> Request:
        """The request for record.lua that asks for the state. proves: it also proves that the server takes writes."""
        seen, request = self.view.seen, self.breaker._with_policy
        if proves or seen.generation <= 0 or seen.state != "closed":
            return request
        # a closed circuit goes on under this generation if another program rewrites its document without one
        return {**request, "generation": seen.generation}

    def read(self, document: bytes | None, policy: bytes | None, sent: float) -> Texts | None:
        """Adopt what is stored. Returns it if a script must read it."""
        if self.local is not None:  # an outage began meanwhile: only a write can end it
            return None
        if document is None and self.view.seen.generation == 0:  # a hint, before the first call
            return None
        texts, now = Texts(document, policy), monotonic()
        override: Reply | None = {} if policy is None else self._override_in(policy, now)
        kept = self._known  # another event loop may drop it meanwhile
        if kept is not None and override is not None and override.get("override") == self.breaker._override:
            known, seen, since, length = kept
            if known == texts and age(since, now) < length and self.view.extend(seen, sent):
                return None
        window = read_window(document)
        self._keeps_window = bool(window)
        reply = None if override is None else read_document(document)
        if override is None or reply is None:
            return texts
        self._take_over({}, {**reply, **window, **override}, sent, texts)
        return None

    def _override_in(self, policy: bytes, now: float) -> Reply | None:
        """The fields of a reply that describe a stored policy override. None if a script must read it."""
        text, said, since = self._policy
        if policy != text:
            return None
        if "override_left_ms" not in said:
            return said
        left_ms = said["override_left_ms"] - 1000 * age(since, now)
        return {**said, "override_left_ms": left_ms} if left_ms > 0 else None

    def replied(self, request: Request, reply: Reply, sent: float, texts: Texts | None = None) -> None:
        """Adopt the reply to a report. texts: which the script was to read, if read() has returned them."""
        if self.local is not None:  # the request was sent before an outage began
            return
        reply["source"] = "redis"
        self.renewed()
        if texts is None or not _says(texts, reply):
            self._take_over(request, reply, sent, None)
            return
        said: Reply = {key: reply[key] for key in ("override", "override_left_ms") if key in reply}
        self._policy = texts.policy, said, monotonic()
        self._take_over(request, {**reply, **read_window(texts.document)}, sent, texts)

    def _take_over(self, request: Request, reply: Reply, sent: float, texts: Texts | None) -> None:
        """Make a reply the view. texts: the stored texts that say the same."""
        breaker, before = self.breaker, self.view.seen
        self._known = None
        if not breaker._adopt_fleet(request, reply, sent):
            return
        seen = self.view.seen
        if texts is not None and seen.generation == reply["generation"]:
            now = monotonic()
            length = reply["forced_left_ms"] / 1000 if "forced_left_ms" in reply else float("inf")
            self._known = texts, seen, now, length if seen.state == "closed" else seen.left(seen.retry_at, now)
        watches = breaker._watch is not None and self.notices.listeners
        if watches and 0 < before.generation < seen.generation and "transition" not in reply:
            self.news = {"from": before.state, "to": seen.state, "reason": None, "generation": seen.generation}

    # Other instances' transitions

    def announce(self, history: list[dict[str, Any]]) -> None:
        """Notify the listeners of the news. history: the newest transitions, newest first."""
        with self.view.lock:
            change, self.news = self.news, None
        if change is None:  # another event loop has read the history, too
            return
        # the oldest entry of the generation: a new end for a forced state adds entries to it, as other actions do
        known = (entry for entry in reversed(history) if entry.get("generation") == str(change["generation"]))
        entry = next((entry for entry in known if entry.get("reason") not in NOTES), {"instance": ""})
        if entry["instance"] != self.notices.instance:  # our own transition comes with the reply that it caused
            # scripts write decimal numbers
            change |= {key: int(value) if re.fullmatch("[0-9]{1,16}", value) else value for key, value in entry.items()}
            self.notices.changed(change, "watch", entry["instance"])


def _says(texts: Texts, reply: Reply) -> bool:
    """Whether a script's reply agrees with these texts, rather than with something stored a moment later."""
    document, override = texts.document or b"", reply.get("override")
    numbers = b',"generation":%d,"failure_number":%d' % (reply["generation"], reply["failure_number"])
    if not document.startswith(b'{"state":"%b"' % reply["state"].encode()) or numbers not in document:
        return False
    stored = read_map(texts.policy)
    # a corrupt policy override is not in force
    return override == (stored and without_about(stored))
