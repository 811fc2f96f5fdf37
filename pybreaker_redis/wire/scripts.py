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
# other group when one of its functions is first called. All other functions are created one by one. Except in the
# first group, the functions of a group must be neighbours in lua/.
GROUPS = (
    ("request", "load", "record", "reply"),
    ("save", "encode"),
    ("announce", "to_json"),
    ("policy_problem", "policy_field"),
    ("record_closed", "trip_reason", "count_outcomes"),
    ("read_window", "window_at"),
    ("transition", "next_generation"),
    ("take_over", "keeps_contract", "take_over_fields", "take_over_change"),
)
_FUNCTION = re.compile(r"^(?=function breaker\.(\w+)\()", re.MULTILINE)


def folder() -> pathlib.Path:
    """Where the Lua is: in the installed package, or in the checkout."""
    package = pathlib.Path(__file__).parent.parent
    packaged = package / "lua"
    return packaged if packaged.is_dir() else package.parent / "lua"


def lazy(library: str) -> str:
    """The library, changed so that each function is created when it is first called.

    Redis creates a script's functions anew at each call, which takes longer than running them. So one function,
    make(name), contains all others, and creates the named one with its group. Text is added only before the first and
    after the last line of a function, so that line numbers stay.
    """
    head, *rest = _FUNCTION.split(library)  # then the name and the text of each function
    leader = {name: group[0] for group in GROUPS for name in group}
    functions = zip(rest[::2], rest[1::2], strict=True)
    text = f"{head}local function make(_, name) if name then "
    for first, group in itertools.groupby(functions, lambda one: leader.get(one[0], one[0])):
        names, bodies = zip(*group, strict=True)
        made = "".join(bodies)
        end = made.rindex("\nend\n") + len("\nend")
        if first == GROUPS[0][0]:  # spread over the library
            text += f"else {made[:end]} end if name then {made[end:]}"
        else:
            wanted = " or ".join(f"name == '{name}'" for name in names)
            text += f"if {wanted} then {made[:end]} return breaker[name] end {made[end:]}"
    return f"{text.rstrip()} end end breaker.__index = make setmetatable(breaker, breaker) make()\n"


def joined(files: Mapping[str, str], name: str) -> str:
    """What Redis runs for the script called name. files: the texts of lua/, by name."""
    return lazy("".join(files[part] for part in LIBRARY)) + files[name]


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
