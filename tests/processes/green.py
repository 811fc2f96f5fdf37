"""A process that gevent or eventlet has patched: argv is which of them, the server's URL and its pid."""

# ruff: noqa: E402
import sys
import warnings

LIBRARY, URL, SERVER = sys.argv[1], sys.argv[2], int(sys.argv[3])
if LIBRARY == "gevent":
    from gevent import monkey

    monkey.patch_all()
    from gevent import sleep, spawn
else:
    warnings.simplefilter("ignore")  # eventlet is deprecated, and says so
    import eventlet

    eventlet.monkey_patch()
    from eventlet import sleep, spawn

import json
import os
import signal
import time
from typing import Any

from process_jobs import TRIPS, admitted, fail, fine

from pybreaker_redis import CircuitBreaker

breaker = CircuitBreaker("green", redis=URL, policy=TRIPS, redis_timeout=1.0)
watch = breaker.watch()
ran: list[float] = []
over: list[bool] = []


def work() -> None:
    """Calls, until it is over."""
    while not over:
        if admitted(breaker):
            ran.append(time.monotonic())
        sleep(0.01)


def forked() -> Any:
    """What a child finds that os.fork() has made of this process."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        breaker.call(fine)
        os.write(theirs, json.dumps([breaker.instance, breaker.snapshot().source]).encode())
        os._exit(0)
    os.close(theirs)
    _, status = os.waitpid(child, 0)
    return status, json.loads(os.read(ours, 1000) or "[null, null]")


def main() -> None:
    breaker.call(fine)
    greens = [spawn(work) for _ in range(20)]
    deadline = time.monotonic() + 20
    while not watch.active and time.monotonic() < deadline:
        sleep(0.01)
    found: dict[str, Any] = {"watches": watch.active}
    ages = []
    for _ in range(10):
        ages.append(time.monotonic() - breaker._view.seen.sent)
        sleep(0.05)
    found |= {"oldest": max(ages), "child": forked(), "instance": breaker.instance}
    before = len(ran)
    os.kill(SERVER, signal.SIGSTOP)
    sleep(1.0)
    os.kill(SERVER, signal.SIGCONT)
    found["calls_while_hung"] = len(ran) - before
    while breaker.snapshot().source != "redis":
        breaker.call(fine)
        sleep(0.01)
    fail(CircuitBreaker("green", redis=URL, policy=TRIPS, lease=0, redis_timeout=10.0), 3)
    while admitted(breaker) and time.monotonic() < deadline + 20:
        sleep(0.01)
    over.append(True)
    for green in greens:
        green.join() if LIBRARY == "gevent" else green.wait()
    found["rejects"] = not admitted(breaker)
    watch.close()
    breaker.close()
    print(json.dumps(found), flush=True)


main()
