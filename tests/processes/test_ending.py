"""Processes that end while their breakers are at work, with a server that answers and with one that hangs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import programs
import pytest
from conftest import stopped

from pybreaker_redis.embedded import EmbeddedServer

WAYS = ["idle", "refreshing", "watching", "asking", "closed"]
WAYS += [f"async_{way}" for way in WAYS] + ["outage"]
TIMEOUT = 1.0  # the redis_timeout of the program
SLACK = 5.0  # seconds that a slow machine may take to end an interpreter


def end(server: EmbeddedServer, way: str, hung: bool, options: list[str]) -> tuple[float, int, str]:
    """How long a process took to end, its exit code, and what it wrote on stderr."""
    command = [sys.executable, *options, str(programs.HERE / "ending.py"), way, server.url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=programs.environment(), text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            with stopped(server) if hung else contextlib.nullcontext():
                out, errors = process.communicate("go\n", timeout=60)
                return time.monotonic() - float(out), process.returncode, errors
        finally:
            process.kill()


@pytest.mark.parametrize("options", [[], ["-X", "dev", "-W", "error"]], ids=["plain", "dev"])
@pytest.mark.parametrize("hung", [False, True], ids=["answers", "hangs"])
@pytest.mark.parametrize("way", WAYS)
def test_ends_soon_and_silently(own_server: EmbeddedServer, way: str, hung: bool, options: list[str]) -> None:
    """A process ends within redis_timeout, successfully, and says nothing."""
    took, code, errors = end(own_server, way, hung, options)
    assert (code, errors) == (0, "")
    assert took < TIMEOUT + SLACK
