"""Servers that keep a journal, and what is checked of it after every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from invariants import JOURNAL, check_histories, check_journal, journal_in

from pybreaker_redis.embedded import EmbeddedServer


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """One server for the tests that do not hurt it."""
    with EmbeddedServer(args=JOURNAL) as started:
        yield started


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server that the test may hurt."""
    with EmbeddedServer(args=JOURNAL) as started:
        yield started


@pytest.fixture(autouse=True)
def _invariants(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: what its servers hold, and all that they ever stored in it, is as tests/invariants.py says."""
    used: list[EmbeddedServer] = [
        request.getfixturevalue(name) for name in ("server", "own_server") if name in request.fixturenames
    ]
    journals = [journal_in(one.directory) for one in used]
    begins = [path.stat().st_size for path in journals]
    yield
    marked = request.node.get_closest_marker("slots")
    slots = marked.args[0] if marked else 1
    for one, path, begin in zip(used, journals, begins, strict=True):
        with redis.Redis.from_url(one.url) as client:
            check_histories(client, slots)
        check_journal(path.read_bytes()[begin:], slots)
