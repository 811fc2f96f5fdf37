"""An installed package finds its Lua: the wheel built from the sdist, and an editable install."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LUA = {path.name for path in (ROOT / "lua").glob("*.lua")}

USE_IT = """
import importlib.metadata, os, pathlib, sys
import redis, pybreaker_redis
from pybreaker_redis import CircuitBreaker
from pybreaker_redis.embedded import EmbeddedServer

home = pathlib.Path(pybreaker_redis.__file__).resolve()
assert home.is_relative_to(sys.argv[1]), f"{home} is not in {sys.argv[1]}"
name = f"packaging-{os.getpid()}"
with EmbeddedServer() as server:
    breaker = CircuitBreaker(name, redis=server.url)
    assert breaker.call(lambda: 1) == 1
    breaker.flush()
    assert breaker.snapshot().source == "redis"
    with redis.Redis.from_url(server.url) as client:
        assert client.delete(breaker.keys.state) == 1
(plugin,) = importlib.metadata.entry_points(group="pytest11", name="pytest_pybreaker_redis")
assert pathlib.Path(plugin.load().__file__).resolve().is_relative_to(sys.argv[1])
print("used", home)
"""


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the sdist of this checkout and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture
def environment(tmp_path: pathlib.Path) -> pathlib.Path:
    """A virtual environment with the dependencies of this one, but without its pybreaker_redis."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    places = {"base": str(folder), "platbase": str(folder)}
    own = pathlib.Path(sysconfig.get_path("purelib", "venv", vars=places))
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # a folder that a .pth file adds gets none of its own read: an editable install stays out
    (own / "dependencies.pth").write_text("\n".join(sorted(shared)))
    return folder


def install(environment: pathlib.Path, *what: str | pathlib.Path) -> None:
    python = environment / "bin" / "python"
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(python, "-I", "-m", "pip", "install", *options, *what, cwd=environment)


def use(environment: pathlib.Path, home: pathlib.Path) -> None:
    """One guarded call on a real server, far from the checkout, by the package in home."""
    python = environment / "bin" / "python"
    assert "used" in run(python, "-I", "-c", USE_IT, home.resolve(), cwd=environment)


def test_wheel_holds_the_package_and_its_lua_only(built: pathlib.Path) -> None:
    """The wheel has every Lua file once, py.typed, and nothing that is only for development."""
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    lua = [name for name in names if name.endswith(".lua")]
    assert sorted(lua) == sorted(f"pybreaker_redis/lua/{script}" for script in LUA)
    assert {"acquire.lua", "record.lua", "control.lua", "snapshot.lua"} < LUA
    assert "pybreaker_redis/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pybreaker_redis", "pytest_pybreaker_redis.py"}
    assert not any(word in name for name in names for word in ("__pycache__", "tests/", "/test_", "demo", "example"))


def test_wheel_holds_the_same_lua_as_the_checkout(built: pathlib.Path) -> None:
    """No Lua file in the wheel is a stale copy."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for script in LUA:
            packed = archive.read(f"pybreaker_redis/lua/{script}")
            assert packed == (ROOT / "lua" / script).read_bytes(), script


def test_sdist_holds_what_make_needs(built: pathlib.Path) -> None:
    """With the sdist alone one can build, test, lint and run the demo and the examples."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f"lua/{script}" for script in LUA} | {
        "pyproject.toml",
        "Makefile",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        ".luacheckrc",
        ".ci/run",
        "benchmarks/README.md",
        "examples/README.md",
        "examples/demo/__main__.py",
        "tests/test_packaging.py",
        "tests/typing/api.py",
        "tests/check_lua.py",
    }
    assert wanted <= names


def test_installed_wheel_works_outside_the_checkout(built: pathlib.Path, environment: pathlib.Path) -> None:
    """The wheel built from the sdist runs its own scripts; it cannot see the checkout."""
    (wheel,) = built.glob("*.whl")
    install(environment, wheel)
    use(environment, environment)


def test_example_of_readme_runs_with_the_wheel_alone(built: pathlib.Path, environment: pathlib.Path) -> None:
    """The first Python block of README prints what README says, far from the checkout."""
    (wheel,) = built.glob("*.whl")
    install(environment, wheel)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example, printed = (readme.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "text"))
    assert run(environment / "bin" / "python", "-I", "-c", example, cwd=environment) == printed


def test_tutorial_runs_with_the_wheel_alone(built: pathlib.Path, environment: pathlib.Path) -> None:
    """So does the tutorial, from its first block to its last."""
    (wheel,) = built.glob("*.whl")
    install(environment, wheel)
    blocks = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").split("```python\n")[1:]
    code = "".join(block.partition("```")[0] for block in blocks)
    assert "half_open -> closed" in run(environment / "bin" / "python", "-I", "-c", code, cwd=environment)


def test_editable_install_runs_the_scripts_of_the_checkout(environment: pathlib.Path) -> None:
    """An editable install uses the checkout's package and its lua/."""
    install(environment, "--editable", ROOT)
    use(environment, ROOT)
