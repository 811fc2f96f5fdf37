"""What does a script cost the server, in instructions?

Runs the server under `valgrind --tool=callgrind`, which counts the instructions of the process: unlike microseconds
they hardly differ from one run to the next. A cost is that of one EVALSHA, from two runs of different length, less that
of a no-op EVALSHA with the same keys and the same request.

    python benchmarks/server_cost.py                    # the scripts of this tree
    python benchmarks/server_cost.py --against 8dc0b41  # and those of another revision beside them, with the ratio
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import redis

from pybreaker_redis._protocol import decode, encode, keys_of
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import LIBRARY, SCRIPTS, joined

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEYS = keys_of("discovery")
PATIENT = {"failure_threshold": 10**9}
RATES = {"error_rate_threshold": 0.9, "slow_call_rate_threshold": 0.9, "slow_call_duration_ms": 1000}
WINDOW = {**RATES, **PATIENT, "window_ms": 86_400_000}
SHORT, LONG = 200, 1200  # calls of the two runs
START_TIMEOUT = 60.0
Texts = dict[str, str]


class Case(NamedTuple):
    """A script with the request that is repeated; no script: the no-op in its place."""

    script: str
    request: dict[str, Any]


CASES = {
    "acquire, closed": Case("acquire", {}),
    "acquire, closed, policy": Case("acquire", {"policy": PATIENT}),
    "record, success": Case("record", {"successes": 100}),
    "record, success, policy": Case("record", {"successes": 100, "policy": PATIENT}),
    "record, failure": Case("record", {"failures": 1, "policy": PATIENT}),
    "record, failure, window": Case("record", {"successes": 99, "failures": 1, "policy": WINDOW}),
    "control, reset": Case("control", {"action": "reset"}),
    "control, force_open": Case("control", {"action": "force_open", "duration_ms": 600_000}),
    "control, force_closed": Case("control", {"action": "force_closed", "duration_ms": 600_000}),
    "control, set_policy": Case("control", {"action": "set_policy", "override": PATIENT, "duration_ms": 600_000}),
    "control, set_policy again": Case("control", {"action": "set_policy", "override": PATIENT}),
    "snapshot, closed": Case("snapshot", {}),
}


def of_tree(name: str) -> str | None:
    """A file of lua/ in this tree."""
    path = ROOT / "lua" / f"{name}.lua"
    return path.read_text(encoding="utf-8") if path.exists() else None


def shown(revision: str, path: str) -> str | None:
    """A file of a revision."""
    command = ["git", "-C", str(ROOT), "show", f"{revision}:{path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout


def composed(revision: str | None) -> Texts:
    """What Redis runs for each script. A revision with a breaker.lua puts it before the script as it is."""
    files = {
        name: of_tree(name) if revision is None else shown(revision, f"lua/{name}.lua")
        for name in ("breaker", *LIBRARY, *SCRIPTS)
    }
    found = {name: text for name, text in files.items() if text is not None}
    if not found:
        raise SystemExit(f"no Lua in {revision}")
    if "breaker" in found:
        return {name: found["breaker"] + found[name] for name in SCRIPTS}
    join = joined if revision is None else joined_by(revision)
    return {name: join(found, name) for name in SCRIPTS}


def joined_by(revision: str) -> Callable[[Texts, str], str]:
    """What a revision joins its files with: the order of its functions may differ."""
    module = vars(types.ModuleType("scripts"))
    exec(shown(revision, "pybreaker_redis/wire/scripts.py") or "", module)
    join: Callable[[Texts, str], str] = module["joined"]
    return join


@contextlib.contextmanager
def server(folder: pathlib.Path) -> Iterator[redis.Redis]:
    """A server under valgrind; when the block has ended, folder/counted holds its instructions."""
    socket, counted = folder / "r.sock", folder / "counted"
    command = [
        *("valgrind", "--tool=callgrind", f"--callgrind-out-file={counted}", EmbeddedServer().binary),
        *("--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", "", "--hz", "1"),
    ]
    with open(folder / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            with redis.Redis(unix_socket_path=str(socket), socket_timeout=START_TIMEOUT) as client:
                deadline = time.monotonic() + START_TIMEOUT
                while True:
                    try:
                        client.ping()
                        break
                    except redis.ConnectionError:
                        if process.poll() is not None or time.monotonic() > deadline:
                            raise SystemExit((folder / "log").read_text(errors="replace")) from None
                        time.sleep(0.05)
                yield client
        finally:
            process.terminate()


def instructions(texts: Texts, case: Case, noop: bool, calls: int) -> int:
    """All instructions of a server that runs a case so many times."""
    with tempfile.TemporaryDirectory() as name:
        with server(pathlib.Path(name)) as client:
            body = encode({"instance": "host:1", **case.request})
            if case.script == "record":  # under the generation that acquire replies
                known = decode(client.eval(texts["acquire"], 3, *KEYS, encode({})))["generation"]
                body = encode({"instance": "host:1", "generation": known, **case.request})
            else:
                client.eval(texts["acquire"], 3, *KEYS, encode({}))
            sha = client.script_load("return 1" if noop else texts[case.script])
            with client.pipeline(transaction=False) as pipeline:
                for _ in range(calls):
                    pipeline.evalsha(sha, 3, *KEYS, body)
                pipeline.execute()
        counted = (pathlib.Path(name) / "counted").read_text()
    return int(re.search(r"^(?:summary|totals): (\d+)", counted, re.MULTILINE)[1])  # type: ignore[index]


def cost(texts: Texts, case: Case) -> float:
    """Instructions of one call, over those of a no-op."""

    def each(noop: bool) -> float:
        return (instructions(texts, case, noop, LONG) - instructions(texts, case, noop, SHORT)) / (LONG - SHORT)

    return each(noop=False) - each(noop=True)


def main() -> None:
    """Prints a table in thousands of instructions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="compare with the scripts of a git revision")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the cases whose name has this text")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="servers at a time")
    options = parser.parse_args()
    versions = {"here": composed(None)}
    if options.against:
        versions[options.against] = composed(options.against)
    cases = {name: case for name, case in CASES.items() if options.only in name}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            (name, version): pool.submit(cost, texts, case)
            for name, case in cases.items()
            for version, texts in versions.items()
        }
        costs = {key: future.result() / 1000 for key, future in futures.items()}
    print(f"{'thousands of instructions':28}" + "".join(f"{version:>10}" for version in versions))
    for name in cases:
        row = [costs[name, version] for version in versions]
        ratio = f"{row[0] / row[1]:8.2f}" if options.against else ""
        print(f"{name:28}" + "".join(f"{value:10.1f}" for value in row) + ratio)
    if options.json:
        found = {name: {version: costs[name, version] for version in versions} for name in cases}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
