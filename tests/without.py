"""Runs code as if packages were not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

HIDE = """
import sys
absent = sys.argv.pop(1).split()

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder)
"""


def run_without(packages: Iterable[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the code in a new process that finds none of these packages. arguments: its sys.argv[1:]."""
    command = [sys.executable, "-c", HIDE + code, " ".join(packages), *arguments]
    wide = {**os.environ, "COLUMNS": "300"}
    return subprocess.run(command, env=wide, capture_output=True, text=True, timeout=60, check=False)
