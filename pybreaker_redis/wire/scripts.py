"""Finds the Lua and composes what Redis runs; knows no rule of the breaker."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import pathlib
import re
from typing import Any

SCRIPTS = ("acquire", "record", "control", "snapshot")
LIBRARY = ("model", "request", "document", "window", "rules")
# Functions that are made together: those of "" when a script starts, others when the first one of a group is called.
GROUPS = {
    "": ("request", "load", "record", "reply"),  # all that most calls of a healthy breaker need
    "save": ("save",),
    "now_ms": ("now_ms",),
    "policy_problem": ("policy_problem", "policy_field"),
    "record_closed": (
        "record_closed",
        "count_outcomes",
        "count_failures",
        "trip_reason",
        "policy_of",
        "save",
        "encode",
    ),
    "read_window": ("read_window", "window_at", "policy_of"),
    "control": (
        "control",
        "close",
        "open_for",
        "transition",
        "next_generation",
        "save",
        "encode",
        "announce",
        "reply_more",
    ),
    "transition": ("transition", "next_generation", "announce", "reply_more"),
    "policy_of": ("policy_of",),
}

_FUNCTION = re.compile(r"^(?=function breaker\.(\w+)\()", re.MULTILINE)


def folder() -> Any:
    """Where the Lua is: in the installed package, or in the checkout."""
    packaged = importlib.resources.files("pybreaker_redis") / "lua"
    return packaged if packaged.is_dir() else pathlib.Path(__file__).parent.parent.parent / "lua"


def lazy(library: str) -> str:
    """The library, made as far as it is needed.

    Redis makes a script's functions anew at each call, which costs more than what they do. So all of them go into one
    function, make(name), which makes the function of that name with its group. Text is only added in front of the
    functions and at the end, so that line numbers stay.
    """
    numbers = {entry: number for number, entry in enumerate(GROUPS)}
    members = {name: entry for entry, names in reversed(GROUPS.items()) for name in names if entry}
    chosen = " or ".join(
        f"name == '{name}' and {numbers[entry]}" for name, entry in ({e: e for e in GROUPS if e} | members).items()
    )
    begin, before = f"local function make(_, name) local group = not name and 0 or {chosen} ", ""

    def wrapped(match: re.Match[str]) -> str:
        nonlocal begin, before
        name, last, text = match[1], before, begin or "end "
        within = [f"group == {numbers[entry]}" for entry, names in GROUPS.items() if name in names]
        begin, before = "", " or ".join(within) or "not group"
        alone = f"if name == '{name}' then "
        if last == before:
            return "" if within else f"else{alone}"
        if last == "not group":
            text += "end "
        return f"{text}if {before} then {'' if within else alone}"

    made = _FUNCTION.sub(wrapped, library).rstrip()
    end = " end end" if before == "not group" else " end"
    return (
        f"{made}{end} return rawget(breaker, name) end breaker.__index = make setmetatable(breaker, breaker) make()\n"
    )


def joined(texts: dict[str, str], name: str) -> str:
    """What Redis runs for the script called name. texts: of the files of lua/, by name."""
    return lazy("".join(texts[part] for part in LIBRARY)) + texts[name]


@functools.cache
def compose(name: str) -> str:
    """What Redis runs for the script called name: the library followed by it."""
    return joined({part: (folder() / f"{part}.lua").read_text(encoding="utf-8") for part in (*LIBRARY, name)}, name)


@functools.cache
def sha1(name: str) -> str:
    """The SHA-1 by which EVALSHA calls the script called name."""
    return hashlib.sha1(compose(name).encode(), usedforsecurity=False).hexdigest()
