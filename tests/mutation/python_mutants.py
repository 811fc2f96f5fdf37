"""Mutation testing of the state machine in Python: mutmut on _rules.py, _window.py and _memory.py, in a copy.

`make mutants`, or alone `python tests/mutation/python_mutants.py`; what is changed and what is run: pyproject.toml.
"""

from __future__ import annotations

import collections
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
COPY = ROOT / "build" / "mutants" / "python"


def mutmut(*arguments: str) -> str:
    """What mutmut prints, run in the copy."""
    command = [str(pathlib.Path(sys.executable).parent / "mutmut"), *arguments]
    environment = {**os.environ, "SEQUENCES": "40"}  # of test_engines_agree
    done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-5000:]}\n{done.stderr}")
    return done.stdout


def main() -> int:
    """0 when every mutant has been tried, whatever became of it."""
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)
    for name in ("pyproject.toml", "lua", "pybreaker_redis", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, COPY / name)
    mutmut("run", "--max-children", "2")
    results = [line.strip().split(": ") for line in mutmut("results", "--all", "true").splitlines() if ": " in line]
    counts = collections.Counter(result for _, result in results)
    with open(COPY.with_suffix(".txt"), "w", encoding="utf-8") as report:
        for name, result in results:
            if result != "killed":
                print(f"{result}: {name}\n{mutmut('show', name)}", file=report)
    print(f"Python: {len(results)} mutants,", ", ".join(f"{count} {result}" for result, count in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
