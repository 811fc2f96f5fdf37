"""`pybreaker-redis` and `python -m pybreaker_redis` run the command line of the extra `cli`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: see pybreaker_redis.cli; 2 where the extra is missing."""
    if not (importlib.util.find_spec("typer") and importlib.util.find_spec("rich")):
        print("the command line needs the extra cli: pip install 'pybreaker_redis[cli]'", file=sys.stderr)
        return 2
    from .cli import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
