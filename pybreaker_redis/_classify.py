"""How a call ended: turns exceptions and results into outcomes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, TypeAlias

from ._errors import PolicyError

Exceptions: TypeAlias = (
    type[BaseException] | Iterable[type[BaseException]] | Callable[[BaseException], object]
)  # types, or a predicate
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError, KeyboardInterrupt, GeneratorExit)
logger = logging.getLogger("pybreaker_redis")


# literals, since reading the members of an Enum would slow a failing call down
Outcome: TypeAlias = Literal["success", "failure", "ignored"]
SUCCESS: Final = "success"
FAILURE: Final = "failure"
IGNORED: Final = "ignored"


@dataclasses.dataclass(frozen=True)
class Classification:
    """How the calls of one service are classified, for a manager. None: as the manager's own options say.

    failures, ignore, is_failure: as for CircuitBreaker.
    """

    failures: Exceptions | None = None
    ignore: Exceptions | None = None
    is_failure: Callable[[Any], object] | None = None


class Classifier:
    """Turns exceptions and results into outcomes. Raises PolicyError for an option that is none."""

    def __init__(
        self, breaker: str, failures: Exceptions, ignore: Exceptions, is_failure: Callable[[Any], object] | None
    ) -> None:
        self._breaker = breaker
        self._failures, self._ignore = _matcher("failures", failures), _matcher("ignore", ignore)
        if is_failure is not None:
            _check_function("is_failure", "the result", is_failure)
        self._is_failure = is_failure
        self._logged = False

    def of_exception(self, exception: BaseException) -> Outcome:
        """Cancelled and ignored calls count as nothing. An exception outside `failures` counts as success.

        A predicate that raises is logged once, and the call counts as failed. It gets no group, but what is in it.
        """
        ignore, failures = self._ignore, self._failures
        try:
            if isinstance(exception, CANCELLED):
                return IGNORED
            if ignore and (isinstance(exception, ignore) if type(ignore) is tuple else _holds(ignore, exception)):
                return IGNORED
            if isinstance(exception, failures) if type(failures) is tuple else _holds(failures, exception):
                return FAILURE
        except Exception:
            if not self._logged:
                self._logged = True
                logger.exception("circuit breaker %r: failures= or ignore= failed for %r", self._breaker, exception)
            return FAILURE
        if isinstance(exception, BaseExceptionGroup):  # from a TaskGroup: the worst outcome in it
            found = {self.of_exception(one) for one in exception.exceptions}
            return next(one for one in (FAILURE, SUCCESS, IGNORED) if one in found)
        return SUCCESS if isinstance(exception, Exception) else IGNORED

    def of_result(self, result: Any) -> Outcome:
        """Success, unless is_failure(result) is true. Raises the exceptions of is_failure."""
        return FAILURE if self._is_failure is not None and self._is_failure(result) else SUCCESS


def _holds(predicate: Callable[[BaseException], object], exception: BaseException) -> bool:
    return not isinstance(exception, BaseExceptionGroup) and bool(predicate(exception))


def _matcher(option: str, given: Any) -> Any:
    """The value of an option as a tuple of exception types, or as a predicate."""
    if callable(given) and not isinstance(given, type):
        _check_function(option, "the exception", given)
        return given
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, type) else (given,)
    for one in found:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise PolicyError(f"{option} must be exception types, or one function of the exception, not {one!r}")
    return found


def _check_function(option: str, argument: str, given: Any) -> None:
    if not callable(given) or inspect.iscoroutinefunction(given):
        raise PolicyError(f"{option} must be a plain function of {argument}, or None, not {given!r}")
