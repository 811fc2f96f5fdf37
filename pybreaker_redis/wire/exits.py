"""When a process ends, each of its links reports what is still gathered: once, and not for long. No I/O."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

_LATE = -100  # after the finalizers of others, which may still call

servers: weakref.WeakSet[Any] = weakref.WeakSet()  # those of wire.sync and wire.aio; all have end()
_pid = 0  # of the process that has used a link


def begin() -> None:
    """Called when a process uses a link: let it report at its end.

    The children of multiprocessing and billiard end by os._exit(), without atexit, and with none of the finalizers that
    their parent has registered. Workers of billiard's pools, thus Celery's, even skip those: they only call on_exit.
    """
    global _pid
    if _pid == os.getpid():
        return
    _pid = os.getpid()
    for name in ("multiprocessing.util", "billiard.util"):
        if (util := sys.modules.get(name)) is not None:
            util.Finalize(None, _end, exitpriority=_LATE)
    billiard = sys.modules.get("billiard.process")
    worker: Any = getattr(billiard and billiard.current_process(), "_target", None)
    if hasattr(worker, "on_exit"):
        worker.on_exit = functools.partial(_end_after, worker.on_exit)


@atexit.register  # once, here: before the handlers of whoever imports this, which run first then
def _end() -> None:
    if _pid == os.getpid():  # else its links are copies of those of its parent
        for server in list(servers):
            server.end()


def _end_after(on_exit: Callable[..., Any] | None, *given: Any) -> None:
    try:
        if on_exit is not None:
            on_exit(*given)
    finally:
        _end()
