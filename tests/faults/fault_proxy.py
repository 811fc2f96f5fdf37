"""A TCP proxy that does to a link what networks do: delay, stall, cut, half-open, truncated and late replies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

_PIECE = 65536
_FINE = "fine"


@dataclasses.dataclass(eq=False)
class _Pair:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    used_at: float  # when something last passed


class FaultProxy:
    """Forwards to 127.0.0.1:port on its own thread, and misbehaves on order.

    Until fine(), for links that are open and for those that come:
    delay(seconds): each reply is later by so much.
    stall(): nothing passes, in either direction, but connections are taken.
    hold_replies(): requests pass, replies are kept until fine(), when they come all at once, too late.
    drop_replies(): requests pass, replies vanish.
    truncate(size): so many bytes of a reply pass, then the link is cut.
    reset(): every link is cut at once.
    drop_idle(seconds): a link on which nothing has passed for so long leads nowhere any more, and its client does not
        notice. dropped counts these.

    For the links that are open now, and for good:
    cut(): they are cut. half_open(): they lead nowhere any more, and their clients do not notice.
    lose_replies(): requests pass, replies vanish.

    tls: how to greet clients, who then must speak TLS; the server itself is spoken to without.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._tls = port, tls
        self._loop = asyncio.new_event_loop()
        self._way, self._argument = _FINE, 0.0
        self._changed = asyncio.Event()
        self._pairs: set[_Pair] = set()
        self._dead: set[_Pair] = set()
        self._dumb: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = self.dropped = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = self._do(self._listen)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"

    # Ways

    def fine(self) -> None:
        """Forward everything again, also what was kept."""
        self._set(_FINE)

    def delay(self, seconds: float) -> None:
        self._set("delay", seconds)

    def stall(self) -> None:
        self._set("stall")

    def hold_replies(self) -> None:
        self._set("hold_replies")

    def drop_replies(self) -> None:
        self._set("drop_replies")

    def truncate(self, size: int) -> None:
        self._set("truncate", size)

    def drop_idle(self, seconds: float) -> None:
        self._set("drop_idle", seconds)

    def reset(self) -> None:
        self._set("reset")
        self.cut()

    def cut(self) -> None:
        """Cut every link that is open now."""
        self._do(self._cut)

    def half_open(self) -> None:
        """Every link that is open now leads nowhere, and its client does not notice."""
        self._do(self._half_open)

    def lose_replies(self) -> None:
        """Requests of every link that is open now pass, but no reply to them does."""
        self._do(self._lose_replies)

    def close(self) -> None:
        self._do(self._end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # On the loop

    def _do(self, what: Callable[[], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            return await what()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)

    def _set(self, way: str, argument: float = 0.0) -> None:
        async def change() -> None:
            self._way, self._argument = way, argument
            self._changed.set()
            self._changed = asyncio.Event()

        self._do(change)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            pair.near.transport.abort()
            pair.far.transport.abort()

    async def _half_open(self) -> None:
        self._dead |= self._pairs
        for pair in self._pairs:
            pair.far.transport.abort()

    async def _lose_replies(self) -> None:
        self._dumb |= self._pairs

    async def _end(self) -> None:
        self._server.close()
        await self._cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._way == "reset":
            near.transport.abort()
            return
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            near.transport.abort()
            return
        pair = _Pair(near, far, self._loop.time())
        self._pairs.add(pair)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await asyncio.gather(
                self._pump(pair, near_reader, far, reply=False), self._pump(pair, far_reader, near, reply=True)
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._pairs.discard(pair)
            self._dead.discard(pair)
            self._dumb.discard(pair)
            self._tasks.discard(task)
            near.transport.abort()
            far.transport.abort()

    async def _pump(
        self, pair: _Pair, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, reply: bool
    ) -> None:
        while data := await self._read(pair, source, reply):
            if (data := await self._pass(pair, data, reply)) is None:
                continue
            target.write(data)
            await target.drain()
            if self._way == "truncate" and reply:
                break
        if reply and pair in self._dead:
            await asyncio.Event().wait()  # the near side stays up until the client gives up
        pair.near.transport.close()
        pair.far.transport.close()

    async def _read(self, pair: _Pair, source: asyncio.StreamReader, reply: bool) -> bytes:
        try:
            return await source.read(_PIECE)
        except OSError:
            if reply and pair in self._dead:
                return b""
            raise

    async def _pass(self, pair: _Pair, data: bytes, reply: bool) -> bytes | None:
        """What of the data goes on, when it may; None for nothing."""
        while self._way == "stall" or (self._way == "hold_replies" and reply):
            await self._changed.wait()
        if self._way == "drop_idle" and pair not in self._dead:
            silent, pair.used_at = self._loop.time() - pair.used_at, self._loop.time()
            if silent >= self._argument:
                self._dead.add(pair)
                self.dropped += 1
        if pair in self._dead:
            return None
        if reply and (self._way == "drop_replies" or pair in self._dumb):
            return None
        if reply and self._way == "delay":
            await asyncio.sleep(self._argument)
        if reply and self._way == "truncate":
            return data[: int(self._argument)]
        return data


@contextlib.contextmanager
def proxy_to(port: int, tls: ssl.SSLContext | None = None) -> Iterator[FaultProxy]:
    """A FaultProxy for a `with` block."""
    proxy = FaultProxy(port, tls)
    try:
        yield proxy
    finally:
        proxy.close()
