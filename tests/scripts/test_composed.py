"""The scripts as Redis runs them: the plain files line for line, and the same decisions as without the wrapping."""

from __future__ import annotations

import ast
import pathlib
import re

import conftest
import pytest
import redis
from check_lua import LONG, MOST_LONG, lengths
from conftest import lua_machine
from script_calls import story

from pybreaker_redis import _policy, _rules, _window
from pybreaker_redis.wire.scripts import GROUPS, LIBRARY, SCRIPTS, compose, folder, lazy

FUNCTION = re.compile(r"^function breaker\.(\w+)\(", re.MULTILINE)


def plain(*names: str) -> str:
    """Files of lua/ joined as they are."""
    return "".join((folder() / f"{name}.lua").read_text(encoding="utf-8") for name in names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_line_for_line(script: str) -> None:
    """Each line of the plain files stands in the composed text under the same number; text is only added before the
    first line of a function, and behind the library."""
    lines, composed = plain(*LIBRARY, script).splitlines(), compose(script).splitlines()
    assert len(lines) == len(composed)
    last = len(plain(*LIBRARY).splitlines()) - 1
    for number, (line, other) in enumerate(zip(lines, composed, strict=True)):
        if FUNCTION.match(line):
            assert other.endswith(line)
        elif number == last:
            assert other.startswith(line)
        else:
            assert other == line


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_what_a_script_reaches(client: redis.Redis, script: str) -> None:
    """With all names that a script compares, exactly those functions are created that it can reach."""
    library, own = plain(*LIBRARY), plain(script)
    bodies = dict(re.findall(r"^function breaker\.(\w+)\((.*?)^end$", library, re.MULTILINE | re.DOTALL))
    reached, left = set(), [own]
    while left:
        found = {*re.findall(r"\bbreaker\.(\w+)", left.pop())} & bodies.keys() - reached
        reached |= found
        left += [bodies[name] for name in found]
    wrapped = lazy(library, own)
    names = re.findall(r"name == '(\w+)'", wrapped)
    look = """
      for _, name in ipairs(ARGV) do local _ = breaker[name] end
      local made = {}
      for name in pairs(breaker) do made[#made + 1] = name end
      return made
    """
    made = {name.decode() for name in client.eval(wrapped + look, 0, *names)}
    assert made - {"__index"} == reached


@pytest.mark.parametrize("name", LIBRARY)
def test_functions_stand_in_column_0(name: str) -> None:
    """A function of the library starts and ends in column 0, and so does nothing else in its file but comments."""
    text = re.sub(r"--\[\[.*?\]\]", "", plain(name), flags=re.DOTALL)
    outside = re.sub(r"^function breaker\.\w+\(.*?^end$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "function" not in re.sub(r"--.*", "", outside)
    assert len(re.findall(r"^end$", text, re.MULTILINE)) == len(FUNCTION.findall(text)) > 0


def test_functions_are_short() -> None:
    """Few functions of the library and the scripts are longer than 20 lines."""
    functions = [lines for name in (*LIBRARY, *SCRIPTS) for _, lines in lengths(plain(name))]
    assert sum(lines > LONG for lines in functions) / len(functions) <= MOST_LONG


def test_groups_name_functions() -> None:
    """Each name in a group is that of a function, and in one group only. But for the first group, they are neighbours:
    else a function would be missing when another one of its group calls it."""
    names = FUNCTION.findall(plain(*LIBRARY))
    grouped = [name for group in GROUPS for name in group]
    assert set(grouped) <= set(names)
    assert len(set(grouped)) == len(grouped)
    for group in GROUPS[1:]:
        first = names.index(group[0])
        assert tuple(names[first : first + len(group)]) == group


def test_each_function_is_made(client: redis.Redis) -> None:
    """Each function can be the first one that a script calls; a name that is no function gives nil."""
    library = plain(*LIBRARY)
    for name in FUNCTION.findall(library):
        script = f"return type(breaker.{name})"
        assert client.eval(lazy(library, script) + script, 0) == b"function", name
    script = "return type(breaker.no_such_name)"
    assert client.eval(lazy(library, script) + script, 0) == b"nil"


def test_unwrapped_decides_the_same(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain files, joined without any wrapping, give the same replies."""
    composed = story(lua_machine(client, "composed"))
    monkeypatch.setattr(conftest, "compose", lambda name: plain(*LIBRARY, name))
    monkeypatch.setattr(conftest, "on_frozen_clock", conftest.on_frozen_clock.__wrapped__)
    assert "make()" not in conftest.on_frozen_clock("acquire")
    assert story(lua_machine(client, "plain")) == composed


@pytest.mark.parametrize("module", [_rules, _window])
def test_lua_and_python_have_the_same_rules(module: object) -> None:
    """rules.lua and _rules.py have the same functions in the same order; so have the windows, but for storing them."""
    path = pathlib.Path(str(module.__file__))  # type: ignore[attr-defined]
    name = path.stem.removeprefix("_")
    in_python = [one.name for one in ast.parse(path.read_text()).body if isinstance(one, ast.FunctionDef)]
    in_lua = FUNCTION.findall(plain(name))
    if name == "window":
        only_lua = {"empty_window", "buckets_of", "window_from", "advanced", "read_window", "sound_window"}
        in_lua = [one for one in in_lua if one not in only_lua]
        in_python = [one for one in in_python if one != "bucket_ms" and not one.startswith("_")]
    assert in_python == in_lua


def test_a_policy_field_is_declared_once() -> None:
    """The Lua has the fields of Policy, each in one declaration, which name each other in turn."""
    text = plain("request")
    declared = re.findall(r"if field == '(\w+)' then return", text)
    assert sorted(declared) == sorted(_policy.request_field(name) for name in _policy.RULES)
    following = re.findall(r"(?:true|false), '(\w+)' end", text)
    assert following == declared[1:]
