"""Serves the operators' page (extra `web`)."""

from __future__ import annotations

import importlib
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from .._board import clean
from .._extras import MissingExtraError, needs_extra
from ._output import err

PASSWORD = "PYBREAKER_REDIS_WEB_PASSWORD"


def serve(
    client: Any,
    prefix: str,
    host: str,
    port: int,
    *,
    write: bool,
    authorize: str | None,
    names: Sequence[str],
    health: bool,
    root: str,
) -> None:
    """Serve the page until Ctrl-C.

    authorize: "module:function", or None. names: further names of this server. root: the path that a proxy strips.
    """
    _check_extra()
    asks = _authorizer(authorize)
    if write and asks is None:
        remedy = f"name a function with --authorize module:function, or set a password in {PASSWORD}"
        raise typer.BadParameter(f"needs to know who acts: {remedy}", param_hint="--write")
    _check_names(names)
    if not re.fullmatch(r"(/[\w.~-]+)*/?", root, re.ASCII):
        raise typer.BadParameter(f"must be a path such as /breakers, not {root!r}", param_hint="--root-path")
    listener = _listener(host, port)
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    if asks is None and not is_local:
        err.print(f"everybody who can reach {clean(host)} can read this page", style="yellow")
    hosts = [host, *names] if is_local or names else []
    _run(_application(client, prefix, not write, asks, health, hosts), listener, root.rstrip("/"))


def _application(client: Any, prefix: str, read_only: bool, authorize: Any, health: bool, hosts: Sequence[str]) -> Any:
    """The page. With `hosts`, it answers only to these and loopback names: no other site can pretend to be it."""
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from ..web import breakers_app

    app = breakers_app(client, prefix=prefix, read_only=read_only, authorize=authorize, health=health)
    return TrustedHostMiddleware(app, ["localhost", "127.0.0.1", "::1", "[::1]", *hosts]) if hosts else app


def _run(app: Any, listener: socket.socket, root: str) -> None:
    import uvicorn

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    err.print(f"serving http://{shown}:{port}/ until Ctrl-C")
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, root_path=root)
    uvicorn.Server(config).run(sockets=[listener])


def _check_extra() -> None:
    """Raise a usage error if the extra is missing. It also brings the server, which the page alone does not need."""
    try:
        importlib.import_module("pybreaker_redis.web")
        with needs_extra("a server for the operators' page", "web"):
            importlib.import_module("uvicorn")
    except MissingExtraError as error:
        raise typer.BadParameter(str(error)) from error


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not re.fullmatch(r"(\*\.)?[\w.-]+", name):
            remedy = 'write a name without a port, as in ops.example, or "*.example" for all names that end so'
            raise typer.BadParameter(f"{name!r} is not a host name: {remedy}", param_hint="--allow-host")


def _authorizer(name: str | None) -> Any:
    if name is not None:
        return _imported(name)
    if password := os.environ.get(PASSWORD):
        from ..web._access import Password

        return Password(password)
    return None


def _imported(name: str) -> Callable[..., Any]:
    """The function called "module:function"; modules of the working directory count, too."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise typer.BadParameter(f"must be module:function, not {name!r}", param_hint="--authorize")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(str(error), param_hint="--authorize") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise typer.BadParameter(f"{name} cannot be called", param_hint="--authorize")
    return found  # type: ignore[no-any-return]


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise typer.BadParameter(f"{host}:{port} cannot be used: {error}", param_hint="--host, --port") from error
