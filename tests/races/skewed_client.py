"""A client whose clocks are off by a constant: argv is the server's URL, a breaker's name, and the seconds."""

import json
import sys
import time

url, name, offset = sys.argv[1], sys.argv[2], float(sys.argv[3])
for clock in ("time", "monotonic", "perf_counter"):
    plain, plain_ns = getattr(time, clock), getattr(time, f"{clock}_ns")
    setattr(time, clock, lambda plain=plain: plain() + offset)
    setattr(time, f"{clock}_ns", lambda plain_ns=plain_ns: plain_ns() + int(offset * 1e9))

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy  # noqa: E402 the clocks come first

breaker = CircuitBreaker(
    name, redis=url, policy=Policy(failure_threshold=1, reset_timeout=1.0), lease=0.05, redis_timeout=30.0
)
breaker.acquire().failure()
waits = []
while True:
    try:
        permit = breaker.acquire()
        break
    except CircuitOpenError as error:
        waits.append(error.retry_after)
permit.success()
print(json.dumps({"clock": time.time(), "first": waits[0], "least": min(waits), "state": breaker.snapshot().state}))
