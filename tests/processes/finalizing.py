"""A guarded call of an object that is destroyed while the interpreter is finalized. argv: the server, earlier calls.

Prints what the call returns.
"""

from __future__ import annotations

import sys
from typing import Any

from pybreaker_redis import CircuitBreaker, Policy

breaker = CircuitBreaker("finalizing", redis=sys.argv[1], redis_timeout=1.0, policy=Policy(failure_threshold=10**9))


class Last:
    """Calls when it is destroyed: modules are cleared by then, nothing can be imported, and no thread starts."""

    def __del__(self, call: Any = breaker.call, write: Any = sys.__stdout__.write) -> None:  # type: ignore[union-attr]
        write(f"{call(lambda: 'called')}\n")


for _ in range(int(sys.argv[2])):
    breaker.call(int)
last = Last()
