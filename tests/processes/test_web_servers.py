"""Web servers that load the application before they fork: gunicorn with Python's hooks, uWSGI without them."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import programs
import pytest
import redis
from conftest import free_port, wait_until

from pybreaker_redis import CircuitBreaker, Policy
from pybreaker_redis.embedded import EmbeddedServer

WORKERS = 3
GUNICORN = ["--preload", "--workers", str(WORKERS), "--chdir", str(programs.HERE), "--graceful-timeout", "5"]
UWSGI = ["--master", "--processes", str(WORKERS), "--need-app", "--die-on-term", "--disable-logging", "--chdir"]
UWSGI += [str(programs.HERE), "--module", "wsgi_app", "--worker-reload-mercy", "5", "--http-socket"]


def gunicorn(*options: str) -> Callable[[int], list[str]]:
    """The command that starts gunicorn on a port."""
    start = [sys.executable, "-m", "gunicorn", *GUNICORN, *options]
    return lambda port: [*start, "--bind", f"127.0.0.1:{port}", "wsgi_app:application"]


def uwsgi(*options: str) -> Callable[[int], list[str]]:
    """The command that starts uWSGI on a port."""
    start = [sys.executable, "-c", "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])", *UWSGI]
    return lambda port: [*start, f"127.0.0.1:{port}", *options]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} has no wheel for this Python")


SERVERS = [
    pytest.param(gunicorn("--worker-class", "sync"), id="gunicorn-sync", marks=needs("gunicorn")),
    pytest.param(gunicorn("--threads", "4"), id="gunicorn-gthread", marks=needs("gunicorn")),
]
UWSGIS = {
    "plain": [],
    "threads": ["--enable-threads"],
    "many-threads": ["--enable-threads", "--threads", "4"],
    "lazy": ["--lazy-apps"],
    "lazy-threads": ["--lazy-apps", "--enable-threads"],
    "hooks": ["--py-call-uwsgi-fork-hooks"],
}
SERVERS += [
    pytest.param(uwsgi(*options), id=f"uwsgi-{name}", marks=[needs("pyuwsgi"), pytest.mark.long])
    for name, options in UWSGIS.items()
]


class Web:
    """A web server that runs wsgi_app in several workers."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
        self.port, self.process, self.log = port, process, log

    def get(self, path: str) -> dict[str, Any]:
        """The answer to one request. Fails if a worker does not answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except OSError as error:
            raise AssertionError(f"{path}: {error!r}\n{self.log.read_text()[-3000:]}") from error
        finally:
            connection.close()
        assert response.status == 200, self.log.read_text()[-3000:]
        answer: dict[str, Any] = json.loads(body)
        return answer

    def from_each_worker(self, path: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[int, dict[str, Any]]:
        """Requests until each worker has given an answer that is wanted; the first such answer, by process."""
        answers: dict[int, dict[str, Any]] = {}
        lock = threading.Lock()

        def ask() -> None:
            deadline = time.monotonic() + 30
            while len(answers) < WORKERS and time.monotonic() < deadline:
                answer = self.get(path)
                with lock:
                    if wanted(answer):
                        answers.setdefault(answer["pid"], answer)

        run_all([ask] * (2 * WORKERS))
        assert len(answers) == WORKERS, f"only {len(answers)} of {WORKERS} workers\n{self.log.read_text()[-3000:]}"
        return answers


def run_all(jobs: Sequence[Callable[[], object]]) -> None:
    """Run these at the same time; raises the first error of any."""
    errors: list[BaseException] = []

    def body(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads), "a worker hangs"
    if errors:
        raise errors[0]


@contextlib.contextmanager
def started(command: Callable[[int], list[str]], server: EmbeddedServer, folder: pathlib.Path) -> Iterator[Web]:
    """A web server for a `with` block. Fails if it does not start, or does not end when it is told to."""
    port, log = free_port(), folder / "web.log"
    with log.open("wb") as output:
        environment = programs.environment(URL=server.url)
        process = subprocess.Popen(
            command(port), env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    web = Web(port, process, log)
    try:
        wait_until(lambda: listens(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-3000:]
        yield web
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            kill_family(process)


def listens(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.connect()
    except OSError:
        return False
    else:
        return True
    finally:
        connection.close()


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """End a master that does not end by itself, and its workers, each by its id."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    process.kill()
    process.wait(10)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def counted(client: redis.Redis) -> None:
    """Breaker n has n + 1 failures in a row."""
    for number in range(5):
        breaker = CircuitBreaker(f"service-{number}", redis=client, policy=Policy(failure_threshold=10**6), lease=0)
        for _ in range(number + 1):
            with pytest.raises(ValueError, match="x"):
                breaker.call(int, "x")


@pytest.mark.parametrize("command", SERVERS)
def test_loading_the_application_starts_nothing(
    server: EmbeddedServer, client: redis.Redis, tmp_path: pathlib.Path, command: Callable[[int], list[str]]
) -> None:
    """Managers and breakers are made, and watch, without a thread or a socket."""
    with started(command, server, tmp_path) as web:
        answers = web.from_each_worker("/call/trips", lambda answer: True)
        assert [answer["at_import"] for answer in answers.values()] == [{"threads": [], "sockets": []}] * WORKERS


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", SERVERS)
def test_workers(
    server: EmbeddedServer,
    client: redis.Redis,
    counted: None,
    tmp_path: pathlib.Path,
    command: Callable[[int], list[str]],
) -> None:
    """Four starts: workers answer, are instances of their own, share trips, and end."""
    for start in range(4):
        client.delete("circuit_breaker:trips:state")
        with started(command, server, tmp_path) as web:
            wrong: list[Any] = []

            def ask(number: int, web: Web = web, wrong: list[Any] = wrong) -> None:
                for _ in range(10):
                    answer = web.get(f"/snapshot/service-{number}")
                    found = answer["name"], answer["failures"], answer["source"]
                    if found != (f"service-{number}", number + 1, "redis"):
                        wrong.append(answer)

            run_all([lambda number=number: ask(number) for number in range(5)])
            assert wrong == []
            first = web.from_each_worker("/call/trips", lambda answer: True)
            assert len({answer["instance"] for answer in first.values()}) == WORKERS
            web.from_each_worker("/call/trips", lambda answer: answer["watches"])

            while web.get("/fail/trips")["admitted"]:  # by any of the workers
                pass
            rejected = web.from_each_worker("/call/trips", lambda answer: not answer["admitted"])
            for _ in range(20):
                assert not web.get("/call/trips")["admitted"]
            assert [answer["outages"] for answer in rejected.values()] == [[]] * WORKERS
        assert start == 0 or client.exists("circuit_breaker:trips:state")
