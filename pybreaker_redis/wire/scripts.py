"""Finds the Lua and composes what Redis runs; knows no rule of the breaker."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    head, *rest = _FUNCTION.split(library)  # then the name and the text of each function
    leader = {name: group[0] for group in GROUPS for name in group}
    functions = zip(rest[::2], rest[1::2], strict=True)
    blocks = [list(block) for _, block in itertools.groupby(functions, lambda one: leader.get(one[0], one[0]))]
    numbers = {name: number for number, block in enumerate(blocks) for name, _ in block if name not in GROUPS[0]}
    before, after = _branches([block[0][0] in GROUPS[0] for block in blocks])
    text = f"{head}local function make(_, name) local number = name and ({_number(numbers)}) or {len(blocks)} "
    for block, opens, closes in zip(blocks, before, after, strict=True):
        made = "".join(body for _, body in block)
        end = made.rindex("\nend\n") + len("\nend")
        text += opens + made[:end] + closes + made[end:]
    return f"{text.rstrip()} end breaker.__index = make setmetatable(breaker, breaker) make()\n"


def _number(numbers: Mapping[str, int]) -> str:
    """The Lua expression that finds the number of a name: by halving the lengths of the names, then by the name."""
    lengths = sorted({len(name) for name in numbers})
    if len(lengths) == 1:
        return " or ".join(f"name == '{name}' and {number}" for name, number in numbers.items())
    middle = lengths[len(lengths) // 2]
    shorter = {name: number for name, number in numbers.items() if len(name) < middle}
    longer = {name: number for name, number in numbers.items() if len(name) >= middle}
    return f"#name < {middle} and ({_number(shorter)}) or {_number(longer)}"


def _branches(is_first: Sequence[bool]) -> tuple[list[str], list[str]]:
    """The Lua before and after each block of functions, which finds a block by halving the numbers.

    is_first: whether a block belongs to the first group, whose functions are spread over the library.
    """
    before, after = [""] * len(is_first), [""] * len(is_first)

    def halve(start: int, stop: int) -> None:
        if stop - start == 1:
            after[start] += " return breaker[name]"
            return
        middle = (start + stop) // 2
        before[start] += f"if number < {middle} then "
        halve(start, middle)
        before[middle] += "else "
        halve(middle, stop)
        after[stop - 1] += " end"

    for first, run in itertools.groupby(range(len(is_first)), is_first.__getitem__):
        start, *others = run
        stop = start + len(others) + 1
        before[start] += "if not name then " if first else f"if number < {stop} then "
        if not first:
            halve(start, stop)
        after[stop - 1] += " end"
    return before, after


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
