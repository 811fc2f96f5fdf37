"""Runs a program of these tests in a process of its own, and watches which connection each process uses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server_watch import Requests, _unescape

from pybreaker_redis._protocol import decode

HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    """The environment of a program. Its coverage is not taken: coverage has locks of its own, which forks copy."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
    return {**kept, **more}


def run(job: str, url: str, *args: object, options: Sequence[str] = (), program: str = "process_jobs.py") -> Any:
    """What a job printed. Fails if it fails. options: of Python itself."""
    command = [sys.executable, *options, str(HERE / program), job, url, *map(str, args)]
    done = subprocess.run(command, env=environment(URL=url), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    if isinstance(found, dict) and found.get("failed"):
        raise AssertionError(f"{found['failed']} children failed: {found['errors'][0]}\n{done.stderr[-4000:]}")
    return found


class Senders(Requests):
    """Which processes sent requests over each connection to the server, which must be reached by TCP."""

    def _read(self) -> None:
        self.runs: dict[bytes, list[str]] = defaultdict(list)  # by connection: who sent, in turns
        for line in self._file:
            words = [_unescape(word) for word in re.findall(rb'"((?:[^"\\]|\\.)*)"', line)]
            if words[:2] == [b"ECHO", b"end of the watch"]:
                return
            address = line.split(b"]", 1)[0].split()[-1]
            if words[0].upper() in (b"EVALSHA", b"EVAL") and b"lua" not in address:
                lists = words[2] == b"1"  # the script that lists a process
                sender = processes(words[4].decode() if lists else decode(words[6]).get("instance", ""))
                if sender and self.runs[address][-1:] != [sender]:
                    self.runs[address].append(sender)

    def shared(self) -> dict[bytes, list[str]]:
        """The connections over which processes have sent by turns. A port that is used anew has them one by one."""
        return {address: runs for address, runs in self.runs.items() if len(runs) > len(set(runs))}


def processes(instance: str) -> str:
    """The process of an instance: its breakers may have names of their own."""
    return instance.rpartition("-")[0] or instance
