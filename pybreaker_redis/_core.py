"""The decisions of both breakers, without I/O: generators that yield an Ask for each script that Redis must run."""

from __future__ import annotations

import functools
import inspect
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from os import getpid
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from . import _protocol
from ._classify import FAILURE, IGNORED, SUCCESS, Classifier, Exceptions, Outcome, RetryAfter, described
from ._clock import NEVER, Clock, age
from ._config import OnRedisFailure, check_clock, check_fallback, check_flag, check_options, host_of
from ._errors import CircuitOpenError, ForcedStateError, PolicyError, RedisUnavailableError
from ._events import Counts, Event, Listener, Notices
from ._permit import SETTLED, BasePermit, Innermost, in_probe, innermost_of, permit_to_use
from ._policy import Policy, override_request
from ._process import renew
from ._protocol import Request, Snapshot, State, Steps, seconds
from ._runner import Runner
from ._slow import SlowCalls
from ._view import Verdict
from ._watch import BaseWatch
from .wire.options import BLOCKING, REDIS_ERRORS, Kind, address_of, client_of
from .wire.outage import longest_exchange

W = TypeVar("W", bound=BaseWatch)
Fallback: TypeAlias = Callable[[CircuitOpenError], Any]
ASKED_AGAIN = 0.1  # retry_after in seconds while other calls of this process ask for the slots of probes


class BreakerCore(Runner):
    """Options and decisions of one breaker. The shells, _sync and _async, add the I/O. See CircuitBreaker.

    A process may have a breaker for each of 20,000 tenants, so its parts are small. They have slots, share what is the
    same for all, and share one lock, that of the view.
    """

    __slots__ = (
        *("_host", "_prefix", "_classifier", "_fallback", "_record_errors", "_every_result_succeeds", "_only_counts"),
        *("_client", "_innermost", "_permit", "_slow_calls", "_watch", "_pid", "_asking", "_asked_at"),
        *("_asked_for_at", "_shares"),
        "__weakref__",
    )

    # set by the shell
    _permit_type: type[BasePermit]
    _kind: Kind
    _server_of: Callable[[Any, float], Any]
    _deliver_events: Callable[[list[Event]], None]
    _guarded: Callable[[Any, Fallback | None], Any]  # a function of the same kind, guarded; raises TypeError

    def __init__(
        self,
        name: str,
        *,
        redis: Any = None,
        policy: Policy | None = None,
        lease: float = 0.1,
        failures: Exceptions = Exception,
        ignore: Exceptions = (),
        is_failure: Callable[[Any], object] | None = None,
        retry_after: RetryAfter | None = None,
        listeners: Iterable[Listener] = (),
        on_call: Iterable[Listener] = (),
        fallback: Fallback | None = None,
        on_redis_failure: OnRedisFailure = "local",
        prefix: str = "circuit_breaker",
        redis_timeout: float = 0.25,
        host: str | None = None,
        clock: Clock | None = None,
        record_errors: bool = True,
        listed: bool = True,
    ) -> None:
        check_options(lease, on_redis_failure, redis_timeout)
        check_flag("record_errors", record_errors)
        check_flag("listed", listed)
        check_clock(clock, redis)
        if policy is not None and not isinstance(policy, Policy):
            raise PolicyError(f"policy must be a Policy, as in Policy(failure_threshold=3), not {policy!r}")
        if fallback is not None:
            check_fallback(fallback)
        notices = Notices(name, listeners, on_call)
        for listener in (*notices.listeners, *notices.on_call):
            if self._kind is BLOCKING and inspect.iscoroutinefunction(listener):
                raise PolicyError(f"listener {listener!r} is a coroutine function: use AsyncCircuitBreaker")
        self._host, self._prefix = host_of(host), prefix
        self._classifier = Classifier(name, failures, ignore, is_failure, retry_after)
        self._fallback, self._record_errors = fallback, record_errors
        self._every_result_succeeds = is_failure is None and retry_after is None
        # a success only has to be counted: the fast path
        self._only_counts = self._every_result_succeeds and not notices.on_call
        self._pid = getpid()
        key = _protocol.keys_of(name, prefix).state.encode()
        self._client = None if redis is None else client_of(redis, self._kind)
        server = None if redis is None else self._server_of(self._client, redis_timeout)
        super().__init__(name, key, policy or Policy(), lease, clock, notices, server)
        if server is not None:
            self._line = server.link.line_of(self, on_redis_failure, listed)
        # in memory, each object is a breaker of its own
        self._innermost = Innermost(self._now) if redis is None else innermost_of(key, address_of(self._client))
        self._permit = permit_to_use(self._permit_type)
        self._slow_calls = SlowCalls(self._view)
        self._watch: BaseWatch | None = None
        self._asked_for_at = NEVER  # when a manager last gave it to somebody
        self._shares: BreakerCore | None = None  # whose view and engine this breaker uses
        self._start_process()
        for instrument in self._notices.instruments:
            instrument._attach(self)

    def _start_process(self) -> None:
        # The random digits tell apart the breakers of one process, and containers that share host name and process id,
        # so that each knows its own transitions. A script takes 200 characters.
        instance = f"{self._host[:180]}:{os.getpid()}-{secrets.token_hex(4)}"
        self._notices.start_process(instance, self._view.lock)
        self._warned_of_window = False
        self._asking, self._asked_at = 0, NEVER  # calls that ask for a permit now; when the last of them began to

    def _check_process(self) -> None:
        """Start anew if this is a child. The fast path repeats these lines, to save a call."""
        if getpid() != self._pid:
            renew(self)

    def _after_fork(self) -> None:
        if self._redis is not None:
            renew(self._redis)
        if self._shares is not None:
            self._shares._check_process()
            self._start_process()
            return
        self._view.after_fork()
        self._start_process()
        self._slow_calls.after_fork()
        self._isolation.forget()  # a thread of the parent may hold the lock of its engine
        if self._memory is not None:
            self._memory.after_fork(self._view.lock)
        if self._line is not None:
            self._line.start_process()
        if self._watch is not None:
            self._watch._after_fork()

    def _share_memory(self, other: BreakerCore) -> None:
        """Share the state of another breaker in memory, whose policy and class may differ. Call it before any use."""
        self._shares = other
        self._memory, self._view = other._memory, other._view
        self._slow_calls, self._innermost = other._slow_calls, other._innermost

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} cannot be pickled or copied: make one of the same name where you need it")

    @property
    def name(self) -> str:
        """The name of the guarded service."""
        return self._name

    @property
    def host(self) -> str:
        """The name of this host, which counts once in the quorum."""
        return self._host

    @property
    def policy(self) -> Policy:
        """The policy that this breaker was given. To change it for the whole fleet, use set_policy()."""
        return self._policy

    @property
    def keys(self) -> _protocol.Keys:
        """The keys of this breaker in Redis."""
        return _protocol.keys_with(self._key.decode())

    @property
    def instance(self) -> str:
        """The name of this process in the history and in events: `host:pid-` and eight random hex digits."""
        self._check_process()
        return self._notices.instance

    @property
    def state(self) -> str:  # no Literal: a type checker would take it for constant between two assertions
        """The state as this process last read it: "closed", "open" or "half_open". Asks Redis nothing; snapshot() does.

        An open circuit is reported as half open once its open period is over. Before the first call, it is closed.
        """
        return self._view.state

    @property
    def counts(self) -> Counts:
        """The calls of this breaker in this process so far, by outcome; for metrics."""
        self._check_process()
        return self._notices.counts(self._view.successes())

    # Decorating

    def _decorator(self, func: Any, fallback: Any) -> Any:
        """What __call__() returns: a decorated function, or a decorator if only a fallback is given."""
        if func is not None:
            return self._decorate(func, fallback or self._fallback)
        if fallback is None:
            raise TypeError("decorate a function, or give a fallback: @breaker(fallback=...)")
        check_fallback(fallback)
        return lambda func: self._decorate(func, fallback)

    def _decorate(self, func: Any, fallback: Fallback | None) -> Any:
        if isinstance(func, (classmethod, staticmethod)):  # callable only once they are bound
            return type(func)(self._decorate(func.__func__, fallback))
        guarded: Any = functools.wraps(func)(self._guarded(func, fallback))
        guarded.breaker = self
        return guarded

    # Admission

    def _consult(self, began: float, refreshed: bool = False) -> BasePermit | Verdict:
        """Decide a call by the view: its permit, or WAIT or ASK. Raises CircuitOpenError.

        began: when the call arrived, on the monotonic clock. refreshed: whether the caller has waited for a refresh.
        """
        if getpid() != self._pid:
            renew(self)
        view, now = self._view, self._now()
        if self._override is not None and self._override_left() <= 0:
            self._end_override()
        if age(view.seen.sent, monotonic()) >= view.lease and self._must_wait(began, now, refreshed):
            return Verdict.WAIT
        seen, now = view.seen, self._now()
        verdict = Verdict.ASK if view.lease <= 0 else seen.verdict(now)
        if verdict is Verdict.ADMIT:
            ramp_left = seen.left(seen.ramp_until, now)
            return self._reject("closed", ramp_left) if view.held_back(ramp_left) else self._admitted(seen.generation)
        if (verdict is Verdict.ASK or seen.state == "half_open") and in_probe(self._innermost):
            return self._permit(self, None, now)  # part of the probe, whose own outcome counts
        if verdict is Verdict.REJECT:
            return self._reject(seen.state, seen.left(seen.retry_at, now), seen.reason, seen.error)
        if view.lease > 0 and self._asking >= view.policy.half_open_max_calls and not self._asked_in_vain():
            # the calls before this one are asking for all slots
            return self._reject("half_open", ASKED_AGAIN, seen.reason, seen.error)
        return verdict

    def _must_wait(self, began: float, now: float, refreshed: bool) -> bool:
        """Refresh a view whose lease is over. Returns whether the call must wait for the refresh."""
        lease = self._view.lease
        self._notices.used()
        if (engine := self._own_engine()) is not None:
            if self._line is not None and not refreshed:
                outage = self._redis.link.due_outage(self._line)
                if outage is not None and outage.abandoned:  # the last retry never ended: its loop may have ended first
                    return True
            if lease > 0:
                for report in self._reports():
                    self._run_on(engine, "record", report)
            return False
        if (watch := self._watch) is not None:
            watch._join()
        if lease <= 0:
            return False
        self._redis.soon(self._line)
        seen, link = self._view.seen, self._redis.link
        if refreshed:  # measured from the call's arrival: a lease may be shorter than a round trip
            return began - seen.sent >= 2 * lease and age(began, now) < link.timeout
        if seen.verdict(now) is Verdict.ASK and not self._asking:
            return False
        return age(seen.sent, monotonic()) >= 2 * lease + (link.timeout if link.is_busy() else 0.0)

    def _asked_in_vain(self) -> bool:
        """Forget the calls that ask if they began so long ago that they never end: their event loop was closed."""
        patience = longest_exchange(0.0) if self._redis is None else self._redis.link.patience
        with self._view.lock:
            lost = age(self._asked_at, monotonic()) >= patience
            if lost:
                self._asking = 0
            return lost

    def _ask(self) -> Steps[BasePermit]:
        """Ask for a permit. Raises CircuitOpenError."""
        with self._view.lock:
            self._asking += 1
            self._asked_at = monotonic()
        try:
            *slow_probes, request = self._reports()
            for report in slow_probes:
                yield from self._run("record", report)
            # never a generation without counts: a closed document of another program would go on under that generation
            reply = yield from self._run("acquire", request if len(request) > 1 else {})
        finally:
            with self._view.lock:
                self._asking = max(self._asking - 1, 0)  # a child that was forked meanwhile started from 0
        if not reply["admitted"] or reply.get("shadow"):
            wait = seconds(reply.get("retry_after_ms")) or 0.0
            return self._reject(reply["state"], wait, reply.get("reason"), reply.get("error"))
        if "ramp_left_ms" in reply and self._view.held_back(ramp_left := reply["ramp_left_ms"] / 1000):
            return self._reject("closed", ramp_left)
        return self._admitted(reply["generation"], reply.get("probe"))

    def _admitted(self, generation: int, probe: int | None = None) -> BasePermit:
        permit = self._permit(self, generation, self._now(), probe)
        self._slow_calls.began(permit)
        return permit

    def _reject(
        self, state: State, retry_after: float, reason: str | None = None, error: str | None = None
    ) -> BasePermit:
        """Raise CircuitOpenError; in shadow mode, return a permit whose outcome does not count."""
        enforced = self._view.policy.enforce
        self._notices.rejected(retry_after, enforced)
        if enforced:
            raise CircuitOpenError(self._name, state, retry_after, reason, error)
        return self._permit(self, None, self._now())

    # Reports

    def _report(
        self, permit: BasePermit, outcome: Outcome, error: BaseException | None = None, hold_ms: int = 0
    ) -> Steps[None] | None:
        """Settle a permit, and count its outcome. See _count."""
        permit._stage = SETTLED
        slow, pending = self._slow_calls.ended(permit)
        return self._count(outcome, permit.generation, error, hold_ms, permit.probe, slow, pending)

    def _take_back(self, permit: BasePermit) -> Steps[None] | None:
        """Settle the permit of a call that has not begun: it counts nowhere, and the slot of a probe is free again."""
        permit._stage = SETTLED
        self._slow_calls.ended(permit)
        return None if permit.probe is None else self._send([{"generation": permit.generation, "probe": permit.probe}])

    def _count(
        self,
        outcome: Outcome,
        generation: int | None,
        error: BaseException | None,
        hold_ms: int,
        probe: int | None = None,
        slow: bool | None = None,
        pending: bool = False,
    ) -> Steps[None] | None:
        """Count an outcome. Returns the steps that report it to Redis, or None if it was counted here.

        generation, probe: of its permit. hold_ms: milliseconds after which the service said to come back. With
        such a hold, only the failure of a probe counts as a failure. slow, pending: see SlowCalls.ended.
        """
        if getpid() != self._pid:
            renew(self)
        if self._notices.on_call:
            self._notices.call_ended(outcome, generation, error, slow)
        plain = probe is None and not slow
        if outcome == SUCCESS and plain and generation is not None and self._view.gather(generation):
            if self._view.claim_report():
                self._redis.soon(self._line, urgent=True)
            return None
        self._notices.count(outcome, slow)
        nothing = outcome == IGNORED and probe is None and (not slow or pending)
        if generation is None or nothing or (outcome == SUCCESS and plain and self._view.lease > 0):
            return None
        memory = self._memory if outcome == FAILURE and plain and not pending and hold_ms == 0 else None
        if memory is not None and memory.count_failure(generation, self._given or None, self._view):
            return None
        report = _report_of(outcome, generation, hold_ms, probe, slow, pending)
        if outcome == FAILURE and error is not None:
            # before anything is taken: the exception's own __str__ may call this breaker
            report["error"] = described(error, self._record_errors)
        *slow_probes, gathered = self._reports(generation)
        return self._send([*slow_probes, *_joined(gathered, report)])

    def _reports(self, generation: int | None = None, as_it_ends: bool = False) -> list[Request]:
        """Take the gathered outcomes: a report for each probe that has become slow, then one of all the rest.

        generation: of the report that they go with; default: the view's. as_it_ends: see View.take.
        """
        view = self._view
        request = view.take(generation, self._own_engine() is None, as_it_ends) if view.lease > 0 else {}
        current = self._view.seen.generation
        slow_probes: list[Request] = []
        # a report of an earlier generation does not count: slow calls wait for a report of the view's generation
        if self._view.policy.slow_call_duration is not None and generation in (None, current):
            for permit in self._slow_calls.overdue():
                if permit.probe is not None:
                    slow_probes.append(
                        {"generation": permit.generation, "probe": permit.probe, "slow": 1, "pending": 1}
                    )
                elif permit.generation == request.setdefault("generation", current):
                    request["slow"] = request["pending"] = request.get("pending", 0) + 1
        return [*slow_probes, request]

    def _send(self, reports: list[Request]) -> Steps[None] | None:
        """Report outcomes. Returns the steps, or None if the engine in memory has counted them."""
        if self._memory is None:
            return self._send_to_redis(reports)
        for report in reports:
            self._run_on(self._memory, "record", report)
        return None

    def _send_to_redis(self, reports: list[Request]) -> Steps[None]:
        for report in reports:
            yield from self._run("record", report)

    def _flush(self) -> Steps[None] | None:
        self._check_process()
        gathered = self._view.take(shared=self._own_engine() is None)
        return self._send([gathered]) if "successes" in gathered else None

    def _report_result(self, permit: BasePermit, result: Any) -> Steps[None] | None:
        """Classify a result and count it. If is_failure raises, nothing is counted, and the steps raise its error."""
        if self._every_result_succeeds:
            return self._report_end(permit, None)
        try:
            outcome = self._classifier.of_result(result)
        except BaseException as error:
            return _raise_after(self._report(permit, IGNORED, error), error)
        hold_ms = self._classifier.hold_ms_of(result)
        if outcome == FAILURE or hold_ms > 0:
            if permit.generation is not None:
                self._innermost.failed(None, permit.started)
            return self._report(permit, FAILURE, None, hold_ms)
        return self._report_end(permit, None)

    def _report_end(self, permit: BasePermit, error: BaseException | None) -> Steps[None] | None:
        """Count the end of a call or block. error: the exception that ended it, if any."""
        if error is None:  # a success, unless a nested guard has counted a failure
            return self._report(permit, IGNORED if self._innermost.has_failed(permit.started) else SUCCESS)
        return self._report_error(error, permit.generation, permit.started, permit)

    def _report_error(
        self, error: BaseException, generation: int | None, began: float, permit: BasePermit | None = None
    ) -> Steps[None] | None:
        """Classify the exception that ended a call, and count it. permit: None for a call of the fast path.

        generation: under which the call was admitted. began: when.
        """
        innermost, hold_ms = self._innermost, 0
        outcome: Outcome = IGNORED
        if began >= innermost.failed_at or not (innermost.has_counted(error, began) or innermost.has_failed(began)):
            outcome = self._classifier.of_exception(error)
            hold_ms = 0 if outcome == IGNORED else self._classifier.hold_ms_of(error)
            if outcome == FAILURE or hold_ms > 0:
                outcome = FAILURE
                if generation is not None:
                    innermost.failed(error, began)
        if permit is not None:
            return self._report(permit, outcome, error, hold_ms)
        return self._count(outcome, generation, error, hold_ms)

    # Watching

    def _watch_with(self, kind: Callable[[BreakerCore], W]) -> W:
        if self._line is None:
            raise PolicyError(f"circuit breaker {self.name!r} has nothing to watch without Redis: pass redis=...")
        self._check_process()
        if self._watch is not None:
            self._watch._leave()
        watch = self._watch = kind(self)
        watch._join()
        return watch

    def _hinted(self) -> None:
        """Read the state now: something was published about this breaker, or may have been missed."""
        self._view.hinted()
        self._redis.hint(self._line)

    # State and operator actions

    def _snapshot(self) -> Steps[Snapshot]:
        if (steps := self._flush()) is not None:  # it includes what this process has gathered
            yield from steps
        engine = self._own_engine()
        if engine is None:
            try:
                reply = yield from self._ask_redis("snapshot", self._with_policy)
            except REDIS_ERRORS as error:
                self._redis.link.failed(self._line, error)
                engine = self._own_engine() or self._last_known()
        if engine is not None:
            reply = engine.run("snapshot", self._with_policy)
        self._check(reply)
        return _protocol.snapshot_from(self.name, reply, self.policy, self._isolation.decides_over(reply))

    def _command(
        self,
        action: str,
        operator: str | None,
        note: str | None,
        duration: float | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> Steps[None]:
        """Carry out an operator's action in Redis, or not at all. Raises RedisUnavailableError."""
        self._check_process()
        request = {**self._with_policy, **_protocol.control_request(action, operator, note, duration)}
        if policy is not None:
            request["override"] = override_request(policy)
            duration_of_slow = policy.get("slow_call_duration", self._view.policy.slow_call_duration)
            if policy.get("slow_call_rate_threshold") and not duration_of_slow:
                raise PolicyError("slow_call_rate_threshold needs slow_call_duration: set both")
        sent = self._now()
        if self._memory is not None:
            reply = self._memory.run("control", request)
            self._obey(reply, sent)
        else:
            try:
                reply = yield from self._ask_redis("control", request)
            except REDIS_ERRORS as error:
                raise RedisUnavailableError(f"{action} was not carried out: {error}") from error
        changed = "transition" in reply
        if changed or action == "reset":
            self._isolation.forget()
        if changed or reply["generation"] == self._view.seen.generation:
            self._adopt(reply, sent)
        else:
            self._check(reply)
        if action == "probe" and (forced := reply.get("forced")):
            raise ForcedStateError(f"circuit breaker {self.name!r} is forced {forced}: call clear_forced() first")
        if not changed:  # perhaps nothing is stored, and no outcome would count: let the next call ask Redis
            self._view.drop()


def _report_of(
    outcome: Outcome, generation: int, hold_ms: int, probe: int | None, slow: bool | None, pending: bool
) -> Request:
    """One outcome as a request. See BreakerCore._count."""
    report: Request = {"generation": generation}
    if probe is not None:
        report["probe"] = probe
    if hold_ms > 0:
        report["hold_ms"] = hold_ms
        if probe is None:
            outcome = IGNORED
    if outcome != IGNORED:
        report["failures" if outcome == FAILURE else "successes"] = 1
        if pending or slow:
            report["counted" if pending else "slow"] = 1
    elif slow and not pending:  # cancelled, or timed out from outside: it was slow all the same
        report["slow"] = 1
        if probe is None:
            report["pending"] = 1  # nothing will count it as a call
    return report


def _joined(gathered: Request, report: Request) -> list[Request]:
    """The gathered outcomes and a report as one request; as two if the report's success ended later."""
    if "successes" in gathered and "successes" in report:
        return [gathered, report]
    both = {**gathered, **report}
    if "slow" in gathered and "slow" in report:
        both |= {field: gathered[field] + report.get(field, 0) for field in ("slow", "pending")}
    return [both]


def _raise_after(steps: Steps[None] | None, error: BaseException) -> Steps[None]:
    if steps is not None:
        yield from steps
    raise error
