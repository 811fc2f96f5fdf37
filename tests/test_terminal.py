"""The program on a terminal: boards that fit, keys, questions, and a terminal that is as it was before."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis
from conftest import wait_until
from terminals import Terminal

from pybreaker_redis import Policy
from pybreaker_redis.embedded import EmbeddedServer

pytest.importorskip("typer", reason="needs the extra cli")
pytest.importorskip("rich", reason="needs the extra cli")
import rich.text
from rich.cells import cell_len
from test_cli import HOSTILE, fail, fill, make

from pybreaker_redis import _reader
from pybreaker_redis.cli import _watch
from pybreaker_redis.cli._fleet import Fleet
from pybreaker_redis.cli._table import cut, summary
from pybreaker_redis.cli._terminal import key_names

SIZES = [(80, 24), (60, 20), (160, 50), (40, 10)]


@pytest.fixture
def terminal(server: EmbeddedServer, client: redis.Redis) -> Iterator[Callable[..., Terminal]]:
    """Starts the program on a terminal of its own."""
    started: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        started.append(Terminal(options.pop("url", server.url), *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture
def fleet(client: redis.Redis) -> redis.Redis:
    """A fleet of 300 with every condition, and names that no terminal likes."""
    fill(client, 285)
    fail(client, "checkout")
    make(client, "payments").acquire().failure(OSError("busy"), retry_after=300)
    make(client, "search-gateway-of-the-second-region-in-the-west").force_open(600, operator="ann", note="moving")
    make(client, "shipping").force_closed(5 * 3600, operator="bob", note="false alarm")
    half = make(client, "mail", Policy(failure_threshold=1, reset_timeout=0.001))
    half.acquire().failure()
    time.sleep(0.01)
    half.acquire().release()
    make(client, "billing").set_policy(quorum=2, operator="eve")
    make(client, "billing").acquire().success()
    for name in HOSTILE:
        fail(client, name)
    client.set("circuit_breaker:odd:state", "no document")
    return client


NEEDED = [  # the beginning of a name, state, until, and why
    ("checkout", "open", r"\d+ s", "failures in a "),
    ("payments", "held", r"\d m", "the service"),
    ("sear", "forced open", r"\d+ m", "by ann"),
    ("shipping", "forced closed", r"\d h", "by bob"),
    ("mail", "half open", "-", "the open "),
]


def check_rows(lines: list[str], size: tuple[int, int]) -> None:
    """Each line fits, and the lines of breakers that are not closed show state, until and why."""
    assert all(cell_len(line) <= size[0] for line in lines), [line for line in lines if cell_len(line) > size[0]]
    for name, state, until, why in NEEDED:
        pattern = rf"^(> |  )?{name}\S*\s+{state}\s+{until}\s.*{why if size[0] >= 60 else ''}"
        assert any(re.search(pattern, line) for line in lines), (name, lines)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_list_fits(size: tuple[int, int], terminal: Callable[..., Terminal], fleet: redis.Redis) -> None:
    """As wide as the terminal, one line for each breaker, the urgent ones first, and a summary at the end."""
    shown = terminal("list", size=size)
    assert shown.process.wait(20) == 0
    wait_until(lambda: "closed" in shown.text.splitlines()[-1])
    lines = shown.text.splitlines()
    check_rows(lines, size)
    closed = [number for number, line in enumerate(lines) if re.search(r"\sclosed\s", line)]
    assert closed[0] > max(number for number, line in enumerate(lines) if " open " in line)
    summary = " ".join(lines).partition("298 breakers: ")[2]
    assert re.fullmatch(r"\d open, 1 half open, 1 held, 2 forced, 1 policy override, 287 closed", summary)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_watch_fits(size: tuple[int, int], terminal: Callable[..., Terminal], fleet: redis.Redis) -> None:
    """The board fills the terminal and no more: summary, rows, and the keys in the last line."""
    shown = terminal("watch", size=size)
    wait_until(lambda: shown.shows("298 breakers"))
    shown.type("f" if size[1] < 20 else "")  # only the open ones: all of them fit
    wait_until(lambda: len(shown.frame) == size[1])
    lines = shown.frame
    assert all(cell_len(line) <= size[0] for line in lines)
    assert lines[-1].startswith("q quit")
    if size[1] >= 20:
        check_rows(lines, size)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 9), (300, 1), (3, 3)], ids=str)
def test_a_tiny_terminal(size: tuple[int, int], terminal: Callable[..., Terminal], fleet: redis.Redis) -> None:
    """No size ends the program, and nothing is wider or higher than the terminal."""
    shown = terminal("watch", size=size)
    wait_until(lambda: shown.frame)
    for keys in ("jj\r", "\x1b", "/a\rsf"):
        count = shown.raw.count("\x1b[H")
        shown.type(keys)
        wait_until(lambda seen=count: shown.raw.count("\x1b[H") > seen + 1)
        assert all(cell_len(line) <= size[0] for line in shown.frame)
        assert len(shown.frame) <= size[1]
    assert shown.process.poll() is None


def test_a_width_of_zero() -> None:
    """The environment may name it."""
    assert "".join(summary({"open": 1}, 1, 0)) == "1breaker:1open"


def test_watch_follows(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """A trip and what an operator does appear by themselves: in the counts, in the rows and as the last changes."""
    fill(client, 50)
    shown = terminal("watch", size=(120, 30))
    wait_until(lambda: shown.shows("50 breakers: 50 closed"))
    fail(client, "discovery")
    wait_until(lambda: shown.shows("51 breakers: 1 open, 50 closed"))
    wait_until(lambda: any(re.search(r"discovery  closed -> open  failure_threshold", line) for line in shown.frame))
    make(client, "discovery").set_policy(quorum=2, operator="ann", note="two hosts")
    wait_until(lambda: shown.shows("set_policy  by ann: two hosts  quorum=2"))
    assert re.match(r"> discovery +open +\d+ s", shown.frame[3])


def test_names_that_are_watched(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """Only the named breakers are shown; one that nobody has used yet is named, and appears once somebody does."""
    fill(client, 50)
    shown = terminal("watch", "service-7", "discovery")
    wait_until(lambda: shown.shows("nothing is stored under discovery"))
    fail(client, "discovery")
    wait_until(lambda: shown.shows("2 breakers: 1 open, 1 closed") and not shown.shows("nothing is stored"))


def first_rows(shown: Terminal, count: int) -> list[str]:
    """The names in the first rows of a board."""
    heading = next(number for number, line in enumerate(shown.frame) if line.startswith("  NAME"))
    return [line[2:].split()[0] for line in shown.frame[heading + 1 : heading + 1 + count] if line.strip()]


def test_keys(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """Keys sort, filter, search, scroll, open one breaker and quit."""
    fill(client, 60)
    fail(client, "zebra")
    make(client, "yak", Policy(failure_threshold=9)).acquire().failure()
    make(client, "xerus").force_open(600, operator="ann", note="moving")
    shown = terminal("watch")
    wait_until(lambda: shown.shows("1 of 63  by urgency") and first_rows(shown, 3) == ["zebra", "xerus", "yak"])
    shown.type("s")
    wait_until(lambda: shown.shows("by name") and first_rows(shown, 2) == ["service-0", "service-1"])
    shown.type("s")
    wait_until(lambda: shown.shows("by failures in a row") and set(first_rows(shown, 2)) == {"zebra", "yak"})
    shown.type("SS")
    wait_until(lambda: shown.shows("by urgency"))
    shown.type("f")
    wait_until(lambda: shown.shows("1 of 1  by urgency  open") and first_rows(shown, 5) == ["zebra"])
    shown.type("f")
    wait_until(lambda: shown.shows("1 of 1  by urgency  forced") and first_rows(shown, 5) == ["xerus"])
    shown.type("\x1b")
    wait_until(lambda: shown.shows("1 of 63  by urgency"))
    shown.type("/ebrx\x7f")
    wait_until(lambda: shown.shows("/ebr_") and first_rows(shown, 5) == ["zebra"])
    shown.type("\r")
    wait_until(lambda: shown.shows("/ebr") and not shown.shows("/ebr_"))
    shown.type("\x1b")
    wait_until(lambda: shown.shows("1 of 63"))
    shown.type("\x1b[B")
    wait_until(lambda: shown.shows("2 of 63") and shown.shows("> xerus"))
    shown.type("\r")
    wait_until(lambda: shown.shows("open, forced for") and shown.frame[0] == "xerus")
    assert shown.shows("moving")
    assert any(re.search(r"closed -> open +forced +by ann: moving", line) for line in shown.frame)
    shown.type("\x1b[A")
    wait_until(lambda: shown.frame[0] == "zebra")
    shown.type("h")
    wait_until(lambda: shown.shows("> zebra"))
    shown.type("G")
    wait_until(lambda: shown.shows("63 of 63"))
    shown.type("\x1b[5~\x1b[1~")
    wait_until(lambda: shown.shows("1 of 63"))
    shown.type("q")
    assert shown.process.wait(20) == 0
    wait_until(shown.is_restored)


def test_a_row_that_moves_stays_chosen(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """Somebody who reads a row keeps it, though others come before it."""
    fill(client, 5)
    shown = terminal("watch")
    wait_until(lambda: shown.shows("1 of 5"))
    shown.type("jj")
    wait_until(lambda: shown.shows("3 of 5"))
    [chosen] = [line for line in shown.frame if line.startswith("> ")]
    fail(client, "discovery")
    wait_until(lambda: shown.shows("4 of 6"))
    assert [line.split()[1] for line in shown.frame if line.startswith("> ")] == [chosen.split()[1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored(
    number: signal.Signals, terminal: Callable[..., Terminal], client: redis.Redis
) -> None:
    """Whatever ends the program, the terminal is as it was before."""
    shown = terminal("watch")
    wait_until(lambda: shown.shows("0 breakers"))
    assert termios.tcgetattr(shown.theirs) != shown.before
    shown.process.send_signal(number)
    assert shown.process.wait(20) == 128 + number
    wait_until(shown.is_restored)


def test_a_suspended_program(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """Ctrl-Z gives the terminal back; afterwards the board goes on."""
    shown = terminal("watch")
    wait_until(lambda: shown.shows("0 breakers"))
    for round_ in range(2):
        shown.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(shown.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        wait_until(shown.is_restored)
        fail(client, f"discovery-{round_}")
        shown.process.send_signal(signal.SIGCONT)
        wait_until(lambda: shown.shows("breaker") and not shown.is_restored())
        wait_until(lambda seen=f"{round_ + 1} open": shown.shows(seen))
    shown.type("q")
    assert shown.process.wait(20) == 0


def test_without_keys(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """Without a terminal on standard input the board is shown all the same, and goes on."""
    fail(client, "discovery")
    shown = terminal("watch", stdin=subprocess.DEVNULL)
    wait_until(lambda: shown.shows("1 breaker: 1 open"))
    fail(client, "auth")
    wait_until(lambda: shown.shows("2 breakers: 2 open"))
    shown.process.send_signal(signal.SIGINT)
    assert shown.process.wait(20) == 130
    wait_until(shown.is_restored)


def test_a_server_that_goes_and_comes_back(terminal: Callable[..., Terminal]) -> None:
    """While Redis is away the board says so, and keys work; then it goes on."""
    with EmbeddedServer(port=0) as server, redis.Redis.from_url(server.url) as client:
        number = int(server.url.rpartition(":")[2])
        fail(client, "discovery")
        shown = terminal("watch", url=server.url)
        wait_until(lambda: shown.shows("1 breaker: 1 open"))
    wait_until(lambda: shown.shows("Redis does not answer, trying again"))
    shown.type("s\r")
    wait_until(lambda: shown.shows("esc back"))
    shown.type("\x1b")
    wait_until(lambda: shown.shows("by name"))
    with EmbeddedServer(port=number) as server, redis.Redis.from_url(server.url) as client:
        fail(client, "auth")
        wait_until(lambda: first_rows(shown, 2) == ["auth"] and not shown.shows("trying again"))
    shown.type("q")
    assert shown.process.wait(20) == 0


def test_a_board_that_nothing_changes_stays(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The board is not taken for unused while it is looked at, though no key is pressed and nothing happens."""
    monkeypatch.setattr(_reader, "LINGER", 0.3)
    fill(client, 5)
    watched = _watch._Watched(Fleet(client, "circuit_breaker", lambda name: None), ())
    frames: list[str] = []

    class Looked:
        def read(self, seconds: float) -> list[str]:
            time.sleep(seconds)
            return []

        def show(self, lines: Sequence[rich.text.Text]) -> None:
            frames.append("\n".join(line.plain for line in lines))

    _watch._View(watched, Looked()).run(time.monotonic() + 4)  # type: ignore[arg-type]
    first = next(number for number, frame in enumerate(frames) if "5 breakers" in frame)
    assert len(frames) > first + 2
    assert all("5 breakers" in frame for frame in frames[first:])


def test_without_the_right_to_subscribe(terminal: Callable[..., Terminal], own_server: EmbeddedServer) -> None:
    """Without that right the board says that it is read every few seconds."""
    with redis.Redis.from_url(own_server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "me", "on", ">secret", "~*", "resetchannels", "+@all")
        fail(admin, "discovery")
        shown = terminal("watch", url=own_server.url.replace("unix://", "unix://me:secret@"))
        wait_until(lambda: shown.shows("no right to subscribe"))
        make(admin, "discovery").reset()
        wait_until(lambda: shown.shows("1 breaker: 1 closed"))


def test_hostile_texts_on_a_terminal(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """Control characters in names, errors, notes and messages reach no terminal, from a board or an opened breaker."""
    for name in HOSTILE:
        fail(client, name).force_open(600, operator=name, note=name)
    shown = terminal("watch", size=(80, 40))
    wait_until(lambda: shown.shows(f"{len(HOSTILE)} breakers"))
    entry = {"from": "closed", "to": "closed", "generation": 1, "failure_count": 0, "success_count": 0}
    entry |= {"reason": "\x1b[31m", "instance": "\u202e"}
    client.publish("circuit_breaker:x:state", json.dumps({**entry, "time_ms": 1e20}))
    client.publish("circuit_breaker:\x1b[2J:state", json.dumps({**entry, "time_ms": 1}))
    wait_until(lambda: shown.shows(r"\x1b[31m  by \x202e"))
    for _ in HOSTILE:
        shown.type("\r")
        wait_until(lambda: shown.shows("esc back"))
        shown.type("\x1b[B\x1b")
        wait_until(lambda: shown.shows("q quit  \u2191\u2193 move"))
    ours = re.sub(r"\x1b\[(\?1049[hl]|\?25[hl]|[0-9;]*m|H|J|K)", "", shown.raw)
    assert all(letter.isprintable() or letter in "\r\n" for letter in ours)


def test_a_question_on_a_terminal(terminal: Callable[..., Terminal], client: redis.Redis) -> None:
    """On a terminal it asks, waits for the answer, and carries it out."""
    fail(client, "discovery")
    shown = terminal("reset", "discovery", size=(140, 30))
    question = "discovery is open. Close the circuit and forget all its counts and its policy override? [y/N]"
    wait_until(lambda: question in shown.text)
    shown.type("y\n")
    assert shown.process.wait(20) == 0
    wait_until(lambda: re.search(r"discovery +closed", shown.text))


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        ("q", ["q"]),
        ("\x1b[A\x1bOBjk", ["up", "down", "j", "k"]),
        ("\x1b", ["escape"]),
        ("\x1b\x1b[5~", ["escape", "page up"]),
        ("\r\n\x7f\x08", ["enter", "enter", "backspace", "backspace"]),
        ("\x1b[H\x1b[4~", ["home", "end"]),
        ("é", ["é"]),
        ("\x1b[200~\x00\x04", []),  # none that it knows
    ],
)
def test_keys_of_terminals(sent: str, keys: list[str]) -> None:
    """What terminals send for a key, in either mode, has one name."""
    assert key_names(sent) == keys


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("payments", 8, "payments"),
        ("payments-eu-west-1", 9, "paym…st-1"),
        ("payments-eu-west-1", 2, "p…"),
        ("payments-eu-west-1", 1, "…"),
        ("payments-eu-west-1", 0, ""),
        ("\u6f22\u5b57\u6f22\u5b57\u6f22\u5b57", 7, "\u6f22…\u5b57"),
    ],
)
def test_long_names_lose_their_middle(text: str, width: int, shown: str) -> None:
    """A long name keeps its beginning and its end; letters may be two cells wide."""
    assert cut(text, width, middle=True) == shown
    assert cell_len(shown) <= width
