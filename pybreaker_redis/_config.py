"""The options of breakers and managers, and their checks."""

from __future__ import annotations

import dataclasses
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from ._errors import PolicyError
from ._policy import Policy, check_seconds
from ._protocol import keys_of

DEFAULT_POLICY = Policy(failure_threshold=10, reset_timeout=2.0, error_rate_threshold=0.5)
LONGEST_LEASE = 3600.0
OnRedisFailure: TypeAlias = Literal["local", "open", "closed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The configuration of a manager. pybreaker_redis.config reads one from a file, a dict and the environment.

    enabled: False passes every call through unguarded. defaults: the policy of services that are not in `services`.
    services: the policy of each service, by name. redis_url: the server through which with_redis() shares the state.
    redis_options: options of redis.Redis for its client; those in the URL win. watch: whether the breakers
    subscribe to messages, so that their views follow changes within milliseconds. idle_after: seconds after which a
    manager drops a breaker that has not been requested; its state in Redis stays until its TTL ends. None: never.
    lease, on_redis_failure, redis_timeout, prefix, host, record_errors, listed: as for CircuitBreaker.

    Raises PolicyError for an invalid value.
    """

    enabled: bool = True
    defaults: Policy = DEFAULT_POLICY
    services: Mapping[str, Policy] = dataclasses.field(default_factory=dict)
    redis_url: str = "redis://localhost:6379"
    redis_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # it may hold a password
    watch: bool = True
    lease: float = 0.1
    on_redis_failure: OnRedisFailure = "local"
    redis_timeout: float = 0.25
    prefix: str = "circuit_breaker"
    host: str | None = None
    record_errors: bool = True
    listed: bool = True
    idle_after: float | None = 3600.0
    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    def __post_init__(self) -> None:
        check_options(self.lease, self.on_redis_failure, self.redis_timeout)
        host_of(self.host)
        if not isinstance(self.redis_url, str) or not self.redis_url:
            raise PolicyError(
                f"redis_url must be the URL of a server, not {self.redis_url!r}: leave it out for a manager in memory,"
                " or pass redis="
            )
        if self.idle_after is not None:
            check_seconds("idle_after", self.idle_after, 0.0, float("inf"))
        for option in ("enabled", "watch", "record_errors", "listed"):
            check_flag(option, getattr(self, option))
        for service, policy in {"defaults": self.defaults, **self.services}.items():
            keys_of(service, self.prefix)
            if not isinstance(policy, Policy):
                raise PolicyError(f"the policy of {service!r} must be a Policy, not {policy!r}")

    def policy_of(self, service: str) -> Policy:
        """The policy of a service."""
        return self.services.get(service, self.defaults)


def check_options(lease: object, on_redis_failure: object, redis_timeout: object) -> None:
    """Raise PolicyError unless these options of a breaker are valid."""
    check_seconds("lease", lease, 0.0, LONGEST_LEASE)
    check_seconds("redis_timeout", redis_timeout, 0.001, 3600.0)
    if on_redis_failure not in get_args(OnRedisFailure):
        raise PolicyError(f"on_redis_failure must be 'local', 'open' or 'closed', not {on_redis_failure!r}")


def check_flag(option: str, value: object) -> None:
    """Raise PolicyError unless this option is True or False."""
    if not isinstance(value, bool):
        raise PolicyError(f"{option} must be True or False, not {value!r}")


def check_clock(clock: object, redis: object) -> None:
    """Raise PolicyError unless this is a clock, of a breaker that may have one."""
    if clock is None:
        return
    if not callable(getattr(clock, "monotonic", None)) or not callable(getattr(clock, "now_ms", None)):
        raise PolicyError(f"clock must be a pybreaker_redis.testing.FakeClock, or None, not {clock!r}")
    if redis is not None:
        raise PolicyError("clock= is for breakers in memory, without redis=: Redis decides on the server's own clock")


def check_fallback(given: object) -> None:
    """Raise PolicyError unless this can be called with the CircuitOpenError of a rejected call."""
    if not callable(given):
        raise PolicyError(f"fallback must be a function of the CircuitOpenError, or None, not {given!r}")


def host_of(host: object) -> str:
    """The option `host`, or the machine's host name for None. Raises PolicyError."""
    if host is None:
        return sys.intern(socket.gethostname().encode("ascii", "backslashreplace").decode()) or "localhost"
    if not isinstance(host, str) or not re.fullmatch("[ -~]{1,200}", host):
        raise PolicyError(f"host must be 1 to 200 printable ASCII characters, or None, not {host!r}")
    return host
