"""The program `pybreaker-redis` (extra `cli`): look at breakers, steer them, and see whether a server is fit for them.

Exit codes: 0 done; 1 not as it should be (doctor found something wrong, demo a broken promise, show nothing under this
name) or a question was answered with no; 2 the command was not understood; 3 Redis does not answer, or refuses;
130 Ctrl-C; 141 the reader of a pipe has gone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ParamSpec

import rich.text
import typer
from redis.backoff import NoBackoff
from redis.retry import Retry

from .._clients import client_from_url
from .._errors import CircuitBreakerError, RedisUnavailableError
from .._manager import Config
from .._policy import Policy
from .._protocol import keys_of
from .._scripts import REDIS_ERRORS, SCRIPTS, compose, sha1
from .._sync import CircuitBreaker
from ._fleet import TIMEOUT, Fleet, Row, redis_cli, urgency
from ._output import (
    as_json,
    assignments,
    clean,
    details,
    err,
    heading,
    line,
    out,
    policy_lines,
    put,
    say_json,
    seconds,
    span,
    told,
)

P = ParamSpec("P")
DONE, NOT_SO, USAGE, NO_REDIS, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

app = typer.Typer(
    name="pybreaker-redis",
    help="Look at the circuit breakers in a Redis, steer them, and see whether the server is fit for them.",
    epilog="Exit codes: 0 done; 1 not as it should be, or the answer was no; 2 not understood; 3 Redis does not answer,"
    " or refuses; 130 Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
policy_app = typer.Typer(no_args_is_help=True, help="Overrule fields of a policy for the whole fleet.")
app.add_typer(policy_app, name="policy")

Url = Annotated[
    str | None,
    typer.Option("--redis", envvar="REDIS_URL", metavar="URL", help="The server; else --config's, else localhost."),
]
ConfigFile = Annotated[
    pathlib.Path | None,
    typer.Option("--config", metavar="FILE", help="The managers' configuration: server, prefix and policies."),
]
Prefix = Annotated[
    str | None, typer.Option("--prefix", metavar="TEXT", help="Of the keys; circuit_breaker by default.")
]
Json = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
For = Annotated[
    float | None, typer.Option("--for", parser=seconds, metavar="TIME", help="How long: 30, 10m, 2h. Default: 30 days.")
]


def _complete_names(context: typer.Context, incomplete: str) -> list[str]:
    """The names of breakers, for the shell."""
    given = context.params
    fleet = _fleet(given.get("url"), given.get("config"), given.get("prefix"))
    chunk = next(fleet.rows(), [])
    return sorted(row.snapshot.name for row in chunk if row.snapshot.name.startswith(incomplete))


Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the breaker.", autocompletion=_complete_names)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="pybreaker-redis")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else USAGE
    return DONE


def _command(owner: typer.Typer, name: str) -> Callable[[Callable[P, int | None]], Callable[P, None]]:
    """A command of the program; what it raises becomes one line on standard error, and its exit code."""

    def decorate(function: Callable[P, int | None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            raise typer.Exit(_code_of(functools.partial(function, *args, **kwargs)))

        owner.command(name)(run)
        return run

    return decorate


def _code_of(function: Callable[[], int | None]) -> int:
    try:
        code = function() or DONE
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        err.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (RedisUnavailableError, *REDIS_ERRORS) as error:
        err.print(f"Redis does not answer, or refuses: {error}", style="red")
        return NO_REDIS
    except CircuitBreakerError as error:
        err.print(str(error), style="red")
        return USAGE


def _fleet(url: str | None, config: pathlib.Path | None, prefix: str | None) -> Fleet:
    given = Config()
    if config is not None:
        from ..config import load

        given = load(config)
    options = {} if url else given.redis_options
    deadline = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
    client = client_from_url(url or given.redis_url, **{**deadline, **options})
    if hasattr(client, "connection_pool"):
        client.set_retry(Retry(NoBackoff(), 0))
    nobodys = Policy()  # policies are the clients': without --config only what was overruled is known
    policy_of: Callable[[str], Policy] = given.policy_of if config is not None else lambda name: nobodys
    return Fleet(client, prefix or given.prefix, policy_of, lambda text: err.print(text, style="yellow"))


def _pairs(pairs: Any) -> None:
    for label, text in pairs:
        out.print(rich.text.Text(f"{label:<25}", "bold").append(text, ""))


# Looking


@_command(app, "list")
def list_breakers(
    url: Url = None,
    config: ConfigFile = None,
    prefix: Prefix = None,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="Only those that are closed, open or half_open.")
    ] = None,
    use_json: Json = False,
) -> int | None:
    """Every breaker: state, counts, rates, health.

    ROW: failures in a row. CALLS, FAILED, SLOW: within the window. CHANGED: when the state last did.
    """
    if state not in (None, "closed", "open", "half_open"):
        raise typer.BadParameter(f"{state!r} is none of closed, open, half_open", param_hint="--state")
    fleet = _fleet(url, config, prefix)
    count = 0
    for chunk in fleet.rows():
        chosen = sorted((row for row in chunk if state in (None, row.snapshot.state)), key=urgency)
        if use_json:
            texts = [json.dumps(as_json(row, brief=True)) for row in chosen]
            print("".join(f"{',' if count + number else '['}\n{text}" for number, text in enumerate(texts)), end="")
        elif chosen:
            put([line(row) for row in chosen] if count else [heading(), *map(line, chosen)])
        count += len(chosen)
    if use_json:
        print("\n]" if count else "[]")
    elif not count:
        err.print(f"no breaker {f'is {state} ' if state else ''}under the prefix {fleet.prefix}")
    return DONE


@_command(app, "show")
def show(
    name: Name, url: Url = None, config: ConfigFile = None, prefix: Prefix = None, use_json: Json = False
) -> int | None:
    """All that Redis knows of a breaker. Exit code 1 when it knows nothing."""
    row = _row(_fleet(url, config, prefix), name)
    if use_json:
        say_json(as_json(row))
    else:
        out.print(clean(name), style="bold")
        _pairs(details(row))
    return DONE if row.stored else NOT_SO


@_command(app, "watch")
def watch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: all of them.")] = None,
    url: Url = None,
    config: ConfigFile = None,
    prefix: Prefix = None,
    limit: Annotated[
        float | None, typer.Option("--for", parser=seconds, metavar="TIME", help="How long; default: until Ctrl-C.")
    ] = None,
    use_json: Json = False,
) -> int | None:
    """A live table, fed by notifications.

    In a pipe, or with --json: a line for each breaker, then one for each change.
    """
    from ._watch import watch as run

    run(_fleet(url, config, prefix), names or (), limit, use_json=use_json)
    return DONE


@_command(app, "history")
def history(
    name: Name,
    url: Url = None,
    prefix: Prefix = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="The newest so many.")] = 20,
    use_json: Json = False,
) -> int | None:
    """The last transitions of a breaker, newest first."""
    entries = _fleet(url, None, prefix).breaker(name).history(count)
    if use_json:
        say_json([dataclasses.asdict(entry) for entry in entries])
    elif not entries:
        err.print(f"{clean(name)} has not changed within the last day")
    for entry in () if use_json else entries:
        out.print(told(entry))
    return DONE


# Steering


@_command(app, "force-open")
def force_open(
    name: Name, duration: For = None, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False
) -> int | None:
    """Reject every call of the fleet, for some time."""
    question = f"Reject every call of the fleet for {span(duration or 30 * 86400)}?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.force_open(duration))


@_command(app, "force-closed")
def force_closed(
    name: Name, duration: For = None, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False
) -> int | None:
    """Admit every call of the fleet, for some time."""
    question = f"Admit every call of the fleet, unprotected, for {span(duration or 30 * 86400)}?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.force_closed(duration))


@_command(app, "clear")
def clear(name: Name, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False) -> int | None:
    """End a forced state.

    Forced open goes on with a probe, forced closed as closed.
    """
    question = "End the forced state?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.clear_override())


@_command(app, "reset")
def reset(name: Name, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False) -> int | None:
    """Close, and forget all counts and what was forced."""
    question = "Close it and forget all its counts?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.reset())


@_command(policy_app, "get")
def policy_get(
    name: Name, url: Url = None, config: ConfigFile = None, prefix: Prefix = None, use_json: Json = False
) -> int | None:
    """The policy in force, and where it comes from.

    Sources: the default, --config (client), or an override.
    """
    fleet = _fleet(url, config, prefix)
    seen = _row(fleet, name).snapshot
    left = fleet.client.pttl(keys_of(name, fleet.prefix).policy)
    if use_json:
        fields = {
            field: {"value": getattr(seen.policy, field), "source": source}
            for field, source in seen.policy_sources.items()
        }
        say_json({"fields": fields, "override_ends_in": left / 1000 if left > 0 else None})
        return DONE
    _pairs(policy_lines(seen))
    if left > 0:
        out.print(f"the override ends in {span(left / 1000)}")
    return DONE


@_command(policy_app, "set")
def policy_set(
    name: Name,
    fields: Annotated[list[str], typer.Argument(metavar="FIELD=VALUE...", help="As in reset_timeout=10s quorum=2.")],
    duration: Annotated[
        float | None, typer.Option("--for", parser=seconds, metavar="TIME", help="Default: until cleared.")
    ] = None,
    url: Url = None,
    prefix: Prefix = None,
    yes: Yes = False,
    use_json: Json = False,
) -> int | None:
    """Overrule fields for the whole fleet.

    On top of those set before.
    """
    given = assignments(fields)
    until = f" for {span(duration)}" if duration else ""
    question = f"Set {', '.join(f'{field}={value}' for field, value in given.items())} for the whole fleet{until}?"
    fleet = _fleet(url, None, prefix)
    return _steer(fleet, name, question, yes, use_json, lambda it: it.set_policy(duration=duration, **given))


@_command(policy_app, "clear")
def policy_clear(
    name: Name, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False
) -> int | None:
    """Let each instance go by its own policy again."""
    question = "Let every instance go by its own policy again?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.clear_policy())


def _row(fleet: Fleet, name: str) -> Row:
    rows = fleet.read([name])
    if not rows:
        raise RedisUnavailableError(f"{name} cannot be read")
    return rows[0]


def _steer(
    fleet: Fleet, name: str, question: str, yes: bool, use_json: bool, act: Callable[[CircuitBreaker], None]
) -> int:
    before = _row(fleet, name)
    if not yes:
        known = before.snapshot.state if before.stored else "unknown to Redis"
        typer.confirm(f"{clean(name)} is {known}. {question}", abort=True, err=True)
    act(fleet.breaker(name))
    after = _row(fleet, name)
    if use_json:
        say_json(as_json(after))
    else:
        out.print(heading())
        out.print(line(after))
    return DONE


# Scripts, server, demo


@_command(app, "scripts")
def scripts(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="For which breaker.")] = "discovery",
    dump: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="DIR", help="Write the composed text, for redis-cli --eval and --ldb."),
    ] = None,
    url: Url = None,
    prefix: Prefix = None,
    use_json: Json = False,
) -> int | None:
    """Each script, with a redis-cli line that works.

    Loads the scripts. Pasted as they are, acquire takes a probe where one is due, record renews the TTL, and control
    ends a forced state. A password goes into REDISCLI_AUTH.
    """
    fleet = _fleet(url, None, prefix)
    keys = keys_of(name, fleet.prefix)
    node = fleet.node_of(keys.state.encode())
    program = redis_cli(fleet, keys)
    generation = _row(fleet, name).snapshot.generation
    requests = {
        "acquire": {"instance": "redis-cli"},
        "record": {"generation": generation, "instance": "redis-cli"},
        "control": {"action": "clear_forced", "instance": "redis-cli"},
        "snapshot": {},
    }
    shown = []
    for script in SCRIPTS:
        loaded = node.script_load(compose(script))
        assert loaded in (sha1(script), sha1(script).encode())
        words = [*program, "EVALSHA", sha1(script), "3", *keys, json.dumps(requests[script])]
        shown.append({"name": script, "sha1": sha1(script), "keys": list(keys), "redis_cli": shlex.join(words)})
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{script}.lua").write_bytes(compose(script).encode())
    if use_json:
        say_json(shown)
        return DONE
    out.print(rich.text.Text("KEYS  ", "bold").append("  ".join(map(shlex.quote, keys)), ""))
    for one in shown:
        out.print(rich.text.Text(f"\n{one['name']}  ", "bold").append(str(one["sha1"]), "dim"))
        out.print(str(one["redis_cli"]))
    if dump is not None:
        arguments = f"{' '.join(map(shlex.quote, keys))} , '{{}}'"
        step = f"{shlex.join(program)} --ldb --eval {dump}/snapshot.lua {arguments}"
        out.print(f"\nwritten to {dump}; to step through one: {step}")
    return DONE


@_command(app, "doctor")
def doctor(url: Url = None, prefix: Prefix = None, use_json: Json = False) -> int | None:
    """Is the server fit for breakers?

    Looks at version, latency, rights, eviction, persistence, clock, scripts and TTLs. It tries the rights on a breaker
    of its own, which it removes. Exit code 1 when something is wrong.
    """
    from ._doctor import examine

    findings = []
    for finding in examine(_fleet(url, None, prefix)):
        findings.append(finding)
        if not use_json:
            style = {"ok": "green", "warning": "yellow", "wrong": "bold red"}[finding.status]
            out.print(rich.text.Text(f"{finding.status:<8}", style).append(f"{finding.check}: {finding.told}", ""))
            if finding.mend:
                out.print(f"        -> {finding.mend}", style="bold")
    if use_json:
        say_json([dataclasses.asdict(finding) for finding in findings])
    return NOT_SO if any(finding.status == "wrong" for finding in findings) else DONE


@_command(app, "demo")
def demo(
    workers: Annotated[int, typer.Option(min=2, max=32, help="Worker processes.")] = 4,
    plain: Annotated[bool, typer.Option(help="Plain lines also on a terminal.")] = False,
    use_json: Json = False,
) -> int | None:
    """A service that misbehaves, processes, one breaker.

    It takes 16 s, on the server in REDIS_URL, else on one of its own.
    """
    from .._demo import main as run

    return run(workers, plain=plain, use_json=use_json)
