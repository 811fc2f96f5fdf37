"""Who may see the page, who may act, and what browsers may do with it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import inspect
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._errors import PolicyError
from .._protocol import LONGEST_OPERATOR

logger = logging.getLogger("pybreaker_redis")

Authorize: TypeAlias = Callable[[Request], "str | Awaitable[str | None] | None"]

COOKIE = "pybreaker_redis_csrf"
TOKEN_FIELD = "csrf_token"
TOKEN_HEADER = "X-CSRF-Token"
SLOWEST_ANSWER = 0.5  # seconds by which a refused password is answered late
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with "no-referrer", browsers send no usable Origin
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class SafeHeaders:
    """Adds to each response what browsers may do with it. Pages are not kept in caches."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_safely)


async def operator_of(request: Request, authorize: Authorize | None) -> str | None:
    """The name of the operator; None without `authorize`.

    Raises HTTPException for a stranger, for an `authorize` that fails, and for a name that no history could keep. What
    is wrong with `authorize` is logged: a stranger must not read it.
    """
    if authorize is None:
        return None
    try:
        name = await _asked(authorize, request)
    except HTTPException:  # its own answer
        raise
    except Exception as error:
        logger.exception("authorize failed")
        raise HTTPException(500, "Your sign-in cannot be checked now; the log of the web server says why.") from error
    if name is None:
        challenge = getattr(authorize, "challenge", None)
        if challenge is None:
            raise HTTPException(403, "You may not see this page.")
        raise HTTPException(401, "This page asks for a name and a password.", {"WWW-Authenticate": challenge})
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_OPERATOR:
        wanted = f"a name of 1 to {LONGEST_OPERATOR} characters"
        logger.error("authorize must return %s or None, not %.200r", wanted, name)
        raise HTTPException(500, f"The sign-in must give {wanted}; the log of the web server says more.")
    return name


async def _asked(authorize: Authorize, request: Request) -> Any:
    if inspect.iscoroutinefunction(authorize) or inspect.iscoroutinefunction(getattr(authorize, "__call__", None)):  # noqa: B004
        return await authorize(request)  # type: ignore[misc]
    name = await run_in_threadpool(authorize, request)  # it may ask a database
    return await name if inspect.isawaitable(name) else name


class Password:
    """An `authorize` that asks for one password (HTTP Basic). The user name is the operator's name.

    challenge: the value of WWW-Authenticate, by which a browser knows what to ask for.
    """

    challenge = 'Basic realm="pybreaker-redis", charset="UTF-8"'

    def __init__(self, password: str) -> None:
        if not password:
            raise PolicyError("the password must not be empty")
        self._password = password.encode(errors="surrogateescape")  # the environment may hold any bytes

    async def __call__(self, request: Request) -> str | None:
        """The user name, if the password is right; else None, after a moment, which slows down guessing."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            encoded, _, password = base64.b64decode(given, validate=True).partition(b":")
            name = encoded.decode()
        except (binascii.Error, UnicodeDecodeError):
            return None
        if name and hmac.compare_digest(password, self._password):
            return name
        await asyncio.sleep(SLOWEST_ANSWER)
        return None


# Cross-site requests


def token_of(request: Request) -> str:
    """The token that a form of this page must send back: that of the browser's cookie, or a new one."""
    return request.cookies.get(COOKIE) or secrets.token_urlsafe(32)


def keep_token(request: Request, response: Response, token: str) -> None:
    """Give the browser the token in a cookie. Only this page's own requests carry it."""
    if request.cookies.get(COOKIE) != token:
        path = request.scope.get("root_path") or "/"
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, token, path=path, secure=secure, httponly=True, samesite="strict")


def check_origin(request: Request) -> None:
    """Raise HTTPException unless a write comes from this page itself, or from a program."""
    site = request.headers.get("sec-fetch-site")
    if site not in (None, "same-origin"):
        raise HTTPException(403, f"A request from another site is refused (Sec-Fetch-Site: {site}).")
    origin = request.headers.get("origin")
    if site is None and origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "A request from another site is refused (Origin).")


def check_token(request: Request, given: str | None) -> None:
    """Raise HTTPException unless a write carries the token of the cookie."""
    kept = request.cookies.get(COOKIE)
    if not kept or not given or not hmac.compare_digest(kept.encode(), given.encode()):
        raise HTTPException(403, "The form is too old, or was not made by this page. Open the breaker again.")
