"""The operators' page without a browser: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import html
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
import redis
import redis.asyncio
from conftest import stopped, wait_until
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount
from without import run_without

from pybreaker_redis import CircuitBreaker, CircuitOpenError, Policy, PolicyError, _reader
from pybreaker_redis._extras import EXTRAS
from pybreaker_redis._protocol import keys_of
from pybreaker_redis.embedded import EmbeddedServer
from pybreaker_redis.web import _app, breakers_app
from pybreaker_redis.web._access import COOKIE, TOKEN_FIELD, TOKEN_HEADER
from pybreaker_redis.web._actions import ACTIONS
from pybreaker_redis.wire import listing

from . import scene
from .conftest import served

WEB_PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "how-to" / "web.md"
Site = Callable[..., httpx.Client]
FORCE = {"note": "deploy", "amount": "10", "unit": "minutes"}


def row_names(answer: httpx.Response) -> list[str]:
    """The names on a page of the board, in order."""
    assert answer.status_code == 200, answer.text
    return [unquote(name, errors="backslashreplace") for name in re.findall(r'data-name="([^"]*)"', answer.text)]


def make(client: redis.Redis, name: str, policy: Policy | None = None) -> CircuitBreaker:
    """A breaker that Redis knows."""
    one = scene.breaker(client, name, policy or Policy())
    one.call(int)
    return one


def post(
    page: httpx.Client, path: str, form: dict[str, str], token: str | None = None, **headers: str
) -> httpx.Response:
    """Send a form with the token that the page gave, unless another is given."""
    if COOKIE not in page.cookies:
        page.get("/")
    return page.post(
        path, data={TOKEN_FIELD: page.cookies[COOKIE] if token is None else token, **form}, headers=headers
    )


def act(page: httpx.Client, name: str, action: str, body: Any = None, **headers: str) -> httpx.Response:
    """Act as a program does."""
    page.get("/api/breakers")
    return page.post(
        f"/breakers/{quote(name, safe='')}/{action}",
        json={} if body is None else body,
        headers={TOKEN_HEADER: page.cookies[COOKIE], **headers},
    )


def document(client: redis.Redis, name: str) -> dict[str, Any]:
    """What Redis stores."""
    return dict(json.loads(client.get(keys_of(name).state)))


# Reading


def test_the_board_shows_the_most_urgent_breakers_first(client: redis.Redis, site: Site) -> None:
    """Open ones before closed ones, with reason, next step and figures; the counts are filters."""
    make(client, "quiet")
    scene.trip(client, "broken", "refused")
    page = site(read_only=True)
    answer = page.get("/")
    assert row_names(answer) == ["broken", "quiet"]
    assert "failures in a row: ConnectionError: refused" in answer.text
    assert re.search(r"probe in \d\d s", answer.text)
    assert row_names(page.get("/?group=open")) == ["broken"]
    assert row_names(page.get("/?group=held")) == []
    assert row_names(page.get("/?q=QUI")) == ["quiet"]
    assert row_names(page.get("/?sort=name&group=nonsense&page=x")) == ["broken", "quiet"]


def test_fifty_rows_are_shown_at_a_time(client: redis.Redis, site: Site) -> None:
    """The pages together show every breaker once; a page that is too far is the last one."""
    model = make(client, "model")
    stored = client.get(model.keys.state)
    client.mset({keys_of(f"service-{number:03}").state: stored for number in range(119)})
    page = site(read_only=True)
    shown = [row_names(page.get(f"/?page={number}&sort=name")) for number in (1, 2, 3)]
    assert [len(one) for one in shown] == [50, 50, 20]
    assert len(set(itertools.chain(*shown))) == 120
    assert row_names(page.get("/?page=99&sort=name")) == shown[2]
    assert "101 to 120 of 120" in page.get("/?page=3").text
    listed = page.get("/api/breakers?offset=110&limit=100&sort=name").json()
    assert (listed["total"], len(listed["breakers"])) == (120, 10)


def test_the_page_of_a_breaker_tells_its_story(client: redis.Redis, site: Site) -> None:
    """State, timeline, history with errors, the window, policy override with its author, and redis-cli lines."""
    scene.busy(client, "api", 1)
    one = scene.breaker(client, "api")
    one.set_policy(duration=600, failure_threshold=50, operator="bob", note="noisy")
    one.force_open(600, operator="ann", note="deploy")
    answer = site(read_only=True).get("/breakers/api")
    text = html.unescape(re.sub(r"<[^>]+>", "", answer.text))
    for wanted in ("forced open", "by ann: deploy", "by bob: noisy", "failure_threshold", "ends in 10 m", "EVALSHA"):
        assert wanted in text, wanted
    assert re.search(r"policy override set\s+failure_threshold 50 until \d{4}-\S+ \S+ UTC, by bob: noisy", text)
    assert "Actions" not in text
    assert 'role="img" aria-label="State over time: closed for' in answer.text


def test_the_history_tells_of_policies(client: redis.Redis, site: Site) -> None:
    """Who set and who ended a policy override is shown with its fields; the picture shows the states as they were."""
    one = make(client, "api")
    one.force_closed(600, operator="ann")
    one.set_policy(reset_timeout=2.5, enforce=False, operator="bob", note="<i>")
    one.clear_policy(operator="cem")
    one.set_policy(error_rate_threshold=None)
    one.reset(note="all of it")
    answer = site(read_only=True).get("/breakers/api").text
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", answer)))
    for wanted in (
        "policy override set reset_timeout 2.5 s, enforce no, by bob: <i> 0 in a row",
        "policy override ended reset_timeout 2.5 s, enforce no, by cem 0 in a row",
        "policy override set error_rate_threshold off 0 in a row",
        "closed reset, policy override ended: error_rate_threshold off, all of it 0 in a row",
    ):
        assert wanted in text, wanted
    assert len(re.findall(r"<rect class=\"(closed|forced_closed)\"", answer)) == 3
    answer = site(read_only=True).get("/api/breakers/api").json()
    assert [entry["override"] for entry in answer["history"]] == [
        {"error_rate_threshold": None},
        {"error_rate_threshold": None},
        {"reset_timeout": 2.5, "enforce": False},
        {"reset_timeout": 2.5, "enforce": False},
        None,
    ]


def test_a_policy_that_nobody_can_know_is_not_shown_as_a_fact(client: redis.Redis, site: Site) -> None:
    """Without a policy override, and before a process has named its policy, the page names no threshold."""
    make(client, "api", Policy(failure_threshold=77))
    answer = site(read_only=True).get("/breakers/api").text
    assert "every process follows the policy that it was given" in answer
    assert "Not known" in answer
    assert "<td>policy override</td>" not in answer


def test_a_policy_override_outlives_its_breaker(client: redis.Redis, site: Site) -> None:
    """The document of a breaker that nobody calls expires. Its policy override can still be seen and cleared."""
    make(client, "api").set_policy(failure_threshold=50, operator="bob")
    client.delete("circuit_breaker:api:state")
    page = site()
    assert "<td>policy override</td>" in page.get("/breakers/api").text
    assert act(page, "api", "clear-policy").status_code == 204
    assert not client.exists("{circuit_breaker:api:state}:policy")


def test_the_fleet_is_shown(client: redis.Redis, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process lists itself, the breaker's page shows the source of its policy, and disagreements are named."""
    monkeypatch.setattr(listing, "FIRST", (0.0, 0.0))
    monkeypatch.setattr(_app, "LISTED", 0.0)
    path = client.connection_pool.connection_kwargs["path"]
    own = redis.Redis(unix_socket_path=path)
    one = CircuitBreaker(
        "api", redis=own, policy=Policy(failure_threshold=77), lease=0.02, redis_timeout=20, host="web-1"
    )
    wait_until(lambda: one.call(lambda: True) and client.exists("circuit_breaker:fleet"))
    page = site(read_only=True)
    shown = html.unescape(re.sub(r"<[^>]+>", " ", page.get("/breakers/api").text))
    assert re.search(r"failure_threshold\s+77\s+1 process\b", shown)
    assert f"web-1:{os.getpid()}" in page.get("/fleet").text
    assert "<small>of 77</small>" in page.get("/").text
    assert page.get("/api/breakers").json()["breakers"][0]["threshold"] == 77
    policy = {"policy": {"failure_threshold": 5}, "breakers": 1, "names": ["api"]}
    entry = {"seen_ms": round(time.time() * 1000), "host": "<b>web-2\u202e", "pid": 7, "version": "<i>", "breakers": 1}
    client.hset("circuit_breaker:fleet", "x", json.dumps({**entry, "policies": [policy]}))
    client.hset("circuit_breaker:fleet", "y", "no entry")
    odd = {"breakers": 1, "names": ["..", "{}"]}
    half_a_letter = {**entry, "policies": [{**odd, "names": ["\ud800"], "policy": {}}]}
    client.hset("circuit_breaker:fleet", "z", json.dumps(half_a_letter))  # no text: passed over
    for process, threshold in (("v", 5), ("w", 6)):
        policies = [{**odd, "policy": {"failure_threshold": threshold}}]
        client.hset("circuit_breaker:fleet", process, json.dumps({**entry, "policies": policies}))
    assert "which disagree" in page.get("/breakers/api").text
    assert "<small>of" not in page.get("/").text
    answer = page.get("/fleet").text
    assert "Breakers on whose policy the processes disagree" in answer
    assert "<h2>2 processes on 2 hosts</h2>" in answer  # 7 of web-2 has two clients, and so two entries more
    assert not re.search("<b>web|<i>|\u202e", answer)
    listed = page.get("/api/fleet").json()
    assert (len(listed["processes"]), sorted(listed["disagreements"])) == (4, ["..", "api", "{}"])
    assert re.findall(r'href="/breakers/([^"]*)"', answer) == ["api"]
    one.close()


def test_without_the_right_to_read_the_list_of_processes_the_rest_is_shown(
    own_server: EmbeddedServer, site: Site
) -> None:
    """The list is for information."""
    with redis.Redis.from_url(own_server.url) as admin:
        admin.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-hscan"])
        make(admin, "api")
        path = admin.connection_pool.connection_kwargs["path"]
    with redis.Redis(unix_socket_path=path, username="reader", password="x") as reader:
        page = site(reader, read_only=True)
        assert page.get("/breakers/api").status_code == 200
        assert "No process is listed" in page.get("/fleet").text


def test_json_says_the_same_as_the_page(client: redis.Redis, site: Site) -> None:
    """Programs get the board and one breaker, as the description promises."""
    scene.trip(client, "api", "refused")
    page = site()
    described = page.get("/api/openapi.json").json()
    listed, one = page.get("/api/breakers").json(), page.get("/api/breakers/api").json()
    assert listed["counts"]["open"] == 1
    assert listed["breakers"][0] == {**one["breaker"], "health": 0}
    assert (one["breaker"]["condition"], one["snapshot"]["state"], one["history"][0]["new"]) == ("open", "open", "open")
    schemas = described["components"]["schemas"]
    assert set(schemas["Breaker"]["required"]) == one["breaker"].keys()
    assert set(schemas["Details"]["required"]) == one.keys()
    answers = described["paths"]["/api/breakers"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(answers["required"]) == listed.keys()
    actions = described["paths"]["/breakers/{name}/{action}"]["post"]["parameters"][1]["schema"]["enum"]
    assert actions == list(ACTIONS)
    assert set(site(read_only=True).get("/api/openapi.json").json()["paths"]) == set(described["paths"]) - {
        "/breakers/{name}/{action}"
    }


@pytest.mark.parametrize("path", ["/api/breakers?limit=2000", "/api/breakers?offset=-1", "/api/breakers?limit=%D9%A3"])
def test_a_bad_parameter_is_refused(client: redis.Redis, site: Site, path: str) -> None:
    """A number out of range is answered with what is wrong."""
    answer = site(read_only=True).get(path)
    assert answer.status_code == 400
    assert "whole number" in answer.json()["detail"]


def test_an_unknown_breaker_is_not_found(client: redis.Redis, site: Site) -> None:
    """Neither its page nor its JSON exists, and no action creates it; a name that cannot be is a bad request."""
    page = site()
    assert page.get("/breakers/nobody").status_code == page.get("/api/breakers/nobody").status_code == 404
    assert act(page, "nobody", "force-open", {"duration": 60, "note": "typo"}).status_code == 404
    assert page.get("/breakers/a%7Bb").status_code == 400
    assert client.keys() == []


def test_other_prefixes_are_not_shown(client: redis.Redis, site: Site) -> None:
    """A page has one prefix."""
    make(client, "mine")
    CircuitBreaker("theirs", redis=client, prefix="other", lease=0).call(int)
    assert row_names(site(read_only=True).get("/")) == ["mine"]
    assert row_names(site(read_only=True, prefix="other").get("/")) == ["theirs"]


def test_the_rights_in_the_documentation_are_enough(own_server: EmbeddedServer, site: Site) -> None:
    """A user with no more than docs/how-to/web.md names sees board, events, breaker and processes."""
    words = re.search(r"ACL SETUSER page on >PASSWORD ([^`]+)", WEB_PAGE.read_text())
    assert words
    with redis.Redis.from_url(own_server.url) as admin:
        make(admin, "api")
        admin.execute_command("ACL", "SETUSER", "page", "on", ">x", *words[1].split())
        path = admin.connection_pool.connection_kwargs["path"]
    with redis.Redis(unix_socket_path=path, username="page", password="x") as reader:
        page = site(reader, read_only=True)
        assert row_names(page.get("/")) == ["api"]
        assert '<span class="live">Live</span>' in page.get("/").text
        assert page.get("/breakers/api").status_code == page.get("/fleet").status_code == 200


# Clients and mounting


@pytest.mark.parametrize("kind", ["url", "blocking", "asyncio"])
def test_any_client_will_do(server: EmbeddedServer, client: redis.Redis, site: Site, kind: str) -> None:
    """A URL, a blocking client and an asyncio client serve the same page, and write."""
    make(client, "api")
    given = {"url": server.url, "blocking": client, "asyncio": redis.asyncio.Redis.from_url(server.url)}[kind]
    page = site(given)
    assert row_names(page.get("/")) == ["api"]
    assert act(page, "api", "force-open", {"duration": 60, "note": "x"}).json()["breaker"]["condition"] == "forced_open"


def test_clients_of_a_cluster_will_do(cluster_url: str, site: Site) -> None:
    """The breakers of every node are shown, with a URL and with redis-py's asyncio client."""
    names = {f"breaker-{number}" for number in range(12)}
    for name in names:
        CircuitBreaker(name, redis=cluster_url, prefix="page", lease=0, redis_timeout=20).call(int)
    _, _, port = cluster_url.rpartition(":")
    for given in (cluster_url, redis.asyncio.RedisCluster(host="127.0.0.1", port=int(port))):
        page = site(given, prefix="page", read_only=True)
        if not isinstance(given, str):
            page = site(f"redis+cluster://127.0.0.1:{port}", prefix="page", read_only=True)
        assert set(row_names(page.get("/"))) == names
        assert page.get("/breakers/breaker-3").status_code == 200


def test_what_is_no_client_is_refused() -> None:
    """The error says what to pass instead."""
    with pytest.raises(PolicyError, match="redis must be"):
        breakers_app(7)
    with pytest.raises(PolicyError, match="prefix"):
        breakers_app("redis://localhost", prefix="{a}")


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
def test_the_page_is_mounted_in_an_application(client: redis.Redis, kind: str) -> None:
    """Under a path all links, assets, cookies and forms stay under it, and no lifespan is needed."""
    make(client, "api")
    page = breakers_app(client, read_only=False, authorize=lambda request: "ann")
    if kind == "fastapi":
        app: Any = FastAPI()
        app.mount("/ops/breakers", page)
    else:
        app = Starlette(routes=[Mount("/ops/breakers", page)])
    with served(app) as address, httpx.Client(base_url=address, timeout=20, follow_redirects=True) as browser:
        board = browser.get("/ops/breakers/")
        assert row_names(board) == ["api"]
        links = re.findall(r'(?:href|src|action|data-events)="(/[^"]*)"', board.text)
        assert links
        assert all(link.startswith("/ops/breakers/") for link in links)
        assert all(browser.get(html.unescape(link)).status_code == 200 for link in links if "/events" not in link)
        (cookie,) = browser.cookies.jar
        assert cookie.path == "/ops/breakers"
        form = {TOKEN_FIELD: cookie.value, "confirmed": "yes", **FORCE}
        done = browser.post("/ops/breakers/breakers/api/force-open", data=form)
        assert done.url.path == "/ops/breakers/breakers/api"
        assert "Done: force open" in done.text


# Who may see, who may act


def test_writing_needs_somebody_who_says_who_acts() -> None:
    """A page that writes for everybody is not made."""
    with pytest.raises(PolicyError, match="authorize"):
        breakers_app("redis://localhost", read_only=False)


def authorizers() -> list[Any]:
    """The forms that an authorize function may have."""

    def plain(request: Any) -> str | None:
        return request.headers.get("x-operator")

    async def coroutine(request: Any) -> str | None:
        return request.headers.get("x-operator")

    class Instance:
        async def __call__(self, request: Any) -> str | None:
            return request.headers.get("x-operator")

    return [plain, coroutine, Instance(), lambda request: coroutine(request)]


@pytest.mark.parametrize("authorize", authorizers(), ids=["plain", "async", "instance", "lambda"])
@pytest.mark.parametrize("read_only", [True, False])
def test_with_authorize_every_page_asks(client: redis.Redis, authorize: Any, read_only: bool) -> None:
    """A stranger sees no page, no JSON and no events; an operator does, plain or async."""
    make(client, "api")
    app = breakers_app(client, read_only=read_only, authorize=authorize)
    with served(app) as address, httpx.Client(base_url=address, timeout=20) as page:
        for path in (
            "/",
            "/breakers/api",
            "/api/breakers",
            "/api/breakers/api",
            "/api/openapi.json",
            "/fleet",
            "/api/fleet",
            "/events",
        ):
            refused = page.get(path)
            assert refused.status_code == 403, path
            assert "data-name" not in refused.text
        assert page.post("/breakers/api/reset").status_code == 403
        answer = page.get("/", headers={"x-operator": "ann"})
        assert row_names(answer) == ["api"]
        assert "ann" in answer.text


def test_an_authorize_function_may_answer_for_itself(client: redis.Redis) -> None:
    """The HTTP error that it raises reaches the browser."""

    def authorize(request: Any) -> Any:
        raise HTTPException(418, "tea only")

    with served(breakers_app(client, authorize=authorize)) as address:
        answer = httpx.get(address)
        assert (answer.status_code, "tea only" in answer.text) == (418, True)


@pytest.mark.parametrize(
    "found",
    [
        OSError("secret"),
        CircuitOpenError("secret", "open", 1.0),
        ValueError("secret"),
        ["secret"],
        b"secret",
        "",
        "n" * 101,
    ],
    ids=repr,
)
def test_an_authorize_function_that_fails_admits_nobody(
    client: redis.Redis, caplog: pytest.LogCaptureFixture, found: Any
) -> None:
    """Whatever it raises or returns instead of a name is for the log, not for strangers; Redis is not blamed."""

    def authorize(request: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    make(client, "api")
    with served(breakers_app(client, read_only=False, authorize=authorize)) as address:
        for answer in (httpx.get(address), httpx.get(f"{address}/events"), httpx.post(f"{address}/breakers/api/reset")):
            assert answer.status_code == 500
            assert "the log of the web server" in answer.text
            assert not re.search("secret|data-name|Redis does not answer", answer.text)
    assert "authorize" in caplog.text


def test_a_page_that_only_reads_refuses_to_write(client: redis.Redis, site: Site) -> None:
    """Whatever is sent, nothing changes; the page shows no form."""
    make(client, "api")
    before = client.get(keys_of("api").state)
    for page in (site(read_only=True), site(read_only=True, authorize=lambda request: "ann")):
        assert "<form method" not in page.get("/breakers/api").text
        for action in ACTIONS:
            answer = page.post(
                f"/breakers/api/{action}",
                data={TOKEN_FIELD: "t", "confirmed": "yes", **FORCE},
                headers={"cookie": f"{COOKIE}=t"},
            )
            assert (answer.status_code, "only reads" in answer.text) == (403, True)
    assert client.get(keys_of("api").state) == before
    assert client.get(keys_of("api").policy) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
    ids=str,
)
def test_requests_of_other_sites_are_refused(client: redis.Redis, site: Site, headers: dict[str, str]) -> None:
    """Even with the right token and cookie, a form of another site changes nothing; nor does JSON."""
    make(client, "api")
    page = site()
    assert post(page, "/breakers/api/force-open", {"confirmed": "yes", **FORCE}, **headers).status_code == 403
    assert act(page, "api", "reset", **headers).status_code == 403
    assert "forced" not in document(client, "api")


@pytest.mark.parametrize("token", ["", "wrong", "\u00e9"])
def test_a_form_without_the_right_token_is_refused(client: redis.Redis, site: Site, token: str) -> None:
    """A token must be that of the cookie; without a cookie no token is right."""
    make(client, "api")
    page = site()
    path, form = "/breakers/api/force-open", {"confirmed": "yes", **FORCE}
    assert post(page, path, form, token).status_code == 403
    assert page.post(path, json={"duration": 60, "note": "x"}).status_code == 403
    assert page.post(path, json={"duration": 60, "note": "x"}, headers={TOKEN_HEADER: "wrong"}).status_code == 403
    page.cookies.clear()
    assert page.post(path, data={TOKEN_FIELD: token, **form}).status_code == 403
    assert "forced" not in document(client, "api")


def test_the_cookie_is_for_this_page_only(client: redis.Redis, site: Site) -> None:
    """No script reads it and no other site sends it; a page that only reads sets none."""
    cookie = site().get("/").headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "set-cookie" not in site(read_only=True).get("/").headers


def test_every_answer_says_what_browsers_may_do(client: redis.Redis, site: Site) -> None:
    """Pages, JSON, assets and errors alike: nothing inline, nothing foreign, no frame, no guessing of types."""
    make(client, "api")
    page = site()
    found = re.findall(r'/static/[^"]+', page.get("/").text)
    assert len(found) == 3
    for path in ("/", "/breakers/api", "/api/breakers", "/nowhere", "/static/none.css", "/api/breakers/x", *found):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert ("no-store" in headers["cache-control"]) != (path in found)


def test_assets_are_only_those_of_the_page(client: redis.Redis, site: Site) -> None:
    """No path leads out of the folder."""
    page = site(read_only=True)
    for name in ("..%2f_app.py", "page.html", "%2e%2e%2ftemplates%2fbase.html", "x.css", "%00.css"):
        assert page.get(f"/static/{name}").status_code == 404, name


# Actions


def test_an_action_is_carried_out_only_once_it_is_confirmed(client: redis.Redis, site: Site) -> None:
    """The form leads to a question that repeats what was typed; its button acts, and the history says who and why."""
    make(client, "api")
    page = site()
    asked = post(page, "/breakers/api/force-open", {**FORCE, "note": "a <b>bold</b> move"})
    assert (asked.status_code, "Force open?" in asked.text) == (200, True)
    assert "<b>bold" not in asked.text
    assert "forced" not in document(client, "api")
    fields = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', asked.text))
    fields = {name: html.unescape(value) for name, value in fields.items()}
    done = page.post("/breakers/api/force-open", data={**fields, "confirmed": "yes"}, follow_redirects=True)
    assert "Done: force open" in done.text
    stored = document(client, "api")
    assert (stored["forced"], stored["operator"], stored["note"]) == ("open", "ann", "a <b>bold</b> move")
    entry = scene.breaker(client, "api").history(1)[0]
    assert (entry.reason, entry.operator, entry.note) == ("forced", "ann", "a <b>bold</b> move")
    assert 590 < stored["forced_until_ms"] / 1000 - time.time() < 610


def test_every_action_does_what_it_says(client: redis.Redis, site: Site) -> None:
    """One after the other, by JSON: each changes the breaker as its name says, under the operator's name."""
    one = make(client, "a/b c")
    page = site()

    def done(action: str, **body: Any) -> dict[str, Any]:
        answer = act(page, "a/b c", action, body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["breaker"])

    for action, condition in (("force-open", "forced_open"), ("force-closed", "forced_closed")):
        seen = done(action, duration=60, note="because")
        assert (seen["condition"], seen["operator"], seen["note"]) == (condition, "ann", "because")
    assert done("clear")["condition"] == "closed"
    seen = done("set-policy", duration=60, note="noisy", fields={"failure_threshold": 9, "window": 5.5})
    assert (seen["override"], seen["override_operator"]) == ({"failure_threshold": 9, "window_ms": 5500}, "ann")
    assert seen["override_until"] is not None
    assert done("shadow", note="dry run")["shadow"]
    assert done("clear-policy")["override"] == {}
    scene.trip(client, "a/b c")
    assert done("probe", note="fixed")["until"] <= time.time() + 1
    assert one.acquire().release() is None
    assert done("reset")["condition"] == "closed"
    by_ann = [entry.reason for entry in one.history() if entry.operator == "ann"][::-1]
    assert by_ann == [
        *("forced", "forced", "clear_forced"),
        *("set_policy", "set_policy", "clear_policy"),
        "probe",
        "reset",
    ]


def test_the_policy_form_sets_the_fields_that_are_filled_in(client: redis.Redis, site: Site) -> None:
    """Empty fields stay; flags, numbers, seconds and "none" are understood."""
    make(client, "api")
    page = site()
    fields = {"failure_threshold": " 7 ", "reset_timeout": "2500ms", "enforce": "false", "error_rate_threshold": "none"}
    form = {f"policy.{name}": value for name, value in {**fields, "quorum": ""}.items()}
    asked = post(page, "/breakers/api/set-policy", {**form, "note": "why"})
    assert "until somebody ends it" in asked.text
    done = post(page, "/breakers/api/set-policy", {**form, "note": "why", "confirmed": "yes"})
    assert done.status_code == 303
    override = json.loads(client.get(keys_of("api").policy))
    assert override == {
        "failure_threshold": 7,
        "reset_timeout_ms": 2500,
        "enforce": False,
        "error_rate_threshold": 0,
        "operator": "ann",
        "note": "why",
    }


@pytest.mark.parametrize(
    ("action", "form", "message"),
    [
        ("force-open", {"note": "x"}, "how long"),
        ("force-open", {"amount": "5"}, "reason"),
        ("force-open", {**FORCE, "amount": "-1"}, "length of time"),
        ("force-open", {**FORCE, "amount": "nan"}, "length of time"),
        ("force-open", {**FORCE, "amount": "1e999"}, "length of time"),
        ("force-open", {**FORCE, "amount": "40", "unit": "days"}, "from 0.001 to 2592000 seconds"),
        ("force-open", {**FORCE, "unit": "weeks"}, "length of time"),
        ("force-open", {**FORCE, "note": "n" * 201}, "200"),
        ("set-policy", {"note": "x"}, "at least one field"),
        ("set-policy", {"note": "x", "policy.quorum": "0"}, "quorum must be"),
        ("set-policy", {"note": "x", "policy.quorum": "two"}, "a whole number"),
        ("set-policy", {"note": "x", "policy.enforce": "maybe"}, "true or false"),
        ("set-policy", {"note": "x", "policy.window": "soon"}, "250ms, 10m"),
        ("set-policy", {"note": "x", "policy.window": "none"}, "window must be"),
        ("set-policy", {"note": "x", "policy.nothing": "1"}, "not a policy field"),
    ],
)
def test_a_bad_form_says_what_is_wrong_and_changes_nothing(
    client: redis.Redis, site: Site, action: str, form: dict[str, str], message: str
) -> None:
    """Whether confirmed or not, the answer is 400 with the reason."""
    make(client, "api")
    before = client.get(keys_of("api").state)
    answer = post(site(), f"/breakers/api/{action}", {**form, "confirmed": "yes"})
    assert (answer.status_code, message in html.unescape(answer.text)) == (400, True), answer.text[-600:]
    assert client.get(keys_of("api").state) == before
    assert client.get(keys_of("api").policy) is None


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"odd": 1},
        {"duration": "x", "note": "x"},
        {"note": 5, "duration": 1},
        {"fields": []},
        {"duration": 1},
        {"note": " \u202e", "duration": 1},
    ],
)
def test_a_bad_json_body_is_refused(client: redis.Redis, site: Site, body: Any) -> None:
    """Programs get 400 with the reason as JSON."""
    make(client, "api")
    answer = act(site(), "api", "force-open", body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["detail"]
    assert "forced" not in document(client, "api")


def test_bodies_have_limits(client: redis.Redis, site: Site) -> None:
    """A body that is too long, of unknown length or no JSON is refused; so is an unknown action."""
    make(client, "api")
    page = site()
    long = post(page, "/breakers/api/reset", {"note": "n" * 70_000})
    assert long.status_code == 413
    assert page.post("/breakers/api/reset", content=iter([b"x"])).status_code == 413
    assert post(page, "/breakers/api/reset", {f"field-{number}": "x" for number in range(101)}).status_code == 400
    for kind in ("text/plain", "multipart/form-data; boundary=b; charset=undefined"):
        answer = page.post("/breakers/api/reset", content=b"--b\r\n", headers={"content-type": kind})
        assert (answer.status_code, "must be a form" in answer.text) == (415, True)
    headers = {"content-type": "application/json", TOKEN_HEADER: page.cookies[COOKIE]}
    assert page.post("/breakers/api/reset", content=b"{", headers=headers).status_code == 400
    assert page.post("/breakers/api/reset", content=b"[" * 60000, headers=headers).status_code == 400
    assert act(page, "api", "explode").status_code == 404


def test_a_probe_is_refused_while_a_state_is_forced(client: redis.Redis, site: Site) -> None:
    """What the breaker's state does not allow is a conflict."""
    make(client, "api").force_open(60)
    answer = act(site(), "api", "probe")
    assert answer.status_code == 409
    assert "forced" in answer.json()["detail"]


# Hostile texts


@pytest.mark.parametrize("name", [name for name in scene.HOSTILE if name != ".."], ids=range(len(scene.HOSTILE) - 1))
def test_hostile_names_errors_and_notes_do_no_harm(client: redis.Redis, site: Site, name: str) -> None:
    """They are escaped on board and page, isolated from the text around them, and their page and actions work."""
    text = "</script><script>alert(1)</script> \x1b[31m \u202e &amp;"
    scene.fail(scene.breaker(client, name, Policy(failure_threshold=1)), 1, ValueError(text))
    page = site()
    board = page.get("/")
    (link,) = re.findall(r'href="(/breakers/[^"]+)"', board.text)
    one = page.get(html.unescape(link))
    assert one.status_code == 200
    asked = post(page, f"{html.unescape(link)}/force-open", {**FORCE, "note": text})
    done = act(page, name, "force-open", {"duration": 60, "note": text})
    assert done.json()["breaker"]["name"] == name
    again = page.get(html.unescape(link))
    for answer in (board, one, asked, again):
        assert not re.search(r"<script(?! src=\"/static/page\.js)|<img|<b>bold", answer.text)
        assert not set(answer.text) & {"\x1b", "\x07", "\u202e"}


def test_names_that_no_address_can_carry_are_shown_without_a_link(client: redis.Redis, site: Site) -> None:
    """Browsers resolve "..", and bytes that are no UTF-8 have no name."""
    stored = client.get(make(client, "..").keys.state)
    client.set(b"circuit_breaker:\xff\xfe:state", stored)
    page = site(read_only=True)
    board = page.get("/")
    assert set(row_names(board)) == {"..", "\\xff\\xfe"}
    assert "/breakers/" not in re.sub(r"<header.*?</header>", "", board.text, flags=re.DOTALL)
    with events(page) as messages:
        make(client, "\\xff\\xfe")  # looks like the other, and is none
        until(messages, lambda message: len(message["order"]) == 3)


def test_a_strange_history_and_document_are_shown(client: redis.Redis, site: Site) -> None:
    """Whatever another program wrote into history and document, the page answers."""
    make(client, "api")
    keys = keys_of("api")
    odd = {"time_ms": 1, "from": "<i>", "to": "nowhere", "reason": "<u>", "generation": 1}
    client.xadd(keys.history, {**odd, "failure_count": 1, "success_count": 1, "instance": "<s>\u202e"})
    client.xadd(
        keys.history,
        {
            **odd,
            "reason": "set_policy",
            "override": '{"quorum":"<s>"}',
            "failure_count": 1,
            "success_count": 1,
            "instance": "",
        },
    )
    client.xadd(keys.history, {**odd, "time_ms": 10**15, "failure_count": 1, "success_count": 1, "instance": ""})
    client.set(keys_of("odd").state, b"no document")
    client.set(keys_of("foreign").state, json.dumps({"state": "open", "failure_count": 3, "opened_at": 1}))
    client.set(
        keys_of("far").state, json.dumps({"state": "open", "opened_at": 9e13, "error": "half of a pair: \ud800"})
    )
    client.set(keys_of("far").policy, '{"failure_threshold":"<i>"}')
    page = site(read_only=True)
    assert set(row_names(page.get("/"))) == {"api", "odd", "foreign", "far"}
    assert page.get("/api/breakers").json()["total"] == 4
    for name in ("api", "odd", "foreign", "far"):
        answer = page.get(f"/breakers/{name}")
        assert answer.status_code == 200, answer.text
        assert not re.search(r"<[isu]>", answer.text)
        assert page.get(f"/api/breakers/{name}").status_code == 200
    assert "no document of a breaker" in page.get("/breakers/odd").text


# Events


@contextlib.contextmanager
def events(page: httpx.Client, query: str = "") -> Iterator[Iterator[dict[str, Any]]]:
    """The events of the page."""

    def read(answer: httpx.Response) -> Iterator[dict[str, Any]]:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))

    with page.stream("GET", f"/events{query}", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield read(answer)


def until(messages: Iterator[dict[str, Any]], condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The first message of which the condition is true."""
    return next(message for message in messages if condition(message))


def test_events_tell_what_has_changed(client: redis.Redis, site: Site) -> None:
    """First the whole view, then the rows that changed, with the new order and counts."""
    for name in ("api", "web"):
        make(client, name)
    page = site(read_only=True)
    with events(page) as messages:
        first = next(messages)
        assert (sorted(first["order"]), first["rows"].keys()) == (["api", "web"], {"api", "web"})
        scene.trip(client, "web", "refused")
        news = until(messages, lambda message: "open" in message["rows"].get("web", "").split('"')[3])
        assert news["order"] == ["web", "api"]
        assert "ConnectionError: refused" in news["rows"]["web"]
    with events(page, "?group=open") as messages:
        assert next(messages)["order"] == ["web"]


def test_events_of_one_breaker(client: redis.Redis, site: Site) -> None:
    """The page of a breaker is told of its own changes, a policy override included."""
    make(client, "api")
    page = site(read_only=True)
    with events(page, "?breaker=api") as messages:
        assert "closed" in next(messages)["html"]
        scene.breaker(client, "api").set_policy(ramp_up=1, operator="bob")
        assert "bob" in until(messages, lambda message: "policy override" in message["html"])["html"]
        scene.trip(client, "api", "refused")
        assert "refused" in until(messages, lambda message: "refused" in message["html"])["html"]
        client.delete(*keys_of("api"))
        assert "stores nothing" in until(messages, lambda message: "html" not in message)["status"]
        make(client, "api")
        assert "Live" in until(messages, lambda message: "html" in message)["status"]
    assert page.get("/events?breaker=%7B").status_code == 400


def test_the_page_of_a_breaker_does_not_stay_live_without_redis(own_server: EmbeddedServer, site: Site) -> None:
    """While Redis hangs the open page of a breaker says so, and afterwards that it is live again."""
    with redis.Redis.from_url(own_server.url) as admin:
        make(admin, "api")
    with events(site(own_server.url, read_only=True), "?breaker=api") as messages:
        assert "Live" in next(messages)["status"]
        with stopped(own_server):
            assert until(messages, lambda message: "Redis does not answer" in message["status"])
        assert "html" in until(messages, lambda message: "Live" in message["status"])


def test_an_application_goes_on_while_redis_hangs(own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pages wait for Redis, the threads of the application that mounts the page are free."""
    monkeypatch.setattr(_reader, "TIMEOUT", 20.0)
    with redis.Redis.from_url(own_server.url) as admin:
        make(admin, "api")
    app = FastAPI()
    app.add_api_route("/own", lambda: "free")
    app.mount("/ops", breakers_app(own_server.url))
    with served(app) as address, concurrent.futures.ThreadPoolExecutor(60) as pool:
        with stopped(own_server):
            waiting = [pool.submit(httpx.get, f"{address}/ops/breakers/api", timeout=60) for _ in range(60)]
            assert concurrent.futures.wait(waiting, 3, concurrent.futures.FIRST_COMPLETED).done == set()
            assert httpx.get(f"{address}/own", timeout=60).json() == "free"
            assert not any(one.done() for one in waiting)
        assert {one.result().status_code for one in waiting} <= {200, 503}


def test_a_breaker_that_appears_or_expires_is_noticed_without_a_notification(client: redis.Redis, site: Site) -> None:
    """All breakers are read again every few seconds."""
    stored = client.get(make(client, "api").keys.state)
    with events(site(read_only=True)) as messages:
        assert next(messages)["order"] == ["api"]
        client.set(keys_of("new").state, stored)
        until(messages, lambda message: set(message["order"]) == {"api", "new"})
        client.delete(keys_of("api").state)
        until(messages, lambda message: message["order"] == ["new"])


def test_without_the_right_to_subscribe_the_board_is_read_all_the_same(own_server: EmbeddedServer, site: Site) -> None:
    """The page says that it is not live, and shows a change a few seconds later."""
    with redis.Redis.from_url(own_server.url) as admin:
        admin.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-psubscribe"])
        make(admin, "api")
        path = admin.connection_pool.connection_kwargs["path"]
        with redis.Redis(unix_socket_path=path, username="reader", password="x") as reader:
            page = site(reader, read_only=True)
            assert "refuses a subscription" in page.get("/").text
            with events(page) as messages:
                scene.trip(admin, "api")
                until(messages, lambda message: "refused" in message["rows"].get("api", ""))


def test_an_outage_is_shown_and_survived(own_server: EmbeddedServer, site: Site) -> None:
    """While Redis hangs, board and health say so and the breaker's page is unavailable; afterwards all is well."""
    with redis.Redis.from_url(own_server.url) as admin:
        make(admin, "api")
    page = site(own_server.url, read_only=True, health=True)
    assert page.get("/health").text == "ok\n"
    with stopped(own_server):
        wait_until(lambda: "Redis does not answer" in page.get("/").text, 60)
        assert page.get("/health").status_code == 503
        assert page.get("/breakers/api").status_code == 503
        assert page.get("/api/breakers").json()["error"]
    wait_until(lambda: page.get("/health").status_code == 200, 60)
    assert page.get("/breakers/api").status_code == 200


def test_a_page_that_cannot_reach_redis_says_so(site: Site) -> None:
    """A wrong address is an answer, not a wait without end."""
    page = site("redis://127.0.0.1:1", read_only=True)
    assert "Redis does not answer" in page.get("/").text
    assert page.get("/api/breakers/x").status_code == 503


def test_nothing_is_read_while_nobody_looks(client: redis.Redis, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends soon after the last viewer has left; the next viewer starts another."""
    monkeypatch.setattr(_reader, "LINGER", 0.1)
    make(client, "api")

    def reading() -> bool:
        return any(thread.name == "pybreaker_redis-board" for thread in threading.enumerate())

    wait_until(lambda: not reading())  # those of other tests
    page = site(read_only=True)
    with events(page) as messages:
        next(messages)
        time.sleep(0.3)
        assert reading()
    wait_until(lambda: not reading(), 30)
    assert row_names(page.get("/")) == ["api"]


def test_health_is_off_unless_wanted(client: redis.Redis, site: Site) -> None:
    """It asks for no name, since a load balancer has none."""
    assert site().get("/health").status_code == 404
    assert site(health=True, authorize=lambda request: None).get("/health").status_code == 200


# The command


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[httpx.Client]:
    """The command `serve` in a process of its own, and a client of it."""
    words = [sys.executable, "-m", "pybreaker_redis", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if "serving" in line), "")
        (address,) = re.findall(r"http://\S+?(?=/ )", line)
        with httpx.Client(base_url=address, timeout=20) as page:
            yield page
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


def test_the_command_serves_a_page_that_only_reads(server: EmbeddedServer, client: redis.Redis) -> None:
    """On a loopback address, under that address only: no other site can make itself its name."""
    make(client, "api")
    with serving("--redis", server.url, "--allow-host", "ops.example") as page:
        assert row_names(page.get("/")) == ["api"]
        assert page.post("/breakers/api/reset").status_code == 403
        assert page.get("/", headers={"host": "evil.example"}).status_code == 400
        assert page.get("/", headers={"host": "ops.example"}).status_code == 200
        assert page.get("/health").status_code == 404


def test_names_of_the_server_count_beyond_loopback(server: EmbeddedServer, client: redis.Redis) -> None:
    """With --allow-host a page that anybody can reach answers under these names and its address only."""
    with serving("--redis", server.url, "--host", "0.0.0.0", "--allow-host", "ops.example") as page:
        assert page.get("/", headers={"host": "ops.example"}).status_code == 200
        assert page.get("/", headers={"host": "evil.example"}).status_code == 400
    with serving("--redis", server.url, "--host", "127.1") as page:  # loopback, in short
        assert page.get("/", headers={"host": "evil.example"}).status_code == 400


def test_a_proxy_shows_the_page_under_a_path(server: EmbeddedServer, client: redis.Redis) -> None:
    """The proxy strips the path; links, assets, cookie and redirections have it."""
    make(client, "api")
    password = {"PYBREAKER_REDIS_WEB_PASSWORD": "pw"}
    with serving("--redis", server.url, "--write", "--root-path", "/ops/breakers/", **password) as page:
        page.auth = ("ann", "pw")
        board = page.get("/")
        links = re.findall(r'(?:href|src|action|data-events)="(/[^"]*)"', board.text)
        assert all(link.startswith("/ops/breakers/") for link in links)
        assert "/ops/breakers/breakers/api" in links
        assert "Path=/ops/breakers;" in board.headers["set-cookie"]
        (cookie,) = page.cookies.jar
        form = {TOKEN_FIELD: str(cookie.value), "confirmed": "yes"}
        headers = {"cookie": f"{COOKIE}={cookie.value}"}
        done = page.post("/breakers/api/reset", data=form, headers=headers)
        assert done.headers["location"] == "/ops/breakers/breakers/api?done=reset"


def test_a_password_of_any_bytes(server: EmbeddedServer, client: redis.Redis) -> None:
    """The environment may hold bytes that are no UTF-8."""
    password = b"\xff:\xfe"
    with serving("--redis", server.url, PYBREAKER_REDIS_WEB_PASSWORD=os.fsdecode(password)) as page:
        given = base64.b64encode(b"ann:" + password).decode()
        assert page.get("/", headers={"authorization": f"Basic {given}"}).status_code == 200
        assert page.get("/", auth=("ann", "\xff:\xfe")).status_code == 401


def test_the_command_writes_for_those_who_know_the_password(server: EmbeddedServer, client: redis.Redis) -> None:
    """The user name is the operator's name; any other password is asked for again."""
    make(client, "api")
    with serving("--redis", server.url, "--write", PYBREAKER_REDIS_WEB_PASSWORD="s3cret:\u00e9") as page:
        refused = page.get("/")
        assert (refused.status_code, refused.headers["www-authenticate"].split()[0]) == (401, "Basic")
        for wrong in (("ann", "guess"), ("", "s3cret:\u00e9")):
            assert page.get("/", auth=wrong).status_code == 401
        for odd in ("Basic ???", "Basic " + "w6k=", "Bearer x", "Basic"):
            assert page.get("/", headers={"authorization": odd}).status_code == 401
        page.auth = ("zo\u00eb", "s3cret:\u00e9")
        assert act(page, "api", "force-open", {"duration": 60, "note": "x"}).status_code == 200
    assert document(client, "api")["operator"] == "zo\\xeb"


def test_the_command_asks_a_function_who_it_is(server: EmbeddedServer, client: redis.Redis, tmp_path: Any) -> None:
    """A module of the working directory may name the operators."""
    (tmp_path / "staff.py").write_text("def who(request):\n    return request.headers.get('x-user')\n")
    make(client, "api")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        with serving("--redis", server.url, "--write", "--authorize", "staff:who") as page:
            assert page.get("/").status_code == 403
            page.headers["x-user"] = "bob"
            assert act(page, "api", "shadow", {"note": "x"}).json()["breaker"]["override_operator"] == "bob"
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--write"], "PYBREAKER_REDIS_WEB_PASSWORD"),
        (["--authorize", "staff"], "module:function"),
        (["--authorize", "no_such_module:f"], "no_such_module"),
        (["--authorize", "json:no_such"], "no_such"),
        (["--authorize", "sys:path"], "cannot be called"),
        (["--host", "192.0.2.1"], "cannot be used"),
        (["--allow-host", "ops.example:8443"], "without a port"),
        (["--allow-host", "a*"], "not a host name"),
        (["--root-path", "//evil.example"], "must be a path"),
    ],
    ids=str,
)
def test_the_command_refuses_what_cannot_work(arguments: list[str], message: str) -> None:
    """It says what is missing, and serves nothing."""
    words = [sys.executable, "-m", "pybreaker_redis", "serve", "--port", "0", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYBREAKER_REDIS_WEB_PASSWORD"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**environment, "COLUMNS": "300"})
    assert done.returncode == 2
    assert message in done.stderr


IMPORT = """
try:
    import pybreaker_redis.web
except ModuleNotFoundError as error:
    print(error.name, error)
"""


@pytest.mark.parametrize("package", sorted({*EXTRAS["web"]} - {"uvicorn"}))
def test_without_the_extra(package: str) -> None:
    """The error names the extra, whichever of its packages is missing. Only the command needs uvicorn."""
    done = run_without([package], IMPORT)
    assert done.stdout.startswith(f"{package} the operators' page needs an extra: ")
    assert "pip install 'pybreaker_redis[web]'" in done.stdout
