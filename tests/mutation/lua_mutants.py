"""Mutation testing of the Lua: changes one thing at a time in a copy of this tree, and runs the tests against it.

`make mutants`, or alone `python tests/mutation/lua_mutants.py`; --again tries only those that survived the last time.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from lupa.lua51 import LuaRuntime

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
REPORT = ROOT / "build" / "mutants" / "lua.json"
FILES = ("breaker", "acquire", "record", "control", "snapshot")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants")
STAGES = [  # the second for those that survive the first
    ("tests/contract", "tests/scripts", "-k", "not memory and not fuzz", *OPTIONS),
    ("tests/scripts/test_breaker_fuzz.py", *OPTIONS),
]
SECONDS = 180  # for one stage of one mutant
LONGEST = 6  # lines of a statement that is removed whole

TOKEN = re.compile(
    r"(?P<skip>--\[\[[\s\S]*?\]\]|--[^\n]*|\s+)|(?P<text>'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")"
    r"|(?P<number>\d+(?:\.\d+)?(?:e\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\.\.\.|\.\.|[<>=~]=|.)"
)
SWAPS = {
    "<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("~=",), "~=": ("==",),
    "+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",), "%": ("*",),
    "and": ("or",), "or": ("and",), "not": ("",), "true": ("false",), "false": ("true",), "break": ("",),
    "min": ("max",), "max": ("min",), "floor": ("ceil",), "huge": ("pi",),
}  # fmt: skip
UNARY_AFTER = {"(", ",", "=", "{", "return", "and", "or", "==", "<", ">"}


class Mutant(NamedTuple):
    """A changed source: file, first changed line, that line and what it became, and the whole text."""

    file: str
    line: int
    before: str
    after: str
    source: str


def changes(source: str) -> Iterator[tuple[int, int, str]]:
    """(begin, end, what stands there instead) of every change that one token or condition allows."""
    tokens = [match for match in TOKEN.finditer(source) if match.lastgroup != "skip"]
    for before, token in itertools.pairwise([None, *tokens]):
        text, begin, end = token[0], token.start(), token.end()
        if token.lastgroup == "number":
            value = float(text) if "." in text or "e" in text else int(text)
            yield begin, end, repr(value + 1)
        elif text == "-" and before is not None and before[0] in UNARY_AFTER:
            yield begin, end, ""
        elif token.lastgroup in ("name", "sign"):
            for other in SWAPS.get(text, ()):
                yield begin, end, other
    for match in re.finditer(r"\b(?:if|elseif) ([\w.:\[\]]+(?:\([^()]*\))?) then\b", source):
        yield match.start(1), match.end(1), f"not {match[1]}"


def removals(source: str, compiles: functools.partial[bool]) -> Iterator[tuple[int, int, str]]:
    """The same of every statement, as the shortest run of whole lines from its first one that can go."""
    code = source.index("]]") + 2
    starts = [match.start() for match in re.finditer(r"^(?=[^\n]*\S)", source, re.MULTILINE)]
    starts = [start for start in starts if start > code and not source[start:].lstrip().startswith("--")]
    for number, start in enumerate(starts):
        for following in starts[number + 1 : number + 1 + LONGEST]:
            if compiles(source[:start] + source[following:]):
                yield start, following, ""
                break


LOADS = LuaRuntime().eval("function(text) return loadstring(text) ~= nil end")
SOURCES = {name: (ROOT / "lua" / f"{name}.lua").read_text(encoding="utf-8") for name in FILES}


def compiles_as(file: str, source: str) -> bool:
    """Whether it is Lua, as Redis would run it."""
    return bool(LOADS(source + SOURCES["record"] if file == "breaker" else SOURCES["breaker"] + source))


def mutants(file: str) -> list[Mutant]:
    """Every mutant of one file that compiles."""
    source = SOURCES[file]
    compiles = functools.partial(compiles_as, file)
    found: dict[str, Mutant] = {}
    for begin, end, instead in itertools.chain(changes(source), removals(source, compiles)):
        text = source[:begin] + instead + source[end:]
        if text not in found and compiles(text):
            first, last = source.rfind("\n", 0, begin) + 1, source.find("\n", end - 1)
            before, after = source[first:last], text[first : last + len(text) - len(source)]
            line = source.count("\n", 0, begin) + 1
            found[text] = Mutant(file, line, " ".join(before.split()), " ".join(after.split()), text)
    return list(found.values())


# In a worker process, which has imported pytest and the tests of its copy: each mutant is tried in a fork of it


def prepare(stages: int) -> None:
    """Makes a copy of the tree and imports its tests."""
    del STAGES[stages:]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mutants-", dir=REPORT.parent / "copies"))
    for name in ("pyproject.toml", "lua", "pybreaker_redis", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    os.chdir(folder)
    os.environ["SEQUENCES"] = "40"  # of test_engines_agree
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(io.StringIO()) as told:
        if pytest.main([*STAGES[0], "--collect-only"]):
            raise RuntimeError(told.getvalue())


def verdict(mutant: Mutant | None) -> str:
    """What the tests say of a mutant, or of the copy as it is: "killed", "survived" or "timeout"."""
    if mutant is None:
        return tested()
    path = pathlib.Path("lua", f"{mutant.file}.lua")
    whole = path.read_bytes()
    path.write_text(mutant.source, encoding="utf-8")
    try:
        return tested()
    finally:
        path.write_bytes(whole)


def tested() -> str:
    """The same of the copy as it stands."""
    for stage in STAGES:
        child = os.fork()
        if child == 0:
            run_tests(stage)
        deadline = time.monotonic() + SECONDS
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1])
        if code not in (0, 1, 2, 3):  # 2 and 3: a module or a fixture did not get as far as a test
            raise RuntimeError(f"pytest ended with {code}")
        if code:
            return "killed"
    return "survived"


class Order:
    """A plugin of pytest: what killed another mutant a moment ago comes first, for it may kill its neighbour."""

    killers = pathlib.Path("killers.txt")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        last = self.killers.read_text().splitlines() if self.killers.exists() else []
        rank = {nodeid: place for place, nodeid in enumerate(last)}
        items.sort(key=lambda item: -rank.get(item.nodeid, -1))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.killers.open("a") as file:
                file.write(f"{report.nodeid}\n")


def run_tests(stage: tuple[str, ...]) -> None:
    """Ends this process with the exit code of pytest."""
    code = 70
    with contextlib.suppress(Exception):
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        code = int(pytest.main([*stage], plugins=[Order()]))
    os._exit(code)


def main() -> int:
    """0 when every mutant has been tried, whatever became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="only those that survived the last time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="without the tests that take long")
    parser.add_argument("--list", action="store_true", help="show the mutants, and try none")
    options = parser.parse_args()
    tried = [mutant for file in FILES for mutant in mutants(file)]
    if options.again:
        last = {tuple(row) for row in json.loads(REPORT.read_text())}
        tried = [mutant for mutant in tried if (mutant.file, mutant.before, mutant.after) in last]
    if options.list:
        print(*(described(mutant) for mutant in tried), f"{len(tried)} mutants", sep="\n")
        return 0
    shutil.rmtree(REPORT.parent / "copies", ignore_errors=True)
    (REPORT.parent / "copies").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    stages = 1 if options.quick else len(STAGES)
    with concurrent.futures.ProcessPoolExecutor(options.workers, context, prepare, (stages,)) as pool:
        if pool.submit(verdict, None).result() != "survived":
            raise SystemExit("the tests fail without a mutant")
        verdicts = []
        for mutant, result in zip(tried, pool.map(verdict, tried), strict=True):
            verdicts.append(result)
            if result != "killed":
                print(f"{result}: {described(mutant)}", flush=True)
    left = [mutant for mutant, result in zip(tried, verdicts, strict=True) if result == "survived"]
    REPORT.write_text(json.dumps([(mutant.file, mutant.before, mutant.after) for mutant in left], indent=1))
    REPORT.with_suffix(".txt").write_text("\n".join(map(described, left)) + "\n")
    counts = collections.Counter(verdicts)
    print(f"Lua: {len(tried)} mutants,", ", ".join(f"{counts[one]} {one}" for one in ("killed", "survived", "timeout")))
    return 0


def described(mutant: Mutant) -> str:
    """For a reader."""
    return f"{mutant.file}.lua:{mutant.line}\n    - {mutant.before}\n    + {mutant.after}"


if __name__ == "__main__":
    sys.exit(main())
