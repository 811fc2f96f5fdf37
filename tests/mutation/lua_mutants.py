"""Mutation testing of the Lua: changes one thing at a time in a copy of this tree, and runs the tests against it.

`make mutants`, or alone `python tests/mutation/lua_mutants.py [FILE ...]`. Each verdict is kept at once: --again
goes on where a run was stopped, and tries once more what no test killed.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from lupa.lua51 import LuaRuntime

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
REPORT = ROOT / "build" / "mutants" / "lua.jsonl"  # a line for each verdict; of several on one mutant the last counts
COPIES = REPORT.parent / "copies"
# not imported: the workers must import the package of their own copy
LIBRARY = ("model", "request", "document", "window", "rules")
SCRIPTS = ("acquire", "record", "control", "snapshot")
FILES = (*LIBRARY, *SCRIPTS)
TESTS = ("tests/protocol/test_vectors.py::test_vector", "tests/scripts", "tests/contract")  # the fastest first
QUICK = "not memory and not fuzz and not stories and not engines_agree and not lua-json"
OPTIONS = ("-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", "-k")
SECONDS = 180  # for one mutant
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
    """Whether it is Lua, together with the other files."""
    sources = {**SOURCES, file: source}
    return bool(LOADS("".join(sources[part] for part in (*LIBRARY, file if file in SCRIPTS else "record"))))


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


@functools.cache
def of_revision(file: str, revision: str) -> str:
    """A source as it was in a revision of git, in one line."""
    command = ["git", "-C", str(ROOT), "show", f"{revision}:lua/{file}.lua"]
    return " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


FUNCTION = re.compile(r"^function breaker\.(\w+)\(.*\)$", re.MULTILINE)


def place(mutant: Mutant) -> str | None:
    """The function that the mutant changes, else the script; None: neither."""
    above = "\n".join(SOURCES[mutant.file].split("\n")[: mutant.line])
    return (FUNCTION.findall(above) or [mutant.file if mutant.file in SCRIPTS else None])[-1]


def traced(file: str) -> str:
    """The source of one file, with every function, or the script, telling the server's log that it runs."""
    source, tells = SOURCES[file], "redis.log(redis.LOG_WARNING, 'ran {}')"
    if file in SCRIPTS:
        return source.replace("\n]]\n", f"\n]]\n{tells.format(file)} ", 1)
    return FUNCTION.sub(lambda match: f"{match[0]} {tells.format(match[1])}", source)


class Worker:
    """A plugin of pytest that tries mutants in a copy of the tree, each in a fork of a process with all tests at hand.

    Only the tests that run the changed function are run, and those of which that is not known. The test that killed
    another mutant a moment ago comes first, for it may kill its neighbour.
    """

    def __init__(self, mine: dict[int, Mutant], results: Any) -> None:
        self._mine, self._results = mine, results
        self._folder = pathlib.Path(tempfile.mkdtemp(dir=COPIES))
        self._killers: list[str] = []
        self._ran: dict[str, list[str]] = {}  # by each test
        self._log: int | None = None  # of the server

    def run(self, keyword: str) -> None:
        """Makes the copy, collects its tests and tries everything."""
        for name in ("pyproject.toml", "docs", "lua", "pybreaker_redis", "tests"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self._folder / name)
        os.chdir(self._folder)
        os.environ["SEQUENCES"] = "40"  # of test_engines_agree
        sys.path.insert(0, str(self._folder))
        output = os.open("pytest.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if pytest.main([*TESTS, *OPTIONS, keyword], plugins=[self]):
            self._results.put((None, pathlib.Path("pytest.log").read_text()))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._write({file: traced(file) for file in FILES})
        self._results.put((0, self._verdict(session, None)))
        self._ran = json.loads(pathlib.Path("ran.json").read_text())
        self._write(SOURCES)
        for number, mutant in self._mine.items():
            self._write({mutant.file: mutant.source})
            self._results.put((number, self._verdict(session, mutant)))
            self._write({mutant.file: SOURCES[mutant.file]})
        return True

    def _write(self, sources: dict[str, str]) -> None:
        for file, source in sources.items():
            (self._folder / "lua" / f"{file}.lua").write_text(source, encoding="utf-8")

    def _verdict(self, session: pytest.Session, mutant: Mutant | None) -> str:
        """What the tests say of the copy as it stands: "killed", "survived" or "timeout"."""
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            self._test(session, mutant and place(mutant))
        deadline = time.monotonic() + SECONDS
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.01)
        if os.waitstatus_to_exitcode(ended[1]) == 0:
            return "survived"
        if pathlib.Path("killer.txt").exists():
            self._killers.append(pathlib.Path("killer.txt").read_text())
        return "killed"

    def _test(self, session: pytest.Session, changed: str | None) -> None:
        """Runs the tests of what is changed, or all, up to the first that fails, and ends this process."""
        rank = {nodeid: number for number, nodeid in enumerate(self._killers, 1)}
        items = sorted(session.items, key=lambda item: ("fuzz" in item.nodeid, -rank.get(item.nodeid, 0)))
        if changed:
            items = [item for item in items if changed in (self._ran[item.nodeid] or [changed])]
        for item, following in itertools.pairwise([*items, None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            told = os.read(self._log, 10**7) if self._log else b""
            self._ran[item.nodeid] = [name.decode() for name in set(re.findall(rb"ran (\w+)\n", told))]
            if session.testsfailed:
                pathlib.Path("killer.txt").write_text(item.nodeid)
                os._exit(1)
        if changed is None:
            pathlib.Path("ran.json").write_text(json.dumps(self._ran))
        os._exit(0)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        yield
        if fixturedef.argname == "server":
            self._log = os.open(f"{fixturedef.cached_result[0].directory}/log", os.O_RDONLY)


def try_all(tried: list[Mutant], workers: int, keyword: str) -> None:
    """Keeps the verdict on each, and shows those that are not "killed". Each worker first tries the copy as it is."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    shutil.rmtree(COPIES, ignore_errors=True)
    COPIES.mkdir(parents=True)
    todo = dict(enumerate(tried, 1))
    for first in range(workers):
        mine = {number: mutant for number, mutant in todo.items() if number % workers == first}
        context.Process(target=Worker(mine, results).run, args=(keyword,), daemon=True).start()
    for _ in range(workers + len(todo)):
        number, result = results.get()
        if number is None or (number == 0 and result != "survived"):
            raise SystemExit(f"the tests do not pass without a mutant: {result}")
        if number == 0:
            continue
        mutant = described(todo[number])
        with open(REPORT, "a", encoding="utf-8") as report:
            print(json.dumps([mutant, result]), file=report)
        if result != "killed":
            print(f"{result}: {mutant}", flush=True)


def verdicts() -> dict[str, str]:
    """What is kept: the last verdict on each mutant, by its description."""
    lines = REPORT.read_text(encoding="utf-8").splitlines() if REPORT.exists() else []
    return dict(json.loads(line) for line in lines)


def main() -> int:
    """0 when every mutant has been tried, whatever became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FILES)}, in this order (default: all)")
    parser.add_argument("--again", action="store_true", help="only those that no run has killed, or none has tried")
    parser.add_argument("--since", metavar="REV", help="only those of lines that stand nowhere in this revision's file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--long", action="store_true", help="with the stories and the random tests, too, which take long"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants, and try none")
    options = parser.parse_args()
    everything = [mutant for file in options.files or FILES for mutant in mutants(file)]
    if options.since:
        everything = [mutant for mutant in everything if mutant.before not in of_revision(mutant.file, options.since)]
    if not (options.again or options.since or options.list):
        REPORT.unlink(missing_ok=True)
    before = verdicts() if options.again else {}
    tried = [mutant for mutant in everything if before.get(described(mutant)) != "killed"]
    if options.list:
        print(*(described(mutant) for mutant in tried), f"{len(tried)} mutants", sep="\n")
        return 0
    try_all(tried, options.workers, "not memory" if options.long else QUICK)
    after = verdicts()
    now = {mutant: after[mutant] for mutant in map(described, everything)}
    left = [mutant for mutant, result in now.items() if result == "survived"]
    REPORT.with_suffix(".since.txt" if options.since else ".txt").write_text("\n".join(left) + "\n", encoding="utf-8")
    counts = collections.Counter(now.values())
    print(f"Lua: {len(now)} mutants,", ", ".join(f"{counts[one]} {one}" for one in ("killed", "survived", "timeout")))
    return 0


def described(mutant: Mutant) -> str:
    """For a reader, and by which a verdict is kept."""
    return f"{mutant.file}.lua:{mutant.line}\n    - {mutant.before}\n    + {mutant.after}"


if __name__ == "__main__":
    sys.exit(main())
