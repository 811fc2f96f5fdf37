"""The two breakers have one interface."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from pybreaker_redis import AsyncCircuitBreaker, AsyncPermit, CircuitBreaker, Permit

PAIRS = [(CircuitBreaker, AsyncCircuitBreaker), (Permit, AsyncPermit)]
RENAMED = {"__enter__": "__aenter__", "__exit__": "__aexit__"}
METHODS = [
    (sync, other, name)
    for sync, other in PAIRS
    for name in ["__init__", *RENAMED, "__call__", *(name for name in dir(sync) if not name.startswith("_"))]
    if hasattr(sync, name)
]


def public(kind: type) -> set[str]:
    """The names that a user may use."""
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters(function: Any) -> list[tuple[Any, ...]]:
    """Names, kinds and defaults, without the types."""
    found = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in found]


@pytest.mark.parametrize(("sync", "other"), PAIRS)
def test_names(sync: type, other: type) -> None:
    """Both shells have the same public names, as methods or as properties."""
    assert public(sync) == public(other)
    for name in public(sync):
        assert isinstance(getattr(sync, name), property) == isinstance(getattr(other, name), property)


@pytest.mark.parametrize(("sync", "other", "name"), METHODS)
def test_signatures(sync: type, other: type, name: str) -> None:
    """Each method takes the same arguments with the same defaults."""
    one, two = getattr(sync, name), getattr(other, RENAMED.get(name, name))
    if callable(one):
        assert parameters(one) == parameters(two)


@pytest.mark.parametrize(("sync", "other"), PAIRS)
def test_block_methods(sync: type, other: type) -> None:
    """Each shell has the block of its own world only."""
    for plain, awaited in RENAMED.items():
        assert hasattr(sync, plain) == hasattr(other, awaited)
        assert not hasattr(sync, awaited)
        assert not hasattr(other, plain)


@pytest.mark.parametrize(("sync", "other"), PAIRS)
def test_awaited(sync: type, other: type) -> None:
    """Every method that a shell defines is plain in the sync one and a coroutine function in the other."""
    for name in public(sync):
        if inspect.isfunction(getattr(sync, name)) and name not in dir(sync.__mro__[1]):
            # acquire() returns an object to be awaited, or to be entered as a block
            assert inspect.iscoroutinefunction(getattr(other, name)) == (name != "acquire"), name
            assert not inspect.iscoroutinefunction(getattr(sync, name)), name


@pytest.mark.parametrize("shell", [CircuitBreaker, AsyncCircuitBreaker])
def test_no_block_of_the_breaker(shell: type) -> None:
    """A permit is the block of a call; a breaker has none of its own."""
    for name in ("__enter__", "__exit__", "__aenter__", "__aexit__"):
        assert not hasattr(shell, name)


@pytest.mark.parametrize("shell", [CircuitBreaker, AsyncCircuitBreaker])
def test_what_a_process_knows_is_a_property(shell: type) -> None:
    """`state` and `counts` are plain properties in both shells, for they ask nobody."""
    assert isinstance(inspect.getattr_static(shell, "state"), property)
    assert isinstance(inspect.getattr_static(shell, "counts"), property)


@pytest.mark.parametrize(("sync", "other"), PAIRS)
def test_documented(sync: type, other: type) -> None:
    """Every public method has a docstring."""
    for kind in (sync, other):
        found = {name: getattr(kind, name) for name in public(kind)}
        methods = [name for name, one in found.items() if inspect.isfunction(one) or isinstance(one, property)]
        assert [name for name in methods if not inspect.getdoc(found[name])] == []
