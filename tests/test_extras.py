"""What a module says whose extra is not installed."""

from __future__ import annotations

import json
import pathlib
import tomllib
from collections.abc import Iterable

import pytest
from test_public_names import public_modules
from without import run_without

from pybreaker_redis._extras import EXTRAS, MissingExtraError, needs_extra

ROOT = pathlib.Path(__file__).resolve().parent.parent

IMPORTS = """
import importlib, json
found = {}
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
        found[module] = None
    except ModuleNotFoundError as error:
        found[module] = (error.name, str(error))
print(json.dumps(found))
"""


def imported(absent: Iterable[str], *modules: str) -> dict[str, tuple[str, str] | None]:
    """What each module raises on import if these packages are not installed: name and message, or None."""
    return json.loads(run_without(absent, IMPORTS, *modules).stdout)  # type: ignore[no-any-return]


def test_every_module_without_its_extra() -> None:
    """A module whose name is an extra names this extra and the missing package. Any other can be imported."""
    every = {package for packages in EXTRAS.values() for package in packages}
    for module, raised in imported(every, *public_modules()).items():
        extra = module.rpartition(".")[2]
        if extra not in EXTRAS:
            assert raised is None, (module, raised)
            continue
        assert raised is not None, module
        name, message = raised
        assert name in EXTRAS[extra]
        assert f" needs an extra: pip install 'pybreaker_redis[{extra}]' (" in message
        assert name in message


@pytest.mark.parametrize("package", EXTRAS["config"])
def test_whichever_package_is_missing(package: str) -> None:
    """An extra of several packages is named for each of them."""
    [raised] = imported([package], "pybreaker_redis.config").values()
    assert raised is not None
    assert raised[0] == package
    assert raised[1].startswith("a configuration from a file, a dict or the environment needs an extra: ")


def test_a_broken_package_is_no_missing_extra() -> None:
    """An installed package that misses one of its own says so itself."""
    [raised] = imported(["pydantic_core"], "pybreaker_redis.config").values()
    assert raised is not None
    assert raised[0] == "pydantic_core"
    assert "extra" not in raised[1]


MANAGER = """
from pybreaker_redis import CircuitBreakerManager
try:
    CircuitBreakerManager({})
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_manager_tells_them_apart() -> None:
    """A dict without the extra is a mistake in the configuration; a broken package is none."""
    missing, broken = (run_without([package], MANAGER).stdout for package in ("pydantic", "pydantic_core"))
    assert missing.startswith("ConfigError a configuration from a file, a dict or the environment needs an extra: ")
    assert broken.startswith("ModuleNotFoundError No module named 'pydantic_core'")


@pytest.mark.parametrize("error", [ImportError("too old", name="httpx"), ModuleNotFoundError(name="httpx._urls")])
def test_other_errors_of_an_import_stay(error: ImportError) -> None:
    """A package that is too old, or of which a part is missing, is installed: the extra would not help."""
    with pytest.raises(ImportError) as caught, needs_extra("this module", "httpx"):
        raise error
    assert caught.value is error


def test_the_error_has_its_cause() -> None:
    """It is a ModuleNotFoundError with the name of the package, and keeps the import's own error."""
    cause = ModuleNotFoundError("No module named 'httpx'", name="httpx")
    with pytest.raises(MissingExtraError) as caught, needs_extra("this module", "httpx"):
        raise cause
    assert str(caught.value) == (
        "this module needs an extra: pip install 'pybreaker_redis[httpx]' (No module named 'httpx')"
    )
    assert (caught.value.name, caught.value.__cause__) == ("httpx", cause)


def test_the_extras_are_there() -> None:
    """pyproject.toml has each of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() <= project["optional-dependencies"].keys()
