"""A manager's configuration from YAML, TOML, JSON, a dict and the environment (needs the extra `config`).

    circuit_breaker:
      enabled: true
      defaults: {failure_threshold: 10, timeout_seconds: 2, error_rate_threshold: 0.5}
      services:
        discovery: {failure_threshold: 20, timeout_seconds: 3}
    redis:
      url: "redis://localhost:6379"
      pool_size: 10

A service may set any field of Policy, and takes the fields that it does not set from `defaults`. `timeout_seconds` is
an alias of `reset_timeout`. The environment variables REDIS_URL and CIRCUIT_BREAKER_ENABLED override the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from ._config import DEFAULT_POLICY, Config, OnRedisFailure
from ._errors import ConfigError, PolicyError
from ._extras import needs_extra
from ._policy import RULES, Policy
from .wire.url import parse

with needs_extra("a configuration from a file, a dict or the environment", "config"):
    import pydantic
    import yaml
    from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

__all__ = ["load"]

_ENVIRONMENT = {"REDIS_URL": ("redis", "url"), "CIRCUIT_BREAKER_ENABLED": ("circuit_breaker", "enabled")}
_MOST_VALUES = 1_000_000
_ALIASES = {"timeout_seconds": "reset_timeout"}
_AS_IN_CONFIG: Any = None  # an option that is not given is left out, so Config's own default applies


def _policy_fields(given: Any) -> dict[str, Any]:
    """Check each field by Policy's own rules, so that an error names the field."""
    if not isinstance(given, Mapping):
        raise ValueError(f"must be a map of policy fields, not {given!r}")
    problems = list(_policy_problems(given))
    if problems:
        raise pydantic.ValidationError.from_exception_data("policy", problems)
    return {_ALIASES.get(str(name), str(name)): value for name, value in given.items()}


def _policy_problems(given: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in given.items():
        field = _ALIASES.get(name, name)
        try:
            if field not in RULES:
                raise PolicyError(_unknown(name, (*RULES, *_ALIASES)))
            if field != name and field in given:
                raise PolicyError(f"is an alias of {field}, which is given too: remove one")
            RULES[field].check(field, value)
        except PolicyError as error:
            yield {"type": "value_error", "loc": (name,), "input": value, "ctx": {"error": error}}


_PolicyFields = Annotated[dict[str, Any], pydantic.PlainValidator(_policy_fields)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=False)


class _CircuitBreaker(_Section):
    enabled: bool = _AS_IN_CONFIG
    defaults: _PolicyFields = {}
    services: dict[str, _PolicyFields] = {}
    watch: bool = _AS_IN_CONFIG
    lease: float = _AS_IN_CONFIG
    on_redis_failure: OnRedisFailure = _AS_IN_CONFIG
    redis_timeout: float = _AS_IN_CONFIG
    prefix: str = _AS_IN_CONFIG
    idle_after: float | None = _AS_IN_CONFIG
    host: str | None = _AS_IN_CONFIG
    record_errors: bool = _AS_IN_CONFIG
    listed: bool = _AS_IN_CONFIG


def _url(value: str) -> str:
    parse(value)
    return value


class _Redis(_Section):
    url: Annotated[str, pydantic.AfterValidator(_url)] = "redis://localhost:6379"
    pool_size: Annotated[int, pydantic.Field(ge=1)] | None = None
    username: str | None = None
    password: str | None = None
    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_check_hostname: bool | None = None
    ssl_cert_reqs: Literal["required", "optional", "none"] | None = None


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid", env_nested_delimiter="_", env_nested_max_split=1, env_ignore_empty=True
    )
    circuit_breaker: _CircuitBreaker = _CircuitBreaker()
    redis: _Redis = _Redis()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(env_settings, EnvSettingsSource)
        # only these two: an orchestrator may set REDIS_PORT, which is not meant for us
        known = {name.lower() for name in _ENVIRONMENT}
        env_settings.env_vars = {name: value for name, value in env_settings.env_vars.items() if name in known}
        return env_settings, init_settings


def load(source: str | os.PathLike[str] | Mapping[str, Any] | None = None) -> Config:
    """Read a configuration. The environment overrides its source.

    source: the path of a .yaml, .yml, .json or .toml file, a dict, or None for the environment only.
    Raises ConfigError, whose message names the file, the field and the reason.
    """
    if source is None or isinstance(source, Mapping):
        where, content = "the configuration", source or {}
    else:
        where, content = os.fspath(source), _read(pathlib.Path(source))
    _check_size(where, content)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: must be a map with circuit_breaker and redis, not {type(content).__name__}")
    try:
        settings = _Settings(**{str(key): value for key, value in content.items()})
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_message(where, problem) for problem in error.errors())) from None
    return _config(where, settings)


def _read(path: pathlib.Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix in (".yaml", ".yml", ".json"):  # JSON is YAML
            return yaml.safe_load(text) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    raise ConfigError(f"{path}: must end in .yaml, .yml, .json or .toml")


def _check_size(where: str, content: Any) -> None:
    """Raise ConfigError for a value that is too large. The aliases of a YAML file make small files huge."""
    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if not isinstance(value, (Mapping, list)):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = _MOST_VALUES  # while it is counted: it may contain itself
            sizes[id(value)] = 1 + sum(map(size, value.values() if isinstance(value, Mapping) else value))
        return sizes[id(value)]

    try:
        found = size(content)
    except RecursionError:
        found = _MOST_VALUES
    if found >= _MOST_VALUES:
        raise ConfigError(f"{where}: is nested too deeply, or has more than {_MOST_VALUES:,} values")


def _message(where: str, problem: Any) -> str:
    path = tuple(str(part) for part in problem["loc"])
    variable = next((name for name, of in _ENVIRONMENT.items() if of == path and os.environ.get(name)), None)
    if problem["type"] == "extra_forbidden":
        section: Any = {"circuit_breaker": _CircuitBreaker, "redis": _Redis}.get(path[0], _Settings)
        reason = _unknown(path[-1], section.model_fields)
    else:
        reason = problem["msg"].removeprefix("Value error, ")
    return f"{f'{variable} in the environment' if variable else where}: {'.'.join(path)}: {reason}"


def _unknown(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), 1)
    return "unknown field; " + (f"did you mean {near[0]}?" if near else f"known fields: {', '.join(known)}")


def _config(where: str, settings: _Settings) -> Config:
    given, redis = settings.circuit_breaker, settings.redis
    options = redis.model_dump(exclude={"url", "pool_size"}, exclude_none=True)
    if redis.pool_size is not None:
        options["max_connections"] = redis.pool_size
    defaults = _policy(f"{where}: circuit_breaker.defaults", DEFAULT_POLICY, given.defaults)
    services = {
        name: _policy(f"{where}: circuit_breaker.services.{name}", defaults, fields)
        for name, fields in given.services.items()
    }
    others = given.model_dump(exclude={"defaults", "services"}, exclude_unset=True)
    try:
        return Config(defaults=defaults, services=services, redis_url=redis.url, redis_options=options, **others)
    except PolicyError as error:
        raise ConfigError(f"{where}: circuit_breaker: {error}") from error


def _policy(where: str, base: Policy, fields: Mapping[str, Any]) -> Policy:
    try:
        return dataclasses.replace(base, **fields)
    except PolicyError as error:
        raise ConfigError(f"{where}: {error}") from error
