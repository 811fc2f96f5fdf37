"""The window: counts of calls over time, in ten buckets. lua/window.lua does the same in Redis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from ._policy import WINDOW_RULES


@dataclasses.dataclass(slots=True)
class Window:
    """The totals of ten buckets. past: (calls, failures, slow) of each of the nine older buckets, latest first.

    shorter_since: the newest bucket when a report first asked for shorter ones, else None.
    """

    bucket_ms: int
    newest: int
    calls: int = 0
    failures: int = 0
    slow: int = 0
    past: tuple[tuple[int, int, int], ...] = ()
    shorter_since: int | None = None


class Sums(NamedTuple):
    """The counts of a window."""

    calls: int
    failures: int
    slow: int


def bucket_ms(policy: dict[str, Any]) -> int | None:
    """The length of a bucket if a window can trip the circuit, else None: none is needed."""
    for name in WINDOW_RULES:
        if policy[name]:
            return int(policy["window_ms"] // 10)
    return None


def rebucketed(window: Window, bucket_ms: int, newest: int) -> Window:
    """The counts in buckets of this length up to the newest. A count stays with the time at which its bucket began."""
    buckets = [[0, 0, 0] for _ in range(10)]  # by age
    left = [window.calls, window.failures, window.slow]

    def put(number: int, counts: Iterable[int]) -> None:
        age = newest - min(number * window.bucket_ms // bucket_ms, newest)
        if age < 10:
            buckets[age] = [there + more for there, more in zip(buckets[age], counts, strict=True)]

    for age, counts in enumerate(window.past, 1):
        put(window.newest - age, counts)
        left = [total - count for total, count in zip(left, counts, strict=True)]
    put(window.newest, left)

    other = Window(bucket_ms, newest, past=tuple((calls, failures, slow) for calls, failures, slow in buckets[1:]))
    other.calls, other.failures, other.slow = (sum(counts) for counts in zip(*buckets, strict=True))
    return other


def move_back(window: Window, calls: int, age_ms: int, now: int) -> None:
    """Move calls from the newest bucket to the bucket of age_ms ago, or out of the window if that bucket has left."""
    if calls <= 0:
        return  # all were reported before, as pending
    age = now // window.bucket_ms - (now - age_ms) // window.bucket_ms
    if age > 9:
        window.calls -= calls
        return
    past = [*window.past, *[(0, 0, 0)] * (9 - len(window.past))]
    there, failures, slow = past[age - 1]
    past[age - 1] = there + calls, failures, slow
    window.past = tuple(past)


def window_at(window: Window, bucket_ms: int | None, now: int, overridden: bool = False) -> Window:
    """The window at this time, without expired counts. It keeps its buckets if shorter ones are wanted.

    bucket_ms: the wanted length, or None. overridden: whether a policy override, which every client follows, wants it.
    """
    newest, since = now // window.bucket_ms, window.shorter_since
    passed = newest - window.newest
    if abs(passed) >= 10:
        window, since = Window(window.bucket_ms, newest), None
    elif passed > 0:
        window = rebucketed(window, window.bucket_ms, newest)
    else:
        window = dataclasses.replace(window)
    if bucket_ms is None:
        window.shorter_since = since
        return window
    keeps = bucket_ms < window.bucket_ms and window.calls + window.failures + window.slow > 0 and not overridden
    window.shorter_since = (window.newest if since is None else min(since, window.newest)) if keeps else None
    if bucket_ms == window.bucket_ms or (
        window.shorter_since is not None and window.newest - window.shorter_since < 10
    ):
        return window
    return rebucketed(window, bucket_ms, now // bucket_ms)


def sums(window: Window) -> Sums:
    """Calls, failures and slow calls. Failures and slow calls may have been reported before their calls, so they are
    limited to the calls."""
    return Sums(window.calls, min(window.failures, window.calls), min(window.slow, window.calls))
