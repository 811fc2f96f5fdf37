"""Runs scripts in Redis or, in memory and while Redis is down, in an engine of this process. Takes over the replies."""

from __future__ import annotations

from time import monotonic
from typing import Any, TypeAlias

from ._clock import NEVER, Clock, age, machine
from ._events import Notices, logger
from ._isolation import Isolation
from ._memory import FixedEngine, LocalEngine, MemoryEngine, clock_ms, document_for
from ._policy import Policy, shared_request
from ._protocol import NotSent, Reply, Request, Steps, keys_with, seconds
from ._view import View
from .wire.options import REDIS_ERRORS

Engine: TypeAlias = MemoryEngine | FixedEngine
_NO_OVERRIDE = NEVER, float("inf")
_NEEDS_POLICY = frozenset({"failures", "slow", "hold_ms", "probe", "counted"})
_OUTCOMES = {"generation", "successes", "seen_failure", "age_ms", *_NEEDS_POLICY, "pending", "error"}


class Runner:
    """Runs the scripts of one breaker, and keeps what the replies say: its view, and the policy in force."""

    __slots__ = (
        *("_name", "_key", "_policy", "_view", "_notices", "_now", "_redis", "_memory", "_line", "_isolation"),
        *("_given", "_judges_successes", "_override", "_override_end", "_obeyed"),
        *("_warned", "_warned_of_window", "_corrupt_documents"),
    )

    def __init__(
        self, name: str, key: bytes, policy: Policy, lease: float, clock: Clock | None, notices: Notices, server: Any
    ) -> None:
        self._name, self._key, self._notices = name, key, notices
        self._now = machine if clock is None else clock.monotonic
        # clock= needs a lease of 0: then no call takes the fast path, which reads the machine's clock
        self._view = View(float(lease) if clock is None else 0.0, policy, self._now)
        self._isolation = Isolation(self._view, notices)
        # one of the two: the state machine in this process, or the server and the breaker's line to it
        now_ms = clock_ms if clock is None else clock.now_ms
        self._memory = MemoryEngine(now_ms, quorum_of_one=True, lock=self._view.lock) if server is None else None
        self._redis = server
        self._line: Any = None
        self._override: dict[str, Any] | None = None  # the policy override, as last read
        self._override_end = _NO_OVERRIDE  # when it was read, and how many seconds it then had left
        self._obeyed = NEVER  # when the request of the last obeyed reply was sent
        self._follow(policy)
        self._warned: str | None = None
        self._warned_of_window = False
        self._corrupt_documents = 0

    def _follow(self, policy: Policy) -> None:
        """Follow another policy of this process from now on."""
        self._policy = policy
        self._given, self._judges_successes = shared_request(policy)
        self._put_in_force(self._override)

    # Running a script

    def _own_engine(self) -> Engine | None:
        """The engine that decides in this process: in memory, or while Redis is down. None while Redis decides."""
        if self._line is None:
            return self._memory
        engine: Engine | None = self._redis.link.engine(self._line)
        if engine is not None and self._redis.link.due_outage(self._line) is not None:
            self._redis.soon(self._line)
        return engine

    @property
    def _with_policy(self) -> Request:
        """The policy and the instance, as a request."""
        instance = self._notices.instance
        return {"instance": instance, "policy": self._given} if self._given else {"instance": instance}

    def _complete(self, name: str, request: Request) -> Request:
        """Add the policy and the instance. A report of only successes omits them, unless a field matters to it:
        parsing them costs the script time."""
        plain = name == "record" and "generation" in request and _NEEDS_POLICY.isdisjoint(request)
        omits_policy = plain and not self._override and not self._judges_successes
        return {**request} if omits_policy else {**self._with_policy, **request}

    def _run(self, name: str, request: Request) -> Steps[Reply]:
        """Call a script. Its reply becomes the view, and its transition an event."""
        if (engine := self._own_engine()) is not None:
            return self._run_on(engine, name, request)
        sent = monotonic()
        reply: Reply | None = None
        try:
            if name == "acquire" and self._isolation.state != "closed":
                fleet = yield from self._ask_redis("record", self._with_policy)
                reply = self._isolation.admit(fleet, self._complete(name, request))
            if reply is None:
                fleet = yield from self._ask_redis(name, self._complete(name, request))
                reply = self._isolated(request, fleet)
        except NotSent:
            self._view.give_back(request)
            raise
        except REDIS_ERRORS as error:
            self._redis.link.failed(self._line, error)
            # the outage may be over already, but a report is never repeated
            return self._run_on(self._own_engine() or self._last_known(), name, request)
        self._adopt(reply, sent)
        return reply

    def _run_on(self, engine: Engine, name: str, request: Request) -> Reply:
        """Let an engine of this process run a script."""
        sent, complete = self._now(), {**self._with_policy, **request}
        complete.pop("seen_failure", None)  # the number is the fleet's; in this engine, all outcomes come in order
        reply = engine.run(name, complete)
        self._isolation.forget()
        if self._override is not None or "override" in reply:  # else, in this process, there is nothing to put in force
            self._obey(reply, sent)
        seen = self._view.seen
        news = "transition" in reply or reply["generation"] != seen.generation or self._override is not None
        # only this process changes the state: under the generation of a closed view, a reply says nothing new
        if news or not seen.sent <= sent < seen.closed_until:
            self._adopt(reply, sent)
        return reply

    def _ask_redis(self, name: str, request: Request) -> Steps[Reply]:
        """Let Redis run a script. Raises errors of redis-py."""
        if request.get("generation", 0) < 0:  # of a local engine: Redis does not know it
            request = {key: value for key, value in request.items() if key not in _OUTCOMES}
        began = monotonic()
        try:
            reply: Reply = yield name, request
        except REDIS_ERRORS as error:
            self._notices.script_ran(name, monotonic() - began, error)
            raise
        if self._notices.instruments:
            self._notices.script_ran(name, monotonic() - began, None)
        if self._view.lease > 0:
            self._redis.link.asked(self._line)
        reply["source"] = "redis"
        self._obey(reply, began)
        return reply

    def _adopt(self, reply: Reply, sent: float) -> bool:
        """Take over a reply. Returns whether it became the view."""
        adopted = self._view.adopt(reply, sent)
        if self._warned or "warning" in reply:
            self._check(reply)
        if "window_ms" in reply and not self._warned_of_window:
            self._check_window(reply["window_ms"] / 1000)
        if change := reply.get("transition"):
            logger.info("circuit breaker %r: %s -> %s (%s)", self._name, change["from"], change["to"], change["reason"])
            self._notices.changed(change, reply["source"])
        return adopted

    def _adopt_fleet(self, request: Request, reply: Reply, sent: float) -> bool:
        """_adopt() for a reply that the link has received, or a document that it has read."""
        self._obey(reply, sent)
        return self._adopt(self._isolated(request, reply), sent)

    def _isolated(self, request: Request, fleet: Reply) -> Reply:
        """The fleet's reply; while this instance is isolated, its own."""
        if self._view.policy.quorum > 1:
            return self._isolation.applied(request, fleet, self._with_policy)
        self._isolation.forget()
        return fleet

    def _obey(self, reply: Reply, sent: float) -> None:
        """Put the policy override of a reply in force, unless a newer reply is known."""
        if reply["source"] == "local":
            return
        with self._view.lock:
            override, latest, now = reply.get("override"), self._view.seen.sent, self._now()
            if sent < self._obeyed <= now or sent < latest <= now:
                return
            self._obeyed = sent
            if override is not None:
                self._override_end = now, seconds(reply.get("override_left_ms")) or float("inf")
            if override != self._override:
                self._put_in_force(override)

    def _end_override(self) -> None:
        """End the policy override when its time is over, without waiting for Redis to say so."""
        with self._view.lock:
            if self._override_left() <= 0:
                self._put_in_force(None)

    def _put_in_force(self, override: dict[str, Any] | None) -> None:
        self._override = override
        self._view.policy = self._policy._with_override(override)

    def _override_left(self) -> float:
        """Seconds until the policy override ends; infinite if it was given no end."""
        since, left = self._override_end
        return left if left == float("inf") else left - age(since, self._now())

    def _check(self, reply: Reply) -> None:
        warning = reply.get("warning")
        if warning:
            self._corrupt_documents += 1
        if warning and warning != self._warned:  # log it once, not for every call
            keys = keys_with(self._key.decode())
            key = keys.policy if warning == "corrupt_policy" else keys.state
            logger.warning("circuit breaker %r: %s under key %r", self._name, warning, key)
        self._warned = warning

    def _check_window(self, kept: float) -> None:
        """Warn once if another client's window is kept instead of this policy's."""
        policy = self._view.policy
        if policy._keeps_window and policy.window < kept:
            self._warned_of_window = True
            logger.warning(
                "circuit breaker %r: the window is the last %g s, the longest that a client asks for, not %g s as"
                " this policy says",
                self._name,
                kept,
                policy.window,
            )

    def _last_known(self) -> LocalEngine:
        """An engine that starts from the view."""
        seen, now = self._view.seen, monotonic()
        open_for = seen.left(seen.retry_at, now) if seen.state == "open" else 0.0
        forced_for = seen.left(seen.forced_until, now)
        forced = seen.forced if forced_for > 0 else None
        left = self._override_left()
        return LocalEngine(
            document=document_for(
                seen.state, seen.generation, seen.failure_count, open_for, forced, forced_for, seen.reason, seen.error
            ),
            override=self._override,
            override_until_ms=None if left == float("inf") else clock_ms() + round(max(left, 0.0) * 1000),
            quorum_of_one=True,
        )
