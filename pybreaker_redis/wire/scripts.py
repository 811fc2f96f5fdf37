"""Finds the Lua and composes what Redis runs; knows no rule of the breaker."""

from __future__ import annotations

import functools
import hashlib
import itertools
import pathlib
import re
from collections.abc import Mapping

SCRIPTS = ("acquire", "record", "control", "snapshot")
FLEET = "fleet"  # a script of its own, about processes: without the library
LIBRARY = ("model", "request", "document", "window", "rules")
# Functions that are created together: the first group when a script starts, since nearly every call needs it, and each
# other group when one of its functions is first called. All other functions are created one by one. To create two
# functions that are not needed costs about as much as to look up one. Except in the first group, the functions of a
# group must be neighbours in lua/.
GROUPS = (
    ("request", "load", "record", "reply"),
    ("is_integer", "is_text", "decode"),
    ("policy_problem", "policy_field", "policy_of"),
    ("set_override", "override_text"),
    ("save", "encode"),
    ("announce", "to_json"),
    ("take_over", "keeps_contract", "take_over_fields", "take_over_change", "bounded_ms", "take_over_open"),
    ("window_at", "read_window"),
    ("open_time_ms", "recent_trips"),
    ("next_generation", "transition", "end_action", "open_for", "close", "trip"),
    ("free_slot", "acquire", "record_probe", "fail_probe"),
    ("count_outcomes", "trip_reason", "record_closed"),
    ("enter", "prolong", "control", "sign"),
)
_CALL = re.compile(r"\bbreaker\.(\w+)")
_FUNCTION = re.compile(r"^(?=function breaker\.(\w+)\()", re.MULTILINE)


def folder() -> pathlib.Path:
    """Where the Lua is: in the installed package, or in the checkout."""
    package = pathlib.Path(__file__).parent.parent
    packaged = package / "lua"
    return packaged if packaged.is_dir() else package.parent / "lua"


def lazy(library: str, script: str) -> str:
    """The library, changed so that each function is created when the script first calls it.

    Redis creates a script's functions anew at each call, which takes longer than running them. So one function,
    make(name), contains all others, and creates the named one with its group. It compares the name with one after the
    other, so it has only the names that this script can ask for. A function that the script cannot reach is never
    created. It stays in the text behind `if false`: text is added only before the first line of a function and behind
    the library, so that line numbers stay.
    """
    head, functions, called = _parts(library.rstrip())
    reached = _reached({*_CALL.findall(script)} & functions.keys(), called)
    text = f"{head}local function make(_, name) if name then "
    for first, group in itertools.groupby(functions, _leader):
        names = list(group)
        made = [functions[name] if name in reached else f"if false then {functions[name]} end " for name in names]
        if first == GROUPS[0][0]:  # spread over the library
            before, after = "else ", " end if name then "
        else:
            asked = [f"name == '{name}'" for name in names if reached.get(name, set()) - {first}]
            before, after = f"if {' or '.join(asked) or 'false'} then ", " return breaker[name] end "
        text += before + "".join(made) + after
    return f"{text}end end breaker.__index = make setmetatable(breaker, breaker) make()\n"


@functools.lru_cache(maxsize=1)
def _parts(library: str) -> tuple[str, dict[str, str], dict[str, set[str]]]:
    """What stands before the functions; their texts, and the functions that each calls, by name."""
    head, *rest = _FUNCTION.split(library)
    functions = dict(zip(rest[::2], rest[1::2], strict=True))
    return head, functions, {name: {*_CALL.findall(text)} & functions.keys() for name, text in functions.items()}


def _reached(direct: set[str], called: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Each function that a script can reach, with the groups that call it there; "" stands for the script."""
    reached, left = {name: {""} for name in direct}, [*direct]
    while left:
        caller = left.pop()
        for name in called[caller]:
            if name not in reached:
                left.append(name)
            reached.setdefault(name, set()).add(_leader(caller))
    return reached


def _leader(name: str) -> str:
    """The first function of the group."""
    return next((group[0] for group in GROUPS if name in group), name)


def joined(files: Mapping[str, str], name: str) -> str:
    """What Redis runs for the script called name. files: the texts of lua/, by name."""
    return lazy("".join(files[part] for part in LIBRARY), files[name]) + files[name]


@functools.cache
def compose(name: str) -> str:
    """What Redis runs for the script called name: the library followed by it."""
    parts = (name,) if name == FLEET else (*LIBRARY, name)
    files = {part: (folder() / f"{part}.lua").read_text(encoding="utf-8") for part in parts}
    return files[FLEET] if name == FLEET else joined(files, name)


@functools.cache
def sha1(name: str) -> str:
    """The SHA-1 by which EVALSHA calls the script called name."""
    return hashlib.sha1(compose(name).encode(), usedforsecurity=False).hexdigest()
