"""Entry point of `pybreaker-redis` and `python -m pybreaker_redis`. Needs the extra `cli`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (see pybreaker_redis.cli), or 2 without the extra."""
    if not (importlib.util.find_spec("typer") and importlib.util.find_spec("rich")):
        print("the command line needs the extra cli: pip install 'pybreaker_redis[cli]'", file=sys.stderr)
        return 2
    from .cli import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
