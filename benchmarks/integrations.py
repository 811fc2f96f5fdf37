"""What does a guarded HTTP client cost, beside the same client without a guard?

    python benchmarks/integrations.py [--rounds 60] [--slice 0.05]

One server process on this machine answers every request with 200 at once, so that the client's own time counts for as
much as it ever can. In each round every client sends requests for one slice, in an order that moves on by one. The
table has the median time per request, and the median over the rounds of its ratio to the plain client of that round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import aiohttp
import httpx
import requests
from contenders import in_turn

from pybreaker_redis import AsyncCircuitBreakerManager, CircuitBreakerManager, Config
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.integrations.aiohttp import breaker_middleware
from pybreaker_redis.integrations.httpx import AsyncBreakerTransport, BreakerTransport
from pybreaker_redis.integrations.requests import BreakerAdapter

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
MOST = 1.1  # times the plain client

Send = Callable[[], Any]


class Answer(asyncio.Protocol):
    """Answers each request, which comes in one piece."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(ANSWER)


def serve(parent: Connection) -> None:
    """The server's process."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Answer, "127.0.0.1", 0)
        parent.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextlib.contextmanager
def service() -> Iterator[str]:
    """The URL of the server."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/"
    finally:
        process.terminate()
        process.join()


def timed(send: Send, seconds: float) -> float:
    """Seconds per request."""
    count, began = 0, perf_counter()
    while (now := perf_counter()) - began < seconds:
        send()
        count += 1
    return (now - began) / count


async def timed_async(send: Callable[[], Awaitable[Any]], seconds: float) -> float:
    """Seconds per request."""
    count, began = 0, perf_counter()
    while (now := perf_counter()) - began < seconds:
        await send()
        count += 1
    return (now - began) / count


def measure(url: str, redis_url: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    """The times of each blocking client, by round."""
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(CircuitBreakerManager.with_redis(Config(redis_url=redis_url)))

        def client(transport: httpx.BaseTransport | None) -> Send:
            made = stack.enter_context(httpx.Client(transport=transport or httpx.HTTPTransport()))
            return lambda: made.get(url)

        def session(adapter: Any) -> Send:
            made = stack.enter_context(requests.Session())
            if adapter is not None:
                made.mount("http://", adapter)
            return lambda: made.get(url)

        sends = {
            "httpx": client(None),
            "httpx guarded": client(BreakerTransport(manager)),
            "httpx guarded, until body": client(BreakerTransport(manager, until="body")),
            "requests": session(None),
            "requests guarded": session(BreakerAdapter(manager)),
        }
        times: dict[str, list[float]] = {name: [] for name in sends}
        for name in sends:
            timed(sends[name], seconds / 2)
        for number in range(rounds):
            for name in in_turn(number, list(sends)):
                times[name].append(timed(sends[name], seconds))
        return times


async def measure_async(url: str, redis_url: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    """The times of each asyncio client, by round."""
    async with contextlib.AsyncExitStack() as stack:
        manager = await stack.enter_async_context(
            AsyncCircuitBreakerManager.with_redis(Config(redis_url=redis_url, prefix="on_asyncio"))
        )

        async def client(transport: httpx.AsyncBaseTransport | None) -> Send:
            made = await stack.enter_async_context(httpx.AsyncClient(transport=transport or httpx.AsyncHTTPTransport()))
            return lambda: made.get(url)

        async def session(*middlewares: Any) -> Send:
            made = await stack.enter_async_context(aiohttp.ClientSession(middlewares=middlewares))

            async def send() -> None:
                async with made.get(url) as response:
                    await response.read()

            return send

        sends = {
            "httpx asyncio": await client(None),
            "httpx asyncio guarded": await client(AsyncBreakerTransport(manager)),
            "httpx asyncio guarded, until body": await client(AsyncBreakerTransport(manager, until="body")),
            "aiohttp": await session(),
            "aiohttp guarded": await session(breaker_middleware(manager)),
        }
        times: dict[str, list[float]] = {name: [] for name in sends}
        for name in sends:
            await timed_async(sends[name], seconds / 2)
        for number in range(rounds):
            for name in in_turn(number, list(sends)):
                times[name].append(await timed_async(sends[name], seconds))
        return times


def table(times: dict[str, list[float]]) -> bool:
    """Print it. Returns whether every guarded client of httpx keeps to MOST."""
    kept = True
    for name, taken in times.items():
        plain = times[name.partition(" guarded")[0]]
        ratio = statistics.median(one / bare for one, bare in zip(taken, plain, strict=True))
        extra = (statistics.median(taken) - statistics.median(plain)) * 1e6
        print(f"{name:36} {statistics.median(taken) * 1e6:8.1f} us {extra:+8.1f} us {ratio:8.3f}")
        kept = kept and (ratio <= MOST or not name.startswith("httpx"))
    return kept


def main() -> None:
    """Measure, and fail if httpx exceeds MOST."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--slice", type=float, default=0.05, help="seconds")
    options = parser.parse_args()
    with EmbeddedServer() as server, service() as url:
        print(f"{'client':36} {'request':>11} {'more':>11} {'ratio':>8}")
        kept = [
            table(measure(url, server.url, options.rounds, options.slice)),
            table(asyncio.run(measure_async(url, server.url, options.rounds, options.slice))),
        ]
    if not all(kept):
        raise SystemExit(f"a guarded client of httpx takes more than {MOST} times as long as a plain one")


if __name__ == "__main__":
    main()
