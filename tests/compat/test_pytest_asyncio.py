"""A fixture of pytest-asyncio that is a guarded generator. That plugin is only in the environment of these tests."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap

TESTS = """
    import pytest_asyncio
    from pybreaker_redis import AsyncCircuitBreaker

    breaker = AsyncCircuitBreaker("database")
    ended = []

    @pytest_asyncio.fixture
    @breaker
    async def connection():
        yield "open"
        ended.append("closed")

    async def test_it_is_open(connection):
        assert connection == "open"

    def test_it_counts_once():
        assert ended == ["closed"]
        assert (breaker.counts.successes, breaker.counts.failures) == (1, 0)
"""


def test_a_guarded_fixture(tmp_path: pathlib.Path) -> None:
    """It stays an async generator: the test gets what it yields, and its end is the end of one call."""
    (tmp_path / "test_shop.py").write_text(textwrap.dedent(TESTS))
    options = ["-q", "-c", "/dev/null", "--rootdir", str(tmp_path), "-o", "asyncio_mode=auto", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
