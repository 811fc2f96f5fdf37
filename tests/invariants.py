"""What holds after every run: a legal path, growing generations, numbered failures, and no more live probes than slots.

check_histories() looks at what a server holds at the end: each history against itself and against its document.
check_journal() looks at what was ever stored: a server that is started with JOURNAL writes each change of a key to its
append-only file, where every document of the run can be read, also those that a later one replaced or a FLUSHALL took.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

JOURNAL = ("--appendonly", "yes", "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0")
REASONS = {
    ("closed", "open"): {"failure_threshold", "failures_in_window", "error_rate", "slow_rate", "held"},
    ("open", "half_open"): {"timeout"},
    ("half_open", "closed"): {"probe_succeeded"},
    ("half_open", "open"): {"probe_failed", "probe_slow", "held"},
}
OPERATOR = {"forced": {"open", "closed"}, "reset": {"closed"}}  # from anywhere
ON_POLICY = {"reset", "set_policy", "clear_policy"}  # actions that may store no document
NOTES = {"forced", "clear_forced", "probe"} | ON_POLICY  # reasons of entries that are no transition
TRIMMED_FROM = 1000  # entries on which Redis may drop the oldest ones
Fields = dict[str, Any]


def check_transition(entry: Fields) -> None:
    """The reason of the entry leads from its one state to its other one."""
    assert entry["generation"] > 0 or entry["reason"] in ON_POLICY, f"without a generation: {entry}"
    legal = entry["to"] in OPERATOR.get(entry["reason"], ()) or is_note(entry["generation"], entry)
    assert legal or entry["reason"] in REASONS.get((entry["from"], entry["to"]), ()), f"illegal: {entry}"


def is_note(generation: int, entry: Fields) -> bool:
    """Whether the entry is no transition: an operator's action that changed neither state nor generation."""
    stays = entry["from"] == entry["to"] and entry["generation"] == generation
    return bool(stays and entry["reason"] in NOTES and (entry["reason"] != "reset" or entry["to"] == "closed"))


def with_document(entries: list[Fields]) -> list[Fields]:
    """The entries without those of actions on a policy override where no document was stored."""
    return [entry for entry in entries if entry["generation"] > 0]


def check_path(entries: list[Fields]) -> None:
    """Each transition is legal, begins where the one before it ended, and has a greater generation."""
    for entry in entries:
        check_transition(entry)
    for before, after in itertools.pairwise(with_document(entries)):
        assert after["from"] == before["to"], f"torn: {after} after {before}"
        grows = after["generation"] > before["generation"] or is_note(before["generation"], after)
        assert grows, f"generations do not grow: {after} after {before}"


def check_history(document: Fields | None, entries: list[Fields], now_ms: int, slots: int = 1) -> None:
    """A history from its beginning, or the newest part of a long one, and the document that belongs to it.

    The document is None where the key is gone: then nothing is known of it. A history that was deleted, alone or by
    FLUSHALL, begins anew, as that of a new breaker does: at closed.
    """
    check_path(entries)
    is_whole, entries = len(entries) < TRIMMED_FROM, with_document(entries)
    if entries and is_whole:
        assert entries[0]["from"] == "closed", f"does not begin at closed: {entries[0]}"
    if document is None:
        return
    if entries:
        last = entries[-1]["to"], entries[-1]["generation"]
        assert (document["state"], document["generation"]) == last, f"{document} is not where {entries[-1]} led"
    else:
        assert document["state"] == "closed", f"without a transition: {document}"
    check_probes(document, [end for end in document.get("probes", {}).values() if end > now_ms], slots)
    check_numbers(document)


def check_numbers(document: Fields) -> None:
    """A run of failures is part of the failures of its generation; another state has no numbers."""
    count, number = document.get("failure_count", 0), document.get("failure_number", 0)
    if document["state"] == "closed":
        assert 0 <= count <= number, f"a run that is no part of its numbers: {document}"
    else:
        assert number == 0, f"numbers while not closed: {document}"


def check_probes(document: Fields, live: list[int], slots: int) -> None:
    """No more live probes than slots, and none but in half_open."""
    assert len(live) <= slots, f"{len(live)} live probes for {slots} slots: {document}"
    assert not live or document["state"] == "half_open", f"probes outside of half_open: {document}"


# What a server holds ------------------------------------------------------------------------------


def check_histories(client: Any, slots: int = 1) -> int:
    """check_history() of every breaker that the server, or the cluster, holds; how many transitions there were.

    slots: the greatest half_open_max_calls among the policies in use.
    """
    found = 0
    keys = {key.removesuffix(b":history")[1:-1] for key in client.scan_iter("{*:state}:history", 1000)}
    for key in sorted(keys | set(client.scan_iter("*:state", 1000))):
        stored, entries, now_ms = read(client, key)
        try:
            check_history(stored and document_of(stored), entries, now_ms, slots)
        except AssertionError as error:
            raise AssertionError(f"{key.decode()}: {error}") from error
        found += len(entries)
    return found


def read(client: Any, key: bytes) -> tuple[Any, list[Fields], int]:
    """What is stored under a breaker's state key, its history, and the server's time by then."""
    history = b"{%b}:history" % key
    before = client.xrange(history)
    while True:
        stored, entries = client.get(key), client.xrange(history)
        if entries == before:  # else a transition has come between
            break
        before = entries
    seconds, microseconds = client.time()
    return stored, [entry_of(fields) for _, fields in entries], seconds * 1000 + microseconds // 1000


def document_of(stored: bytes) -> Fields:
    """A stored document."""
    document: Fields = json.loads(stored)
    return document


def entry_of(fields: dict[bytes, bytes]) -> Fields:
    """An entry of a history."""
    entry: Fields = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
    return {**entry, "generation": int(entry["generation"])}


# What was ever stored -----------------------------------------------------------------------------


def journal_in(directory: str | Path) -> Path:
    """The file to which a server with JOURNAL in this directory appends."""
    [path] = [path for path in Path(directory).rglob("*.aof") if not path.name.endswith(".base.aof")]
    return path


def check_journal(journal: bytes, slots: int = 1) -> int:
    """Each change of a state is a legal transition with its one entry; in every document that was stored there are
    no more probes than slots, and no probe's deadline was ever moved. How many documents there were."""
    documents: dict[bytes, Fields] = {}
    found = 0
    for step in steps(journal):
        stored: dict[bytes, Fields] = {}
        entries: dict[bytes, list[Fields]] = {}
        for command, *words in step:
            if command in (b"FLUSHALL", b"FLUSHDB"):
                documents.clear()
            elif command in (b"DEL", b"UNLINK"):
                for key in words:
                    documents.pop(key, None)
            elif command == b"SET" and words[0].endswith(b":state"):
                stored[words[0]] = document_of(words[1])
            elif command == b"XADD" and words[0].endswith(b":state}:history"):
                first = next(n for n, word in enumerate(words) if re.fullmatch(rb"\d+-\d+", word)) + 1
                entry = entry_of(dict(zip(words[first::2], words[first + 1 :: 2], strict=True)))
                entries.setdefault(words[0][1:-9], []).append(entry)
        for key in entries.keys() - stored.keys():
            check_unstored(documents.get(key), entries[key])
        for key, document in stored.items():
            try:
                check_step(documents.get(key), document, entries.get(key, []), slots)
            except AssertionError as error:
                raise AssertionError(f"{key.decode()}: {error}") from error
            documents[key] = document
            found += 1
    return found


def check_unstored(document: Fields | None, entries: list[Fields]) -> None:
    """Only an action on the policy override has an entry without storing a document: with the state as it is."""
    [entry] = entries
    present = (document["state"], document["generation"]) if document else ("closed", 0)
    assert entry["reason"] in ON_POLICY, f"told without being stored: {entry}"
    assert (entry["from"], entry["to"], entry["generation"]) == (present[0], *present), (
        f"told without being stored: {entry} at {document}"
    )


def check_step(before: Fields | None, after: Fields, entries: list[Fields], slots: int) -> None:
    """One document replaces another one; before: None where there was none, or its key had been lost."""
    probes = after.get("probes", {})
    check_probes(after, list(probes.values()), slots)
    check_numbers(after)
    state, generation = (before["state"], before["generation"]) if before else ("closed", None)
    if entries:
        [entry] = entries
        check_transition(entry)
        assert entry["from"] == state, f"torn: {entry} after {before}"
        grows = before is None or entry["generation"] > generation or is_note(generation, entry)
        assert grows, f"generations do not grow: {entry} after {before}"
        assert (after["state"], after["generation"]) == (entry["to"], entry["generation"]), f"{after} is not {entry}"
        return
    assert after["state"] == state, f"a change that was not told: {after} after {before}"
    assert before is None or after["generation"] == generation, f"a generation of its own: {after} after {before}"
    more = {field: after.get(field, 0) - (before or {}).get(field, 0) for field in ("failure_count", "failure_number")}
    assert more["failure_number"] >= 0, f"failure numbers that go back: {after} after {before}"
    assert more["failure_count"] <= more["failure_number"] or after["state"] != "closed", (
        f"failures without a number: {after} after {before}"
    )
    moved = {slot for slot, end in (before or {}).get("probes", {}).items() if probes.get(slot, end) != end}
    assert not moved, f"the deadline of a probe was moved: {after} after {before}"


def steps(journal: bytes) -> Iterator[list[list[bytes]]]:
    """What was executed as one: a transaction, which a script is that writes more than once, or a single command."""
    together: list[list[bytes]] | None = None
    for words in commands(journal):
        words[0] = words[0].upper()
        if words[0] == b"MULTI":
            together = []
        elif words[0] == b"EXEC":
            yield together or []
            together = None
        elif together is not None:
            together.append(words)
        else:
            yield [words]


def commands(journal: bytes) -> Iterable[list[bytes]]:
    """The commands of an append-only file, up to one that a killed server has not written to its end."""
    at = 0
    while (end := journal.find(b"\r\n", at)) >= 0:
        head = journal[at:end]
        at = end + 2
        if not head.startswith(b"*"):
            continue  # an annotation
        words = []
        for _ in range(int(head[1:])):
            end = journal.find(b"\r\n", at)
            if end < 0:
                return
            length = int(journal[at + 1 : end])
            words.append(journal[end + 2 : end + 2 + length])
            at = end + 2 + length + 2
        if at > len(journal):
            return
        yield words
