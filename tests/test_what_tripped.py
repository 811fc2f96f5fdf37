"""Which error tripped it: in the rejection, the history, the snapshot, events and the command line."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import redis
from conftest import stopped
from test_holds import TooManyError, make, make_any, shell
from test_policies import LONG, PATIENT, STRICT, Make, fail, fine, rejects

import pybreaker_redis
from pybreaker_redis import CircuitBreaker, CircuitBreakerManager, CircuitOpenError, Config, Event, Policy, PolicyError
from pybreaker_redis._protocol import keys_of
from pybreaker_redis.cli import main
from pybreaker_redis.embedded import EmbeddedServer

__all__ = ["make", "make_any", "shell"]  # fixtures
POLICY = Policy(failure_threshold=2, reset_timeout=LONG)


def fails_with(breaker: Any, error: BaseException) -> None:
    """One call that ends with this error."""

    def call() -> None:
        raise error

    with pytest.raises(type(error)):
        breaker.call(call)


@pytest.mark.parametrize("lease", [0, LONG])
def test_the_error_that_tripped_it(make_any: Make, lease: float) -> None:
    """It is the last one, for the rejected caller, in the history, in the snapshot and in the event."""
    events: list[Event] = []
    breaker = make_any(policy=POLICY, lease=lease, listeners=[events.append], **PATIENT)
    fails_with(breaker, ValueError("first"))
    fails_with(breaker, ConnectionError("refused"))
    error, seen, entry = rejects(breaker), breaker.snapshot(), breaker.history()[0]
    assert (error.reason, error.error) == ("failure_threshold", "ConnectionError: refused")
    assert " is open (failure_threshold: ConnectionError: refused); retry after " in str(error)
    assert (seen.reason, seen.error) == (error.reason, error.error)
    assert (entry.reason, entry.error, entry.time) == (error.reason, error.error, seen.changed_at)
    assert [event.error for event in events if event.kind == "state_change"] == [error.error]


def test_other_processes_know_it(make: Make) -> None:
    """A process whose calls did not fail tells its callers, too."""
    failing, other = (make(policy=POLICY, **STRICT) for _ in range(2))
    other.call(fine)
    for _ in range(2):
        fails_with(failing, ConnectionError("refused"))
    assert rejects(other).error == "ConnectionError: refused"


def test_the_error_of_a_recovery(make_any: Make) -> None:
    """Half open keeps it, a failed probe replaces it, and a recovery ends it."""
    breaker = make_any(policy=Policy(failure_threshold=1, reset_timeout=0.001, success_threshold=2), **STRICT)
    errors = [ConnectionError("refused"), TimeoutError()]
    for error in errors:
        fails_with(breaker, error)
        while breaker.snapshot().retry_after:
            pass
    assert breaker.snapshot().error == "TimeoutError"
    permit = breaker.acquire()
    half_open = rejects(breaker)
    assert (half_open.state, half_open.reason, half_open.error) == ("half_open", "timeout", "TimeoutError")
    permit.success()
    breaker.call(fine)
    seen = breaker.snapshot()
    assert (seen.state, seen.reason, seen.error) == ("closed", "probe_succeeded", None)
    errors_told = [entry.error for entry in breaker.history()]
    assert errors_told == [None, None, "TimeoutError", None, "ConnectionError: refused"]


def test_a_hold_and_an_operator(make_any: Make) -> None:
    """A held call has an error, an operator has none, and neither has a failed result."""
    breaker = make_any(policy=Policy(failure_threshold=1), is_failure=lambda result: result == "fine", **STRICT)
    breaker.acquire().failure(TooManyError(7), retry_after=7)
    assert rejects(breaker).error == "TooManyError: 429 Too Many Requests"
    breaker.force_open(60)
    error = rejects(breaker)
    assert (error.reason, error.error) == ("forced", None)
    assert " is open (forced); retry after 60.000 s" in str(CircuitOpenError(error.name, error.state, 60, error.reason))
    breaker.reset()
    breaker.call(fine)
    assert (rejects(breaker).reason, rejects(breaker).error) == ("failure_threshold", None)


class Odd(Exception):
    """An exception whose message cannot be read."""

    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(), "ValueError"),
        (ValueError("a\nb\tc\x00d"), "ValueError: a b c d"),
        (ValueError("caf\u00e9 \U0001f600 \ud800"), "ValueError: caf\\xe9 \\U0001f600  "),
        (ValueError("x" * 10**6), "ValueError: " + "x" * 188),
        (ValueError("\u00e9" * 500), ("ValueError: " + "\\xe9" * 200)[:200]),
        (type("x" * 300, (Exception,), {})(), "x" * 200),
        (Odd(), "Odd"),
    ],
)
def test_odd_messages(make_any: Make, error: Exception, text: str) -> None:
    """At most 200 printable ASCII characters are told, of whatever message."""
    breaker = make_any(policy=Policy(failure_threshold=1), **STRICT)
    fails_with(breaker, error)
    assert rejects(breaker).error == text
    assert breaker.history()[0].error == text


def test_types_only(make_any: Make, client: redis.Redis) -> None:
    """With record_errors=False no message leaves the process."""
    breaker = make_any(policy=Policy(failure_threshold=1), record_errors=False, **STRICT)
    fails_with(breaker, ValueError("secret"))
    assert rejects(breaker).error == breaker.history()[0].error == "ValueError"
    stored = client.get(breaker.keys.state) or b""
    assert b"secret" not in stored + repr(client.xrange(breaker.keys.history)).encode()


def test_types_only_of_a_manager() -> None:
    """A manager has the option for all its breakers; what is no flag is refused."""
    manager = CircuitBreakerManager(Config(defaults=Policy(failure_threshold=1), record_errors=False))
    fails_with(manager.get_or_create("a"), ValueError("secret"))
    assert rejects(manager.get_or_create("a")).error == "ValueError"
    for refused in (lambda: Config(record_errors=1), lambda: CircuitBreaker("a", record_errors=None)):  # type: ignore[arg-type]
        with pytest.raises(PolicyError, match="record_errors must be True or False"):
            refused()


def test_only_failures_carry_it(client: redis.Redis) -> None:
    """Of all reports, only those of failures have an error."""
    breaker = CircuitBreaker("discovery", redis=client, **STRICT)
    with client.monitor() as monitor:
        breaker.call(fine)
        fail(breaker)
        breaker.acquire().release()
        client.echo("end")
        seen = []
        while (line := monitor.next_command())["command"] != "ECHO end":
            seen.append(line["command"])
    scripts = [command for command in seen if command.startswith(("EVALSHA", "EVAL"))]
    assert len([command for command in scripts if "Boom" in command]) == 1
    assert len(scripts) >= 5


def test_an_outage_keeps_it(shell: Make, own_server: EmbeddedServer) -> None:
    """A process that read it before Redis went down still tells it."""
    breaker = shell(own_server.url, policy=POLICY, lease=0.01, redis_timeout=0.05)
    for _ in range(2):
        fails_with(breaker, ConnectionError("refused"))
    with stopped(own_server):
        for _ in range(3):
            error = rejects(breaker)
            assert (error.reason, error.error) == ("failure_threshold", "ConnectionError: refused")


def test_the_error_travels() -> None:
    """A rejection can be pickled with all that it says."""
    error = CircuitOpenError("payments", "open", 2.5, "held", "TooManyError: 429")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.name, copy.state, copy.retry_after, copy.reason, copy.error) == error.args == copy.args
    assert CircuitOpenError("payments", "open", 2.5).error is None
    assert b"pybreaker_redis._" not in pickle.dumps(error)


@pytest.mark.parametrize("name", [name for name in pybreaker_redis.__all__ if name.endswith("Error")])
def test_errors_are_called_as_they_are_imported(name: str) -> None:
    """A traceback and a pickle name the public module of an error, which stays, and not the one that defines it."""
    error = getattr(pybreaker_redis, name)
    assert f"{error.__module__}.{error.__qualname__}" == f"pybreaker_redis.{name}"
    assert pickle.loads(pickle.dumps(error)) is error


def test_the_command_line(client: redis.Redis, server: EmbeddedServer, capsys: pytest.CaptureFixture[str]) -> None:
    """show and history tell it, and both tell what another program wrote without control characters."""
    breaker = CircuitBreaker("discovery", redis=client, policy=POLICY, **STRICT)
    for _ in range(2):
        fails_with(breaker, ConnectionError("refused"))
    assert main(["show", "discovery", "--redis", server.url]) == 0
    shown = capsys.readouterr().out
    assert "failure_threshold" in shown
    assert "ConnectionError: refused" in shown
    client.xadd(
        keys_of("discovery").history,
        {
            **{"time_ms": 1, "from": "closed", "to": "open", "reason": "held", "generation": 1, "failure_count": 0},
            **{"success_count": 0, "instance": "me", "error": "red\x1b[31m"},
        },
    )
    assert main(["history", "discovery", "--redis", server.url]) == 0
    told = capsys.readouterr().out
    assert "ConnectionError: refused" in told
    assert "\x1b" not in told
