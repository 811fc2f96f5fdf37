"""TEMPORARY, replaced at merge."""

from __future__ import annotations
import functools, hashlib, importlib.resources, pathlib
from typing import Any

SCRIPTS = ("acquire", "record", "control", "snapshot")


def folder() -> Any:
    packaged = importlib.resources.files("pybreaker_redis") / "lua"
    return packaged if packaged.is_dir() else pathlib.Path(__file__).parent.parent.parent / "lua"


@functools.cache
def compose(name: str) -> str:
    return "".join((folder() / f"{part}.lua").read_text(encoding="utf-8") for part in ("breaker", name)).replace(
        "clear_override", "clear_forced"
    )


@functools.cache
def sha1(name: str) -> str:
    return hashlib.sha1(compose(name).encode(), usedforsecurity=False).hexdigest()
