"""Random stories, told to pybreaker and to the module that takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pybreaker
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybreaker_redis.compat import pybreaker as ours

from .test_pybreaker_stories import Library, boom, busy, fine

Act = Callable[[Any], Any]


def block(breaker: Any, act: Callable[[], Any]) -> Any:
    with breaker.calling():
        return act()


def iterated(breaker: Any, act: Callable[[], Any]) -> list[Any]:
    @breaker
    def items() -> Any:
        yield 1
        act()

    return list(items())


def setting(name: str, value: Any) -> Act:
    return lambda breaker: setattr(breaker, name, value)


CALLS = {act.__name__: act for act in (fine, boom, busy)}
ACTS: dict[str, Act] = {
    **{f"call {name}": lambda breaker, act=act: breaker.call(act) for name, act in CALLS.items()},
    **{f"decorated {name}": lambda breaker, act=act: breaker(act)() for name, act in CALLS.items()},
    **{f"block {name}": lambda breaker, act=act: block(breaker, act) for name, act in CALLS.items()},
    **{f"generator {name}": lambda breaker, act=act: iterated(breaker, act) for name, act in CALLS.items()},
    "open": lambda breaker: breaker.open(),
    "close": lambda breaker: breaker.close(),
    "half_open": lambda breaker: breaker.half_open(),
    "fail_max 1": setting("fail_max", 1),
    "fail_max 3": setting("fail_max", 3),
    "success_threshold 1": setting("success_threshold", 1),
    "success_threshold 2": setting("success_threshold", 2),
    "reset_timeout": setting("reset_timeout", 600),
    "exclude": lambda breaker: breaker.add_excluded_exception(LookupError),
    "include": lambda breaker: breaker.remove_excluded_exception(LookupError),
    "state": lambda breaker: breaker.state.name,
    "limits": lambda breaker: (breaker.fail_max, breaker.success_threshold, breaker.reset_timeout),
}


def told(library: Library, acts: list[str], listens: bool, error_of_its_own: bool) -> list[Any]:
    """What happens, but for fail_counter once a trial call has succeeded: see the module's docstring."""
    own = {} if listens else {"listeners": None}
    breaker = library.breaker(fail_max=2, throw_new_error_on_trip=error_of_its_own, **own)
    seen: list[Any] = []
    for name in acts:
        began = len(library.diary)
        library.note(breaker, lambda name=name: ACTS[name](breaker))
        seen.append((name, library.diary[began:]))
        if breaker.current_state == "half-open" and breaker.success_counter > 0:
            breaker.close()  # from here on fail_counter differs
            breaker.half_open()
    return [(name, [masked(entry) for entry in entries]) for name, entries in seen]


def masked(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    """The entry of a success, without the count of failures that it shows."""
    if entry[:2] == ("", "success"):
        return entry[:2] + entry[3:]
    if len(entry) == 4 and entry[1] == "half-open" and entry[3] > 0:
        return entry[:2] + entry[3:]
    if entry[:2] == ("", "before"):  # the function behind a block or an iteration has another name
        return entry[:2]
    return entry


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(list(ACTS)), max_size=25), st.booleans(), st.booleans())
def test_in_memory(acts: list[str], listens: bool, error_of_its_own: bool) -> None:
    """Whatever happens, in whatever order, both libraries tell the same in memory."""
    one, other = (told(Library(module, None), acts, listens, error_of_its_own) for module in (ours, pybreaker))
    assert one == other


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(st.sampled_from(list(ACTS)), max_size=25), listens=st.booleans(), strict=st.booleans())
def test_on_redis(client: redis.Redis, acts: list[str], listens: bool, strict: bool) -> None:
    """So they do on Redis."""
    mine = Library(ours, client, lease=0 if strict else 0.1)
    assert told(mine, acts, listens, True) == told(Library(pybreaker, client), acts, listens, True)
