"""What the import of a module says if its extra is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

# By extra of pyproject.toml: the packages that modules of this library import, and that only the extra installs.
EXTRAS: Final = {
    "aiohttp": ("aiohttp",),
    "celery": ("celery",),
    "cli": ("rich", "typer"),
    "config": ("pydantic", "pydantic_settings", "yaml"),
    "django": ("django",),
    "flask": ("flask",),
    "grpc": ("grpc",),
    "httpx": ("httpx",),
    "httpx2": ("httpx2",),
    "otel": ("opentelemetry",),
    "prometheus": ("prometheus_client",),
    "requests": ("requests",),
    "starlette": ("starlette",),
    "tenacity": ("tenacity",),
    "web": ("anyio", "jinja2", "python_multipart", "sse_starlette", "starlette", "uvicorn"),
}


class MissingExtraError(ModuleNotFoundError):
    """A package of an extra is not installed. name: the package."""


@contextlib.contextmanager
def needs_extra(subject: str, extra: str) -> Iterator[None]:
    """For a block that imports the packages of an extra: says what to install if one is missing.

    subject: what cannot be used without them. Any other error of an import stays as it is: what is installed may be
    broken, and then the extra would not help. Raises MissingExtraError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS[extra]:
            raise
        message = f"{subject} needs an extra: pip install 'pybreaker_redis[{extra}]' ({error})"
        raise MissingExtraError(message, name=error.name) from error
