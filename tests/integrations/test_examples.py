"""The examples of whole applications: real web servers, a real worker, and a service that fails for a while."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent.parent / "examples"


def run(name: str) -> list[str]:
    """The lines that an example prints."""
    environment = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
    command = [sys.executable, "-m", name]
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_fastapi_httpx() -> None:
    """Two instances share the circuit: the service gets five requests or one more, and both answer 503."""
    up, down, rejection, both, again = run("fastapi_httpx")
    assert up == "search is up: {200: 20}; the service got 20 of 20 requests"
    found = re.fullmatch(r"search is down: \{502: (\d+), 503: (\d+)\}; the service got (\d+) of 20 requests", down)
    assert found, down
    failed, rejected, asked = map(int, found.groups())
    assert failed == asked
    assert failed + rejected == 20
    assert failed in (5, 6)
    assert re.fullmatch(r"a rejection: 503, Retry-After: [12]", rejection)
    assert both == 'both instances: {"search":"open"} {"search":"open"}'
    assert again == "search is up again: {200: 20}; the service got 20 of 20 requests"


@pytest.mark.timeout(150)
def test_django_celery() -> None:
    """Views answer 503, tasks wait; in the end each order is paid once, and the service had few requests."""
    up, down, accepted, again, asked = run("django_celery")
    assert up == "payments is up: a view answers 200 and a task is done"
    found = re.fullmatch(r"payments is down: 20 views answer \{502: (\d), 503: (\d+)\}", down)
    assert found, down
    assert int(found[1]) + int(found[2]) == 20
    assert 3 <= int(found[1]) <= 5
    assert accepted == f"6 orders are accepted meanwhile: {[202] * 6}"
    assert again == "payments is up again: 6 of 6 orders are paid"
    assert re.fullmatch(r"payments got \d requests while it was down", asked)
