"""How a call ended: turns exceptions and results into outcomes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, TypeAlias

from ._errors import PolicyError

Exceptions: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError, KeyboardInterrupt, GeneratorExit)


# literals, since reading the members of an Enum would slow a failing call down
Outcome: TypeAlias = Literal["success", "failure", "ignored"]
SUCCESS: Final = "success"
FAILURE: Final = "failure"
IGNORED: Final = "ignored"


@dataclasses.dataclass(frozen=True, slots=True)
class Classifier:
    """Turns exceptions and results into outcomes."""

    failures: tuple[type[BaseException], ...]
    ignore: tuple[type[BaseException], ...]
    is_failure: Callable[[Any], bool] | None

    def of_exception(self, exception: BaseException) -> Outcome:
        """Cancelled and ignored calls count as nothing. An exception outside `failures` counts as success."""
        if isinstance(exception, CANCELLED) or (self.ignore and isinstance(exception, self.ignore)):
            return IGNORED
        if isinstance(exception, self.failures):
            return FAILURE
        if isinstance(exception, BaseExceptionGroup):  # from a TaskGroup: the worst outcome in it
            found = {self.of_exception(one) for one in exception.exceptions}
            return next(one for one in (FAILURE, SUCCESS, IGNORED) if one in found)
        return SUCCESS if isinstance(exception, Exception) else IGNORED

    def of_result(self, result: Any) -> Outcome:
        """Success, unless is_failure(result) is true. Raises the exceptions of is_failure."""
        if self.is_failure is not None and self.is_failure(result):
            return FAILURE
        return SUCCESS


def exception_types(option: str, given: Any) -> tuple[type[BaseException], ...]:
    """The exception types in an option's value: one type, or an iterable of types. Raises PolicyError otherwise."""
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, type) else (given,)
    for one in found:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise PolicyError(f"{option} must be exception types, not {one!r}")
    return found
