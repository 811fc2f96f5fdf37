"""The tests on every Python that is found, with the oldest and the newest redis-py that pyproject.toml allows.

    python tests/run_pythons.py [--full] [PYTEST ARGUMENT ...]

Each combination gets a virtual environment of its own under build/pythons. Without arguments, and without --full, the
races, faults, demo and packaging tests are left out: they show little that depends on the interpreter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ("python3.11", "python3.12", "python3.13", "python3.14", "python3.13t", "python3.14t")
QUICK = ("tests/contract", "tests/scripts", "tests/model", "tests/test_sync.py", "tests/test_async.py")
QUICK += ("tests/test_outage.py", "tests/test_protocol.py", "tests/test_shells.py")


def pythons() -> dict[str, str]:
    """The interpreters by their name, those of pyenv too: its shims run only those that are switched on."""
    found = {}
    homes = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin"))
    for name in NAMES:
        candidates = [shutil.which(name), *[str(home / name) for home in homes]]
        for candidate in filter(None, candidates):
            if works(candidate, name):
                found[name] = candidate
                break
    return found


def works(program: str, name: str) -> bool:
    """Whether it is what its name says."""
    ask = """if True:
        import sys, sysconfig
        threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
        print(f"{sys.version_info[0]}.{sys.version_info[1]}" + ("t" if threaded else ""))"""
    try:
        done = subprocess.run([program, "-c", ask], capture_output=True, text=True, timeout=30)
    except OSError:
        return False
    return f"python{done.stdout.strip()}" == name


def oldest_redis() -> str:
    """The requirement that is just met."""
    [version] = re.findall(r'"redis>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return f"redis=={version}.*" if version.count(".") == 1 else f"redis=={version}"


def run(program: str, name: str, which: str, arguments: list[str]) -> bool:
    folder = ROOT / "build" / "pythons" / f"{name}-{which}"
    python = str(folder / "bin" / "python")
    requirement = oldest_redis() if which == "oldest" else "redis"
    quiet = ["--quiet", "--disable-pip-version-check"]
    steps = [
        [program, "-m", "venv", "--clear", str(folder)],
        [python, "-m", "pip", "install", *quiet, "--editable", ".[dev]"],
        [python, "-m", "pip", "install", *quiet, "--upgrade", requirement],
        [python, "-c", "import redis, sys; print('Python', sys.version.split()[0], 'redis-py', redis.__version__)"],
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
    ]
    return all(subprocess.run(step, cwd=ROOT).returncode == 0 for step in steps)


def main() -> int:
    arguments = [one for one in sys.argv[1:] if one != "--full"]
    if not arguments and "--full" not in sys.argv:
        arguments = list(QUICK)
    found = pythons()
    results = {
        (name, which): run(program, name, which, arguments)
        for name, program in found.items()
        for which in ("oldest", "newest")
    }
    for (name, which), passed in results.items():
        print(f"{name} with the {which} redis-py: {'passed' if passed else 'FAILED'}")
    print("not found:", ", ".join(name for name in NAMES if name not in found) or "none")
    return 0 if results and all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
