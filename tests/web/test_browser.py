"""The operators' page in a real browser: live, with and without JavaScript, in both themes, on a telephone."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from conftest import wait_until
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from pybreaker_redis import Policy
from pybreaker_redis.web import breakers_app

from . import scene
from .browser import CHROMIUM, QUIET
from .conftest import served

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: Debian's package chromium")
# Texts that are wider or taller than the box that shows them, in a box that hides what does not fit.
CUT = """() => [...document.querySelectorAll("body *")].filter((one) =>
    one.textContent.trim() && !one.closest(".quiet, .skip, pre, svg, [hidden], thead, option") &&
    (one.scrollWidth > one.clientWidth + 1 && one.clientWidth && getComputedStyle(one).overflow !== "visible"
     || one.getBoundingClientRect().right > innerWidth + 1)).map((one) => one.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's browser, without a window."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def address(client: redis.Redis) -> Iterator[str]:
    """A page on which ann may act."""
    with served(breakers_app(client, read_only=False, authorize=lambda request: "ann")) as found:
        yield found


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Opens pages of the site; afterwards, none of them may have had an error or broken its own rules."""
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    with contextlib.ExitStack() as stack:

        def make(path: str = "/", **options: Any) -> Page:
            context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 800}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.on("console", note)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(path)
            return page

        yield make
    assert complaints == []


def shown(page: Page) -> list[str]:
    """The names on the board, in order."""
    return [str(name) for name in page.locator("#rows tr").evaluate_all("all => all.map((row) => row.dataset.name)")]


def row(page: Page, name: str) -> Any:
    """The row of a breaker."""
    return page.locator(f'#rows tr[data-name="{name}"]')


def test_the_board_of_three_hundred_breakers(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """Fifty at a time, the urgent ones first; filter, search, order and pages work without a reload."""
    for name in scene.names(300):
        scene.breaker(client, name).call(int)
    scene.trip(client, "search-api", "refused")
    page = open_page()
    page.evaluate("window.sameDocument = true")
    expect(page.locator("#rows tr")).to_have_count(50)
    expect(page.locator("#chips a").first).to_contain_text("300")
    assert shown(page)[0] == "search-api"
    expect(row(page, "search-api")).to_contain_text("failures in a row: ConnectionError: refused")
    page.get_by_role("link", name="Next").click()
    expect(page.locator("#pager")).to_contain_text("51 to 100 of 300")
    page.locator("#chips a.open").click()
    expect(page.locator("#rows tr")).to_have_count(1)
    assert "group=open" in page.url
    page.go_back()
    page.locator("#chips a").first.click()
    page.get_by_role("searchbox").fill("BILLING-")
    expect(page.locator("#rows tr")).to_have_count(10)
    page.get_by_label("Order").select_option("name")
    expect(page.locator("#rows tr").first).to_have_attribute("data-name", "billing-api")
    page.get_by_role("searchbox").fill("no such service")
    expect(page.locator("#pager")).to_contain_text("No breaker matches.")
    assert page.evaluate("window.sameDocument")


def test_a_trip_appears_without_a_reload_within_a_second(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """From Redis to the screen, ten times in turn: half of them take less than a second, with the countdown."""
    for name in scene.names(30):
        scene.breaker(client, name).call(int)
    page = open_page()
    expect(page.locator("#status")).to_have_text("Live")
    took = []
    for name in scene.names(10):
        scene.fail(scene.breaker(client, name, Policy(failure_threshold=2, reset_timeout=45)), 2, OSError("refused"))
        began = time.monotonic()
        row(page, name).get_by_text("open", exact=True).wait_for()
        took.append(time.monotonic() - began)
        assert re.search(r"probe in 4\d s", row(page, name).inner_text())
    assert sorted(took)[len(took) // 2] < 1, took
    assert set(shown(page)[:10]) == set(scene.names(10))


def test_the_countdown_runs(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """Without any message from the server, seconds pass, until a probe is due."""
    scene.fail(scene.breaker(client, "api", Policy(failure_threshold=1, reset_timeout=2)), 1, OSError("refused"))
    page = open_page()
    expect(row(page, "api")).to_contain_text("probe is due")


def test_force_and_clear_through_the_page(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """An operator forces a circuit open with an end and a reason, sees it, and clears it again."""
    one = scene.breaker(client, "payments-api")
    one.call(int)
    page = open_page()
    page.get_by_role("link", name="payments-api").click()
    page.get_by_label("Reason").first.fill("moves to the new data centre")
    page.get_by_label("For", exact=True).first.fill("15")
    page.get_by_role("button", name="Force open").click()
    expect(page.get_by_role("heading", name="Force open?")).to_be_visible()
    assert one.snapshot().forced is None
    page.get_by_role("button", name="Force open").click()
    expect(page.locator("#summary")).to_contain_text("forced open")
    expect(page.locator("#summary")).to_contain_text("by ann: moves to the new data centre")
    expect(page.locator("#summary")).to_contain_text(re.compile(r"ends in 1[45] m"))
    seen = one.snapshot()
    assert (seen.forced, seen.operator, seen.note) == ("open", "ann", "moves to the new data centre")
    page.get_by_role("button", name="Clear forced state").click()
    page.get_by_role("button", name="Clear forced state").click()
    expect(page.locator("#summary .state")).to_have_text("open")
    expect(page.locator("#timeline")).to_contain_text("forced state ended")
    assert one.snapshot().forced is None


def test_a_breakers_page_is_live(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """Its state, timeline and reason follow, while what an operator types stays."""
    scene.breaker(client, "api").call(int)
    page = open_page("/breakers/api")
    page.get_by_label("Reason").first.fill("half a sent")
    scene.trip(client, "api", "refused")
    expect(page.locator("#summary")).to_contain_text("ConnectionError: refused")
    expect(page.locator("#timeline rect.open")).to_have_count(1)
    expect(page.get_by_label("Reason").first).to_have_value("half a sent")


def test_a_page_of_another_site_cannot_act(client: redis.Redis, browser: Browser, address: str) -> None:
    """A form that another site sends from the operator's own browser is refused, even with the operator's token."""
    one = scene.breaker(client, "api")
    one.call(int)
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    (cookie,) = context.cookies()
    form = f"""<form method=post action="{address}/breakers/api/force-open">
        <input name=csrf_token value="{cookie["value"]}"><input name=confirmed value=yes>
        <input name=amount value=5><input name=unit value=minutes><input name=note value=x></form>"""
    page.route("http://evil.example/", lambda route: route.fulfill(body=form, content_type="text/html"))
    page.goto("http://evil.example/")
    with page.expect_response("**/force-open") as answer:
        page.evaluate("document.forms[0].submit()")
    assert answer.value.status == 403
    assert one.snapshot().forced is None
    context.close()


def test_no_other_site_can_frame_the_page(client: redis.Redis, browser: Browser, address: str) -> None:
    """A frame of the page stays empty."""
    context = browser.new_context()
    page = context.new_page()
    page.route(
        "http://evil.example/",
        lambda route: route.fulfill(body=f'<iframe src="{address}/"></iframe>', content_type="text/html"),
    )
    page.goto("http://evil.example/")
    page.wait_for_load_state("networkidle")
    assert not any(frame.locator("#rows").count() for frame in page.frames)
    context.close()


def test_a_page_that_only_reads_shows_no_button(client: redis.Redis, browser: Browser) -> None:
    """And a form made by hand is refused."""
    one = scene.breaker(client, "api")
    one.call(int)
    with served(breakers_app(client)) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{address}/breakers/api")
        expect(page.locator("header")).to_contain_text("read only")
        assert page.get_by_role("button").count() == 0
        answer = page.evaluate("fetch(location.pathname + '/reset', {method: 'POST'}).then((it) => it.status)")
        assert answer == 403
        context.close()


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no-scripts"])
def test_hostile_texts_do_no_harm(client: redis.Redis, open_page: Callable[..., Page], scripts: bool) -> None:
    """Names, errors and notes of any kind are text: nothing runs, nothing is cut, each page opens."""
    for name in scene.HOSTILE:
        one = scene.breaker(client, name, Policy(failure_threshold=2))
        scene.fail(one, 1, ValueError("<b>bold</b>" + "x" * 200))
        one.force_open(600, operator="<i>ann", note="</td><script>document.title='owned'</script>" + "y" * 160)
    for width in (1280, 390):
        page = open_page(java_script_enabled=scripts)
        page.set_viewport_size({"width": width, "height": 800})
        expect(page.locator("#rows tr")).to_have_count(len(scene.HOSTILE))
        assert page.title() == "Circuit breakers"
        if scripts:
            assert page.evaluate(CUT) == []
        links = page.locator("#rows a").evaluate_all("all => all.map((one) => one.href)") if scripts else []
        for link in links:
            page.goto(link)
            expect(page.locator("#summary")).to_contain_text("forced open")
            assert page.title().endswith(" - circuit breakers")
            assert page.evaluate(CUT) == []


def test_the_page_works_without_javascript(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """Filter, search, pages and actions are links and forms; a reload shows what is new."""
    for name in scene.names(60):
        scene.breaker(client, name).call(int)
    page = open_page(java_script_enabled=False)
    expect(page.locator("noscript p")).to_contain_text("Reload")
    page.get_by_role("link", name="Next").click()
    expect(page.locator("#rows tr")).to_have_count(10)
    page.get_by_role("searchbox").fill("billing-api")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#rows tr")).to_have_count(1)
    scene.trip(client, "billing-api", "refused")
    wait_until(lambda: page.reload() and "refused" in row(page, "billing-api").inner_text())
    page.get_by_role("link", name="billing-api").click()
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("button", name="Reset").click()
    expect(page.locator(".done")).to_have_text("Done: reset.")
    expect(page.locator("#summary .state")).to_have_text("closed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_both_themes_at_every_width(
    client: redis.Redis, open_page: Callable[..., Page], scheme: str, width: int, tmp_path: Any
) -> None:
    """No text is cut, nothing scrolls sideways, and every text stands out from its ground (WCAG AA)."""
    scene.build(client, 100)
    scene.breaker(client, "billing-partner").force_open(3600, operator="ann", note="deploy")
    scene.breaker(client, "media-events").set_policy(enforce=False, operator="ann", note="dry run")
    page = open_page(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    for path in ("/", "/breakers/shipping-partner", "/breakers/media-events", "/breakers/billing-partner", "/fleet"):
        page.goto(path)
        expect(page.locator("main")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT) == []
        assert page.evaluate(FAINT) == []
        page.screenshot(path=os.path.join(tmp_path, "page.png"))


# Texts whose contrast with their ground is below 4.5.
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = color.map((one) => (one /= 255) <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const faint = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || one.closest("svg, noscript, .quiet, option")) continue;
    const [a, b] = [light(rgba(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(one.outerHTML.slice(0, 100));
  }
  return faint;
}"""


def test_the_board_is_used_by_keyboard(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """A skip link comes first, a slash searches, j and k walk the rows, Enter opens one; focus survives an update."""
    for name in ("api", "web"):
        scene.breaker(client, name).call(int)
    page = open_page("/?sort=name")
    expect(page.locator("#status")).to_have_text("Live")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(row(page, "web").get_by_role("link")).to_be_focused()
    page.keyboard.press("k")
    scene.trip(client, "api", "refused")
    expect(row(page, "api")).to_contain_text("refused")
    expect(row(page, "api").get_by_role("link")).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("web")
    expect(page.locator("#rows tr")).to_have_count(1)
    page.keyboard.press("Escape")
    page.locator("main").focus()
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="web")).to_be_visible()


def test_every_control_has_a_name(client: redis.Redis, open_page: Callable[..., Page]) -> None:
    """A screen reader hears what each link, field, button and picture is; each page has one first heading."""
    scene.bounce(client, "api", 2)
    page = open_page()
    for path in ("/", "/breakers/api", "/fleet"):
        page.goto(path)
        assert page.locator("h1").count() == 1
        assert (
            page.evaluate(
                """() => [...document.querySelectorAll("a, button, input:not([type=hidden]), select, svg[role=img]")]
            .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length))
            .map((one) => one.outerHTML)"""
            )
            == []
        )
        assert page.evaluate("document.documentElement.lang") == "en"


def test_an_outage_is_shown_and_ends(client: redis.Redis, browser: Browser) -> None:
    """While the web server is gone the page says so; afterwards it is live again by itself."""
    scene.breaker(client, "api").call(int)
    app = breakers_app(client)
    context = browser.new_context()
    page = context.new_page()
    with served(app) as address:
        page.goto(address)
        expect(page.locator("#status")).to_have_text("Live")
    expect(page.locator("#status")).to_contain_text("Connection lost")
    with served(app, int(address.rpartition(":")[2])):
        expect(page.locator("#status")).to_have_text("Live", timeout=60_000)
    context.close()


def test_an_open_page_of_a_breaker_tells_what_it_cannot_know(
    client: redis.Redis, open_page: Callable[..., Page]
) -> None:
    """Once the breaker has expired its page says so, and keeps what it knew."""
    scene.trip(client, "api")
    page = open_page("/breakers/api")
    expect(page.locator("#status")).to_have_text("Live")
    client.delete("circuit_breaker:api:state")
    expect(page.locator("#status")).to_contain_text("stores nothing for this breaker any more", timeout=30_000)
    expect(page.locator("#summary")).to_contain_text("connection refused")
    scene.trip(client, "api")
    expect(page.locator("#status")).to_have_text("Live")
