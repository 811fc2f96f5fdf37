"""The board: what it reads of many breakers, how it words, orders, counts and filters them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import time
from collections.abc import Iterator

import pytest
import redis
from conftest import lua_machine, no_threads, wait_until

from pybreaker_redis import CircuitBreaker, Policy, _reader
from pybreaker_redis._board import (
    CONDITIONS,
    Row,
    Stored,
    clean,
    counts,
    outlook,
    read_stored,
    row_of,
    select,
    span,
    urgency,
    why,
)
from pybreaker_redis._protocol import keys_of
from pybreaker_redis._reader import BoardReader
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.sync import Server
from pybreaker_redis.wire.url import client_from_url

POLICY = Policy(failure_threshold=2, reset_timeout=60, error_rate_threshold=0.9)


class Boom(Exception):
    """What a guarded function raises."""


@pytest.fixture
def reader(client: redis.Redis) -> Server:
    """Reads the tests' server."""
    return Server.of(client, 5.0)


def fail(breaker: CircuitBreaker, times: int, message: str = "refused") -> None:
    """So many failing calls."""

    def failing() -> None:
        raise Boom(message)

    for _ in range(times):
        with contextlib.suppress(Boom):
            breaker.call(failing)


def make(client: redis.Redis, name: str, policy: Policy = POLICY) -> CircuitBreaker:
    """A breaker that asks Redis at every call."""
    return CircuitBreaker(name, redis=client, policy=policy, lease=0, redis_timeout=20)


def rows(reader: Server, prefix: str = "circuit_breaker") -> dict[str, Row]:
    """All rows by name."""
    found = (row_of(one, prefix) for chunk in read_stored(reader, prefix) for one in chunk)
    return {row.name: row for row in found}


def test_every_condition_is_shown(client: redis.Redis, reader: Server) -> None:
    """Closed, open, half open, held, both forced states and an unreadable value are told apart, with why and until."""
    make(client, "closed").call(int)
    fail(make(client, "open"), 2)
    half = make(client, "half", Policy(failure_threshold=1, reset_timeout=0.001))
    fail(half, 1)
    time.sleep(0.01)
    probe = half.acquire()
    make(client, "held").acquire().failure(Boom("busy"), retry_after=30)
    make(client, "forced-open").force_open(100)
    make(client, "forced-closed").force_closed(100)
    client.set(keys_of("odd").state, "no document")
    found, now = rows(reader), time.time()
    probe.release()
    assert {name: row.condition for name, row in found.items()} == {
        "closed": "closed",
        "open": "open",
        "half": "half_open",
        "held": "held",
        "forced-open": "forced_open",
        "forced-closed": "forced_closed",
        "odd": "unreadable",
    }
    assert why(found["open"]) == "failures in a row: Boom: refused"
    assert outlook(found["open"], found["open"].since or 0) == "probe in 60 s"
    assert outlook(found["open"], now + 60) == "probe is due"
    assert outlook(found["forced-open"], found["forced-open"].since or 0) == "ends in 100 s"
    assert outlook(found["closed"], now) == outlook(found["half"], now) == why(found["closed"]) == ""
    assert (found["half"].probes, found["open"].failures) == (1, 2)
    assert all(now - 100 < (row.since or 0) < now + 100 for name, row in found.items() if name != "odd")
    assert (found["open"].sums(now), found["closed"].sums(now)) == ((0, 0, 0), (1, 0, 0))


def test_a_forced_state_that_has_ended_is_none(client: redis.Redis, reader: Server) -> None:
    """After the end of a forced state, the row shows what the next caller finds: closed, or a probe that is due."""
    make(client, "was-closed").force_closed(0.001)
    make(client, "was-open").force_open(0.001)
    time.sleep(0.01)
    found = rows(reader)
    assert (found["was-closed"].condition, found["was-open"].condition) == ("closed", "open")
    assert outlook(found["was-open"], time.time() + 1) == "probe is due"


def test_a_policy_override_is_shown_with_its_end(client: redis.Redis, reader: Server) -> None:
    """The override's fields and end are in the row; shadow mode is a group of its own; an ended override is gone."""
    make(client, "a").set_policy(duration=100, failure_threshold=7)
    make(client, "a").call(int)
    make(client, "b").set_policy(enforce=False)
    make(client, "b").call(int)
    client.set(keys_of("c").policy, json.dumps({"failure_threshold": 7, "until_ms": 1}))
    make(client, "c").call(int)
    client.set(keys_of("d").policy, json.dumps({"unknown": 7}))
    client.set(keys_of("e").policy, json.dumps({"quorum": 2, "operator": "ann", "note": "two hosts"}))
    make(client, "e").call(int)
    make(client, "d").call(int)
    found = rows(reader)
    assert found["a"].override == {"failure_threshold": 7}
    assert 90 < (found["a"].override_until or 0) - time.time() < 110
    assert found["b"].shadow
    assert (found["a"].groups, found["b"].groups) == (("closed", "override"), ("closed", "shadow", "override"))
    assert (found["e"].override, found["e"].override_operator, found["e"].override_note) == (
        {"quorum": 2},
        "ann",
        "two hosts",
    )
    assert found["c"].groups == found["d"].groups == ("closed",)
    assert counts(found.values()) == {
        "open": 0,
        "half_open": 0,
        "held": 0,
        "forced": 0,
        "shadow": 1,
        "override": 3,
        "closed": 5,
    }


def test_counts_of_the_window_leave_it_with_time(client: redis.Redis, reader: Server) -> None:
    """Calls count while the window holds them, and no longer, though nobody has written the document since."""
    breaker = make(client, "discovery", Policy(window=60, error_rate_threshold=0.9, failure_threshold=100))
    fail(breaker, 2)
    breaker.call(int)
    row, now = rows(reader)["discovery"], time.time()
    assert row.sums(now) == (3, 2, 0)
    assert row.sums(now + 60) == (0, 0, 0)
    assert (row.health(now), row.health(now + 60)) == (33, 100)


def test_health_and_trips_are_those_of_the_scripts(client: redis.Redis, reader: Server) -> None:
    """What the rows compute without a script is what the snapshot script says."""
    again = make(client, "again", Policy(failure_threshold=1, reset_timeout=0.001, success_threshold=2))
    for _ in range(3):
        fail(again, 1)
        time.sleep(0.01)
    again.call(int)
    fail(make(client, "failing"), 1)
    recovered = make(client, "recovered", Policy(failure_threshold=1, reset_timeout=0.001))
    fail(recovered, 1)
    time.sleep(0.01)
    recovered.call(int)
    make(client, "override").set_policy(failure_threshold=50)
    fail(make(client, "override"), 10)
    found, now = rows(reader), time.time()
    for name, row in found.items():
        seen = make(client, name, Policy()).snapshot()
        assert (row.health(now), row.recent_trips(now)) == (seen.health, seen.trips), name
    assert found["recovered"].recent_trips(now + 3600) == 0


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"state":7}',
        b'{"state":"broken"}',
        b'{"state":"open","failure_count":-1}',
        b'{"state":"open","success_count":true}',
        b'{"state":"open","last_failure_time":1.5}',
        b'{"state":"open","opened_at":[]}',
        b'{"state":"open","opened_at":9e13}',
        b' {"state":"open"}',
        b'{"state":"open","x":"\\ud800"}',
        '{"state":"open"}'.encode("utf-16-le"),
        b'{"state":"open","x":"' + b"x" * 65536 + b'"}',
        b"[" * 60000,
        b'{"state":"open","a":' + b"[" * 60000,
    ],
)
def test_a_value_that_is_no_document_is_unreadable(client: redis.Redis, reader: Server, stored: bytes) -> None:
    """Whatever another program wrote, the board shows the breaker and goes on. The scripts cannot read it either."""
    client.set(keys_of("odd").state, stored)
    assert rows(reader)["odd"].condition == "unreadable"
    seen = make(client, "odd").snapshot()
    assert (seen.state, seen.generation) == ("closed", 0)


CONTRACT = {"state": "open", "failure_count": 2, "success_count": 0, "last_failure_time": 1, "opened_at": 1}
ODD_VALUES = (None, 0, 2.0, 9e10, 9e10 + 1, 1.5, -1, float("nan"), "1", "closed", "ajar", True, [], {})


@pytest.mark.parametrize("field", CONTRACT)
@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_what_is_unreadable_is_so_for_the_scripts(
    client: redis.Redis, reader: Server, field: str, value: object
) -> None:
    """The board and the scripts have one rule for the contract fields: what one refuses, the other refuses, too."""
    client.set(keys_of("odd").state, json.dumps({**CONTRACT, field: value}))
    refused = lua_machine(client, "odd").run("snapshot").get("warning") == "corrupt_document"
    assert (rows(reader)["odd"].condition == "unreadable") is refused


def test_text_that_is_not_utf_8_is_shown(client: redis.Redis, reader: Server) -> None:
    """The scripts read such a document, so the board does, too."""
    client.set(keys_of("odd").state, b'{"state":"open","x":"\xff\n\x01","failure_count":2.0,"opened_at":null}')
    assert (rows(reader)["odd"].condition, rows(reader)["odd"].failures) == ("open", 2)
    assert make(client, "odd").snapshot().failure_count == 2


ODD_OVERRIDES = [
    {"failure_threshold": value} for value in ("x", None, 0, 10**9 + 1, 5.5, float("nan"), True, [1], {})
] + [
    {"enforce": 0},
    {"unknown": 1},
    {"jitter": 1.5},
    {"error_rate_threshold": False},
    {"reset_timeout_ms": 0},
    {"reset_timeout_ms": 1.5},
    {"failure_threshold": 3, "until_ms": None},
    {"failure_threshold": 3, "until_ms": True},
    {"failure_threshold": 3, "until_ms": 1.5},
    {"failure_threshold": 3, "until_ms": 1},
    {"failure_threshold": 3, "note": "\ud800"},
]
SOUND_OVERRIDES: list[dict[str, object]] = [
    {"failure_threshold": 1e9, "failures_in_window": 0, "jitter": 0.5, "enforce": False},
    {"error_rate_threshold": 0, "slow_call_duration_ms": 0, "max_hold_ms": 0, "window_ms": 10},
    {"failure_threshold": 3, "until_ms": 4e12, "operator": 7, "note": None},
]


@pytest.mark.parametrize("stored", [*ODD_OVERRIDES, *SOUND_OVERRIDES], ids=json.dumps)
def test_only_the_overrides_that_the_scripts_obey_are_shown(
    client: redis.Redis, reader: Server, stored: dict[str, object]
) -> None:
    """An override with a value that the scripts refuse is not in force, for the board as for the breakers."""
    breaker = make(client, "odd")
    breaker.call(int)
    client.set(breaker.keys.policy, json.dumps(stored))
    (row,) = rows(reader).values()
    assert bool(row.override) == (stored in SOUND_OVERRIDES)
    in_force = [name for name, source in breaker.snapshot().policy_sources.items() if source == "override"]
    assert len(row.override) == len(in_force)
    assert row.health(time.time()) == 100


def test_fields_that_make_no_sense_are_absent(client: redis.Redis, reader: Server) -> None:
    """Fields of a wrong type or size are dropped one by one; the state stays."""
    odd = {"changed_at_ms": "x", "generation": True, "open_until_ms": 1e300, "trips": 1.5}
    odd |= {"reason": "<b>", "error": 5, "operator": {}, "note": "n" * 1000, "probes": [1], "window": {"newest": "x"}}
    client.set(keys_of("odd").state, json.dumps({"state": "open", **odd}))
    client.lpush(keys_of("list").state, "no string")
    found = rows(reader)
    assert found == {
        "odd": Row("odd", "open", note="n" * 200, window={"newest": "x"}, key=b"circuit_breaker:odd:state")
    }
    assert found["odd"].sums(time.time()) == (0, 0, 0)


HUGE = "1" + "0" * 350


@pytest.mark.parametrize(
    "override",
    [
        '{"failure_threshold":"7"}',
        '{"failure_threshold":[7]}',
        '{"failure_threshold":null}',
        '{"failure_threshold":0}',
        '{"failure_threshold":1.5}',
        '{"failure_threshold":true}',
        f'{{"failure_threshold":{HUGE}}}',
        '{"reset_timeout_ms":1e999}',
        '{"enforce":1}',
        '{"unknown":7}',
        "{}",
        "no document",
        '{"quorum":2,"until_ms":"x"}',
        '{"quorum":2,"until_ms":null}',
        '{"quorum":2,"until_ms":1}',
        '{"quorum":2,"until_ms":1e18}',
        f'{{"quorum":2,"until_ms":{HUGE}}}',
        '{"quorum":2,"until_ms":80000000000000}',
        '{"failures_in_window":0,"max_reset_timeout_ms":0,"error_rate_threshold":0.5,"enforce":false}',
        '{"window_ms":10,"jitter":1,"reset_timeout_ms":1}',
    ],
    ids=lambda text: text[:60],
)
def test_an_override_counts_where_the_scripts_accept_it(client: redis.Redis, reader: Server, override: str) -> None:
    """A policy override that another program wrote is on the board if breakers obey it, and harms no other row."""
    breaker = make(client, "odd", Policy())
    breaker.call(int)
    client.set(keys_of("odd").policy, override)
    sources = breaker.snapshot().policy_sources
    row, now = rows(reader)["odd"], time.time()
    assert bool(row.override) == ("override" in sources.values())
    assert (row.health(now), row.recent_trips(now)) == (100, 0)


def test_times_that_no_calendar_has_are_absent(client: redis.Redis, reader: Server) -> None:
    """A time beyond what the scripts store counts as unknown."""
    client.set(keys_of("odd").state, json.dumps({"state": "open", "opened_at": 9e13}))
    assert rows(reader)["odd"].since is None


def test_names_of_other_prefixes_and_odd_bytes(client: redis.Redis, reader: Server) -> None:
    """Only the prefix's own breakers are read, whatever is special in patterns; a name need not be UTF-8."""
    for prefix in ("a[b]*?", "a"):
        CircuitBreaker("n", redis=client, prefix=prefix, lease=0).call(int)
    client.set(b"a[b]*?:\xff:state", client.get(keys_of("n", "a").state))
    assert rows(reader, "a[b]*?").keys() == {"n", "\\xff"}


def test_the_most_urgent_breaker_comes_first() -> None:
    """Open before half open before held before forced; then those with an override or failures; the latest first."""
    wanted = [
        *(Row(condition, condition) for condition in CONDITIONS if condition != "closed"),
        Row("override", "closed", override={"quorum": 2}),
        Row("failing", "closed", failures=1),
        Row("late", "closed", since=5),
        Row("a", "closed", since=4),
        Row("b", "closed", since=4),
        Row("never", "closed"),
    ]
    assert sorted([*wanted[5:], *wanted[:5]], key=urgency) == wanted


def test_rows_are_selected_by_group_and_by_name() -> None:
    """A group and a part of the name, in any case, select together."""
    found = [Row("Payments EU", "open"), Row("payments us", "closed"), Row("search", "open")]
    assert [row.name for row in select(found, search="PAYM")] == ["Payments EU", "payments us"]
    assert [row.name for row in select(found, "open")] == ["Payments EU", "search"]
    assert [row.name for row in select(found, "open", "eu")] == ["Payments EU"]


def test_an_operator_and_a_note_explain_the_condition() -> None:
    """Who acted and why come before the reason of the transition."""
    assert why(Row("n", "forced_open", reason="forced", operator="ann", note="deploy")) == "by ann: deploy"
    assert why(Row("n", "forced_open", reason="forced", note="deploy")) == "deploy"
    assert why(Row("n", "forced_open", reason="forced")) == "forced"
    assert why(Row("n", "half_open", reason="timeout", error="OSError: no")) == "opened by OSError: no"
    assert why(Row("n", "open", reason="of_a_later_version")) == "of_a_later_version"


def test_control_characters_are_shown_not_obeyed() -> None:
    """Escape sequences and marks that turn text around are spelled out; letters of every script stay."""
    assert clean("\x1b[2Ja\u202eb\n\u05d0 é") == r"\x1b[2Ja\x202eb\x0a" + "\u05d0 é"


def test_lengths_of_time_are_short() -> None:
    """Two digits and a unit are enough for people."""
    assert list(map(span, (0.04, 9.9, 10, 119, 120, 7199, 7200, 172800))) == [
        "0.0 s", "9.9 s", "10 s", "119 s", "2 m", "120 m", "2 h", "2 d",
    ]  # fmt: skip


def test_ten_thousand_breakers_cost_the_server_little(own_server: EmbeddedServer) -> None:
    """10,000 breakers are read by some twenty SCAN and MGET each, and by no script."""
    with redis.Redis.from_url(own_server.url) as client:
        make(client, "model").call(int)
        document = client.get(keys_of("model").state)
        client.mset({keys_of(f"service-{number}").state: document for number in range(10_000)})
        client.config_resetstat()
        assert len(rows(Server.of(client, 5.0))) == 10_001
        used = {name: spent["calls"] for name, spent in client.info("commandstats").items()}
    assert not used.keys() & {"cmdstat_evalsha", "cmdstat_eval", "cmdstat_get"}
    assert used["cmdstat_mget"] <= 30
    assert used["cmdstat_scan"] <= 30


def test_a_cluster_is_read_node_by_node(cluster_url: str) -> None:
    """The board of a cluster has the breakers of every node once."""
    client = client_from_url(cluster_url)
    names = {f"breaker-{number}" for number in range(30)}
    for name in names:
        CircuitBreaker(name, redis=client, prefix="board", lease=0, redis_timeout=20).call(int)
    assert rows(Server.of(client, 5.0), "board").keys() == names


# The reader


@pytest.fixture
def board_reader(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[BoardReader]:
    """A reader whose thread ends with the test."""
    made = BoardReader(client, "circuit_breaker")
    yield made
    monkeypatch.setattr(_reader, "LINGER", 0.0)
    wait_until(lambda: not made.is_running)


def test_a_trip_while_all_breakers_are_read_is_not_undone(
    client: redis.Redis, board_reader: BoardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document that was found before the trip does not replace the one that its notification was about."""
    breaker = make(client, "api")
    breaker.call(int)
    read, once = _reader.read_stored, iter([True])

    def read_slowly(server: Server, prefix: str) -> Iterator[list[Stored]]:
        yield from read(server, prefix)
        if board_reader.board.is_read and next(once, False):
            fail(breaker, 2)
            time.sleep(0.3)  # by now the notification has come
            yield []
            late.set()

    late = threading.Event()
    monkeypatch.setattr(_reader, "read_stored", read_slowly)
    monkeypatch.setattr(_reader, "SHORTEST_PAUSE", 0.1)
    monkeypatch.setattr(_reader, "SHARE", 1.0)
    board, seen = board_reader.current(), []
    while not late.is_set() or len(seen) < 5:
        board = board_reader.changed(board, 5.0)
        seen.append(board.rows[0].condition)
    first = seen.index("open")
    assert set(seen[first:]) == {"open"}


def test_no_thread_can_start(client: redis.Redis, board_reader: BoardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The board says so at once, and does not change until a thread starts."""
    make(client, "api").call(int)
    with monkeypatch.context() as patch:
        no_threads(patch)
        board = board_reader.current()
        assert (board.error, board.is_read) == ("no thread can start to read the board", False)
        assert board_reader.changed(board, 0.05) is board
    assert [row.name for row in board_reader.changed(board, 5.0).rows or board_reader.current().rows] == ["api"]


def test_a_viewer_that_comes_as_the_thread_ends_gets_a_board(
    client: redis.Redis, board_reader: BoardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks while the thread decides that nobody is left gets what another thread reads."""
    make(client, "api").call(int)
    monkeypatch.setattr(_reader, "LINGER", 0.0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        boards = list(pool.map(lambda _: board_reader.current(), range(40)))
    assert {board.rows[0].name for board in boards if board.is_read} == {"api"}
    assert all(board.is_read for board in boards)


def test_breakers_in_sight_are_read_again_without_a_notification(
    client: redis.Redis, board_reader: BoardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second, however seldom all breakers are read."""
    breaker = make(client, "api")
    breaker.call(int)
    monkeypatch.setattr(_reader, "SHORTEST_PAUSE", 600.0)
    monkeypatch.setattr(_reader, "LONGEST_PAUSE", 600.0)
    board = board_reader.current()
    board_reader.in_sight = [board.rows[0].key]
    breaker.call(int)  # counts in the window, which is no transition
    wait_until(lambda: board_reader.board.rows[0].sums(board_reader.board.now).calls == 2)
