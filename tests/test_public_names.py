"""The public names of each public module, and the commands, so that nobody changes one without noticing.

After a change that is meant, with its line in CHANGELOG.md: python tests/test_public_names.py
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pathlib
from collections.abc import Hashable
from typing import Any

import pytest
import typer.main

from pybreaker_redis import CircuitBreaker, Classification, Config, Counts, HistoryEntry, Policy, Snapshot
from pybreaker_redis.cli import app

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = pathlib.Path(__file__).with_suffix(".json")
WITHOUT_EXTRA = (
    "pybreaker_redis",
    "pybreaker_redis.compat.circuitbreaker",
    "pybreaker_redis.compat.pybreaker",
    "pybreaker_redis.embedded",
    "pybreaker_redis.testing",
)
PLUGIN = "pytest_pybreaker_redis"  # its fixtures
INTERNAL = {"pybreaker_redis.cli", "pybreaker_redis.wire"}  # packages whose names nobody should import


def public_modules() -> dict[str, pathlib.Path]:
    """The modules that users import, by name: no part of the name begins with an underscore."""
    found = {PLUGIN: ROOT / f"{PLUGIN}.py"}
    for path in sorted((ROOT / "pybreaker_redis").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        internal = any(name == one or name.startswith(f"{one}.") for one in INTERNAL)
        if not internal and not any(part.startswith("_") for part in name.split(".")):
            found[name] = path
    return found


def names_of(path: pathlib.Path) -> list[str]:
    """The module's `__all__`, read without importing it, since it may need an extra. A mere docstring has no names."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    assert len(body) == 1, f"{path} has no __all__: list its public names, or rename it with an underscore"
    return []


def members_of(name: str, kind: type) -> list[str]:
    """A class and its public members, as they are called."""
    names = [one for one in dir(kind) if not one.startswith("_") and not hasattr(BaseException, one)]
    return [called(name, kind.__init__), *(called(f"{name}.{one}", getattr(kind, one)) for one in names)]


def called(name: str, value: object) -> str:
    """A function or method with its parameters, but for self; the name alone of anything else."""
    if not inspect.isfunction(value) and not inspect.ismethod(value):
        return name
    parameters = [one for one in inspect.signature(value).parameters.values() if one.name != "self"]
    plain = [one.replace(annotation=one.empty, default=one.empty) for one in parameters]
    return f"{name}{inspect.Signature(plain)}"


def commands(command: Any, path: str) -> list[str]:
    """The commands of the program, with their arguments and options."""
    subcommands = getattr(command, "commands", {})
    if subcommands:
        return [line for name, one in sorted(subcommands.items()) for line in commands(one, f"{path} {name}")]
    given = [max(one.opts, key=len) if one.param_type_name == "option" else one.name.upper() for one in command.params]
    return [" ".join([path, *given])]


def present() -> dict[str, list[str]]:
    """The public names of each public module; for those that need no extra, with members and parameters."""
    names = {module: names_of(path) for module, path in public_modules().items()}
    for module in WITHOUT_EXTRA:
        imported = importlib.import_module(module)
        values = [(name, getattr(imported, name)) for name in imported.__all__]
        names[module] = [
            line
            for name, value in values
            for line in (members_of(name, value) if isinstance(value, type) else [called(name, value)])
        ]
    names["pybreaker-redis"] = commands(typer.main.get_command(app), "pybreaker-redis")
    return names


def test_public_names() -> None:
    """They are those in the list."""
    assert present() == json.loads(LIST.read_text()), f"if that is meant: python tests/{pathlib.Path(__file__).name}"


def test_public_names_are_there() -> None:
    """Each name of a module that needs no extra can be imported, and has a docstring if it is a class or function."""
    for module in WITHOUT_EXTRA:
        imported = importlib.import_module(module)
        for name in imported.__all__:
            value = getattr(imported, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value.__doc__, f"{module}.{name}"


def test_public_names_are_typed() -> None:
    """tests/typing/api.py imports each of them and uses it, as a user's type checker sees it."""
    tree = ast.parse((ROOT / "tests" / "typing" / "api.py").read_text())
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))}
    typed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            typed |= {(node.module, one.name) for one in node.names if (one.asname or one.name) in used}
        elif isinstance(node, ast.Import):
            typed |= {
                (one.name, name.removeprefix(f"{one.asname or one.name}.")) for one in node.names for name in used
            }
    wanted = {(module, name) for module, path in public_modules().items() for name in names_of(path)}
    wanted = {(module, name) for module, name in wanted if module != PLUGIN}
    assert wanted <= typed, sorted(wanted - typed)


@pytest.mark.parametrize("kind", [Classification, Config, Counts, HistoryEntry, Policy, Snapshot])
def test_values_take_keywords(kind: type) -> None:
    """A field may be added to a value anywhere, since none is given by its position."""
    with pytest.raises(TypeError, match="positional"):
        kind(1)


def test_values_tell_whether_they_can_be_hashed() -> None:
    """What holds dicts or lists says so itself; all other values are equal by what they hold, and so hash."""
    policy, snapshot = Policy(ttl=60), CircuitBreaker("discovery").snapshot()
    assert not any(isinstance(one, Hashable) for one in (Config(), snapshot, Classification(failures=[OSError])))
    assert hash(policy) == hash(dataclasses.replace(policy))
    assert hash(CircuitBreaker("a").counts) == hash(CircuitBreaker("b").counts)


if __name__ == "__main__":
    LIST.write_text(json.dumps(present(), indent=2) + "\n")
