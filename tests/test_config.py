"""A configuration from files, dicts and the environment: what is taken, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from pybreaker_redis import CircuitBreaker, CircuitBreakerError, CircuitBreakerManager, ConfigError, Policy

pytest.importorskip("pydantic_settings", reason="needs the extra config")
from pybreaker_redis.config import load

GATEWAY = """
circuit_breaker:
  enabled: true
  services:
    discovery: {failure_threshold: 20, timeout_seconds: 3, error_rate_threshold: 0.5}
redis:
  url: "redis://localhost:6379"
  pool_size: 10
"""
GATEWAY_TOML = """
[circuit_breaker]
enabled = true
[circuit_breaker.services.discovery]
failure_threshold = 20
timeout_seconds = 3
error_rate_threshold = 0.5
[redis]
url = "redis://localhost:6379"
pool_size = 10
"""
DISCOVERY = Policy(failure_threshold=20, reset_timeout=3, error_rate_threshold=0.5)
EVERY_FIELD: dict[str, Any] = {
    "failure_threshold": 7,
    "reset_timeout": 1.5,
    "success_threshold": 2,
    "half_open_max_calls": 3,
    "probe_timeout": 4.0,
    "error_rate_threshold": 0.25,
    "minimum_calls": 5,
    "window": 6.0,
    "slow_call_duration": 0.7,
    "slow_call_rate_threshold": 0.8,
    "backoff_multiplier": 2.0,
    "max_reset_timeout": 9.0,
    "jitter": 0.1,
    "failures_in_window": 12,
    "probe_failure_threshold": 2,
    "max_hold": 13.0,
    "quorum": 2,
    "ttl": 60.0,
    "ramp_up": 11.0,
    "enforce": False,
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.delenv("CIRCUIT_BREAKER_ENABLED", raising=False)


def refused(source: Any) -> str:
    """With which words a source is refused."""
    with pytest.raises(ConfigError) as error:
        load(source)
    assert isinstance(error.value, CircuitBreakerError)
    return str(error.value)


def services(**fields: Any) -> dict[str, Any]:
    """A configuration of one service."""
    return {"circuit_breaker": {"services": {"discovery": fields}}}


@pytest.mark.parametrize(
    ("name", "text"), [("g.yaml", GATEWAY), ("g.yml", GATEWAY), ("g.toml", GATEWAY_TOML), ("g.json", None)]
)
def test_files(name: str, text: str | None, tmp_path: pathlib.Path) -> None:
    """The same configuration in each format, by a path or its name."""
    path = tmp_path / name
    path.write_text(text or json.dumps({"circuit_breaker": {"services": {"discovery": dataclasses.asdict(DISCOVERY)}}}))
    for source in (path, str(path)):
        config = load(source)
        assert config.services == {"discovery": DISCOVERY}
        assert config.redis_url == "redis://localhost:6379"
        assert config.redis_options == ({"max_connections": 10} if text else {})
        assert config.enabled


def test_nothing_given(tmp_path: pathlib.Path) -> None:
    """No source, an empty dict and an empty file are the defaults: ten failures, two seconds, half of the calls."""
    (tmp_path / "empty.yaml").write_text("")
    for source in (None, {}, tmp_path / "empty.yaml"):
        config = load(source)
        assert config.policy_of("any") == Policy(failure_threshold=10, reset_timeout=2, error_rate_threshold=0.5)
        assert (config.enabled, config.services) == (True, {})


def test_every_policy_field() -> None:
    """Every field of Policy is taken for a service and as a default."""
    assert set(EVERY_FIELD) == {field.name for field in dataclasses.fields(Policy)}
    assert load(services(**EVERY_FIELD)).policy_of("discovery") == Policy(**EVERY_FIELD)
    assert load({"circuit_breaker": {"defaults": EVERY_FIELD}}).policy_of("any") == Policy(**EVERY_FIELD)


def test_defaults_are_under_each_service() -> None:
    """A service goes by the defaults for what it does not say itself; null takes a rule away."""
    given = {"defaults": {"timeout_seconds": 5, "quorum": 3}, "services": {"a": {"quorum": 2}, "b": {}}}
    given["services"]["c"] = {"error_rate_threshold": None}
    config = load({"circuit_breaker": given})
    assert (config.policy_of("a").quorum, config.policy_of("a").reset_timeout) == (2, 5)
    assert config.policy_of("b") == config.policy_of("not listed") == config.defaults
    assert config.policy_of("c").error_rate_threshold is None


def test_environment_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """REDIS_URL and CIRCUIT_BREAKER_ENABLED overrule the file; nothing else in the environment does."""
    (tmp_path / "g.yaml").write_text(GATEWAY)
    monkeypatch.setenv("REDIS_URL", "unix:///run/r.sock")
    monkeypatch.setenv("CIRCUIT_BREAKER_ENABLED", "off")
    for name in ("REDIS_PORT", "REDIS_POOL_SIZE", "CIRCUIT_BREAKER_LEASE", "CIRCUIT_BREAKER_SERVICES", "REDIS"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:6379")
    config = load(tmp_path / "g.yaml")
    assert (config.redis_url, config.enabled) == ("unix:///run/r.sock", False)
    assert (config.redis_options, config.lease) == ({"max_connections": 10}, 0.1)
    assert load().redis_url == "unix:///run/r.sock"
    monkeypatch.setenv("REDIS_URL", "")
    assert load(tmp_path / "g.yaml").redis_url == "redis://localhost:6379"


def test_a_bad_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """A bad value of a variable is reported with the name of the variable, not of the file."""
    (tmp_path / "g.yaml").write_text(GATEWAY)
    monkeypatch.setenv("CIRCUIT_BREAKER_ENABLED", "perhaps")
    monkeypatch.setenv("REDIS_URL", "http://user:secret@h")
    message = refused(tmp_path / "g.yaml").splitlines()
    assert [line.partition(": ")[0] for line in message] == [
        "CIRCUIT_BREAKER_ENABLED in the environment",
        "REDIS_URL in the environment",
    ]
    assert "secret" not in "".join(message)


@pytest.mark.parametrize(
    ("source", "path", "reason"),
    [
        (services(failure_treshold=3), "services.discovery.failure_treshold", "did you mean failure_threshold?"),
        (
            services(failure_threshold=0),
            "services.discovery.failure_threshold",
            "an integer from 1 to 1000000000, not 0",
        ),
        (services(failure_threshold="5"), "services.discovery.failure_threshold", "not '5'"),
        (services(timeout_seconds="3s"), "services.discovery.timeout_seconds", "a number of seconds"),
        (services(timeout_seconds=1, reset_timeout=1), "services.discovery.timeout_seconds", "given too"),
        (services(slow_call_rate_threshold=0.5), "services.discovery", "needs slow_call_duration"),
        ({"circuit_breaker": {"services": {"a": 3}}}, "services.a", "must be a map"),
        ({"circuit_breaker": {"services": []}}, "services", "valid dictionary"),
        ({"circuit_breaker": {"services": {"{a}": {}}}}, "circuit_breaker", "braces"),
        ({"circuit_breaker": {"defaults": {"quorum": 1.5}}}, "defaults.quorum", "an integer"),
        ({"circuit_breaker": {"enabled": "perhaps"}}, "circuit_breaker.enabled", "boolean"),
        ({"circuit_breaker": {"encoding": "json"}}, "circuit_breaker.encoding", "unknown field"),
        ({"circuit_breaker": {"leese": 1}}, "circuit_breaker.leese", "did you mean lease?"),
        ({"circuit_breaker": {"lease": -1}}, "circuit_breaker", "lease must be"),
        ({"circuit_breaker": {"on_redis_failure": "x"}}, "circuit_breaker.on_redis_failure", "'local', 'open'"),
        ({"redis": {"pool_size": 0}}, "redis.pool_size", "greater than or equal to 1"),
        ({"redis": {"url": "localhost:6379"}}, "redis.url", "must begin with one of redis://"),
        ({"circuitbreaker": {}}, "circuitbreaker", "did you mean circuit_breaker?"),
    ],
)
def test_refused(source: dict[str, Any], path: str, reason: str, tmp_path: pathlib.Path) -> None:
    """What makes no sense is refused with the file, the path in it and the reason, from a dict and from a file."""
    file = tmp_path / "gateway.json"
    file.write_text(json.dumps(source))
    for message, where in ((refused(source), "the configuration"), (refused(file), str(file))):
        assert message.startswith(f"{where}: ")
        assert f"{path}: " in message
        assert reason in message


def test_every_problem_is_reported_at_once() -> None:
    """All problems are reported in one go, a line each."""
    message = refused({**services(quorum=0, jitter=2, x=1), "redis": {"pool_size": 0}})
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("missing.yaml", None, "No such file"),
        ("broken.yaml", "circuit_breaker: {", "line 1"),
        ("broken.toml", "[redis\n", "line 1"),
        ("binary.yaml", b"\xff\xfe\x00", "decode"),
        ("list.yaml", "- 1", "must be a map"),
        ("gateway.ini", "", "must end in .yaml"),
    ],
)
def test_files_that_are_none(name: str, text: str | bytes | None, reason: str, tmp_path: pathlib.Path) -> None:
    """A file that is not there, not whole or not of a known kind is refused by name."""
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_a_password_is_not_shown() -> None:
    """Neither repr() nor an error shows the password of the configuration."""
    config = load({"redis": {"url": "redis://h", "password": "secret", "username": "me"}})
    assert config.redis_options == {"password": "secret", "username": "me"}
    assert "secret" not in repr(config)


def test_breaker_options_arrive() -> None:
    """The options of every breaker may stand in the configuration too."""
    config = load({"circuit_breaker": {"lease": 1, "prefix": "cb", "watch": False, "host": "web-1"}})
    assert (config.lease, config.prefix, config.watch, config.host) == (1.0, "cb", False, "web-1")
    assert CircuitBreakerManager(config).get_or_create("x").host == "web-1"
    assert CircuitBreaker("x", prefix=config.prefix).keys.state == "cb:x:state"
    assert load({}).watch is True
    for wrong in (None, 30, "long"):
        with pytest.raises(ConfigError, match="watch"):
            load({"circuit_breaker": {"watch": wrong}})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(10))}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BOMB + "circuit_breaker: {services: *i}", id="aliases"),
        pytest.param("circuit_breaker: " + "[" * 1000 + "]" * 1000, id="levels"),
        pytest.param("circuit_breaker: &a {services: *a}", id="itself"),
    ],
)
def test_files_that_are_larger_than_they_look(tmp_path: pathlib.Path, text: str) -> None:
    """They are refused at once, with the file's name."""
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bomb\.yaml"):
        load(path)


def test_aliases_that_save_lines_are_welcome(tmp_path: pathlib.Path) -> None:
    """As people use them for services that are alike."""
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "circuit_breaker: {services: {a: &usual {failure_threshold: 3}, b: *usual, c: {<<: *usual, window: 10}}}"
    )
    services = load(path).services
    assert [services[name].failure_threshold for name in "abc"] == [3, 3, 3]
    assert services["c"].window == 10
