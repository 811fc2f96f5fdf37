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
# Functions that are made together: those of the first group when a script starts, since nearly every call needs them,
# those of another group when its first function is called. All other functions are made one by one.
GROUPS = (
    ("request", "load", "record", "reply"),
    ("save",),
    ("now_ms",),
    ("policy_problem", "policy_field"),
    ("record_closed", "count_outcomes", "count_failures", "trip_reason", "policy_of", "save", "encode"),
    ("read_window", "window_at", "policy_of"),
    ("policy_of", "policy_field"),
    ("transition", "next_generation", "announce", "reply_more"),
    ("control", "close", "open_for", "transition", "next_generation", "save", "encode", "announce", "reply_more"),
    ("close", "transition", "next_generation", "announce", "reply_more"),
    ("trip", "recent_trips", "open_time_ms", "open_for", "transition", "next_generation", "announce", "reply_more"),
)
ALONE = "not group"
_FUNCTION = re.compile(r"^(?=function breaker\.(\w+)\()", re.MULTILINE)


def folder() -> Any:
    """Where the Lua is: in the installed package, or in the checkout."""
    packaged = importlib.resources.files("pybreaker_redis") / "lua"
    return packaged if packaged.is_dir() else pathlib.Path(__file__).parent.parent.parent / "lua"


def lazy(library: str) -> str:
    """The library, with its functions made when they are needed.

    Redis makes a script's functions anew at each call, which costs more than what they do. So all of them go into one
    function, make(name), which makes the function of that name with its group. Text is only added in front of the
    first line of a function, and behind the last line of all, so that line numbers stay.
    """
    number_of = {name: number for number, group in enumerate(GROUPS) for name in group}
    number_of |= {group[0]: number for number, group in enumerate(GROUPS)}
    first = sorted(number_of, key=lambda name: name != GROUPS[number_of[name]][0])
    choice = "".join(f" or name == '{name}' and {number_of[name]}" for name in first if number_of[name])
    parts = _FUNCTION.split(library)  # a text, then the name and the text of each function
    text, block = f"{parts[0]}local function make(_, name) local group = not name and 0{choice} ", ""
    for name, function in zip(parts[1::2], parts[2::2], strict=True):
        previous, block = (
            block,
            " or ".join(f"group == {n}" for n, group in enumerate(GROUPS) if name in group) or ALONE,
        )
        if block != previous:
            text += f"{_end(previous)}if {block} then "
        if block == ALONE:
            text += f"{'else' if block == previous else ''}if name == '{name}' then "
        text += function
    end = f"{_end(block)}return rawget(breaker, name) end breaker.__index = make setmetatable(breaker, breaker) make()"
    return f"{text.rstrip()} {end}\n"


def _end(block: str) -> str:
    return {"": "", ALONE: "end end "}.get(block, "end ")


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
