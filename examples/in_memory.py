"""A circuit breaker for one process: the same rules without a server."""

from __future__ import annotations

import time

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Event, Policy


def show(event: Event) -> None:
    print(f"{event.old} -> {event.new}: {event.reason}")


breaker = CircuitBreaker("mail", policy=Policy(failure_threshold=3, reset_timeout=0.5), listeners=[show])
working = False


@breaker
def send(text: str) -> str:
    if not working:
        raise ConnectionError("the mail server is down")
    return f"sent {text!r}"


def main() -> None:
    global working
    for number in range(6):
        try:
            print(send(f"mail {number}"))
        except ConnectionError as error:
            print(f"failed: {error}")
        except CircuitOpenError as error:
            print(f"not tried, next in {error.retry_after:.1f} s")
    working = True
    time.sleep(0.6)
    print(send("mail 6"))


if __name__ == "__main__":
    main()
