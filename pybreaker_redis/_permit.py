"""The right to one call: what both permits share, and how calls within a probe become part of it."""

from __future__ import annotations

import contextvars
import warnings
import weakref
from typing import Any

from ._classify import Outcome
from ._errors import PermitError
from ._protocol import Steps

_probes: contextvars.ContextVar[tuple[weakref.ref[BasePermit], ...]] = contextvars.ContextVar(
    "pybreaker_redis_probes", default=()
)


class BasePermit:
    """The right to one call. Settle it once, by an outcome or by leaving its block.

    generation: under which the call was admitted; None where its outcome counts for nothing (in shadow mode, or as
    part of a probe). probe: the slot of a probe, else None. started: seconds of the monotonic clock.
    settled: whether the call has ended.
    """

    __slots__ = ("__weakref__", "_breaker", "_mark", "generation", "pending_since", "probe", "settled", "started")

    def __init__(self, breaker: Any, generation: int | None, probe: int | None, started: float) -> None:
        self._breaker = breaker
        self.generation = generation
        self.probe = probe
        self.started = started
        self.settled = False
        self.pending_since: float | None = None
        self._mark: contextvars.Token[Any] | None = None

    def __repr__(self) -> str:
        state = "settled" if self.settled else "running"
        return f"<{type(self).__name__} of {self._breaker.name!r}, {state}>"

    def __del__(self) -> None:
        if not self.settled:
            warnings.warn(
                f"a permit of circuit breaker {self._breaker.name!r} was lost: end its call with success(), failure()"
                " or release(), or use it as a `with` block",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def begin(self) -> None:
        """The guarded code runs in this context: its calls of the same breaker are part of the probe."""
        if self.probe is not None:
            running = [one for one in _probes.get() if (permit := one()) is not None and not permit.settled]
            self._mark = _probes.set((*running, weakref.ref(self)))

    def end(self) -> None:
        """The guarded code has ended."""
        if self._mark is not None:
            # no reset(): blocks in generators end in any order, and in other contexts, whose marks in_probe() ignores
            _probes.set(tuple(one for one in _probes.get() if one() is not self))
            self._mark = None

    def _settle(self, outcome: Outcome, error: BaseException | None) -> Steps[None]:
        if self.settled:
            raise PermitError(f"this permit of circuit breaker {self._breaker.name!r} was already settled")
        self.settled = True
        report: Steps[None] = self._breaker._report(self, outcome, error)
        return report


def in_probe(breaker: object) -> bool:
    """Whether this code runs within a probe of the breaker."""
    permits = (mark() for mark in _probes.get())
    return any(permit is not None and permit._breaker is breaker and not permit.settled for permit in permits)
