"""The alert rules and the dashboard in docs/monitoring, read by the programs that they are for."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import prometheus_client
import pytest
import redis
import yaml
from conftest import free_port, wait_until
from test_instrumentation import MONITORING, ONE, expressions, fail

from pybreaker_redis import CircuitBreaker
from pybreaker_redis.instrumentation.prometheus import PrometheusMetrics

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")
STATE = 'circuit_breaker_state{breaker="discovery",state="%s"}'
FALLBACK = 'circuit_breaker_fallback_active{breaker="discovery",job="shop",instance="a:1"}'
ERRORS = 'circuit_breaker_redis_errors_total{kind="timeout",job="shop",instance="a:1"}'
BUCKET = 'circuit_breaker_script_duration_seconds_bucket{script="record",le="%s"}'
# by alert: series as promtool takes them, one value a minute, and the minute at which the alert fires
FIRING: dict[str, tuple[dict[str, str], int]] = {
    "CircuitBreakerOpen": ({STATE % "open": "1x40"}, 2),
    "CircuitBreakerFlapping": (
        {'circuit_breaker_transitions_total{breaker="discovery",from="half_open",to="open"}': "0+1x40"},
        15,
    ),
    "CircuitBreakerStuckHalfOpen": (
        {STATE % "half_open": "1x40", 'circuit_breaker_transitions_total{breaker="discovery",to="open"}': "2x40"},
        25,
    ),
    "CircuitBreakerUnhealthy": (
        {STATE % "closed": "1x40", 'circuit_breaker_health_score{breaker="discovery"}': "50x40"},
        7,
    ),
    "CircuitBreakerProbeSlotsInUse": ({'circuit_breaker_probe_slots_in_use{breaker="discovery"}': "1x40"}, 17),
    "CircuitBreakerFallback": ({FALLBACK: "1x40"}, 4),
    "CircuitBreakerRedisErrors": ({ERRORS: "0+60x40"}, 15),
    "CircuitBreakerScriptsSlow": (
        {BUCKET % "0.1": "0+50x40", BUCKET % "0.25": "0+100x40", BUCKET % "+Inf": "0+100x40"},
        20,
    ),
}
HEALTHY = {
    STATE % "closed": "1x40",
    STATE % "open": "0x40",
    STATE % "half_open": "0x40",
    'circuit_breaker_health_score{breaker="discovery"}': "100x40",
    'circuit_breaker_probe_slots_in_use{breaker="discovery"}': "0x40",
    FALLBACK: "0x40",
    'circuit_breaker_transitions_total{breaker="discovery",to="open"}': "2x40",
    BUCKET % "0.1": "0+100x40",
    BUCKET % "+Inf": "0+100x40",
}


def promtool(folder: pathlib.Path, series: dict[str, str], minute: int, firing: list[str]) -> str:
    """What promtool says if not just these alerts fire after so many minutes of these series."""
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing]
    group = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": expected,
            }
        ],
    }
    file = folder / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(MONITORING / "alerts.yml")], "tests": [group]}))
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@needs_promtool
def test_each_alert_fires_when_it_should(tmp_path: pathlib.Path) -> None:
    """Each has series for which it fires, and it alone; for those of a healthy breaker none does."""
    rules = [
        rule["alert"]
        for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert set(FIRING) == set(rules)
    for name, (series, minute) in FIRING.items():
        assert promtool(tmp_path, series, minute, [name]) == ""
        assert promtool(tmp_path, series, 0, []) == ""
    assert promtool(tmp_path, HEALTHY, 35, []) == ""


class Prometheus:
    """A real one, which scrapes a port and has the alert rules."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as answer:
            found = json.loads(answer.read())
        assert found["status"] == "success"
        return found["data"]

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.get("query", query=expression)["result"]
        return found


@pytest.fixture
def prometheus(tmp_path: pathlib.Path, client: redis.Redis) -> Iterator[Prometheus]:
    registry = prometheus_client.CollectorRegistry()
    metrics = PrometheusMetrics(redis=client, registry=registry)
    breaker = CircuitBreaker("discovery", redis=client, policy=ONE, listeners=[metrics], redis_timeout=20.0)
    http, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)
    port = free_port()
    scrape = {"job_name": "shop", "static_configs": [{"targets": [f"127.0.0.1:{http.server_port}"]}]}
    config = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yml")],
        "scrape_configs": [scrape],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [str(PROMETHEUS), f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        made = Prometheus(port)

        def has_scraped() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                return len(made.query('circuit_breaker_calls_total{outcome="success"}')) == 1
            except OSError:
                return False

        breaker.call(int)
        wait_until(has_scraped, 60)
        fail(breaker)
        metrics._count_error(TimeoutError())  # a series that only an outage begins
        yield made
    finally:
        process.kill()
        process.wait()
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus, of Debian's package of that name")
def test_a_real_prometheus_answers_every_panel(prometheus: Prometheus) -> None:
    """It scrapes a breaker that has tripped; each panel's query then has data, and each rule is healthy."""
    alerts = {rule["name"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    for place, expression in expressions():
        if place not in alerts:
            asked = expression.replace("$__rate_interval", "1m").replace("$breaker", ".*")
            wait_until(lambda asked=asked: prometheus.query(asked))  # a rate needs two scrapes
    wait_until(
        lambda: {rule["health"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]} == {"ok"}
    )


def lost(given: Any, kept: Any, place: str = "dashboard") -> Iterator[str]:
    """What Grafana's model of a dashboard does not have, or has another value for."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{place}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{place}[{number}]")
    elif given != kept:
        yield f"{place}: {given!r} became {kept!r}"


def test_the_dashboard_follows_grafanas_schema() -> None:
    """Every field of it is a field of Grafana's own model, and a misspelt one would not be."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()

    def as_grafana_reads(text: str) -> list[str]:
        given = json.loads(text)
        return list(lost(given, json.loads(JSONEncoder().encode(Dashboard.from_json(given)))))

    text = (MONITORING / "grafana-dashboard.json").read_text()
    assert as_grafana_reads(text) == []
    for field in ("legendFormat", "gridPos", "multi", "refId"):
        assert as_grafana_reads(text.replace(f'"{field}"', f'"{field}s"', 1)), field


def test_panels_do_not_overlap() -> None:
    """Panels fill a grid of 24 columns, and no two have a place in common."""
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads((MONITORING / "grafana-dashboard.json").read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
