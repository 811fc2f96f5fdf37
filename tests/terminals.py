"""The program on a terminal of its own, as somebody looks at it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

FIRST, LAST = "\x1b[?1049h", "\x1b[?1049l"  # of the second screen


class Terminal:
    """A process on a terminal of its own. raw: everything that it has sent to the terminal."""

    def __init__(self, url: str, *arguments: str, size: tuple[int, int] = (80, 24), stdin: int | None = None) -> None:
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.before = termios.tcgetattr(self.theirs)
        environment = {name: os.environ[name] for name in os.environ.keys() - {"COLUMNS", "LINES", "NO_COLOR"}}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pybreaker_redis", *arguments],
            env={**environment, "TERM": "xterm-256color", "REDIS_URL": url},
            stdin=self.theirs if stdin is None else stdin,
            stdout=self.theirs,
            stderr=self.theirs,
            process_group=0,
        )
        self.raw = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 65536):
                self.raw += data.decode(errors="replace")

    def type(self, text: str) -> None:
        """Type this text."""
        os.write(self._ours, text.encode())

    @property
    def text(self) -> str:
        """Everything that was drawn, without colours."""
        return plain(self.raw)

    @property
    def drawn(self) -> str:
        """What the screen shows now, with its colours; empty before the first drawing."""
        found = re.findall(r"\x1b\[H((?:(?!\x1b\[H).)*?)\x1b\[J", self.raw, re.DOTALL)
        return found[-1].replace("\x1b[K", "").replace("\r", "") if found else ""

    @property
    def frame(self) -> list[str]:
        """The same lines without colours."""
        return plain(self.drawn).splitlines()

    def shows(self, text: str) -> bool:
        """Whether the screen shows this text now."""
        return any(text in line for line in self.frame)

    def is_restored(self) -> bool:
        """Whether the terminal is as it was, on its first screen."""
        return termios.tcgetattr(self.theirs) == self.before and self.raw.rfind(LAST) > self.raw.rfind(FIRST)

    def end(self) -> None:
        """End the process and close the terminal."""
        self.process.kill()
        self.process.wait()
        os.close(self.theirs)
        os.close(self._ours)


def plain(text: str) -> str:
    """The text without the sequences that a board may send."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")
