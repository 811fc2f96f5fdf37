"""circuitbreaker's own tests, as its sdist has them, run against the module that takes its place."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from pybreaker_redis.embedded import EmbeddedServer

ALL = 63
OPTIONS = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
"""
# stands in for the library, and gives each test an empty server if there is one
PLUGIN = """
import os, sys
import pytest, redis
from pybreaker_redis.compat import circuitbreaker

sys.modules["circuitbreaker"] = circuitbreaker
url, lease = os.environ["REDIS_URL"], float(os.environ["LEASE"])

@pytest.fixture(autouse=True)
def _own_state():
    if url:
        with redis.Redis.from_url(url) as client:
            client.flushall()
            circuitbreaker.configure(client, lease=lease)
            yield
    else:
        yield
"""


@pytest.mark.parametrize("where", ["in memory", "with a lease", "strict"])
def test_its_own_tests(where: str, server: EmbeddedServer, tmp_path: pathlib.Path) -> None:
    """All of them pass, in memory and on the embedded server."""
    if (folder := os.environ.get("CIRCUITBREAKER_TESTS")) is None:
        pytest.skip("`make test-compat` fetches them")
    (tmp_path / "stands_in.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text(OPTIONS)
    options = ("-c", tmp_path / "pytest.ini", "-p", "stands_in", "-p", "no:cacheprovider", "-q")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, pathlib.Path(folder).resolve()],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "REDIS_URL": "" if where == "in memory" else server.url,
            "LEASE": "0.1" if where == "with a lease" else "0",
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(rf"\b{ALL} passed\b", done.stdout), done.stdout
    assert "skipped" not in done.stdout
