"""The conformance vectors of docs/protocol.md: each is one call of a script on a fixed clock. And the page itself."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from conftest import on_frozen_clock, published
from invariants import NOTES, OPERATOR, REASONS

from pybreaker_redis._policy import RULES, request_field
from pybreaker_redis._protocol import Keys, keys_of
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.wire.scripts import LIBRARY, SCRIPTS, folder

HERE = pathlib.Path(__file__).parent
VECTORS = [vector for path in sorted(HERE.glob("*.json")) for vector in json.loads(path.read_text())]
PAGE = (HERE.parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")
SLACK_MS = 60_000  # by which a time to live may have run down meanwhile
LIBRARY_LUA = "".join((folder() / f"{name}.lua").read_text(encoding="utf-8") for name in LIBRARY)


def as_text(value: Any) -> str:
    """A value of a vector as it is stored or sent: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def stored(client: redis.Redis, keys: Keys, messages: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, Any]:
    """What the keys hold, and what was published, in the form of a vector's `after`."""
    after: dict[str, Any] = {"messages": messages, "ttl_ms": {}, "history": []}
    for role in ("state", "policy"):
        if (text := client.get(getattr(keys, role))) is not None:
            after[role] = text.decode() if isinstance(expected.get(role), str) else json.loads(text)
    for _, fields in client.xrange(keys.history):
        after["history"].append({key.decode(): value.decode() for key, value in fields.items()})
    for role, key in keys._asdict().items():
        left, wanted = client.pttl(key), expected.get("ttl_ms", {}).get(role, 0)
        if left >= 0:
            after["ttl_ms"][role] = wanted if wanted - SLACK_MS < left <= wanted else left
    return {field: value for field, value in after.items() if value}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['script']}: {vector['name']}")
def test_vector(client: redis.Redis, vector: dict[str, Any]) -> None:
    """The script replies, stores and publishes what the vector says, and nothing else."""
    keys, reply = keys_of("vector"), {}
    client.set("test:now_ms", vector["now_ms"])
    for role, value in vector["before"].items():
        client.set(getattr(keys, role), as_text(value))
    with published(client, keys.state) as messages:
        try:
            text = client.eval(on_frozen_clock(vector["script"]), len(keys), *keys, as_text(vector["request"]))
            reply["reply"] = json.loads(text)
        except redis.ResponseError as error:
            reply["refused"] = str(error)
    assert reply == {field: vector[field] for field in ("reply", "refused") if field in vector}
    assert stored(client, keys, messages, vector["after"]) == vector["after"]


def test_without_python(server: EmbeddedServer, client: redis.Redis, bundles: pathlib.Path) -> None:
    """A program in another language runs them, too."""
    node = shutil.which("node") or pytest.skip("needs Node.js")
    command = [node, str(HERE / "run.mjs"), server.url.removeprefix("unix://"), str(bundles)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, f"{len(VECTORS)} of {len(VECTORS)} vectors passed\n"), done.stderr


def test_a_wrong_vector_is_noticed(server: EmbeddedServer, bundles: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The program in the other language fails on a vector that is wrong in its reply, its document or its messages."""
    node = shutil.which("node") or pytest.skip("needs Node.js")
    for part in ("examples/node_client.mjs", "tests/lua/frozen_clock.lua", "tests/protocol/run.mjs"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE.parent.parent / part, tmp_path / part)
    right = next(vector for vector in VECTORS if {"state", "history", "messages"} <= vector["after"].keys())
    after = right["after"]
    wrong = [
        {**right, "reply": {**right["reply"], "state": "ajar"}},
        {**right, "after": {**after, "state": {**after["state"], "generation": 1}}},
        {**right, "after": {**after, "ttl_ms": {**after["ttl_ms"], "state": 1}}},
        {**right, "after": {**after, "messages": []}},
        {**right, "after": {**after, "history": []}},
    ]
    (tmp_path / "tests/protocol/wrong.json").write_text(json.dumps([right, *wrong]))
    command = [node, str(tmp_path / "tests/protocol/run.mjs"), server.url.removeprefix("unix://"), str(bundles)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, f"1 of {len(wrong) + 1} vectors passed"), done.stderr


# What the vectors cover -----------------------------------------------------------------------------


def parts(of: str, *fields: str) -> Iterator[dict[str, Any]]:
    """The maps in these fields of the vectors' requests, replies or stored values, where there are such."""
    for vector in VECTORS:
        value: Any = vector.get(of)
        for field in fields:
            value = value.get(field) if isinstance(value, dict) else None
        if isinstance(value, dict):
            yield value


def test_every_script_and_name() -> None:
    """Each script has vectors, and no two have one name."""
    assert {vector["script"] for vector in VECTORS} == set(SCRIPTS)
    names = [(vector["script"], vector["name"]) for vector in VECTORS]
    assert len(set(names)) == len(names) >= 60


def test_every_reason_and_action() -> None:
    """Each reason for a transition and each action of an operator has a vector."""
    assert {change["reason"] for change in parts("reply", "transition")} == set().union(*REASONS.values(), OPERATOR)
    actions = re.findall(r"action == '(\w+)'", (folder() / "control.lua").read_text(encoding="utf-8"))
    refused = {"open"}
    assert {request["action"] for request in parts("request") if "action" in request} - refused == set(actions)


def test_every_policy_field() -> None:
    """Each field of the policy changes what a vector shows: it is in a request or a policy override."""
    given = {field for policy in parts("request", "policy") for field in policy}
    given |= {field for override in parts("before", "policy") for field in override}
    assert {request_field(name) for name in RULES} <= given


# The page ---------------------------------------------------------------------------------------------


def rows(*path: str) -> dict[str, list[str]]:
    """The cells of the tables under a heading, by each name in their first cell."""
    section = PAGE
    for heading in path:
        section = re.split(r"^#{2,3} ", section.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    found = {}
    for line in re.findall(r"^\| `.*\|$", section, re.MULTILINE):
        first, *others = (cell.strip() for cell in line.strip("|").split(" | "))
        found.update(dict.fromkeys(re.findall(r"`(\w+)`", first), others))
    return found


def names_in(maps: Iterator[dict[str, Any]]) -> set[str]:
    """The fields of maps."""
    return {name for one in maps for name in one}


@pytest.mark.parametrize("script", SCRIPTS)
def test_page_names_requests_and_replies(script: str) -> None:
    """The tables of a script name the fields of its requests and replies, and no others."""
    ours = [vector for vector in VECTORS if vector["script"] == script and "reply" in vector]
    seen = {field for vector in ours for part in ("request", "reply") for field in vector[part]}
    common = rows("Requests").keys() | rows("Fields of every reply").keys()
    actions = {vector["request"].get("action") for vector in ours}
    tables = rows(script).keys() - actions
    assert seen <= common | tables
    assert tables <= seen
    assert common <= names_in(parts("request")) | names_in(parts("reply"))


def test_page_names_stored_fields() -> None:
    """So do the tables of the document."""
    found = {name: value for one in parts("after", "state") for name, value in one.items() if name != "a_later_field"}
    assert rows("The document").keys() == found.keys()
    assert all(f"`{name}`" in PAGE for name in found["window"])
    assert names_in(parts("after", "policy")) - {"until_ms", "operator", "note"} <= rows("Policy fields").keys()


def test_page_names_messages_and_history() -> None:
    """So do the sections on the history and on notifications, and the history's reasons are all shown."""
    for heading, kind in (("The history", "history"), ("Notifications", "messages")):
        section = (
            PAGE.split(f"## {heading}\n")[1].split("\n## ")[0] + PAGE.split("A transition has")[1].split("\n\n")[0]
        )
        entries = [entry for vector in VECTORS for entry in vector["after"].get(kind, [])]
        assert entries
        assert all(f"`{name}`" in section for entry in entries for name in entry)
        if kind == "history":
            noted = {entry["reason"] for entry in entries if entry["from"] == entry["to"]}
            assert noted == NOTES


DECLARED = """
local field, all = 'quorum', {}
while field do
  local default, least, most, fraction, following = breaker.policy_field(nil, field)
  local kind = fraction and 'a number' or 'an integer'
  local range = least and string.format('%s from %.0f to %.0f', kind, least, most) or 'true or false'
  all[#all + 1] = {field, tostring(default), range}
  field = following
end
return cjson.encode(all)
"""


def test_page_has_the_policy_of_the_scripts(client: redis.Redis) -> None:
    """The table of policy fields is the declaration in lua/request.lua."""
    declared = json.loads(client.eval(LIBRARY_LUA + DECLARED, 0))
    assert rows("Policy fields") == {field: [default, limits] for field, default, limits in declared}


def test_page_names_reasons_and_warnings() -> None:
    """The page lists each reason and each warning."""
    listed = PAGE.split("The reasons are")[1].split("\n\n")[0]
    assert {change["reason"] for change in parts("reply", "transition")} <= set(re.findall(r"`(\w+)`", listed))
    warnings = set(re.findall(r"'(corrupt_\w+|foreign_\w+|future_\w+)'", LIBRARY_LUA))
    assert warnings <= set(re.findall(r"`(\w+)`", listed))
