"""The application: its addresses, and what is answered there."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import anyio.to_thread
from anyio.lowlevel import RunVar
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from .. import _protocol
from .._board import Row, read_one, row_of
from .._errors import CircuitBreakerError, PolicyError, RedisUnavailableError
from .._processes import Process, concerns_list, disagreements, fleet_json, read_processes
from .._protocol import HistoryEntry, Snapshot, keys_of
from .._reader import SHORTEST_PAUSE, TIMEOUT, Board, BoardReader, Viewer
from .._sync import CircuitBreaker
from ..wire.options import BLOCKING, REDIS_ERRORS, client_like
from . import _access, _pages
from ._access import Authorize
from ._actions import ACTIONS, Order, kept_fields, order_from_form, order_from_json
from ._openapi import description
from ._pages import View, row_json
from ._screens import Screen, Screens, part

HISTORY = 50  # entries on a breaker's page
LARGEST_BODY = 65536
MOST_THREADS = 20  # that wait for Redis, of one event loop
MOST_LISTED = 1000  # breakers in one JSON answer
STREAM = 600.0  # seconds after which a browser must ask again for events, and so must its operator
LISTED = 10.0  # seconds for which the list of processes, which may be long, is not read again
REST = 0.05  # seconds between two messages to one viewer
T = TypeVar("T")
FORM, JSON = "application/x-www-form-urlencoded", "application/json"
ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


_threads: RunVar[anyio.CapacityLimiter] = RunVar("pybreaker_redis.web threads")


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function that waits for Redis in a thread. Such threads have a limit of their own: the threads of the
    application that mounts the page must not all wait for a Redis that hangs."""
    try:
        limiter = _threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(MOST_THREADS)
        _threads.set(limiter)
    return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter)


class Json(JSONResponse):
    """An answer in ASCII, since a stored text may have halves of surrogate pairs, which UTF-8 does not have."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class Details(NamedTuple):
    """Everything that Redis knows about one breaker."""

    row: Row
    seen: Snapshot
    history: list[HistoryEntry]
    processes: list[Process]
    now: float


def breakers_app(
    redis: Any,
    *,
    prefix: str = "circuit_breaker",
    read_only: bool = True,
    authorize: Authorize | None = None,
    health: bool = False,
) -> ASGIApp:
    """The operators' page as an ASGI application, to be served alone or mounted in another one.

    redis: a redis-py client, blocking or asyncio, or a URL. prefix: which breakers to show. read_only: False lets
    operators force, clear, probe and reset breakers and change their policy. authorize: a function, plain or async,
    that takes a starlette Request and returns the operator's name, or None for a stranger; it is asked for every page.
    Without it everybody may read and nobody may write. health: whether /health answers everybody: 200 while Redis can
    be read, else 503.

    Raises PolicyError for read_only=False without authorize, and for an invalid client or prefix.
    """
    if not read_only and authorize is None:
        raise PolicyError(
            "read_only=False needs authorize=, a function that takes a request and returns the operator's name or None"
        )
    keys_of("breaker", prefix)
    return Site(BoardReader(client_like(redis, BLOCKING), prefix), prefix, read_only, authorize).application(health)


class Site:
    """Answers the requests."""

    def __init__(self, reader: BoardReader, prefix: str, read_only: bool, authorize: Authorize | None) -> None:
        self._reader, self._prefix = reader, prefix
        self._read_only, self._authorize = read_only, authorize
        self._screens = Screens(prefix)
        self._listed: tuple[list[Process], float] = ([], -math.inf)

    def application(self, health: bool) -> ASGIApp:
        """The ASGI application."""
        allowed = self._allowed
        routes = [
            Route("/", allowed(self._board)),
            Route("/breakers/{name:breaker}/{action}", allowed(self._act), methods=["POST"]),
            Route("/breakers/{name:breaker}", allowed(self._breaker)),
            Route("/fleet", allowed(self._fleet)),
            Route("/api/fleet", allowed(self._fleet_json)),
            Route("/api/breakers", allowed(self._list)),
            Route("/api/breakers/{name:breaker}", allowed(self._details)),
            Route("/api/openapi.json", allowed(self._describe)),
            Route("/events", allowed(self._events)),
            Route("/static/{name}", _static),
        ]
        if health:
            routes.append(Route("/health", self._health))
        errors: dict[Any, Any] = {HTTPException: self._refuse, CircuitBreakerError: self._fail}
        errors |= dict.fromkeys(REDIS_ERRORS, self._fail)
        errors[ClientDisconnect] = _nobody_reads
        return _access.SafeHeaders(Starlette(routes=routes, exception_handlers=errors))

    def _allowed(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """The same answer, for those who may see it."""

        async def guarded(request: Request) -> Response:
            request.state.operator = await _access.operator_of(request, self._authorize)
            return await answer(request)  # type: ignore[no-any-return]

        return guarded

    # Pages

    async def _board(self, request: Request) -> Response:
        board, view = await self._current(), View.of(request.query_params)
        page = self._screens.page(board, view)
        clock = {"now": board.now, "cells_of": self._screens.cells}
        return self._html(request, "board.html", {"board": board, "view": view, "page": page, **clock})

    async def _breaker(self, request: Request) -> Response:
        name = request.path_params["name"]
        stored = await self._read(name)
        done = ACTIONS.get(request.query_params.get("done", ""))
        return self._html(request, "breaker.html", {"done": done, **self._about(name, stored)})

    async def _fleet(self, request: Request) -> Response:
        processes = await _in_thread(self._processes_now)
        content = {
            "processes": processes,
            "disputed": list(disagreements(processes)),
            "hosts": {process.host for process in processes},
        }
        return self._html(request, "fleet.html", content)

    def _about(self, name: str, stored: Details) -> dict[str, Any]:
        """What the page of one breaker shows."""
        row, seen, history, processes, now = stored
        segments = _pages.timeline(history, row, now)
        return {
            "name": name,
            "row": row,
            "seen": seen,
            "history": history,
            "now": now,
            "cells": self._screens.cells(row, now),
            "segments": segments,
            "shown": {segment.condition for segment in segments},
            "start": segments[0].start,
            "scripts": _pages.redis_cli_lines(
                keys_of(name, self._prefix), seen.generation, self._reader.server.clustered
            ),
            "bars": _pages.bars(row, now),
            "fields": _pages.policy_fields(seen, processes),
            "details": self._details_json(stored),
        }

    def _html(self, request: Request, template: str, content: dict[str, Any], status: int = 200) -> Response:
        token = _access.token_of(request)
        shown = part(
            template,
            root=_root(request),
            prefix=self._prefix,
            operator=getattr(request.state, "operator", None),
            read_only=self._read_only,
            token=token,
            token_field=_access.TOKEN_FIELD,
            **content,
        )
        response = HTMLResponse(shown, status)
        if not self._read_only:
            _access.keep_token(request, response, token)
        return response

    # Writing

    async def _act(self, request: Request) -> Response:
        name, action = request.path_params["name"], request.path_params["action"]
        _access.check_origin(request)
        if self._read_only:
            raise HTTPException(403, "This page only reads.")
        if action not in ACTIONS:
            raise HTTPException(404, f"There is no action {action!r}; the actions are {', '.join(ACTIONS)}.")
        _check_length(request)
        kind = _content_type(request)
        if kind == JSON:
            _access.check_token(request, request.headers.get(_access.TOKEN_HEADER))
            order = order_from_json(action, await _json_body(request), request.state.operator)
            after = await self._carry_out(name, action, order)
            return Response(status_code=204) if after is None else Json(self._details_json(after))
        if kind != FORM:
            raise HTTPException(415, f"The body must be a form ({FORM}) or {JSON}.")
        form = await request.form(max_fields=100)
        values = {key: value for key, value in form.items() if isinstance(value, str)}
        _access.check_token(request, values.get(_access.TOKEN_FIELD))
        order = order_from_form(action, values, request.state.operator)
        if values.get("confirmed") != "yes":
            return await self._confirm(request, name, action, order, values)
        after = await self._carry_out(name, action, order)
        page = "" if after is None else f"breakers/{_pages.quoted(name)}?done={action}"
        return RedirectResponse(f"{_root(request)}/{page}", 303)

    async def _confirm(
        self, request: Request, name: str, action: str, order: Order, values: dict[str, str]
    ) -> Response:
        stored = await self._read(name)
        asked = {"action": action, "order": order, "kept": kept_fields(values, order)}
        return self._html(request, "confirm.html", {"name": name, "row": stored.row, "now": stored.now, **asked})

    async def _carry_out(self, name: str, action: str, order: Order) -> Details | None:
        """Do it, and read the breaker again; None if Redis now stores nothing for it.

        An unknown breaker is refused: its name may be mistyped.
        """
        await self._read(name)

        def act() -> None:
            breaker = CircuitBreaker(
                name, redis=self._reader.client, prefix=self._prefix, lease=0, redis_timeout=TIMEOUT
            )
            ACTIONS[action].carry_out(breaker, order)

        await _in_thread(act)
        return await _in_thread(self._read_now, name, keys_of(name, self._prefix).state.encode())

    # JSON

    async def _list(self, request: Request) -> Response:
        board, query = await self._current(), request.query_params
        found = self._screens.rows(board, View.of(query))
        offset, limit = _count(query, "offset", 0, math.inf), _count(query, "limit", 100, MOST_LISTED)
        answer = {
            "prefix": self._prefix,
            "now": board.now,
            "error": board.error,
            "counts": board.counts,
            "total": len(found),
            "breakers": [row_json(row, self._screens.cells(row, board.now)) for row in found[offset : offset + limit]],
        }
        return self._json(request, answer)

    async def _details(self, request: Request) -> Response:
        name = request.path_params["name"]
        stored = await self._read(name)
        return self._json(request, self._details_json(stored))

    def _details_json(self, stored: Details) -> dict[str, Any]:
        """Everything about one breaker for a program. Times are in unix seconds."""
        return {
            "breaker": row_json(stored.row, self._screens.cells(stored.row, stored.now)),
            "snapshot": dataclasses.asdict(stored.seen),
            "history": [dataclasses.asdict(entry) for entry in stored.history],
            "now": stored.now,
        }

    def _json(self, request: Request, answer: Any) -> Response:
        """The answer, with the cookie whose token a writing program sends back."""
        response = Json(answer)
        if not self._read_only:
            _access.keep_token(request, response, _access.token_of(request))
        return response

    async def _fleet_json(self, request: Request) -> Response:
        processes = await _in_thread(self._processes_now)
        return self._json(request, fleet_json(processes, disagreements(processes)))

    async def _describe(self, request: Request) -> Response:
        return Json(description(_root(request), self._read_only))

    async def _health(self, request: Request) -> Response:
        board = await _in_thread(self._reader.current)
        return PlainTextResponse("Redis cannot be read\n" if board.error else "ok\n", 503 if board.error else 200)

    # Events

    async def _events(self, request: Request) -> Response:
        name = request.query_params.get("breaker")
        if name is not None:
            keys_of(name, self._prefix)
        messages = (
            self._rows_messages(_root(request), View.of(request.query_params))
            if name is None
            else self._one_messages(_root(request), name)
        )
        return EventSourceResponse(messages, headers={"Cache-Control": "no-store"})

    async def _rows_messages(self, root: str, view: View) -> AsyncIterator[dict[str, str]]:
        """What has changed on one page of the board, as often as something has."""
        seen: Screen | None = None
        async for board in self._boards():
            screen = self._screens.screen(root, board, view)
            message, seen = screen.since(seen), screen
            if message is not None:
                yield {"event": "board", "data": message}

    async def _one_messages(self, root: str, name: str) -> AsyncIterator[dict[str, str]]:
        """The changing part of a breaker's page, and whether it is up to date, as often as either has changed."""
        key = keys_of(name, self._prefix).state.encode()
        sent: dict[str, str] = {}
        known: tuple[Row | None, str | None] = None, None
        read_at = -math.inf
        async for board in self._boards():
            found = board.by_key.get(key), board.error
            if found == known and monotonic() - read_at < SHORTEST_PAUSE:
                continue
            known, read_at = found, monotonic()
            parts, now = await self._live(root, name, board)
            if parts != sent:
                sent = parts
                yield {"event": "breaker", "data": json.dumps({**parts, "now": now})}

    async def _live(self, root: str, name: str, board: Board) -> tuple[dict[str, str], float]:
        """The parts of a breaker's page that change, and the server's clock. Where the breaker has expired or cannot be
        read, only its status: the rest of the page stays as it is."""
        status = part("status.html", board=board, is_gone=False)
        if board.error:
            return {"status": status}, board.now
        try:
            stored = await self._read(name)
        except HTTPException:
            return {"status": part("status.html", board=board, is_gone=True)}, board.now
        except REDIS_ERRORS:  # the board, too, will soon say so
            return {"status": status}, board.now
        html = part("live.html", root=root, prefix=self._prefix, **self._about(name, stored))
        return {"html": html, "status": status}, stored.now

    async def _boards(self) -> AsyncIterator[Board]:
        """The board now, and each time that it has changed."""
        ends = monotonic() + STREAM
        with self._reader.viewer() as viewer:
            board = await self._current()
            while True:
                yield board
                board = await self._next(viewer, board, ends)
                if monotonic() > ends:
                    return

    async def _next(self, viewer: Viewer, board: Board, ends: float) -> Board:
        await asyncio.sleep(REST)
        while self._reader.board is board and monotonic() <= ends:
            await viewer.changed(ends - monotonic())
        return self._reader.board

    # Reading

    async def _current(self) -> Board:
        board = self._reader.board
        if not (board.is_read and self._reader.is_running):
            board = await _in_thread(self._reader.current)
        if not board.error and monotonic() - self._listed[1] > LISTED:
            with contextlib.suppress(*REDIS_ERRORS):  # the board has no thresholds then
                await _in_thread(self._processes_now)
        return board

    async def _read(self, name: str) -> Details:
        """Everything about one breaker. Raises HTTPException if nothing is stored; PolicyError; redis.RedisError or
        OSError."""
        key = keys_of(name, self._prefix).state.encode()
        details = await _in_thread(self._read_now, name, key)
        if details is None:
            raise HTTPException(
                404, f"Redis stores nothing for {name!r}. Is the name right? A breaker that nobody calls expires."
            )
        return details

    def _read_now(self, name: str, key: bytes) -> Details | None:
        server = self._reader.server
        stored = read_one(server, key)
        if stored is None:
            return None
        reply = server.run("snapshot", key, {})
        seen = _protocol.snapshot_from(name, {**reply, "source": "redis"})
        history = _protocol.history_entries(server.history(key, HISTORY))
        row, now = row_of(stored, self._prefix), stored.now_ms / 1000
        return Details(row, seen, history, self._processes_now(), now)

    def _processes_now(self) -> list[Process]:
        """The processes that list themselves, as of at most LISTED seconds ago; none if they may not be read."""
        processes, read_at = self._listed
        if monotonic() - read_at > LISTED:
            try:
                processes = read_processes(self._reader.server, self._prefix)
            except REDIS_ERRORS as error:
                if not concerns_list(error):
                    raise
                processes = []
            self._listed = processes, monotonic()
            self._screens.know(processes)
        return processes

    # Errors

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return self._error(request, error.status_code, error.detail, dict(error.headers or {}))

    async def _fail(self, request: Request, error: Exception) -> Response:
        if isinstance(error, PolicyError):
            return self._error(request, 400, str(error))
        if isinstance(error, (RedisUnavailableError, *REDIS_ERRORS)):
            return self._error(request, 503, f"Redis does not answer, or refuses: {error}")
        return self._error(request, 409, str(error))

    def _error(self, request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        path = request.url.path.removeprefix(_root(request))
        if path.startswith("/api/") or _content_type(request) == JSON:
            return Json({"detail": message}, status, headers)
        response = self._html(request, "error.html", {"message": message, "status": status}, status)
        response.headers.update(headers or {})
        return response


class _Name(Convertor[str]):
    """A breaker's name in an address: any characters, slashes and line ends too."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("breaker", _Name())


def _root(request: Request) -> str:
    """The path under which the application is mounted, without a slash at its end."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def _count(query: Any, name: str, default: int, most: float) -> int:
    """A whole number of the query string. Raises PolicyError."""
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most):
        raise PolicyError(f"{name} must be a whole number of at most {most}, not {text!r}")
    return int(text)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_length(request: Request) -> None:
    """Raise HTTPException for a body that is too long, or of unknown length."""
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and int(length) <= LARGEST_BODY):
        raise HTTPException(413, f"The body must have a length of at most {LARGEST_BODY} bytes.")


async def _nobody_reads(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _json_body(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not JSON.") from None


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in ASSETS:
        raise HTTPException(404, "There is no such file.")
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(_pages.asset(name), media_type=ASSETS[name], headers=headers)
