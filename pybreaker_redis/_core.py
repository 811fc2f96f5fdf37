"""The decisions of both breakers, without I/O: generators that yield an Ask for each script that Redis must run."""

from __future__ import annotations

import inspect
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any, TypeVar

from . import _protocol
from ._classify import FAILURE, IGNORED, SUCCESS, Classifier, Exceptions, Outcome, exception_types
from ._config import check_options, check_watch
from ._errors import CircuitOpenError, PolicyError
from ._events import Counts, Listener, Notices, logger
from ._fallback import Fallback, InMemory, OnRedisFailure
from ._isolation import Isolation
from ._memory import LocalEngine, document_for
from ._permit import BasePermit, in_probe, resource_warnings_are_shown
from ._policy import RULES, Policy, override_request, request_field
from ._protocol import NotSent, Reply, Request, Snapshot, State, Steps, seconds
from ._slow import SlowCalls
from ._view import Verdict, View
from .wire.options import BLOCKING, Kind, client_of
from .wire.subscription import BaseWatch

W = TypeVar("W", bound=BaseWatch)
_breakers: weakref.WeakSet[BreakerCore] = weakref.WeakSet()


_NEWS = {"override", "transition"}


class BreakerCore:
    """Options, view and decisions of one breaker. The shells, _sync and _async, add the I/O. See CircuitBreaker."""

    # set by the shell
    _permit: type[BasePermit]
    _warning_permit: type[BasePermit]
    _kind: Kind
    _server_of: Callable[[Any, float], Any]
    _in_background: Callable[[Steps[None]], None]

    def __init__(
        self,
        name: str,
        *,
        redis: Any = None,
        policy: Policy | None = None,
        lease: float = 0.1,
        failures: Exceptions = Exception,
        ignore: Exceptions = (),
        is_failure: Callable[[Any], bool] | None = None,
        listeners: Iterable[Listener] = (),
        on_call: Iterable[Listener] = (),
        on_redis_failure: OnRedisFailure = "local",
        prefix: str = "circuit_breaker",
        redis_timeout: float = 0.25,
    ) -> None:
        check_options(lease, on_redis_failure, redis_timeout)
        if is_failure is not None and (not callable(is_failure) or inspect.iscoroutinefunction(is_failure)):
            raise PolicyError(f"is_failure must be a plain function of the result, or None, not {is_failure!r}")
        self.name = name
        self.policy = policy or Policy()
        self.keys = _protocol.keys_of(name, prefix)
        self.corrupt_documents = 0
        self._prefix = prefix
        self._classifier = Classifier(
            exception_types("failures", failures), exception_types("ignore", ignore), is_failure
        )
        self._notices = Notices(name, listeners, on_call)
        for listener in (*self._notices.listeners, *self._notices.on_call):
            if self._kind is BLOCKING and inspect.iscoroutinefunction(listener):
                raise PolicyError(f"listener {listener!r} is a coroutine function: use AsyncCircuitBreaker")
        self._every_result_succeeds = is_failure is None
        # a success only has to be counted: the fast path
        self._only_counts = self._every_result_succeeds and not self._notices.on_call
        self._client = None if redis is None else client_of(redis, self._kind)
        self._redis: Any = None if redis is None else self._server_of(self._client, redis_timeout)
        self._redis_timeout = redis_timeout
        if resource_warnings_are_shown():
            self._permit = self._warning_permit
        self._engine: InMemory | Fallback = (
            InMemory() if redis is None else Fallback(self, on_redis_failure, redis_timeout)
        )
        self._lease = float(lease)
        self._view = View(self._lease, self.policy)
        self._slow_calls = SlowCalls(self._view)
        self._override: dict[str, Any] | None = None  # the policy override, as last read
        self._isolation = Isolation(self._local_engine, self._engine.run, self._quorum, self._isolation_changed)
        self._warned: str | None = None
        self._watch: BaseWatch | None = None
        self._watch_lease: float | None = None  # set while a subscription stands
        self._rejoin: BaseWatch | None = None  # set by a fork: the next script call joins again
        self._start_process()
        _breakers.add(self)
        for instrument in self._notices.instruments:
            instrument.attach(self)

    def _start_process(self) -> None:
        self.instance = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._notices.start_process(self.instance)
        given = self.policy.to_request()
        # a report of only successes omits the policy unless a field matters to it: parsing it costs the script time
        self._without_policy: Request = {}
        self._with_policy: Request = {"instance": self.instance, **({"policy": given} if given else {})}
        if any(rule.on_success and request_field(name) in given for name, rule in RULES.items()):
            self._without_policy = self._with_policy

    def _after_fork(self) -> None:
        self._start_process()
        self._view.after_fork()
        self._slow_calls.after_fork()
        self._isolation.forget()  # a thread of the parent may hold the lock of its engine
        self._engine.after_fork()
        if self._watch is not None:
            self._watch.after_fork()
            self._subscribed(None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @property
    def state(self) -> State:
        """The state as this process last read it. Asks Redis nothing; snapshot() does.

        An open circuit is reported as half open once its open period is over. Before the first call, it is closed.
        """
        return self._view.state

    @property
    def counts(self) -> Counts:
        """The calls of this breaker in this process so far, by outcome; for metrics."""
        return self._notices.counts(self._view.successes())

    # Admission

    def _consult(self, began: float, refreshed: bool = False) -> BasePermit | Verdict:
        """Decide a call by the view: its permit, or the Verdict on what to ask first. Raises CircuitOpenError.

        began: when the call arrived, on the monotonic clock. refreshed: whether the caller has refreshed the view.
        """
        view, now = self._view, monotonic()
        seen = view.seen
        verdict = view.decide_again(seen, began, now) if refreshed else view.decide(seen, now)
        if verdict is Verdict.ADMIT:
            ramp_left = seen.ramp_until - now
            return self._reject("closed", ramp_left) if view.held_back(ramp_left) else self._admitted(seen.generation)
        if verdict is Verdict.REJECT:
            return self._reject("open", max(seen.retry_at - now, 0.0))
        if verdict is Verdict.ASK and in_probe(self):
            return self._permit(self, None, now)  # part of the probe, whose own outcome counts
        return verdict

    def _ask(self) -> Steps[BasePermit]:
        """Ask Redis for a permit. Raises CircuitOpenError."""
        reply = yield from self._run("acquire", (yield from self._gathered()), self._with_policy)
        if not reply["admitted"] or reply.get("shadow"):
            return self._reject(reply["state"], seconds(reply.get("retry_after_ms")) or 0.0)
        ramp_left = seconds(reply.get("ramp_left_ms")) or 0.0
        if self._view.held_back(ramp_left):
            return self._reject("closed", ramp_left)
        return self._admitted(reply["generation"], reply.get("probe"))

    def _admitted(self, generation: int, probe: int | None = None) -> BasePermit:
        permit = self._permit(self, generation, monotonic(), probe)
        self._slow_calls.began(permit)
        return permit

    def _reject(self, state: State, retry_after: float) -> BasePermit:
        """Raise CircuitOpenError; in shadow mode, return a permit whose outcome does not count."""
        enforced = self._view.policy.enforce
        self._notices.rejected(retry_after, enforced)
        if enforced:
            raise CircuitOpenError(self.name, state, retry_after)
        return self._permit(self, None, monotonic())

    # Reports

    def _gathered(self, generation: int | None = None) -> Steps[Request]:
        """Take the successes since the last report, and the running calls that have become slow.

        generation: of the report that they join; default: the view's. A slow probe gets a report of its own.
        """
        request = self._view.take(generation)
        current = self._view.seen.generation
        # a report of an earlier generation counts for nothing: slow calls wait for one of the view's
        if self._view.policy.slow_call_duration is None or generation not in (None, current):
            return request
        for permit in self._slow_calls.overdue():
            if permit.probe is not None:
                slow = {"generation": permit.generation, "probe": permit.probe, "slow": 1, "pending": 1}
                yield from self._run("record", slow, self._with_policy)
            elif permit.generation == request.setdefault("generation", current):
                request["slow"] = request["pending"] = request.get("pending", 0) + 1
        return request

    def _renew(self) -> Steps[None]:
        """Report the gathered outcomes. The reply becomes the view."""
        request = yield from self._gathered()
        yield from self._run("record", request, self._with_policy if "slow" in request else self._without_policy)

    def _flush(self) -> Steps[None]:
        gathered = self._view.take()
        if "successes" in gathered:
            yield from self._run("record", gathered, self._without_policy)

    def _finish(self, permit: BasePermit) -> bool:
        """Count a quick success without a script call. Returns False, with nothing done, if it needs one."""
        generation = permit.generation
        if permit.probe is not None or generation is None or generation != self._view.seen.generation:
            return False
        if not self._slow_calls.ended_quickly(permit) or not self._view.gather(generation):
            return False
        permit.settle()
        self._notices.call_ended(
            SUCCESS, generation, None, None if self._view.policy.slow_call_duration is None else False
        )
        return True

    def _report(self, permit: BasePermit, outcome: Outcome, error: BaseException | None = None) -> Steps[None] | None:
        """Count an outcome. Returns the steps that report it to Redis, or None if it was counted locally."""
        permit.settle()
        slow, pending = self._slow_calls.ended(permit)
        generation, probe = permit.generation, permit.probe
        if self._notices.on_call:
            self._notices.call_ended(outcome, generation, error, slow)
        plain = outcome == SUCCESS and probe is None and not slow
        if plain and generation is not None and self._view.gather(generation):
            return None
        self._notices.count(outcome, slow)
        if generation is None or (outcome == IGNORED and probe is None) or (plain and self._view.lease > 0):
            return None
        report: Request = {"generation": generation}
        if probe is not None:
            report["probe"] = probe
        if outcome == FAILURE:
            report["failures"] = 1
        elif outcome == SUCCESS:
            report["successes"] = 1
        if outcome != IGNORED and (pending or slow):
            report["counted" if pending else "slow"] = 1
        common = self._without_policy if plain else self._with_policy
        if self._view.policy.slow_call_duration is None:
            report = _sum(self._view.take(generation), report)
            if self._run_at_once("record", report, common):
                return None
        return self._send(report, common)

    def _send(self, report: Request, common: Request) -> Steps[None]:
        if self._view.policy.slow_call_duration is not None:
            gathered = yield from self._gathered(report["generation"])
            report, common = _sum(gathered, report), self._with_policy if "slow" in gathered else common
        yield from self._run("record", report, common)

    def _report_result(self, permit: BasePermit, result: Any) -> Steps[None] | None:
        """Classify a result and count it. If is_failure raises, nothing is counted, and the steps raise its error."""
        try:
            outcome = self._classifier.of_result(result)
        except BaseException as error:
            return _raise_after(self._report(permit, IGNORED, error), error)
        return self._report(permit, outcome)

    def _report_end(self, permit: BasePermit, error: BaseException | None) -> Steps[None] | None:
        """Classify the end of a call or block, and count it. error: the exception that ended it, if any."""
        if error is None:
            return self._report(permit, SUCCESS)
        if isinstance(error, CircuitOpenError) and error.name == self.name:
            return self._report(permit, IGNORED, error)  # a nested rejection says nothing about the service
        return self._report(permit, self._classifier.of_exception(error), error)

    # Script calls and their replies

    def _run(self, name: str, request: Request, common: Request) -> Steps[Reply]:
        """Call a script. Its reply becomes the view, and its transition an event.

        common: fields to add to the request: self._with_policy, or self._without_policy for a report of successes.
        """
        if (reply := self._run_at_once(name, request, common)) is not None:
            return reply
        sent = monotonic()
        if self._rejoin is not None:
            watch, self._rejoin = self._rejoin, None
            watch._join()
        if self._override:
            common = self._with_policy  # the policy override may set a field that matters
        try:
            if self._view.policy.quorum > 1:
                reply = yield from self._isolation.run(name, request, common, self._with_policy)
            else:
                self._isolation.forget()
                reply = yield from self._engine.run(name, {**common, **request})
        except NotSent:
            self._view.give_back(request)
            raise
        self._adopt(reply, sent)
        return reply

    def _run_at_once(self, name: str, request: Request, common: Request) -> Reply | None:
        """The same as a plain call, for a breaker in memory. Returns None with Redis."""
        if self._redis is not None:
            return None
        sent = monotonic()
        reply = self._engine.local(name, {**(self._with_policy if self._override else common), **request})
        assert reply is not None
        seen = self._view.seen
        # only this process changes the state: a reply under the generation of a closed view brings nothing new
        if (
            sent >= seen.closed_until
            or reply["generation"] != seen.generation
            or self._override
            or reply.keys() & _NEWS
        ):
            self._adopt(reply, sent)
        return reply

    def _adopt(self, reply: Reply, sent: float) -> None:
        if self._override or "override" in reply:
            self._obey(reply)
        self._view.adopt(reply, sent, monotonic())
        if self._warned or "warning" in reply:
            self._check(reply)
        if change := reply.get("transition"):
            logger.info("circuit breaker %r: %s -> %s (%s)", self.name, change["from"], change["to"], change["reason"])
            self._notices.changed(change, reply["source"])

    def _obey(self, reply: Reply) -> None:
        """Put the policy override of a reply in force."""
        if reply["source"] != "local" and reply.get("override") != self._override:
            self._override = reply.get("override")
            self._view.policy = self.policy.with_override(self._override)
            self._set_lease()
            self._isolation.obey(self._override)

    def _check(self, reply: Reply) -> None:
        warning = reply.get("warning")
        if warning:
            self.corrupt_documents += 1
        if warning and warning != self._warned:  # log it once, not for every call
            key = self.keys.policy if warning == "corrupt_policy" else self.keys.state
            logger.warning("circuit breaker %r: %s under key %s", self.name, warning, key)
        self._warned = warning

    # Isolation and outages

    def _quorum(self, fleet: Reply) -> int:
        self._obey(fleet)
        return self._view.policy.quorum

    def _isolation_changed(self, change: dict[str, Any]) -> None:
        logger.warning("circuit breaker %r: %s for this instance only (%s)", self.name, change["to"], change["reason"])
        self._notices.changed(change, "isolated")

    def _last_known(self) -> LocalEngine:
        seen = self._view.seen
        open_for = max(seen.retry_at - monotonic(), 0.0) if seen.state == "open" else 0.0
        return self._local_engine(seen.state, seen.failure_count, open_for, seen.generation)

    def _local_engine(
        self, state: State = "closed", failure_count: int = 0, open_for: float = 0.0, generation: int = 0
    ) -> LocalEngine:
        document = document_for(state, generation, failure_count, open_for)
        return LocalEngine(document=document, override=self._override, quorum_of_one=True)

    def _redis_down(self, error: BaseException) -> None:
        logger.warning(
            "circuit breaker %r: Redis does not answer; this process continues on its own: %s", self.name, error
        )
        self._notices.redis_down(error)

    def _redis_up(self) -> None:
        self._view.drop()
        logger.warning("circuit breaker %r: Redis answers again", self.name)
        self._notices.redis_up()

    # Watching

    def _watch_with(self, kind: Callable[[BreakerCore, float], W], lease: float) -> W:
        if self._redis is None:
            raise PolicyError(f"circuit breaker {self.name!r} has nothing to watch without Redis: pass redis=...")
        check_watch(lease)
        if self._watch is not None:
            self._watch._leave()
        watch = self._watch = kind(self, float(lease))
        return watch

    def _subscribed(self, lease: float | None) -> None:
        """Adopt the lease of a subscription that now stands, or None if it is lost. The next call asks Redis."""
        self._watch_lease = lease
        self._set_lease()
        self._view.drop()

    def _set_lease(self) -> None:
        """Lengthen the lease while a subscription stands. With a rate: by at most a bucket, or counts would be late."""
        policy, lease = self._view.policy, self._watch_lease
        if lease is None or self._lease <= 0:
            self._view.lease = self._lease
            return
        if policy.error_rate_threshold or policy.slow_call_rate_threshold:
            lease = min(lease, policy.window / 10)
        self._view.lease = max(lease, self._lease)

    def _receive(self, message: dict[str, Any]) -> None:
        """Handle a message on the breaker's channel: another instance's transition becomes the view."""
        if message.get("instance") == self.instance:
            return
        try:
            change = {**message, "generation": int(message["generation"])} if "policy" not in message else None
            reply = _protocol.reply_from_message(change, self._view.policy) if change else None
        except (KeyError, TypeError, ValueError, OverflowError):
            self._view.drop()  # perhaps from a newer version: let the next call ask Redis
            return
        isolated = self._isolation.is_open()
        if change is None or reply is None or self._engine.is_down or (isolated and reply["state"] == "closed"):
            self._view.drop()
            return
        if reply["generation"] > self._view.seen.generation:
            now = monotonic()
            self._isolation.forget()
            self._view.adopt({**reply, "override": self._override}, now, now)
        self._notices.changed(change, "watch", change.get("instance") or "")

    # State and operator actions

    def _snapshot(self) -> Steps[Snapshot]:
        reply = yield from self._engine.run("snapshot", self._with_policy)
        self._check(reply)
        return _protocol.snapshot_from(self.name, reply, self.policy, self._isolation.decides_over(reply))

    def _command(
        self, action: str, duration: float | None = None, policy: Mapping[str, Any] | None = None
    ) -> Steps[None]:
        request = {**self._with_policy, **_protocol.control_request(action, duration)}
        if policy is not None:
            request["override"] = override_request(policy)
        sent = monotonic()
        reply = yield from self._engine.command("control", request)
        if reply.get("transition"):
            self._isolation.forget()
            self._adopt(reply, sent)
        else:  # perhaps nothing is stored, and no outcome would count: let the next call ask Redis
            self._obey(reply)
            self._check(reply)
            self._view.drop()


def _sum(gathered: Request, report: Request) -> Request:
    """The gathered outcomes and a report as one request."""
    if len(gathered) <= 1:  # a generation and no outcomes
        return report
    for field, count in report.items():
        gathered[field] = gathered.get(field, 0) + count if field in ("successes", "slow") else count
    return gathered


def _raise_after(steps: Steps[None] | None, error: BaseException) -> Steps[None]:
    if steps is not None:
        yield from steps
    raise error


def _after_fork_in_child() -> None:
    for breaker in _breakers:
        breaker._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
