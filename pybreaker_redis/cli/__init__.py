"""The program `pybreaker-redis` (extra `cli`): inspect breakers, steer them, and check the server that they use.

Exit codes: 0 done; 1 doctor found something wrong, nothing is stored under the name given to show, or a question was
answered with no; 2 the command was not understood; 3 Redis does not answer, or refuses; 130 Ctrl-C; 141 the reader of
a pipe has gone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, ParamSpec

import rich.text
import typer

from .._config import Config
from .._errors import CircuitBreakerError, RedisUnavailableError
from .._policy import Policy
from .._protocol import keys_of, requests_by_hand
from .._sync import CircuitBreaker
from ..wire.options import REDIS_ERRORS
from ..wire.scripts import SCRIPTS, compose, sha1
from ..wire.url import client_from_url
from ._fleet import Fleet, Reading, checked, command, redis_cli, send, urgency
from ._output import (
    as_json,
    assignments,
    clean,
    details,
    err,
    heading,
    line,
    out,
    put,
    put_json,
    seconds,
    span,
    transition,
)

P = ParamSpec("P")
DONE, WRONG, USAGE, NO_REDIS, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

app = typer.Typer(
    name="pybreaker-redis",
    help="Inspect the circuit breakers in a Redis, steer them, and check the server that they use.",
    epilog="Exit codes: 0 done; 1 something is wrong, or the answer was no; 2 not understood; 3 Redis does not answer,"
    " or refuses; 130 Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
policy_app = typer.Typer(no_args_is_help=True, help="Show and change the policy override of the whole fleet.")
app.add_typer(policy_app, name="policy")

Url = Annotated[
    str | None,
    typer.Option(
        "--redis",
        envvar="REDIS_URL",
        metavar="URL",
        help="Server to use. Default: that of --config, else redis://localhost:6379.",
    ),
]
ConfigFile = Annotated[
    pathlib.Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration file of the managers: server, prefix and policies."),
]
Prefix = Annotated[
    str | None, typer.Option("--prefix", metavar="TEXT", help="Prefix of the keys. Default: circuit_breaker.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
For = Annotated[
    float | None,
    typer.Option("--for", parser=seconds, metavar="TIME", help="Duration, as in 30, 10m or 2h. Default: 30 days."),
]


def _complete_names(context: typer.Context, incomplete: str) -> list[str]:
    """The names of breakers, for the shell's completion."""
    given = context.params
    fleet = _fleet(given.get("url"), given.get("config"), given.get("prefix"))
    first = next(fleet.read_all(), [])
    return sorted(one.snapshot.name for one in first if one.snapshot.name.startswith(incomplete))


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the breaker.", autocompletion=_complete_names)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="pybreaker-redis")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else USAGE
    return DONE


def _command(owner: typer.Typer, name: str) -> Callable[[Callable[P, int | None]], Callable[P, None]]:
    """Add a command to the program. Its errors become one line on standard error and an exit code."""

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
    client = client_from_url(url) if url else client_from_url(given.redis_url, **given.redis_options)
    unknown = Policy()  # clients do not store their policies: without --config only policy overrides are known
    policy_of: Callable[[str], Policy] = given.policy_of if config is not None else lambda name: unknown
    return Fleet(client, prefix or given.prefix, policy_of, lambda text: err.print(text, style="yellow"))


def _put_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    for label, text in pairs:
        out.print(rich.text.Text(f"{label:<25}", "bold").append(text, ""))


# Inspecting


@_command(app, "list")
def list_breakers(
    url: Url = None,
    config: ConfigFile = None,
    prefix: Prefix = None,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="Only breakers in this state: closed, open or half_open.")
    ] = None,
    use_json: Json = False,
) -> int | None:
    """List every breaker with its state, counts, rates and health.

    RUN: failures in a row. CALLS, FAILED, SLOW: within the window. CHANGED: time since the last transition.
    """
    if state not in (None, "closed", "open", "half_open"):
        raise typer.BadParameter(f"must be closed, open or half_open, not {state!r}", param_hint="--state")
    fleet = _fleet(url, config, prefix)
    count = 0
    for chunk in fleet.read_all():
        chosen = sorted((one for one in chunk if state in (None, one.snapshot.state)), key=urgency)
        if use_json:
            texts = [json.dumps(as_json(one, brief=True)) for one in chosen]
            print("".join(f"{',' if count + number else '['}\n{text}" for number, text in enumerate(texts)), end="")
        elif chosen:
            put([*([] if count else [heading()]), *map(line, chosen)])
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
    """Show everything that Redis knows about a breaker.

    Exit code 1 when nothing is stored under this name.
    """
    reading = _read(_fleet(url, config, prefix), name)
    if use_json:
        put_json(as_json(reading))
    else:
        out.print(clean(name), style="bold")
        _put_pairs(details(reading))
    return DONE if reading.stored else WRONG


@_command(app, "watch")
def watch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Breakers to show. Default: all.")
    ] = None,
    url: Url = None,
    config: ConfigFile = None,
    prefix: Prefix = None,
    limit: Annotated[
        float | None, typer.Option("--for", parser=seconds, metavar="TIME", help="Duration. Default: until Ctrl-C.")
    ] = None,
    use_json: Json = False,
) -> int | None:
    """Show a live table, updated by notifications.

    In a pipe, or with --json: one line for each breaker, then one for each change.
    """
    from ._watch import watch as run

    run(_fleet(url, config, prefix), names or (), limit, use_json=use_json)
    return DONE


@_command(app, "serve")
def serve(
    url: Url = None,
    config: ConfigFile = None,
    prefix: Prefix = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8642,
    write: Annotated[bool, typer.Option("--write", help="Let operators act on breakers.")] = False,
    authorize: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Takes a request, returns the operator's name or None."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Further name of this server, as a proxy passes it on.")
    ] = None,
    health: Annotated[bool, typer.Option("--health", help="Answer /health, to everybody.")] = False,
) -> int | None:
    """Serve the operators' web page. It only reads, unless --write is given.

    --write needs --authorize, or a password in PYBREAKER_REDIS_WEB_PASSWORD: then browsers ask for a name and this
    password, and the name is the operator's.
    """
    from ._serve import serve as run

    fleet = _fleet(url, config, prefix)
    names = allow_host or ()
    run(fleet.client, fleet.prefix, host, port, write=write, authorize=authorize, names=names, health=health)
    return DONE


@_command(app, "history")
def history(
    name: Name,
    url: Url = None,
    prefix: Prefix = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of transitions.")] = 20,
    use_json: Json = False,
) -> int | None:
    """Show the last transitions of a breaker, newest first."""
    entries = _fleet(url, None, prefix).breaker(name).history(count)
    if use_json:
        put_json([dataclasses.asdict(entry) for entry in entries])
    elif not entries:
        err.print(f"{clean(name)} has had no transition within the last day")
    for entry in () if use_json else entries:
        out.print(transition(entry))
    return DONE


@_command(app, "fleet")
def list_processes(
    url: Url = None, config: ConfigFile = None, prefix: Prefix = None, use_json: Json = False
) -> int | None:
    """List the processes that use the breakers, and show on which policies they disagree.

    SEEN: when the process last listed itself, which it does once a minute while it calls. BREAKERS: those it has used.
    """
    from ._instances import show_fleet

    show_fleet(_fleet(url, config, prefix), use_json)
    return DONE


# Steering


@_command(app, "force-open")
def force_open(
    name: Name, duration: For = None, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False
) -> int | None:
    """Force the circuit open: reject every call of the fleet."""
    question = f"Reject every call of the fleet for {span(duration or 30 * 86400)}?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.force_open(duration))


@_command(app, "force-closed")
def force_closed(
    name: Name, duration: For = None, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False
) -> int | None:
    """Force the circuit closed: admit every call of the fleet."""
    question = f"Admit every call of the fleet, unprotected, for {span(duration or 30 * 86400)}?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.force_closed(duration))


@_command(app, "clear")
def clear(name: Name, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False) -> int | None:
    """End a forced state.

    A circuit forced open lets a probe through next; one forced closed stays closed.
    """
    question = "End the forced state?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.clear_forced())


@_command(app, "probe")
def probe(name: Name, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False) -> int | None:
    """Let the next call probe now, whatever is left of the open period.

    Refused while a state is forced.
    """
    question = "Let the next call of the fleet probe now?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.probe())


@_command(app, "reset")
def reset(name: Name, url: Url = None, prefix: Prefix = None, yes: Yes = False, use_json: Json = False) -> int | None:
    """Close the circuit; forget all counts, forced states and the policy override."""
    question = "Close the circuit and forget all its counts and its policy override?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.reset())


@_command(policy_app, "get")
def policy_get(
    name: Name, url: Url = None, config: ConfigFile = None, prefix: Prefix = None, use_json: Json = False
) -> int | None:
    """Show what is known of the policy in force, and from whom.

    Sources: override (the policy override in Redis); client (the file of --config, or else the processes that list
    themselves); default (as client, and the client leaves the field as it is by default); unknown.
    """
    from ._instances import known_policy, show_policy

    fleet = _fleet(url, config, prefix)
    known = known_policy(fleet, _read(fleet, name).snapshot, from_file=config is not None)
    key = keys_of(name, fleet.prefix).policy
    (left,) = checked(fleet.server.exchange([command("PTTL", key, key=key)]))
    show_policy(known, left / 1000 if left > 0 else None, use_json)
    return DONE


@_command(policy_app, "set")
def policy_set(
    name: Name,
    fields: Annotated[
        list[str], typer.Argument(metavar="FIELD=VALUE...", help="Fields to set, as in reset_timeout=10s quorum=2.")
    ],
    duration: Annotated[
        float | None, typer.Option("--for", parser=seconds, metavar="TIME", help="Duration. Default: until cleared.")
    ] = None,
    url: Url = None,
    prefix: Prefix = None,
    yes: Yes = False,
    use_json: Json = False,
) -> int | None:
    """Set fields of the policy override for the whole fleet.

    Fields that were set before stay.
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
    """End the policy override: each instance follows its own policy."""
    question = "End the policy override, so that every instance follows its own policy?"
    return _steer(_fleet(url, None, prefix), name, question, yes, use_json, lambda it: it.clear_policy())


def _read(fleet: Fleet, name: str) -> Reading:
    readings = fleet.read([name])
    if not readings:
        raise RedisUnavailableError(f"{name} cannot be read")
    return readings[0]


def _steer(
    fleet: Fleet, name: str, question: str, yes: bool, use_json: bool, act: Callable[[CircuitBreaker], None]
) -> int:
    before = _read(fleet, name)
    if not yes:
        known = before.snapshot.state if before.stored else "unknown to Redis"
        typer.confirm(f"{clean(name)} is {known}. {question}", abort=True, err=True)
    act(fleet.breaker(name))
    after = _read(fleet, name)
    if use_json:
        put_json(as_json(after))
    else:
        out.print(heading())
        out.print(line(after))
    return DONE


# Scripts and server


@_command(app, "scripts")
def scripts(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the breaker.")] = "discovery",
    dump: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="DIR", help="Write the scripts to this directory, for redis-cli --eval and --ldb."),
    ] = None,
    url: Url = None,
    prefix: Prefix = None,
    use_json: Json = False,
) -> int | None:
    """Load the scripts, and print a redis-cli line for each.

    Run as printed, acquire takes a probe where one is due, record renews the TTL, and control ends a forced state.
    redis-cli reads the password from REDISCLI_AUTH.
    """
    fleet = _fleet(url, None, prefix)
    keys = keys_of(name, fleet.prefix)
    generation = _read(fleet, name).snapshot.generation
    requests = requests_by_hand(generation)
    for node in fleet.masters():
        send(node, *(command("SCRIPT", "LOAD", compose(script)) for script in SCRIPTS))
    program = redis_cli(fleet)
    shown = []
    for script in SCRIPTS:
        words = [*program, "EVALSHA", sha1(script), "3", *keys, json.dumps(requests[script])]
        shown.append({"name": script, "sha1": sha1(script), "keys": list(keys), "redis_cli": shlex.join(words)})
    if dump is not None:
        _write_scripts(dump)
    if use_json:
        put_json(shown)
        return DONE
    out.print(rich.text.Text("KEYS  ", "bold").append("  ".join(map(shlex.quote, keys)), ""))
    for one in shown:
        out.print(rich.text.Text(f"\n{one['name']}  ", "bold").append(str(one["sha1"]), "dim"))
        out.print(str(one["redis_cli"]))
    if dump is not None:
        arguments = f"{' '.join(map(shlex.quote, keys))} , '{{}}'"
        debugger = f"{shlex.join(program)} --ldb --eval {shlex.quote(str(dump / 'snapshot.lua'))} {arguments}"
        out.print(f"\nwritten to {dump}; to step through a script: {debugger}")
    return DONE


def _write_scripts(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for script in SCRIPTS:
            (folder / f"{script}.lua").write_bytes(compose(script).encode())
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--dump") from error


@_command(app, "doctor")
def doctor(url: Url = None, prefix: Prefix = None, use_json: Json = False) -> int | None:
    """Check whether the server is fit for breakers.

    Checks version, role, latency, clock, eviction, persistence, connections, scripts, TTLs, whether the processes agree
    on every policy, and the user's rights. The rights are tried on a breaker of its own, which is then removed. Exit
    code 1 when something is wrong.
    """
    from ._doctor import examine

    findings = []
    for finding in examine(_fleet(url, None, prefix)):
        findings.append(finding)
        if not use_json:
            style = {"ok": "green", "warning": "yellow", "wrong": "bold red"}[finding.status]
            out.print(rich.text.Text(f"{finding.status:<8}", style).append(f"{finding.check}: {finding.detail}", ""))
            if finding.fix:
                out.print(f"        -> {finding.fix}", style="bold")
    if use_json:
        put_json([dataclasses.asdict(finding) for finding in findings])
    return WRONG if any(finding.status == "wrong" for finding in findings) else DONE
