"""Permits, and the nested calls that become part of a probe."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import secrets
import warnings
import weakref
from collections.abc import Callable, Generator
from os import getpid
from threading import get_ident
from typing import Any, TypeVar, cast

from ._classify import FAILURE, Outcome, hold_ms
from ._clock import NEVER, machine
from ._errors import PermitError
from ._process import own_lock
from ._protocol import Steps

T = TypeVar("T")
# each with its process id: a child that was forked during a probe is not part of the probe
_probes: contextvars.ContextVar[tuple[tuple[int, weakref.ref[BasePermit]], ...]] = contextvars.ContextVar(
    "pybreaker_redis_probes", default=()
)


ADMITTED, ENTERED, SETTLED = 0, 1, 2


class BasePermit:
    """The right to one call. Settle it once, by an outcome or by leaving its block.

    generation: under which the call was admitted; None if its outcome does not count (in shadow mode, or within a
    probe). probe: the slot of a probe, else None. started: when the call began, on the monotonic clock. _pending_since:
    when the call was reported as slow while it still ran, else None. tick: counts a success on the fast path.
    """

    __slots__ = ("__weakref__", "_breaker", "_pending_since", "_stage", "_tick", "generation", "probe", "started")

    def __init__(
        self,
        breaker: Any,
        generation: int | None,
        started: float,
        probe: int | None = None,
        tick: Callable[[], int] | None = None,
    ) -> None:
        self._breaker = breaker
        self._stage = ADMITTED
        self._tick = tick
        self.generation = generation
        self.started = started
        self.probe = probe
        self._pending_since: float | None = None

    @property
    def settled(self) -> bool:
        """Whether the outcome is known."""
        return self._stage == SETTLED

    def __repr__(self) -> str:
        state = "settled" if self.settled else "running"
        return f"<{type(self).__name__} of {self._breaker.name!r}, {state}>"

    def _enter(self) -> None:
        if self._stage != ADMITTED:
            reason = "already settled" if self.settled else "already entered"
            raise PermitError(f"this permit of circuit breaker {self._breaker.name!r} was {reason}")
        self._stage = ENTERED
        self._begin()

    def _begin(self) -> None:
        """Mark this context: calls that the guarded code makes through the same breaker are part of the probe."""
        if self.probe is not None:
            running = [one for one in _probes.get() if (permit := one[1]()) is not None and not permit.settled]
            _probes.set((*running, (getpid(), weakref.ref(self))))

    def _end(self) -> None:
        """Remove the mark of begin()."""
        if self.probe is not None:
            # not reset(): blocks in generators end in any order or context; in_probe() skips permits that are settled
            _probes.set(tuple(one for one in _probes.get() if one[1]() is not self))

    def _around(self, generator: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """Wrap a generator so that it is part of the probe while it runs, but not while it is suspended."""
        resume: Callable[[], Any] = functools.partial(next, generator)
        while True:
            self._begin()
            try:
                item = resume()
            except StopIteration as end:
                return cast(T, end.value)
            finally:
                self._end()
            try:
                sent = yield item
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as error:
                resume = functools.partial(generator.throw, error)
            else:
                resume = functools.partial(generator.send, sent)

    def _settle(
        self, outcome: Outcome, error: BaseException | None, retry_after: float | str | None = None
    ) -> Steps[None] | None:
        held_ms = hold_ms(retry_after)
        if error is not None and retry_after is None:
            held_ms = self._breaker._classifier.hold_ms_of(error)
        stage, self._stage = self._stage, SETTLED  # before the check: another thread may settle it at the same time
        if stage == SETTLED:
            raise PermitError(f"this permit of circuit breaker {self._breaker.name!r} was already settled")
        if outcome == FAILURE and stage == ENTERED and self.generation is not None:
            self._breaker._innermost.failed(error, self.started)
        report: Steps[None] | None = self._breaker._report(self, outcome, error, held_ms)
        return report


def permit_to_use(kind: type[BasePermit]) -> type[BasePermit]:
    """The kind of permit to use: where Python shows a ResourceWarning, as in its development mode, one that warns."""
    actions = (action for action, _, category, *_ in warnings.filters if issubclass(ResourceWarning, category))
    # mypy looks for the __hash__ of a permit, not of its class
    return kind if next(actions, "default") == "ignore" else _warning(kind)  # type: ignore[arg-type]


@functools.cache
def _warning(kind: type[BasePermit]) -> type[BasePermit]:
    """A subclass of a permit that warns when it is garbage-collected before it is settled.

    Its destructor costs a quarter of the time of a block.
    """

    def __del__(permit: BasePermit) -> None:
        if permit._stage != SETTLED:
            warnings.warn(
                f"a permit of circuit breaker {permit._breaker.name!r} was lost: end its call with success(), failure()"
                " or release(), or use it as a `with` block",
                ResourceWarning,
                stacklevel=2,
                source=permit,
            )

    return type(kind.__name__, (kind,), {"__slots__": (), "__del__": __del__, "__doc__": kind.__doc__})


def in_probe(innermost: Innermost) -> bool:
    """Whether this code runs within a probe of the same breaker."""
    if not (probes := _probes.get()):
        return False
    permits = (permit() for process, permit in probes if process == getpid())
    return any(
        permit is not None and permit._breaker._innermost is innermost and not permit.settled for permit in permits
    )


# On an exception that a guard has counted. Plain values, since error reports may write its attributes as JSON.
_MARK = "_pybreaker_redis"
_UNMARKED: dict[str, tuple[int | None, float, float]] = {_MARK: (None, 0.0, 0.0)}
_NOBODY: dict[int, float] = {}  # by thread or task: when it last counted a failure


class Innermost:
    """Makes a failure count once where guards of the same breaker are nested: at the innermost guard that sees it.

    Breakers with the same name, prefix and Redis are the same breaker, even as objects of two classes.

    failed_at: when a guard last counted a failure, on the monotonic clock. A call that began later than that has no
    failure within it. A nested failure must be later than the beginning of the outer call, not equal: so calls at one
    moment of a frozen clock each count for themselves.
    """

    __slots__ = ("__weakref__", "_last", "_now", "_token", "failed_at")

    def __init__(self, now: Callable[[], float] = machine) -> None:
        self.failed_at, self._now = NEVER, now
        self._token = 0  # until the first failure: most breakers of many tenants have none
        self._last = _NOBODY

    def failed(self, error: BaseException | None, began: float) -> None:
        """Note that a guard counts a failure. error: the exception, if any, which may yet pass other guards.

        began: when the call began.
        """
        running = _running()
        with own_lock():  # or a thread that read the clock earlier could set failed_at back
            self.failed_at = now = self._now()
            self._token = self._token or secrets.randbits(64)  # in another process, no breaker has the same
            if self._last is _NOBODY or len(self._last) >= 1000:  # most of these threads and tasks have ended
                self._last = {}
            self._last[running] = now
        if error is not None:
            try:  # noqa: SIM105 - faster than suppress()
                error.__dict__[_MARK] = self._token, now, began
            except Exception:  # its class may forbid it
                pass

    def has_counted(self, error: BaseException, since: float) -> bool:
        """Whether a guard within a call that began at `since` has counted this exception.

        The same object may be raised again by later calls, and by others at the same time. So a guard is within
        the call only if it began no earlier.
        """
        token, at, began = getattr(error, "__dict__", _UNMARKED).get(_MARK, _UNMARKED[_MARK])
        if token == self._token and since < at and since <= began:
            return True
        return isinstance(error, BaseExceptionGroup) and any(self.has_counted(one, since) for one in error.exceptions)

    def has_failed(self, since: float) -> bool:
        """Whether this thread or task has counted a failure after `since`."""
        return since < self.failed_at and since < self._last.get(_running(), since) <= self._now()


def _running() -> int:
    if asyncio._get_running_loop() is not None and (task := asyncio.current_task()) is not None:
        return id(task)
    return -get_ident()


_innermost: dict[str, weakref.WeakValueDictionary[bytes, Innermost]] = {}  # by the address of Redis, then by state key


def innermost_of(state_key: bytes, address: str) -> Innermost:
    """The Innermost that all breakers with the same name, prefix and Redis share."""
    there = _innermost.get(address) or _innermost.setdefault(address, weakref.WeakValueDictionary())
    with own_lock():  # setdefault() of a weak dictionary is not atomic
        return there.get(state_key) or there.setdefault(state_key, Innermost())
