"""What the decision code asks of its shell: it yields one of these and is sent the result, or thrown the error."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ._protocol import Request
from ._view import Event

T = TypeVar("T")


class Ask(NamedTuple):
    """Run a script on Redis; gives its Reply."""

    name: str
    request: Request


class ReadHistory(NamedTuple):
    """Read the newest entries of the history stream from Redis; gives a list of their fields."""

    entries: int


class Tell(NamedTuple):
    """Tell the listeners."""

    event: Event


class Beside(NamedTuple):
    """Carry out these steps beside the calls; nobody waits for them."""

    steps: Steps[None]


class Refresh(NamedTuple):
    """Renew the view, one caller at a time. wait: return only when it was renewed, by whomever."""

    wait: bool


Step: TypeAlias = Ask | ReadHistory | Tell | Beside | Refresh
Steps: TypeAlias = Generator[Step, Any, T]
