"""The public names of each public module, and the commands, so that nobody changes one without noticing.

After a change that is meant, with its line in CHANGELOG.md: python tests/test_public_names.py. It imports every module,
so it needs what `make lint` installs.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pathlib
import re
import symtable
from collections.abc import Hashable
from typing import Any

import pytest
import typer.main

from pybreaker_redis import CircuitBreaker, Classification, Config, Counts, HistoryEntry, Policy, Snapshot
from pybreaker_redis.cli import app

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = pathlib.Path(__file__).with_suffix(".json")
ELSEWHERE = {  # modules whose extras `make test` does not install, by the target that checks them
    "test-integrations": "pybreaker_redis.integrations.",
    "test-web": "pybreaker_redis.web",
}
RENEW = "python tests/test_public_names.py"
PROGRAM = "pybreaker-redis"
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


def modules_of(target: str) -> list[str]:
    """The modules that a target of the Makefile checks."""
    return [module for module in public_modules() if module.startswith(ELSEWHERE[target])]


def names_of(path: pathlib.Path) -> list[str]:
    """The module's `__all__`, read without importing it, since it may need an extra. A mere docstring has no names."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    assert len(body) == 1, f"{path} has no __all__: list its public names, or rename it with an underscore"
    return []


def members_of(name: str, kind: type) -> list[str]:
    """A class and the public members that it has from this library, as they are called."""
    lines = [called(name, kind.__init__) if is_ours(kind, "__init__") else name]
    names = [one for one in dir(kind) if not one.startswith("_") and is_ours(kind, one)]
    return lines + [called(f"{name}.{one}", getattr(kind, one)) for one in names]


def is_ours(kind: type, member: str) -> bool:
    """Whether a class has this member from this library, and not from a library whose class it extends."""
    owner = next((one for one in kind.__mro__ if member in vars(one)), object)
    return owner.__module__.startswith("pybreaker_redis")


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


def public_names_of(module: str) -> list[str]:
    """The public names of a module, with members and parameters."""
    imported = importlib.import_module(module)
    values = [(name, getattr(imported, name)) for name in imported.__all__] if hasattr(imported, "__all__") else []
    return [
        line
        for name, value in values
        for line in (members_of(name, value) if isinstance(value, type) else [called(name, value)])
    ]


def commands_of_the_program() -> list[str]:
    return commands(typer.main.get_command(app), PROGRAM)


def recorded() -> dict[str, list[str]]:
    """The list."""
    return json.loads(LIST.read_text())  # type: ignore[no-any-return]


def check_module(module: str) -> None:
    """Its public names are those in the list, and each class and function has a docstring."""
    assert public_names_of(module) == recorded()[module], f"if that is meant: {RENEW}"
    imported = importlib.import_module(module)
    for name in names_of(public_modules()[module]):
        value = getattr(imported, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{module}.{name}"


@pytest.mark.parametrize("module", [one for one in public_modules() if not one.startswith(tuple(ELSEWHERE.values()))])
def test_public_names(module: str) -> None:
    """Those of the modules that `make test` can import are those in the list."""
    check_module(module)


def test_public_names_of_all_modules() -> None:
    """The list has every module and every name, without an import."""
    names = {module: names_of(path) for module, path in public_modules().items()}
    listed = {module: [line for line in lines if "." not in line] for module, lines in recorded().items()}
    assert listed.pop(PROGRAM)
    assert {module: [line.partition("(")[0] for line in lines] for module, lines in listed.items()} == names, RENEW


def test_other_names_are_private() -> None:
    """What a module defines beyond its __all__ begins with an underscore: type checkers take any other name as public.

    Those of compat have the names of the libraries that they replace.
    """
    for module, path in public_modules().items():
        if module.startswith("pybreaker_redis.compat."):
            continue
        table = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
        defined = {one.get_name() for one in table.get_symbols() if one.is_assigned() and not one.is_imported()}
        unlisted = {name for name in defined if not name.startswith("_")} - set(names_of(path))
        assert not unlisted, (module, unlisted)


def test_ci_checks_the_other_modules() -> None:
    """The targets that check the modules with further extras are steps of .ci/run."""
    run = (ROOT / ".ci" / "run").read_text()
    for target in ELSEWHERE:
        assert re.search(rf"^make {target}$", run, re.MULTILINE), target


def test_commands() -> None:
    """Those of the program are those in the list."""
    assert commands_of_the_program() == recorded()[PROGRAM], f"if that is meant: {RENEW}"


def test_public_names_are_documented() -> None:
    """The reference has each of them, under one of its modules if several have it."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    names = {path.rpartition(".")[2] for path in shown}
    for module, path in public_modules().items():
        missing = [] if module in shown or module == PLUGIN else [one for one in names_of(path) if one not in names]
        assert not missing, (module, missing)


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
    found = {module: public_names_of(module) for module in public_modules()}
    LIST.write_text(json.dumps({**found, PROGRAM: commands_of_the_program()}, indent=2) + "\n")
