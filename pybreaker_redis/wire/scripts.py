"""Finds the Lua and composes what Redis runs; knows no rule of the breaker."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import pathlib
import re
from collections.abc import Mapping
from typing import Any

SCRIPTS = ("acquire", "record", "control", "snapshot")
LIBRARY = ("model", "request", "document", "window", "rules")
# Functions that are created together: the first group when a script starts, since nearly every call needs it, and each
# other group when one of its functions is first called. All other functions are created one by one. Frequent groups
# come first. Except for the first group, the functions of a group must be neighbours in lua/.
GROUPS = (
    ("request", "load", "record", "reply"),
    ("now_ms",),
    ("save", "encode"),
    ("policy_problem", "policy_field", "policy_of"),
    ("record_closed", "trip_reason", "count_outcomes"),
    ("read_window", "window_at"),
    ("control",),
    ("transition", "next_generation", "open_for", "close"),
    ("announce",),
    ("reply_more",),
    ("take_over", "keeps_contract", "take_over_fields"),
    ("retry_after_ms",),
)
_FUNCTION = re.compile(r"^(?=function breaker\.(\w+)\()", re.MULTILINE)


def folder() -> Any:
    """Where the Lua is: in the installed package, or in the checkout."""
    packaged = importlib.resources.files("pybreaker_redis") / "lua"
    return packaged if packaged.is_dir() else pathlib.Path(__file__).parent.parent.parent / "lua"


def lazy(library: str) -> str:
    """The library, changed so that each function is created when it is first called.

    Redis creates a script's functions anew at each call, which takes longer than running them. So one function,
    make(name), contains all others, and creates the named one with its group. Text is added only before the first and
    after the last line of a function, so that line numbers stay.
    """
    number_of = {name: number for number, group in enumerate(GROUPS) for name in group}
    first = sorted(number_of, key=lambda name: GROUPS[number_of[name]].index(name) > 0)
    choice = "".join(f" or name == '{name}' and {number_of[name]}" for name in first if number_of[name])
    text, *rest = _FUNCTION.split(library)  # then the name and the text of each function
    names, bodies = rest[::2], rest[1::2]
    numbers = [number_of.get(name) for name in names]
    text += f"local function make(_, name) local group = not name and 0{choice} "
    for at, (name, body, number) in enumerate(zip(names, bodies, numbers, strict=True)):
        opens, closes = numbers[at - 1 : at] != [number], numbers[at + 1 : at + 2] != [number]
        before, after = "", ""
        if opens:
            before = "if not group then " if number is None else f"if group == {number} then "
        if number is None:
            before += f"if name == '{name}' then "
        if number is None or (number and closes):
            after = "return rawget(breaker, name) end "
        if closes and not number:
            after += "end "
        text += _inserted(before, body, after)
    end = "return rawget(breaker, name) end breaker.__index = make setmetatable(breaker, breaker) make()"
    return f"{text.rstrip()} {end}\n"


def _inserted(before: str, function: str, after: str) -> str:
    end = function.index("\nend\n") + len("\nend")
    return f"{before}{function[:end]} {after}".rstrip() + function[end:]


def joined(files: Mapping[str, str], name: str) -> str:
    """What Redis runs for the script called name. files: the texts of lua/, by name."""
    return lazy("".join(files[part] for part in LIBRARY)) + files[name]


@functools.cache
def compose(name: str) -> str:
    """What Redis runs for the script called name: the library followed by it."""
    return joined({part: (folder() / f"{part}.lua").read_text(encoding="utf-8") for part in (*LIBRARY, name)}, name)


@functools.cache
def sha1(name: str) -> str:
    """The SHA-1 by which EVALSHA calls the script called name."""
    return hashlib.sha1(compose(name).encode(), usedforsecurity=False).hexdigest()
