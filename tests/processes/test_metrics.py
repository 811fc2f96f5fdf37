"""prometheus_client's multi-process mode: every scrape has the counts of all processes, the dead ones too."""

from __future__ import annotations

import http.client
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import programs
import pytest
import redis
from conftest import free_port, wait_until
from test_docs import ROOT, blocks
from test_web_servers import needs, run_all

from pybreaker_redis.embedded import EmbeddedServer

WORKERS = 4
SERVICE = """
import os, time

def search(query):
    time.sleep(0.02)  # so that other workers get requests, too
    if query == "fails":
        raise RuntimeError("the service is down")
    return str(os.getpid())
"""
CALLED, SUCCESS = "circuit_breaker_calls_total", 'breaker="discovery",outcome="success"'


class Web:
    """The application of the page on monitoring, under Gunicorn."""

    def __init__(self, port: int, files: pathlib.Path) -> None:
        self._port, self.files = port, files

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def samples(self) -> dict[str, float]:
        """One scrape: value by name and labels."""
        status, text = self.get("/metrics")
        assert status == 200
        return samples_of(text)

    def value(self, name: str, labels: str) -> float | None:
        return self.samples().get(f"{name}{{{labels}}}")


def samples_of(text: str) -> dict[str, float]:
    found = re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)
    assert len(dict(found)) == len(found), "a series is exported twice"
    return {name: float(value) for name, value in found}


def page_blocks() -> dict[str, str]:
    """The blocks of the page that are files, by their names."""
    texts = [block.text for block in blocks(ROOT / "docs" / "how-to" / "monitoring.md")]
    return {text.split()[1]: text for text in texts if re.match(r"# \S+\.py\n", text)}


@pytest.fixture(params=[(), ("--preload",)], ids=["plain", "preload"])
def web(request: pytest.FixtureRequest, tmp_path: pathlib.Path, server: EmbeddedServer) -> Iterator[Web]:
    port, files = free_port(), tmp_path / "files"
    files.mkdir()
    for name, text in page_blocks().items():
        (tmp_path / name).write_text(text.replace("redis://localhost:6379", server.url))
    (tmp_path / "discovery.py").write_text(SERVICE)
    (tmp_path / "app.py").write_text("import discovery\n" + (tmp_path / "app.py").read_text())
    command = [sys.executable, "-m", "gunicorn", f"--workers={WORKERS}", f"--bind=127.0.0.1:{port}", *request.param]
    process = subprocess.Popen(
        [*command, "--log-level=error", "app:application"],
        cwd=tmp_path,
        env=programs.environment(PROMETHEUS_MULTIPROC_DIR=str(files)),
        start_new_session=True,
    )
    made = Web(port, files)

    def serves() -> bool:
        assert process.poll() is None
        try:
            return made.get("/metrics")[0] == 200
        except OSError:
            return False

    try:
        wait_until(serves, 60)
        yield made
        process.terminate()
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def many(web: Web, count: int, path: str = "/?x") -> list[tuple[int, str]]:
    """So many requests, by several clients at once."""
    answers: list[tuple[int, str]] = []
    lock = threading.Lock()

    def ask() -> None:
        for _ in range(count // 8):
            answer = web.get(path)
            with lock:
                answers.append(answer)

    run_all([ask] * 8)
    return answers


@needs("gunicorn")
def test_every_scrape_has_the_calls_of_all_workers(web: Web, client: redis.Redis) -> None:
    """40 calls are 40, whichever worker is scraped; a trip is one transition; the state is the fleet's."""
    pids = {body for status, body in many(web, 40)}
    assert len(pids) > 1
    wait_until(lambda: web.value(CALLED, SUCCESS) == 40)
    assert {web.value(CALLED, SUCCESS) for _ in range(4 * WORKERS)} == {40}
    assert web.value("circuit_breaker_state", 'breaker="discovery",state="closed"') == 1

    answers = [web.get("/?fails") for _ in range(30)]
    rejected = sum(status == 503 for status, _ in answers)
    failed = len(answers) - rejected
    assert failed >= 5
    assert rejected > 0
    ended = 'breaker="discovery",outcome="{}"'.format
    wait_until(lambda: web.value(CALLED, ended("rejected")) == rejected)
    wait_until(lambda: web.value(CALLED, ended("failure")) == failed)
    for _ in range(WORKERS):
        found = web.samples()
        assert sum(value for name, value in found.items() if name.startswith("circuit_breaker_transitions_total")) == 1
        assert found['circuit_breaker_state{breaker="discovery",state="open"}'] == 1
        assert found['circuit_breaker_health_score{breaker="discovery"}'] == 0
        assert found['circuit_breaker_fallback_active{breaker="discovery"}'] == 0
        assert found['circuit_breaker_shadow_rejections_total{breaker="discovery"}'] == 0
        assert found['circuit_breaker_script_duration_seconds_count{script="record"}'] > 0


@needs("gunicorn")
def test_a_dead_workers_calls_stay(web: Web, client: redis.Redis) -> None:
    """A worker is killed, and replaced: its counts stay in every scrape, its gauges go."""
    pids = {int(body) for _, body in many(web, 40)}
    wait_until(lambda: web.value(CALLED, SUCCESS) == 40)
    victim = pids.pop()
    gauges = web.files / f"gauge_livemax_{victim}.db"
    assert gauges.exists()
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not gauges.exists())
    assert {web.value(CALLED, SUCCESS) for _ in range(2 * WORKERS)} == {40}
    many(web, 16)
    wait_until(lambda: web.value(CALLED, SUCCESS) == 56)


JOBS = """
import asyncio, billiard, multiprocessing, sys, time
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pybreaker_redis import AsyncCircuitBreaker, CircuitBreaker
from pybreaker_redis.instrumentation.prometheus import PrometheusMetrics

job, url = sys.argv[1:]
metrics = PrometheusMetrics(registry=None)
options = {"lease": 0} if job == "strict" else {"lease": 3600} if job == "long lease" else {}
redis = None if job == "memory" else url
breaker = CircuitBreaker("discovery", redis=redis, listeners=[metrics], redis_timeout=20.0, **options)
waiting = AsyncCircuitBreaker("discovery", redis=url, listeners=[metrics], redis_timeout=20.0)

async def asynchronous():
    async def fine():
        pass
    for _ in range(10):
        await waiting.call(fine)

def work():
    if job == "asyncio":
        return asyncio.run(asynchronous())
    for _ in range(10):
        breaker.call(int)

def files():
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry).decode()

def wait_for(count):
    while f'outcome="success"}} {count}' not in files():
        time.sleep(0.02)

if __name__ == "__main__":
    work()
    wait_for("10.0")  # in the background
    for _ in range(10):
        breaker.call(int)  # whatever the lease: without a word to Redis, even
    wait_for("20.0")
    package = billiard if job == "billiard" else multiprocessing  # billiard: what Celery's workers are forked by
    pool = package.get_context("fork").Pool(3)
    for done in [pool.apply_async(work) for _ in range(3)]:
        done.get(60)
    pool.close()  # its workers end by themselves
    pool.join()
    breaker.call(int)
"""


@pytest.mark.parametrize("job", ["threads", "strict", "long lease", "memory", "asyncio", "billiard"])
def test_forks_and_ends(server: EmbeddedServer, client: redis.Redis, tmp_path: pathlib.Path, job: str) -> None:
    """A child counts from zero, into files of its own; what was counted last is written at the end of a process."""
    command = [sys.executable, "-c", JOBS, job, server.url]
    environment = programs.environment(PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    read = "import sys; from prometheus_client import *; from prometheus_client.multiprocess import *\n"
    read += "made = CollectorRegistry(); MultiProcessCollector(made); print(generate_latest(made).decode())"
    text = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
    assert samples_of(text.stdout)[f"{CALLED}{{{SUCCESS}}}"] == 10 + 10 + 3 * 10 + 1
    assert len(list(tmp_path.glob("counter_*.db"))) > 1
