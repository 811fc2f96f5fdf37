"""Which module may know which: no circle of imports, not even for types, and only wire/ knows redis-py."""

from __future__ import annotations

import ast
import graphlib
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "pybreaker_redis"
FILES = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
MODULES = {parts[:-1] if parts[-1] == "__init__" else parts for parts in FILES.values()}


def imported(path: pathlib.Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports as it is imported, or for types only; not those that a function
    imports when it is called."""
    parts = FILES[path]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) for node in ast.walk(one)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in inside:
            origin = (*parts[: len(parts) - node.level], *(node.module or "").split("."))
            origin = tuple(filter(None, origin))
            inner = {(*origin, name.name) for name in node.names} & MODULES
            found |= inner or {origin}
    return found - {parts}


def test_no_circle() -> None:
    """Modules can be read, and imported, one after the other. The package's own __init__ only collects."""
    graph = {
        parts[:-1] if parts[-1] == "__init__" else parts: imported(path) - {()}
        for path, parts in FILES.items()
        if parts != ("__init__",)
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= 80


def test_only_wire_imports_redis() -> None:
    """What the package needs of redis-py is in wire/."""
    for path, parts in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if parts[0] != "wire":
                assert "redis" not in {name.split(".")[0] for name in names}, path
