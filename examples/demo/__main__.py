"""Runs the demo on the server in REDIS_URL, whose other keys it leaves alone, else on a server of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pybreaker_redis import CircuitBreaker, CircuitBreakerError, Policy, RedisUnavailableError
from pybreaker_redis.embedded import serve

from .crew import Crew
from .plan import GUARDS, RESET_TIMEOUT, failure_threshold
from .proof import promises, recording, summary
from .runs import perform
from .screens import screen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0 when every promise held, 1 when not, 2 without a server, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with serve() as url:
            return _demonstrate(options.workers, url, options.plain, options.record)
    except CircuitBreakerError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="A small HTTP service dies while worker processes call it: without a breaker, with a breaker in"
        " each process, and with one breaker that they share. Then the demo checks its promises (16 s). It runs on"
        " the server in REDIS_URL, where it deletes its own keys, else on a server of its own.",
    )
    parser.add_argument("--workers", type=_worker_count, default=4, metavar="N", help="worker processes; default: 4")
    parser.add_argument("--plain", action="store_true", help="print lines, even on a terminal")
    parser.add_argument(
        "--record", type=pathlib.Path, metavar="FILE", help="write the calls of the shared run to FILE, as JSON"
    )
    return parser


def _worker_count(text: str) -> int:
    count = int(text)
    if not 2 <= count <= 32:
        raise argparse.ArgumentTypeError(f"must be from 2 to 32, not {count}")
    return count


def _demonstrate(workers: int, url: str, plain: bool, record: pathlib.Path | None) -> int:
    name = f"demo-{os.getpid()}-{secrets.token_hex(4)}"
    threshold = failure_threshold(workers)
    policy = Policy(failure_threshold=threshold, reset_timeout=RESET_TIMEOUT, probe_timeout=5.0)
    with _shared_breaker(name, url, policy) as breaker, Crew(workers, url, name, policy) as crew:
        print(
            f"{workers} processes call an HTTP service that dies; {threshold} failures in a row are a trip", flush=True
        )
        crew.ready()
        with screen(plain) as shown:
            runs = {kind: perform(kind, crew, breaker, shown) for kind in GUARDS}
        held = promises(runs, breaker.history(), breaker.snapshot().state)
    print(*summary(runs), sep="\n")
    if record is not None:
        record.write_text(json.dumps(recording(runs)) + "\n", encoding="utf-8")
    print(*(f"{'ok' if promise.held else 'FAILED':8}{promise.text}" for promise in held), sep="\n", flush=True)
    return 0 if all(promise.held for promise in held) else 1


@contextlib.contextmanager
def _shared_breaker(name: str, url: str, policy: Policy) -> Iterator[CircuitBreaker]:
    """The breaker, on a server that answers; its keys are deleted after the block."""
    try:
        client = redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0, retry=Retry(NoBackoff(), 0))
        client.ping()
    except (redis.RedisError, ValueError) as error:
        raise RedisUnavailableError(f"no server for the demo answers at REDIS_URL: {error}") from error
    breaker = CircuitBreaker(name, redis=url, policy=policy, redis_timeout=1.0)
    try:
        yield breaker
    finally:
        with contextlib.suppress(redis.RedisError):
            client.delete(*breaker.keys)


if __name__ == "__main__":
    sys.exit(main())
