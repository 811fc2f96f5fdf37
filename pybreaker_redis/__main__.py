"""Entry point of `pybreaker-redis` and `python -m pybreaker_redis`. Needs the extra `cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ._extras import MissingExtraError, needs_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (see pybreaker_redis.cli), or 2 without the extra."""
    try:
        with needs_extra("the command line", "cli"):
            from .cli import main as run
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
