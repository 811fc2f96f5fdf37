"""When a process ends, each of its links reports what is still gathered, once, in redis_timeout at most. No I/O."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

_LATE = -100  # after other finalizers, which may still make guarded calls

servers: weakref.WeakSet[Any] = weakref.WeakSet()  # of wire.sync and wire.aio; each has _at_exit()
_pid = 0  # the process that last used a link


def begin() -> None:
    """Register this process to report at its end. Called when a process uses a link.

    The children of multiprocessing and billiard end by os._exit(): handlers of atexit do not run. Finalizers run, but
    not those that the parent has registered. Workers of billiard's pools, and thus of Celery, run no finalizers either:
    they only call on_exit.
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


@atexit.register  # at import: handlers that are registered later run first, and may still make guarded calls
def _end() -> None:
    for server in list(servers):
        if _pid == server._pid == os.getpid():  # else the link is a copy of the parent's
            server._at_exit()


def starts(thread: threading.Thread) -> bool:
    """Start a thread. Returns False if none can start: the interpreter ends, or a limit is reached."""
    if sys.is_finalizing():  # Python 3.11 would wait for ever: the thread never runs
        return False
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def _end_after(on_exit: Callable[..., Any] | None, *given: Any) -> None:
    try:
        if on_exit is not None:
            on_exit(*given)
    finally:
        _end()
