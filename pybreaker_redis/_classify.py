"""How a call ended: turns exceptions and results into outcomes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, TypeAlias

from ._errors import CircuitOpenError, PolicyError
from ._policy import LONGEST_OPEN
from ._protocol import printable

Exceptions: TypeAlias = (
    type[BaseException] | Iterable[type[BaseException]] | Callable[[Any], object]
)  # types, or a predicate, which may take a narrower type than BaseException
RetryAfter: TypeAlias = Callable[[Any], float | str | None]
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError, KeyboardInterrupt, GeneratorExit)
_SPECIAL = (*CANCELLED, CircuitOpenError, BaseExceptionGroup)
_ANY = (Exception,)  # shared by most breakers
logger = logging.getLogger("pybreaker_redis")


# literals, since reading the members of an Enum would slow a failing call down
Outcome: TypeAlias = Literal["success", "failure", "ignored"]
SUCCESS: Final = "success"
FAILURE: Final = "failure"
IGNORED: Final = "ignored"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """How a manager classifies the calls of one service. None: the manager's option applies.

    failures, ignore, is_failure, retry_after: as for CircuitBreaker.
    """

    failures: Exceptions | None = None
    ignore: Exceptions | None = None
    is_failure: Callable[[Any], object] | None = None
    retry_after: RetryAfter | None = None
    __hash__ = None  # type: ignore[assignment]  # it may hold lists


class Classifier:
    """Turns exceptions and results into outcomes. Raises PolicyError for an invalid option.

    owner: whose options these are: the name of a breaker.
    """

    __slots__ = ("_failures", "_ignore", "_is_failure", "_logged", "_owner", "_retry_after")

    def __init__(
        self,
        owner: str,
        failures: Exceptions,
        ignore: Exceptions,
        is_failure: Callable[[Any], object] | None,
        retry_after: RetryAfter | None,
    ) -> None:
        self._owner = owner
        self._failures, self._ignore = _matcher("failures", failures), _matcher("ignore", ignore)
        if is_failure is not None:
            _check_function("is_failure", "the result", is_failure)
        if retry_after is not None:
            _check_function("retry_after", "the exception or result", retry_after)
        self._is_failure, self._retry_after = is_failure, retry_after
        self._logged: tuple[str, ...] = ()

    def of_exception(self, exception: BaseException) -> Outcome:
        """Cancelled, rejected and ignored calls do not count. An exception outside `failures` counts as success.

        If a predicate raises, that is logged once, and the call counts as failed. Of an exception group, predicates get
        the single exceptions.
        """
        ignore, failures = self._ignore, self._failures
        try:
            if isinstance(exception, _SPECIAL) and self._says_nothing(exception):
                return IGNORED
            if ignore and (isinstance(exception, ignore) if type(ignore) is tuple else _holds(ignore, exception)):
                return IGNORED
            if isinstance(exception, failures) if type(failures) is tuple else _holds(failures, exception):
                return FAILURE
        except Exception:
            self._log_once("failures= or ignore=", exception)
            return FAILURE
        if isinstance(exception, BaseExceptionGroup):  # from a TaskGroup: the worst outcome in it
            found = {self.of_exception(one) for one in exception.exceptions}
            return next(one for one in (FAILURE, SUCCESS, IGNORED) if one in found)
        return SUCCESS if isinstance(exception, Exception) else IGNORED

    def _says_nothing(self, exception: BaseException) -> bool:
        """Whether this says nothing about the service: a cancellation, a nested rejection, or a group of what is
        ignored."""
        if isinstance(exception, BaseExceptionGroup):
            return all(self.of_exception(one) == IGNORED for one in exception.exceptions)
        return not isinstance(exception, CircuitOpenError) or exception.name == self._owner

    def of_result(self, result: Any) -> Outcome:
        """Success, unless is_failure(result) is true. Raises the exceptions of is_failure."""
        return FAILURE if self._is_failure is not None and self._is_failure(result) else SUCCESS

    def hold_ms_of(self, ended: Any) -> int:
        """Milliseconds after which the service said to come back, according to retry_after=; 0 if it did not say.

        ended: the exception or the result of the call. If retry_after= raises, that is logged once, and there is no
        hold. Of an exception group, it gets the single exceptions.
        """
        if self._retry_after is None:
            return 0
        if isinstance(ended, BaseExceptionGroup):
            asked = [one for one in ended.exceptions if self.of_exception(one) != IGNORED]
            return max(map(self.hold_ms_of, asked), default=0)
        try:
            return hold_ms(self._retry_after(ended))
        except Exception:
            self._log_once("retry_after=", ended)
            return 0

    def _log_once(self, option: str, ended: Any) -> None:
        if option not in self._logged:
            self._logged = (*self._logged, option)
            logger.exception("%s of %r failed for %r", option, self._owner, ended)


def hold_ms(retry_after: float | str | None) -> int:
    """The length of a hold in milliseconds, at most 30 days. 0 for None, NaN, and zero or less.

    retry_after: seconds, as a number or as the text of a header. Raises PolicyError if it is not a number.
    """
    try:
        wait = float(retry_after or 0)
    except (TypeError, ValueError, OverflowError):
        raise PolicyError(f"retry_after must be a number of seconds, or None, not {retry_after!r}") from None
    return math.ceil(min(wait, LONGEST_OPEN) * 1000) if wait > 0 else 0


def described(error: BaseException, with_message: bool) -> str:
    """The type of an error, and its message: at most 200 printable ASCII characters, as the scripts require."""
    text = type(error).__name__
    if with_message:
        try:
            text = f"{text}: {message}" if (message := str(error)) else text
        except Exception:  # the exception's own __str__ may raise
            logger.debug("the message of a %s cannot be read", text, exc_info=True)
    return printable(text, 200)


def _holds(predicate: Callable[[BaseException], object], exception: BaseException) -> bool:
    return not isinstance(exception, BaseExceptionGroup) and bool(predicate(exception))


def _matcher(option: str, given: Any) -> Any:
    """The value of an option as a tuple of exception types, or as a predicate."""
    if callable(given) and not isinstance(given, type):
        _check_function(option, "the exception", given)
        return given
    if given is Exception:
        return _ANY
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (type, str)) else (given,)
    for one in found:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise PolicyError(f"{option} must be exception types, or one function of the exception, not {one!r}")
    return found


def _check_function(option: str, argument: str, given: Any) -> None:
    if not callable(given) or inspect.iscoroutinefunction(given):
        raise PolicyError(f"{option} must be a plain function of {argument}, or None, not {given!r}")
