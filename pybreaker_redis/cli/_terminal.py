"""The terminal of `watch`: the second screen, keys one by one; however the program ends, the terminal is as before."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import rich.console
import rich.text

try:
    import termios
    import tty
except ImportError:  # Windows has no such terminals: there are no keys, and Ctrl-C ends
    termios = None  # type: ignore[assignment]

ESCAPE_WAIT = 0.05  # seconds in which the rest of an escape sequence must come
_KEY = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Za-z])|.", re.DOTALL)
_NAMES = {
    **dict.fromkeys(("\x1b[A", "\x1bOA"), "up"),
    **dict.fromkeys(("\x1b[B", "\x1bOB"), "down"),
    **dict.fromkeys(("\x1b[C", "\x1bOC"), "right"),
    **dict.fromkeys(("\x1b[D", "\x1bOD"), "left"),
    **dict.fromkeys(("\x1b[H", "\x1bOH", "\x1b[1~", "\x1b[7~"), "home"),
    **dict.fromkeys(("\x1b[F", "\x1bOF", "\x1b[4~", "\x1b[8~"), "end"),
    **dict.fromkeys(("\r", "\n"), "enter"),
    **dict.fromkeys(("\x7f", "\x08"), "backspace"),
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b": "escape",
}
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # second screen and cursor


def key_names(text: str) -> list[str]:
    """The keys behind what a terminal sends: characters, and names of special keys. Others are passed over."""
    found = [_NAMES.get(one, one) for one in _KEY.findall(text)]
    return [key for key in found if key in _NAMES.values() or key.isprintable()]


class Terminal:
    """A `with` block on the second screen of the terminal, in which keys are read one by one.

    However the block ends, also by SIGTERM, SIGHUP or Ctrl-C, the terminal is as it was before. The same holds
    while Ctrl-Z suspends the process. Without a terminal on standard input there are no keys.
    """

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._input = sys.stdin.fileno() if termios is not None and sys.stdin.isatty() else None
        self._has_ended = self._input is None
        self._before: list[Any] = []
        self._handlers: dict[int, Any] = {}
        self._is_on = False

    def __enter__(self) -> Terminal:
        for number in _signals():
            self._handlers[number] = signal.signal(number, self._suspend if number == _SUSPEND else _leave)
        self._turn_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._turn_off()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def read(self, seconds: float) -> list[str] | None:
        """The keys that are pressed within so many seconds, as soon as there are any; None if no key can come."""
        if self._has_ended or self._input is None:
            return None
        if not select.select([self._input], [], [], seconds)[0]:
            return []
        data = self._typed()
        if data.endswith(b"\x1b") and select.select([self._input], [], [], ESCAPE_WAIT)[0]:
            data += self._typed()
        self._has_ended = not data
        return key_names(self._decoder.decode(data)) if data else None

    def _typed(self) -> bytes:
        with contextlib.suppress(OSError):  # the terminal has gone
            return os.read(self._input, 1024) if self._input is not None else b""
        return b""

    def show(self, lines: Sequence[rich.text.Text]) -> None:
        """Replace what the screen shows."""
        with self._console.capture() as drawn:
            self._console.print(rich.text.Text("\n").join(lines), end="", soft_wrap=True)
        rows = drawn.get().split("\n")
        self._write("\x1b[H" + "\x1b[K\n".join(rows) + "\x1b[J")

    def _turn_on(self) -> None:
        if self._input is not None:
            self._before = termios.tcgetattr(self._input)
            tty.setcbreak(self._input, termios.TCSANOW)
        self._is_on = True
        self._write(_ENTER)

    def _turn_off(self) -> None:
        if not self._is_on:
            return
        self._is_on = False
        with contextlib.suppress(OSError, *_TERMINAL_ERRORS):  # the terminal has gone
            if self._input is not None:
                termios.tcsetattr(self._input, termios.TCSADRAIN, self._before)
            self._write(_LEAVE)

    def _suspend(self, number: int, _: FrameType | None) -> None:
        """Stop as Ctrl-Z asks, and go on from there."""
        self._turn_off()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._suspend)
        self._turn_on()

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


_TERMINAL_ERRORS: tuple[type[Exception], ...] = () if termios is None else (termios.error,)
_SUSPEND = getattr(signal, "SIGTSTP", None)


def _signals() -> Iterator[signal.Signals]:
    for name in ("SIGTERM", "SIGHUP", "SIGTSTP"):
        if hasattr(signal, name):
            yield signal.Signals[name]


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
