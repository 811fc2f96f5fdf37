"""That the checker of the histories can fail, and does not fail on what is right."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import redis
from conftest import wait_until
from invariants import JOURNAL, ON_POLICY, check_histories, check_history, check_journal, commands, journal_in

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy
from pybreaker_redis.embedded import EmbeddedServer

POLICY = Policy(failure_threshold=1, reset_timeout=0.01, half_open_max_calls=2, probe_timeout=60.0)


def entry(old: str, new: str, reason: str, generation: int) -> dict[str, Any]:
    """An entry of a history."""
    return {"from": old, "to": new, "reason": reason, "generation": generation}


TRIPPED = entry("closed", "open", "failure_threshold", 5)
PROBING = entry("open", "half_open", "timeout", 6)
OPEN = {"state": "open", "generation": 5}
HALF_OPEN = {"state": "half_open", "generation": 6, "probes": {"1": 2000, "2": 900}}


@pytest.mark.parametrize(
    ("document", "entries"),
    [
        ({"state": "closed", "generation": 5}, []),
        ({"state": "closed", "generation": 5, "failure_count": 2, "failure_number": 2}, []),
        ({"state": "closed", "generation": 5, "failure_count": 0, "failure_number": 9}, []),
        ({**OPEN, "failure_count": 2, "failure_number": 0}, [TRIPPED]),
        (OPEN, [TRIPPED]),
        (HALF_OPEN, [TRIPPED, PROBING]),  # one of the two deadlines has passed
        (None, [TRIPPED, PROBING]),
        (None, [TRIPPED, PROBING, entry("half_open", "open", "probe_slow", 8)]),
        (None, [TRIPPED, PROBING, entry("half_open", "open", "forced", 9), entry("open", "open", "forced", 10)]),
        (None, [entry("closed", "closed", "reset", 1), entry("closed", "open", "slow_rate", 2)]),
        (OPEN, [TRIPPED, entry("open", "open", "set_policy", 5), entry("open", "open", "clear_policy", 5)]),
        ({"state": "closed", "generation": 5}, [entry("closed", "closed", reason, 0) for reason in ON_POLICY]),
        (None, [entry("closed", "closed", "reset", 1), entry("closed", "closed", "reset", 1)]),
    ],
)
def test_what_is_right(document: Any, entries: list[dict[str, Any]]) -> None:
    """Legal histories, with the document where they lead or none, pass."""
    check_history(document, entries, 1000)


@pytest.mark.parametrize(
    ("says", "document", "entries"),
    [
        ("illegal", None, [TRIPPED, entry("open", "closed", "probe_succeeded", 6)]),
        ("illegal", None, [TRIPPED, entry("open", "half_open", "failure_threshold", 6)]),
        ("illegal", None, [entry("closed", "half_open", "timeout", 5)]),
        ("illegal", None, [TRIPPED, entry("open", "open", "reset", 6)]),
        ("illegal", None, [TRIPPED, entry("open", "closed", "set_policy", 5)]),
        ("without a generation", None, [entry("closed", "closed", "probe", 0)]),
        ("do not grow", None, [TRIPPED, entry("open", "open", "set_policy", 4)]),
        ("torn", None, [TRIPPED, entry("closed", "closed", "set_policy", 5)]),
        ("torn", None, [TRIPPED, entry("half_open", "closed", "probe_succeeded", 6)]),
        ("do not grow", None, [TRIPPED, entry("open", "half_open", "timeout", 5)]),
        ("do not grow", None, [TRIPPED, entry("open", "half_open", "timeout", 4)]),
        ("does not begin", None, [PROBING]),
        ("is not where", {"state": "closed", "generation": 5}, [TRIPPED]),
        ("is not where", {"state": "open", "generation": 6}, [TRIPPED]),
        ("without a transition", OPEN, []),
        ("2 live probes", {**HALF_OPEN, "probes": {"1": 2000, "2": 2001}}, [TRIPPED, PROBING]),
        ("probes outside", {**OPEN, "probes": {"1": 2000}}, [TRIPPED]),
        ("no part of its numbers", {"state": "closed", "generation": 5, "failure_count": 2, "failure_number": 1}, []),
        ("no part of its numbers", {"state": "closed", "generation": 5, "failure_count": 2}, []),
        ("numbers while not closed", {**OPEN, "failure_count": 2, "failure_number": 2}, [TRIPPED]),
    ],
)
def test_what_is_wrong(says: str, document: Any, entries: list[dict[str, Any]]) -> None:
    """An illegal, torn or repeated transition, a document that is elsewhere, and a probe too many do not pass."""
    with pytest.raises(AssertionError, match=says):
        check_history(document, entries, 1000)


def use(client: redis.Redis, **options: Any) -> CircuitBreaker:
    """A breaker that has tripped, has recovered, has tripped again and now has two probes."""
    breaker = CircuitBreaker("used", redis=client, policy=POLICY, lease=0, redis_timeout=20, **options)
    breaker.set_policy(jitter=0.1)
    for _ in range(2):
        breaker.acquire().failure()
        with contextlib.suppress(CircuitOpenError):
            breaker.acquire()
        wait_until(lambda: breaker.snapshot().retry_after == 0 or breaker.state == "half_open")
        breaker.acquire().success()
    breaker.acquire().failure()
    breaker.clear_policy()
    wait_until(lambda: breaker.snapshot().retry_after == 0)
    for _ in range(2):
        breaker.acquire()
    return breaker


def test_a_real_server() -> None:
    """What a breaker leaves on a server passes with its slots, and not with one less."""
    with EmbeddedServer(args=JOURNAL) as server, redis.Redis.from_url(server.url) as client:
        use(client)
        journal = journal_in(server.directory).read_bytes()
        transitions = check_histories(client, 2)
        assert transitions == 10
        assert check_journal(journal, 2) > transitions - 2  # an action on the policy override stores no document
        with pytest.raises(AssertionError, match="circuit_breaker:used:state: 2 live probes for 1 slots"):
            check_histories(client)
        with pytest.raises(AssertionError, match="circuit_breaker:used:state: 2 live probes for 1 slots"):
            check_journal(journal)


def test_what_was_taken_away() -> None:
    """A breaker may begin anew after FLUSHALL; what was stored before it is checked all the same."""
    with EmbeddedServer(args=JOURNAL) as server, redis.Redis.from_url(server.url) as client:
        use(client)
        client.flushall()
        CircuitBreaker("used", redis=client, policy=POLICY, lease=0, redis_timeout=20).acquire().failure()
        client.delete("circuit_breaker:used:state")
        assert check_histories(client) == 1
        journal = journal_in(server.directory).read_bytes()
        assert check_journal(journal, 2) > 10
        with pytest.raises(AssertionError, match="2 live probes"):
            check_journal(journal)


@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("not told", {"state": "half_open"}),
        ("generation of its own", {"generation": 1 << 41}),
        ("2 live probes", {"state": "open", "probes": {"1": 1 << 42, "2": 1 << 42}}),
        ("probes outside", {"probes": {"1": 1 << 42}}),
    ],
)
def test_a_document_that_was_changed_by_hand(says: str, changes: dict[str, Any]) -> None:
    """A document that no transition explains does not pass, even if the next one puts it right again."""
    with EmbeddedServer(args=JOURNAL) as server, redis.Redis.from_url(server.url) as client:
        breaker = CircuitBreaker("hand", redis=client, policy=Policy(failure_threshold=1), lease=0, redis_timeout=20)
        breaker.acquire().failure()
        stored = client.get(breaker.keys.state)
        client.set(breaker.keys.state, json.dumps({**json.loads(stored), **changes}))
        client.set(breaker.keys.state, stored)
        check_histories(client)
        with pytest.raises(AssertionError, match=says):
            check_journal(journal_in(server.directory).read_bytes())


@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("go back", {"failure_count": 0, "failure_number": 2}),
        ("without a number", {"failure_count": 3}),
        ("no part of its numbers", {"failure_count": 4}),
    ],
)
def test_a_failure_without_its_number(says: str, changes: dict[str, Any]) -> None:
    """Nor does a failure number that goes back, or a run that grows without one."""
    with EmbeddedServer(args=JOURNAL) as server, redis.Redis.from_url(server.url) as client:
        breaker = CircuitBreaker("hand", redis=client, lease=0, redis_timeout=20)
        for failed in (True, False, True, True):
            permit = breaker.acquire()
            permit.failure() if failed else permit.success()
        stored = json.loads(client.get(breaker.keys.state))
        assert (stored["failure_count"], stored["failure_number"]) == (2, 3)
        check_journal(journal_in(server.directory).read_bytes())
        client.set(breaker.keys.state, json.dumps({**stored, **changes}))
        with pytest.raises(AssertionError, match=says):
            check_journal(journal_in(server.directory).read_bytes())


def test_a_deadline_that_was_moved() -> None:
    """Nor does a probe whose deadline was put off, or an entry that no document goes with."""
    with EmbeddedServer(args=JOURNAL) as server, redis.Redis.from_url(server.url) as client:
        breaker = use(client)
        document = json.loads(client.get(breaker.keys.state))
        document["probes"]["3"] = document["probes"].pop("2")
        client.set(breaker.keys.state, json.dumps(document))
        path = journal_in(server.directory)
        check_journal(path.read_bytes(), 2)
        document["probes"]["3"] += 1
        client.set(breaker.keys.state, json.dumps(document))
        with pytest.raises(AssertionError, match="deadline of a probe was moved"):
            check_journal(path.read_bytes(), 2)
        begin = path.stat().st_size
        client.xadd(breaker.keys.history, {"from": "half_open", "to": "closed", "reason": "reset", "generation": 9})
        with pytest.raises(AssertionError, match="told without being stored"):
            check_journal(path.read_bytes()[begin:])


def test_a_journal_that_ends_amid_a_command() -> None:
    """What a killed server has not written to its end is left out, wherever it ends."""
    whole = b"#TS:1\r\n*2\r\n$3\r\nDEL\r\n$1\r\na\r\n*2\r\n$3\r\nDEL\r\n$3\r\nb\r\n\r\n"
    assert list(commands(whole)) == [[b"DEL", b"a"], [b"DEL", b"b\r\n"]]
    for end in range(len(whole)):  # the first one ends at 27
        assert list(commands(whole[:end])) == [[b"DEL", b"a"]] * (end >= 27)
