"""Checks the Lua: it is Lua 5.1, touches only the globals of a Redis script, and its functions are short.

`python tests/check_lua.py`; the list of globals is the one in .luacheckrc.
"""

from __future__ import annotations

import pathlib
import re
import struct
import sys
from collections.abc import Iterator

from lupa.lua51 import LuaRuntime

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = {"redis", "cjson", "cmsgpack", "KEYS", "ARGV"}
LIBRARIES = {"math", "string", "table", "bit", "struct"}
FUNCTIONS = {"pairs", "ipairs", "next", "select", "unpack", "tonumber", "tostring", "type", "setmetatable", "rawget"}
GLOBALS = SERVER | LIBRARIES | FUNCTIONS | {"error", "pcall", "assert"}
# locals of model.lua; globals only to a file that is compiled alone
SHARED = {"breaker", "LARGEST", "DAY_MS"}
LONG, MOST_LONG = 20, 0.08  # lines of a function, and the share of functions that may be longer
GETGLOBAL, SETGLOBAL = 5, 7
BOOLEAN, NUMBER, STRING = 1, 3, 4


class Bytecode:
    """A reader of what Lua 5.1's string.dump gives on a little-endian 64-bit machine."""

    HEADER = b"\x1bLua\x51\x00\x01\x04\x08\x04\x08\x00"

    def __init__(self, dump: bytes) -> None:
        if not dump.startswith(self.HEADER):
            raise ValueError(f"not the expected Lua 5.1 bytecode: {dump[:12]!r}")
        self._dump = dump
        self._at = len(self.HEADER)

    def global_accesses(self) -> Iterator[tuple[int, str, bool]]:
        """(line, name, written) of every global that a function and those inside it touch."""
        self._string()
        self._take("<iiBBBB")
        code = [self._take("<I") for _ in range(self._take("<i"))]
        constants = [self._constant() for _ in range(self._take("<i"))]
        for _ in range(self._take("<i")):
            yield from self.global_accesses()
        lines = [self._take("<i") for _ in range(self._take("<i"))]
        for _ in range(self._take("<i")):  # names of locals
            self._string()
            self._take("<ii")
        for _ in range(self._take("<i")):  # names of upvalues
            self._string()
        for instruction, line in zip(code, lines, strict=True):
            if instruction & 0x3F in (GETGLOBAL, SETGLOBAL):
                yield line, str(constants[instruction >> 14]), instruction & 0x3F == SETGLOBAL

    def _take(self, layout: str) -> int:
        value, *_ = struct.unpack_from(layout, self._dump, self._at)
        self._at += struct.calcsize(layout)
        return int(value)

    def _string(self) -> str:
        size = self._take("<Q")
        text = self._dump[self._at : self._at + size]
        self._at += size
        return text.rstrip(b"\0").decode(errors="replace")

    def _constant(self) -> object:
        kind = self._take("<B")
        if kind == STRING:
            return self._string()
        if kind in (BOOLEAN, NUMBER):
            return self._take("<B" if kind == BOOLEAN else "<Q")
        return None


def problems(name: str, source: str, extra: frozenset[str] = frozenset()) -> list[str]:
    """What is wrong with one Lua source. extra: globals that it may read and write besides."""
    lua = LuaRuntime(encoding=None)
    compile_ = lua.eval(
        b"function(source, name) local chunk, problem = loadstring(source, name)"
        b" return chunk and string.dump(chunk), problem end"
    )
    compiled = compile_(source.encode(), b"@" + name.encode())
    dump, problem = compiled if isinstance(compiled, tuple) else (compiled, None)
    if not dump:
        return [problem.decode()]
    found = []
    for line, variable, written in sorted(Bytecode(dump).global_accesses()):
        if variable not in extra and (written or variable not in GLOBALS):
            found.append(f"{name}:{line}: {'writes' if written else 'reads'} global {variable}")
    return found


def lengths(source: str) -> list[tuple[str, int]]:
    """(name, lines) of each function that begins in column 0; functions within it count as its lines."""
    found = re.finditer(r"^(?:local )?function (?:breaker\.)?(\w+)\(.*?^end$", source, re.MULTILINE | re.DOTALL)
    return [(match[1], match[0].count("\n") + 1) for match in found]


def main() -> int:
    """0 when everything is in order, else 1 with one line per problem."""
    from pybreaker_redis.wire.scripts import SCRIPTS, compose

    files = [path for folder in ("lua", "tests/lua") for path in sorted((ROOT / folder).glob("*.lua"))]
    found = []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        found += problems(name, path.read_text(encoding="utf-8"), frozenset(SHARED))
    for script in SCRIPTS:
        found += problems(f"composed {script}.lua", compose(script))
    checked = len(files) + len(SCRIPTS)
    functions = [one for path in files for one in lengths(path.read_text(encoding="utf-8"))]
    long = [f"{name} ({lines})" for name, lines in functions if lines > LONG]
    share = len(long) / len(functions)
    if share > MOST_LONG:
        found.append(f"more than {MOST_LONG:.0%} of the functions are longer than {LONG} lines")
    print(f"{len(functions)} functions, {share:.1%} longer than {LONG} lines: {', '.join(long)}")
    print(*found, f"{checked} Lua sources checked, {len(found)} problems", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
