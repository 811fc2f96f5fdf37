"""`pybreaker-redis` and `python -m pybreaker_redis`: the program of .cli; without its extra the demo alone."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence


def _worker_count(text: str) -> int:
    count = int(text)
    if not 2 <= count <= 32:
        raise argparse.ArgumentTypeError(f"must be from 2 to 32, not {count}")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
        from .cli import main as run

        return run(arguments)
    return _demo_alone(arguments)


def _demo_alone(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pybreaker_redis",
        description="A circuit breaker in Redis.",
        epilog="The other commands need: pip install 'pybreaker_redis[cli]'",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="a service that misbehaves, worker processes, one shared breaker (16 s)",
        description="Lets a small HTTP service die under worker processes: unguarded, with a breaker in each"
        " process, and with one breaker that they share; then checks what it promised. Uses REDIS_URL where"
        " set (and deletes its own keys), else a server of its own.",
    )
    demo.add_argument("--workers", type=_worker_count, default=4, metavar="N", help="worker processes, default 4")
    demo.add_argument("--plain", action="store_true", help="plain lines also on a terminal")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    from ._demo import main as run_demo

    return run_demo(options.workers, plain=options.plain)


if __name__ == "__main__":
    sys.exit(main())
