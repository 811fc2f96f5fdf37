"""A real HTTP server that misbehaves as the path asks: what the guarded clients of these tests call."""

from __future__ import annotations

import asyncio
import collections
import json
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from pybreaker_redis import CircuitOpenError


async def running_probe(service: Service, path: str, send: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
    """Send a request that hangs until one is admitted, as the probe of an open circuit. Returns its task."""
    async with asyncio.timeout(30):
        while True:
            probe = asyncio.create_task(send())
            while service.calls[path] == 0 and not probe.done():
                await asyncio.sleep(0.01)
            if not probe.done():
                return probe
            assert isinstance(probe.exception(), CircuitOpenError)
            await asyncio.sleep(0.01)


class Service:
    """What a path does:

    /status/CODE?HEADER=VALUE answers so. /reset resets the connection, /close closes it. /hang answers nothing.
    /cut breaks off within a body of known length, /cut-chunks within a chunked one, /hang-body stops there.
    /stream sends ten chunks. Every other path answers 200. `calls` counts the requests by path.
    """

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.answer: tuple[int, dict[str, str]] | None = None  # if set: of every path
        self.url = ""
        self.port = 0

    @property
    def requests(self) -> int:
        return sum(self.calls.values())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._handle(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _handle(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = head.decode("latin-1").split("\r\n")
        path, _, query = lines[0].split(" ")[1].partition("?")
        lengths = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")]
        await reader.readexactly(sum(lengths))
        self.calls[path] += 1
        if self.answer is not None:
            respond(writer, *self.answer)
        elif path.startswith("/status/"):
            respond(writer, int(path.split("/")[2]), dict(one.split("=") for one in query.split("&") if one))
        elif path == "/reset":
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        elif path == "/close":
            return False
        elif path == "/hang":
            await reader.read()
            return False
        elif path in ("/cut", "/hang-body"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
            await writer.drain()
            if path == "/hang-body":
                await reader.read()
            return False
        elif path in ("/stream", "/cut-chunks"):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(10):
                writer.write(b"5\r\nchunk\r\n")
                await writer.drain()
            if path == "/cut-chunks":
                return False
            writer.write(b"0\r\n\r\n")
        else:
            respond(writer, 200, {})
        await writer.drain()
        return True


def respond(writer: asyncio.StreamWriter, status: int, headers: dict[str, str], body: Any = None) -> None:
    """Write a whole response."""
    text = b"" if status in (204, 304) else json.dumps(body or {"status": status}).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}
    lines = [f"HTTP/1.1 {status} Status", *(f"{name}: {value}" for name, value in fields.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + text)


@contextmanager
def running_service() -> Iterator[Service]:
    """A service in a thread of its own."""
    service, started, loop = Service(), threading.Event(), asyncio.new_event_loop()

    async def run(stop: asyncio.Event) -> None:
        server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
        service.port = server.sockets[0].getsockname()[1]
        service.url = f"http://127.0.0.1:{service.port}"
        started.set()
        await stop.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run(stop)), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield service
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
