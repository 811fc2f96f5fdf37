"""A process that calls when it is told to, as AWS Lambda's runtime and a pod's web server do.

Each line of input is an event, and each line of output its answer, as JSON. $URL names the server, $POLICY has the
policy's fields. $POD is the host name to take, $NODE the option `host`. With $HANDLES, SIGTERM ends it as the page on
deployment says.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

if "POD" in os.environ:
    socket.sethostname(os.environ["POD"])
if "HANDLES" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

from process_jobs import Boom, boom, fine, outages

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Event, Policy

events: list[Event] = []
breaker = CircuitBreaker(
    "discovery",
    redis=os.environ["URL"],
    policy=Policy(**json.loads(os.environ["POLICY"])),
    host=os.environ.get("NODE"),
    listeners=[events.append],
    redis_timeout=10.0,
)


def handler(event: dict[str, Any]) -> str:
    """Calls as often as the event says. Returns how the last call ended."""
    outcome = ""
    try:
        for _ in range(event.get("calls", 1)):
            try:
                breaker.call(boom if event.get("fails") else fine)
                outcome = "answered"
            except Boom:
                outcome = "failed"
            except CircuitOpenError:
                outcome = "rejected"
    finally:
        if event.get("flushes", True):
            breaker.flush()
    return outcome


for line in sys.stdin:
    answer = {"outcome": handler(json.loads(line)), "instance": breaker.instance, "pid": os.getpid()}
    print(json.dumps({**answer, "outages": outages(events)}), flush=True)
