"""The program `pybreaker-redis` (extra `cli`): inspect breakers, steer them, and check the server that they use.

Exit codes:

- 0: done.
- 1: doctor found something wrong, nothing is stored under the name given to show, or the user declined to confirm.
- 2: bad arguments.
- 3: Redis does not answer, or refuses.
- 130: Ctrl-C. 141: the reader of a pipe has gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import getpass
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, ParamSpec

import rich.text
import typer

from .._board import CONDITIONS, clean, counts, span
from .._config import Config
from .._errors import CircuitBreakerError, RedisUnavailableError
from .._policy import LONGEST_OPEN, Policy
from .._protocol import LONGEST_NOTE, LONGEST_OPERATOR, keys_of, requests_by_hand
from .._sync import CircuitBreaker
from ..wire.commands import checked
from ..wire.options import REDIS_ERRORS
from ..wire.scripts import SCRIPTS, compose, sha1
from ..wire.url import client_from_url
from ._fleet import Fleet, command, redis_cli, send
from ._hints import explained
from ._output import as_json, assignments, details, err, out, pairs, put, put_json, seconds, transition
from ._table import Known, layout, row_json, summary

P = ParamSpec("P")
DONE, WRONG, USAGE, NO_REDIS, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141
MOST_COMPLETED = 10_000  # names of breakers that the shell's completion looks at

app = typer.Typer(
    name="pybreaker-redis",
    help="Inspect the circuit breakers in a Redis, steer them, and check the server that they use.",
    epilog="Exit codes: 0 done; 1 something is wrong, or you declined to confirm; 2 bad arguments; 3 Redis does not"
    " answer, or refuses; 130 Ctrl-C.",
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
    first = itertools.islice(fleet.names(), MOST_COMPLETED)
    return sorted({name for name in first if name.startswith(incomplete)})


Operator = Annotated[
    str | None, typer.Option("--operator", metavar="NAME", help="Who acts, for the history. Default: the login name.")
]
Note = Annotated[str | None, typer.Option("--note", metavar="TEXT", help="Why, for the history.")]
Create = Annotated[bool, typer.Option("--create", help="Act even if nothing is stored under the name yet.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the breaker.", autocompletion=_complete_names)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the program, as with <&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the whole process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a pipe may not take every letter of a name
            stream.reconfigure(errors="backslashreplace")
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
            raise typer.Exit(_code_of(functools.partial(function, *args, **kwargs), kwargs))

        owner.command(name)(run)
        return run

    return decorate


def _code_of(function: Callable[[], int | None], options: Mapping[str, Any]) -> int:
    """Run a command; its exit code. options: those that it was given, by name."""
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
        url = options.get("url") or _config(options.get("config")).redis_url
        err.print(explained(error, url), style="red")
        return NO_REDIS
    except CircuitBreakerError as error:
        err.print(str(error), style="red")
        return USAGE


def _fleet(url: str | None, config: pathlib.Path | None, prefix: str | None) -> Fleet:
    given = _config(config)
    client = client_from_url(url) if url else client_from_url(given.redis_url, **given.redis_options)
    policy_of: Callable[[str], Policy | None] = given.policy_of if config is not None else lambda name: None
    return Fleet(client, prefix or given.prefix, policy_of)


def _config(path: pathlib.Path | None) -> Config:
    if path is None:
        return Config()
    from ..config import load

    return load(path)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pybreaker_redis {importlib.metadata.version('pybreaker_redis')}")
        raise typer.Exit(DONE)


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


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
    """List every breaker: its state, until when and why; the most urgent first.

    UNTIL: time until a probe is due, or until a forced state ends. SINCE: time since the last transition. RUN: failures
    in a row. CALLS, FAILED, SLOW: within the window. A narrow terminal shows fewer columns; a pipe shows all of them.
    """
    if state not in (None, "closed", "open", "half_open"):
        raise typer.BadParameter(f"must be closed, open or half_open, not {state!r}", param_hint="--state")
    fleet = _fleet(url, config, prefix)
    rows, now = fleet.rows()
    chosen, known = [row for row in rows if state in (None, row.state)], Known(now, fleet.policy_of)
    if use_json:
        print("[" + ",\n".join(json.dumps(row_json(row, known)) for row in chosen) + "]")
        return DONE
    if not chosen:
        err.print(f"no breaker {f'is {state} ' if state else ''}under the prefix {clean(fleet.prefix)}")
        return DONE
    fits = layout(out.width if out.is_terminal else None, (row.name for row in chosen), fleet.knows_policies)
    put([fits.heading(), *(fits.line(row, known) for row in chosen)])
    if out.is_terminal:
        put([rich.text.Text(text, "bold") for text in summary(counts(chosen), len(chosen), out.width)])
    return DONE


@_command(app, "show")
def show(
    name: Name, url: Url = None, config: ConfigFile = None, prefix: Prefix = None, use_json: Json = False
) -> int | None:
    """Show everything that Redis knows about a breaker.

    Exit code 1 when nothing is stored under this name.
    """
    fleet = _fleet(url, config, prefix)
    reading = fleet.read(name)
    if use_json:
        put_json(as_json(reading))
    else:
        out.print(clean(name), style="bold")
        put(pairs(details(reading, fleet.policy_of(name))))
        if not fleet.is_known(name):
            err.print(_unknown(fleet, name), style="yellow")
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
    """Show a live board, updated by notifications; its last line names the keys.

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
    root_path: Annotated[
        str, typer.Option(metavar="PATH", help="Path under which a proxy shows the page, and which it strips.")
    ] = "",
    health: Annotated[bool, typer.Option("--health", help="Answer /health, to everybody.")] = False,
) -> int | None:
    """Serve the operators' web page. It only reads, unless --write is given.

    --write needs --authorize, or a password in PYBREAKER_REDIS_WEB_PASSWORD: then browsers ask for a name and this
    password, and the name is the operator's.
    """
    from ._serve import serve as run

    fleet = _fleet(url, config, prefix)
    run(
        fleet.client,
        fleet.prefix,
        host,
        port,
        write=write,
        authorize=authorize,
        names=allow_host or (),
        health=health,
        root=root_path,
    )
    return DONE


@_command(app, "history")
def history(
    name: Name,
    url: Url = None,
    prefix: Prefix = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of entries.")] = 20,
    use_json: Json = False,
) -> int | None:
    """Show the last transitions of a breaker, and operators' actions, newest first."""
    entries = _fleet(url, None, prefix).breaker(name).history(count)
    if use_json:
        put_json([dataclasses.asdict(entry) for entry in entries])
    elif not entries:
        err.print(f"{clean(name)} has had no transition within the last day")
    for entry in () if use_json else entries:
        out.print(transition(entry, stamped=True))
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


class Act(NamedTuple):
    """What to do to a breaker once that is confirmed. question: asked before. on_policy: to its policy override."""

    question: str
    carry_out: Callable[[CircuitBreaker, str | None, str | None], None]
    may_create: bool = False
    on_policy: bool = False


def _acting(owner: typer.Typer, name: str, act: Act, help_: str) -> None:
    """Add a command that acts on a breaker which is known."""

    def run(
        name: Name,
        operator: Operator = None,
        note: Note = None,
        url: Url = None,
        prefix: Prefix = None,
        yes: Yes = False,
        use_json: Json = False,
    ) -> int | None:
        return _steer(_fleet(url, None, prefix), name, act, operator, note, yes=yes, use_json=use_json)

    run.__doc__ = help_
    _command(owner, name)(run)


def _forcing(
    name: str,
    question: str,
    carry_out: Callable[[CircuitBreaker, float | None, str | None, str | None], None],
    help_: str,
) -> None:
    """Add a command that forces a state. question: with a place for the length of time."""

    def run(
        name: Name,
        duration: For = None,
        operator: Operator = None,
        note: Note = None,
        create: Create = False,
        url: Url = None,
        prefix: Prefix = None,
        yes: Yes = False,
        use_json: Json = False,
    ) -> int | None:
        asked = question.format(span(duration or LONGEST_OPEN))
        act = Act(asked, lambda breaker, who, why: carry_out(breaker, duration, who, why), may_create=True)
        return _steer(_fleet(url, None, prefix), name, act, operator, note, create=create, yes=yes, use_json=use_json)

    run.__doc__ = help_
    _command(app, name)(run)


_forcing(
    "force-open",
    "Reject every call of the fleet for {}?",
    lambda breaker, duration, who, why: breaker.force_open(duration, operator=who, note=why),
    "Force the circuit open: reject every call of the fleet.",
)
_forcing(
    "force-closed",
    "Admit every call of the fleet, unprotected, for {}?",
    lambda breaker, duration, who, why: breaker.force_closed(duration, operator=who, note=why),
    "Force the circuit closed: admit every call of the fleet.",
)
_acting(
    app,
    "clear",
    Act("End the forced state?", lambda breaker, who, why: breaker.clear_forced(operator=who, note=why)),
    "End a forced state.\n\nA circuit forced open lets a probe through next; one forced closed stays closed.",
)
_acting(
    app,
    "probe",
    Act("Let the next call of the fleet probe now?", lambda breaker, who, why: breaker.probe(operator=who, note=why)),
    "Let the next call probe now, whatever is left of the open period.\n\nRefused while a state is forced.",
)
_acting(
    app,
    "reset",
    Act(
        "Close the circuit and forget all its counts and its policy override?",
        lambda breaker, who, why: breaker.reset(operator=who, note=why),
    ),
    "Close the circuit; forget all counts, forced states and the policy override.",
)


@_command(policy_app, "get")
def policy_get(
    name: Name, url: Url = None, config: ConfigFile = None, prefix: Prefix = None, use_json: Json = False
) -> int | None:
    """Show the known fields of the policy in force, and their sources.

    Sources: "override" is the policy override in Redis, "client" the file of --config, or else the processes that list
    themselves. With "default", these do not set the field; with "unknown", nobody has said what it is.
    """
    fleet = _fleet(url, config, prefix)
    _show_policy(fleet, name, from_file=config is not None, use_json=use_json)
    return DONE


def _show_policy(fleet: Fleet, name: str, *, from_file: bool = False, use_json: bool = False) -> None:
    from ._instances import known_policy, show_policy

    seen = fleet.read(name).snapshot
    key = keys_of(name, fleet.prefix).policy
    (left,) = checked(fleet.server.exchange([command("PTTL", key, key=key)]))
    show_policy(known_policy(fleet, seen, from_file), seen, left / 1000 if left > 0 else None, use_json)


@_command(policy_app, "set")
def policy_set(
    name: Name,
    fields: Annotated[
        list[str], typer.Argument(metavar="FIELD=VALUE...", help="Fields to set, as in reset_timeout=10s quorum=2.")
    ],
    duration: Annotated[
        float | None, typer.Option("--for", parser=seconds, metavar="TIME", help="Duration. Default: until cleared.")
    ] = None,
    operator: Operator = None,
    note: Note = None,
    create: Create = False,
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
    act = Act(
        f"Set {', '.join(f'{field}={value}' for field, value in given.items())} for the whole fleet{until}?",
        lambda breaker, who, why: breaker.set_policy(duration=duration, operator=who, note=why, **given),
        may_create=True,
        on_policy=True,
    )
    return _steer(_fleet(url, None, prefix), name, act, operator, note, create=create, yes=yes, use_json=use_json)


_acting(
    policy_app,
    "clear",
    Act(
        "End the policy override, so that every process follows its own policy?",
        lambda breaker, who, why: breaker.clear_policy(operator=who, note=why),
        on_policy=True,
    ),
    "End the policy override: each process follows its own policy.",
)


def _steer(
    fleet: Fleet,
    name: str,
    act: Act,
    operator: str | None,
    note: str | None,
    *,
    create: bool = False,
    yes: bool,
    use_json: bool,
) -> int:
    """Act on a breaker that is known, if the operator confirms the action, and then show the breaker."""
    who, why = _short("--operator", operator, LONGEST_OPERATOR) or _login_name(), _short("--note", note, LONGEST_NOTE)
    if not create and not fleet.is_known(name):
        err.print(_unknown(fleet, name) + ("; --create acts all the same" if act.may_create else ""), style="red")
        return WRONG
    if not yes:
        row, _ = fleet.row(name)
        typer.confirm(f"{clean(name)} is {CONDITIONS[row.condition]}. {act.question}", abort=True, err=True)
    act.carry_out(fleet.breaker(name), who, why)
    if use_json:
        put_json(as_json(fleet.read(name)))
    elif act.on_policy:
        _show_policy(fleet, name)
    else:
        row, now = fleet.row(name)
        fits = layout(out.width if out.is_terminal else None, [name], fleet.knows_policies)
        put([fits.heading(), fits.line(row, Known(now, fleet.policy_of))])
    return DONE


def _short(option: str, text: str | None, most: int) -> str | None:
    if text and len(text) > most:
        raise typer.BadParameter(f"must be at most {most} characters, not {len(text)}", param_hint=option)
    return text


def _login_name() -> str | None:
    """The name under which the operator logged in, also under sudo; else that of the process's user."""
    for name in (os.getlogin, getpass.getuser):
        with contextlib.suppress(OSError, KeyError, ImportError):  # no terminal, no such user, no such module
            return name()
    return None


def _unknown(fleet: Fleet, name: str) -> str:
    """What to say of a name under which nothing is stored."""
    close = [clean(one) for one in difflib.get_close_matches(name, set(fleet.names()), n=3)]
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"nothing is stored under the name {clean(name)} and the prefix {clean(fleet.prefix)}{meant}"


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
    generation = fleet.read(name).snapshot.generation
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
