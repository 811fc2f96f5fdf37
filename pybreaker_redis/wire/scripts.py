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
    ("enter", "enter_policy", "probe_now", "clear_forced", "prolong", "is_blank", "control", "sign"),
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
    other, so it omits those that are only called from within their group. Text is added only before the first and after
    the last line of a function, so that line numbers stay.
    """
    head, functions, callers = _parts(library)
    called = {*_CALL.findall(script)}
    text = f"{head}local function make(_, name) if name then "
    for first, group in itertools.groupby(functions, _leader):
        names = list(group)
        made = "".join(functions[name] for name in names)
        end = made.rindex("\nend\n") + len("\nend")
        if first == GROUPS[0][0]:  # spread over the library
            text += f"else {made[:end]} end if name then {made[end:]}"
        else:
            asked = [name for name in names if name in called or callers[name] - {first}]
            wanted = " or ".join(f"name == '{name}'" for name in asked) or "false"
            text += f"if {wanted} then {made[:end]} return breaker[name] end {made[end:]}"
    return f"{text.rstrip()} end end breaker.__index = make setmetatable(breaker, breaker) make()\n"


@functools.lru_cache(maxsize=1)
def _parts(library: str) -> tuple[str, dict[str, str], dict[str, set[str]]]:
    """What stands before the functions, their texts by name, and for each name the groups that call it."""
    head, *rest = _FUNCTION.split(library)
    functions = dict(zip(rest[::2], rest[1::2], strict=True))
    callers: dict[str, set[str]] = {name: set() for name in functions}
    for caller, text in functions.items():
        for name in {*_CALL.findall(text)} & functions.keys():
            callers[name].add(_leader(caller))
    return head, functions, callers


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
